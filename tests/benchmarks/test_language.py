"""The language command: it learns, says what it learned, and goes on where it was stopped."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.__main__ import main
from benchmarks.harness.command import Refused
from benchmarks.language import training
from benchmarks.language.text import load, windows

pytestmark = pytest.mark.benchmarks
SIZES = {"layers": 1, "width": 16, "heads": 2, "context": 8, "batch": 64, "passes": 4, "steps": 4, "write": 12}
SMALL = [word for name, value in SIZES.items() for word in (f"--{name}", str(value))] + ["--quiet"]


def text_file(folder: Path) -> Path:
    path = folder / "text.txt"
    path.write_text("the cat sat on the mat. " * 40, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "method", ["msgd", *(pytest.param(n, marks=pytest.mark.slow) for n in ("natural-eki-per-sample", "node-noise"))]
)
def test_a_run_goes_on_to_the_same_numbers(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Stopped after half of its steps, and begun again by the same command; it writes what it learned to write."""
    monkeypatch.setattr(training, "EVERY", 2)
    line = ["language", "--text", str(text_file(tmp_path)), "--method", method, *SMALL]
    assert main([*line, "--out", str(tmp_path / "whole")]) == 0
    whole = json.loads(capsys.readouterr().out.splitlines()[-1])
    save, stopped = training.Checkpoints.save, tmp_path / "stopped"

    def stop(self: Any, *args: Any) -> None:
        save(self, *args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(training.Checkpoints, "save", stop)
        assert main([*line, "--out", str(stopped)]) == 130
    assert main([*line, "--out", str(stopped)]) == 0
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert again["test_nats"] == whole["test_nats"]
    assert (again["step"], len((stopped / "written.txt").read_text())) == (4, 12)
    result = json.loads((stopped / "result.json").read_text())
    assert [row["step"] for row in result["history"]] == [0, 2, 4]
    factor = {"msgd": 3}.get(method, 5)
    assert result["forward_passes"] == 4 * 64 * factor
    assert (stopped / "nats.png").stat().st_size > 5000


def test_the_command_is_the_runs(tmp_path: Path, capsys: Any) -> None:
    """What a result calls its command begins the same run again, which is there already."""
    out = tmp_path / "a run"
    line = ["language", "--text", str(text_file(tmp_path)), "--method", "msgd", *SMALL, "--out", str(out)]
    assert main(line) == 0
    first = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert main(shlex.split(first["command"].removeprefix("python -m benchmarks "))) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == first


def test_a_loss_that_is_lost_ends_the_run(tmp_path: Path, capsys: Any) -> None:
    """By name of the rate, and with no result."""
    line = ["language", "--text", str(text_file(tmp_path)), "--method", "msgd", *SMALL, "--out", str(tmp_path / "run")]
    assert main([*line, "--learning-rate", "1e38"]) == 2
    assert "--learning-rate: 1e+38" in capsys.readouterr().err
    assert not (tmp_path / "run" / "result.json").exists()


def test_a_text_is_numbers(tmp_path: Path) -> None:
    """The last tenth is held out; windows do not reach beyond it."""
    text = load(text_file(tmp_path), 8)
    assert text.decoded(text.train[:7]) == "the cat"
    assert (len(text.train), len(text.test)) == (864, 96)
    x, y = windows(text.test, 8, 1000)
    np.testing.assert_array_equal(x[:, 1:], y[:, :-1])
    assert len(load(None, 64).characters) > 80
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(Refused, match="no UTF-8"):
        load(tmp_path / "bad.txt", 8)
