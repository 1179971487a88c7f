"""The front door: ask, tell and the posterior, beside what is exact."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eki_jax
from eki_jax import calibrate, kalman
from eki_jax.natural import natural_gradient

MAP = np.random.default_rng(0).normal(size=(6, 2))
PRIOR = {"a": calibrate.normal(0.5, 2.0), "b": calibrate.normal(0.0, 3.0)}
PRIOR_MEAN, PRIOR_SD = np.array([0.5, 0.0]), np.array([2.0, 3.0])
NOISE = {"first": 0.3**2, "second": 0.5**2}
VARIANCES = np.repeat([0.3**2, 0.5**2], [4, 2])
J = 30


def line(member: dict[str, Any]) -> dict[str, np.ndarray]:
    """A linear simulator of two outputs."""
    values = MAP @ np.array([member["a"], member["b"]])
    return {"first": values[:4].reshape(2, 2), "second": values[4:]}


DATA = line({"a": 1.0, "b": -2.0})


def linear(**settings: Any) -> calibrate.Calibration:
    return calibrate.Calibration(**{"prior": PRIOR, "data": DATA, "noise": NOISE, "particles": J} | settings)


def outputs_of(calibration: calibrate.Calibration, simulate: Any = line) -> list[Any]:
    return [simulate(member) for member in calibration.ask()]


def run(calibration: calibrate.Calibration, simulate: Any = line) -> list[calibrate.Report]:
    reports = []
    while not calibration.done:
        reports.append(calibration.tell(outputs_of(calibration, simulate)))
    return reports


def flat(outputs: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([np.ravel(value) for value in outputs.values()])


def of_members(calibration: calibrate.Calibration) -> np.ndarray:
    return np.array([[member["a"], member["b"]] for member in calibration.ask()])


def updated(members: np.ndarray, gamma: np.ndarray, observed: Any = slice(None)) -> tuple[np.ndarray, np.ndarray]:
    """The members' mean and covariance after Kalman's update of their own."""
    matrix, data = MAP[observed], flat(DATA)[observed]
    mean, covariance = members.mean(axis=0), np.cov(members, rowvar=False, ddof=0)
    gain = covariance @ matrix.T @ np.linalg.inv(matrix @ covariance @ matrix.T + gamma)
    return mean + gain @ (data - matrix @ mean), covariance - gain @ matrix @ covariance


def of_posterior(posterior: calibrate.Posterior) -> tuple[np.ndarray, np.ndarray]:
    samples = np.stack([posterior.samples["a"], posterior.samples["b"]], axis=1)
    return samples.mean(axis=0), np.cov(samples, rowvar=False, ddof=0)


CORRELATED = 0.2 * np.eye(4) + 0.1
FACTOR = np.array([[0.5, 0.0], [0.5, 0.1], [0.0, 0.3], [-0.2, 0.4]])
LOW_RANK = kalman.LowRankNoise(0.1, FACTOR)


def blocks(first: np.ndarray) -> np.ndarray:
    """Gamma of both outputs, the second's of variance 0.2."""
    matrix = 0.2 * np.eye(6)
    matrix[:4, :4] = first
    return matrix


GAMMAS = {
    "numbers": (NOISE, np.diag(VARIANCES)),
    "one number": (0.04, 0.04 * np.eye(6)),
    "diagonal": ({"first": np.arange(1.0, 5.0), "second": [0.2, 0.3]}, np.diag([1, 2, 3, 4, 0.2, 0.3])),
    "shaped": ({"first": np.arange(1.0, 5.0).reshape(2, 2), "second": 0.2}, blocks(np.diag([1, 2, 3, 4]))),
    "dense": ({"first": CORRELATED, "second": 0.2}, blocks(CORRELATED)),
    "low rank": ({"first": LOW_RANK, "second": 0.2}, blocks(0.1 * np.eye(4) + FACTOR @ FACTOR.T)),
    "of all": (0.2 * np.eye(6) + 0.1, 0.2 * np.eye(6) + 0.1),
}


@pytest.mark.parametrize("name", GAMMAS)
def test_the_posterior_is_kalmans(name: str) -> None:
    """Linear simulator, every kind of noise: the members' own mean and covariance, updated exactly."""
    noise, gamma = GAMMAS[name]
    calibration = linear(noise=noise)
    start = of_members(calibration)
    run(calibration)
    mean, covariance = of_posterior(calibration.posterior())
    wanted_mean, wanted = updated(start, gamma)
    np.testing.assert_allclose(mean, wanted_mean, atol=2e-3 * np.sqrt(wanted.max()))
    np.testing.assert_allclose(covariance, wanted, atol=1e-3 * wanted.max())


