"""``python -m benchmarks calibration``: its problems, its arithmetic, and what it writes."""

from __future__ import annotations

import importlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.__main__ import main
from benchmarks.calibration import bounds, crashes, lorenz96, others, race, racing
from benchmarks.calibration import linear as on_linear
from benchmarks.calibration.methods import LINEAR, RACE, Calibrator, Chosen, kalman_step, remedies
from benchmarks.calibration.problems import InverseProblem, linear, lorenz63
from benchmarks.calibration.problems import lorenz96 as lorenz96_problem
from benchmarks.calibration.problems.lorenz63 import statistics as statistics63
from benchmarks.calibration.problems.lorenz96 import rate
from benchmarks.calibration.problems.lorenz96 import statistics as statistics96
from benchmarks.harness import store
from benchmarks.harness.store import Cells
from benchmarks.reporting import RESULTS
from eki_jax import kalman

pytestmark = pytest.mark.benchmarks


def test_the_exact_posterior() -> None:
    """The posterior is that of the information form, which is another formula."""
    problem = linear(4, 7)
    matrix = np.asarray(problem.settings["matrix"])
    precision = np.linalg.inv(problem.prior_covariance) + matrix.T @ np.linalg.solve(problem.noise_covariance, matrix)
    shift = np.linalg.solve(problem.prior_covariance, problem.prior_mean)
    mean = np.linalg.solve(precision, shift + matrix.T @ np.linalg.solve(problem.noise_covariance, problem.data))
    exact = on_linear.posterior(problem)
    np.testing.assert_allclose(exact.covariance, np.linalg.inv(precision), atol=1e-10)
    np.testing.assert_allclose(exact.mean, mean, atol=1e-10)


def test_exact_methods_are_found_exact() -> None:
    """The square-root step is, for its own prior; perturbed data are not."""
    problem = linear(4, 7)
    (row,) = on_linear.calibrate(problem, LINEAR["etki-tempered"], 5, [3])
    assert row["own"] < 1e-11
    assert row["steps"] == 10
    assert row["mean"] > 0.1  # five particles do not know the prior
    (row,) = on_linear.calibrate(problem, LINEAR["enkf"], 5, [3])
    assert row["own"] > 0.01


def test_a_refused_step_stops_the_comparison() -> None:
    problem = linear(2, 3)._replace(data=np.full(3, np.nan))
    with pytest.raises(Exception, match="TARGETS"):
        on_linear.calibrate(problem, LINEAR["etki"], 5, [0])


def test_places_of_lorenz_96() -> None:
    """The rate is the equation's, entry by entry on a circle."""
    x, forcing = (np.asarray(jax.random.normal(jax.random.key(k), (40, 2))) for k in (0, 1))
    found = np.asarray(rate(jnp.asarray(forcing), jnp.asarray(x)))
    for i in (0, 1, 2, 20, 39):
        wanted = (x[(i + 1) % 40] - x[i - 2]) * x[i - 1] - x[i] + forcing[i]
        np.testing.assert_allclose(found[i], wanted, rtol=1e-5)


def test_lorenz_63_has_its_noise() -> None:
    """At the truth the misfit is that of two draws of the noise, and the prior's mean is far off."""
    problem = lorenz63()
    outputs = problem.simulate(jax.random.key(0), jnp.tile(jnp.asarray(problem.truth, jnp.float32), (200, 1)))
    misfits = np.array([problem.misfit(row) for row in outputs])
    assert 1.0 < np.median(misfits) < 1.8
    away = problem.truth + np.array([0.5, 0.0])
    assert problem.misfit(problem.simulate(jax.random.key(1), jnp.asarray(away, jnp.float32)[None])[0]) > 4
    # Means and covariances of a run, against NumPy's of the same states.
    whitened = np.asarray(problem.whiten(outputs)) - np.asarray(problem.whiten(jnp.asarray(problem.data, jnp.float32)))
    np.testing.assert_allclose(np.sqrt(np.mean(whitened**2, axis=1)), misfits, rtol=1e-3)


def settled(misfit: float) -> InverseProblem:
    """A problem of one parameter whose simulator always has the same misfit."""
    simulate = lambda key, ensemble: jnp.full_like(ensemble, misfit)
    return InverseProblem("settled", simulate, np.zeros(1), np.eye(1), np.zeros(1), np.eye(1), np.zeros(1))


