"""What is run on an accelerator, on a processor in small: its order, its budget, and how it goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("sklearn")

from benchmarks.__main__ import main
from benchmarks.accelerator import cells, cli, correctness, worker
from benchmarks.harness import store
from benchmarks.harness.command import Refused
from benchmarks.scaling import cli as scaling

SMOKE = ["accelerator", "--preset", "smoke"]


@pytest.mark.benchmarks
def test_steps_are_held_against_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step rounds as its precision does, and is right."""
    monkeypatch.setattr(correctness, "SOLVERS", {"euler": correctness.SOLVERS["euler"]})
    rows = correctness.measure("smoke")
    assert [row["precision"] for row in rows] == ["highest", "bf16"]
    assert rows[0]["error"] < 1e-5 < 1e-4 < rows[1]["error"]
    correctness.check(rows)


@pytest.mark.parametrize("factor", [0.9, float("nan"), float("inf")])
def test_a_wrong_step_is_named(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is a tenth too short, or not a number, is beyond its tolerance, with its solver and its error."""
    exact = np.arange(1.0, 5.0)
    moved = lambda case, *rest, precision="highest", wide=False: exact if wide else factor * exact
    monkeypatch.setattr(correctness, "_moved", moved)
    monkeypatch.setattr(correctness, "SOLVERS", {"euler": correctness.SOLVERS["euler"]})
    rows = correctness.measure("smoke")
    assert not any(row["passed"] for row in rows)
    with pytest.raises(Refused, match=r"euler in highest: (0\.1|nan|inf), more than 0.001; euler in bf16"):
        correctness.check(rows)


def test_a_processor_is_no_accelerator(tmp_path: Path, capsys: Any) -> None:
    """Nothing but the smoke preset runs there, and the error says what is wanted."""
    assert worker.main([json.dumps({"stage": "correctness", "preset": "full", "out": str(tmp_path)})]) == 2
    assert "no accelerator was found" in (said := capsys.readouterr().err)
    assert "--preset smoke" in said
    assert not list(tmp_path.iterdir())


def test_cells_come_by_value_for_time(tmp_path: Path) -> None:
    """Every cell that the committed results lack, the best first, and twice as fast on a machine twice as fast."""
    slow, fast = (cells.plan("full", tmp_path, 0, rate) for rate in (1e12, 2e12))
    ratios = [job.seconds / job.value for job in slow]
    assert ratios == sorted(ratios)
    assert {job.title for job in slow} == {job.title for job in fast}
    assert all(job.value in cells.VALUES.values() for job in slow)
    known = {job.title: job.seconds for job in fast}
    for job in slow:
        assert job.seconds - cells.START == pytest.approx(2 * (known[job.title] - cells.START))
    assert "paper, dense: DNN 2, EKI, seed 0" in known
    assert "paper, dense: DNN 2, EKI(R), seed 0" not in known  # which the results have at the paper's settings


def test_a_cell_costs_its_passes() -> None:
    """DNN 1 is one product: two operations a weight, for each image and particle, in three passes."""
    cell = next(c for c in cells.tables()["dense"].cells("full") if c.name == "DNN 1, EKI")
    assert cells.operations(cell) == pytest.approx(3 * 2 * 7840 * 2000 * 60_000 * 30, rel=0.05)


class Stages:
    """Processes that are not started: each writes what its stage would, and takes a second of a clock of its own."""

    def __init__(self, out: Path, monkeypatch: pytest.MonkeyPatch, codes: dict[str, int] | None = None) -> None:
        self.out, self.codes, self.now = out, codes or {}, 0.0
        self.ran: list[str] = []
        self.kept: set[str] = set()
        monkeypatch.setattr(cli, "run", self.run)
        monkeypatch.setattr(cli.time, "monotonic", lambda: self.now)

    def run(self, arguments: list[str], limit: float) -> int | None:
        task = json.loads(arguments[-1]) if arguments[1].endswith("worker") else {"stage": arguments[2]}
        name = task.get("name") or task["stage"]
        self.ran.append(name)
        self.now += 1
        if limit < 1:
            return None
        if name == "correctness":
            store.write(self.out / "correctness.jsonl", {"environment": {"device": "gpu: Test"}})
        if name == "plan":
            names = [f"cell {n}" for n in range(3) if f"cell {n}" not in self.kept]
            jobs = [{"table": "dense", "name": name, "seed": 0, "seconds": 9.0} for name in names]
            store.write(self.out / "plan.jsonl", {"jobs": jobs})
        self.kept |= set() if self.codes.get(name) else {name}
        return self.codes.get(name, 0)


WHOLE = ["correctness", "scaling", *["performance"] * len(cli._PARTS), "plan", "cell 0", "cell 1", "cell 2"]


def test_stages_run_in_their_order_and_go_on(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call does what its budget has room for, and the next goes on; what is done is not done again."""
    stages = Stages(tmp_path, monkeypatch)
    command = ["accelerator", "--out", str(tmp_path), "--budget"]
    assert main([*command, "3"]) == 0
    assert stages.ran == WHOLE[:3]
    assert "performance, natural" in json.loads(capsys.readouterr().out.splitlines()[-1])["left"]
    assert main([*command, "6.5"]) == 0  # the last of them is stopped in the middle
    captured = capsys.readouterr()
    assert stages.ran == WHOLE[:10]
    assert json.loads(captured.out)["left"] == [f"paper, dense: cell {n}, seed 0" for n in (1, 2)]
    assert "2 stages are left" in captured.err
    record = store.read(tmp_path / "accelerator.jsonl")
    assert record["device"] == "gpu: Test"
    assert record["stages"]["paper, dense: cell 1, seed 0"]["status"] == "stopped"
    assert main([*command, "100"]) == 0
    assert stages.ran == [*WHOLE[:10], "plan", *WHOLE[9:]]
    assert json.loads(capsys.readouterr().out)["left"] == []
    assert main([*command, "100"]) == 0
    assert stages.ran[13:] == ["plan"]


def test_nothing_runs_on_a_wrong_device(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where steps are not the processor's it ends with an error; a later stage that fails is left for the next call."""
    stages = Stages(tmp_path, monkeypatch, {"correctness": 2})
    command = ["accelerator", "--out", str(tmp_path), "--budget", "100"]
    assert main(command) == 2
    assert stages.ran == ["correctness"]
    assert "correctness: failed" in capsys.readouterr().err
    stages.codes = {"cell 1": 1}
    assert main(command) == 0
    assert stages.ran[1:] == WHOLE
    captured = capsys.readouterr()
    assert json.loads(captured.out)["left"] == ["paper, dense: cell 1, seed 0"]
    assert "cell 1, seed 0: failed" in captured.err


def test_a_folder_keeps_its_preset(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of another preset is not gone on with."""
    Stages(tmp_path, monkeypatch)
    assert main([*SMOKE, "--out", str(tmp_path)]) == 0
    assert main(["accelerator", "--out", str(tmp_path)]) == 2
    assert "preset: 'smoke', wanted 'full'" in capsys.readouterr().err


def test_a_stage_is_stopped_at_its_limit(tmp_path: Path) -> None:
    """By what a Ctrl-C is, so that it saves; an end of its own has its code."""
    path = tmp_path / "saved"
    program = (
        "import signal, sys, time, pathlib\n"
        f"signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path({str(path)!r}).touch(), sys.exit(3)))\n"
        "time.sleep(60)"
    )
    assert cli.run(["-c", program], 3) is None
    assert path.exists()
    assert cli.run(["-c", "raise SystemExit(3)"], 60) == 3


@pytest.mark.benchmarks
@pytest.mark.slow
def test_the_smoke_preset_runs_all_of_it(tmp_path: Path, capfd: Any) -> None:
    """On a processor, which it says; the files are those that the commands write."""
    assert main([*SMOKE, "--budget", "7200", "--out", str(tmp_path)]) == 0
    captured = capfd.readouterr()
    assert "no accelerator was found" in captured.err
    summary = json.loads(captured.out.splitlines()[-1])
    assert summary["device"].startswith("cpu")
    assert summary["left"] == []
    rows = store.read(tmp_path / "correctness.jsonl")["rows"]
    assert {row["solver"] for row in rows} == {"euler", "etki", "natural gradient"}
    rate = scaling.summarized(store.read(tmp_path / "scaling.jsonl"))
    assert rate["machine"]["flops"] == rate["machine_at_hand"][1]["flops"] > 0
    assert store.read(tmp_path / "performance-steps.jsonl")["preset"] == "quick"
    assert (tmp_path / "plan.jsonl").is_file()
    record = store.read(tmp_path / "accelerator.jsonl")
    assert all(stage["status"] == "done" and stage["date"] for stage in record["stages"].values())
