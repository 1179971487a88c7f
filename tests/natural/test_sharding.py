"""Particles and samples spread over a mesh give the numbers of one device; what is sent is small; runs are resumed."""

from __future__ import annotations

import math
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import eki_jax
from benchmarks.scaling import hlo
from eki_jax import natural, sharding
from eki_jax.checkpoints import Checkpoints

SAME, SAMPLES = PartitionSpec(), PartitionSpec("batch")
PARTICLES, BATCH, CLASSES = 16, 24, 3


def problem() -> tuple[Any, Any, Any]:
    keys = jax.random.split(jax.random.key(3), 4)
    params = {
        "w": 0.5 * jax.random.normal(keys[0], (5, 7)),
        "v": 0.5 * jax.random.normal(keys[1], (7, CLASSES)),
        "b": jnp.zeros(7),
    }
    x, y = jax.random.normal(keys[2], (BATCH, 5)), jax.random.randint(keys[3], (BATCH,), 0, CLASSES)
    return (lambda p, x: jnp.tanh(x @ p["w"] + p["b"]) @ p["v"]), params, (x, y)


def as_targets(loss: Any, y: Any) -> Any:
    return y if isinstance(loss, type(natural.softmax_cross_entropy())) else jax.nn.one_hot(y, CLASSES)


def spread_step(make: Any, mesh: Any, batch_axis: str | None) -> Any:
    solver = make(axis_name="particles", batch_axis_name=batch_axis)
    data = SAMPLES if batch_axis else SAME
    return sharding.over_devices(solver.step, mesh, (SAME, (data, data)))


LOSSES = {
    "softmax": natural.softmax_cross_entropy(),
    "sum": eki_jax.squared_error(),
    "samples": natural.mean_over_samples(lambda z, y: jnp.sum(jnp.cosh(z - y))),
    "any": lambda z, y: jnp.sum(jnp.logaddexp(z - y, y - z)),
}
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "space", "mesh", "options"),
    [
        pytest.param("softmax", "ensemble", (4, 2), {"antithetic": True}, marks=SLOW),
        ("softmax", "output", (4, 2), {}),
        pytest.param("sum", "ensemble", (2, 1), {"damping": natural.adaptive_damping(1e-3)}, marks=SLOW),
        pytest.param("softmax", None, (1, 4), {"damping": natural.adaptive_damping(1e-3)}, marks=SLOW),
        pytest.param("softmax", None, (8, 1), {"deviations": natural.full_rank()}, marks=SLOW),
        pytest.param("samples", None, (2, 4), {}, marks=SLOW),
        pytest.param("sum", None, (2, 4), {"averaging": 0.9}, marks=SLOW),
        pytest.param("any", None, (4, 2), {}, marks=SLOW),
        pytest.param("softmax", None, (4, 2), {"localized": True}, marks=SLOW),
        pytest.param("sum", None, (2, 4), {"localized": True}, marks=SLOW),
        pytest.param("any", None, (8, 1), {"localized": True}, marks=SLOW),
    ],
)
def test_sharded_equals_single(name: str, space: Any, mesh: tuple[int, int], options: Any, x64: None) -> None:
    forward, params, (x, y) = problem()
    params = jax.tree.map(lambda m: m.astype(jnp.float64), params)
    batch = (x.astype(jnp.float64), as_targets(LOSSES[name], y))
    make = partial(natural.natural_gradient, forward, LOSSES[name], PARTICLES, space=space, **options)
    state = make().init(params, jax.random.key(0))
    over = sharding.make_mesh(*mesh)
    step = jax.jit(spread_step(make, over, "batch" if mesh[1] > 1 else None))
    single, many = state, state
    for _ in range(2):
        single, wanted = jax.jit(make().step)(single, batch)
        many, found = step(many, batch)
    for a, b in zip(jax.tree.leaves((many.position, found)), jax.tree.leaves((single.position, wanted)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9)
    assert np.abs(single.position["w"] - params["w"]).max() > 1e-3


@pytest.mark.slow
def test_localized_leaves_are_spread(x64: None) -> None:
    """Localized leaves of every kind are spread."""
    _, params, batch = problem()
    params = {"twice": params["w"], **params}
    # of 35 numbers: a product a sample, in full from 4 particles and more; 7 numbers: in columns
    forward = lambda p, x: jnp.tanh(x @ p["w"] + x @ p["twice"] + (x + 1) @ p["twice"] + p["b"]) @ p["v"]
    make = partial(
        natural.natural_gradient, forward, natural.softmax_cross_entropy(), PARTICLES, 0.125, 0.125**3, localized=True
    )
    state = make().init(jax.tree.map(lambda m: m.astype(jnp.float64), params), jax.random.key(0))
    wanted, _ = jax.jit(make().step)(state, batch)
    found, _ = jax.jit(spread_step(make, sharding.make_mesh(4, 2), "batch"))(state, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9), found.position, wanted.position)
    assert np.abs(wanted.position["twice"] - params["twice"]).max() > 1e-4


