"""A skip, a part or a smaller run never takes the place of a fuller result: merged, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sklearn")

from benchmarks.__main__ import main
from benchmarks.calibration import linear as on_linear
from benchmarks.calibration.methods import LINEAR
from benchmarks.edf import stochastic
from benchmarks.forward_budget import cli as forward_budget
from benchmarks.harness import store
from benchmarks.harness.command import Refused
from benchmarks.harness.store import Job
from benchmarks.models import cli as models
from benchmarks.paper import classification, common
from benchmarks.performance import parts
from benchmarks.reporting import RESULTS
from benchmarks.scaling import cli as scaling

pytestmark = pytest.mark.benchmarks


def finished(out: Path, name: str, preset: str = "cpu") -> bytes:
    """A result of a paper's experiment, as it was written."""
    rows = [common.row("EKI", "accuracy", 0.89, 0.9) | {"preset": preset}]
    common.finish(name, preset, 0, out, common.Found({"rows": rows}, {"curve": [1]}))
    return (out / f"{name}.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("name", "words", "flags"),
    [
        ("voting", "votes/house-votes-84.data is missing", ["--preset", "cpu", "--data", "nowhere"]),
        ("voting", "larger than smoke", ["--preset", "smoke"]),
        ("voting", "--only: voting has no cells", ["--only", "EKI"]),
        ("dense", "--only: 'no such cell'; wanted a part of a cell's name, of DNN 1, SGD", ["--only", "no such cell"]),
        ("dense", "--only: ''; wanted a part", ["--only", ""]),
        ("dense", "mnist/train-images-idx3-ubyte.gz is missing", ["--data", "nowhere"]),
        ("dense", "has seed 0, not 1", ["--seed", "1", "--only", "DNN 1"]),
        ("dense", "larger than smoke", ["--preset", "smoke"]),
    ],
)
def test_a_papers_result_stays(name: str, words: str, flags: list[str], tmp_path: Path, capsys: Any) -> None:
    """What cannot be run, and what would be less, is refused in a line."""
    before = finished(tmp_path, name)
    if name == "dense":
        path = tmp_path / "dense.jsonl"
        store.write(path, {**store.read(path), "shown": {"DNN 1, EKI": []}, "accuracies": {"DNN 1, EKI": {}}})
        before = path.read_bytes()
    assert main(["paper", name, "--out", str(tmp_path), *flags]) == 2
    assert words in (error := capsys.readouterr().err)
    assert error.strip().count("\n") == 0
    assert (tmp_path / f"{name}.jsonl").read_bytes() == before


def test_a_table_is_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells that a part leaves out are those of the earlier table, whose files may be gone."""
    cells = [classification.Cell("p", "sgd", label, epochs=1, images=10, seeds=2) for label in "AB"]
    monkeypatch.setattr(classification, "run_cell", lambda cell, kept, data, seed: record(cell, 0.5 + seed))

    def record(cell: classification.Cell, mean: float) -> dict[str, Any]:
        line = dict.fromkeys(("test_accuracy_mean", "test_accuracy_best", "test_accuracy_ensemble"), mean)
        settings = {"label": cell.label, "mean": mean}
        return {"settings": settings, "history": [line | {"forward_passes": 1, "seconds": 1.0}], "seconds": 1.0}

    def table(only: str = "") -> dict[str, Any]:
        classification.run_table("t", lambda preset: cells, "full", tmp_path, None, 0, only)
        return store.read(tmp_path / "t.jsonl")

    whole = table()
    assert [line["ours"] for line in whole["rows"]] == [1.0, 1.0]
    monkeypatch.setattr(classification, "run_cell", lambda cell, kept, data, seed: record(cell, 0.25))
    part = table("A")
    assert [line["ours"] for line in part["rows"]] == [0.25, 1.0]
    of_b = lambda result: (classification.shown_runs(result)["B, SGD"], result["accuracies"]["B, SGD"])
    assert of_b(part) == of_b(whole)


def test_a_budgets_table_is_of_all_runs(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of the methods or problems adds to the table."""

    def perform(task: dict[str, Any], data: Any, peers: Any) -> dict[str, Any]:
        return {"passes": [0, 100_000, 200_000], "seconds": [0, 1.0, 2.0], "test_accuracy": [0.1, 0.5, 0.6]}

    monkeypatch.setattr(forward_budget, "perform", perform)
    command = ["forward-budget", "--preset", "smoke", "--out", str(tmp_path)]
    assert main([*command, "--method", "natural-eki", "pgpe"]) == 0
    before = (tmp_path / "forward_budget_smoke.md").read_text()
    part = [*command, "--problem", "digits-dnn", "--method", "natural-eki", "--summary"]
    assert main(part) == 0
    assert (tmp_path / "forward_budget_smoke.md").read_text() == before
    assert main([*command, "--method", "msgd"]) == 0
    assert "momentum SGD" in (tmp_path / "forward_budget_smoke.md").read_text()
    assert set(json.loads(capsys.readouterr().out.splitlines()[-1])["results"]["digits-dnn"]) == {
        *("natural-eki", "pgpe", "msgd")
    }