def test_a_race_counts_what_it_ran() -> None:
    """Iterations and runs until the target; the limit; a method's own end."""
    entry = Calibrator("ETKI", kalman_step(kalman.etki))
    (over,) = race.race(settled(0.5), entry, 4, [0])
    assert (over["reached"], over["iterations"], over["runs"], over["ended"]) == (True, 0, 0, "reached")
    (never,) = race.race(settled(2.0), entry, 4, [0], limit=3)
    assert (never["reached"], never["iterations"], never["runs"], never["ended"]) == (False, 3, 12, "limit")
    assert never["misfits"] == [2.0] * 4
    ended = Calibrator("ETKI", kalman_step(kalman.etki, lambda: kalman.tempered(2)))
    (ended,) = race.race(settled(2.0), ended, 4, [0])
    assert (ended["iterations"], ended["ended"]) == (2, "time 1")
    (refused,) = race.race(settled(np.nan), entry, 4, [0])
    assert (refused["reached"], refused["ended"]) == (False, "refused: FEW_PARTICLES")


def test_lorenz_96_with_a_taper() -> None:
    """Fifty particles with a taper come near the target in a few iterations; without one they do not."""
    problem = lorenz96_problem(window=5.0, samples=200)
    entries = {"plain": RACE["etki"], **lorenz96.localized_race(8.0)}
    found = {name: race.race(problem, entries[name], 30, [0], limit=3)[0] for name in ("plain", "etki-taper")}
    assert min(found["etki-taper"]["misfits"]) < 0.95 * min(found["plain"]["misfits"])
    assert found["etki-taper"]["error"] < 0.8 * found["plain"]["error"]


@pytest.mark.slow
@pytest.mark.parametrize(("size", "most"), [(50, 5), (20, 15)])
def test_small_ensembles_arrive(size: int, most: int) -> None:
    """With a taper and noise, chosen on other seeds: in at least five of six, within so many iterations."""
    chosen = store.read(RESULTS / "calibration" / "lorenz96.jsonl")
    settings = Chosen(*(chosen[field][str(size)] for field in Chosen._fields))
    found = race.race(lorenz96_problem(), remedies(settings)["taper-noise"], size, range(6))
    assert sum(run["reached"] and run["iterations"] <= most for run in found) >= 5


