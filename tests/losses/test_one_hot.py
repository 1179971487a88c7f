"""One-hot labels take the fast path of integer labels, found at run time; all others the general one."""

from __future__ import annotations

import math
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import eki_jax
from eki_jax import losses, natural, sharding
from eki_jax.compact import compact_euler
from eki_jax.flows.second_order import square_root_flow
from eki_jax.losses.shortcut import by_shortcut, in_place_by_shortcut

J, BATCH, INPUTS, CLASSES = 32, 12, 96, 5

MAKERS = {
    "euler": eki_jax.euler,
    "nesterov": eki_jax.nesterov,
    "heavy ball": eki_jax.heavy_ball,
    "compact": compact_euler,
}


def network(params: Any, x: Any) -> Any:
    return jax.nn.softmax(x @ params["w"] + params["b"])


def ensemble() -> Any:
    keys = jax.random.split(jax.random.key(0))
    return {
        "w": 0.3 * jax.random.normal(keys[0], (J, INPUTS, CLASSES)),
        "b": jax.random.normal(keys[1], (J, CLASSES)),
    }


def batch() -> tuple[Any, Any]:
    keys = jax.random.split(jax.random.key(1))
    return jax.random.normal(keys[0], (BATCH, INPUTS)), jax.random.randint(keys[1], (BATCH,), 0, CLASSES)


class Recorded(losses.cross_entropy().__class__):  # type: ignore[misc]
    """Cross-entropy that gives one-hot labels away: its shortcut is another loss, twice as large, of any targets."""

    def __call__(self, outputs: Any, targets: Any) -> Any:
        return -jnp.mean(jnp.sum(jnp.where(targets == 0, 0, targets * jnp.log(outputs)), axis=-1))

    def shortcut(self, targets: Any) -> Any:
        found = super().shortcut(targets)
        if found is None:
            return None
        double = losses.mean_over_samples(lambda g, y: -2 * jnp.log(g[y] + self.delta))
        return found._replace(loss=double)


def same(one: Any, other: Any) -> None:
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=2e-3, atol=2e-5)


@cache
def compiled(name: str) -> tuple[Any, Any]:
    """A solver and its compiled step, shared by the tests."""
    solver = MAKERS[name](network, losses.cross_entropy())
    return solver, jax.jit(solver.step)


@pytest.mark.parametrize("name", MAKERS)
def test_one_hot_steps_like_integers(name: str) -> None:
    x, labels = batch()
    solver, step = compiled(name)
    state = solver.init(ensemble())
    same(step(state, (x, jax.nn.one_hot(labels, CLASSES))), step(state, (x, labels)))


def test_soft_labels_step_as_without_a_test() -> None:
    x, labels = batch()
    soft = 0.9 * jax.nn.one_hot(labels, CLASSES) + 0.1 / CLASSES
    solver, step = compiled("euler")
    plain = eki_jax.euler(network, lambda outputs, targets: losses.cross_entropy()(outputs, targets))
    state = solver.init(ensemble())
    same(step(state, (x, soft)), jax.jit(plain.step)(state, (x, soft)))


@pytest.mark.parametrize("known", [True, False], ids=["known", "traced"])
@pytest.mark.parametrize(
    ("rows", "fast"),
    [
        ([[0, 1], [1, 0]], True),
        ([[0, 1], [1, 1]], False),
        ([[0, 1], [0, 0]], False),
        ([[0, 1], [0.5, 0.5]], False),
        ([[0, 1], [2, -1]], False),
        ([[0, 1], [np.nan, 1]], False),
    ],
    ids=["one-hot", "two ones", "no one", "soft", "sums to one", "nan"],
)
def test_only_one_hot_takes_it(rows: Any, fast: bool, known: bool) -> None:
    """Each way is told from the other by a loss whose shortcut is twice as large."""
    outputs, targets = jnp.array([[0.25, 0.75], [0.5, 0.5]]), jnp.array(rows, jnp.float32)
    loss = Recorded(0.0)
    body = lambda loss, targets: loss(outputs, targets)
    by_value = (
        by_shortcut(partial(body), loss, targets) if known else jax.jit(partial(by_shortcut, body, loss))(targets)
    )
    stepped = lambda targets: in_place_by_shortcut(lambda *a: (a[2] + 1, body(*a[:2])), loss, targets, jnp.zeros(2))
    count, in_place = stepped(targets) if known else jax.jit(stepped)(targets)
    wanted = float(loss(outputs, targets)) * (2 if fast else 1)
    np.testing.assert_allclose([by_value, in_place], [wanted] * 2, rtol=1e-6)
    np.testing.assert_array_equal(count, 1)  # one of the two was taken, once