@pytest.mark.parametrize("name", GAMMAS)
def test_data_that_are_nan_are_left_out(name: str) -> None:
    """Rows and columns of Gamma too; what the simulator says there is of no concern."""
    noise, gamma = GAMMAS[name]
    gaps = {"first": DATA["first"].copy(), "second": DATA["second"].copy()}
    gaps["first"][0, 1] = gaps["second"][0] = np.nan
    seen = np.array([True, False, True, True, False, True])

    def simulate(member: dict[str, Any]) -> dict[str, np.ndarray]:
        outputs = line(member)
        outputs["first"][0, 1] = np.nan if member["a"] > 0 else 1e30
        return outputs

    calibration = linear(data=gaps, noise=noise)
    start = of_members(calibration)
    reports = run(calibration, simulate)
    assert {report.masked for report in reports} == {2}
    assert {report.failed for report in reports} == {0}
    assert "2 data masked" in str(reports[0])
    mean, covariance = of_posterior(calibration.posterior())
    wanted_mean, wanted = updated(start, gamma[np.ix_(seen, seen)], seen)
    np.testing.assert_allclose(mean, wanted_mean, atol=2e-3 * np.sqrt(wanted.max()))
    np.testing.assert_allclose(covariance, wanted, atol=2e-3 * wanted.max())


@pytest.mark.slow
def test_an_output_without_any_data() -> None:
    """One of two outputs all NaN, its noise too, and masked arrays."""
    gone = {"first": np.ma.masked_array(DATA["first"], mask=True), "second": DATA["second"]}
    calibration = linear(data=gone, noise={"first": np.nan, "second": 0.25})
    assert calibration.tell(outputs_of(calibration)).masked == 4


@pytest.mark.slow
def test_the_posterior_is_the_exact_one() -> None:
    """With many members and perturbed data or none; physical units."""
    precision = np.diag(PRIOR_SD**-2)
    wanted = np.linalg.inv(precision + MAP.T @ (MAP / VARIANCES[:, None]))
    mean = wanted @ (precision @ PRIOR_MEAN + MAP.T @ (flat(DATA) / VARIANCES))
    for method in ("etki", "enkf"):
        calibration = linear(particles=2000, method=method)
        run(calibration)
        posterior = calibration.posterior()
        sd = np.sqrt(np.diag(wanted))
        assert np.abs([posterior.mean["a"], posterior.mean["b"]] - mean).max() < 0.1 * sd.min()
        np.testing.assert_allclose([posterior.sd["a"], posterior.sd["b"]], sd, rtol=0.06)
        assert posterior.correlations[0, 1] == pytest.approx(wanted[0, 1] / sd.prod(), abs=0.05)
        low, high = mean[0] + 1.645 * sd[0] * np.array([-1, 1])
        np.testing.assert_allclose(posterior.quantiles["a"][[0, -1]], [low, high], atol=0.2 * sd[0])


def test_a_report_is_one_line() -> None:
    calibration = linear()
    reports = run(calibration)
    assert reports[-1].time == 1.0
    assert reports[-1].done
    assert [report.iteration for report in reports] == list(range(1, len(reports) + 1))
    assert str(reports[0]).startswith("iteration 1: time ")
    assert repr(linear()) == "<Calibration: 2 numbers of 2 parameters, 6 data, 30 particles, 0 iterations>"
    assert repr(calibration).endswith(f" {len(reports)} iterations, done>")
    assert all("\n" not in str(report) for report in reports)
    residuals = (np.stack([flat(line(m)) for m in linear().ask()]) - flat(DATA)) / np.sqrt(VARIANCES)
    assert reports[0].misfit == pytest.approx(np.mean(residuals**2))
    assert reports[0].misfit_of_mean == pytest.approx(np.mean(residuals.mean(axis=0) ** 2))
    latent = calibration.prior.to_latent(calibration.posterior().samples)
    spread = np.sqrt(np.mean([latent["a"].var(), latent["b"].var()]))
    assert reports[-1].spread == pytest.approx(spread, rel=1e-5)


