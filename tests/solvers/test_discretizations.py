"""The discretizations, step by step against the paper's formulas written out in NumPy."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import eki_jax
from eki_jax import (
    constant_step_size,
    cross_entropy,
    euler,
    frobenius_step_size,
    nesterov,
    paper_step_size,
    squared_error,
    su_boyd_candes,
    value_and_direction,
    vector_field,
)

RNG = np.random.default_rng(0)
A = RNG.normal(size=(5, 3))
START, TARGETS = RNG.normal(size=(8, 3)), RNG.normal(size=5)


def forward(u: Any, x: Any) -> Any:
    return x @ jnp.tanh(u)


def as_numpy(u: np.ndarray) -> np.ndarray:
    return np.tanh(u) @ A.T


def paper_d(u: np.ndarray) -> np.ndarray:
    """D such that the step on stacked rows is u - h D u: row j needs <G_k - mean G, r_j>, the oracle's transpose."""
    return oracle.drift(as_numpy(u), as_numpy(u) - TARGETS).T


def run(solver: eki_jax.Solver, steps: int) -> Any:
    state = solver.init(jnp.asarray(START))
    infos = []
    step = jax.jit(solver.step)
    for _ in range(steps):
        state, info = step(state, (jnp.asarray(A), jnp.asarray(TARGETS)))
        infos.append(info)
    return state, infos


def test_euler_is_the_papers_step(x64: None) -> None:
    u = START.copy()
    norms = []
    for _ in range(6):
        d = paper_d(u)
        norms.append(np.linalg.norm(d))
        u = u - 2.0 / (norms[-1] + 0.5) * d @ u
    state, infos = run(euler(forward, squared_error(), paper_step_size()), 6)
    np.testing.assert_allclose(state.ensemble, u, rtol=1e-10)
    np.testing.assert_allclose([float(info.drift_norm) for info in infos], norms, rtol=1e-10)
    np.testing.assert_allclose(infos[0].step_size, 8 * 2.0 / (norms[0] + 0.5), rtol=1e-10)
    assert int(state.count) == 6


@pytest.mark.parametrize("momentum", [0.9, su_boyd_candes()], ids=["fixed", "su_boyd_candes"])
def test_nesterov_is_the_papers_step(x64: None, momentum: Any) -> None:
    u, v = START.copy(), START.copy()
    for n in range(6):
        d = paper_d(v)
        new = v - 2.0 / (np.linalg.norm(d) + 0.5) * d @ v
        factor = momentum if isinstance(momentum, float) else n / (n + 3)
        v, u = new + factor * (new - u), new
    state, _ = run(nesterov(forward, squared_error(), paper_step_size(), momentum), 6)
    np.testing.assert_allclose(state.position, u, rtol=1e-10)
    np.testing.assert_allclose(state.ensemble, v, rtol=1e-10)


def test_info_is_of_before_the_step(x64: None) -> None:
    """Info describes the ensemble before the step."""
    _, infos = run(euler(forward, squared_error()), 1)
    info = infos[0]
    np.testing.assert_allclose(info.losses, 0.5 * np.sum((as_numpy(START) - TARGETS) ** 2, axis=1), rtol=1e-12)
    np.testing.assert_allclose(info.spread, np.sqrt(START.var(axis=0).sum()), rtol=1e-12)
    assert bool(info.is_finite)
    assert int(info.failed) == 0


@pytest.mark.parametrize("make", [euler, nesterov])
def test_ask_and_tell_is_a_step(make: Any) -> None:
    solver = make(forward, squared_error())
    state = solver.init(jnp.asarray(START, jnp.float32))
    stepped, _ = solver.step(state, (jnp.asarray(A, jnp.float32), jnp.asarray(TARGETS, jnp.float32)))
    outputs = np.tanh(np.asarray(state.ensemble)) @ A.astype(np.float32).T  # "somewhere else"
    told, _ = make(None, squared_error()).update(state, outputs, TARGETS.astype(np.float32))
    np.testing.assert_allclose(told.position, stepped.position, rtol=1e-4, atol=1e-6)


def test_field_is_a_small_euler_step(x64: None) -> None:
    """Field and direction agree with a small Euler step."""
    batch = (jnp.asarray(A), jnp.asarray(TARGETS))
    state, _ = run(euler(forward, squared_error(), constant_step_size(0.25)), 1)
    field = vector_field(forward, squared_error())(0.0, jnp.asarray(START), batch)
    losses, direction = value_and_direction(forward, squared_error())(jnp.asarray(START), batch)
    np.testing.assert_allclose(state.ensemble, START + 0.25 * np.asarray(field), rtol=1e-10)
    np.testing.assert_array_equal(field, -np.asarray(direction))
    wanted = oracle.direction(START, as_numpy(START), as_numpy(START) - TARGETS)
    np.testing.assert_allclose(direction, wanted, rtol=1e-10)
    assert losses.shape == (8,)


def test_a_step_size_may_follow_a_schedule() -> None:
    _, infos = run(euler(forward, squared_error(), constant_step_size(lambda n: 0.5 ** (n + 1))), 3)
    assert [float(info.step_size) for info in infos] == [0.5, 0.25, 0.125]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("make", [euler, nesterov])
