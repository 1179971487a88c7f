"""The deterministic step: Kalman's own mean and covariance, at every J, in both spaces and over devices."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eki_jax
from eki_jax import kalman, sharding

RNG = np.random.default_rng(0)
P, M = 3, 5
MATRIX = RNG.normal(size=(M, P))
DATA = 3 * RNG.normal(size=M)
FACTOR = RNG.normal(size=(M, 2))
GAMMA = FACTOR @ FACTOR.T + np.diag([1.0, 2.0, 0.5, 1.0, 3.0])


def linear(u, x):
    return jnp.asarray(MATRIX, u.dtype) @ u


def moments(ensemble) -> tuple[np.ndarray, np.ndarray]:
    rows = np.asarray(ensemble, np.float64)
    return rows.mean(axis=0), np.cov(rows.T, ddof=0).reshape(rows.shape[1], -1)


def exact(mean, covariance, gamma=GAMMA, matrix=MATRIX, data=DATA) -> tuple[np.ndarray, np.ndarray]:
    """Kalman's update of a mean and a covariance."""
    gain = covariance @ matrix.T @ np.linalg.inv(matrix @ covariance @ matrix.T + gamma)
    return mean + gain @ (data - matrix @ mean), covariance - gain @ matrix @ covariance


def run(solver, ensemble, steps: int):
    """The state and the last info after some steps, in one program."""

    def body(state, _):
        return solver.step(state, (0.0, jnp.asarray(DATA)))

    return jax.jit(lambda u: jax.lax.scan(body, solver.init(u), length=steps))(jnp.asarray(ensemble))


@pytest.mark.parametrize("steps", [1, 10])
@pytest.mark.parametrize("size", [2, 4, 40])
def test_a_linear_step_is_exact(x64, size, steps):
    """Mean and covariance equal Kalman's to 1e-10, in both spaces, in one step or ten tempered ones."""
    first = RNG.normal(size=(size, P))
    mean, covariance = exact(*moments(first))
    for space in ("output", "ensemble"):
        h = 1.0 if steps == 1 else kalman.tempered(steps)
        state, info = run(kalman.etki(linear, GAMMA, h, space=space), first, steps)
        assert bool(info.moved.all())
        assert float(state.time) == 1
        for found, wanted in zip(moments(state.ensemble), (mean, covariance), strict=True):
            np.testing.assert_allclose(found, wanted, atol=1e-10, err_msg=space)


def test_a_step_is_exact_with_more_parameters(x64):
    """Where parameters outnumber outputs and particles, it is Kalman's step in the ensemble's span."""
    matrix, first = RNG.normal(size=(2, 7)), RNG.normal(size=(4, 7))
    wanted = exact(*moments(first), np.eye(2), matrix, np.ones(2))
    for space in ("output", "ensemble"):
        solver = kalman.etki(lambda u, x: jnp.asarray(matrix) @ u, 1.0, space=space)
        state, _ = solver.step(solver.init(jnp.asarray(first)), (0.0, jnp.ones(2)))
        for one, other in zip(moments(state.ensemble), wanted, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-10)


def test_the_shares_of_failed_particles_are_zero(x64):
    """With failed particles it is the exact step of the others."""
    first = RNG.normal(size=(9, P))
    fails = first[[2, 5], 0]
    broken = lambda u, x: jnp.where(jnp.isin(u[0], jnp.asarray(fails)), jnp.nan, linear(u, x))
    others = np.delete(first, [2, 5], axis=0)
    wanted = exact(*moments(others))
    for space in ("output", "ensemble"):
        state, info = run(kalman.etki(broken, GAMMA, space=space), first, 1)
        assert int(info.failed[0]) == 2
        np.testing.assert_array_equal(state.ensemble[jnp.array([2, 5])], first[[2, 5]])
        for one, other in zip(moments(np.delete(state.ensemble, [2, 5], axis=0)), wanted, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-10)


