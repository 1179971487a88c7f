"""The prior, imposed: modes of the posterior, and its covariance where inflation keeps it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eki_jax
from eki_jax import kalman

RNG = np.random.default_rng(4)
P, M = 3, 6
MATRIX = RNG.normal(size=(M, P))
DATA = RNG.normal(size=M) + MATRIX @ np.ones(P)
ROOT = np.tril(RNG.normal(size=(P, P))) + 2 * np.eye(P)
MEAN = np.array([0.5, -1.0, 2.0])
PRIOR = eki_jax.gaussian(jnp.asarray(MEAN, jnp.float32), factor=ROOT)
GAMMA = 0.01
PRECISION = MATRIX.T @ MATRIX / GAMMA + np.linalg.inv(ROOT @ ROOT.T)
MODE = np.linalg.solve(PRECISION, MATRIX.T @ DATA / GAMMA + np.linalg.solve(ROOT @ ROOT.T, MEAN))


def linear(u, x):
    return jnp.asarray(MATRIX, u.dtype) @ u


def particles(size: int) -> jax.Array:
    return jnp.asarray(MEAN + RNG.normal(size=(size, P)) @ ROOT.T)


def run(solver, ensemble, steps: int):
    body = lambda state, _: solver.step(state, (0.0, jnp.asarray(DATA)))
    return jax.jit(lambda u: jax.lax.scan(body, solver.init(u), length=steps))(ensemble)


def test_a_long_run_is_at_the_mode(x64):
    """At time 20 the mean is the posterior's mode to 1e-3, and the misfit alone leads elsewhere."""
    make = kalman.etki
    first = particles(40)
    state, info = run(make(linear, GAMMA, 0.5, prior=PRIOR), first, 40)
    assert float(state.time) == 20
    assert np.abs(np.asarray(state.ensemble).mean(axis=0) - MODE).max() < 1e-3
    plain, _ = run(make(linear, GAMMA, 0.5), first, 40)
    assert np.abs(np.asarray(plain.ensemble).mean(axis=0) - MODE).max() > 2e-3
    residuals = (DATA - MATRIX @ MODE) / np.sqrt(GAMMA)
    mode_loss = 0.5 * residuals @ residuals + 0.5 * np.sum(np.linalg.solve(ROOT, MODE - MEAN) ** 2)
    assert float(info.loss[-1]) == pytest.approx(mode_loss, rel=0.05)


def test_inflation_keeps_the_laplace_covariance(x64):
    """With the inflation of a fixed point, time 20 has the posterior's mean and covariance to 1e-8."""
    grow = kalman.multiplicative_inflation()
    solver = kalman.etki(linear, GAMMA, 0.5, prior=PRIOR, inflation=grow)
    state, _ = run(solver, particles(12), 40)
    np.testing.assert_allclose(solver.estimate(state), MODE, atol=1e-8)
    np.testing.assert_allclose(np.cov(np.asarray(state.position).T, ddof=0), np.linalg.inv(PRECISION), atol=1e-8)
    without, _ = run(kalman.etki(linear, GAMMA, 0.5, prior=PRIOR), particles(12), 40)
    assert np.trace(np.cov(np.asarray(without.ensemble).T, ddof=0)) < 0.1 * np.trace(np.linalg.inv(PRECISION))


@pytest.mark.parametrize("kind", ["euler", "nesterov"])
def test_flows_impose_the_prior_too(x64, kind):
    """A discretization of the flow goes to the mode of loss and prior, told or asked."""
    make = {"euler": eki_jax.euler, "nesterov": eki_jax.nesterov}[kind]
    loss = lambda outputs, targets: 0.5 * jnp.sum((outputs - targets) ** 2) / GAMMA
    solver = kalman.tikhonov(make, linear, loss, prior=PRIOR)
    told = kalman.tikhonov(make, None, loss, prior=PRIOR)
    first = particles(20)
    state, _ = solver.step(solver.init(first), (0.0, jnp.asarray(DATA)))
    other, _ = told.update(told.init(first), jax.vmap(lambda u: linear(u, 0))(first), jnp.asarray(DATA))
    np.testing.assert_allclose(other.ensemble, state.ensemble, atol=1e-12)
    end, _ = run(solver, first, 1500)
    assert np.abs(np.asarray(solver.estimate(end)) - MODE).max() < 2e-3


