"""Priors have the moments and correlations that were asked for, by quadrature of another kind."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
import scipy.integrate
import scipy.stats

from eki_jax import calibrate
from eki_jax.calibrate.joint import from_spec

MOMENTS = {
    "normal": (calibrate.normal, {"mean": -3.0, "sd": 0.5}),
    "positive": (calibrate.positive, {"mean": 2.0, "sd": 1.0}),
    "positive, wide": (calibrate.positive, {"mean": 1.0, "sd": 3.0}),
    "positive, narrow": (calibrate.positive, {"mean": 1e6, "sd": 1.0}),
    "log-normal above": (calibrate.lognormal, {"mean": 12.0, "sd": 4.0, "low": 10.0}),
    "log-normal below": (calibrate.lognormal, {"mean": -12.0, "sd": 4.0, "high": -10.0}),
    "bounded": (calibrate.bounded, {"low": -1.0, "high": 3.0, "mean": 2.5, "sd": 0.3}),
    "bounded, off the middle": (calibrate.bounded, {"low": 0.0, "high": 1.0, "mean": 0.02, "sd": 0.02}),
    "bounded, narrow": (calibrate.bounded, {"low": 0.0, "high": 1.0, "mean": 0.5, "sd": 1e-3}),
    "bounded, two humps": (calibrate.bounded, {"low": 0.0, "high": 1.0, "mean": 0.4, "sd": 0.4}),
}


def integral(function: Callable[[float], float]) -> float:
    """The mean of a function of a standard normal variable, by adaptive quadrature."""
    density = lambda z: function(z) * scipy.stats.norm.pdf(z)
    parts = [scipy.integrate.quad(density, a, a + 1, epsabs=0, epsrel=1e-9)[0] for a in range(-20, 20)]
    return float(np.sum(parts))


def transformed(prior: calibrate.Marginal) -> Callable[[float], float]:
    return lambda z: float(prior.transform(np.array(z)))


@pytest.mark.parametrize("name", MOMENTS)
def test_moments_are_those_asked_for(name: str) -> None:
    """Of the physical variable, to eight digits."""
    make, settings = MOMENTS[name]
    x = transformed(make(**settings))
    mean = integral(x)
    sd = np.sqrt(integral(lambda z: (x(z) - mean) ** 2))
    assert mean == pytest.approx(settings["mean"], rel=1e-8)
    assert sd == pytest.approx(settings["sd"], rel=1e-6)


@pytest.mark.parametrize("name", MOMENTS)
def test_a_prior_knows_its_own_moments(name: str) -> None:
    make, settings = MOMENTS[name]
    mean, sd = make(**settings).moments()
    assert (float(mean), float(sd)) == pytest.approx((settings["mean"], settings["sd"]), rel=1e-6)


def test_bounded_is_uniform_without_moments() -> None:
    """The distribution function is a straight line."""
    z = np.linspace(-5, 5, 101)
    values = calibrate.bounded(2.0, 4.0).transform(z)
    np.testing.assert_allclose((values - 2.0) / 2.0, scipy.stats.norm.cdf(z), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("z", [-60.0, -9.0, 9.0, 60.0])
def test_no_value_is_at_a_bound(z: float) -> None:
    """However far a particle goes, in either direction."""
    where = np.array(z)
    assert 0.0 < calibrate.bounded(0.0, 1.0).transform(where) < 1.0
    assert 1e9 < calibrate.bounded(1e9, 1e9 + 1).transform(where) < 1e9 + 1
    assert calibrate.positive(1.0, 5.0).transform(where) > 0
    assert calibrate.lognormal(-1.0, 5.0, high=0.0).transform(where) < 0


@pytest.mark.parametrize("name", MOMENTS)
def test_latent_values_come_back(name: str) -> None:
    make, settings = MOMENTS[name]
    prior = calibrate.joint({"a": make(**settings)})
    z = np.linspace(-1.5, 1.5, 13)[:, None]
    np.testing.assert_allclose(prior.to_latent(prior.to_physical({"a": z}))["a"], z, atol=1e-6)


@pytest.mark.parametrize("name", MOMENTS)
def test_transforms_rise(name: str) -> None:
    make, settings = MOMENTS[name]
    assert np.all(np.diff(make(**settings).transform(np.linspace(-2, 2, 50))) > 0)


def test_arrays_have_priors_entry_by_entry() -> None:
    """Numbers and arrays of moments fit each other."""
    prior = calibrate.positive(mean=[1.0, 2.0], sd=0.5)
    assert prior.shape == (2,)
    np.testing.assert_allclose(prior.moments(), [[1.0, 2.0], [0.5, 0.5]], rtol=1e-6)
    field = calibrate.bounded(0.0, 1.0, mean=0.3, sd=0.1, shape=(2, 3))
    np.testing.assert_allclose(field.moments()[0], np.full((2, 3), 0.3), rtol=1e-6)
    values = calibrate.joint({"field": field}).to_physical({"field": np.zeros((4, 6))})
    assert values["field"].shape == (4, 2, 3)


PAIRS = {
    "normal": (calibrate.normal(0.0, 1.0), calibrate.normal(3.0, 2.0)),
    "log-normal": (calibrate.positive(2.0, 1.0), calibrate.positive(1.0, 1.5)),
    "bounded": (calibrate.bounded(0.0, 1.0), calibrate.bounded(0.0, 1.0, 0.1, 0.1)),
    "mixed": (calibrate.positive(2.0, 1.0), calibrate.bounded(0.0, 1.0)),
}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("wanted", [-0.4, 0.7])
def test_correlations_are_the_physical_ones(name: str, wanted: float) -> None:
    """By quadrature in two dimensions, with another rule than the library's."""
    first, second = PAIRS[name]
    group = calibrate.correlated({"a": first, "b": second}, wanted)
    z = np.linspace(-9, 9, 401)
    pairs = np.stack(np.meshgrid(z, z, indexing="ij"), axis=-1).reshape(-1, 2)
    values = calibrate.joint({"group": group}).to_physical({"group": pairs})
    weights = np.exp(-0.5 * np.sum(pairs**2, axis=1))
    covariance = np.cov(values["a"], values["b"], aweights=weights)
    assert covariance[0, 1] / np.sqrt(covariance[0, 0] * covariance[1, 1]) == pytest.approx(wanted, abs=1e-3)
    means, sds = np.array([first.moments(), second.moments()]).T
    np.testing.assert_allclose(
        np.average([values["a"], values["b"]], axis=1, weights=weights), means, rtol=1e-3, atol=1e-6
    )
    np.testing.assert_allclose(np.sqrt(np.diag(covariance)), sds, rtol=1e-2)


