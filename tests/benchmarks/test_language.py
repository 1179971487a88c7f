"""The language command: it learns, says what it learned, and goes on where it was stopped."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.__main__ import main
from benchmarks.harness import store
from benchmarks.harness.command import Refused
from benchmarks.language import comparison, training
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


@pytest.mark.parametrize(
    ("method", "asked", "wanted"),
    [("natural-eki-per-sample", None, 1), ("natural-eki-outputs", None, 10), ("natural-eki-outputs", 3.0, 3)],
)
def test_what_is_averaged(method: str, asked: float | None, wanted: float, monkeypatch: Any) -> None:
    """By default one character with answers, several without."""
    taken = list[float]()
    monkeypatch.setattr(training.natural, "learned_feedback", lambda *_, averaged, **__: taken.append(averaged))
    monkeypatch.setattr(training.natural, "per_sample", lambda **_: None)
    monkeypatch.setattr(training, "_of_solver", lambda *_: None)
    settings = {"context": 4, "decay": 0.9, "discount": 0.0, "averaged": asked}
    training.METHODS[method](None, settings, None)
    assert taken == [wanted]


def test_a_text_is_numbers(tmp_path: Path) -> None:
    """The last tenth is held out; windows do not reach beyond it."""
    text = load(text_file(tmp_path), 8)
    assert text.decoded(text.train[:7]) == "the cat"
    assert (len(text.train), len(text.test)) == (864, 96)
    inner = text.without(0.25)
    assert (len(inner.train), len(inner.test)) == (648, 216)
    np.testing.assert_array_equal(np.concatenate([inner.train, inner.test]), text.train)
    x, y = windows(text.test, 8, 1000)
    np.testing.assert_array_equal(x[:, 1:], y[:, :-1])
    assert len(load(None, 64).characters) > 80
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(Refused, match="no UTF-8"):
        load(tmp_path / "bad.txt", 8)


def pretend(best: dict[str, float], asked: list[dict[str, Any]]) -> Any:
    """Runs that end the better the nearer their rate is to the best of their method; rates above 10 lose the loss."""

    def train(text: Any, settings: dict[str, Any], out: Path) -> Any:
        asked.append({**settings, "held out": len(text.test)})
        if settings["learning_rate"] > 10:
            raise training.Diverged("--learning-rate: too large")
        far = abs(np.log10(settings["learning_rate"] / best[settings["method"]]))
        rows = [{"step": 0, "test_nats": 4.0}, {"step": settings["steps"], "test_nats": 2 + far + settings["seed"]}]
        yield training.Progress(None, rows)

    return train


def compare(folder: Path, *words: str) -> int:
    text = str(text_file(folder))
    return main(["language-budget", "--preset", "smoke", "--text", text, "--out", str(folder), *words])


def test_every_method_has_its_best_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """The ladder is climbed to where both neighbours are worse, on text that no reported run is measured with."""
    asked: list[dict[str, Any]] = []
    best = {"natural-eki-per-sample": 0.3, "natural-eki-outputs": 1.0, "node-noise": 10.0, "msgd": 0.01}
    monkeypatch.setattr(comparison, "train", pretend(best, asked))
    small = comparison.PRESETS["smoke"]._replace(ladder=comparison.LADDER)
    monkeypatch.setitem(comparison.PRESETS, "smoke", small)
    assert compare(tmp_path) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    wanted = {name if name == "msgd" else f"{name} 4": 2.5 for name in best}
    assert last["test_nats"] == pytest.approx(wanted)
    tuning = [one for one in asked if one["seed"] == comparison.TUNING_SEED]
    assert {one["held out"] for one in tuning} == {86}  # of 864 to learn from
    assert {one["held out"] for one in asked if one not in tuning} == {96}
    rates = lambda method: sorted(one["learning_rate"] for one in tuning if one["method"] == method)
    assert rates("natural-eki-per-sample") == [0.1, 0.3, 1]
    assert rates("node-noise") == [0.1, 0.3, 1, 3, 10, 30]
    assert rates("msgd") == [0.01, 0.03, 0.1, 0.3, 1]
    text = (tmp_path / "language_smoke.md").read_text()
    assert "| node perturbation | 4 | 2.500 ± 0.707 |  | 3.607 | 0.000 | 10 | 0.1, 0.3, 1, 3, 10, 30 |" in text
    assert f"| {comparison.NAMES['natural-eki-per-sample']} | 4 | 2.500 ± 0.707 | *below 2.500* |" in text
    assert (tmp_path / "language_smoke.png").stat().st_size > 10_000
    cells = store.read(tmp_path / "language_smoke.jsonl")["cells"]
    assert cells["node-noise 4, rate 30"]["found"] == {"diverged": "--learning-rate: too large"}
    number = len(asked)
    assert compare(tmp_path, "--method", "msgd") == 0
    assert len(asked) == number  # all kept, and the others stay
    assert list(store.read(tmp_path / "language_smoke.jsonl")["cells"]) == list(cells)


def test_runs_that_are_lost_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """A method without a finished run has its line; a text that is too short to hold some out is refused."""

    def train(text: Any, settings: dict[str, Any], out: Path) -> Any:
        if settings["method"] == "node-noise" or settings["seed"] == 1:
            raise training.Diverged("lost")
        yield training.Progress(None, [{"step": 0, "test_nats": 4.0}, {"step": 4, "test_nats": 2.0}])

    monkeypatch.setattr(comparison, "train", train)
    assert compare(tmp_path) == 0
    assert "node-noise 4" not in json.loads(capsys.readouterr().out.splitlines()[-1])["test_nats"]
    text = (tmp_path / "language_smoke.md").read_text()
    assert "| node perturbation | 4 | –, 2 of 2 lost |  | – | – | 0.3 | 0.3 |" in text
    assert "| backpropagation | – | 2.000, 1 of 2 lost |  | 2.885 | – |" in text
    short = tmp_path / "short.txt"
    short.write_text("the cat sat on the mat. " * 4, encoding="utf-8")
    line = ["language-budget", "--preset", "smoke", "--text", str(short), "--out", str(tmp_path / "other")]
    assert main(line) == 2
    assert re.search(r"short.txt: 96 characters; wanted at least 1\d\d", capsys.readouterr().err)


@pytest.mark.slow
def test_the_comparison_trains(tmp_path: Path, capsys: Any) -> None:
    """With nothing put in the place of a run; what a run leaves until it is whole is gone."""
    assert compare(tmp_path) == 0
    nats = json.loads(capsys.readouterr().out.splitlines()[-1])["test_nats"]
    assert all(1 < value < 4 for value in nats.values())
    assert not (tmp_path / "language_smoke.unfinished").exists()