def test_history_has_every_iteration() -> None:
    """Parameters before a step, and what the simulator said of them."""
    calibration = linear()
    asked = []
    while not calibration.done:
        asked.append(calibration.ask())
        calibration.tell([line(member) for member in asked[-1]])
    assert len(calibration.history) == len(asked) > 1
    for members, iteration in zip(asked, calibration.history, strict=True):
        assert iteration.parameters["a"].tolist() == [member["a"] for member in members]
        np.testing.assert_array_equal(iteration.outputs["first"], [line(member)["first"] for member in members])
        residuals = (np.stack([flat(line(m)) for m in members]) - flat(DATA)) / np.sqrt(VARIANCES)
        np.testing.assert_allclose(iteration.misfits, 0.5 * np.sum(residuals**2, axis=1))
    assert sum(iteration.step_size for iteration in calibration.history) == pytest.approx(1.0)
    assert [iteration.failed for iteration in calibration.history] == [0] * len(asked)
    assert np.all(np.diff([iteration.spread for iteration in calibration.history]) < 0)


def test_members_are_physical_numpy_values() -> None:
    """A list of dicts of float64, the same until they are told."""
    calibration = linear(prior={"a": calibrate.positive(1.0, 0.5), "b": calibrate.bounded(-1, 1, shape=(2,))})
    members = calibration.ask()
    assert len(members) == J
    assert isinstance(members[0]["a"], np.float64)
    assert members[0]["b"].shape == (2,)
    assert all(member["a"] > 0 and np.all(np.abs(member["b"]) < 1) for member in members)
    again = calibration.ask()
    assert all(np.array_equal(one["b"], two["b"]) for one, two in zip(members, again, strict=True))


def test_a_group_is_seen_member_by_member() -> None:
    """The simulator sees parameters, not groups; the first ensemble has their correlation."""
    pair = calibrate.correlated({"a": PRIOR["a"], "b": PRIOR["b"]}, 0.9)
    calibration = linear(prior={"pair": pair})
    members = of_members(calibration)
    assert np.corrcoef(members, rowvar=False)[0, 1] == pytest.approx(0.9, abs=1e-5)
    assert list(calibration.ask()[0]) == ["a", "b"]
    calibration.tell(outputs_of(calibration))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.longdouble, np.int64, "jax", "list"])
def test_any_dtype_is_taken_without_a_word(dtype: Any) -> None:
    """Warnings are errors here."""
    calibration = linear()

    def simulate(member: dict[str, Any]) -> dict[str, Any]:
        outputs = line(member)
        if dtype == "jax":
            return {name: jnp.asarray(value) for name, value in outputs.items()}
        return {n: v.tolist() if dtype == "list" else v.astype(dtype) for n, v in outputs.items()}

    assert calibration.tell(outputs_of(calibration, simulate)).moved


def test_nothing_compiles_after_the_first_step() -> None:
    """Nor in another calibration of the same sizes."""
    run(linear(seed=5))
    calibration, compiled = linear(seed=5), []
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: compiled.append(name))
    try:
        run(calibration)
    finally:
        jax.monitoring.clear_event_listeners()
    assert not [name for name in compiled if "compile" in name]


def test_double_precision() -> None:
    """With JAX's switch on, the members are float64 and the update is exact to ten digits."""
    with jax.enable_x64(True):
        calibration = linear(seed=1)
        start = of_members(calibration)
        run(calibration)
        mean, covariance = of_posterior(calibration.posterior())
    wanted_mean, wanted = updated(start, np.diag(VARIANCES))
    np.testing.assert_allclose(mean, wanted_mean, rtol=1e-10)
    np.testing.assert_allclose(covariance, wanted, rtol=1e-9, atol=1e-12)


def test_a_method_is_any_solver() -> None:
    """Ten tempered steps, told by a function of the whitened noise's covariance; time ends at one exactly."""
    seen = []

    def method(noise_covariance: Any) -> eki_jax.Solver:
        seen.append(noise_covariance)
        return kalman.enkf(None, noise_covariance, kalman.tempered(7), key=jax.random.key(3))

    calibration = linear(method=method)
    reports = run(calibration)
    assert seen[0].tolist() == [1.0] * 6
    assert len(reports) == 7
    assert reports[-1].time == 1.0
    euler = linear(method=lambda gamma: eki_jax.euler(None, eki_jax.squared_error()), most_iterations=4)
    reports = run(euler)
    assert [report.time for report in reports] == [None] * 4
    assert reports[-1].misfit < reports[0].misfit


