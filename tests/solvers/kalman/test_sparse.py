"""Sparse ensemble Kalman inversion: the proximal step, the minimum of a step, the Lasso."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import Lasso

import eki_jax
from eki_jax import Reason, kalman
from eki_jax.kalman import sparse
from eki_jax.solvers.kalman.sparse import proximal_step

P, M, J = 8, 20, 30
RNG = np.random.default_rng(0)
MATRIX = RNG.normal(size=(M, P))
TRUTH = np.array([3.0, 0.0, 0.0, -2.0, 0.0, 0.0, 1.5, 0.0])
NOISE = 0.25
Y = MATRIX @ TRUTH + 0.5 * RNG.normal(size=M)
START = RNG.normal(size=(J, P))
KEY = jax.random.key(0)


def linear(u, x):
    return x @ u


def tree(u):
    return {"a": u[..., :3], "b": u[..., 3:].reshape(*u.shape[:-1], 5, 1)}


def of_tree(u, x):
    return x @ jnp.concatenate([u["a"], u["b"].ravel()])


def violation(w, gradient, weights):
    """How far ``-gradient`` is from the subdifferential of ``sum weights |w|``, number by number."""
    at_zero = np.maximum(np.abs(gradient) - weights, 0)
    return np.where(w == 0, at_zero, np.abs(gradient + weights * np.sign(w)))


@pytest.mark.parametrize("condition", [1.0, 1e6])
def test_proximal_step_is_optimal(x64, condition):
    """In metrics of all conditions the conditions of optimality hold, and zeros are exact."""
    step = jax.jit(proximal_step)
    for seed in range(5):
        draws = np.random.default_rng(seed)
        turn = np.linalg.qr(draws.normal(size=(12, 12)))[0]
        covariance = turn @ np.diag(np.logspace(0, -np.log10(condition), 12)) @ turn.T
        mean, weights = draws.normal(size=12), draws.uniform(0, 2, size=12) * condition**0.5
        weights[0] = 0
        found, residual = (np.asarray(part) for part in step(mean, covariance, weights))
        gradient = np.linalg.solve(covariance, found - mean)
        assert violation(found, gradient, weights).max() < 1e-11 * condition * weights.max()
        assert residual < 1e-11
        assert 0 < (found == 0).sum() < 12
        assert found[0] != 0  # without a penalty


def test_proximal_step_in_single_precision():
    """The active-set method gives the digits that the interior points, which end at their rounding, have not."""
    step = jax.jit(proximal_step)
    for seed in range(4):
        draws = np.random.default_rng(seed)
        mean, weights = draws.normal(size=60).astype(np.float32), draws.uniform(0, 2, size=60).astype(np.float32)
        found, residual = step(mean, np.eye(60, dtype=np.float32), weights)
        assert float(residual) < 1e-6
        np.testing.assert_allclose(found, np.sign(mean) * np.maximum(np.abs(mean) - weights, 0), atol=1e-6)


def test_proximal_step_of_low_rank(x64):
    """With a singular covariance the minimum is that in its range, and what has no variance stays."""
    factor = RNG.normal(size=(6, 3))
    factor[2] = 0
    mean, weights = RNG.normal(size=6), np.full(6, 0.3)
    found, residual = proximal_step(jnp.asarray(mean), jnp.asarray(factor @ factor.T), jnp.asarray(weights))
    assert float(residual) < 1e-10
    assert float(found[2]) == mean[2]
    c, _, _, _ = np.linalg.lstsq(factor, np.asarray(found) - mean, rcond=None)
    np.testing.assert_allclose(factor @ c, np.asarray(found) - mean, atol=1e-9)
    value = lambda c: weights @ np.abs(mean + factor @ c) + 0.5 * c @ c
    for change in RNG.normal(size=(200, 3)):
        assert value(c + 1e-3 * change) >= value(c) - 1e-12


@pytest.mark.parametrize("method", ["etki", "enkf"])
def test_one_step_is_the_minimum(x64, method):
    """Of h (misfit + penalty) and the old metric, by its conditions, with weights of each number's own."""
    h, weights = 0.7, np.array([4.0, 4.0, 4.0, 0.0, 9.0, 9.0, 9.0, 9.0])
    penalty = {"a": 4.0, "b": np.array([0.0, 9.0, 9.0, 9.0, 9.0])[:, None]}
    solver = sparse(of_tree, NOISE, h, penalty=penalty, method=method)
    state, info = solver.step(solver.init(tree(jnp.asarray(START))), (MATRIX, Y))
    estimate = solver.estimate(state)
    w = np.concatenate([np.ravel(estimate["a"]), np.ravel(estimate["b"])])
    mean, covariance = START.mean(0), np.cov(START.T, ddof=0)
    gradient = h * MATRIX.T @ (MATRIX @ w - Y) / NOISE + np.linalg.solve(covariance, w - mean)
    assert violation(w, gradient, h * weights).max() < 1e-8
    assert 0 < (w == 0).sum() == P - int(info.nonzero)
    assert w[3] != 0
    assert float(info.residual) < 1e-10
    np.testing.assert_array_equal(np.concatenate([np.ravel(state.support["a"]), np.ravel(state.support["b"])]), w != 0)
    plain = getattr(kalman, method)(of_tree, NOISE, h)
    unmoved, _ = plain.step(plain.init(tree(jnp.asarray(START))), (MATRIX, Y))
    shifts = np.asarray(state.ensemble["a"] - unmoved.ensemble["a"])
    np.testing.assert_allclose(shifts, np.broadcast_to(shifts[:1], shifts.shape), atol=1e-12)  # the particles follow


