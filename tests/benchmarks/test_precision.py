"""Which precision a training run has, what it says of it, and what bfloat16 costs on the digits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sklearn")

from benchmarks import methods, precision, train
from benchmarks.__main__ import main
from benchmarks.performance.precision import VARIANTS, accuracy, direction_error
from benchmarks.problems import registry

TRAIN = ["train", "--problem", "digits-dnn", "--method", "eki-r", "--particles", "20", "--epochs", "1", "--quiet"]


def rates(bf16: float) -> Any:
    return lambda: precision.Rates(1e9, bf16 * 1e9)


@pytest.mark.parametrize(
    ("asked", "bf16", "steps", "found", "words"),
    [
        ("auto", 5.0, 2.0, "bf16", "rate here, 5 and 1 GFLOP/s, and steps of 64 particles 2 times as fast; bf16 is"),
        ("auto", 5.0, 0.9, "float32", "steps of 64 particles 0.9 times as fast; bf16 is taken from 1.5 and 1.1 on"),
        ("auto", 1.4, None, "float32", "1.4 and 1 GFLOP/s; bf16 is taken from 1.5 on"),
        ("auto", 0.3, None, "float32", "run at 0.3 times"),
        ("bf16", 0.3, None, "bf16", "as asked; bfloat16 products run at 0.3 times"),
        ("float32", 5.0, None, "float32", "as asked"),
    ],
)
def test_the_faster_is_taken(
    asked: str, bf16: float, steps: float | None, found: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products and steps decide, unless a precision is asked for; the reason has the numbers."""
    monkeypatch.setattr(precision, "measured", rates(bf16))
    monkeypatch.setattr(precision, "steps_ratio", lambda method, problem: steps)
    chosen, why = precision.choose(asked, "eki", registry.get("digits-dnn"))
    assert chosen == found
    assert words in why


def test_rates_are_measured() -> None:
    """Of both kinds of products, and of steps, on the machine at hand."""
    assert all(1e6 < rate < 1e16 for rate in precision.measured(repeats=1))
    for method in ("eki-r", "natural-eki"):
        assert 1e-3 < precision.steps_ratio(method, registry.get("digits-dnn"), repeats=1) < 1e3


@pytest.mark.benchmarks
def test_a_run_says_its_precision(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a line, in its result and in the command that repeats it; one that goes on stays in it."""
    monkeypatch.setattr(precision, "measured", rates(2.0))
    monkeypatch.setattr(precision, "steps_ratio", lambda method, problem: 2.0)
    out = tmp_path / "run"
    assert main([*TRAIN, "--out", str(out)]) == 0
    captured = capsys.readouterr()
    assert "precision: bf16 (bfloat16 products run at 2 times" in captured.err
    assert json.loads(captured.out.splitlines()[-1])["precision"] == "bf16"
    assert "--precision bf16" in json.loads((out / "result.json").read_text())["command"]
    monkeypatch.setattr(precision, "measured", rates(0.5))
    assert main(["train", "--resume", str(out), "--epochs", "2", "--quiet"]) == 0
    assert "precision: bf16 (as asked" in capsys.readouterr().err
    assert json.loads((out / "settings.json").read_text())["precision"] == "bf16"


def test_float32_is_what_older_runs_had(tmp_path: Path) -> None:
    """A record without a precision is of a float32 run, which goes on in float32 on any machine."""
    (tmp_path / "settings.json").write_text(json.dumps({"problem": "digits-dnn", "method": "eki-r", "epochs": 2}))
    for flags in ([], ["--precision", "auto"]):
        settings, _ = train._settings(train.parser().parse_args(["--resume", str(tmp_path), *flags]))
        assert settings["precision"] == "float32"
    settings, _ = train._settings(train.parser().parse_args([]))
    assert settings["precision"] == "auto"


def test_what_has_no_precision_says_so(tmp_path: Path, capsys: Any) -> None:
    """Methods without ensembles refuse bf16, and an unknown precision names those that are known."""
    problem = registry.get("digits-dnn")
    with pytest.raises(
        ValueError, match=r"precision: 'bf16' for sgd, which has none; wanted None, or one of eki, meki"
    ):
        methods.get("sgd", problem, precision="bf16")
    assert main(["train", "--method", "sgd", "--precision", "bf16"]) == 2
    assert "--precision: bf16; sgd has no such setting" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--precision", "fp8"])
    assert stopped.value.code == 2
    assert "choose from" in (said := capsys.readouterr().err)
    assert all(name in said for name in precision.CHOICES)


@pytest.mark.benchmarks
def test_bfloat16_costs_no_accuracy() -> None:
    """On the digits: the direction's error, and where training ends, beside float32."""
    problem = registry.get("digits-dnn")
    exact = VARIANTS["float32 highest"]
    assert direction_error(problem, exact, 50, 60) < 1e-5
    wanted = accuracy(problem, exact, 100, 60, 3)
    assert wanted > 0.7
    for name in ("bf16 products", "bf16 products and storage"):
        assert 1e-4 < direction_error(problem, VARIANTS[name], 50, 60) < 1e-2
        assert abs(accuracy(problem, VARIANTS[name], 100, 60, 3) - wanted) < 0.02