@pytest.mark.slow
def test_perturbed_data_are_new_in_each_step() -> None:
    """And the same again with the same seed: two steps from one state differ by their noise alone."""

    def method(noise_covariance: Any) -> eki_jax.Solver:
        return kalman.enkf(None, noise_covariance, 1e-3, key=jax.random.key(3))

    moves = []
    for _ in range(2):
        calibration = linear(method=method, most_iterations=2)
        results = outputs_of(calibration)
        for _ in range(2):
            before = of_members(calibration)
            calibration.tell(results)
            moves.append(calibration.prior.to_physical(calibration.state.ensemble)["a"] - before[:, 0])
    np.testing.assert_array_equal(moves[0], moves[2])
    assert np.corrcoef(moves[0], moves[1])[0, 1] < 0.5


def test_a_run_ends_at_the_most_iterations() -> None:
    """It says so where its result is looked at."""
    calibration = linear(most_iterations=1)
    report = calibration.tell(outputs_of(calibration))
    assert calibration.done
    assert report.done
    with pytest.warns(UserWarning, match=r"not at its end, after 1 iterations at time 0\.\d+ of 1"):
        calibration.posterior()
    for call in (calibration.ask, lambda: calibration.tell([])):
        with pytest.raises(RuntimeError, match=r"the calibration is done after 1 iterations; wanted posterior\(\)"):
            call()


def test_jobs_after_the_end() -> None:
    calibration = linear()
    results = outputs_of(calibration)
    run(calibration)
    with pytest.raises(RuntimeError, match="tell: the calibration is done"):
        calibration.tell(results)
    with pytest.raises(RuntimeError, match="ask: the calibration is done"):
        calibration.ask()


def test_a_posterior_of_few_members_warns() -> None:
    calibration = linear(particles=2)
    words = "2 healthy members for 2 latent parameters, so that the covariance has at most rank 1; wanted at least 3"
    with pytest.warns(UserWarning, match="not at its end"), pytest.warns(UserWarning, match=words):
        calibration.posterior()


def test_a_scalar_problem() -> None:
    """One parameter, one number of data."""
    calibration = calibrate.Calibration({"a": calibrate.normal(0.0, 1.0)}, {"y": 1.0}, 0.5, particles=J)
    run(calibration, lambda member: {"y": 2 * member["a"]})
    posterior = calibration.posterior()
    assert posterior.mean["a"] == pytest.approx(4 / 4.5 * 0.5, abs=1e-3)
    assert posterior.sd["a"] == pytest.approx(np.sqrt(1 / 9), abs=1e-3)
    assert posterior.correlations.shape == (1, 1)


def test_a_posterior_has_its_own_predictions() -> None:
    """As members to run the simulator with, and as a table to read."""
    calibration = linear()
    run(calibration)
    posterior = calibration.posterior(probabilities=[0.1, 0.5])
    assert [member["a"] for member in posterior.members()] == posterior.samples["a"].tolist()
    np.testing.assert_array_equal(posterior.quantiles["b"], np.quantile(posterior.samples["b"], [0.1, 0.5]))
    first, *rows = str(posterior).splitlines()
    assert first.split() == ["parameter", "mean", "sd", "10", "%", "50", "%"]
    assert [row.split()[0] for row in rows] == posterior.names == ["a", "b"]


def test_a_saved_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """Perturbed data, a failed member, correlated parameters and gaps: all of it is in the file, and no time twice."""
    prior = {"pair": calibrate.correlated({"a": calibrate.normal(0.5, 2.0), "b": calibrate.positive(2.0, 1.0)}, 0.3)}
    data = {"first": np.array([[1.0, np.nan], [0.5, 2.0]]), "second": DATA["second"]}
    noise = {"first": CORRELATED, "second": kalman.LowRankNoise(0.1, np.ones((2, 1)))}
    crashing = lambda member: None if member["a"] > 3 else line(member)
    one = linear(prior=prior, data=data, noise=noise, method="enkf", seed=7)
    one.tell(outputs_of(one, crashing))
    one.save(tmp_path / "run.npz")
    two = calibrate.Calibration.load(tmp_path / "run.npz")
    assert two.history[0].report == one.history[0].report
    assert one.history[0].failed > 0
    with pytest.warns(UserWarning, match="not at its end"):
        jax.tree.map(np.testing.assert_array_equal, one.posterior(), two.posterior())
    first, second = run(one, crashing), run(two, crashing)
    assert first == second
    assert len(first) > 1
    assert first[-1].time == 1.0
    for a, b in zip(one.history, two.history, strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)
    jax.tree.map(np.testing.assert_array_equal, one.posterior(), two.posterior())
    two.save(tmp_path / "end.npz")
    assert calibrate.Calibration.load(tmp_path / "end.npz").done


