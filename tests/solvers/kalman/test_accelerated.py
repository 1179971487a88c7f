"""Nesterov's acceleration of a solver's steps: the recursion, its stability, what it saves."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eki_jax
from eki_jax import Reason, kalman
from eki_jax.kalman import accelerated

P, J = 3, 8
RNG = np.random.default_rng(0)
MATRIX = RNG.normal(size=(5, P))
Y = MATRIX @ np.array([1.0, -1.0, 2.0])
START = RNG.normal(size=(J, P))
KEY = jax.random.key(0)


def model(u, x):
    """Mildly nonlinear."""
    return x @ u + 0.3 * jnp.sin(x @ u)


def run(solver, batch, steps, start=START):
    return jax.jit(lambda u: jax.lax.scan(lambda s, _: solver.step(s, batch), solver.init(u), length=steps))(
        jnp.asarray(start)
    )


@pytest.mark.parametrize("make", [kalman.etki, pytest.param(kalman.enkf, marks=pytest.mark.slow)])
def test_recursion(x64, make):
    """Each step is the solver's own from the particles ahead, and they look ahead by ``k / (k + 3)``."""
    plain = make(model, 1.0, 2.0)
    solver = accelerated(plain)
    state, v, u = solver.init(jnp.asarray(START)), START, START
    for k in range(4):
        np.testing.assert_allclose(solver.ensemble(state)[:], v, atol=1e-12)
        state, info = solver.step(state, (MATRIX, Y))
        reached = np.asarray(plain.step(plain.init(jnp.asarray(v)), (MATRIX, Y))[0].ensemble)
        u, v = reached, reached + k / (k + 3) * (reached - u)
        np.testing.assert_allclose(state.position, u, atol=1e-12)
        np.testing.assert_allclose(solver.estimate(state), u.mean(0), atol=1e-12)
        np.testing.assert_allclose(float(info.momentum), k / (k + 3), rtol=1e-12)
        assert not bool(info.restarted)
    assert (int(state.count), float(state.time)) == (4, 8.0)


def test_momentum_of_your_own(x64):
    """A number is the same in every step, and a schedule is asked for the steps since the momentum began."""
    constant = run(accelerated(kalman.etki(model, 1.0), 0.4), (MATRIX, Y), 4)[1]
    np.testing.assert_allclose(constant.momentum, 0.4)
    halves = run(accelerated(kalman.etki(model, 1.0), lambda k: 0.5 - 0.5**k / 2), (MATRIX, Y), 3)[1]
    np.testing.assert_allclose(halves.momentum, [0.0, 0.25, 0.375])
    none, plain = (
        run(s, (MATRIX, Y), 4)[0] for s in (accelerated(kalman.etki(model, 1.0), 0.0), kalman.etki(model, 1.0))
    )
    np.testing.assert_allclose(none.position, plain.ensemble, rtol=1e-12)


def test_fewer_steps(x64):
    """On a mildly nonlinear problem a thousandth of the first loss takes less than half as many steps."""
    y = np.asarray(model(jnp.array([1.0, -1.0, 2.0]), MATRIX))
    plain = kalman.etki(model, 1.0)
    for seed in range(3):
        start = np.random.default_rng(seed).normal(size=(J, P))
        steps = {}
        for name, solver in {"plain": plain, "ahead": accelerated(plain)}.items():
            losses = np.asarray(run(solver, (MATRIX, y), 150, start)[1].loss)
            steps[name] = int(np.argmax(losses < 1e-3 * losses[0])) if losses[-1] < 1e-3 * losses[0] else 150
        assert 0 < steps["ahead"] < 0.5 * steps["plain"], steps


def ill_conditioned(size, particles, condition, seed):
    draws = np.random.default_rng(seed)
    left, right = (np.linalg.qr(draws.normal(size=(size, size)))[0] for _ in range(2))
    x = left @ np.diag(np.logspace(0, -np.log10(condition) / 2, size)) @ right
    return x, x @ draws.normal(size=size) * 3, draws.normal(size=(particles, size))