@pytest.mark.parametrize("localized", [pytest.param(False, marks=SLOW), True])
def test_a_failed_particle_is_dropped(localized: bool, x64: None) -> None:
    """A failed particle is dropped on all devices."""
    forward, params, batch = problem()
    # fails on one sample only, which one device alone sees
    rough = lambda p, x: forward(p, x) + 0 * jnp.log(0.3 + p["b"][0] + 100.0 * (x[:, :1] < jnp.sort(x[:, 0])[-2]))
    options = {"localized": localized, "damping": 0.125}
    make = partial(natural.natural_gradient, rough, natural.softmax_cross_entropy(), PARTICLES, 1.0, **options)
    state = make().init(params, jax.random.key(1))
    x = jnp.sort(batch[0], axis=0)
    wanted, info = jax.jit(make().step)(state, (x, batch[1]))
    assert 0 < int(info.failed) < PARTICLES
    whole = lambda p, x: forward(p, x) + 0 * jnp.log(0.3 + p["b"][0] + 100.0 * (x[:, :1] < threshold))
    threshold = jnp.sort(x[:, 0])[-2]
    make = partial(natural.natural_gradient, whole, natural.softmax_cross_entropy(), PARTICLES, 1.0, **options)
    found, many = jax.jit(spread_step(make, sharding.make_mesh(2, 2), "batch"))(state, (x, batch[1]))
    assert int(many.failed) == int(info.failed)
    np.testing.assert_allclose(found.position["w"], wanted.position["w"], rtol=1e-4, atol=1e-6)


def test_the_matrix_and_the_step_are_summed() -> None:
    """What is summed over devices is the matrix and the step."""
    forward, params, batch = problem()
    make = partial(natural.natural_gradient, forward, natural.softmax_cross_entropy(), PARTICLES, space="ensemble")
    state = make().init(params, jax.random.key(0))
    step = jax.jit(spread_step(make, sharding.make_mesh(4, 2), "batch"))
    text = step.lower(state, batch).as_text("hlo")
    sums = [line for line in text.splitlines() if re.search(r"= .* all-reduce\(", line)]
    sizes = sorted(int(np.prod([int(n) for n in d.split(",") if n])) for line in sums for d in shapes_of(line))
    largest = PARTICLES * (PARTICLES + 1)
    leaves = [leaf.size for leaf in jax.tree.leaves(params)]
    assert largest in sizes
    outputs = math.prod(batch[1].shape) * 3
    assert sum(sizes) <= largest + sum(leaves) + 4 * PARTICLES + outputs + 16  # and flags, distances, the loss


def shapes_of(line: str) -> list[str]:
    return re.findall(r"[a-z]+\d+\[([\d,]*)\]", line.split(" all-reduce(")[0])


