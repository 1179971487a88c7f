"""Single precision keeps its digits: small noise, data of many magnitudes; and every setting may be traced."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eki_jax
from eki_jax import kalman, natural
from eki_jax.kernel.linear_algebra import damped_solve

J, P, M = 40, 2, 60


def calibration(decades: float, dtype: Any) -> tuple[Any, Any, Any]:
    """A linear problem of two parameters and sixty data that lie over so many decades, its start and its scales."""
    rng = np.random.default_rng(0)
    scales = np.logspace(-decades / 2, decades / 2, M)
    matrix = rng.normal(size=(M, P)) * scales[:, None]
    data = matrix @ np.array([0.7, -1.3]) + 0.3 * scales * rng.normal(size=M)
    start = rng.normal(size=(J, P))
    return jnp.asarray(start, dtype), (jnp.asarray(matrix, dtype), jnp.asarray(data, dtype)), 0.3 * scales


def posterior(start: Any, matrix: Any, data: Any, covariance: Any) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of Bayes' rule with the ensemble's own mean and covariance (over J) as the prior."""
    start, matrix, data = (np.asarray(array, np.float64) for array in (start, matrix, data))
    gamma = np.diag(covariance) if np.ndim(covariance) == 1 else covariance
    prior = np.linalg.inv(np.cov(start.T, bias=True))
    precision = prior + matrix.T @ np.linalg.solve(gamma, matrix)
    mean = np.linalg.solve(precision, prior @ start.mean(axis=0) + matrix.T @ np.linalg.solve(gamma, data))
    return mean, np.linalg.inv(precision)


forward = lambda u, x: x @ u


def low_rank(scale: np.ndarray) -> tuple[Any, np.ndarray]:
    factor = scale[:, None] * np.random.default_rng(1).normal(size=(M, 2))
    return kalman.LowRankNoise(scale**2, factor), np.diag(scale**2) + factor @ factor.T


@pytest.mark.parametrize("kind", ["diagonal", "dense", "low rank"])
@pytest.mark.parametrize("space", ["output", "ensemble"])
@pytest.mark.parametrize(("decades", "noise"), [(12.0, 1.0), (0.0, 1e-2), (0.0, 1e-5), (0.0, 1e-8), (6.0, 1e-4)])
def test_single_precision_has_the_posterior_mean(decades: float, noise: float, space: Any, kind: str) -> None:
    """One Kalman step of float32 on data over twelve decades and on noise down to 1e-8 is that of float64."""
    start, (matrix, data), scale = calibration(decades, jnp.float32)
    scale = noise * scale
    given, gamma = {
        "diagonal": (scale**2, np.diag(scale**2)),
        "dense": (np.diag(scale**2), np.diag(scale**2)),
        "low rank": low_rank(scale),
    }[kind]
    solver = kalman.enkf(forward, given, 1.0, space=space)
    state, info = jax.jit(solver.step)(solver.init(start), (matrix, data))
    assert bool(info.moved)
    mean, _ = posterior(start, matrix, data, gamma)
    np.testing.assert_allclose(state.ensemble.mean(axis=0), mean, atol=1e-5)  # the prior's spread is 1
    assert bool(jnp.isfinite(state.ensemble).all())


@pytest.mark.parametrize("noise", [1e-3, 1e-8])
def test_tempering_reaches_the_posterior(noise: float) -> None:
    """Ten tempered steps with perturbed data, where a Cholesky factorization in float32 would fail."""
    start, (matrix, data), _ = calibration(0.0, jnp.float32)
    solver = kalman.enkf(forward, noise, kalman.tempered(10), key=jax.random.key(0))
    step, state = jax.jit(solver.step), solver.init(start)
    for _ in range(10):
        state, info = step(state, (matrix, data))
        assert bool(info.moved)
    mean, covariance = posterior(start, matrix, data, np.full(M, noise))
    assert float(state.time) == 1.0
    spread = np.sqrt(np.diag(covariance))
    assert (np.abs(np.asarray(state.ensemble.mean(axis=0)) - mean) < 2 * spread + 2e-5).all()