@pytest.mark.parametrize("kind", ["etki", pytest.param("enkf", marks=pytest.mark.slow), "perturbed"])
def test_no_divergence(x64, kind):
    """On linear problems of conditions from 1 to 10^6 and steps from short to huge no loss ever rises above its start.

    A constant momentum ends far above; with perturbed data it is the restarts that keep the loss down.
    """

    def losses(x, y, start, h, momentum=None, restart=True):
        key = {"key": KEY} if kind == "perturbed" else {}
        make = kalman.etki if kind == "etki" else kalman.enkf
        solver = accelerated(make(lambda u, x: x @ u, jnp.full(y.shape, 0.01 / h), **key), momentum, restart=restart)
        return jax.lax.scan(lambda s, _: solver.step(s, (x, y)), solver.init(start), length=60)[1].loss

    cases = [
        (*ill_conditioned(6, 12, condition, seed), h)
        for condition in (1, 1e3, 1e6)
        for h in (0.1, 10.0, 1e3)
        for seed in (0, 1)
    ]
    batch = [jnp.asarray(np.array(part)) for part in zip(*cases, strict=True)]
    found = np.asarray(jax.jit(jax.vmap(losses))(*batch))
    assert np.isfinite(found).all()
    assert (found.max(axis=1) <= found[:, 0] * (1 + 1e-9)).all()
    assert (found[:, -1] < 0.1 * found[:, 0]).all()
    other = {"etki": {"momentum": 0.9}, "perturbed": {"restart": False}}.get(kind)
    if other is not None:
        worse = np.asarray(jax.jit(jax.vmap(lambda *case: losses(*case, **other)))(*batch))
        assert np.log(worse[:, -1] / found[:, -1]).mean() > 0.5


def test_restart(x64):
    """Where the loss rises the momentum is given up, and begins anew with the next step."""
    solver = accelerated(kalman.etki(model, 1.0))
    state = run(solver, (MATRIX, Y), 3)[0]
    state = state._replace(loss=jnp.asarray(0.0))  # any loss is above
    new, info = solver.step(state, (MATRIX, Y))
    assert (bool(info.restarted), float(info.momentum), int(new.since)) == (True, 0.0, 1)
    np.testing.assert_array_equal(new.position, solver.ensemble(new))
    on, told = accelerated(kalman.etki(model, 1.0), restart=False).step(state, (MATRIX, Y))
    assert (bool(told.restarted), float(told.momentum), int(on.since)) == (False, 0.5, 4)
    _, told = accelerated(kalman.etki(model, 1.0), 0.9).step(state, (MATRIX, Y))
    assert (bool(told.restarted), float(told.momentum)) == (True, 0.0)


def test_a_refused_step_changes_nothing(x64):
    """Neither particles, positions, count, loss nor momentum; and the end of a tempering is passed on."""
    solver = accelerated(kalman.etki(model, 1.0, kalman.tempered(3)))
    state, _ = run(solver, (MATRIX, Y), 2)
    same, info = solver.step(state, (MATRIX, jnp.full(5, jnp.nan)))
    assert (Reason(int(info.reason)), bool(info.moved), float(info.momentum)) == (Reason.TARGETS, False, 0.0)
    jax.tree.map(np.testing.assert_array_equal, same, state)
    last, _ = solver.step(state, (MATRIX, Y))
    assert (bool(solver.done(state)), bool(solver.done(last)), float(last.time)) == (False, True, 1.0)
    over, info = solver.step(last, (MATRIX, Y))
    assert Reason(int(info.reason)) is Reason.ENDED
    jax.tree.map(np.testing.assert_array_equal, over, last)


