"""One way to run an experiment: what it writes where, what it says, and when it is refused."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness import experiment, store
from benchmarks.harness.command import Refused
from benchmarks.harness.experiment import Experiment

pytestmark = pytest.mark.benchmarks

PAGE = "before <!-- table numbers -->old<!-- end numbers --> after"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with a page, and a folder of committed results."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(experiment, "ROOT", tmp_path)
    monkeypatch.setattr(experiment, "RESULTS", tmp_path / "results")
    (tmp_path / "results").mkdir()
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "page.md").write_text(PAGE)
    return tmp_path


def toy(**other: Any) -> Experiment:
    """An experiment whose number is 7, for presets cpu and smoke."""

    def measure(arguments: argparse.Namespace, path: Path) -> None:
        head = {"experiment": "toy", "preset": arguments.preset, "command": "toy"}
        cells = store.Cells(path, head)
        cells.get("a", {"size": 1}, lambda: {"number": 7})
        cells.finish()

    table = lambda found: f"{found['cells']['a']['found']['number']} of {found['preset']}"
    draw = lambda found, path: path.write_text("a picture")
    says = lambda found: {"number": found["cells"]["a"]["found"]["number"]}
    return Experiment("toy", "A toy", "toy_{preset}", measure, table, draw, says, needs=())._replace(**other)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name[0] != ".")  # locks stay


def run(one: Experiment, out: Path | None = None, preset: str = "cpu", *, draw: bool = False) -> int:
    return experiment.run(one, argparse.Namespace(preset=preset, draw=draw), one.path(preset, out))


def test_all_of_it_goes_into_a_folder(root: Path, capsys: Any) -> None:
    """Numbers, picture and table; a page is for committed numbers alone."""
    assert run(toy(sections={"page.md#numbers": lambda found: "new"}), root / "new") == 0
    assert names(root / "new") == ["toy_cpu.jsonl", "toy_cpu.md", "toy_cpu.png"]
    assert (root / "new" / "toy_cpu.md").read_text() == "7 of cpu\n"
    assert (root / "docs" / "page.md").read_text() == PAGE
    first, last = capsys.readouterr().out.splitlines()
    assert first == "7 of cpu"
    files = ["toy_cpu.jsonl", "toy_cpu.png", "toy_cpu.md"]
    assert json.loads(last) == {"experiment": "toy", "preset": "cpu", "number": 7, "files": files}


def test_committed_numbers_have_their_places(root: Path) -> None:
    """A picture among the documentation's, a table between the marks of a page, and then no file beside."""
    one = toy(picture="docs/toy.png")
    one = one._replace(sections={"page.md#numbers": one.table})
    assert run(one) == 0
    assert names(root / "results") == ["toy_cpu.jsonl"]
    assert (root / "docs" / "toy.png").read_text() == "a picture"
    assert (root / "docs" / "page.md").read_text().split("\n\n")[1] == "7 of cpu"
    assert run(one, root / "new") == 0
    assert names(root / "new") == ["toy.md", "toy.png", "toy_cpu.jsonl"]
    assert run(one, preset="smoke") == 0
    assert (root / "runs" / "toy_smoke.jsonl").is_file()
    assert "7 of cpu" in (root / "docs" / "page.md").read_text()


def test_a_miss_is_exit_code_one(root: Path, capsys: Any) -> None:
    assert run(toy(wrong=lambda found: ["a: 7, wanted 8"])) == 1
    assert capsys.readouterr().err.endswith("a: 7, wanted 8\n")


def test_drawing_measures_nothing(root: Path) -> None:
    """It wants a result, and not what an interrupted run left."""
    remedy = "run python -m benchmarks toy --preset cpu"
    with pytest.raises(Refused, match=f"toy_cpu.jsonl: not there; {remedy}"):
        run(toy(), draw=True)
    path = root / "results" / "toy_cpu.jsonl"
    store.Runs(path, store.UNFINISHED).keep("a", {"found": {"number": 3}})
    with pytest.raises(Refused, match=f"of a run that was interrupted; {remedy}"):
        run(toy(), draw=True)
    assert run(toy()) == 0
    found = store.read(path)
    found["cells"]["a"]["found"]["number"] = 5
    store.write(path, found)
    assert run(toy(), draw=True) == 0
    assert path.with_suffix(".md").read_text() == "5 of cpu\n"
    store.write(path, {"preset": "cpu", "cells": {}})
    strange = toy(summarized=lambda path, found: {"of": found["nothing"]})
    with pytest.raises(Refused, match=f"no result of this command, or not all of it .KeyError: 'nothing'.; {remedy}"):
        run(strange, draw=True)
    with pytest.raises(Refused, match=f"no result of this command, or not all of it .KeyError: 'a'.; {remedy}"):
        run(toy(), draw=True)


def test_a_part_of_other_settings_is_refused(root: Path) -> None:
    """Cells of one head do not stand beside those of another, nor does another experiment's file become this one's."""
    path = root / "x.jsonl"
    head = {"experiment": "toy", "preset": "cpu", "seed": 0}
    cells = store.Cells(path, head)
    for name in "ab":
        cells.get(name, {}, lambda: {"number": 1})
    cells.finish()
    part = store.Cells(path, head, part=True)
    part.get("b", {}, lambda: {"number": 2})
    assert {name: cell["found"]["number"] for name, cell in part.finish()["cells"].items()} == {"a": 1, "b": 2}
    before = path.read_bytes()
    with pytest.raises(Refused, match=r"x.jsonl: is of other settings, and this run is a part .seed: 0, wanted 1.;"):
        store.Cells(path, {**head, "seed": 1}, part=True)
    with pytest.raises(Refused, match=r"holds something else .experiment: 'toy', not 'other'.;"):
        store.Cells(path, {**head, "experiment": "other"})
    assert path.read_bytes() == before
    whole = store.Cells(path, {**head, "seed": 1})
    whole.get("b", {}, lambda: {"number": 3})
    assert list(whole.finish()["cells"]) == ["b"]


def test_parts_leave_each_other_alone(tmp_path: Path) -> None:
    """What an interrupted part has measured is there after another part, and is taken by the same command."""
    path, head = tmp_path / "x.jsonl", {"preset": "cpu"}
    never = lambda: pytest.fail("measured again")
    interrupted = store.Cells(path, head, part=True)
    interrupted.get("a", {}, lambda: {"number": 1})
    other = store.Cells(path, head, part=True)
    other.get("b", {}, lambda: {"number": 2})
    assert list(other.finish()["cells"]) == ["b"]
    again = store.Cells(path, head, part=True)
    assert again.get("a", {}, never) == {"number": 1}
    found = again.finish()
    assert {name: cell["found"]["number"] for name, cell in found["cells"].items()} == {"b": 2, "a": 1}
    assert store.UNFINISHED not in found


def test_a_cell_says_where_it_was_measured(tmp_path: Path) -> None:
    """A part that another machine adds does not make the others its own."""
    path, head = tmp_path / "x.jsonl", {"preset": "cpu"}
    cells = store.Cells(path, head)
    cells.get("a", {}, lambda: {"number": 1})
    found = cells.finish()
    found["cells"]["a"]["environment"]["machine"] = "another"
    store.write(path, found)
    part = store.Cells(path, head, keep=True, part=True)
    part.get("a", {}, lambda: {"number": 2})
    part.get("b", {}, lambda: {"number": 2})
    machines = {name: cell["environment"]["machine"] for name, cell in part.finish()["cells"].items()}
    assert machines == {"a": "another", "b": found["environment"]["machine"]}