def test_correlations_that_cannot_be() -> None:
    """Two log-normal variables are not anticorrelated at will; three cannot all be opposed."""
    wide = calibrate.positive(1.0, 2.0)
    with pytest.raises(ValueError, match=r"correlation: -0\.9; wanted one between -0\.2\d* and 1"):
        calibrate.correlated({"a": wide, "b": wide}, -0.9)
    plain = {name: calibrate.normal(0.0, 1.0) for name in "abc"}
    with pytest.raises(ValueError, match="least eigenvalue of the latent correlations"):
        calibrate.correlated(plain, -0.9)
    with pytest.raises(ValueError, match=r"correlation: shape \(2, 2\); wanted \(3, 3\)"):
        calibrate.correlated(plain, np.eye(2))
    with pytest.raises(ValueError, match="correlation: no matrix of correlations"):
        calibrate.correlated(plain, np.eye(3) + np.triu(np.full((3, 3), 0.1), 1))


def test_samples_have_their_quantiles() -> None:
    """And moments to the resolution of the draws."""
    draws = scipy.stats.gamma(3.0).ppf((np.arange(2000) + 0.5) / 2000)
    prior = calibrate.from_samples(np.random.default_rng(0).permutation(draws))
    found = calibrate.joint({"a": prior}).quantile(0.9)["a"]
    assert float(found) == pytest.approx(scipy.stats.gamma(3.0).ppf(0.9), rel=1e-3)
    mean, sd = prior.moments()
    assert (float(mean), float(sd)) == pytest.approx((3.0, np.sqrt(3.0)), rel=0.01)


@pytest.mark.parametrize("bounds", [{"low": 0.0}, {"high": 1.0}, {"low": 0.0, "high": 1.0}, {"low": -3.0}], ids=str)
def test_samples_keep_their_bounds(bounds: dict[str, float]) -> None:
    """Tails beyond the draws end at the bounds, and the draws themselves stay where they are."""
    draws = np.random.default_rng(0).beta(0.8, 0.8, size=500)
    prior = calibrate.from_samples(draws, **bounds)
    far = prior.transform(np.array([-40.0, 40.0]))
    assert bounds.get("low", -np.inf) < far[0] < draws.min()
    assert draws.max() < far[1] < bounds.get("high", np.inf)
    scores = scipy.stats.norm.ppf((np.arange(500) + 0.5) / 500)
    np.testing.assert_allclose(prior.transform(scores), np.sort(draws), rtol=1e-9)