def lasso(penalty):
    """Scikit-learn's objective is the misfit over M / NOISE, that is ``alpha = penalty NOISE / M``."""
    return Lasso(alpha=penalty * NOISE / M, fit_intercept=False, tol=1e-15, max_iter=100_000).fit(MATRIX, Y).coef_


@pytest.mark.parametrize("penalty", [20.0, pytest.param(100.0, marks=pytest.mark.slow)])
def test_long_time_is_the_lasso(x64, penalty):
    """In one huge step, and in thirty steps to a time of 3,000, by both methods."""
    wanted = lasso(penalty)
    assert 0 < (wanted == 0).sum() < P
    for method in ("etki", "enkf"):
        one = sparse(linear, NOISE, 1e6, penalty=penalty, method=method)
        state, _ = one.step(one.init(jnp.asarray(START)), (MATRIX, Y))
        np.testing.assert_allclose(one.estimate(state), wanted, atol=1e-6)
        many = sparse(linear, NOISE, 100.0, penalty=penalty, method=method)
        run = jax.jit(lambda s, many=many: jax.lax.scan(lambda s, _: many.step(s, (MATRIX, Y)), s, length=30))
        state, info = run(many.init(jnp.asarray(START)))
        found = np.asarray(many.estimate(state))
        np.testing.assert_allclose(found, wanted, atol=2e-3)
        np.testing.assert_array_equal(found == 0, wanted == 0)
        assert float(np.max(info.residual)) < 1e-8


@pytest.mark.slow
def test_perturbed_data(x64):
    """With a key the Kalman step perturbs the data, and the penalty still makes zeros."""
    solver = sparse(linear, NOISE, 1.0, penalty=20.0, method="enkf", key=KEY)
    plain = kalman.enkf(linear, NOISE, 1.0, key=KEY)
    start = jnp.asarray(START)
    (state, info), (other, _) = (s.step(s.init(start), (MATRIX, Y)) for s in (solver, plain))
    shift = np.asarray(state.ensemble - other.ensemble)
    np.testing.assert_allclose(shift, np.broadcast_to(shift[:1], shift.shape), atol=1e-12)
    assert 0 < int(info.nonzero) < P


def test_threshold(x64):
    """Penalized numbers up to the threshold are zero after the step, and nothing else changes."""
    penalty = np.where(np.arange(P) == 7, 0.0, 1.0)
    states = {
        t: (solver := sparse(linear, NOISE, 1.0, penalty=penalty, threshold=t)).step(
            solver.init(jnp.asarray(START)), (MATRIX, Y)
        )[0]
        for t in (0.0, 0.5)
    }
    free, cut = (np.asarray(solver.estimate(states[t])) for t in (0.0, 0.5))
    small = (np.abs(free) <= 0.5) & (penalty > 0)
    assert small.sum() > (free == 0).sum()
    assert abs(free[7]) < 0.5  # not penalized, so kept
    np.testing.assert_allclose(cut, np.where(small, 0, free), atol=1e-12)