def test_traced_momentum(x64):
    """One out of its range refuses the step."""

    def one(momentum):
        solver = accelerated(kalman.etki(model, 1.0), lambda k: momentum)
        state, info = solver.step(solver.init(jnp.asarray(START)), (MATRIX, Y))
        return info.reason, info.moved, info.is_finite, state.count, state.ensemble

    reasons, moved, finite, counts, ensembles = jax.jit(jax.vmap(one))(jnp.array([0.5, 1.0, -0.1, jnp.nan]))
    assert [Reason(int(code)) for code in reasons] == [Reason.TAKEN] + [Reason.SETTING] * 3
    assert moved.tolist() == finite.tolist() == [True, False, False, False]
    assert counts.tolist() == [1, 0, 0, 0]
    np.testing.assert_array_equal(ensembles[1], START)


def test_failed_particles(x64):
    """A kept one stays where it is, a redrawn one gets no momentum from where it was lost; neither spoils another."""
    gone = START.copy()
    gone[2] = np.nan
    for policy, name in ((eki_jax.keep_failed(), "kept"), (eki_jax.redraw_failed(KEY), "redrawn")):
        solver = accelerated(kalman.etki(model, 1.0, failures=policy), 0.5)
        state, info = solver.step(solver.init(jnp.asarray(gone)), (MATRIX, Y))
        assert int(info.failed) == 1
        assert bool(jnp.isfinite(jnp.delete(solver.ensemble(state), 2, axis=0)).all())
        if name == "redrawn":
            np.testing.assert_array_equal(solver.ensemble(state)[2], state.position[2])
            assert bool(jnp.isfinite(state.position).all())
    first = START[2, 0]
    broken = lambda u, x: jnp.where(jnp.abs(u[0] - first) < 1e-9, jnp.nan, model(u, x))
    solver = accelerated(kalman.etki(broken, 1.0), 0.5)
    state, _ = run(solver, (MATRIX, Y), 3)
    np.testing.assert_array_equal(solver.ensemble(state)[2], START[2])
    assert np.abs(np.asarray(state.position - solver.ensemble(state))[0]).max() > 1e-3  # the others do look ahead


@pytest.mark.slow
def test_other_solvers(x64):
    """Inflated Kalman steps and a discretization of the flow are accelerated too."""
    inflated = kalman.etki(model, 10.0, inflation=kalman.multiplicative_inflation(1.02))
    flow = eki_jax.euler(model, eki_jax.squared_error(), eki_jax.constant_step_size(0.02))
    for plain in (inflated, flow):
        losses = {name: run(s, (MATRIX, Y), 40)[1].loss[-1] for name, s in (("p", plain), ("a", accelerated(plain)))}
        assert float(losses["a"]) < float(losses["p"])


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (lambda: (3,), TypeError, "solver: 3; wanted a Solver"),
        (
            lambda: (kalman.uki(None, 1.0, prior=eki_jax.gaussian(jnp.zeros(2), 1.0)),),
            TypeError,
            "solver: makes its own particles",
        ),
        (lambda: (kalman.etki(None, 1.0), 1.0), ValueError, r"momentum: 1.0; wanted a number in \[0, 1\)"),
        (lambda: (kalman.etki(None, 1.0), "fast"), TypeError, "momentum: 'fast'"),
    ],
)
def test_bad_arguments(arguments, error, words):
    """Each is named, with what was wanted."""
    with pytest.raises(error, match=words):
        accelerated(*arguments())


def test_bad_calls():
    """A flag that is none, a state of the solver inside, and no model."""
    with pytest.raises(TypeError, match="restart: 1; wanted True or False"):
        accelerated(kalman.etki(None, 1.0), restart=1)
    plain = kalman.etki(None, 1.0)
    solver = accelerated(plain)
    ensemble = jnp.asarray(START, jnp.float32)
    with pytest.raises(TypeError, match="state: a KalmanState; wanted the AcceleratedState"):
        solver.update(plain.init(ensemble), jnp.zeros((J, 5)), jnp.zeros(5))
    with pytest.raises(TypeError, match="forward: None"):
        solver.step(solver.init(ensemble), (MATRIX, Y))