def test_what_no_file_holds_is_given_again(tmp_path: Path) -> None:
    """A method that is a function, and another library's distribution."""
    import scipy.stats

    path = tmp_path / "run.npz"
    distribution = calibrate.from_distribution(scipy.stats.norm(0.5, 2.0))
    solver = kalman.etki(None, 1.0, kalman.tempered(3))
    method = lambda gamma: solver  # one, which compiles once
    calibration = linear(prior=PRIOR | {"a": distribution}, method=method)
    calibration.tell(outputs_of(calibration))
    calibration.save(path)
    with pytest.raises(TypeError, match="method: None; wanted the function that the saved calibration had"):
        calibrate.Calibration.load(path)
    with pytest.raises(TypeError, match="prior: without 'a'; wanted the distribution that it had"):
        calibrate.Calibration.load(path, method=method)
    with pytest.raises(ValueError, match=r"prior: \['b'\]; wanted those alone that the file does not hold"):
        calibrate.Calibration.load(path, method=method, prior={"a": distribution} | {"b": PRIOR["b"]})
    other = calibrate.Calibration.load(path, method=method, prior={"a": distribution})
    assert run(other) == run(calibration)
    with jax.enable_x64(True), pytest.raises(ValueError, match=r"a state of .*float32.*; wanted .*float64"):
        calibrate.Calibration.load(path, method=method, prior={"a": distribution})


def test_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        calibrate.Calibration.load(tmp_path / "no.npz")
    (tmp_path / "text.npz").write_text("not this")
    with pytest.raises(ValueError, match="no file of arrays that eki_jax wrote"):
        calibrate.Calibration.load(tmp_path / "text.npz")
    calibrate.map_particles(line, linear().ask()[:1], directory=tmp_path / "results")
    (other,) = (tmp_path / "results").iterdir()
    with pytest.raises(ValueError, match="no calibration of version 1; wanted a file that save"):
        calibrate.Calibration.load(other)


def test_a_file_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash while it is written leaves the old one, and nothing beside it; the new one does not go over the old."""
    calibration = linear()
    calibration.save(tmp_path / "run.npz")
    before = (tmp_path / "run.npz").read_bytes()
    calibration.tell(outputs_of(calibration))
    with monkeypatch.context() as patched:
        patched.setattr(np, "savez", lambda file, **arrays: file.write(b"half") and 1 / 0)
        with pytest.raises(ZeroDivisionError):
            calibration.save(tmp_path / "run.npz")
    assert (tmp_path / "run.npz").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["run.npz"]
    with (tmp_path / "run.npz").open("rb") as reader:  # which keeps what it has opened, unless that is written over
        calibration.save(tmp_path / "run.npz")
        assert reader.read() == before
    assert (tmp_path / "run.npz").read_bytes() != before


@pytest.mark.slow
def test_arrays_given_may_change_afterwards(tmp_path: Path) -> None:
    """What was given is the calibration's own."""
    data = {name: value.copy() for name, value in DATA.items()}
    calibration = linear(data=data)
    data["first"][:] = 1e6
    calibration.save(tmp_path / "run.npz")
    with warnings.catch_warnings():
        again = calibrate.Calibration.load(tmp_path / "run.npz")
    assert run(again) == run(calibration) == run(linear())


def own_particles(noise_covariance: Any) -> eki_jax.Solver:
    return kalman.uki(None, noise_covariance, prior=calibrate.joint(PRIOR).latent())


def natural(noise_covariance: Any) -> eki_jax.Solver:
    return natural_gradient(lambda u, x: u["a"], eki_jax.squared_error(), 5)


