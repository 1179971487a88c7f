"""Unscented Kalman inversion: the exact posterior, the papers' formulas, failures, devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eki_jax
from eki_jax import Reason, kalman, sharding
from eki_jax.kalman import Data, LowRankNoise, data_misfit_controller, tempered, uki

P, M = 5, 7
RNG = np.random.default_rng(0)
MATRIX = RNG.normal(size=(M, P))
Y = RNG.normal(size=M) * 2
ROOT = RNG.normal(size=(M, M))
GAMMA = ROOT @ ROOT.T + 0.1 * np.eye(M)
CROSS = RNG.normal(size=(3, 3))
MEAN = RNG.normal(size=P)
COVARIANCE = np.zeros((P, P))
COVARIANCE[:2, :2] = np.diag([0.25, 4.0])  # of the leaf "b", which comes first
COVARIANCE[2:, 2:] = CROSS @ CROSS.T
KEY = jax.random.key(0)
FORMS = ("transform", "covariance")


def prior():
    mean = {"b": jnp.asarray(MEAN[:2]), "w": jnp.asarray(MEAN[2:])}
    return eki_jax.gaussian(mean, factor={"b": np.array([0.5, 2.0]), "w": CROSS})


def linear(u, x):
    return x @ jnp.concatenate([u["b"], u["w"]])


def curved(u, x):
    flat = jnp.concatenate([u["b"], u["w"]])
    return x @ flat + 0.3 * jnp.sin(x @ flat) * flat[0]


def flat(u) -> np.ndarray:
    return np.concatenate([u["b"], u["w"]])


def posterior(mean=MEAN, covariance=COVARIANCE, gamma=GAMMA):
    precision = np.linalg.inv(covariance) + MATRIX.T @ np.linalg.solve(gamma, MATRIX)
    shift = MATRIX.T @ np.linalg.solve(gamma, Y - MATRIX @ mean)
    return mean + np.linalg.solve(precision, shift), np.linalg.inv(precision)


def run(solver, batch, start=None, steps=1):
    """The last state and every step's info."""
    first = solver.init(prior().mean if start is None else start, KEY)
    return jax.jit(lambda s: jax.lax.scan(lambda s, _: solver.step(s, batch), s, length=steps))(first)


def by_weights(forward, mean, covariance, gamma):
    """One step of the papers: weights of the modified transform, sums over points; gamma is that of the step."""
    size = len(mean)
    a = min(np.sqrt(4 / size), 1.0)
    away = a * np.sqrt(size) * np.linalg.cholesky(covariance).T
    points = np.concatenate([mean[None], mean + away, mean - away])
    weight = 1 / (2 * a**2 * size)
    outputs = np.array([forward(point) for point in points])
    du, dg = points - mean, outputs - outputs[0]
    c_uw = weight * sum(np.outer(u, g) for u, g in zip(du, dg, strict=True))
    c_ww = weight * sum(np.outer(g, g) for g in dg)
    gain = c_uw @ np.linalg.inv(c_ww + gamma)
    return mean + gain @ (Y - outputs[0]), covariance - gain @ c_uw.T


@pytest.mark.parametrize("form", FORMS)
def test_exact_posterior(x64, form):
    """Mean and covariance are the linear-Gaussian posterior's, in one step or in tempered ones."""
    wanted = posterior()
    schedules = {"one": (1.0, 1), "ten": (tempered(10), 10), "controller": (data_misfit_controller(), 30)}
    for name, (step_size, steps) in schedules.items():
        state, info = run(uki(linear, GAMMA, step_size, prior=prior(), form=form), (MATRIX, Y), steps=steps)
        np.testing.assert_allclose(flat(state.position), wanted[0], atol=1e-10, err_msg=name)
        np.testing.assert_allclose(state.covariance, wanted[1], atol=1e-10, err_msg=name)
        assert float(state.time) == 1.0
        assert (int(state.count) == steps) == (name != "controller")
        assert bool(info.is_finite.all())
        if name == "controller":  # it ended, and says so
            assert 1 < int(state.count) < steps
            assert int(info.reason[-1]) == Reason.ENDED
            assert bool(info.moved[int(state.count) - 1])