def test_the_state_keeps_its_dtype_and_structure(make: Any, dtype: str) -> None:
    solver = make(forward, squared_error())
    state = solver.init(jnp.asarray(START, dtype))
    batch = (jnp.asarray(A, dtype), jnp.asarray(TARGETS, dtype))
    scanned, _ = jax.lax.scan(lambda s, _: solver.step(s, batch), state, None, length=3)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), scanned) == jax.tree.map(lambda a: (a.shape, a.dtype), state)
    assert bool(jnp.isfinite(scanned.ensemble).all())


def test_one_trace_for_many_steps() -> None:
    traces = 0

    def counting(u: Any, x: Any) -> Any:
        nonlocal traces
        traces += 1
        return forward(u, x)

    solver = nesterov(counting, squared_error(), chunk_size=8)
    step = jax.jit(solver.step, donate_argnums=0)
    state = solver.init(jnp.asarray(START, jnp.float32))
    batch = (jnp.asarray(A, jnp.float32), jnp.asarray(TARGETS, jnp.float32))
    state, _ = step(state, batch)
    first = traces
    for _ in range(5):
        state, _ = step(state, batch)
    assert traces == first


def test_chunks_of_particles_change_nothing() -> None:
    batch = (jnp.asarray(A, jnp.float32), jnp.asarray(TARGETS, jnp.float32))
    results = []
    for chunk_size in (None, 1, 3, 8):
        solver = euler(forward, squared_error(), chunk_size=chunk_size)
        results.append(solver.step(solver.init(jnp.asarray(START, jnp.float32)), batch)[0].ensemble)
    for result in results[1:]:
        np.testing.assert_allclose(result, results[0], rtol=1e-5, atol=1e-6)


def test_perturbed_data_has_targets_of_its_own(x64: None) -> None:
    """Perturbed data moves every particle by its own targets."""
    targets = TARGETS + 0.1 * RNG.normal(size=(8, 5))
    solver = euler(forward, squared_error(), constant_step_size(0.1), targets_axis=0)
    state, _ = solver.step(solver.init(jnp.asarray(START)), (jnp.asarray(A), jnp.asarray(targets)))
    wanted = START - 0.1 * oracle.direction(START, as_numpy(START), as_numpy(START) - targets)
    np.testing.assert_allclose(state.ensemble, wanted, rtol=1e-10)


def test_integer_and_one_hot_labels_agree() -> None:
    """Integer and one-hot labels give the same step."""
    net = lambda u, x: jax.nn.softmax(x @ u)
    x, labels = jnp.asarray(RNG.normal(size=(6, 4)), jnp.float32), jnp.array([0, 2, 1, 1, 0, 2])
    solver = euler(net, cross_entropy())
    state = solver.init(jnp.asarray(RNG.normal(size=(7, 4, 3)), jnp.float32))
    by_label, info = solver.step(state, (x, labels))
    by_one_hot, other = solver.step(state, (x, jax.nn.one_hot(labels, 3)))
    np.testing.assert_allclose(by_label.ensemble, by_one_hot.ensemble, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(info.drift_norm, other.drift_norm, rtol=1e-5)


def test_a_model_with_a_sign_in_it_learns() -> None:
    """Nothing here has a derivative that is not zero."""
    model = lambda u, x: jnp.sign(x @ u[:2] + u[2])
    x = jnp.asarray(RNG.normal(size=(64, 2)), jnp.float32)
    targets = jnp.sign(x @ jnp.array([1.0, -2.0]) + 0.3)
    solver = euler(model, squared_error())
    state = solver.init(eki_jax.sample_ensemble(jax.random.key(0), eki_jax.gaussian(jnp.zeros(3), 1.0), 100))
    step = jax.jit(solver.step)
    for _ in range(30):
        state, _ = step(state, (x, targets))
    mean = eki_jax.mean_particle(state.position)
    assert float(jnp.mean(model(mean, x) == targets)) >= 0.95


@pytest.mark.parametrize(
    ("error", "words", "call"),
    [
        (ValueError, "h0: -1", lambda: frobenius_step_size(h0=-1.0)),
        (ValueError, "eps: -0.5", lambda: frobenius_step_size(eps=-0.5)),
        (ValueError, "step_size: 0", lambda: constant_step_size(0.0)),
        (ValueError, "momentum: 1", lambda: nesterov(forward, squared_error(), momentum=1.0)),
        (ValueError, "momentum: -0.1", lambda: nesterov(forward, squared_error(), momentum=-0.1)),
        (ValueError, "J = 1", lambda: euler(forward, squared_error()).init(jnp.ones((1, 3)))),
        (TypeError, "step_size: 0.1; wanted a function", lambda: run(euler(forward, squared_error(), 0.1), 1)),
        (TypeError, "forward: None", lambda: run(euler(None, squared_error()), 1)),
        (ValueError, "chunk_size: 0", lambda: run(euler(forward, squared_error(), chunk_size=0), 1)),
        (
            ValueError,
            r"outputs: leading axis 7.*8 particles",
            lambda: euler(None, squared_error()).update(
                euler(None, squared_error()).init(jnp.ones((8, 3))), jnp.ones((7, 5)), jnp.ones(5)
            ),
        ),
    ],
)
def test_bad_input_is_named(error: type[Exception], words: str, call: Any) -> None:
    with pytest.raises(error, match=words):
        call()