def test_samples_keep_their_correlations() -> None:
    """Draws of an array, and of two parameters that belong together."""
    numbers = np.random.default_rng(1).multivariate_normal([1.0, 2.0], [[1.0, 0.6], [0.6, 1.0]], size=3000)
    wanted = np.corrcoef(numbers, rowvar=False)[0, 1]
    z = np.random.default_rng(2).normal(size=(20_000, 2))
    together = calibrate.from_samples({"a": numbers[:, 0], "b": np.exp(numbers[:, 1])}, low={"b": 0.0})
    values = calibrate.joint({"any": together}).to_physical({"any": z})
    assert np.corrcoef(values["a"], np.log(values["b"]))[0, 1] == pytest.approx(wanted, abs=0.02)
    field = calibrate.joint({"field": calibrate.from_samples(numbers)}).to_physical({"field": z})["field"]
    assert field.shape == (20_000, 2)
    np.testing.assert_allclose(np.cov(field, rowvar=False), np.cov(numbers, rowvar=False), atol=0.05)


def test_distributions_of_scipy() -> None:
    """By the inverse distribution function, exactly; entries of a batch for themselves."""
    prior = calibrate.from_distribution(scipy.stats.gamma([2.0, 5.0]))
    np.testing.assert_allclose(prior.moments(), [[2.0, 5.0], np.sqrt([2.0, 5.0])], rtol=1e-6)
    z = np.linspace(-3, 3, 7)[:, None] * np.ones(2)
    np.testing.assert_allclose(prior.inverse(prior.transform(z)), z, atol=1e-9)


def test_distributions_that_are_drawn_from() -> None:
    """Of several variables: SciPy's, and any object with ``sample``."""
    joint = scipy.stats.multivariate_normal([1.0, 2.0], [[1.0, 0.8], [0.8, 1.0]])
    prior = calibrate.from_distribution(joint, key=jax.random.key(0))
    values = calibrate.joint({"a": prior}).to_physical({"a": np.random.default_rng(0).normal(size=(20_000, 2))})["a"]
    np.testing.assert_allclose(np.cov(values, rowvar=False), [[1.0, 0.8], [0.8, 1.0]], atol=0.1)
    drawn = SimpleNamespace(sample=lambda key, shape: jax.random.exponential(key, shape))
    mean, sd = calibrate.from_distribution(drawn, key=jax.random.key(0)).moments()
    assert (float(mean), float(sd)) == pytest.approx((1.0, 1.0), rel=0.05)
    with pytest.raises(TypeError, match=r"key: None; wanted a JAX random key.*drawn from: it has no icdf or ppf"):
        calibrate.from_distribution(drawn)


def test_an_inverse_that_is_not_there() -> None:
    """Drawn from, within the support, where a key says so; otherwise it says what is missing."""

    def icdf(q: Any) -> Any:
        raise ImportError("please install tensorflow_probability")

    support = SimpleNamespace(lower_bound=0.0)
    sample = lambda key, shape: jax.random.gamma(key, 2.0, shape)
    gamma = SimpleNamespace(icdf=icdf, event_shape=(), sample=sample, support=support)
    with pytest.raises(TypeError, match="drawn from: please install tensorflow_probability"):
        calibrate.from_distribution(gamma)
    prior = calibrate.from_distribution(gamma, key=jax.random.key(0))
    assert float(prior.moments()[0]) == pytest.approx(2.0, rel=0.05)
    assert prior.transform(np.array(-40.0)) > 0


def test_distributions_of_jax() -> None:
    """An object as NumPyro has them: ``icdf`` in float32, ``event_shape``, ``sample``."""
    exponential = SimpleNamespace(icdf=lambda q: -jax.numpy.log1p(-jax.numpy.asarray(q)), event_shape=())
    prior = calibrate.from_distribution(exponential)
    mean, sd = prior.moments()
    assert (float(mean), float(sd)) == pytest.approx((1.0, 1.0), rel=1e-4)
    assert np.isfinite(prior.transform(np.array([-30.0, 30.0]))).all()


