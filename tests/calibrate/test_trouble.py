"""What calibrators run into: failed members, refused steps, outputs that do not fit; nothing of it is silent."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eki_jax
from eki_jax import calibrate, kalman

MAP = np.random.default_rng(0).normal(size=(6, 2))
PRIOR = {"a": calibrate.normal(0.5, 2.0), "b": calibrate.normal(0.0, 3.0)}
J = 30


def line(member: dict[str, Any]) -> dict[str, np.ndarray]:
    values = MAP @ np.array([member["a"], member["b"]])
    return {"first": values[:4].reshape(2, 2), "second": values[4:]}


DATA = line({"a": 1.0, "b": -2.0})


def linear(**settings: Any) -> calibrate.Calibration:
    return calibrate.Calibration(**{"prior": PRIOR, "data": DATA, "noise": 0.3**2, "particles": J} | settings)


def results_of(calibration: calibrate.Calibration) -> list[Any]:
    return [line(member) for member in calibration.ask()]


def run(calibration: calibrate.Calibration, simulate: Any = line) -> list[calibrate.Report]:
    reports = []
    while not calibration.done:
        reports.append(calibration.tell([simulate(member) for member in calibration.ask()]))
    return reports


def snapshot(calibration: calibrate.Calibration) -> Any:
    """All that a calibration is made of."""
    members = [list(member.values()) for member in calibration.ask()]
    return members, calibration.iteration, len(calibration.history), jax.tree.map(np.asarray, calibration.state)


def with_value(value: float) -> dict[str, np.ndarray]:
    return {"first": np.full((2, 2), value), "second": DATA["second"]}


FAILED = {
    "None": (lambda outputs: None, "returned None"),
    "NaN": (lambda outputs: float("nan"), "returned NaN"),
    "NumPy's NaN": (lambda outputs: np.float32("nan"), "returned NaN"),
    "an exception": (lambda outputs: ValueError("file 3\nnegative depth"), "ValueError: negative depth"),
    "an exception's class": (lambda outputs: TimeoutError(), "TimeoutError"),
    "a failure": (lambda outputs: calibrate.MemberFailed("took too long"), "took too long"),
    "an output NaN": (lambda outputs: with_value(np.nan), "first is NaN at 4 of 4 observed numbers"),
    "an output infinite": (lambda outputs: with_value(np.inf), "first is not finite at 4 of 4 observed numbers"),
    "one number NaN": (lambda outputs: outputs | {"second": [np.nan, 1.0]}, "second is NaN at 1 of 2 observed numbers"),
    "a masked number": (
        lambda outputs: outputs | {"second": np.ma.masked_array([0.0, 1.0], mask=[True, False])},
        "second is NaN at 1 of 2 observed numbers",
    ),
    "an outlier": (lambda outputs: with_value(1e9), "outputs far beyond all others', or a misfit that overflows"),
    "an overflow": (lambda outputs: with_value(1e19), "outputs far beyond all others', or a misfit that overflows"),
    "beyond float32": (lambda outputs: with_value(1e300), "outputs far beyond all others', or a misfit that overflows"),
}


@pytest.mark.parametrize("kind", FAILED)
def test_a_failed_member_is_left_out_and_redrawn(kind: str) -> None:
    """The others move as if it were not there, and it comes back among them (rows 3 and 7)."""
    spoil, reason = FAILED[kind]
    calibration, without = linear(), linear(particles=J)
    results = results_of(calibration)
    results[4] = spoil(results[4])
    before = calibration.ask()
    report = calibration.tell(results)
    assert report.failures == {4: reason}
    assert report.moved
    assert f"1 of {J} failed ({reason})" in str(report)
    healthy = [j for j in range(J) if j != 4]
    with pytest.warns(UserWarning, match="not at its end"):
        posterior = calibration.posterior()
    after = calibration.ask()
    assert posterior.samples["a"].tolist() == [after[j]["a"] for j in healthy]
    assert after[4]["a"] != before[4]["a"]
    assert abs(after[4]["a"] - posterior.mean["a"]) < 5 * posterior.sd["a"]
    rest = np.isnan(calibration.history[0].misfits)
    assert rest.tolist() == [j == 4 for j in range(J)]
    # The same step of the others alone, from the same state.
    results[4] = None
    without.tell(results)
    assert [m["a"] for j, m in enumerate(without.ask()) if j != 4] == [after[j]["a"] for j in healthy]
    assert calibration.tell(results_of(calibration)).failed == 0


def test_failed_members_widen_no_posterior() -> None:
    """A crash for one side of the prior: the posterior is that of the members that ran (row 7)."""
    crashing = lambda member: line(member) if member["a"] < 2.0 else RuntimeError("blew up")
    calibration = linear()
    reports = run(calibration, crashing)
    assert reports[0].failed > 3
    posterior, whole = calibration.posterior(), linear()
    run(whole)
    assert posterior.sd["a"] == pytest.approx(whole.posterior().sd["a"], rel=0.3)
    assert posterior.mean["a"] == pytest.approx(1.0, abs=0.4)


def test_frozen_members_are_not_reported() -> None:
    """A method that keeps failed members where they are: they are in no mean and no spread (row 7)."""
    crashing = lambda member: line(member) if member["a"] < 2.0 else None
    calibration = linear(method=lambda gamma: kalman.etki(None, gamma, kalman.tempered(2)))
    reports = run(calibration, crashing)
    frozen = list(reports[-1].failures)
    posterior = calibration.posterior()
    assert len(posterior.samples["a"]) == J - len(frozen) < J
    assert posterior.samples["a"].max() < 2.0
    assert reports[-1].spread < 0.2


@pytest.mark.parametrize("survivors", [0, 1])
def test_below_two_survivors_is_an_error(survivors: int) -> None:
    """At once, with the commonest reason; the calibration is what it was and goes on (row 4)."""
    calibration = linear()
    calibration.tell(results_of(calibration))
    results, before = results_of(calibration), snapshot(calibration)
    broken = [*results[:survivors], *[OSError("no licence")] * (J - survivors)]
    words = rf"{survivors} of 30 members survived \(OSError: no licence\).*FEW_PARTICLES"
    for _ in range(2):
        with pytest.raises(eki_jax.StepRefused, match=words) as caught:
            calibration.tell(broken)
        assert caught.value.reason is eki_jax.Reason.FEW_PARTICLES
    jax.tree.map(np.testing.assert_array_equal, snapshot(calibration), before)
    assert calibration.tell(results).moved


def test_two_survivors_go_on() -> None:
    calibration = linear()
    results = [*results_of(calibration)[:2], *[None] * (J - 2)]
    assert calibration.tell(results).failed == J - 2
    assert calibration.tell(results_of(calibration)).failed == 0


def test_all_outputs_beyond_the_precision() -> None:
    """Every misfit overflows: an error, and no step to time one without moving (row 4)."""
    calibration = linear()
    with pytest.raises(eki_jax.StepRefused, match=r"0 of 30 members survived \(outputs far beyond"):
        calibration.tell([with_value(1e30 + j) for j in range(J)])


def test_a_parameter_that_is_nan() -> None:
    """In one particle: it has failed, and no other has it (row 5)."""

    def method(noise_covariance: Any) -> eki_jax.Solver:
        solver = kalman.etki(None, noise_covariance, kalman.tempered(2))
        spoiled = lambda tree: tree | {"a": tree["a"].at[3].set(jnp.nan)}
        return solver._replace(init=lambda ensemble: solver.init(spoiled(ensemble)))

    calibration = linear(method=method)
    assert np.isnan(calibration.ask()[3]["a"])
    report = calibration.tell([line(member) | {"second": [1.0, 2.0]} for member in calibration.ask()])
    assert report.failures == {3: "first is NaN at 4 of 4 observed numbers"}
    run(calibration, lambda member: DATA if np.isnan(member["a"]) else line(member))
    posterior = calibration.posterior()
    assert calibration.history[1].report.failures == {3: "its parameters are not finite"}
    assert np.isnan(calibration.history[1].outputs["second"][3]).all()
    assert len(posterior.samples["a"]) == J - 1
    assert np.isfinite(posterior.samples["a"]).all()


def refusing(reason: eki_jax.Reason, times: int) -> Callable[[Any], eki_jax.Solver]:
    """A method whose first steps are refused."""

    def method(noise_covariance: Any) -> eki_jax.Solver:
        solver, left = kalman.etki(None, noise_covariance, kalman.tempered(2)), [times]

        def update(state: Any, outputs: Any, targets: Any) -> Any:
            new, info = solver.update(state, outputs, targets)
            if left[0] > 0:
                left[0] -= 1
                return state, info._replace(moved=jnp.array(False), reason=jnp.array(int(reason)))
            return new, info

        return solver._replace(update=update)

    return method


def test_refused_steps_in_a_row_are_an_error() -> None:
    """After three, with the reason and its remedy; before that they show in the report, and use nothing up."""
    calibration = linear(method=refusing(eki_jax.Reason.NOT_FINITE, 99))
    before = snapshot(calibration)
    for _ in range(2):
        report = calibration.tell(results_of(calibration))
        assert (report.moved, report.reason, report.iteration) == (False, eki_jax.Reason.NOT_FINITE, 0)
        assert "refused: NOT_FINITE" in str(report)
    for _ in range(2):
        with pytest.raises(eki_jax.StepRefused, match=r"3 steps in a row were refused: NOT_FINITE: .*float64"):
            calibration.tell(results_of(calibration))
    jax.tree.map(np.testing.assert_array_equal, snapshot(calibration), before)


def test_refusals_are_counted_over_a_restart(tmp_path: Path) -> None:
    """What is saved between two refused steps."""
    method = refusing(eki_jax.Reason.NOT_FINITE, 99)
    calibration = linear(method=method)
    for _ in range(2):
        calibration.tell(results_of(calibration))
    calibration.save(tmp_path / "run.npz")
    again = calibrate.Calibration.load(tmp_path / "run.npz", method=method)
    with pytest.raises(eki_jax.StepRefused, match="3 steps in a row were refused"):
        again.tell(results_of(again))


def test_a_step_between_refusals_counts_anew() -> None:
    calibration = linear(method=refusing(eki_jax.Reason.SETTING, 2), most_refusals=3)
    assert [calibration.tell(results_of(calibration)).moved for _ in range(3)] == [False, False, True]
    assert calibration.iteration == 1


def test_single_gaps_are_imputed_where_asked() -> None:
    """By the mean of the complete members; more than the share fails, and so does what is infinite."""
    calibration = linear(impute=0.2)
    results = results_of(calibration)
    mean = np.mean([r["second"][1] for j, r in enumerate(results) if j > 2])
    results[0]["second"][1] = np.nan
    results[1]["first"][:] = np.nan
    results[2]["second"][1], results[2]["first"][0, 0] = np.inf, np.nan
    report = calibration.tell(results)
    assert report.imputed == 1
    assert set(report.failures) == {1, 2}
    assert "1 outputs imputed" in str(report)
    assert calibration.history[0].outputs["second"][0, 1] == pytest.approx(mean)
    assert calibration.history[0].healthy.sum() == J - 2
    assert linear().tell(results).imputed == 0


def test_outputs_that_are_always_zero() -> None:
    """Nothing is learned from them, and the report says so; the other output is fitted."""
    zero = lambda member: line(member) | {"second": np.zeros(2)}
    calibration = linear()
    reports = run(calibration, zero)
    assert {report.constant for report in reports} == {("second",)}
    assert "constant: second" in str(reports[0])
    assert np.isfinite(calibration.posterior().mean["a"])
    assert run(linear())[0].constant == ()


@pytest.mark.slow
def test_all_outputs_are_zero() -> None:
    """The posterior is the prior, and every line says why."""
    calibration = linear()
    start = [member["a"] for member in calibration.ask()]
    reports = run(calibration, lambda member: {"first": np.zeros((2, 2)), "second": np.zeros(2)})
    assert {report.constant for report in reports} == {("first", "second")}
    np.testing.assert_allclose(calibration.posterior().samples["a"], start, rtol=1e-5)


@pytest.mark.parametrize("variance", [1e-8, pytest.param(1e-12, marks=pytest.mark.slow)])
def test_small_noise_is_fitted(variance: float) -> None:
    """Sixty data, two parameters, noise far below the outputs' rounding: it moves, and ends at time one (row 1)."""
    design = np.random.default_rng(1).normal(size=(60, 2))
    simulate = lambda member: {"y": design @ np.array([member["a"], member["b"]])}
    method = lambda gamma: kalman.etki(
        None, gamma, kalman.tempered(10), failures=eki_jax.redraw_failed(jax.random.key(1))
    )
    calibration = linear(data=simulate({"a": 1.0, "b": -2.0}), noise=variance, method=method)
    reports = run(calibration, simulate)
    assert all(report.moved for report in reports)
    assert reports[-1].time == 1.0
    posterior = calibration.posterior()
    assert [posterior.mean["a"], posterior.mean["b"]] == pytest.approx([1.0, -2.0], abs=1e-4)


