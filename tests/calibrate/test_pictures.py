"""What the pictures of a calibration show is what is known of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from eki_jax import calibrate


def simulate(member: dict[str, Any]) -> dict[str, Any]:
    return {"flow": member["rate"] * np.array([1.0, np.nan, 3.0, 4.0]) + member["field"].sum(), "level": member["rate"]}


DATA = {"flow": np.array([2.0, np.nan, 5.0, 6.5]), "level": 1.5}


@pytest.fixture(scope="module")
def calibration() -> calibrate.Calibration:
    prior = {"rate": calibrate.positive(2.0, 1.0), "field": calibrate.normal(0.0, 1.0, shape=(2,))}
    calibration = calibrate.Calibration(prior, DATA, 0.04, particles=30)
    while not calibration.done:
        calibration.tell([simulate(member) for member in calibration.ask()])
    return calibration


def panels(figure: Figure) -> dict[str, Any]:
    return {axes.get_title(): axes for axes in figure.axes if axes.get_title()}


def bands(axes: Any) -> list[np.ndarray]:
    """Lowest and highest values of each band at each place, shape (places, 2)."""
    found = []
    for part in axes.collections:
        if "%" in str(part.get_label()):
            corners = np.concatenate([path.vertices for path in part.get_paths()])
            places = np.unique(corners[:, 0])
            found.append(np.array([np.ptp(corners[corners[:, 0] == x, 1]) for x in places]))
    return found


def test_parameters_have_bands_and_the_prior(calibration: calibrate.Calibration) -> None:
    """A panel for each number; the last band is the posterior's, and the prior's is exact."""
    found = panels(calibration.plot("parameters"))
    assert list(found) == ["rate", "field[0]", "field[1]"]
    posterior = calibration.posterior(probabilities=[0.05, 0.5, 0.95])
    for name, values in (("rate", posterior.quantiles["rate"]), ("field[1]", posterior.quantiles["field"][:, 1])):
        line = next(line for line in found[name].lines if line.get_label() == "median")
        assert len(line.get_ydata()) == calibration.iteration + 1
        assert line.get_ydata()[-1] == pytest.approx(values[1])
        widths = bands(found[name])[-1]
        assert widths[-1] == pytest.approx(values[2] - values[0], rel=1e-6)
        assert widths[-1] < widths[0]
    prior = found["field[0]"].patches[0]
    assert prior.get_height() == pytest.approx(2 * 1.6448536, rel=1e-6)


def test_data_stand_beside_predictions(calibration: calibrate.Calibration) -> None:
    """Those of the members that are handed in, else of the last that were run; what was not observed has no mark."""
    found = panels(calibration.plot("data"))
    assert list(found) == ["flow", "level"]
    marks = found["flow"].containers[0].lines[0]
    np.testing.assert_array_equal(marks.get_ydata(), DATA["flow"])
    before = bands(found["flow"])
    assert np.all(before[1] < before[0])
    assert len(before[0]) == 3  # none where nothing is known
    results = [simulate(member) for member in calibration.posterior().members()]
    results[0] = None
    after = bands(panels(calibration.plot("data", predictions=results))["flow"])
    rows = np.stack([result["flow"] for result in results[1:]])
    widths = np.subtract(*np.quantile(rows[:, [0, 2, 3]], [0.95, 0.05], axis=0))
    np.testing.assert_allclose(after[1], widths, rtol=1e-6)
    labels = calibration.plot("data").subfigs[0].legends[0].get_texts()
    assert f"iteration {calibration.iteration}, before its step" in labels[1].get_text()


def test_pairs_of_parameters(calibration: calibrate.Calibration) -> None:
    """Scatter plots of the posterior's members below the diagonal."""
    axes = np.array(calibration.plot("pairs").axes).reshape(3, 3)
    samples = calibration.posterior().samples
    np.testing.assert_array_equal(axes[1, 0].lines[1].get_xdata(), samples["rate"])
    np.testing.assert_array_equal(axes[2, 1].lines[1].get_ydata(), samples["field"][:, 1])
    assert not axes[0, 1].axison
    assert axes[2, 0].get_xlabel() == "rate"


def test_all_of_it_is_one_figure(calibration: calibrate.Calibration, tmp_path: Path) -> None:
    figure = calibration.plot()
    assert [part.get_suptitle() for part in figure.subfigs] == [
        "Parameters",
        "Data and predictions",
        "Pairs of parameters",
    ]
    figure.savefig(tmp_path / "calibration.png")
    assert (tmp_path / "calibration.png").stat().st_size > 20_000


@pytest.mark.slow
def test_before_the_first_step_there_is_a_picture(tmp_path: Path) -> None:
    """Of one parameter and one number; and of more than there is room for, which is said."""
    small = calibrate.Calibration({"a": calibrate.normal(0.0, 1.0)}, {"y": 1.0}, 1.0, particles=5)
    small.plot().savefig(tmp_path / "small.png")
    assert len(small.plot().subfigs) == 2
    prior = {f"p{i}": calibrate.normal(0.0, 1.0) for i in range(30)}
    figure = calibrate.Calibration(prior, {"y": 1.0}, 1.0, particles=5).plot("parameters")
    assert figure.subfigs[0].get_suptitle() == "Parameters (12 of 30 panels)"
    assert len(panels(figure)) == 12


def test_a_long_array_is_one_panel() -> None:
    """Its entries beside each other, with the prior of each; no parameter after it is hidden by it."""
    mean = np.linspace(1.0, 3.0, 30)
    prior = {"field": calibrate.normal(mean, 0.5), "rate": calibrate.positive(2.0, 1.0)}
    calibration = calibrate.Calibration(prior, {"y": 1.0}, 1.0, particles=20)
    found = panels(calibration.plot("parameters"))
    assert list(found) == ["field", "rate"]
    before, now = bands(found["field"])
    np.testing.assert_allclose(before, 2 * 1.6448536 * 0.5, rtol=1e-6)
    members = np.stack([member["field"] for member in calibration.ask()])
    np.testing.assert_allclose(now, np.subtract(*np.quantile(members, [0.95, 0.05], axis=0)), rtol=1e-6)
    np.testing.assert_allclose(found["field"].lines[0].get_ydata(), mean)
    figure = calibration.plot("pairs")
    assert figure.subfigs[0].get_suptitle() == "Pairs of parameters (6 of 31 numbers)"
    labels = [axes.get_xlabel() for axes in figure.axes if axes.get_xlabel()]
    assert labels == [*(f"field[{i}]" for i in (0, 6, 12, 18, 24)), "rate"]


def test_what_to_draw_is_named(calibration: calibrate.Calibration) -> None:
    with pytest.raises(ValueError, match="what: 'curves'; wanted 'parameters', 'data', 'pairs' or 'all'"):
        calibration.plot("curves")
    with pytest.raises(ValueError, match=r"predictions\[0\]: outputs without 'flow'"):
        calibration.plot("data", predictions=[{"level": 1.0}])
