"""The table of all experiments, made from the files that they wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.harness import store
from benchmarks.harness.tables import markdown
from benchmarks.paper.classification import shown_runs
from benchmarks.paper.experiments import EXPERIMENTS, module, title
from eki_jax.training.files import write_text

_HEAD = """# The paper's numbers beside ours

{count}

Generated from the JSON files of `python -m benchmarks paper NAME`; do not edit. Several runs are shown as their median
[least, most], mean ± standard deviation. Settings say how far a cell is from the paper's own, which are those of the
preset `full`; `cpu` is a smaller job. Ensembles are trained in float32, or in bfloat16 products where the notes say
`bf16`; all are tested in float32.
"""
_HEADER = ("", "quantity", "paper", "ours", "difference", "settings", "notes")
_OWN = "the paper's"


def write_table(folder: Path, path: Path) -> Path:
    """Write the Markdown table of every result in ``folder`` to ``path``; returns the path."""
    every = results(folder)
    write_text(path, "\n".join([_HEAD.format(count=_count(every)), *map(section, every)]))
    return path


def _count(every: list[dict[str, Any]]) -> str:
    """How many cells are at the paper's settings, of those beside which it has a number."""
    cells: dict[tuple[str, str], bool] = {}
    for result in every:
        differences = _differences(result)
        for line in result.get("rows", []):
            key = result["experiment"], line["name"]
            is_own = line["ours"] is not None and _settings(result, line, differences) == _OWN
            if line["paper"] is not None:
                cells[key] = cells.get(key, False) or is_own
    return (
        f"**{sum(cells.values())} of {len(cells)} cells beside which the paper has a number are at its own settings.**"
    )


def _differences(result: dict[str, Any]) -> dict[str, str]:
    """By cell of a table of networks, what its runs have other than the paper's."""
    if store.RUNS not in result or result["experiment"] not in EXPERIMENTS:
        return {}
    of, found = module(result["experiment"]), {}
    if not hasattr(of, "cells"):
        return {}
    full = {cell.name: cell for cell in of.cells("full")}
    for name, records in shown_runs(result).items():
        if name in full and full[name].kind == "per_sample":
            found[name] = "–"  # the paper has no such method
            continue
        here = records[0]["settings"]
        wanted = full[name].settings(here["seed"]) if name in full else here
        other = {key: value for key, value in wanted.items() if here.get(key) != value}
        words = [f"{key} {here.get(key)} of {'all' if value is None else value}" for key, value in other.items()]
        found[name] = ", ".join(words) or _OWN
    return found


def _settings(result: dict[str, Any], line: dict[str, Any], differences: dict[str, str]) -> str:
    if line["ours"] is None:
        return "–"
    preset = line.get("preset", result["preset"])
    return differences.get(line["name"], _OWN if preset == "full" else f"preset {preset}")


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
        differences = _differences(result)
        rows = [_cells(row, _settings(result, row, differences)) for row in result["rows"]]
        lines.append(f"{markdown(_HEADER, rows, '---')}\n")
    return "\n".join(lines)


def _cells(row: dict[str, Any], settings: str) -> list[str]:
    paper, ours = row["paper"], row["ours"]
    difference = "" if paper is None or ours is None else f"{_number(ours - paper, sign=True)}"
    text = "n/a" if ours is None else _number(ours)
    if "least" in row:
        text += f" [{_number(row['least'])}, {_number(row['most'])}], mean {_number(row['mean'])}"
        text += f" ± {_number(row['deviation'])}, {row['of']}"
    shown = "n/a" if paper is None else _number(paper)
    return [row["name"], row["quantity"], shown, text, difference, settings, row["note"]]


def _number(value: float, *, sign: bool = False) -> str:
    plus = "+" if sign else ""
    return f"{value:{plus}.4f}" if abs(value) >= 0.02 or value == 0 else f"{value:{plus}.3e}"