def test_step_is_the_papers(x64):
    """Of a curved model, two steps of both forms are sums over points with the modified transform's weights."""
    found = {form: run(uki(curved, GAMMA, 0.4, prior=prior(), form=form), (MATRIX, Y), steps=2)[0] for form in FORMS}
    model = lambda v: np.asarray(curved({"b": v[:2], "w": v[2:]}, MATRIX))
    mean, covariance = MEAN, COVARIANCE
    for _ in range(2):
        mean, covariance = by_weights(model, mean, covariance, GAMMA / 0.4)
    for state in found.values():
        np.testing.assert_allclose(flat(state.position), mean, atol=1e-11)
        np.testing.assert_allclose(state.covariance, covariance, atol=1e-11)
        np.testing.assert_array_equal(state.factor, np.tril(state.factor))
    linear_mean, _ = posterior()
    assert np.abs(mean - linear_mean).max() > 0.05  # the curvature matters


def test_imposed_step_is_the_papers(x64):
    """An imposed step predicts ``2 C`` and has the noise ``2 (Gamma, C_0)`` of data joined by the prior's mean."""
    start = {"b": prior().mean["b"] + 1.0, "w": prior().mean["w"]}
    joined = np.block([[GAMMA, np.zeros((M, P))], [np.zeros((P, M)), COVARIANCE]])
    model = lambda v: np.concatenate([np.asarray(curved({"b": v[:2], "w": v[2:]}, MATRIX)), v])
    global_y = np.concatenate([Y, MEAN])
    mean, covariance = flat(start), COVARIANCE
    for _ in range(2):
        grown = 2 * covariance
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(by_weights.__globals__, "Y", global_y)
            mean, covariance = by_weights(model, mean, grown, 2 * joined)
    for form in FORMS:
        solver = uki(curved, GAMMA, 1.0, prior=prior(), form=form, impose_prior=True)
        state, _ = run(solver, (MATRIX, Y), start, steps=2)
        np.testing.assert_allclose(flat(state.position), mean, atol=1e-11)
        np.testing.assert_allclose(state.covariance, covariance, atol=1e-11)
        assert float(state.time) == 2.0


def test_imposed_prior_ends_at_the_posterior(x64):
    """Of a linear model the fixed point is the posterior, from any start, approached as ``(1 + h)^-n``."""
    h, start = 0.5, {"b": jnp.array([9.0, -9.0]), "w": jnp.full(3, 5.0)}
    solver = uki(linear, GAMMA, h, prior=prior(), impose_prior=True)
    wanted = posterior()
    errors = []
    for steps in (10, 11, 100):
        state, _ = run(solver, (MATRIX, Y), start, steps)
        errors.append(np.linalg.norm(flat(state.position) - wanted[0]))
    np.testing.assert_allclose(errors[1] / errors[0], 1 / (1 + h), rtol=0.05)
    assert errors[2] < 1e-9
    np.testing.assert_allclose(state.covariance, wanted[1], atol=1e-9)
    assert not bool(solver.done(state))


def test_prior_is_counted_once(x64):
    """Beyond time 1 the plain steps leave the prior behind, which is what ``impose_prior`` is for."""
    state, _ = run(uki(linear, GAMMA, 1.0, prior=prior()), (MATRIX, Y), steps=3)
    wanted = posterior(gamma=GAMMA / 3)
    np.testing.assert_allclose(flat(state.position), wanted[0], atol=1e-10)
    np.testing.assert_allclose(state.covariance, wanted[1], atol=1e-10)


def failing(which):
    """The linear model, where the run of a point fails if its first or second number is where these points' are."""
    steps = {"up": 2 * 0.5, "down": -2 * 0.5}  # two deviations of 0.5

    def model(u, x):
        fails = jnp.zeros((), bool)
        for name in which:
            fails |= jnp.abs(u["b"][0] - MEAN[0] - steps[name]) < 1e-6
        return jnp.where(fails, jnp.nan, linear(u, x))

    return model


def test_one_of_a_pair_may_fail(x64):
    """The partner, mirrored, stands in for a failed point; a linear model's posterior stays exact."""
    wanted = posterior()
    for name in ("up", "down"):
        state, info = run(uki(failing([name]), GAMMA, 1.0, prior=prior()), (MATRIX, Y))
        np.testing.assert_allclose(flat(state.position), wanted[0], atol=1e-10)
        np.testing.assert_allclose(state.covariance, wanted[1], atol=1e-10)
        assert (int(info.failed[0]), bool(info.moved[0]), bool(info.is_finite[0])) == (1, True, False)


