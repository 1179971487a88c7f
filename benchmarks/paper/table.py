"""The table of all experiments, made from the files that they wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.harness import store
from benchmarks.harness.tables import markdown
from benchmarks.paper.experiments import title
from eki_jax.training.files import write_text

_HEAD = """# The paper's numbers beside ours

Generated from the JSON files of `python -m benchmarks paper NAME`; do not edit. Several runs are shown as their median
[least, most], mean ± standard deviation. The presets: `full` has the paper's own settings, `cpu` a smaller job that its
notes state, `smoke` is for tests.
"""
_HEADER = ("", "quantity", "paper", "ours", "difference", "preset", "notes")


def write_table(folder: Path, path: Path) -> Path:
    """Write the Markdown table of every result in ``folder`` to ``path``; returns the path."""
    write_text(path, "\n".join([_HEAD, *map(section, results(folder))]))
    return path


def results(folder: Path, but: str = "") -> list[dict[str, Any]]:
    """Every result in ``folder``; all of them are read before an experiment begins, which may take hours.

    Args:
        folder: Folder of the results.
        but: An experiment that is to be made again, whose file may be anything.

    Raises:
        Refused: A file is damaged, or no result of an experiment of the paper.
    """
    found = []
    for file in sorted(folder.glob("*.jsonl")):
        if file.stem == but:
            continue
        one = store.result(file, f"remove it, or run `python -m benchmarks paper {file.stem}` again")
        if not store.is_begun(one):
            store.made_of(file, one, section, "move it to another folder")
            found.append(one)
    return found


def section(result: dict[str, Any]) -> str:
    """The table of an experiment, with its title and its command."""
    lines = [
        f"## {title(result['experiment'])}\n",
        f"`{result.get('command', result['experiment'])}` on {result['environment']['device']}\n",
    ]
    if result.get("skipped"):
        lines.append(f"Skipped: {result['skipped']}\n")
    if result.get("rows"):
        rows = [_cells(row, row.get("preset", result["preset"])) for row in result["rows"]]
        lines.append(f"{markdown(_HEADER, rows, '---')}\n")
    return "\n".join(lines)


def _cells(row: dict[str, Any], preset: str) -> list[str]:
    paper, ours = row["paper"], row["ours"]
    difference = "" if paper is None or ours is None else f"{_number(ours - paper, sign=True)}"
    text = "n/a" if ours is None else _number(ours)
    if "least" in row:
        text += f" [{_number(row['least'])}, {_number(row['most'])}], mean {_number(row['mean'])}"
        text += f" ± {_number(row['deviation'])}, {row['of']}"
    shown = "n/a" if paper is None else _number(paper)
    return [row["name"], row["quantity"], shown, text, difference, preset, row["note"]]


def _number(value: float, *, sign: bool = False) -> str:
    plus = "+" if sign else ""
    return f"{value:{plus}.4f}" if abs(value) >= 0.02 or value == 0 else f"{value:{plus}.3e}"
