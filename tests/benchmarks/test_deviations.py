"""How near kinds of deviations come to the gradient: the command, and what is committed of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from benchmarks import deviations
from benchmarks.__main__ import main
from benchmarks.harness import store

pytestmark = pytest.mark.benchmarks


def test_kinds_are_compared_and_kept(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of the kinds, then others beside them; what is there is not run again."""
    line = ["deviations", "--preset", "smoke", "--out", str(tmp_path), "--kind"]
    assert main([*line, "span", "answers"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {*found["cosines"]} == {"span 4", "answers 4"}
    assert found["cosines"]["span 4"] < 0.1 < found["cosines"]["answers 4"]
    cells = store.read(tmp_path / "deviations_smoke.jsonl")["cells"]
    one = cells["cosines, answers, 4"]["found"]
    assert [len(one[part]) for part in ("start", "trained", "of_means")] == [2, 2, 2]
    assert min(one["trained"]) > 0.98 > 0.8 > max(one["start"])  # by what was learned on the way
    assert one["of_means"][1] > one["of_means"][0]
    assert [*cells] == ["cosines, span, 4", "cosines, answers, 4", "loss, backpropagation", "loss, answers, 4"]
    monkeypatch.setattr(deviations, "_cosines", lambda **settings: pytest.fail(f"{settings} is there"))
    monkeypatch.setattr(deviations, "_losses", lambda **settings: {"losses": [1.0, 2.0]})
    assert main([*line, "answers"]) == 0
    text = (tmp_path / "deviations_smoke.md").read_text()
    assert f"| {deviations.KINDS['answers'].label} | {np.mean(one['start']):.4f} |" in text
    assert (tmp_path / "deviations_smoke.png").stat().st_size > 10_000


def test_the_goals_are_reached() -> None:
    """By what is committed, as the table has it beside them."""
    found = store.read(deviations.DEVIATIONS.path("cpu"))
    cells = found["cells"].values()
    for (when, particles), goal in deviations.GOALS.items():
        at = [
            cell["found"][when]
            for cell in cells
            if cell["settings"]["particles"] == particles and when in cell["found"]
        ]
        assert max(map(np.mean, at)) >= goal
    losses = {name: cell["found"]["losses"] for name, cell in found["cells"].items() if "losses" in cell["found"]}
    by_noise, by_gradient = losses["loss, least-squares, 192"], losses["loss, backpropagation"]
    assert np.mean(by_noise) <= np.mean(by_gradient) + np.std(by_noise, ddof=1) + np.std(by_gradient, ddof=1)
    means = found["cells"]["cosines, least-squares, 12"]
    noise = (
        1 / np.square(means["found"]["of_means"]) - 1
    )  # over the gradient, squared: one over the number of estimates
    np.testing.assert_allclose(noise * means["settings"]["averages"], noise[0], rtol=0.2)