def test_data_over_twelve_decades() -> None:
    """Errors of 30 % in float32: each number counts alike, and the exact posterior is found (row 14)."""
    scales = 10.0 ** np.arange(-6, 7)
    design = np.random.default_rng(2).normal(size=(13, 2))
    simulate = lambda member: {"y": scales * (3.0 + design @ np.array([member["a"], member["b"]]))}
    data = simulate({"a": 0.5, "b": -0.5})
    sd = 0.3 * np.abs(data["y"])
    calibration = linear(data=data, noise=sd**2)
    start = np.array([[member["a"], member["b"]] for member in calibration.ask()])
    run(calibration, simulate)
    matrix, right = (scales / sd)[:, None] * design, (data["y"] - 3.0 * scales) / sd
    mean, covariance = start.mean(axis=0), np.cov(start, rowvar=False, ddof=0)
    gain = covariance @ matrix.T @ np.linalg.inv(matrix @ covariance @ matrix.T + np.eye(13))
    wanted = mean + gain @ (right - matrix @ mean)
    posterior = calibration.posterior()
    np.testing.assert_allclose([posterior.mean["a"], posterior.mean["b"]], wanted, atol=1e-3)
    sds = np.sqrt(np.diag(covariance - gain @ matrix @ covariance))
    np.testing.assert_allclose([posterior.sd["a"], posterior.sd["b"]], sds, rtol=1e-3)


