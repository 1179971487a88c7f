"""What the experiments share: rows of their tables, and the end of every run."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.harness import store
from benchmarks.harness.command import Refused


class Found(NamedTuple):
    """What an experiment has found.

    Attributes:
        numbers: every number of the table, ``rows`` among them.
        details: curves and settings.
    """

    numbers: dict[str, Any]
    details: dict[str, Any] = {}  # noqa: RUF012  # of a tuple, which nobody changes


def row(name: str, quantity: str, paper: float | None, ours: Any, note: str = "", of: str = "seeds") -> dict[str, Any]:
    """One line of the table: the paper's number beside ours.

    Args:
        name: The method and the model.
        quantity: What the number is.
        paper: The paper's number, or None where it has none.
        ours: Ours; a sequence (several seeds) becomes its median, range, mean and standard deviation; None for what
            did not run.
        note: Settings of this row, or why it did not run.
        of: What a sequence has one number for each of.
    """
    line: dict[str, Any] = {"name": name, "quantity": quantity, "paper": paper, "note": note}
    if ours is None:
        return line | {"ours": None}
    values = np.atleast_1d(np.asarray(ours, np.float64))
    line["ours"] = float(np.median(values))
    if values.size > 1:
        line |= {"of": f"{values.size} {of}", "least": float(values.min()), "most": float(values.max())}
        line |= {"mean": float(values.mean()), "deviation": float(values.std(ddof=1))}
    return line


def skipped(name: str, quantity: str, paper: float | None, reason: str) -> dict[str, Any]:
    """A line for what did not run, with the reason."""
    return row(name, quantity, paper, None, f"not run: {reason}")


def timed(function: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    """What a function returns, as NumPy's arrays, and the seconds that it took."""
    started = time.perf_counter()
    return jax.tree.map(np.asarray, function(*arguments)), time.perf_counter() - started


def finish(experiment: str, preset: str, seed: int, out: Path, found: Found) -> dict[str, Any]:
    """Write ``experiment.jsonl`` under ``out``; returns its numbers.

    Args:
        experiment: Its name on the command line.
        preset: As asked for.
        seed: Of everything random.
        out: The folder of the results.
        found: What was measured.

    Raises:
        Refused: An earlier result there has numbers of what this run lacks. It stays; what was measured is beside it.
    """
    numbers, details = found
    summary = {"experiment": experiment, "preset": preset, "seed": seed, **numbers}
    names = measured(summary)
    if numbers["rows"] and not names:
        summary["skipped"] = numbers["rows"][0]["note"].removeprefix("not run: ")
    flags = f"--preset {preset} --seed {seed}"
    command = f"python -m benchmarks paper {experiment} {flags}"
    path, payload = out / f"{experiment}.jsonl", {"command": command, **summary, **details}
    lost = measured(store.earlier(path, experiment=experiment) or {}) - names
    if lost:
        reason = f"{path}: left as it is, since it has what this run lacks: {', '.join(sorted(lost)[:4])}"
        if names:
            reason += f"; this run is in {store.save(path.with_suffix('.partial'), payload).name}"
        raise Refused(f"{reason} ({summary['skipped']})" if "skipped" in summary else reason)
    store.save(path, payload)
    return summary


def measured(result: dict[str, Any]) -> set[str]:
    """The names of the rows that have a number."""
    return {line["name"] for line in result.get("rows", []) if line["ours"] is not None}