@pytest.mark.parametrize("space", ["output", "ensemble"])
def test_small_noise_keeps_its_digits(space):
    """In float32, noise of 1e-8 beside outputs of 1 leads to the float64 posterior within its rounding."""
    first, gamma = RNG.normal(size=(20, P)), 1e-8
    data = MATRIX @ np.array([0.3, -0.2, 0.5])
    mean, _ = exact(*moments(first), gamma * np.eye(M), data=data)
    solver = kalman.etki(linear, gamma, space=space)
    state, info = solver.step(solver.init(jnp.asarray(first, jnp.float32)), (0.0, jnp.asarray(data, jnp.float32)))
    assert bool(info.moved)
    assert np.abs(moments(state.ensemble)[0] - mean).max() < 1e-5
    assert np.abs(np.asarray(state.ensemble) - mean).max() < 1e-3  # deviations of about 1e-4


def test_data_over_twelve_decades(x64):
    """In float32, outputs from 1e-6 to 1e6 with errors of 30 % give the float64 posterior."""
    decades = 10.0 ** np.linspace(-6, 6, M)
    matrix = decades[:, None] * MATRIX
    data, gamma = decades * DATA, (0.3 * decades) ** 2
    first = RNG.normal(size=(12, P))
    mean, covariance = exact(*moments(first), np.diag(gamma), matrix, data)
    solver = kalman.etki(lambda u, x: jnp.asarray(matrix, u.dtype) @ u, gamma)
    state, _ = solver.step(solver.init(jnp.asarray(first, jnp.float32)), (0.0, jnp.asarray(data, jnp.float32)))
    found = moments(state.ensemble)
    np.testing.assert_allclose(found[0], mean, atol=2e-4 * np.sqrt(np.diag(covariance)).max())
    np.testing.assert_allclose(found[1], covariance, atol=1e-4 * np.diag(covariance).max())


def test_over_devices_it_is_the_same_step(x64):
    """Spread over four devices, with a prior and localized, it is the step of one; the battery has the rest."""
    first = RNG.normal(size=(8, P))
    prior = eki_jax.gaussian(jnp.zeros(P), 2.0)
    near = kalman.taper(jnp.arange(3.0), jnp.arange(5.0), 4.0)
    kinds: list[dict[str, Any]] = [{"space": "output", "prior": prior}, {"localization": near, "prior": prior}]
    for kind in kinds:
        make = partial(kalman.etki, linear, GAMMA, 0.5, **kind)
        alone, one = run(make(), first, 2)
        spread = sharding.shard_solver(make(axis_name="particles"), sharding.make_mesh(4))
        several, other = run(spread, first, 2)
        np.testing.assert_allclose(several.ensemble, alone.ensemble, atol=1e-12, err_msg=str(kind))
        np.testing.assert_allclose(other.drift_norm, one.drift_norm, rtol=1e-10, err_msg=str(kind))


@pytest.mark.parametrize("space", ["output", "ensemble"])
def test_a_run_has_a_derivative(x64, space):
    """The derivative in the step size goes through the square root, whose eigenvalues coincide."""
    first = jnp.asarray(RNG.normal(size=(7, P)))

    def end(h):
        state, _ = kalman.etki(linear, GAMMA, h, space=space).step(kalman.etki(None, 1.0).init(first), (0.0, DATA))
        return jnp.sum(state.ensemble**2)

    slope = jax.grad(end)(0.4)
    assert abs(float(slope) - float(end(0.4 + 1e-5) - end(0.4 - 1e-5)) / 2e-5) < 1e-5 * abs(float(slope))


def test_outputs_that_never_vary_teach_nothing():
    """Outputs that are always zero, or the same for all, move nothing, and others are used."""
    model = lambda u, x: jnp.concatenate([u, jnp.zeros(2), jnp.full(1, 7.0)])
    first = jnp.asarray(RNG.normal(size=(10, P)), jnp.float32)
    data = jnp.array([1.0, 1.0, 1.0, 5.0, 0.0, 3.0])
    full, short = kalman.etki(model, 1.0), kalman.etki(lambda u, x: u, 1.0)
    state, _ = full.step(full.init(first), (0.0, data))
    wanted, _ = short.step(short.init(first), (0.0, data[:3]))
    np.testing.assert_allclose(state.ensemble, wanted.ensemble, atol=1e-5)