def test_distributions_of_numpyro() -> None:
    """By their inverse where they have one, entry by entry; else drawn from, within their support."""
    numpyro = pytest.importorskip("numpyro.distributions")
    z = np.linspace(-3, 3, 13)
    wanted = calibrate.positive(np.exp(0.125), np.exp(0.125) * np.sqrt(np.expm1(0.25))).transform(z)
    np.testing.assert_allclose(calibrate.from_distribution(numpyro.LogNormal(0.0, 0.5)).transform(z), wanted, rtol=1e-4)
    batch = calibrate.from_distribution(numpyro.Normal(np.arange(3.0), np.array([1.0, 2.0, 3.0])))
    np.testing.assert_allclose(batch.moments(), [[0.0, 1.0, 2.0], [1.0, 2.0, 3.0]], rtol=1e-4, atol=1e-4)
    between = calibrate.from_distribution(numpyro.TruncatedNormal(0.0, 1.0, low=0.0, high=2.0))
    assert 0 < between.transform(np.array(-60.0)) < between.transform(np.array(60.0)) < 2

    key = jax.random.key(0)
    for drawn in (numpyro.Gamma(2.0, 1.0), numpyro.MultivariateNormal(np.zeros(2), np.eye(2))):
        with pytest.raises(TypeError, match=r"key: None; .*has to be drawn from"):
            calibrate.from_distribution(drawn)
    gamma = calibrate.from_distribution(numpyro.Gamma(2.0, 1.0), key=key)
    assert float(gamma.moments()[0]) == pytest.approx(2.0, rel=0.05)
    assert gamma.transform(np.array(-60.0)) > 0
    covariance = np.array([[1.0, 0.8], [0.8, 1.0]])
    pair = calibrate.from_distribution(numpyro.MultivariateNormal(np.zeros(2), covariance), key=key)
    values = calibrate.joint({"a": pair}).to_physical({"a": np.random.default_rng(0).normal(size=(20_000, 2))})["a"]
    np.testing.assert_allclose(np.cov(values, rowvar=False), covariance, atol=0.1)