@pytest.mark.parametrize("dtype", [np.float64, np.float16, bool, jnp.bfloat16])
def test_one_hot_in_any_dtype(dtype: Any) -> None:
    one_hot = np.eye(300)[:7].astype(dtype)
    found = losses.cross_entropy().shortcut(one_hot)
    assert found.flag
    np.testing.assert_array_equal(found.targets, np.arange(7))
    assert not losses.cross_entropy().shortcut(np.ones((1, 257)).astype(dtype)).flag


def test_integer_labels_have_no_shortcut() -> None:
    assert losses.cross_entropy().shortcut(jnp.arange(3)) is None


@pytest.mark.parametrize("known", [True, False], ids=["known", "traced"])
def test_one_hot_of_other_classes_is_named(known: bool) -> None:
    """As integers they would fit, and mean something else."""
    x, labels = batch()
    solver = eki_jax.euler(network, losses.cross_entropy())
    state = solver.init(ensemble())
    for wrong in (jax.nn.one_hot(labels, CLASSES - 1), jax.nn.one_hot(labels[:-1], CLASSES)):
        with pytest.raises(ValueError, match=r"targets: shape .*wanted one-hot or soft labels"):
            (solver.step if known else jax.jit(solver.step))(state, (x, wrong))


def test_zero_of_zero_probability_is_zero() -> None:
    """With delta = 0 a class without probability and without label adds nothing, in value and in gradient."""
    loss, outputs = losses.cross_entropy(0.0), jnp.array([[1.0, 0.0], [0.5, 0.5]])
    value, gradient = jax.value_and_grad(loss)(outputs, jnp.array([[1.0, 0.0], [0.25, 0.75]]))
    np.testing.assert_allclose(value, 0.5 * np.log(2), rtol=1e-6)
    np.testing.assert_allclose(gradient, [[-0.5, 0.0], [-0.25, -0.75]])


@pytest.mark.parametrize(("name", "copies"), [("nesterov", 2), ("compact", 0.5)])
def test_a_step_stays_in_place(name: str, copies: float) -> None:
    """By the compiler's account: both ways in one program, and still no second copy of what is donated."""
    wide = jax.tree.map(lambda leaf: jnp.zeros((256, 8 * leaf.shape[1], *leaf.shape[2:])), ensemble())
    solver = MAKERS[name](lambda u, x: network({**u, "b": u["b"][:CLASSES]}, x), losses.cross_entropy())
    size = 4 * 256 * 8 * (INPUTS + 1) * CLASSES

    def memory(targets: Any) -> Any:
        state, data = jax.eval_shape(lambda: (solver.init(wide), (jnp.zeros((BATCH, 8 * INPUTS)), targets)))
        return jax.jit(solver.step, donate_argnums=0).lower(state, data).compile().memory_analysis()

    of_integers, both = memory(jnp.zeros(BATCH, jnp.int32)), memory(jnp.zeros((BATCH, CLASSES)))
    assert both.alias_size_in_bytes >= copies * size
    assert both.temp_size_in_bytes < of_integers.temp_size_in_bytes + 0.2 * size


def test_the_products_are_of_one_entry() -> None:
    """The flops of the fast way, that of the program whose labels are known, are those of integer labels."""
    solver, (x, labels) = eki_jax.euler(network, losses.cross_entropy()), batch()
    state = solver.init(ensemble())

    def operations(targets: Any) -> float:
        return jax.jit(lambda s: solver.step(s, (x, targets))).lower(state).compile().cost_analysis()["flops"]

    integer, one_hot = operations(labels), operations(jax.nn.one_hot(labels, CLASSES))
    assert one_hot == integer < 0.7 * operations(jnp.full((BATCH, CLASSES), 1 / CLASSES))


def test_labels_of_each_particle() -> None:
    """With ``targets_axis=0`` the labels have the particles' axis, and all of them go the same way."""
    x, _ = batch()
    labels = jax.random.randint(jax.random.key(2), (J, BATCH), 0, CLASSES)
    solver = eki_jax.euler(network, losses.cross_entropy(), targets_axis=0)
    state, step = solver.init(ensemble()), jax.jit(solver.step)
    same(step(state, (x, jax.nn.one_hot(labels, CLASSES))), step(state, (x, labels)))