def test_data_bring_their_covariance(x64):
    """A mini-batch with a covariance of its own is the step with it, also compiled with other batches."""
    first = jnp.asarray(RNG.normal(size=(6, P)))
    batches = kalman.etki(lambda u, x: x @ u, None)
    step = jax.jit(batches.step)
    for rows in (slice(0, 3), slice(2, 5)):
        x, y, gamma = jnp.asarray(MATRIX[rows]), jnp.asarray(DATA[rows]), GAMMA[rows, rows]
        own, _ = step(batches.init(first), (x, kalman.Data(y, jnp.asarray(gamma))))
        fixed = kalman.etki(lambda u, x: x @ u, gamma)
        wanted, _ = fixed.step(fixed.init(first), (x, y))
        np.testing.assert_allclose(own.ensemble, wanted.ensemble, atol=1e-12)
    _, info = step(batches.init(first), (x, kalman.Data(y, -jnp.eye(3))))
    assert eki_jax.Reason(int(info.reason)) is eki_jax.Reason.SETTING
    with pytest.raises(TypeError, match="noise_covariance: None; wanted a covariance, or targets"):
        batches.step(batches.init(first), (x, y))


def test_covariances_follow_the_outputs_tree(x64):
    """A mapping of covariances is their block diagonal, in the order of the outputs' leaves."""
    low = kalman.LowRankNoise(np.array([1.0, 2.0]), np.array([[0.5], [0.25]]))
    blocks = {"a": 0.5, "b": GAMMA[:2, :2], "c": low}
    whole = np.zeros((M, M))
    whole[0, 0], whole[1:3, 1:3] = 0.5, GAMMA[:2, :2]
    whole[3:, 3:] = np.diag(low.diagonal) + low.factor @ low.factor.T

    def tree(u, x):
        g = linear(u, x)
        return {"c": g[3:], "a": g[:1], "b": g[1:3]}

    first, data = jnp.asarray(RNG.normal(size=(6, P))), {"a": DATA[:1], "b": DATA[1:3], "c": DATA[3:]}
    state, _ = kalman.etki(tree, blocks).step(kalman.etki(None, 1.0).init(first), (0.0, data))
    wanted, _ = run(kalman.etki(linear, whole), first, 1)
    np.testing.assert_allclose(state.ensemble, wanted.ensemble, atol=1e-11)
    with pytest.raises(ValueError, match=r"noise_covariance: structure .*'d'.*wanted the same"):
        kalman.etki(tree, {"d": 1.0}).step(kalman.etki(None, 1.0).init(first), (0.0, data))
    with pytest.raises(ValueError, match=r"noise_covariance\['b'\]: singular"):
        kalman.etki(tree, {**blocks, "b": -1.0})


def test_shrinkage_makes_a_covariance(x64):
    """Fewer samples than outputs give a covariance that is not singular, and many the true one."""
    scales = np.array([1e-3, 1.0, 1e3, 1.0])
    root = np.linalg.cholesky(0.5 * np.eye(4) + 0.5)
    draws = np.random.default_rng(1).normal(size=(4000, 4)) @ root.T * scales
    many = kalman.shrinkage_covariance(draws)
    np.testing.assert_allclose(many / np.outer(scales, scales), 0.5 * np.eye(4) + 0.5, atol=0.06)
    few = kalman.shrinkage_covariance(draws[:3])
    dense = np.diag(few.diagonal) + few.factor @ few.factor.T
    np.testing.assert_allclose(np.diag(dense), draws[:3].var(axis=0, ddof=1), rtol=1e-10)
    assert np.linalg.eigvalsh(dense / np.outer(scales, scales)).min() > 1e-3
    with pytest.raises(ValueError, match="samples: output 1 never varies"):
        kalman.shrinkage_covariance(np.array([[1.0, 2.0], [3.0, 2.0]]))


def test_the_controller_stops_at_most_steps(x64):
    """The misfit controller ends after so many steps, at exactly 1, where it would take more."""
    first = RNG.normal(size=(30, P))
    free, _ = run(kalman.etki(linear, 1e-4 * GAMMA, kalman.data_misfit_controller()), first, 40)
    assert int(free.count) > 3
    bound = kalman.etki(linear, 1e-4 * GAMMA, kalman.data_misfit_controller(most_steps=3))
    state, info = run(bound, first, 4)
    assert (int(state.count), float(state.time), bool(bound.done(state))) == (3, 1.0, True)
    assert [eki_jax.Reason(int(code)).name for code in info.reason] == ["TAKEN"] * 3 + ["ENDED"]
