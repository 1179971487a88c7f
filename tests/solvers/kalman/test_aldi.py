"""The interacting Langevin sampler: its formula, its long-run law, its invariance, its steps."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

import eki_jax
from eki_jax import Reason
from eki_jax.ensembles.drawing import particle_keys
from eki_jax.kalman import LangevinState, aldi
from eki_jax.solvers.kalman.aldi import relaxation

P, M, J = 3, 5, 12
RNG = np.random.default_rng(0)
MATRIX = RNG.normal(size=(M, P))
ROOT = RNG.normal(size=(M, M))
GAMMA = 0.3 * (ROOT @ ROOT.T + 0.5 * np.eye(M))
Y = MATRIX @ np.array([1.0, -1.0, 0.5]) + RNG.normal(size=M)
MEAN = np.array([0.5, 0.0, -1.0])
COVARIANCE = np.diag([0.25, 1.0, 4.0])
KEY = jax.random.key(3)
START = MEAN + RNG.normal(size=(J, P)) @ np.sqrt(COVARIANCE)


def prior(mean=MEAN, factor=COVARIANCE**0.5):
    return eki_jax.gaussian(jnp.asarray(mean), factor=np.asarray(factor))


def linear(u, x):
    return x @ u


def curved(u, x):
    return x @ u + 0.2 * jnp.sin(x @ u) * u[0]


def posterior():
    precision = np.linalg.inv(COVARIANCE) + MATRIX.T @ np.linalg.solve(GAMMA, MATRIX)
    return MEAN + np.linalg.solve(precision, MATRIX.T @ np.linalg.solve(GAMMA, Y - MATRIX @ MEAN)), np.linalg.inv(
        precision
    )


def noise_of(key, count, size):
    keys = particle_keys(jax.random.fold_in(key, count), size, None)
    return np.array([jax.random.normal(k, (size,)) for k in keys])


def oracle(u, outputs, data, dt, noise, correction=True):
    """The step of the docstring by matrix functions, in the space of the particles' weights."""
    size = len(u)
    z, v = outputs - outputs.mean(0), u - u.mean(0)
    gamma, c_0 = np.linalg.inv(GAMMA), np.linalg.inv(COVARIANCE)
    h = (z @ gamma @ z.T + v @ c_0 @ v.T) / size
    g = (z @ gamma @ (outputs - data).T + v @ c_0 @ (u - MEAN).T) / np.sqrt(size)  # a column for each particle
    decay = scipy.linalg.expm(-h * dt)
    # What H does not reach combines nothing, and any inverse of it will do.
    mean, square = (np.linalg.pinv(h) @ (np.eye(size) - decay @ power) for power in (np.eye(size), decay))
    a = -mean @ g + np.real(scipy.linalg.sqrtm(square + 0j)) @ noise.T
    if correction:
        a = a + (P + 1) / size * dt * np.sqrt(size) * decay
    return u + a.T @ v / np.sqrt(size)


def test_step_is_the_formula(x64):
    """With and without the correction, for common data and for data of each particle's own."""
    outputs = np.array([curved(u, MATRIX) for u in START])
    own = Y + RNG.normal(size=(J, M))
    for dt, correction, data in ((0.3, True, Y), (2.0, False, Y), (0.3, True, own)):
        settings = {"targets_axis": 0} if data is own else {}
        solver = aldi(
            curved, GAMMA, eki_jax.constant_step_size(dt), prior=prior(), key=KEY, correction=correction, **settings
        )
        state, info = solver.step(solver.init(jnp.asarray(START)), (MATRIX, jnp.asarray(data)))
        wanted = oracle(START, outputs, data, dt, noise_of(KEY, 0, J), correction)
        np.testing.assert_allclose(state.ensemble, wanted, atol=1e-7)
        assert (float(info.step_size), float(state.time), int(state.count)) == (dt, dt, 1)
        residuals = outputs - data
        misfits = 0.5 * np.einsum("jm,mn,jn->j", residuals, np.linalg.inv(GAMMA), residuals)
        np.testing.assert_allclose(info.losses, misfits, rtol=1e-10)
        np.testing.assert_allclose(float(info.loss), misfits.mean(), rtol=1e-10)