JOINT = calibrate.joint({"a": calibrate.normal(0.0, 1.0), "b": calibrate.normal(0.0, 1.0, shape=2)})
BAD = [
    (lambda: calibrate.normal(0.0, 0.0), r"sd: 0; wanted standard deviations > 0"),
    (lambda: calibrate.normal(0.0, float("nan")), r"sd: nan; wanted finite numbers"),
    (lambda: calibrate.normal("a", 1.0), r"mean: 'a'; wanted an array of real numbers"),
    (lambda: calibrate.normal([1.0, 2.0], 1.0, shape=(3,)), r"mean: shape \(2,\); wanted one that fits .*\(3,\)"),
    (lambda: calibrate.normal(True, 1.0), r"mean: True; wanted real numbers, no flags"),
    (lambda: calibrate.normal({"a": 0.0}, 1.0), r"mean: \{'a': 0.0\}; wanted an array of real numbers"),
    (lambda: calibrate.normal(0.0, 1.0, shape=0), r"shape: 0; wanted a whole number, at least 1, or a tuple of them"),
    (lambda: calibrate.normal(0.0, 1.0, shape=2.5), r"shape: 2.5; wanted a whole number"),
    (lambda: calibrate.lognormal(1.0, 1.0, low=float("nan")), r"low: nan; wanted finite numbers"),
    (lambda: calibrate.positive(-1.0, 1.0), r"mean: -1; wanted means > 0"),
    (lambda: calibrate.lognormal(1.0, 1.0, low=2.0), r"mean: 1; wanted means above the bound 2"),
    (lambda: calibrate.lognormal(1.0, 1.0, low=0.0, high=2.0), r"high: 2.0, with low: 0.0; wanted one of them"),
    (lambda: calibrate.bounded(1.0, 1.0), r"high: 1; wanted upper bounds above"),
    (lambda: calibrate.bounded(0.0, 1.0, mean=0.5), r"sd: None; wanted both mean and sd"),
    (lambda: calibrate.bounded(0.0, 1.0, sd=0.5), r"mean: None; wanted both mean and sd"),
    (lambda: calibrate.bounded(0.0, 1.0, mean=1.5, sd=0.1), r"mean: 1.5; wanted means between 0 and 1"),
    (lambda: calibrate.bounded(0.0, 1.0, mean=0.5, sd=0.5), r"sd: 0.5; wanted standard deviations > 0 and below 0.5"),
    (lambda: calibrate.from_samples([1.0] * 5), r"samples: of shape \(5,\); wanted at least ten"),
    (lambda: calibrate.from_samples([1.0] * 50), r"samples: draws that are all the same"),
    (lambda: calibrate.from_samples({}), r"samples: an empty dict"),
    (lambda: calibrate.from_samples({"a": np.arange(20.0), "b": np.arange(30.0)}), r"samples: \[20, 30\] draws"),
    (
        lambda: calibrate.from_samples(np.arange(20.0), low=5.0),
        r"low: 5; wanted bounds below all draws",
    ),
    (lambda: calibrate.from_samples(np.arange(20.0), high=9.0), r"high: 9; wanted bounds above all draws"),
    (lambda: calibrate.from_samples(np.arange(20.0), low={"a": 0.0}), r"low: \{'a': 0.0\}; wanted a finite number"),
    (lambda: calibrate.from_samples({"a": np.arange(20.0)}, low={"b": 0.0}), r"low: for \['b'\]; wanted names of"),
    (lambda: calibrate.from_distribution(scipy.stats.gamma), r"distribution: .*wanted a frozen one"),
    (lambda: calibrate.from_distribution(SimpleNamespace), r"distribution: <class .*with its parameters, not a class"),
    (lambda: calibrate.from_distribution(3.0), r"distribution: 3.0; wanted an object with icdf"),
    (
        lambda: calibrate.from_distribution(SimpleNamespace(ppf=lambda p: np.asarray(p) + 1j)),
        r"distribution: .*dtype complex128",
    ),
    (
        lambda: calibrate.from_distribution(
            SimpleNamespace(rvs=lambda size, random_state: np.full(size, np.nan)), key=jax.random.key(0)
        ),
        r"distribution: .*draws that are none of a prior \(samples: .*wanted finite draws",
    ),
    (lambda: JOINT.to_physical({"a": np.ones((3, 1))}), r"latent: of \['a'\]; wanted arrays of a, b"),
    (
        lambda: JOINT.to_physical({"a": np.ones((3, 1)), "b": np.ones((4, 2))}),
        r"latent\['b'\]: shape \(4, 2\); wanted \(J, 2\) with one J for all",
    ),
    (lambda: JOINT.to_latent({"a": np.ones(3) * 1j, "b": np.ones((3, 2))}), r"physical\['a'\]: dtype complex128"),
    (lambda: calibrate.correlated({"a": 1.0}, 0.0), r"members\['a'\]: 1.0; wanted the prior of one parameter"),
    (lambda: calibrate.joint({}), r"prior: \{\}; wanted a dict of at least one parameter"),
    (lambda: calibrate.joint({"a": 1.0}), r"prior\['a'\]: 1.0; wanted a prior such as .*or from_distribution\(\)"),
    (lambda: calibrate.joint({1: calibrate.normal(0.0, 1.0)}), r"prior: an entry called 1; wanted a name"),
    (
        lambda: calibrate.joint(
            {"a": calibrate.normal(0, 1), "g": calibrate.correlated({"a": calibrate.normal(0, 1)}, 0.0)}
        ),
        r"prior\['g'\]: a second parameter 'a'; wanted each name once",
    ),
]


@pytest.mark.parametrize(("make", "words"), BAD)
def test_bad_priors_are_named(make: Callable[[], Any], words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        make()


SAVED = [
    *(make(**settings) for make, settings in MOMENTS.values()),
    calibrate.bounded([0.0, 1.0], [2.0, 3.0]),
    calibrate.correlated({"a": calibrate.positive(2.0, 1.0), "b": calibrate.bounded(0.0, 1.0)}, 0.3),
    calibrate.from_samples(np.random.default_rng(0).gamma(2.0, size=50)),
    calibrate.from_samples(np.random.default_rng(0).gamma(2.0, size=(50, 2, 2)), low=0.0, high=99.0),
    calibrate.from_samples({"a": np.random.default_rng(0).normal(size=(50, 2)), "b": np.arange(50.0)}),
]


@pytest.mark.parametrize("prior", SAVED, ids=lambda prior: prior.spec["kind"])
def test_json_holds_a_prior(prior: Any) -> None:
    """To the last bit."""
    again = from_spec(json.loads(json.dumps(prior.spec)))
    first, second = calibrate.joint({"x": prior}), calibrate.joint({"x": again})
    z = {"x": np.random.default_rng(0).normal(size=(9, first.size))}
    before, after = first.to_physical(z), second.to_physical(z)
    assert all(np.array_equal(before[name], after[name]) for name in first.shapes)
    assert before.keys() == after.keys()