def test_the_settings_with_fewest_iterations(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """They are chosen for each J, on seeds that no reported race has; beside a taper of the radius that is chosen."""
    asked: list[int] = []
    least = {"radius": {20: 6.0, 50: 12.0}, "factor": {20: 1.2, 50: 1.05}, "scale": {20: 0.3, 50: 0.1}}
    beside: set[tuple[str, int, float | None]] = set()

    def fake(problem: Any, entries: Any, sizes: Any, seeds: range, cells: Any, prefix: str, radius: Any = None) -> Any:
        asked.extend(seeds)
        ((value, _),), (size,), (_, name, _) = entries.items(), sizes, prefix.split("/")
        beside.add((name, size, radius))
        return {(value, size): [{"iterations": abs(float(value) - least[name][size])}]}

    monkeypatch.setattr(racing, "race_all", fake)
    cells = Cells(tmp_path / "x.jsonl", {}, say=print)
    for size, wanted in ((20, Chosen(6.0, 1.2, 0.3)), (50, Chosen(12.0, 1.05, 0.1))):
        assert lorenz96.tuned_settings(settled(1.0), size, "cpu", lorenz96.TUNING_SEEDS, cells) == wanted
        assert {found for found in beside if found[1] == size} == {
            ("radius", size, None),
            ("factor", size, wanted.radius),
            ("scale", size, wanted.radius),
        }
    reported = max(*(seeds for _, seeds in lorenz96.SIZES.values()), *lorenz96.REMEDY_SEEDS.values())
    assert not set(asked) & set(range(reported))


def test_the_command_writes_its_table(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers, table and picture; an interrupted run keeps its cells, and other settings are measured again."""
    monkeypatch.setattr(on_linear, "SIZES", {"smoke": ((10, 20), 2)})
    monkeypatch.setattr(on_linear, "LINEAR", {"etki": LINEAR["etki"]})
    command = ["calibration", "linear", "--preset", "smoke", "--out", str(tmp_path)]
    assert main(command) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["files"] == ["linear.jsonl", "calibration_linear.png", "calibration_linear.md"]
    saved = store.read(tmp_path / "linear.jsonl")
    assert list(saved["cells"]) == ["etki 10", "etki 20"]
    table = (tmp_path / "calibration_linear.md").read_text()
    means = [np.median([row["mean"] for row in cell["found"]]) for cell in saved["cells"].values()]
    assert f"| ETKI, one step | 1 | {means[0]:.2f} | {means[1]:.2f} |" in table
    assert (tmp_path / "calibration_linear.png").stat().st_size > 10_000
    # What was measured stays with --keep; other settings are measured anew.
    monkeypatch.setattr(on_linear, "calibrate", lambda *args: [{"seed": 0, "mean": 9.0, "variance": 1.0, "steps": 1}])
    monkeypatch.setattr(on_linear, "SIZES", {"smoke": ((10, 40), 2)})
    monkeypatch.setattr(on_linear, "draw", lambda result, path: None)
    assert main([*command, "--keep"]) == 0
    again = store.read(tmp_path / "linear.jsonl")["cells"]
    assert again["etki 10"] == saved["cells"]["etki 10"]
    assert again["etki 40"]["found"][0]["mean"] == 9.0


def test_cells_of_other_settings_are_measured(tmp_path: Path) -> None:
    """A kept cell is used for the same settings alone, and what was skipped is tried again."""
    path, head = tmp_path / "x.jsonl", {"preset": "smoke"}
    cells = Cells(path, head, say=lambda line: None)
    assert cells.get("a", {"J": 2}, lambda: [1.0]) == [1.0]
    assert cells.get("b", {}, lambda: {"skipped": "no network"}) == {"skipped": "no network"}
    again = Cells(path, head, say=lambda line: None)  # the first was interrupted
    assert again.get("a", {"J": 2}, lambda: [2.0]) == [1.0]
    assert again.get("b", {}, lambda: {"skipped": "no network"}) == {"skipped": "no network"}
    again.finish()
    for keep, found in ((True, [1.0]), (False, [2.0])):
        kept = Cells(path, head, keep=keep, say=lambda line: None)
        assert kept.get("a", {"J": 2}, lambda: [2.0]) == found
        assert kept.get("a", {"J": 3}, lambda: [3.0]) == [3.0]
        assert kept.get("b", {}, lambda: {"rows": []}) == {"rows": []}
    other = Cells(path, {"preset": "cpu"}, keep=True, say=lambda line: None)
    assert other.get("a", {"J": 2}, lambda: [4.0]) == [4.0]


def test_members_that_fail_are_counted() -> None:
    """Crashes, hangs and members that blow up leave a posterior; without the cut the last of them leave none."""
    plain, hit, hung, blown, uncut = (
        crashes.measure(crashes.CASES[name], 20, range(1))[0]
        for name in ("none", "crash-0.3", "hang-0.1", "blow-up-0.3", "blow-up-no-cut-0.3")
    )
    assert (plain["failed"], plain["ended"]) == (0, "")
    assert plain["mean"] < 0.6
    assert 10 < hit["failed"] < 40  # of 80, three tenths
    assert 0 < hung["failed"] < 20
    assert blown["failed"] == hit["failed"]
    assert max(row["mean"] for row in (hit, hung, blown)) < 1.5
    assert "NOT_FINITE" in uncut["ended"]


def test_members_stay_within_bounds() -> None:
    """Priors with bounds ask for no member outside; normal priors do, and are told apart."""
    (within,) = bounds.measure("bounded", 20, range(1))
    (normal,) = bounds.measure("normal", 20, range(1))
    assert within["outside"] == 0
    assert 0 < normal["outside"] < normal["asked"] == 20 * normal["iterations"]
    assert bounds.outside({"rate": 1.0, "share": 1.2})
    assert bounds.clipped({"rate": -1.0, "share": 1.2}) == {"rate": 0.0, "share": 1.0}


def test_the_peers_simulators_are_ours() -> None:
    """NumPy's versions, from the same initial condition: equal until chaos makes of rounding what it likes."""
    simulators = load("simulators")
    ensemble = np.array([[3.2, 1.0], [3.4, 0.8]])
    settings = {**lorenz63().settings, "spin_up": 50, "window": 200}
    settings["start_root"] = np.zeros((3, 3)).tolist()
    found = simulators.simulator(settings)(np.random.default_rng(0), ensemble)
    start = jnp.tile(jnp.asarray(settings["start"], jnp.float32)[:, None], (1, 2))
    ours, _ = statistics63(jnp.exp(jnp.asarray(ensemble, jnp.float32)).T, start, 50, 200)
    np.testing.assert_allclose(found, np.asarray(ours).T, rtol=1e-3, atol=1e-3)
    forcing = np.random.default_rng(1).normal(8, 3, (2, 40))
    start = np.random.default_rng(2).normal(3, 3, 40)
    settings = {"model": "lorenz96", "start": start.tolist(), "start_root": np.zeros((40, 40)).tolist()}
    settings |= {"dt": 0.01, "spin_up": 20, "window": 100}
    found = simulators.simulator(settings)(np.random.default_rng(0), forcing)
    states = jnp.tile(jnp.asarray(start, jnp.float32)[:, None], (1, 2))
    ours, _ = statistics96(jnp.asarray(forcing, jnp.float32).T, states, 20, 100)
    np.testing.assert_allclose(found, np.asarray(ours).T, rtol=1e-3, atol=1e-3)


def load(name: str) -> Any:
    """A module of ``peers/``, which run outside of this package."""
    spec = importlib.util.spec_from_file_location(name, others.SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_peers_are_counted_as_we_are(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> None:
    """A library's iterations and runs, the target, its own end and its errors."""
    monkeypatch.syspath_prepend(str(others.SCRIPTS))
    racing_there = load("racing")
    request = others.task(linear(), others.OTHERS["ies"], 5, range(2)) | {"limit": 3}
    path = tmp_path / "task.json"
    path.write_text(json.dumps(request))
    monkeypatch.setattr("sys.argv", ["x", str(path)])

    def served(run: Any) -> list[dict[str, Any]]:
        racing_there.serve(run, "numpy")
        return json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]

    def steps(race: Any) -> None:
        for _ in range(2):
            race.forecast(race.start)
            race.again(race.start)
        race.end(race.start)

    rows = served(steps)
    assert [(row["iterations"], row["runs"], row["ended"]) for row in rows] == [(2, 20, "time 1")] * 2
    assert rows[0]["misfits"] != rows[1]["misfits"]  # particles of their own
    found = others.linear_distance(rows[0])
    assert found[0] > 0

    def for_ever(race: Any) -> None:
        while True:
            race.forecast(race.start)

    assert [row["ended"] for row in served(for_ever)] == ["limit"] * 2
    path.write_text(json.dumps(request | {"target": 1e9}))
    assert [(row["iterations"], row["ended"]) for row in served(for_ever)] == [(0, "reached")] * 2

    def broken(race: Any) -> None:
        raise np.linalg.LinAlgError("singular")

    assert [row["ended"] for row in served(broken)] == ["error: singular"] * 2


def test_peers_taper_as_we_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights that other libraries are given are those of our taper, on the circle too."""
    monkeypatch.syspath_prepend(str(others.SCRIPTS))
    places = np.arange(40.0)
    given = {"own": places, "other": np.tile(places, 2), "period": 40, "radius": 8.0}
    found = load("racing").gaspari_cohn(given, "own", "other")
    away = np.minimum(np.abs(places), 40 - places)
    np.testing.assert_allclose(
        found[0], np.tile(np.asarray(kalman.gaspari_cohn(jnp.asarray(away / 8.0))), 2), atol=1e-6
    )


def test_a_library_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    """It is skipped by name, with the reason, and the table says so."""

    def unavailable(*args: Any) -> Any:
        raise others.Unavailable("no network")

    monkeypatch.setattr(others, "python_of", unavailable)
    monkeypatch.setattr(others, "SIZES", {"smoke": {"linear": ((5,), 1)}})
    monkeypatch.setattr(others, "OURS_LINEAR", ())
    monkeypatch.setattr(others, "draw", lambda result, path: None)
    assert main(["calibration", "peers", "--preset", "smoke", "--out", str(tmp_path)]) == 0
    skipped = json.loads(capsys.readouterr().out.splitlines()[-1])["skipped"]
    assert skipped["linear, pyesmda: ESMDA, J = 5"] == "no network"
    assert "* linear, pyesmda: ESMDA, J = 5: no network" in (tmp_path / "calibration_peers.md").read_text()


@pytest.mark.slow
@pytest.mark.peers
def test_another_library_races() -> None:
    """pyesmda on the linear problem, in its own environment: near the posterior, as a perturbed step is."""
    from benchmarks.harness.peers import default_folder

    problem = linear()
    request = others.task(problem, others.OTHERS["pyesmda"], 200, range(1))
    (row,) = others.ask(others.OTHERS["pyesmda"], request, default_folder())["rows"]
    assert (row["iterations"], row["runs"]) == (4, 800)
    assert others.linear_distance(row)[0] < 0.5