def test_particles_do_not_depend_on_devices() -> None:
    """Particles do not depend on the number of devices."""
    forward, params, _ = problem()
    make = partial(natural.natural_gradient, forward, natural.softmax_cross_entropy(), 8)
    state = make().init(params, jax.random.key(0))
    body = make(axis_name="particles").ensemble
    spread = jax.shard_map(body, mesh=sharding.make_mesh(4), in_specs=SAME, out_specs=PartitionSpec("particles"))
    found = jax.jit(spread)(state)
    wanted = jax.jit(make().ensemble)(state)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), found, wanted)
    assert not np.allclose(wanted["w"][0], wanted["w"][1])


def test_what_cannot_be_spread_is_said() -> None:
    forward, params, batch = problem()
    softmax = natural.softmax_cross_entropy()
    state = natural.natural_gradient(forward, softmax, PARTICLES).init(params, jax.random.key(0))
    run = lambda loss, size, data, **options: jax.eval_shape(
        spread_step(partial(natural.natural_gradient, forward, loss, size, **options), sharding.make_mesh(5), None),
        state,
        data,
    )
    with pytest.raises(ValueError, match="particles: 16 on 5 devices"):
        run(softmax, 16, batch)
    with pytest.raises(ValueError, match="batch: 24 samples a device on 5 devices"):
        run(softmax, 20, batch, space="ensemble")
    targets = (batch[0], jax.nn.one_hot(batch[1], CLASSES))
    with pytest.raises(ValueError, match="space: 'ensemble' on several devices"):
        run(LOSSES["any"], 20, targets, space="ensemble")
    make = partial(natural.natural_gradient, forward, LOSSES["any"], PARTICLES, localized=True)
    step = spread_step(make, sharding.make_mesh(4, 2), "batch")
    with pytest.raises(ValueError, match="loss: is not known to be a sum over samples"):
        jax.eval_shape(step, state, targets)


def test_a_checkpoint_holds_the_mean_and_a_key(tmp_path: Any) -> None:
    forward, params, batch = problem()
    make = lambda: natural.natural_gradient(
        forward, natural.softmax_cross_entropy(), 50, damping=natural.adaptive_damping(1e-3), averaging=0.9
    )
    step = jax.jit(make().step)
    state, _ = step(make().init(params, jax.random.key(0)), batch)
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) <= 2 * sum(m.size for m in jax.tree.leaves(params)) + 4
    checkpoints = Checkpoints(tmp_path, {"method": "natural"})
    checkpoints.save(1, state)
    restored, _ = checkpoints.restore(lambda notes: make().init(params, jax.random.key(1)))
    checkpoints.close()
    on, _ = step(state, batch)
    again, _ = step(restored, batch)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), again.position, on.position)


@pytest.mark.parametrize(("reduction", "devices"), [("mean", 4), ("sum", 8)])
def test_what_crosses_is_the_matrix(reduction: str, devices: int) -> None:
    """With samples spread, of a loss that is a mean or a sum, J (J + 1) numbers and little more, for any outputs."""
    forward, params, _ = problem()
    loss = natural.softmax_cross_entropy() if reduction == "mean" else eki_jax.squared_error()
    x = jnp.ones((64 * devices, 5))
    y = jnp.zeros(len(x), jnp.int32) if reduction == "mean" else jnp.zeros((len(x), CLASSES))
    make = partial(natural.natural_gradient, forward, loss, PARTICLES, space="ensemble")
    solver = make(axis_name="particles", batch_axis_name="batch")
    solver = sharding.shard_solver(solver, sharding.make_mesh(1, devices), spread_targets=True)
    text = jax.jit(solver.step).lower(make().init(params, jax.random.key(0)), (x, y)).compile().as_text()
    cost = sharding.natural_step_cost(PARTICLES, len(x), CLASSES, 68, devices)
    assert cost.sent <= hlo.read(text, devices).sent <= 1.5 * cost.sent  # flags and squares of every particle