def test_a_large_offset_costs_no_digits() -> None:
    """Outputs of 1e8 that differ by parts of one: the difference from the data is taken in double precision."""
    shifted = lambda member: {name: value + 1e8 for name, value in line(member).items()}
    plain, offset = linear(), linear(data=shifted({"a": 1.0, "b": -2.0}))
    run(plain)
    run(offset, shifted)
    assert offset.posterior().mean["a"] == pytest.approx(plain.posterior().mean["a"], abs=1e-3)


@pytest.mark.slow
def test_steps_stay_inside_the_bounds() -> None:
    """Data that pull a parameter to its bound and beyond."""
    prior = {"a": calibrate.bounded(0.0, 1.0), "b": calibrate.positive(1.0, 1.0)}
    calibration = linear(prior=prior, data={"y": [5.0, -5.0]}, noise=0.01)
    asked = []
    while not calibration.done:
        asked += calibration.ask()
        calibration.tell([{"y": np.array([member["a"], member["b"]])} for member in calibration.ask()])
    assert all(0 < member["a"] < 1 and member["b"] > 0 for member in asked)
    assert calibration.posterior().quantiles["a"][0] > 0.5


def replaced(j: int, result: Any) -> Callable[[list[Any]], list[Any]]:
    return lambda results: [*results[:j], result, *results[j + 1 :]]