def test_a_failed_factorization_falls_back() -> None:
    """Rounding that makes a matrix indefinite: eigenvalues in the place of Cholesky's factor, and a flag."""
    root = jax.random.normal(jax.random.key(0), (30, 3))
    solution, failed = damped_solve(1e4 * root @ root.T - jnp.eye(30), root[:, 0], jnp.asarray(0.5))
    assert bool(failed)
    wide = np.asarray(root, np.float64)
    wanted = np.linalg.solve(1e4 * wide @ wide.T + 0.5 * np.eye(30), wide[:, 0])
    np.testing.assert_allclose(root.T @ solution, wide.T @ wanted, rtol=1e-2, atol=1e-7)


LOSS = eki_jax.squared_error()
X = jax.random.normal(jax.random.key(1), (5, 3))
BATCH = (X, jnp.tanh(X @ jnp.array([1.0, -2.0, 0.5])))
START = jax.random.normal(jax.random.key(0), (12, 3))
model = lambda u, x: jnp.tanh(x @ u)
FULL = {"deviations": natural.full_rank(1.0), "damping": 0.3}

#: One setting each: a number that a run depends on, and the run's last loss as a function of it.
RUNS: dict[str, tuple[float, Callable[[Any], eki_jax.Solver]]] = {
    "h0": (0.5, lambda v: eki_jax.euler(model, LOSS, eki_jax.frobenius_step_size(v))),
    "eps": (0.5, lambda v: eki_jax.euler(model, LOSS, eki_jax.frobenius_step_size(0.5, v))),
    "step_size": (0.1, lambda v: eki_jax.euler(model, LOSS, eki_jax.constant_step_size(v))),
    "momentum": (0.5, lambda v: eki_jax.nesterov(model, LOSS, eki_jax.frobenius_step_size(0.3), v)),
    "friction": (0.5, lambda v: eki_jax.heavy_ball(model, LOSS, eki_jax.frobenius_step_size(0.1), v)),
    "precision": (2.0, lambda v: eki_jax.euler(model, eki_jax.squared_error(v), eki_jax.frobenius_step_size(0.3))),
    "noise": (0.5, lambda v: kalman.enkf(model, v, 0.3)),
    "kalman step": (0.3, lambda v: kalman.enkf(model, 0.5, v)),
    "sigma": (0.3, lambda v: natural.natural_gradient(model, LOSS, 12, v, **FULL)),
    "damping": (0.3, lambda v: natural.natural_gradient(model, LOSS, 12, 0.3, v, natural.full_rank(1.0))),
    "rate": (0.5, lambda v: natural.natural_gradient(model, LOSS, 12, 0.3, learning_rate=v, **FULL)),
    "averaging": (0.5, lambda v: natural.natural_gradient(model, LOSS, 12, 0.3, averaging=v, **FULL)),
    "norm": (0.05, lambda v: natural.natural_gradient(model, LOSS, 12, 0.3, norm_constraint=v, **FULL)),
    "adaptive": (
        0.3,
        lambda v: natural.natural_gradient(model, LOSS, 12, 0.3, natural.adaptive_damping(v), natural.full_rank(1.0)),
    ),
}


def last_loss(make: Callable[[Any], eki_jax.Solver], value: Any, steps: int = 3) -> Any:
    solver = make(value)
    start, batch = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), (START, BATCH))
    around = len(inspect.signature(solver.init).parameters) > 1
    state = solver.init(jnp.zeros(3), jax.random.key(0)) if around else solver.init(start)
    state, _ = jax.lax.scan(lambda s, _: (solver.step(s, batch)[0], None), state, length=steps)
    return LOSS(model(solver.estimate(state), batch[0]), batch[1])