BAD = [
    ({"particles": 1}, r"particles: 1; wanted a whole number, at least 2"),
    ({"seed": -1}, r"seed: -1; wanted a whole number, at least 0"),
    ({"seed": 0.5}, r"seed: 0\.5; wanted a whole number"),
    ({"method": "kalman"}, r"method: 'kalman'; wanted 'etki' or 'enkf'"),
    ({"method": lambda gamma: 3}, r"method: it returned 3; wanted an eki_jax\.Solver"),
    ({"method": own_particles}, r"particles: 30; wanted 5, those that the method makes itself"),
    ({"method": natural}, r"method: its solver makes its own particles, of no covariance"),
    ({"method": kalman.etki, "inflation": 2.0}, r"inflation: 2\.0 with a method of your own; wanted None"),
    (
        {"noise": 0.2 * np.eye(6) + 0.1, "localization": kalman.correlation_taper()},
        r"noise: correlated between outputs",
    ),
    ({"localization": np.ones((2, 5))}, r"localization: of shape \(2, 5\); wanted \(2, 6\), a weight of each"),
    ({"localization": {"a": np.ones(6)}}, r"localization: of shapes {'a': \(6,\)}; wanted \(2, 6\)"),
    (
        {"localization": kalman.taper({"a": 0.0, "b": 1.0}, {"first": np.ones(4), "second": 0.0}, 1.0)},
        r"output_coordinates\['first'\]: shape \(4,\); wanted \(2, 2\)",
    ),
    (
        {"inflation": kalman.additive_inflation(jax.random.key(0), eki_jax.gaussian({"a": 0.0, "b": 0.0}, 1.0), 0.1)},
        r"prior\['a'\]: shape \(30,\), but the particles have \(30, 1\)",
    ),
    ({"impute": 1.0}, r"impute: 1\.0; wanted a number in \[0, 1\)"),
    ({"most_refusals": 0}, r"most_refusals: 0; wanted a whole number"),
    ({"most_iterations": 0}, r"most_iterations: 0; wanted a whole number"),
    ({"data": np.zeros(3)}, r"data: ndarray; wanted a dict of at least one array, by the outputs' names"),
    ({"data": {}}, r"data: dict; wanted a dict of at least one array"),
    ({"data": {"first": "a", "second": 1.0}}, r"data\['first'\].*wanted an array of real numbers"),
    ({"data": {"first": np.inf, "second": 1.0}}, r"data\['first'\]: has infinite values; wanted numbers, or NaN"),
    ({"data": {"first": np.nan, "second": [np.nan] * 3}}, r"data: no valid observation, all of them are NaN"),
    (
        {"noise": {"first": 1.0}},
        r"noise: for outputs \['first'\]; wanted one for each of the data, \['f",
    ),
    ({"noise": {"first": 0.0, "second": 1.0}}, r"noise\['first'\]: singular, least variance 0\.0"),
    ({"noise": {"first": 1.0, "second": np.nan}}, r"noise\['second'\]: has values that are not finite"),
    (
        {"noise": {"first": np.ones(3), "second": 1.0}},
        r"noise\['first'\]: shape \(3,\); wanted a variance, \(2, 2\)",
    ),
    ({"noise": {"first": 1.0, "second": [[1, 0.5], [0.4, 1]]}}, r"noise\['second'\]: a matrix that is not symmetric"),
    ({"noise": np.ones(4)}, r"noise: shape \(4,\); wanted a variance, \(6,\) variances, a matrix of shape \(6, 6\)"),
    (
        {"noise": {"first": kalman.LowRankNoise(1.0, np.ones((3, 1))), "second": 1.0}},
        r"noise\['first'\]: diagonal of shape \(\) and factor of shape \(3, 1\); wanted a number or \(4,\)",
    ),
]