WRONG = {
    "an output missing": (
        replaced(3, {"first": DATA["first"]}),
        r"results\[3\]: outputs without 'second'; wanted those of the data, first, second",
    ),
    "another output": (
        replaced(0, {**DATA, "third": 1.0}),
        r"results\[0\]: outputs with 'third'; wanted those of the data",
    ),
    "a wrong name": (
        replaced(2, {"first": DATA["first"], "Second": DATA["second"]}),
        r"results\[2\]: outputs without 'second' and with 'Second'",
    ),
    "a wrong shape": (
        replaced(7, {**DATA, "first": np.zeros(4)}),
        r"results\[7\]\['first'\]: shape \(4,\); wanted that of the data, \(2, 2\)",
    ),
    "a text": (replaced(1, {**DATA, "second": "ab"}), r"results\[1\]\['second'\].*wanted an array of real numbers"),
    "an object": (replaced(1, {**DATA, "second": [None, 1.0]}), r"results\[1\]\['second'\]"),
    "complex": (replaced(1, {**DATA, "second": [1j, 1.0]}), r"results\[1\]\['second'\]: dtype complex128"),
    "no dict": (replaced(5, np.zeros(6)), r"results\[5\]: a ndarray; wanted a dict of the outputs 'first', 'second'"),
    "too few": (lambda results: results[:-1], r"results: 29 of them; wanted 30, one for each member"),
    "an array": (
        lambda results: np.zeros((J, J)),
        r"results: a ndarray of shape \(30, 30\); wanted a list",
    ),
    "a dict": (lambda results: {"first": np.zeros((J, 2, 2))}, r"results: a dict; wanted a list with a dict"),
    "nothing": (lambda results: None, r"results: a NoneType; wanted a list with a dict"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_results_that_do_not_fit_are_named(kind: str) -> None:
    """By member and output; nothing is lost (row 13)."""
    change, words = WRONG[kind]
    calibration = linear()
    before = snapshot(calibration)
    with pytest.raises((TypeError, ValueError), match=words):
        calibration.tell(change(results_of(calibration)))
    jax.tree.map(np.testing.assert_array_equal, snapshot(calibration), before)
    assert calibration.tell(results_of(calibration)).moved


def test_transposed_outputs_are_named() -> None:
    """Also where there are as many members as data: members come in a list, and cannot be taken for outputs."""
    data = {"y": np.arange(6.0).reshape(2, 3)}
    simulate = lambda member: {"y": member["a"] * np.arange(6.0).reshape(2, 3)}
    calibration = linear(data=data, particles=6)
    with pytest.raises(
        ValueError, match=r"results\[0\]\['y'\]: shape \(3, 2\) \(it is transposed\); wanted .*\(2, 3\)"
    ):
        calibration.tell([{"y": simulate(member)["y"].T} for member in calibration.ask()])
    square = np.stack([simulate(member)["y"].ravel() for member in calibration.ask()])
    for stacked in (square, square.T, {"y": square}, list(square.T)):
        with pytest.raises(TypeError, match=r"results(\[0\])?: a (ndarray|dict)"):
            calibration.tell(stacked)


def test_a_missing_parameter_is_what_is_said() -> None:
    """A simulator that asks for one that is not there: the error of all members is in the error."""
    calibration = linear()
    results = calibrate.map_particles(lambda member: {"y": member["rate"]}, calibration.ask())
    with pytest.raises(eki_jax.StepRefused, match=r"0 of 30 members survived \(KeyError: 'rate'\)"):
        calibration.tell(results)


def test_a_response_over_many_decades() -> None:
    """An exponential from 1e-20 to 1e40: those beyond all others are left out until they come near."""
    simulate = lambda member: {"y": np.exp(np.array([1.0, 2.0]) * member["a"])}
    prior, data = {"a": calibrate.normal(0.0, 8.0)}, {"y": np.exp([3.0, 6.0])}
    calibration = linear(prior=prior, data=data, noise=[1.0, 20.0], particles=60)
    reports = run(calibration, simulate)
    assert reports[0].failed > 5
    assert reports[-1].failed == 0
    assert reports[-1].time == 1.0
    posterior = calibration.posterior()
    assert posterior.mean["a"] == pytest.approx(3.0, abs=2 * posterior.sd["a"] + 0.01)
