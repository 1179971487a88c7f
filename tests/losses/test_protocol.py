"""What losses offer: every loss works with every method, and so does a class of one's own."""

from __future__ import annotations

import ast
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

import eki_jax
from eki_jax import losses, natural, semi_supervised, sharding
from eki_jax.edf.objective import Objective
from eki_jax.losses.protocol import reduction_of
from eki_jax.natural import curvature
from eki_jax.natural.estimates.span import span_step
from eki_jax.optax import ensemble_gradient, value_and_extra_args

INPUTS, CLASSES = 3, 3


class Poisson:
    """A user's loss: how it sums, and what a sample adds."""

    reduction = "sum"

    def per_sample(self, outputs: Any, targets: Any) -> Any:
        return jnp.sum(jnp.exp(outputs) - targets * outputs, axis=-1)

    def __call__(self, outputs: Any, targets: Any) -> Any:
        return jnp.sum(self.per_sample(outputs, targets))


class CurvedPoisson:
    """A user's loss that knows its curvature, and how it sums, but no loss of a sample."""

    reduction = "sum"

    def __call__(self, outputs: Any, targets: Any) -> Any:
        return jnp.sum(jnp.exp(outputs) - targets * outputs)

    def curvature(self, outputs: Any, targets: Any) -> losses.Curvature:
        root, g = jnp.exp(0.5 * outputs).ravel(), (jnp.exp(outputs) - targets).ravel()
        return losses.Curvature(self(outputs, targets), g, lambda rows: rows * root, g / root)


class Case(NamedTuple):
    """A loss, whether its outputs are probabilities, and its targets from a key and a number of samples."""

    loss: Any
    probabilities: bool
    targets: Callable[[Any, int], Any]


def integers(key: Any, samples: int) -> Any:
    return jax.random.randint(key, (samples,), 0, CLASSES)


def reals(key: Any, samples: int) -> Any:
    return jax.random.normal(key, (samples, CLASSES))


def soft(key: Any, samples: int) -> Any:
    return jax.nn.softmax(reals(key, samples))


def one_hot(key: Any, samples: int) -> Any:
    return jax.nn.one_hot(integers(key, samples), CLASSES)


CASES = {
    "cross entropy, integer": Case(losses.cross_entropy(), True, integers),
    "cross entropy, one-hot": Case(losses.cross_entropy(0.1), True, one_hot),
    "cross entropy, soft": Case(losses.cross_entropy(), True, soft),
    "softmax, integer": Case(losses.softmax_cross_entropy(), False, integers),
    "softmax, soft": Case(losses.softmax_cross_entropy(), False, soft),
    "squares": Case(losses.squared_error(), False, reals),
    "squares, number": Case(losses.squared_error(0.5), False, reals),
    "mean of squares": Case(semi_supervised.mean_squared_error, False, reals),
    "mean over samples": Case(losses.mean_over_samples(lambda z, y: jnp.sum(jnp.cosh(z - y))), False, reals),
    "a user's, per sample": Case(Poisson(), False, soft),
    "a user's, curved": Case(CurvedPoisson(), False, soft),
}


def linear(params: Any, x: Any) -> Any:
    return x @ params["w"]


def model(case: Case) -> Any:
    return (lambda params, x: jax.nn.softmax(linear(params, x))) if case.probabilities else linear


def data(case: Case, samples: int) -> tuple[Any, Any]:
    keys = jax.random.split(jax.random.key(0))
    return jax.random.normal(keys[0], (samples, INPUTS)), case.targets(keys[1], samples)


@pytest.mark.parametrize("name", CASES)
def test_what_is_offered_is_true(name: str, x64: None) -> None:
    """Support, losses of samples, curvature and shortcut against the value and its derivatives, in float64."""
    case = CASES[name]
    x, targets = data(case, 4)
    outputs = model(case)({"w": jax.random.normal(jax.random.key(1), (INPUTS, CLASSES))}, x)
    losses.check_loss(case.loss, outputs, targets, tolerance=1e-9)


