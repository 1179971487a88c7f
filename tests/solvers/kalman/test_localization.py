"""Localization and inflation: analyses of single parameters, and what they leave alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eki_jax
from eki_jax import kalman

RNG = np.random.default_rng(7)
P, M, J = 4, 5, 6
MATRIX = RNG.normal(size=(M, P))
DATA = RNG.normal(size=M)
ROOT = RNG.normal(size=(M, M))
GAMMA = ROOT @ ROOT.T + np.eye(M)
FIRST = jnp.asarray(RNG.normal(size=(J, P)), jnp.float32)
WEIGHTS = RNG.uniform(0.1, 1.0, size=(P, M))
KEY = jax.random.key(3)
KINDS = {
    "etki": lambda *args, **more: kalman.etki(*args, **more),
    "enkf": lambda *args, **more: kalman.enkf(*args, key=KEY, **more),
}


def linear(u, x):
    return jnp.asarray(MATRIX, u.dtype) @ u


def step(solver, first=FIRST, data=DATA):
    return jax.jit(lambda u: solver.step(solver.init(u), (0.0, jnp.asarray(data, u.dtype))))(first)


def test_weights_divide_the_noise(x64):
    """A parameter's analysis is the global one with noise D^-1/2 Gamma D^-1/2."""
    first = jnp.asarray(FIRST, jnp.float64)
    state, info = step(kalman.etki(linear, GAMMA, 0.7, localization=WEIGHTS), first)
    for p in range(P):
        root = np.sqrt(WEIGHTS[p])
        wanted, _ = step(kalman.etki(linear, GAMMA / np.outer(root, root), 0.7), first)
        np.testing.assert_allclose(state.ensemble[:, p], wanted.ensemble[:, p], atol=1e-11)
    direction = (np.asarray(first) - np.asarray(state.ensemble)) / 0.7
    np.testing.assert_allclose(info.drift_norm, np.linalg.norm(direction), rtol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_one_change_nothing(x64, kind):
    """With weights of one it is the global step, for perturbed data too; with zeros nothing moves."""
    first = jnp.asarray(FIRST, jnp.float64)
    everywhere, _ = step(KINDS[kind](linear, GAMMA, localization=np.ones((P, M))), first)
    wanted, _ = step(KINDS[kind](linear, GAMMA), first)
    np.testing.assert_allclose(everywhere.ensemble, wanted.ensemble, atol=1e-11)
    nowhere, _ = step(KINDS[kind](linear, GAMMA, localization=np.zeros((P, M))), first)
    np.testing.assert_array_equal(nowhere.ensemble, first)


def test_the_taper_is_gaspari_and_cohns():
    """The taper is their equation 4.10, continuous with two derivatives, and never negative."""
    r = np.linspace(0, 1.2, 400)
    found = np.asarray(kalman.gaspari_cohn(jnp.asarray(r)))
    z = 2 * r
    near = -(z**5) / 4 + z**4 / 2 + 5 * z**3 / 8 - 5 * z**2 / 3 + 1
    far = z**5 / 12 - z**4 / 2 + 5 * z**3 / 8 + 5 * z**2 / 3 - 5 * z + 4 - 2 / (3 * np.maximum(z, 0.1))
    wanted = np.where(z <= 1, near, np.where(z <= 2, far, 0))
    np.testing.assert_allclose(found, wanted, atol=2e-6)
    assert found.min() >= 0


def test_coordinates_give_the_weights(x64):
    """A taper is the array of its weights, on a ring, of leaves with a place for each entry or one for all."""
    model = lambda u, x: {"flow": jnp.asarray(MATRIX[:3]) @ jnp.append(u["k"], u["c"]), "heat": u["k"][:2]}
    data = {"flow": jnp.ones(3), "heat": jnp.zeros(2)}
    own = {"k": np.array([0.0, 3.0, 9.0]), "c": np.array([5.0])}
    others = {"flow": np.array([1.0, 8.0, 5.0]), "heat": np.array([0.0, 3.0])}
    near = kalman.taper(own, others, 4.0, period=10.0)
    points, places = np.array([5.0, 0.0, 3.0, 9.0]), np.array([1.0, 8.0, 5.0, 0.0, 3.0])  # "c" before "k"
    away = np.abs(points[:, None] - places)
    weights = np.asarray(kalman.gaspari_cohn(jnp.asarray(np.minimum(away, 10 - away) / 4.0)))
    first = {"k": jnp.asarray(RNG.normal(size=(J, 3))), "c": jnp.asarray(RNG.normal(size=J))}
    ends = []
    for localization in (near, weights):
        solver = kalman.etki(model, 0.5, localization=localization)
        ends.append(solver.step(solver.init(first), (0.0, data))[0].ensemble)
    for name in first:
        np.testing.assert_allclose(ends[0][name], ends[1][name], atol=1e-12)


def test_groups_see_their_outputs_alone(x64):
    """Parameters that see some outputs are moved as if there were no others, with one analysis a group."""
    model = lambda u, x: {"flow": jnp.sin(u["a"]) + u["b"], "heat": u["b"] * u["a"][0]}
    first = {"a": jnp.asarray(RNG.normal(size=(J, 2))), "b": jnp.asarray(RNG.normal(size=(J, 2)))}
    data = {"flow": jnp.ones(2), "heat": jnp.zeros(2)}
    groups = kalman.update_groups({"a": ["flow"], "b": ["flow", "heat"]})
    solver = kalman.etki(model, 0.3, localization=groups)
    state, _ = solver.step(solver.init(first), (0.0, data))
    alone = kalman.etki(lambda u, x: {"flow": model(u, x)["flow"]}, 0.3)
    wanted, _ = alone.step(alone.init(first), (0.0, {"flow": data["flow"]}))
    np.testing.assert_allclose(state.ensemble["a"], wanted.ensemble["a"], atol=1e-12)
    both = kalman.etki(model, 0.3)
    wanted, _ = both.step(both.init(first), (0.0, data))
    np.testing.assert_allclose(state.ensemble["b"], wanted.ensemble["b"], atol=1e-12)
    for sees, words in (
        ({"a": ["flow"]}, r"nothing of the parameters \['b'\]"),
        ({"a": ["wind"], "b": []}, "'wind' is none of the outputs"),
        ({"a": [], "b": [], "c": []}, "'c' is none of the parameters"),
    ):
        solver = kalman.etki(model, 0.3, localization=kalman.update_groups(sees))
        with pytest.raises(ValueError, match=words):
            solver.step(solver.init(first), (0.0, data))


@pytest.mark.parametrize("make", [kalman.correlation_taper, kalman.sampling_error_correction])
def test_spurious_correlations_move_less(make):
    """Parameters that no output depends on keep more of their spread than in the global step."""
    first = jnp.asarray(np.random.default_rng(0).normal(size=(12, 40)), jnp.float32)
    model = lambda u, x: u[:10]
    ends = [
        step(kalman.etki(model, 0.01, localization=which), first, np.zeros(10))[0].ensemble for which in (None, make())
    ]
    spreads = [np.asarray(end)[:, 10:].std(axis=0).mean() for end in ends]
    assert spreads[1] > 1.15 * spreads[0]
    assert np.asarray(ends[1])[:, :10].std() < 0.3  # what is seen is learned all the same


def test_failed_particles_stay_out(x64):
    """With a failed particle the localized step is that of the others."""
    first = jnp.asarray(FIRST, jnp.float64)
    outputs = jax.vmap(lambda u: linear(u, 0.0))(first)
    for kind in (kalman.taper(np.arange(4.0), np.arange(5.0), 3.0), kalman.correlation_taper(cut=0.5)):
        solver = kalman.etki(None, GAMMA, localization=kind)
        state, info = solver.update(solver.init(first), outputs.at[2].set(jnp.nan), jnp.asarray(DATA))
        rest = jnp.delete(first, 2, axis=0)
        wanted, _ = solver.update(solver.init(rest), jnp.delete(outputs, 2, axis=0), jnp.asarray(DATA))
        assert int(info.failed) == 1
        np.testing.assert_allclose(jnp.delete(state.ensemble, 2, axis=0), wanted.ensemble, atol=1e-11)
        np.testing.assert_array_equal(state.ensemble[2], first[2])


@pytest.mark.parametrize(
    ("localization", "message"),
    [
        (np.ones((P, M + 1)), r"localization: of shapes \[\(4, 6\)\]; wanted \(4, 5\)"),
        (2 * np.ones((P, M)), "no weights; wanted numbers in"),
        (kalman.taper(np.arange(3.0), np.arange(5.0), 1.0), r"parameter_coordinates: shape \(3,\)"),
        (kalman.taper(np.ones((4, 2)), np.arange(5.0), 1.0), "output_coordinates: of 1 dimensions"),
        (
            kalman.taper({"a": np.arange(4.0)}, np.arange(5.0), 1.0),
            "parameter_coordinates: structure .*wanted the same",
        ),
        (kalman.update_groups({"a": ["b"]}), "the parameters are no mapping"),
    ],
)
def test_what_does_not_fit_is_named(localization, message):
    """Weights and coordinates of other shapes are refused by the names of the arguments."""
    with pytest.raises(ValueError, match=message):
        step(kalman.etki(linear, GAMMA, localization=localization))


def test_failed_particles_are_not_inflated():
    """The deviations of the others grow from their own mean, and one that failed stays where it was."""
    u = jnp.asarray(np.random.default_rng(5).normal(size=(6, 3)), jnp.float32)
    outputs, data = 2 * u, jnp.ones(3)
    prior = eki_jax.gaussian(jnp.zeros(3), 1.0)
    for grow in (kalman.multiplicative_inflation(1.5), kalman.additive_inflation(KEY, prior, 0.5)):
        plain, grown = kalman.etki(None, 1.0), kalman.etki(None, 1.0, inflation=grow)
        told = outputs.at[1].set(jnp.nan), data
        before, _ = plain.update(plain.init(u), *told)
        after, _ = grown.update(grown.init(u), *told)
        others = np.array([0, 2, 3, 4, 5])
        np.testing.assert_array_equal(after.ensemble[1], u[1])
        np.testing.assert_allclose(after.ensemble[others].mean(0), before.ensemble[others].mean(0), atol=1e-6)
        assert np.abs(after.ensemble[others] - before.ensemble[others]).max() > 0.05


def test_noise_of_another_shape_is_refused():
    """Noise that does not fit the particles is refused by the prior's name."""
    for mean in (jnp.zeros(2), {"a": jnp.zeros(3)}):
        grow = kalman.additive_inflation(KEY, eki_jax.gaussian(mean, 1.0), 0.1)
        with pytest.raises(ValueError, match=r"prior: .*; wanted"):
            grow.apply(jnp.zeros((4, 3)), jnp.array(1.0), jnp.array(0), None)


def test_distances_and_periods_that_do_not_fit():
    """A distance that returns one number for all places, and three lengths for one dimension, are refused by name."""
    places, u = jnp.arange(3.0), jnp.eye(4, 3)
    for near, message in (
        (kalman.taper(places, places, 1.0, distance=lambda place, others: 1.0), r"distance: returned shape \(\)"),
        (kalman.taper(places, places, 1.0, period=np.ones(3)), "period: 3 lengths for 1 dimensions"),
    ):
        solver = kalman.etki(None, 1.0, localization=near)
        with pytest.raises(ValueError, match=message):
            solver.update(solver.init(u), u, jnp.zeros(3))


def test_bad_arguments_are_named():
    """Radii, periods, cuts, factors and kinds out of their range are refused at once."""
    for make, error, message in (
        (lambda: kalman.taper(0.0, 0.0, -1.0), ValueError, "radius: -1.0"),
        (lambda: kalman.taper(0.0, 0.0, 1.0, period=0.0), ValueError, "period: 0.0"),
        (lambda: kalman.taper(0.0, 0.0, 1.0, period=float("inf")), ValueError, "period: inf"),
        (lambda: kalman.taper(0.0, 0.0, 1.0, period=True), TypeError, "period: True"),
        (lambda: kalman.update_groups({"a": None}), TypeError, "sees: "),
        (lambda: kalman.etki(None, 1.0, localization=kalman.Localization(None)), TypeError, "localization.fit: None"),
        (lambda: kalman.etki(None, 1.0, inflation=kalman.Inflation(None)), TypeError, "inflation.apply: None"),
        (lambda: kalman.additive_inflation(KEY, eki_jax.gaussian, 0.1), TypeError, "prior: <function gaussian"),
        (lambda: kalman.correlation_taper(cut=0), ValueError, "cut: 0"),
        (lambda: kalman.update_groups({"a": "flow"}), TypeError, "sees: "),
        (lambda: kalman.multiplicative_inflation(0.0), ValueError, "factor: 0.0"),
        (lambda: kalman.additive_inflation(KEY, eki_jax.gaussian(jnp.zeros(1), 1.0), -1), ValueError, "scale: -1"),
        (lambda: kalman.etki(linear, 1.0, inflation=1.1), TypeError, "inflation: 1.1; wanted an Inflation"),
        (lambda: kalman.etki(linear, 1.0, localization="near"), TypeError, "localization: 'near'"),
    ):
        with pytest.raises(error, match=message):
            make()


def test_inflation_widens_between_steps(x64):
    """The state's particles are the analysed ones, wider by the factor, around the same mean."""
    first = jnp.asarray(FIRST, jnp.float64)
    plain, _ = step(kalman.etki(linear, GAMMA), first)
    solver = kalman.etki(linear, GAMMA, inflation=kalman.multiplicative_inflation(1.2))
    state, info = step(solver, first)
    np.testing.assert_allclose(state.position, plain.ensemble, atol=1e-13)
    mean = plain.ensemble.mean(axis=0)
    np.testing.assert_allclose(state.ensemble - mean, 1.2 * (plain.ensemble - mean), atol=1e-12)
    np.testing.assert_allclose(solver.estimate(state), mean, atol=1e-13)
    assert (int(state.count), float(state.time), bool(info.moved)) == (1, 1.0, True)


def test_added_noise_has_the_priors_shape(x64):
    """Additive inflation adds centred draws of the prior, other ones in each step, and leaves the span."""
    prior = eki_jax.gaussian(jnp.zeros(P), jnp.array([1.0, 2.0, 0.0, 4.0]))
    grow = kalman.additive_inflation(KEY, prior, 0.1).apply
    many = jnp.zeros((4000, P))
    noise = np.asarray(grow(many, jnp.array(1.0), jnp.array(0), None))
    np.testing.assert_allclose(noise.mean(axis=0), 0, atol=1e-12)
    np.testing.assert_allclose(noise.std(axis=0), [0.1, 0.2, 0.0, 0.4], rtol=0.05)
    assert np.abs(noise - np.asarray(grow(many, jnp.array(1.0), jnp.array(1), None))).max() > 0.1


def test_a_step_that_leaves_nothing_is_refused():
    """At a step size of 1 a fixed point's inflation is infinite: the step is refused and changes nothing."""
    solver = kalman.etki(linear, GAMMA, 1.0, inflation=kalman.multiplicative_inflation())
    state = solver.init(FIRST)
    later, info = solver.step(state, (0.0, jnp.asarray(DATA, jnp.float32)))
    assert (bool(info.moved), eki_jax.Reason(int(info.reason))) == (False, eki_jax.Reason.SETTING)
    for one, other in zip(jax.tree.leaves(later), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(one, other)