@pytest.mark.parametrize(("settings", "words"), BAD)
def test_bad_settings_are_named(settings: dict[str, Any], words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        linear(**settings)


def moved_by(solver: eki_jax.Solver, calibration: calibrate.Calibration, outputs: Any, data: Any) -> Any:
    """One step of a solver from the calibration's own first ensemble."""
    state = solver.init(calibration.state.ensemble)
    return solver.update(state, outputs, data)[0]


def by_output(members: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    results = [line(member) for member in members]
    return {
        "first": np.stack([r["first"].ravel() for r in results]),
        "second": np.stack([r["second"] for r in results]),
    }


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("numbers", "one number", "low rank")]


@pytest.mark.parametrize("name", ["dense", *SLOW])
def test_localization_is_the_methods_own(name: str) -> None:
    """Distances of parameters and outputs, with every kind of noise: the step of ``etki`` on the outputs themselves."""
    places = np.arange(4.0) / 2
    taper = kalman.taper({"a": np.zeros(1), "b": np.ones(1)}, {"first": places, "second": [0.2, 1.0]}, 1.5)
    given = kalman.taper({"a": 0.0, "b": 1.0}, {"first": places.reshape(2, 2), "second": [0.2, 1.0]}, 1.5)
    noise, _ = GAMMAS[name]
    calibration = linear(noise=noise, localization=given)
    gamma = noise if isinstance(noise, dict) else {"first": noise, "second": noise}
    solver = kalman.etki(None, gamma, kalman.data_misfit_controller(), localization=taper)
    data = {"first": DATA["first"].ravel(), "second": DATA["second"]}
    wanted = moved_by(solver, calibration, by_output(calibration.ask()), data).ensemble
    calibration.tell(outputs_of(calibration))
    found = calibration.state.ensemble
    np.testing.assert_allclose(found["a"], wanted["a"], atol=2e-4)
    np.testing.assert_allclose(found["b"], wanted["b"], atol=2e-4)
    plain = linear(noise=noise)
    plain.tell(outputs_of(plain))
    assert np.abs(plain.state.ensemble["b"] - wanted["b"]).max() > 0.01


def test_parameters_see_the_outputs_they_are_told() -> None:
    """Groups by names: a parameter that sees none stays the prior's; an output without data is none."""
    data = {"first": DATA["first"], "second": [np.nan, np.nan]}
    groups = kalman.update_groups({"a": ["first"], "b": []})
    calibration = linear(data=data, localization=groups)
    start = of_members(calibration)
    run(calibration)
    posterior = calibration.posterior()
    np.testing.assert_allclose(posterior.samples["b"], start[:, 1], rtol=1e-6)
    assert posterior.sd["a"] < 0.5 * start[:, 0].std()


def test_places_of_what_was_not_observed() -> None:
    """Coordinates are the data's, NaN or not: the step of those alone that were observed."""
    data = {"first": DATA["first"].copy(), "second": DATA["second"][1:]}
    data["first"][0, 1] = np.nan
    nan = linear(
        data=data | {"second": [np.nan, DATA["second"][1]]},
        localization=kalman.taper({"a": 0.0, "b": 1.0}, {"first": [[0.0, 9.0], [1.0, 1.5]], "second": [9.0, 1.0]}, 1.5),
    )
    without = linear(
        data={"x": data["first"].ravel()[[0, 2, 3]], "y": data["second"]},
        noise={"x": NOISE["first"], "y": NOISE["second"]},
        localization=kalman.taper({"a": 0.0, "b": 1.0}, {"x": [0.0, 1.0, 1.5], "y": 1.0}, 1.5),
    )
    nan.tell(outputs_of(nan))
    seen = lambda member: {"x": line(member)["first"].ravel()[[0, 2, 3]], "y": line(member)["second"][1:]}
    without.tell(outputs_of(without, seen))
    np.testing.assert_allclose(of_members(nan), of_members(without), rtol=1e-6)


def test_weights_are_in_the_order_given() -> None:
    """Of prior and data as a caller writes them, which JAX sorts."""
    given = {"prior": dict(reversed(PRIOR.items())), "data": dict(reversed(DATA.items()))}
    weights = np.zeros((2, 6))  # of b and a for second and first
    weights[0, :2] = weights[1, 2:] = 1
    groups = kalman.update_groups({"a": ["first"], "b": ["second"]})
    found = []
    for localization in (groups, weights, {"b": weights[0], "a": weights[1]}):
        calibration = linear(**given, localization=localization)
        calibration.tell(outputs_of(calibration))
        found.append(of_members(calibration))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5)
    np.testing.assert_allclose(found[2], found[0], rtol=1e-5)


def test_inflation_is_not_the_posteriors(tmp_path: Path) -> None:
    """Members are asked for where they are wide; the posterior is narrow. A file does not hold it."""
    inflation = kalman.multiplicative_inflation(2.0)
    calibration = linear(inflation=inflation)
    calibration.tell(outputs_of(calibration))
    asked = of_members(calibration)
    with pytest.warns(UserWarning, match="not at its end"):
        posterior = calibration.posterior()
    assert np.std(asked[:, 0]) == pytest.approx(2 * np.std(posterior.samples["a"]), rel=1e-4)
    calibration.save(tmp_path / "run.npz")
    with pytest.raises(TypeError, match="inflation: None; wanted that of the saved calibration"):
        calibrate.Calibration.load(tmp_path / "run.npz")
    again = calibrate.Calibration.load(tmp_path / "run.npz", inflation=inflation)
    assert run(again) == run(calibration)