def test_short_steps_are_the_dynamics(x64):
    """As dt goes to 0 the drift is that of the stochastic differential equation, the noise ``2 C dt``."""
    dt, outputs = 1e-5, np.array([curved(u, MATRIX) for u in START])
    step = eki_jax.constant_step_size(dt)
    ends = {}
    for correction in (True, False):
        solver = aldi(curved, GAMMA, step, prior=prior(), key=KEY, correction=correction)
        ends[correction] = np.asarray(solver.step(solver.init(jnp.asarray(START)), (MATRIX, Y))[0].ensemble)
    away = START - START.mean(0)
    np.testing.assert_allclose((ends[True] - ends[False]) / dt, (P + 1) / J * away, atol=1e-3)
    c_uw = away.T @ (outputs - outputs.mean(0)) / J
    drift = -(outputs - Y) @ np.linalg.inv(GAMMA) @ c_uw.T - (START - MEAN) @ np.linalg.inv(COVARIANCE) @ (
        away.T @ away / J
    )
    noise = np.sqrt(2 * dt / J) * noise_of(KEY, 0, J) @ away
    np.testing.assert_allclose((ends[False] - START - noise) / dt, drift, atol=0.02 * np.abs(drift).max())


def moments(solver, steps, size, seed=1, skip=40):
    """Mean and covariance about the exact mean over particles and steps, with their Monte-Carlo errors."""
    start = solver.init(eki_jax.sample_ensemble(jax.random.key(seed), prior(), size))

    def one(state, _):
        state, info = solver.step(state, (MATRIX, Y))
        away = state.ensemble - posterior()[0]
        return state, (away.mean(0), away.T @ away / size, info.step_size)

    _, (means, squares, steps_taken) = jax.jit(lambda s: jax.lax.scan(one, s, length=steps))(start)
    series = np.concatenate([means, np.reshape(squares, (steps, -1))], axis=1)[skip:]
    batches = np.array([part.mean(axis=0) for part in np.array_split(series, 30)])
    return series.mean(axis=0), batches.std(axis=0, ddof=1) / np.sqrt(len(batches)), steps_taken


def deviates(found, error):
    """How many errors the moments are from those of the posterior, and how large the variances' errors are."""
    covariance = posterior()[1]
    wanted = np.concatenate([np.zeros(P), covariance.ravel()])
    share = error[P:].reshape(P, P).diagonal() / covariance.diagonal()
    return np.abs(found - wanted) / error, share.max()


def test_long_run_is_the_posterior(x64):
    """Mean and covariance within four Monte-Carlo errors with the default step; not so without the correction."""
    found, error, taken = moments(aldi(linear, GAMMA, prior=prior(), key=KEY), 1500, 24)
    off, share = deviates(found, error)
    assert off.max() < 4
    assert share < 0.04  # so that the errors of a sampler that is wrong would show
    assert float(taken[0]) < 0.5  # shortened at the start ...
    assert np.mean(np.asarray(taken[40:]) == 0.5) > 0.99  # ... and not in the stationary state
    found, error, _ = moments(aldi(linear, GAMMA, prior=prior(), key=KEY, correction=False), 1500, 24)
    off, _ = deviates(found, error)
    variances = found[P:].reshape(P, P).diagonal() / posterior()[1].diagonal()
    assert off.max() > 4
    assert (variances < 0.95).all()


@pytest.mark.slow
@pytest.mark.parametrize("dt", [0.1, 1.0])
def test_long_run_at_every_step_size(x64, dt):
    """The law has no bias of the step: four errors of runs twenty times as long."""
    found, error, _ = moments(
        aldi(linear, GAMMA, eki_jax.constant_step_size(dt), prior=prior(), key=KEY), 30_000, 40, skip=200
    )
    off, share = deviates(found, error)
    assert off.max() < 4
    assert share < 0.02


def test_affine_invariance(x64):
    """Other coordinates of the parameters change nothing but the coordinates."""
    turn, shift = RNG.normal(size=(P, P)) + 2 * np.eye(P), RNG.normal(size=P)
    there = lambda u: u @ turn.T + shift
    plain = aldi(curved, GAMMA, prior=prior(), key=KEY)
    back = np.linalg.inv(turn)
    other = aldi(
        lambda v, x: curved(back @ (v - shift), x),
        GAMMA,
        prior=prior(turn @ MEAN + shift, turn @ np.sqrt(COVARIANCE)),
        key=KEY,
    )
    state, turned = plain.init(jnp.asarray(START)), other.init(jnp.asarray(there(START)))
    for _ in range(3):
        state, info = plain.step(state, (MATRIX, Y))
        turned, other_info = other.step(turned, (MATRIX, Y))
        np.testing.assert_allclose(turned.ensemble, there(np.asarray(state.ensemble)), atol=1e-8)
        np.testing.assert_allclose(other_info.drift_norm, info.drift_norm, rtol=1e-8)