def test_a_pair_that_fails_teaches_nothing(x64):
    """Where both points fail, the direction keeps mean and variance, and the others are as if it were known."""
    state, info = run(uki(failing(["up", "down"]), GAMMA, 1.0, prior=prior()), (MATRIX, Y))
    found, covariance = flat(state.position), np.asarray(state.covariance)
    np.testing.assert_allclose((found[0], covariance[0, 0]), (MEAN[0], 0.25), rtol=1e-12)
    np.testing.assert_allclose(covariance[0, 1:], 0, atol=1e-12)
    rest = np.linalg.inv(np.linalg.inv(COVARIANCE[1:, 1:]) + MATRIX[:, 1:].T @ np.linalg.solve(GAMMA, MATRIX[:, 1:]))
    np.testing.assert_allclose(covariance[1:, 1:], rest, atol=1e-11)
    assert (int(info.failed[0]), bool(info.moved[0])) == (2, True)


def test_a_failed_mean_is_refused(x64):
    """Nothing can be measured from a mean that failed; the step is refused and changes nothing."""
    broken = lambda u, x: jnp.where(jnp.abs(u["b"][0] - MEAN[0]) < 1e-9, jnp.inf, linear(u, x))
    solver = uki(broken, GAMMA, tempered(3), prior=prior())
    start = solver.init(prior().mean, KEY)
    state, info = jax.jit(solver.step)(start, (MATRIX, Y))
    assert Reason(int(info.reason)) is Reason.MEAN_FAILED
    assert (bool(info.moved), bool(info.is_finite), np.isnan(info.loss)) == (False, False, True)
    jax.tree.map(np.testing.assert_array_equal, state, start)
    with pytest.raises(eki_jax.StepRefused, match="run of the mean failed"):
        eki_jax.checked(solver.step)(start, (MATRIX, Y))


@pytest.mark.slow
def test_all_but_the_mean_fail(x64):
    """With the mean's run alone there is nothing to compare, so the step is refused."""
    broken = lambda u, x: jnp.where(jnp.abs(flat_norm(u)) > 1e-9, jnp.nan, linear(u, x))
    flat_norm = lambda u: jnp.sum(jnp.abs(u["b"] - MEAN[:2])) + jnp.sum(jnp.abs(u["w"] - MEAN[2:]))
    _, info = run(uki(broken, GAMMA, 1.0, prior=prior()), (MATRIX, Y))
    assert Reason(int(info.reason[0])) is Reason.FEW_PARTICLES
    assert int(info.failed[0]) == 2 * P


def test_an_outlier_counts_as_failed(x64):
    """An output of 1e12 among ones of 1 is cut, mirrored and counted; without the cut it spoils the step."""
    huge = lambda u, x: jnp.where(jnp.abs(u["b"][0] - MEAN[0] - 1.0) < 1e-6, 1e12, 1.0) * linear(u, x)
    state, info = run(uki(huge, GAMMA, 1.0, prior=prior()), (MATRIX, Y))
    np.testing.assert_allclose(flat(state.position), posterior()[0], atol=1e-10)
    assert int(info.failed[0]) == 1
    state, info = run(uki(huge, GAMMA, 1.0, prior=prior(), outlier_cut=None), (MATRIX, Y))
    assert int(info.failed[0]) == 0
    assert np.abs(flat(state.position) - posterior()[0]).max() > 0.1


def test_controller_sees_moments(x64):
    """The step that a controller takes is that of a large ensemble, also where P > 4 points lie short of sqrt(P)."""
    size = 30
    x = np.random.default_rng(1).normal(size=(M, size)) / np.sqrt(size)
    solver = uki(lambda u, x: x @ u, 0.01, data_misfit_controller(), prior=eki_jax.gaussian(jnp.zeros(size), 1.0))
    _, info = run(solver, (x, Y), jnp.zeros(size))
    draws = np.random.default_rng(2).normal(size=(100_000, size))
    misfits = 0.5 * ((Y - draws @ x.T) ** 2).sum(axis=1) / 0.01
    wanted = max(M / (2 * misfits.mean()), np.sqrt(M / (2 * misfits.var())))
    np.testing.assert_allclose(float(info.step_size[0]), wanted, rtol=0.05)


def test_info(x64):
    """The loss is the mean's misfit, the drift the mean's move in deviations, the spread the root of the trace."""
    state, info = run(uki(linear, GAMMA, 1.0, prior=prior()), (MATRIX, Y))
    misfit = lambda u: 0.5 * (Y - MATRIX @ u) @ np.linalg.solve(GAMMA, Y - MATRIX @ u)
    move = flat(state.position) - MEAN
    np.testing.assert_allclose(float(info.loss[0]), misfit(MEAN), rtol=1e-12)
    np.testing.assert_allclose(float(info.drift_norm[0]), np.sqrt(move @ np.linalg.solve(COVARIANCE, move)), rtol=1e-9)
    np.testing.assert_allclose(float(info.spread[0]), np.sqrt(np.trace(COVARIANCE)), rtol=1e-12)
    assert info.losses.shape == (1, 2 * P + 1)
    np.testing.assert_allclose(info.losses[0, 0], info.loss[0], rtol=1e-12)