@pytest.mark.parametrize("precision", ["diagonal", "matrix"])
def test_squares_with_a_precision(precision: str, x64: None) -> None:
    root = np.random.default_rng(0).normal(size=(6, 6))
    value = {"diagonal": jnp.arange(6.0).reshape(2, 3), "matrix": root @ root.T}[precision]
    loss = losses.squared_error(value)
    assert loss.reduction is None  # a share of the samples would need its share of the precision
    losses.check_loss(loss, jnp.arange(6.0).reshape(2, 3), jnp.ones((2, 3)), tolerance=1e-8)


def test_squares_with_a_large_diagonal() -> None:
    """More outputs than a Hessian may have; none is formed."""
    diagonal = jnp.linspace(0.5, 2.0, 6000).reshape(2000, 3)
    found = curvature(losses.squared_error(diagonal), jnp.ones((2000, 3)), jnp.zeros((2000, 3)))
    np.testing.assert_allclose(found.times_factor(jnp.ones((1, 6000)))[0] ** 2, diagonal.ravel(), rtol=1e-5)


def rows(*slow: str) -> list[Any]:
    """The table's names, those marked that differ from another in nothing that a method sees."""
    return [pytest.param(name, marks=pytest.mark.slow if name in slow else ()) for name in CASES]


@pytest.mark.parametrize(
    "name", rows("cross entropy, one-hot", "softmax, soft", "squares, number", "mean over samples", "a user's, curved")
)
def test_every_method_takes_every_loss(name: str) -> None:
    """At 4,200 outputs, more than any Hessian may have: solvers move and stay finite, estimates lower the loss."""
    case = CASES[name]
    forward, batch = model(case), data(case, 4200 // CLASSES)
    start = {"w": 0.1 * jnp.ones((INPUTS, CLASSES))}

    @partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiled once, run once
    def everything(ensemble: Any, key: Any) -> Any:
        moved, fell = [], []
        for make in (eki_jax.euler, eki_jax.nesterov):
            solver = make(forward, case.loss)
            state, info = solver.step(solver.init(ensemble), batch)
            moved.append(info.is_finite & jnp.any(state.ensemble["w"] != ensemble["w"]))
        for localized in (False, True):
            solver = natural.natural_gradient(forward, case.loss, 6, damping=0.1, localized=localized)
            state, info = solver.step(solver.init(start, key), batch)
            moved.append(info.is_finite & info.moved)
            before, after = (case.loss(forward(p, batch[0]), batch[1]) for p in (start, state.position))
            fell.append(before - after)
        values, direction = eki_jax.value_and_direction(forward, case.loss)(ensemble, batch)
        the_same, extra = value_and_extra_args(forward, case.loss)(ensemble, batch)
        tx = optax.chain(ensemble_gradient(), optax.scale(-1.0))
        updates, _ = tx.update(jax.tree.map(jnp.zeros_like, ensemble), tx.init(ensemble), ensemble, **extra)
        return moved, fell, (values, direction["w"]), (the_same, -updates["w"])

    ensemble = {"w": 0.3 * jax.random.normal(jax.random.key(1), (6, INPUTS, CLASSES))}
    moved, fell, found, by_optax = everything(ensemble, jax.random.key(2))
    assert np.all(moved)
    assert np.all(np.asarray(fell) > 0)
    for one, other in zip(found, by_optax, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4 * float(jnp.max(jnp.abs(one))))


@pytest.mark.parametrize("name", ["cross entropy, soft", pytest.param("softmax, integer", marks=pytest.mark.slow)])
def test_both_spaces_agree(name: str) -> None:
    """At 4,200 outputs; their derivations share nothing but the loss's curvature."""
    case = CASES[name]
    x, targets = data(case, 4200 // CLASSES)
    w = 0.3 * jax.random.normal(jax.random.key(1), (4, INPUTS, CLASSES))
    outputs = jax.vmap(lambda w: model(case)({"w": w}, x))(w)
    found = {
        space: jax.jit(lambda z, space=space: span_step(case.loss, z, targets, jnp.asarray(0.5), space=space))(outputs)
        for space in ("ensemble", "output")
    }
    np.testing.assert_allclose(found["output"].weights, found["ensemble"].weights, rtol=0.02, atol=2e-3)
    np.testing.assert_allclose(found["output"].slope, found["ensemble"].slope, rtol=0.02)


@pytest.mark.parametrize(
    "name",
    [
        "a user's, per sample",
        pytest.param("cross entropy, one-hot", marks=pytest.mark.slow),
        pytest.param("mean of squares", marks=pytest.mark.slow),
        pytest.param("a user's, curved", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("localized", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_samples_over_devices(name: str, localized: bool, x64: None) -> None:
    """Above 4,096 outputs, with the samples of two devices: what ``reduction`` says is what is summed."""
    case = CASES[name]
    batch = jax.tree.map(lambda a: a.astype(jnp.float64), data(case, 4200 // CLASSES))
    solver = lambda **axes: natural.natural_gradient(
        model(case), case.loss, 4, damping=0.1, localized=localized, **axes
    )
    state = solver().init({"w": 0.1 * jnp.ones((INPUTS, CLASSES))}, jax.random.key(0))
    same, samples = PartitionSpec(), PartitionSpec("batch")
    many = solver(axis_name="particles", batch_axis_name="batch").step
    step = jax.jit(sharding.spread(many, sharding.make_mesh(2, 2), (same, (samples, samples))))
    found, info = step(state, batch)
    wanted, single = jax.jit(solver().step)(state, batch)
    np.testing.assert_allclose(info.loss, single.loss, rtol=1e-10)
    np.testing.assert_allclose(found.position["w"], wanted.position["w"], rtol=1e-8)


def test_outputs_may_be_a_tree(x64: None) -> None:
    """The losses of samples of two arrays: blocks in the order of samples, rows in that of the arrays."""

    class Both:
        reduction = "mean"

        def per_sample(self, outputs: Any, targets: Any) -> Any:
            return jnp.sum((outputs["a"] - targets) ** 4, axis=-1) * jnp.exp(outputs["b"][:, 0, 0])

        def __call__(self, outputs: Any, targets: Any) -> Any:
            return jnp.mean(self.per_sample(outputs, targets))

    outputs = {"a": jnp.arange(6.0).reshape(3, 2), "b": 0.3 * jnp.arange(3.0).reshape(3, 1, 1)}
    model, flat = curvature(Both(), outputs, jnp.ones((3, 2))), jax.flatten_util.ravel_pytree(outputs)
    hessian = jax.hessian(lambda z: Both()(flat[1](z), jnp.ones((3, 2))))(flat[0])
    positive = np.linalg.eigh(np.asarray(hessian))
    wanted = (positive[1] * np.maximum(positive[0], 0)) @ positive[1].T
    factor = model.times_factor(jnp.eye(9))
    np.testing.assert_allclose(factor @ factor.T, wanted, atol=1e-8 * np.abs(wanted).max())
    np.testing.assert_allclose(model.gradient, jax.grad(lambda z: Both()(flat[1](z), jnp.ones((3, 2))))(flat[0]))


def test_a_negative_label_is_not_convex() -> None:
    labels = jnp.array([[1.5, -0.5], [0.5, 0.5]])
    model = jax.jit(lambda y: curvature(losses.cross_entropy(), jnp.full((2, 2), 0.5), y).is_convex)
    assert not bool(model(labels))
    with pytest.raises(ValueError, match=r"soft labels from -0\.5 on"):
        curvature(losses.cross_entropy(), jnp.full((2, 2), 0.5), labels)


class Half:
    """A loss whose attributes a test replaces."""

    def __init__(self, **offered: Any) -> None:
        self.__dict__.update(offered)

    def __call__(self, outputs: Any, targets: Any) -> Any:
        return jnp.sum(outputs**2)


PER_SAMPLE = staticmethod(lambda outputs, targets: jnp.sum(outputs**2, axis=-1)).__func__


@pytest.mark.parametrize(
    ("error", "words", "offered"),
    [
        (TypeError, "has no method has_support; wanted all of support", {"support": lambda o, t: o}),
        (TypeError, "has per_sample but no reduction", {"per_sample": PER_SAMPLE}),
        (ValueError, "reduction: 'avg' .*wanted 'mean', 'sum' or None", {"per_sample": PER_SAMPLE, "reduction": "avg"}),
        (ValueError, "per_sample with reduction = 'mean' gives", {"per_sample": PER_SAMPLE, "reduction": "mean"}),
        (ValueError, "per_sample returned shape", {"per_sample": lambda o, t: o**2, "reduction": "sum"}),
        (
            ValueError,
            r"curvature's gradient has shape \(4, 2\); wanted \(8,\)",
            {"curvature": lambda o, t: losses.Curvature(jnp.sum(o**2), 2 * o, lambda rows: rows, o)},
        ),
        (
            ValueError,
            "curvature's factor times itself gives 1, its Hessian has 2",
            {"curvature": lambda o, t: losses.Curvature(jnp.sum(o**2), 2 * o.ravel(), lambda rows: rows, o.ravel())},
        ),
    ],
)
def test_what_does_not_fit_is_named(error: Any, words: str, offered: Any) -> None:
    def use() -> None:
        curvature(Half(**offered), jnp.ones((4, 2)), None)
        losses.check_loss(Half(**offered), jnp.ones((4, 2)), None)

    with pytest.raises(error, match=words):
        use()


def test_targets_need_the_axis_of_samples() -> None:
    with pytest.raises(ValueError, match=r"targets: shape \(3,\); wanted a first axis of \(4,\) samples"):
        curvature(Poisson(), jnp.ones((4, 2)), jnp.ones(3))
    with pytest.raises(ValueError, match="outputs: one sample without an axis of samples"):
        losses.cross_entropy().per_sample(jnp.ones(3), jnp.array(1))
    with pytest.raises(ValueError, match="targets: shape"):
        semi_supervised.mean_squared_error(jnp.ones(3), jnp.ones((3, 1)))  # would be a 3 x 3 difference
    with pytest.raises(ValueError, match="precision: a matrix"):
        losses.squared_error(np.eye(4)).per_sample(jnp.ones((2, 2)), jnp.ones((2, 2)))
    with pytest.raises(ValueError, match="loss: returned shape"):
        losses.mean_over_samples(lambda z, y: z)(jnp.ones((3, 2)), jnp.ones(3))


def test_slices_add_up_as_the_loss_says() -> None:
    """A sum taken for a mean would be too small by the number of slices."""
    batch = jnp.arange(12.0).reshape(6, 2), jnp.arange(6.0)
    whole = Objective(lambda w, x: x @ w, losses.squared_error()).value(jnp.ones(2), batch)
    sliced = Objective(lambda w, x: x @ w, losses.squared_error(), chunk_size=2).value(jnp.ones(2), batch)
    with pytest.raises(ValueError, match="reduction: 'mean', but the loss says 'sum'"):
        Objective(jnp.matmul, losses.squared_error(), chunk_size=2, reduction="mean")
    np.testing.assert_allclose(sliced, whole)


def test_a_plain_function_is_told_the_remedy() -> None:
    """As before up to 4,096 outputs; above, the text says what a loss may offer."""
    plain = lambda outputs, targets: jnp.sum(outputs**2)
    assert reduction_of(plain) is None
    np.testing.assert_allclose(curvature(plain, jnp.ones(3), None).gradient, [2.0, 2.0, 2.0])
    with pytest.raises(ValueError, match=r"mean_over_samples\(fn\).*per_sample and reduction, or one with curvature"):
        curvature(plain, jnp.ones(5000), None)


def test_no_method_looks_at_a_losss_class() -> None:
    """No ``isinstance`` of a loss, and no class of a loss imported outside of its own module."""
    root = Path(eki_jax.__file__).parent
    classes = {"CrossEntropy", "SquaredError", "SoftmaxCrossEntropy", "SampleLoss"}
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert not classes & {alias.name for alias in node.names}, path
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id in ("isinstance", "type")
            ):
                assert "loss" not in ast.unparse(node.args[0]).split("."), path