def test_an_edf_result_is_merged(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Problems that a run leaves out stay; another experiment's file and a larger preset's are refused."""

    def plan(arguments: Any) -> tuple[dict[str, Any], dict[str, Job]]:
        best = {"rate": 1.0, "train_loss": [1.0], "test_error": [0.1]}
        job = Job({"images": 1}, lambda: {"best": best, "gradients_per_step": 1})
        return {}, {f"{problem}: Adam": job for problem in arguments.problem}

    monkeypatch.setattr(stochastic, "plan", plan)
    monkeypatch.setattr("benchmarks.edf.cli.draw", lambda result, path: path)
    out = tmp_path / "x.jsonl"
    command = ["edf", "stochastic", "--out", str(out), "--problem"]
    assert main([*command, "mnist", "cifar10", "--preset", "cpu"]) == 0
    assert main([*command, "mnist", "--preset", "cpu"]) == 0
    assert list(store.read(out)["cells"]) == ["mnist: Adam", "cifar10: Adam"]
    before = out.read_bytes()
    assert main([*command, "mnist", "--preset", "cpu", "--seed", "1"]) == 2
    assert "seed: 0, wanted 1" in capsys.readouterr().err
    assert main([*command, "mnist", "cifar10", "--preset", "smoke"]) == 2
    assert main(["edf", "harness", "--preset", "cpu", "--out", str(out)]) == 2
    assert "holds something else" in capsys.readouterr().err
    assert out.read_bytes() == before


def test_a_calibration_stays_until_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupted run leaves the result as it was, and its cells to the same command; a smaller one is refused."""
    monkeypatch.setattr(on_linear, "SIZES", {"smoke": ((10, 40), 1), "cpu": ((10, 40), 1)})
    monkeypatch.setattr(on_linear, "LINEAR", {"etki": LINEAR["etki"]})
    monkeypatch.setattr(on_linear, "draw", lambda result, path: None)
    command = ["calibration", "linear", "--out", str(tmp_path), "--preset"]
    numbers: list[float] = []

    def measured(*args: Any) -> list[dict[str, Any]]:
        numbers.append(float(len(numbers)))
        if numbers[-1] == 3.0:
            raise KeyboardInterrupt
        return [{"seed": 0, "mean": numbers[-1], "variance": 1.0, "steps": 1}]

    monkeypatch.setattr(on_linear, "calibrate", measured)
    means = lambda: [cell["found"][0]["mean"] for cell in store.read(path)["cells"].values()]
    path = tmp_path / "linear.jsonl"
    assert main([*command, "cpu"]) == 0
    assert means() == [0.0, 1.0]
    assert main([*command, "cpu"]) == 130
    assert means() == [0.0, 1.0]
    assert main([*command, "cpu"]) == 0
    assert means() == [2.0, 4.0]
    assert main([*command, "smoke"]) == 2
    assert means() == [2.0, 4.0]


def test_a_cell_that_cannot_be_had_stays(tmp_path: Path) -> None:
    """What was measured of a library is not replaced by the news that it cannot be installed."""
    from benchmarks.harness.store import Cells

    said: list[str] = []
    new = lambda: Cells(tmp_path / "x.jsonl", {"preset": "cpu"}, say=said.append)
    cells = new()
    cells.get("a", {"J": 5}, lambda: {"rows": [1]})
    cells.finish()
    again = new()
    assert again.get("a", {"J": 5}, lambda: {"skipped": "no network"}) == {"rows": [1]}
    assert said[-1] == "a: not run (no network); the one of the earlier result stays"
    assert again.finish()["cells"]["a"]["found"] == {"rows": [1]}
    for head, settings in (({"preset": "cpu"}, {"J": 6}), ({"preset": "full"}, {"J": 5})):
        before = (tmp_path / "x.jsonl").read_bytes()
        other = Cells(tmp_path / "x.jsonl", head)
        assert other.get("a", settings, lambda: {"skipped": "no network"}) == {"skipped": "no network"}
        with pytest.raises(Refused, match=r"x.jsonl: left as it is, since it has what this run lacks: a .no network."):
            other.finish()
        assert (tmp_path / "x.jsonl").read_bytes() == before


def test_models_are_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of some models leaves the others in the file."""
    named = [models.MODELS[0]._replace(name=name) for name in ("one", "two", "three")]
    monkeypatch.setattr(models, "MODELS", named)
    monkeypatch.setattr(models, "_columns", lambda model, sizes: {"name": model.name})
    monkeypatch.setattr(models, "table", lambda result: "")
    monkeypatch.setattr(models, "troubles", lambda result: [])
    command = ["models", "--preset", "smoke", "--json", str(tmp_path / "m.jsonl")]
    assert main(command) == 0
    before = store.read(tmp_path / "m.jsonl")["cells"]
    assert len(before) == 3
    assert main([*command, "--model", "two"]) == 0
    assert list(store.read(tmp_path / "m.jsonl")["cells"]) == list(before)


def test_a_performance_case_stays(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A case that lacks a library which cannot be had now does not take the place of the earlier one; others do."""
    calls: list[str] = []

    def rows(options: Any, network: str, J: int) -> Any:
        calls.append(network)
        if network == "n3" and len(calls) == 3:
            raise KeyboardInterrupt
        yield {"network": network, "J": J, "what": "ours", "median": float(len(calls))}
        other = {"skipped": "no network"} if network == "n1" and len(calls) > 4 else {"median": 1.0}
        yield {"network": network, "J": J, "what": "theirs", **other}

    cases = [{"network": f"n{number}", "J": 2} for number in (1, 2, 3)]
    monkeypatch.setitem(parts.PARTS, "evolution", parts.Part(lambda preset: cases, rows))
    command = ["performance", "--parts", "evolution", "--out", str(tmp_path)]
    path = tmp_path / "performance-evolution.jsonl"
    medians = lambda: [cell["found"]["rows"][0]["median"] for cell in store.read(path)["cells"].values()]
    assert main(command) == 130
    assert main(command) == 0
    assert calls == ["n1", "n2", "n3", "n3"]  # what was interrupted goes on
    assert medians() == [1.0, 2.0, 4.0]
    assert main(command) == 0
    assert "n1, J 2: not run (it lacks theirs); the one of the earlier result stays" in capsys.readouterr().err
    assert medians() == [1.0, 6.0, 7.0]
    assert "| n2 | 2 | ours | 6,000.0 |" in (tmp_path / "performance.md").read_text()
    before, page = path.read_bytes(), tmp_path / "performance.md"
    text = page.read_text()
    page.unlink()
    assert main(["performance", "--draw", "--out", str(tmp_path)]) == 0
    assert page.read_text() == text
    assert len(calls) == 7
    assert main([*command, "--preset", "quick"]) == 2
    assert "larger than quick" in capsys.readouterr().err
    assert path.read_bytes() == before


def test_what_was_measured_of_scaling_stays(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Predictions alone leave the measurements, and a measurement of fewer cases is refused."""
    committed = store.read(RESULTS / "scaling.jsonl")
    path = store.write(tmp_path / "scaling.jsonl", committed)
    monkeypatch.setattr(scaling.pictures, "draw_measured", lambda *args: None)
    monkeypatch.setattr(scaling.pictures, "draw_predicted", lambda *args: None)
    command = ["scaling", "--output", str(tmp_path)]
    assert main([*command, "--predict-only", "--tflops", "100"]) == 0
    found = store.read(path)
    assert [found[name] for name in ("cells", "kind")] == [committed[name] for name in ("cells", "kind")]
    assert found["predicted"] != committed["predicted"]
    before = path.read_bytes()
    assert main([*command, "--max-devices", "2"]) == 2
    assert "is of other settings, and this run is a part" in capsys.readouterr().err
    assert main([*command, "--preset", "smoke"]) == 2
    assert "larger than smoke" in capsys.readouterr().err
    assert path.read_bytes() == before