def test_roots_keep_digits():
    """In single precision the transform keeps the digits of small noise, which a difference of covariances loses."""
    noise = 1e-10
    x = jnp.asarray(MATRIX, jnp.float32)
    target = np.asarray(x, np.float64) @ (MEAN + 0.5)
    small = eki_jax.gaussian(
        jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), prior().mean), {"b": jnp.array([0.5, 2.0]), "w": 1.0}
    )
    exact = np.asarray(x, np.float64)
    precision = exact.T @ exact / noise + np.diag([4, 0.25, 1, 1, 1])
    deviations = np.sqrt(np.diag(np.linalg.inv(precision)))
    found = {}
    for form in FORMS:
        state, info = run(uki(linear, noise, 1.0, prior=small, form=form), (x, jnp.asarray(target, jnp.float32)))
        assert bool(info.moved[0])
        found[form] = np.sqrt(np.diag(state.covariance)) / deviations
    np.testing.assert_allclose(found["transform"], 1, atol=1e-2)
    assert np.abs(found["covariance"] - 1).max() > 1e-2  # why there are two


def test_more_points_than_needed(x64):
    """Copies of the mean that fill the devices have no weight, and over devices it is what it is on one."""
    few = uki(curved, GAMMA, tempered(3), prior=prior())
    many = uki(curved, GAMMA, tempered(3), prior=prior(), particles=16, axis_name="particles")
    spread = sharding.shard_solver(many, sharding.make_mesh(8))
    alone, _ = run(few, (MATRIX, Y), steps=2)
    state, info = run(spread, (MATRIX, Y), steps=2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), state, alone)
    assert info.losses.shape == (2, 16)
    ensemble = spread.ensemble(state)
    np.testing.assert_array_equal(ensemble["w"][11:], np.broadcast_to(state.position["w"], (5, 3)))
    told, _ = spread.update(state, eki_jax.evaluate(curved, ensemble, MATRIX), Y)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), told, run(few, (MATRIX, Y), steps=3)[0])
    with pytest.raises(ValueError, match=r"particles: 11 on 8 devices; wanted a multiple of 8, such as 16"):
        sharding.shard_solver(uki(curved, GAMMA, prior=prior(), axis_name="particles"), sharding.make_mesh(8)).init(
            prior().mean, KEY
        )


@pytest.mark.slow
def test_noise_of_every_kind(x64):
    """Low rank, a tree of blocks, and data that bring their own covariance."""
    factor = RNG.normal(size=(M, 2))
    low = run(uki(linear, LowRankNoise(0.5, factor), prior=prior()), (MATRIX, Y))[0]
    np.testing.assert_allclose(flat(low.position), posterior(gamma=0.5 * np.eye(M) + factor @ factor.T)[0], atol=1e-10)
    tree = lambda rows: {"a": rows[:2], "c": rows[2:]}
    blocks = {"a": 0.5, "c": GAMMA[2:, 2:]}
    model = lambda u, x: tree(linear(u, x))
    found = run(uki(model, blocks, prior=prior()), (MATRIX, tree(Y)))[0]
    gamma = np.zeros((M, M))
    gamma[:2, :2], gamma[2:, 2:] = 0.5 * np.eye(2), GAMMA[2:, 2:]
    np.testing.assert_allclose(flat(found.position), posterior(gamma=gamma)[0], atol=1e-10)
    own = run(uki(linear, None, prior=prior()), (MATRIX, Data(Y, GAMMA)))[0]
    np.testing.assert_allclose(flat(own.position), posterior()[0], atol=1e-10)