@pytest.mark.slow
def test_far_from_the_posterior(x64):
    """Data a thousand deviations away are reached by shortened steps, and no step is refused."""
    solver = aldi(linear, 1e-4 * GAMMA, prior=prior(), key=KEY)
    start = solver.init(jnp.asarray(START))
    end, info = jax.jit(lambda s: jax.lax.scan(lambda s, _: solver.step(s, (MATRIX, Y)), s, length=60))(start)
    assert bool(info.moved.all())
    assert float(info.step_size[0]) < 1e-3
    precision = np.linalg.inv(COVARIANCE) + MATRIX.T @ np.linalg.solve(1e-4 * GAMMA, MATRIX)
    wanted = MEAN + np.linalg.solve(precision, MATRIX.T @ np.linalg.solve(1e-4 * GAMMA, Y - MATRIX @ MEAN))
    away = (np.asarray(end.ensemble) - wanted) @ np.linalg.cholesky(precision)
    assert np.sqrt((away**2).mean()) < 2.0
    assert float(info.step_size[-1]) == 0.5


def test_a_failed_particle_stays(x64):
    """It is counted, takes no part and does not move; the weights are those of the others."""
    broken = lambda u, x: jnp.where(jnp.abs(u[0] - START[4, 0]) < 1e-9, jnp.nan, linear(u, x))
    solver = aldi(broken, GAMMA, prior=prior(), key=KEY)
    state, info = solver.step(solver.init(jnp.asarray(START)), (MATRIX, Y))
    assert (int(info.failed), bool(info.moved), bool(info.is_finite)) == (1, True, False)
    np.testing.assert_array_equal(state.ensemble[4], START[4])
    assert bool(jnp.isfinite(state.ensemble).all())
    others = np.delete(START, 4, axis=0)
    found = np.delete(np.asarray(state.ensemble), 4, axis=0)
    deviations = others - others.mean(0)
    weights = np.linalg.lstsq(deviations.T, (found - others).T, rcond=None)[0]
    np.testing.assert_allclose(deviations.T @ weights, (found - others).T, atol=1e-10)  # in their span
    drift = np.linalg.norm(
        (others @ MATRIX.T - Y) @ np.linalg.inv(GAMMA) @ (deviations @ MATRIX.T).T
        + (others - MEAN) @ np.linalg.inv(COVARIANCE) @ deviations.T
    )
    np.testing.assert_allclose(float(info.drift_norm), drift, rtol=1e-9)


