"""The committed tables and pictures are what ``python -m benchmarks report`` makes of the committed results."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report
from benchmarks.__main__ import main
from benchmarks.harness import experiment, store
from benchmarks.harness.tables import replaced
from benchmarks.reporting import RESULTS

pytestmark = pytest.mark.benchmarks

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "docs" / "images"
PAGES = ["forward_budget.md", "per_sample.md"]  # with tables of the budgets


def test_tables_are_those_of_the_results(capsys: Any) -> None:
    """To the byte, on the documentation's pages too."""
    tables = [one.path.name for one in report.made() if one.path.suffix != ".png"]
    assert main(["report", "--check", *tables]) == 0, capsys.readouterr().err
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"files": len(tables), "different": []}


def test_every_table_and_picture_is_made() -> None:
    """Of all that is beside the results, and of what the pages show of them; no name stands for two files."""
    files = list(report.made())
    names = {one.path.name for one in files}
    assert len(names) == len(files)
    beside = {path.name for ending in ("md", "png") for path in RESULTS.rglob(f"*.{ending}")}
    shown = {path.name for words in ("calibration_", "scaling_") for path in IMAGES.glob(f"{words}*.png")}
    assert beside | shown <= names
    assert not [one.path for one in files if not one.path.is_file()]


def test_the_page_shows_all_results() -> None:
    """Each file of numbers and each picture of results is on it, with a command, a machine and a day."""
    page = (report.DOCS / "results.md").read_text()
    for path in RESULTS.rglob("*.jsonl"):
        name = path.relative_to(RESULTS).as_posix()
        assert f"](../benchmarks/results/{name})" in page
        if name != "train.jsonl":
            found = store.read(path)
            assert f"`{found['command']}`" in page
            assert f"jax {found['environment']['versions']['jax']}, {found['environment']['date']}" in page
    for one in report.made():
        if one.path.suffix == ".png":
            where = f"images/{one.path.name}" if one.path.parent == IMAGES else one.path.relative_to(ROOT)
            assert f"{where})" in page


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the budgets' files alone, and of their pages."""
    for path in RESULTS.glob("forward_budget_cpu.*"):
        shutil.copy(path, tmp_path)
    (tmp_path / "docs").mkdir()
    for page in PAGES:
        shutil.copy(report.DOCS / page, tmp_path / "docs")
    monkeypatch.setattr(experiment, "RESULTS", tmp_path)
    monkeypatch.setattr(experiment, "ROOT", tmp_path)
    monkeypatch.setattr(report, "made", report._of_experiments)
    return tmp_path


def test_what_differs_is_said(copied: Path, capsys: Any) -> None:
    """A changed number, table or picture, or one that is missing: exit code 1, and nothing is written."""
    table, picture = copied / "forward_budget_cpu.md", copied / "forward_budget_cpu.png"
    every = [picture.name, table.name, *PAGES]
    assert main(["report", "--check"]) == 0
    text = table.read_text()
    table.write_text(text.replace("0.9", "0.8", 1))
    changed = table.read_text()
    assert main(["report", "--check", table.name]) == 1
    assert f"{table}: not what the runs give; python -m benchmarks report {table.name}" in capsys.readouterr().err
    assert table.read_text() == changed
    picture.unlink()
    assert main(["report", "--check"]) == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["different"] == every[:2]
    assert not picture.exists()
    assert main(["report"]) == 0
    assert table.read_text() == text
    assert main(["report", "--check"]) == 0
    path = copied / "forward_budget_cpu.jsonl"
    result = store.read(path)
    for cell in result["cells"].values():
        cell["found"]["test_accuracy"] = [0.5] * len(cell["found"]["test_accuracy"])
    store.write(path, result)
    assert main(["report", "--check"]) == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["different"] == every


def test_another_folder(copied: Path, tmp_path: Path, capsys: Any) -> None:
    """All is written there, and stays as it is where it was."""
    before = {path: path.stat().st_mtime_ns for path in copied.rglob("*")}
    out = tmp_path / "new"
    assert main(["report", "--out", str(out)]) == 0
    assert (out / "forward_budget_cpu.md").read_text() == (copied / "forward_budget_cpu.md").read_text()
    assert (out / "forward_budget_cpu.png").stat().st_size > 10_000
    shutil.rmtree(out)
    now = {path: path.stat().st_mtime_ns for path in copied.rglob("*")}
    assert {path: now[path] for path in before if path.is_file()} == {p: t for p, t in before.items() if p.is_file()}
    assert main(["report", "nothing.md"]) == 2
    assert "NAME: nothing.md; wanted some of forward_budget_cpu.png" in capsys.readouterr().err
    (copied / "forward_budget_cpu.jsonl").write_text("{")
    assert main(["report"]) == 2
    assert "damaged" in capsys.readouterr().err


def test_a_page_without_marks_is_refused() -> None:
    with pytest.raises(ValueError, match="page: has no marks"):
        replaced("nothing", "linear", "x")