def test_singular_prior(x64):
    """A direction without variance stays where it is; to impose such a prior is refused."""
    flatter = eki_jax.gaussian(jnp.zeros(3), factor=np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
    x = MATRIX[:, :3]
    state, info = run(uki(lambda u, x: x @ u, 0.1, prior=flatter), (x, Y), jnp.zeros(3))
    assert bool(info.moved[0])
    position = np.asarray(state.position)
    np.testing.assert_allclose(position[0] + position[1], position[2], atol=1e-10)
    reduced = x @ np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    wanted = np.linalg.solve(reduced.T @ reduced / 0.1 + np.eye(2), reduced.T @ Y / 0.1)
    np.testing.assert_allclose(position[:2], wanted, atol=1e-10)
    with pytest.raises(ValueError, match=r"prior.*rank 2 for 3 numbers; wanted a covariance with an inverse"):
        uki(lambda u, x: x @ u, 0.1, prior=flatter, impose_prior=True)


def test_traced_settings_are_refused(x64):
    """A traced step size out of its range refuses the step; one in it can be swept and differentiated."""

    def position(h):
        solver = uki(linear, GAMMA, lambda misfits, outputs, time, count: h, prior=prior())
        state, info = solver.step(solver.init(prior().mean, KEY), (MATRIX, Y))
        return state.position["b"][0], info.reason

    moved, reasons = jax.jit(jax.vmap(position))(jnp.array([0.2, 0.4, -1.0, jnp.nan]))
    assert [Reason(int(code)) for code in reasons] == [Reason.TAKEN, Reason.TAKEN, Reason.SETTING, Reason.SETTING]
    np.testing.assert_allclose(moved[2:], MEAN[0])
    slope = jax.jit(jax.grad(lambda h: position(h)[0]))(0.3)
    apart = [float(jax.jit(position)(h)[0]) for h in (0.3 - 1e-5, 0.3 + 1e-5)]
    np.testing.assert_allclose(float(slope), (apart[1] - apart[0]) / 2e-5, rtol=1e-5)


def test_targets_that_are_not_finite(x64):
    """They are the reason, not the mean's run."""
    _, info = run(uki(linear, GAMMA, prior=prior()), (MATRIX, jnp.asarray(Y).at[0].set(jnp.nan)))
    assert Reason(int(info.reason[0])) is Reason.TARGETS


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"form": "root"}, ValueError, "form: 'root'; wanted 'transform' or 'covariance'"),
        ({"step_size": 0.0}, ValueError, "step_size: 0.0; wanted a finite number > 0"),
        ({"prior": 3}, TypeError, "prior: int; wanted a Gaussian"),
        ({"prior": eki_jax.gaussian(jnp.zeros(2), factor=lambda key: jnp.zeros(2))}, TypeError, "is a function"),
        ({"impose_prior": 1}, TypeError, "impose_prior: 1; wanted True or False"),
        ({"impose_prior": True, "step_size": tempered(3)}, ValueError, "whose steps have no end; wanted a number"),
        ({"particles": 2.5}, TypeError, "particles: 2.5; wanted a whole number, at least 3"),
        ({"precision": "highest"}, TypeError, "precision: 'highest'; is no setting of this solver"),
        ({"failures": eki_jax.keep_failed()}, TypeError, "is no setting of this solver"),
        ({"forward": 3}, TypeError, "forward: 3; wanted a model"),
        ({"noise_covariance": -1.0}, ValueError, "noise_covariance: singular"),
    ],
)
def test_bad_arguments(change, error, words):
    """Each is named, with what was wanted."""
    arguments = {"forward": linear, "noise_covariance": 1.0, "step_size": 1.0, "prior": prior(), **change}
    with pytest.raises(error, match=words):
        uki(**arguments)


def test_bad_calls():
    """What init, update and with_ensemble refuse."""
    solver = uki(linear, 1.0, prior=prior(), particles=9)
    with pytest.raises(ValueError, match=r"particles: 9 for 5 parameters; wanted at least 2 P \+ 1 = 11"):
        solver.init(prior().mean, KEY)
    solver = uki(None, 1.0, prior=prior())
    with pytest.raises(TypeError, match="key: 0; wanted one JAX random key"):
        solver.init(prior().mean, 0)
    with pytest.raises(ValueError, match=r"params\['b'\]: shape \(3,\)"):
        solver.init({"b": jnp.zeros(3), "w": jnp.zeros(3)}, KEY)
    state = solver.init(prior().mean, KEY)
    with pytest.raises(TypeError, match="forward: None"):
        solver.step(state, (MATRIX, Y))
    with pytest.raises(ValueError, match="outputs: leading axis 10, but the ensemble has 11"):
        solver.update(state, jnp.zeros((10, M)), Y)
    with pytest.raises(ValueError, match=r"targets: shape \(3,\)"):
        solver.update(state, jnp.zeros((11, M)), Y[:3])
    with pytest.raises(TypeError, match=r"with_ensemble.*state._replace\(position="):
        solver.with_ensemble(state, solver.ensemble(state))
    with pytest.raises(TypeError, match="state: a KalmanState; wanted the UnscentedState"):
        solver.update(kalman.enkf(None, 1.0).init(jnp.zeros((3, 2))), jnp.zeros((11, M)), Y)