def test_functions_have_derivatives(x64):
    """Also where eigenvalues coincide, at zero and elsewhere, where those of eigenvectors do not exist."""
    turn = scipy.linalg.qr(np.random.default_rng(1).normal(size=(6, 6)))[0]
    matrix = turn @ np.diag([0.0, 0.0, 0.04, 1.5, 1.5, 30.0]) @ turn.T
    direction = np.random.default_rng(2).normal(size=(6, 6))
    direction = direction @ direction.T  # so that the way there is positive semi-definite
    _, slopes = jax.jvp(relaxation, (matrix,), (direction,))
    ends = [relaxation(jnp.asarray(matrix + step * direction)) for step in (1e-6, 2e-6)]
    base = relaxation(jnp.asarray(matrix))
    for slope, zero, one, two in zip(slopes, base, *ends, strict=True):
        np.testing.assert_allclose(slope, (4 * one - two - 3 * zero) / 2e-6, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(base[1], scipy.linalg.expm(-matrix), atol=1e-12)


def test_own_data_that_failed(x64):
    """A particle whose own data are not finite has failed, and does not spoil the others."""
    own = jnp.asarray(Y + RNG.normal(size=(J, M))).at[3, 0].set(jnp.nan)
    solver = aldi(linear, GAMMA, prior=prior(), key=KEY, targets_axis=0)
    state, info = solver.step(solver.init(jnp.asarray(START)), (MATRIX, own))
    assert (int(info.failed), bool(info.moved)) == (1, True)
    assert bool(jnp.isfinite(state.ensemble).all())
    np.testing.assert_array_equal(state.ensemble[3], START[3])


@pytest.mark.slow
def test_runs_have_derivatives(x64):
    """With respect to a setting, through steps whose matrix has a null space."""

    def end(dt):
        solver = aldi(curved, GAMMA, lambda norm, size, count: dt, prior=prior(), key=KEY)
        state = solver.init(jnp.asarray(START))
        for _ in range(2):
            state, _ = solver.step(state, (MATRIX, Y))
        return state.ensemble[0, 0]

    slope = float(jax.jit(jax.grad(end))(0.2))
    ends = [float(jax.jit(end)(dt)) for dt in (0.2 - 1e-5, 0.2 + 1e-5)]
    np.testing.assert_allclose(slope, (ends[1] - ends[0]) / 2e-5, rtol=1e-4)


def test_few_particles(x64):
    """J <= P + 1 is an error with the correction and a warning without, since the draws stay in their span."""
    few = jnp.asarray(START[: P + 1])
    with pytest.raises(ValueError, match=r"ensemble: J = 4 particles for P = 3 parameters; wanted more than P \+ 1"):
        aldi(linear, GAMMA, prior=prior(), key=KEY).init(few)
    plain = aldi(linear, GAMMA, prior=prior(), key=KEY, correction=False)
    assert isinstance(plain.init(few), LangevinState)
    with pytest.warns(UserWarning, match="stay in the span of the first particles"):
        plain.init(few[:P])


def test_traced_and_scheduled_steps(x64):
    """A step out of its range is refused, and uses nothing up."""

    def one(dt):
        solver = aldi(linear, GAMMA, lambda norm, size, count: dt, prior=prior(), key=KEY)
        state, info = solver.step(solver.init(jnp.asarray(START)), (MATRIX, Y))
        return info.reason, state.count, state.ensemble

    reasons, counts, ensembles = jax.jit(jax.vmap(one))(jnp.array([0.1, -0.1, jnp.nan]))
    assert [Reason(int(code)) for code in reasons] == [Reason.TAKEN, Reason.SETTING, Reason.SETTING]
    assert counts.tolist() == [1, 0, 0]
    np.testing.assert_array_equal(ensembles[1], START)
    state = aldi(linear, GAMMA, prior=prior(), key=KEY).init(jnp.asarray(START))
    info = aldi(linear, GAMMA, prior=prior(), key=KEY).step(state, (MATRIX, jnp.full(M, jnp.nan)))[1]
    assert Reason(int(info.reason)) is Reason.TARGETS


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"step_size": 0.0}, ValueError, "step_size: 0.0; wanted a finite number > 0"),
        ({"step_size": lambda: 1.0}, TypeError, "does not take 3 arguments"),
        ({"prior": 3}, TypeError, "prior: int; wanted a Gaussian"),
        (
            {"prior": eki_jax.gaussian(jnp.zeros(3), jnp.array([1.0, 0.0, 1.0]))},
            ValueError,
            "a standard deviation of 0",
        ),
        ({"key": 0}, TypeError, "key: 0; wanted one JAX random key"),
        ({"correction": 1}, TypeError, "correction: 1; wanted True or False"),
        ({"contraction": "outputs"}, TypeError, "is no setting of this solver"),
        ({"forward": 3}, TypeError, "forward: 3; wanted a model"),
        ({"noise_covariance": 0.0}, ValueError, "noise_covariance: singular"),
    ],
)
def test_bad_arguments(change, error, words):
    """Each is named, with what was wanted."""
    arguments = {"forward": linear, "noise_covariance": 1.0, "prior": prior(), "key": KEY, **change}
    with pytest.raises(error, match=words):
        aldi(**arguments)


def test_bad_calls():
    """What init and update refuse."""
    solver = aldi(None, 1.0, prior=prior(), key=KEY)
    with pytest.raises(ValueError, match=r"prior: of shapes \(3,\), but a particle has \(2,\)"):
        solver.init(jnp.zeros((6, 2)))
    state = solver.init(jnp.asarray(START, jnp.float32))
    with pytest.raises(TypeError, match="forward: None"):
        solver.step(state, (MATRIX, Y))
    with pytest.raises(ValueError, match="outputs: leading axis 5"):
        solver.update(state, jnp.zeros((5, M)), jnp.zeros(M))
    with pytest.raises(TypeError, match="state: a tuple; wanted the LangevinState"):
        solver.update((1, 2), jnp.zeros((J, M)), jnp.zeros(M))