@pytest.mark.parametrize("name", RUNS)
def test_every_setting_may_be_traced(name: str, x64: None) -> None:
    """A sweep by ``vmap`` is the runs one by one; ``grad`` through a run is its central difference."""
    value, make = RUNS[name]
    run = lambda v: last_loss(make, v)
    step = 1e-4 * value
    values = jnp.array([value - step, value, value + step])
    swept, slope = jax.jit(lambda v: (jax.vmap(run)(v), jax.grad(run)(v[1])))(values)
    np.testing.assert_allclose(jax.jit(run)(value), swept[1], rtol=1e-5)
    np.testing.assert_allclose(slope, (swept[2] - swept[0]) / (2 * step), rtol=1e-3, atol=1e-6)
    assert abs(float(slope)) > 0


def test_other_settings_can_be_traced() -> None:
    """The prior's scale and cross-entropy's delta."""

    def spread(scale: Any) -> Any:
        return jnp.std(eki_jax.sample_ensemble(jax.random.key(0), eki_jax.gaussian(jnp.zeros(3), scale), 200))

    np.testing.assert_allclose(jax.vmap(spread)(jnp.array([1.0, 2.0])) / jnp.array([1.0, 2.0]), 1.0, atol=0.1)
    np.testing.assert_allclose(jax.grad(spread)(2.0), spread(1.0), rtol=1e-4)
    assert float(eki_jax.gaussian(jnp.zeros(3), np.float32(2.0)).factor) == 2.0
    loss = lambda delta: eki_jax.cross_entropy(delta)(jnp.array([[0.25, 0.75]]), jnp.array([0]))
    np.testing.assert_allclose(jax.grad(loss)(0.25), -2.0, rtol=1e-5)


def test_reverse_mode_goes_through_one_hot_labels() -> None:
    """The run-time choice between one-hot and integer labels, differentiated as the loss itself."""
    labels = jnp.array([0, 2, 1, 1, 0])
    classify = lambda u, x: jax.nn.softmax(x @ u)
    start = jax.random.normal(jax.random.key(0), (8, 3, 3))

    def run(scale: Any, targets: Any) -> Any:
        solver = eki_jax.euler(classify, eki_jax.cross_entropy(), eki_jax.frobenius_step_size(scale))
        return jnp.sum(solver.step(solver.init(start), (X, targets))[0].ensemble ** 2)

    one_hot = jax.jit(jax.grad(run))(0.5, jax.nn.one_hot(labels, 3))
    np.testing.assert_allclose(one_hot, jax.jit(jax.grad(run))(0.5, labels), rtol=1e-4)


@pytest.mark.parametrize("name", ["euler", "nesterov", "enkf", "natural"])
def test_eager_calls_compile_once(name: str) -> None:
    """A step that is called as it is, is compiled in its first call and never again."""
    solver = {
        "euler": lambda: eki_jax.euler(model, LOSS),
        "nesterov": lambda: eki_jax.nesterov(model, LOSS),
        "enkf": lambda: kalman.enkf(model, 1.0, 0.5),
        "natural": lambda: natural.natural_gradient(model, LOSS, 12, **FULL),
    }[name]()
    state = solver.init(jnp.zeros(3), jax.random.key(0)) if name == "natural" else solver.init(START)
    direction = eki_jax.value_and_direction(model, LOSS, chunk_size=5)

    def everything(state: Any) -> Any:
        state, _ = solver.step(state, BATCH)
        solver.estimate(state), solver.ensemble(state), solver.done(state)
        eki_jax.evaluate(model, START, X, chunk_size=5)
        outputs = START @ X.T
        eki_jax.direction(START, outputs, outputs), eki_jax.drift_norm(outputs, outputs), direction(START, BATCH)
        return state

    for _ in range(2):
        state = everything(state)
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **rest: compiled.append(event) if "backend_compile" in event else None
    )
    for _ in range(3):
        state = everything(state)
    assert not compiled


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_narrow_numbers_far_from_zero_warn(dtype: Any) -> None:
    """Parameters near 1,000 with steps below their rounding: a warning says that they cannot move."""
    start = (1000 + jax.random.normal(jax.random.key(0), (16, 2))).astype(dtype)
    with pytest.warns(UserWarning, match="rounding"):
        eki_jax.euler(lambda u, x: u, LOSS).init(start)