def test_without_a_penalty(x64):
    """It is the Kalman step."""
    solver, plain = (
        sparse(linear, NOISE, kalman.tempered(3), penalty=0.0),
        kalman.etki(linear, NOISE, kalman.tempered(3)),
    )
    state, other = solver.init(jnp.asarray(START)), plain.init(jnp.asarray(START))
    for _ in range(3):
        state, info = solver.step(state, (MATRIX, Y))
        other, told = plain.step(other, (MATRIX, Y))
        np.testing.assert_allclose(state.ensemble, other.ensemble, atol=1e-12)
        np.testing.assert_allclose(float(info.loss), float(told.loss), rtol=1e-12)
    assert bool(solver.done(state))
    over, info = solver.step(state, (MATRIX, Y))
    assert Reason(int(info.reason)) is Reason.ENDED
    jax.tree.map(np.testing.assert_array_equal, over, state)
    assert int(info.nonzero) == P


def test_failed_particles(x64):
    """A failed particle stays, is counted, and the minimum is that of the others."""
    broken = lambda u, x: jnp.where(jnp.abs(u[0] - START[4, 0]) < 1e-9, jnp.nan, linear(u, x))
    solver = sparse(broken, NOISE, 0.7, penalty=4.0)
    state, info = solver.step(solver.init(jnp.asarray(START)), (MATRIX, Y))
    assert (int(info.failed), bool(info.moved), bool(info.is_finite)) == (1, True, False)
    np.testing.assert_array_equal(state.ensemble[4], START[4])
    others = np.delete(START, 4, axis=0)
    w = np.where(state.support, np.delete(np.asarray(state.ensemble), 4, axis=0).mean(0), 0)
    gradient = 0.7 * MATRIX.T @ (MATRIX @ w - Y) / NOISE + np.linalg.solve(np.cov(others.T, ddof=0), w - others.mean(0))
    assert violation(w, gradient, 0.7 * 4.0).max() < 1e-8


@pytest.mark.slow
def test_fewer_particles_than_numbers(x64):
    """In the span of five particles the minimum is that of the numbers that they can reach."""
    few = START[:5]
    solver = sparse(linear, NOISE, 1.0, penalty=10.0)
    state, info = solver.step(solver.init(jnp.asarray(few)), (MATRIX, Y))
    w = np.asarray(solver.estimate(state))
    away = few - few.mean(0)
    c = np.linalg.lstsq(away.T, w - few.mean(0), rcond=None)[0]
    np.testing.assert_allclose(away.T @ c, w - few.mean(0), atol=1e-9)
    assert float(info.residual) < 1e-9
    metric = np.linalg.pinv(np.cov(few.T, ddof=0))
    value = lambda u: (
        0.5 * np.sum((MATRIX @ u - Y) ** 2) / NOISE
        + 10.0 * np.abs(u).sum()
        + 0.5 * (u - few.mean(0)) @ metric @ (u - few.mean(0))
    )
    for change in RNG.normal(size=(200, 5)) @ away:
        assert value(w + 1e-4 * change) >= value(w) - 1e-10


@pytest.mark.slow
def test_single_precision():
    """Zeros and values are those of double precision."""
    single = sparse(linear, NOISE, 1.0, penalty=20.0)
    state, _ = single.step(single.init(jnp.asarray(START, jnp.float32)), (jnp.asarray(MATRIX), jnp.asarray(Y)))
    found = np.asarray(single.estimate(state))
    with jax.enable_x64(True):
        double = sparse(linear, NOISE, 1.0, penalty=20.0)
        exact = np.asarray(double.estimate(double.step(double.init(jnp.asarray(START)), (MATRIX, Y))[0]))
    np.testing.assert_array_equal(found == 0, exact == 0)
    np.testing.assert_allclose(found, exact, atol=1e-4)


