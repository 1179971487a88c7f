"""``python -m benchmarks train`` as a user calls it, on the embedded digits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sklearn")

from benchmarks import train
from benchmarks.__main__ import main
from benchmarks.methods import METHODS

SMALL = ["--particles", "20", "--batch", "200", "--quiet"]
PROMISED = {
    *("problem", "method", "particles", "batch", "epochs", "seed", "seconds", "device"),
    *(f"test_accuracy_{kind}" for kind in ("mean", "best", "ensemble", "first_epoch")),
}


def last_line(capsys: Any) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.benchmarks
def test_every_method_reports_what_is_promised(tmp_path: Path, capsys: Any) -> None:
    for method in METHODS:
        if "natural" in method:
            continue
        out, small = tmp_path / method, SMALL if METHODS[method].kind == "ensemble" else SMALL[2:]
        code = main(
            ["train", "--problem", "digits-dnn", "--method", method, "--epochs", "1", *small, "--out", str(out)]
        )
        summary = last_line(capsys)
        assert code == 0
        assert set(summary) >= PROMISED
        assert 0.05 <= summary["test_accuracy_mean"] <= summary["test_accuracy_best"] + 0.5 <= 1.5
        assert json.loads((out / "result.json").read_text())["command"].startswith(
            "python -m benchmarks train --problem"
        )
        assert {path.name for path in out.iterdir()} >= {
            "accuracy.png",
            "metrics.jsonl",
            "settings.json",
            "checkpoints",
        }


@pytest.mark.benchmarks
def test_resume_goes_on_with_what_the_run_was(tmp_path: Path, capsys: Any) -> None:
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    # In float32: what this machine's products decide may differ between two runs where the rates are close.
    common = ["train", "--method", "eki-r", "--seed", "3", "--precision", "float32", *SMALL]
    assert main([*common, "--epochs", "3", "--out", str(straight)]) == 0
    wanted = last_line(capsys)
    assert main([*common, "--epochs", "1", "--out", str(stopped)]) == 0
    assert main(["train", "--resume", str(stopped), "--epochs", "3", "--quiet"]) == 0
    found = last_line(capsys)
    assert {**found, "seconds": 0} == {**wanted, "seconds": 0}


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        ("name: 'nonsense'", ["--problem", "nonsense"]),
        ("method: 'adam'", ["--method", "adam"]),
        ("batch_size: 5000 for 1437 samples", ["--batch", "5000"]),
        ("particles: 1; wanted a whole number, at least 2", ["--particles", "1"]),
        ("no settings.json there", ["--resume", "no-such-folder"]),
        ("missing", ["--problem", "mnist-dnn1", "--data", "no-such-folder"]),
    ],
)
def test_what_a_user_can_mend_is_said_in_a_line(
    words: str, arguments: list[str], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert train.main(["--quiet", *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert words in error
    assert error.count("\n") == 0


def test_a_folder_with_a_run_is_not_overwritten(tmp_path: Path, capsys: Any) -> None:
    arguments = ["--epochs", "1", *SMALL, "--out", str(tmp_path)]
    assert train.main(arguments) == 0
    before = (tmp_path / "metrics.jsonl").read_text()
    assert train.main(arguments) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert (tmp_path / "metrics.jsonl").read_text() == before


@pytest.mark.slow
@pytest.mark.benchmarks
def test_digits_reach_what_the_readme_says(tmp_path: Path, capsys: Any) -> None:
    assert train.main(["--out", str(tmp_path / "run"), "--quiet"]) == 0
    summary = last_line(capsys)
    assert summary["test_accuracy_mean"] >= 0.96