@pytest.mark.slow
def test_a_sampler_and_an_accelerated_method() -> None:
    """Methods with states of their own, and one that wants the latent prior."""
    latent = calibrate.joint(PRIOR).latent()
    sampler = lambda gamma: kalman.aldi(None, gamma, prior=latent, key=jax.random.key(0))
    fast = lambda gamma: kalman.accelerated(kalman.etki(None, gamma, kalman.tempered(8)))
    for method, most in ((sampler, 40), (fast, 100)):
        calibration = linear(method=method, most_iterations=most)
        reports = run(calibration)
        assert reports[-1].misfit < 0.1 * reports[0].misfit
        posterior = calibration.posterior()
        assert [posterior.mean["a"], posterior.mean["b"]] == pytest.approx([1.0, -2.0], abs=0.4)


def test_a_method_of_a_mean_and_a_covariance(tmp_path: Path) -> None:
    """Unscented inversion: five runs a step, the exact posterior, and draws that have its mean and covariance."""
    prior = {"b": PRIOR["b"], "a": PRIOR["a"]}  # another order than that of the names
    method = lambda gamma: kalman.uki(None, gamma, kalman.tempered(2), prior=calibrate.joint(prior).latent())
    calibration = linear(prior=prior, method=method, particles=5)
    calibration.tell(outputs_of(calibration))
    calibration.save(tmp_path / "run.npz")
    calibration = calibrate.Calibration.load(tmp_path / "run.npz", method=method)
    (report,) = run(calibration)
    precision = np.diag(PRIOR_SD**-2)
    wanted = np.linalg.inv(precision + MAP.T @ (MAP / VARIANCES[:, None]))
    mean, covariance = of_posterior(calibration.posterior())
    np.testing.assert_allclose(mean, wanted @ (precision @ PRIOR_MEAN + MAP.T @ (flat(DATA) / VARIANCES)), atol=1e-4)
    np.testing.assert_allclose(covariance, wanted, rtol=1e-3)
    latent = np.diag(wanted) / PRIOR_SD**2
    assert report.spread == pytest.approx(np.sqrt(latent.mean()), rel=1e-3)
    calibration.plot()


def test_first_members_have_the_priors_moments() -> None:
    """The posterior of a linear simulator is the exact one, mean and deviation, without the error of its draws."""
    matrix, data, variance = np.array([[1.0, 0.5], [-1.0, 2.0], [0.3, 0.3]]), np.array([1.0, 2.0, 0.0]), 0.2
    calibration = calibrate.Calibration(
        prior={"a": calibrate.normal(1.0, 2.0), "b": calibrate.normal(0.0, 0.5)},
        data={"y": data},
        noise={"y": variance},
        particles=8,
    )
    while not calibration.done:
        calibration.tell([{"y": matrix @ [member["a"], member["b"]]} for member in calibration.ask()])
    posterior = calibration.posterior()
    covariance = np.linalg.inv(matrix.T @ matrix / variance + np.diag([1 / 4, 4.0]))
    mean = covariance @ (matrix.T @ data / variance + np.array([1 / 4, 0.0]))
    np.testing.assert_allclose([posterior.mean["a"], posterior.mean["b"]], mean, atol=1e-5)
    np.testing.assert_allclose([posterior.sd["a"], posterior.sd["b"]], np.sqrt(np.diag(covariance)), rtol=1e-4)


@pytest.mark.slow
def test_other_packages_are_imported_when_needed() -> None:
    code = """
import sys
from eki_jax import calibrate
prior = {"a": calibrate.normal(0.0, 1.0), "b": calibrate.positive(1.0, 1.0)}
calibration = calibrate.Calibration(prior, {"y": 1.0}, 0.1, particles=5)
calibration.tell(calibrate.map_particles(lambda member: {"y": member["a"]}, calibration.ask()))
print([name for name in ("distributed", "matplotlib", "rich", "sklearn", "scipy.stats") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