def test_the_wrapper_is_the_keyword(x64):
    """For a Kalman step the wrapper is its keyword, and weighs by the covariance alone."""
    first = particles(8)
    one, _ = run(kalman.tikhonov(kalman.etki, linear, GAMMA, 0.5, prior=PRIOR), first, 2)
    other, _ = run(kalman.etki(linear, GAMMA, 0.5, prior=PRIOR), first, 2)
    np.testing.assert_array_equal(one.ensemble, other.ensemble)
    with pytest.raises(TypeError, match=r"weight: 2\.0; a Kalman step weighs the prior by its covariance"):
        kalman.tikhonov(kalman.enkf, linear, GAMMA, prior=PRIOR, weight=2.0)


@pytest.mark.parametrize(
    ("prior", "error", "message"),
    [
        (3.0, TypeError, "prior: float; wanted a Gaussian"),
        (eki_jax.gaussian(jnp.zeros(3), factor=lambda key: jnp.zeros(3)), TypeError, "its factor is a function"),
        (eki_jax.gaussian(jnp.zeros(3), 0.0), ValueError, "a standard deviation of 0"),
        (eki_jax.gaussian(jnp.zeros(3), factor=np.ones((3, 1))), ValueError, "of rank 1 for 3 numbers"),
    ],
)
def test_priors_without_an_inverse(prior, error, message):
    """A prior that cannot be inverted is refused by name."""
    with pytest.raises(error, match=message):
        kalman.etki(linear, GAMMA, prior=prior)


def test_what_it_is_made_of_is_checked():
    """Without a prior a Kalman step would run as if none had been asked for."""
    loss = eki_jax.squared_error()
    for settings, message in (
        ((kalman.etki, linear, GAMMA, None, 1.0), "prior: NoneType; wanted a Gaussian"),
        ((kalman.etki, linear, GAMMA, PRIOR, True), "weight: True; wanted a finite number"),
        ((eki_jax.euler, 3, loss, PRIOR, 1.0), "forward: 3; wanted a model"),
        ((lambda forward: None, linear, loss, PRIOR, 1.0), "solver: .*does not take 2 arguments; wanted a function"),
        ((lambda forward, loss: 3, linear, loss, PRIOR, 1.0), "solver: it returned 3; wanted a function"),
    ):
        *arguments, prior, weight = settings
        with pytest.raises(TypeError, match=message):
            kalman.tikhonov(*arguments, prior=prior, weight=weight)


def test_a_prior_of_another_shape():
    """A prior of other parameters is refused in the step."""
    solver = kalman.etki(linear, GAMMA, prior=eki_jax.gaussian(jnp.zeros(4), 1.0))
    with pytest.raises(ValueError, match=r"prior: of shapes \(4,\), but a particle has \(3,\)"):
        solver.step(solver.init(jnp.zeros((5, 3))), (0.0, jnp.asarray(DATA, jnp.float32)))


def test_a_particle_far_from_the_prior_has_failed():
    """One at 1e19 whose outputs are like the others' takes no part; in float32 it would move all of them by 1e10."""
    first = jnp.asarray(particles(6), jnp.float32)
    outputs, data = jax.vmap(linear, (0, None))(first, 0.0), jnp.asarray(DATA, jnp.float32)
    far = first.at[1, 0].set(1e19)
    key = jax.random.key(0)
    makers = {
        "etki": lambda: kalman.etki(None, GAMMA, prior=PRIOR),
        "sparse": lambda: kalman.sparse(None, GAMMA, prior=PRIOR, penalty=0.1),
        "aldi": lambda: kalman.aldi(None, GAMMA, 0.1, prior=PRIOR, key=key),
    }
    for name, make in makers.items():
        solver = make()
        state, info = solver.update(solver.init(far), outputs, data)
        gone, same = solver.update(solver.init(first.at[1].set(jnp.nan)), outputs, data)
        assert (bool(info.moved), int(info.failed), int(same.failed)) == (True, 1, 1), name
        others = np.array([0, 2, 3, 4, 5])
        np.testing.assert_allclose(
            solver.ensemble(state)[others], solver.ensemble(gone)[others], rtol=1e-5, atol=1e-5, err_msg=name
        )