def test_traced_settings(x64):
    """A penalty or threshold out of its range refuses the step; penalties can be swept."""

    def one(penalty, threshold):
        solver = sparse(linear, NOISE, 1.0, penalty=penalty, threshold=threshold)
        state, info = solver.step(solver.init(jnp.asarray(START)), (MATRIX, Y))
        return info.reason, info.nonzero, state.count, state.ensemble

    penalties, thresholds = jnp.array([0.0, 50.0, 1e4, -1.0, jnp.nan, 1.0]), jnp.array([0.0] * 5 + [-1.0])
    reasons, nonzero, counts, ensembles = jax.jit(jax.vmap(one))(penalties, thresholds)
    assert [Reason(int(code)) for code in reasons] == [Reason.TAKEN] * 3 + [Reason.SETTING] * 3
    assert nonzero[0] == P > nonzero[1] > nonzero[2]
    assert counts.tolist() == [1, 1, 1, 0, 0, 0]
    np.testing.assert_array_equal(ensembles[3], START)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"penalty": -1.0}, ValueError, "penalty: -1.0; wanted a finite number >= 0"),
        ({"penalty": "strong"}, TypeError, "penalty: 'strong'"),
        ({"penalty": np.array([1.0, np.nan])}, ValueError, "penalty: .*wanted a finite number >= 0"),
        ({"threshold": -1.0}, ValueError, "threshold: -1.0; wanted a finite number >= 0"),
        ({"method": "uki"}, ValueError, "method: 'uki'; wanted 'etki' or 'enkf'"),
        ({"key": KEY}, ValueError, "key: given for 'etki', which draws nothing"),
        ({"method": "enkf", "key": 0}, TypeError, "key: 0; wanted one JAX random key"),
        ({"inflation": None}, TypeError, "is no setting of this solver"),
        ({"forward": 3}, TypeError, "forward: 3; wanted a model"),
    ],
)
def test_bad_arguments(change, error, words):
    """Each is named, with what was wanted."""
    arguments = {"forward": linear, "noise_covariance": 1.0, "penalty": 1.0, **change}
    with pytest.raises(error, match=words):
        sparse(**arguments)


def test_bad_calls():
    """A penalty that does not fit the particles, a state of another solver, and no model."""
    ensemble = tree(jnp.asarray(START, jnp.float32))
    with pytest.raises(ValueError, match=r"penalty: structure .* wanted the same, or a number"):
        sparse(of_tree, 1.0, penalty=np.ones(P)).init(ensemble)
    with pytest.raises(ValueError, match=r"penalty\['a'\]: shape \(2,\) for a leaf of shape \(3,\)"):
        sparse(of_tree, 1.0, penalty={"a": np.ones(2), "b": 1.0}).init(ensemble)
    solver = sparse(None, 1.0, penalty=1.0)
    with pytest.raises(TypeError, match="state: a KalmanState; wanted the SparseState"):
        solver.update(kalman.etki(None, 1.0).init(ensemble), jnp.zeros((J, M)), jnp.zeros(M))
    with pytest.raises(TypeError, match="forward: None"):
        solver.step(solver.init(ensemble), (MATRIX, Y))
    with pytest.raises(ValueError, match="outputs: leading axis 5"):
        solver.update(solver.init(ensemble), jnp.zeros((5, M)), jnp.zeros(M))


def test_new_particles_are_whole():
    """Particles put in the place of the old ones have no zeros yet."""
    solver = sparse(linear, NOISE, 1.0, penalty=1e4)
    start = jnp.asarray(START, jnp.float32)
    state, info = solver.step(solver.init(start), (jnp.asarray(MATRIX), jnp.asarray(Y)))
    assert int(info.nonzero) < P
    assert eki_jax.Reason(int(info.reason)) is Reason.TAKEN
    again = solver.with_ensemble(state, start)
    np.testing.assert_allclose(solver.estimate(again), START.mean(0), atol=1e-6)
    assert int(again.count) == 1


def test_a_prior_beside_the_penalty(x64):
    """One step ends at the minimum of misfit, prior, penalty and distance from the ensemble."""
    first, h, mean = START - START.mean(axis=0), 2.0, np.full(P, 0.5)
    prior = eki_jax.gaussian(jnp.asarray(mean), 0.7)
    solver = sparse(linear, NOISE, h, penalty=4.0, prior=prior)
    state, info = solver.step(solver.init(jnp.asarray(first)), (MATRIX, jnp.asarray(Y)))
    w = np.asarray(solver.estimate(state))
    metric = np.linalg.inv(np.cov(first.T, ddof=0))
    slope = h * (MATRIX.T @ (MATRIX @ w - Y) / NOISE + (w - mean) / 0.49) + metric @ w
    assert violation(w, slope, np.full(P, h * 4.0)).max() < 1e-8
    assert 0 < int(info.nonzero) < P