@pytest.mark.parametrize(
    ("driver", "axis"),
    [
        ("shard_map", 0),
        ("jit", None),
        pytest.param("shard_map", None, marks=pytest.mark.slow),
        pytest.param("jit", 0, marks=pytest.mark.slow),
        pytest.param("pmap", 0, marks=pytest.mark.slow),
    ],
)
def test_one_hot_over_devices(driver: Any, axis: int | None) -> None:
    """One-hot on every device, or on all but one: then the general way, on all of them."""
    x, labels = batch()
    targets = jax.nn.one_hot(labels, CLASSES)
    targets = targets if axis is None else jnp.tile(targets, (J, 1, 1))
    single = eki_jax.euler(network, losses.cross_entropy(), targets_axis=axis)
    many = eki_jax.euler(network, losses.cross_entropy(), targets_axis=axis, axis_name="particles")
    state, alone = single.init(ensemble()), jax.jit(single.step)
    rows, all_of_it = PartitionSpec("particles"), PartitionSpec()
    specs = (type(state)(rows, all_of_it), (all_of_it, all_of_it if axis is None else rows))
    step = jax.jit(sharding.spread(many.step, sharding.make_mesh(4), specs, driver=driver))
    for y in (targets, targets.at[-1].set(1 / CLASSES)):
        same(step(state, (x, y)), alone(state, (x, y)))


def test_a_mapped_step_is_right() -> None:
    """Over one-hot and soft labels at once both ways run, and each row has its own result."""
    x, labels = batch()
    one_hot = jax.nn.one_hot(labels, CLASSES)
    targets = jnp.stack([one_hot, 0.5 * one_hot + 0.5 / CLASSES])
    solver, step = compiled("nesterov")
    state = solver.init(ensemble())
    together = jax.jit(jax.vmap(lambda y: solver.step(state, (x, y))))(targets)
    for i in range(2):
        same(jax.tree.map(lambda leaf, i=i: leaf[i], together), step(state, (x, targets[i])))


def test_a_scan_of_steps() -> None:
    x, labels = batch()
    one_hot = jax.nn.one_hot(labels, CLASSES)
    targets = jnp.stack([one_hot, 0.5 * one_hot + 0.1, one_hot])
    solver, step = compiled("nesterov")
    state = solver.init(ensemble())
    found, _ = jax.jit(lambda s: jax.lax.scan(lambda s, y: solver.step(s, (x, y)), s, targets))(state)
    for y in targets:
        state, _ = step(state, (x, y))
    same(found, state)
    assert int(found.count) == 3


def test_told_outputs_take_it_too() -> None:
    x, labels = batch()
    solver = eki_jax.euler(None, losses.cross_entropy())
    state, update = solver.init(ensemble()), jax.jit(solver.update)
    outputs = eki_jax.evaluate(network, state.ensemble, x)
    same(update(state, outputs, jax.nn.one_hot(labels, CLASSES)), update(state, outputs, labels))


@pytest.mark.parametrize("field", [eki_jax.value_and_direction, eki_jax.vector_field, square_root_flow])
def test_fields_take_it_too(field: Any) -> None:
    x, labels = batch()
    f = field(network, losses.cross_entropy())
    f = jax.jit(f if field is eki_jax.value_and_direction else partial(f, 0.0))
    same(f(ensemble(), (x, jax.nn.one_hot(labels, CLASSES))), f(ensemble(), (x, labels)))


def test_the_natural_gradient_takes_it_too() -> None:
    x, labels = batch()
    solver = natural.natural_gradient(network, losses.cross_entropy(), 8, space="output")
    state = solver.init({"w": jnp.zeros((INPUTS, CLASSES)), "b": jnp.zeros(CLASSES)}, jax.random.key(0))
    wanted, info = solver.step(state, (x, labels))
    assert info.moved
    same(jax.jit(solver.step)(state, (x, jax.nn.one_hot(labels, CLASSES)))[0].position, wanted.position)


def test_a_failed_particle_is_counted() -> None:
    """The info of the way that was taken comes back, whichever it was."""
    x, labels = batch()
    particles = ensemble()
    particles = {**particles, "b": particles["b"].at[3].set(jnp.nan)}
    solver, step = compiled("euler")
    one_hot = jax.nn.one_hot(labels, CLASSES)
    for targets in (labels, one_hot, 0.5 * one_hot + 0.5 / CLASSES):
        _, info = step(solver.init(particles), (x, targets))
        assert int(info.failed) == 1
        assert math.isfinite(info.loss)
        assert bool(info.moved)
