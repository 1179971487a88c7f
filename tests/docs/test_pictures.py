"""The pictures of the results, drawn again from their files: each can be read."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")
from matplotlib.figure import Figure

from benchmarks import report
from benchmarks.harness import store
from benchmarks.reporting import RESULTS

NAMES = sorted(one.path.stem for one in report.made() if one.path.suffix == ".png")


def redraw(name: str, folder: Path) -> Path:
    """The picture, made again in a folder."""
    (one,) = (one for one in report.made() if one.path.name == f"{name}.png")
    one.write(folder / one.path.name)
    return folder / one.path.name


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that a test saves."""
    found: list[Figure] = []
    save = Figure.savefig

    def keep(figure: Figure, *arguments: Any, **options: Any) -> None:
        found.append(figure)
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return found


def boxes(texts: list[Any]) -> list[Any]:
    """Where the texts that say something are, in pixels."""
    return [text.get_window_extent() for text in texts if text.get_text() and text.get_visible()]


@pytest.mark.slow
@pytest.mark.benchmarks
@pytest.mark.parametrize("name", NAMES)
def test_labels_can_be_read(name: str, tmp_path: Path, drawn: list[Figure]) -> None:
    """Labels of an axis do not run into each other, and nothing is cut off at the edge."""
    assert redraw(name, tmp_path).stat().st_size > 5_000
    (figure,) = drawn
    width, height = figure.bbox.width, figure.bbox.height
    for axes in figure.axes:
        texts = [axes.title, axes.xaxis.label, axes.yaxis.label]
        for axis, along in ((axes.xaxis, "x"), (axes.yaxis, "y")):
            low, high = sorted(axis.get_view_interval())
            labels = [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
            rows = sorted((box.x0, box.x1) if along == "x" else (box.y0, box.y1) for box in boxes(labels))
            assert all(end <= start for (_, end), (start, _) in pairwise(rows)), f"{name}: {axes.get_title()}"
            texts += labels
        for box in boxes(texts):
            assert box.x0 >= -2
            assert box.y0 >= -2
            assert box.x1 <= width + 2
            assert box.y1 <= height + 2


@pytest.mark.benchmarks
def test_titles_say_what_was_run(tmp_path: Path, drawn: list[Figure]) -> None:
    """The sizes in the titles are those of the runs, and not the paper's."""
    redraw("large-ensemble", tmp_path)
    (figure,) = drawn
    assert [axes.get_title() for axes in figure.axes] == ["DNN 2\nJ = 500, 10,000 images"]
    assert "J =" not in figure.get_suptitle()


@pytest.mark.slow
@pytest.mark.benchmarks
@pytest.mark.parametrize("name", ["dense", "large-ensemble", "rnn"])
def test_short_runs_have_room(name: str, tmp_path: Path, drawn: list[Figure]) -> None:
    """Runs of few epochs beside those of many take a tenth of the width at least."""
    redraw(name, tmp_path)
    for axes in drawn[0].axes:
        left, right = axes.bbox.x0, axes.bbox.x1
        for line in axes.lines:
            at = axes.transData.transform([(x, 0.5) for x in line.get_xdata()])[:, 0]
            assert at[-1] - at[0] >= 0.1 * (right - left)


@pytest.mark.slow
@pytest.mark.benchmarks
def test_what_did_not_run_is_said(tmp_path: Path, drawn: list[Figure]) -> None:
    """A picture of other data than its name has says so."""
    redraw("cnn-svhn", tmp_path)
    result = store.read(RESULTS / "paper/cnn-svhn.jsonl")
    without = {name for row in result["rows"] if row["ours"] is None and (name := row["name"].partition(",")[0])}
    missing = without - {name.partition(",")[0] for name in result["shown"]}
    said = drawn[0].get_suptitle()
    assert missing
    assert all(name in said.partition("not run: ")[2] for name in missing)


@pytest.mark.slow
@pytest.mark.benchmarks
@pytest.mark.parametrize("name", ["noise-ratio", "forward_budget_cpu", "particles"])
def test_bands_are_explained(name: str, tmp_path: Path, drawn: list[Figure]) -> None:
    """By a legend that says what they are of."""
    redraw(name, tmp_path)
    legends = [*drawn[0].legends, *filter(None, (axes.get_legend() for axes in drawn[0].axes))]
    words = " ".join(text.get_text() for one in legends for text in (one.get_title(), *one.get_texts()))
    assert "band" in words or "particles" in words
