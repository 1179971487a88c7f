"""Returns against environment steps and against episodes, a column an environment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness.figures import band, legend_below, logarithmic, pairs, save
from benchmarks.policy.settings import NAMES, TASKS
from benchmarks.policy.summary import MOST, most_of, runs_of

_PALETTE = ("tab:red", "tab:pink", "tab:brown", "tab:olive", "tab:purple", "tab:orange", "tab:blue", "tab:cyan")
_COLORS = dict(zip(NAMES, (*_PALETTE, "tab:green", "tab:gray"), strict=True))


def draw(found: dict[str, Any], path: Path) -> None:
    """Median over the seeds as a line, quartiles as a band; nothing is drawn of nothing."""
    by = runs_of(found)
    if not by:
        return
    figure, below = pairs(len(by), (4.4, 5.6))
    for (environment, row), pair in zip(by.items(), below, strict=True):
        for axis, key in zip(pair, ("steps", "episodes"), strict=True):
            for method, cell in row.items():
                _line(axis, cell["found"]["rows"], key, method)
            axis.set(xlabel="environment steps, thousands" if key == "steps" else "episodes", ylabel="return")
            if most := most_of(found, environment):
                axis.axhline(most[0], color="black", linestyle=":", linewidth=1, label=MOST)
            if key == "episodes":
                logarithmic(axis)
        pair[0].set_title(TASKS[environment].title)
    legend_below(figure, [pair[0] for pair in below], "line: median of the seeds; band: their quartiles")
    save(figure, path, dpi=90)


def _line(axis: Any, rows: list[dict[str, Any]], key: str, method: str) -> None:
    low, middle, high = np.quantile([row["returns"] for row in rows], [0.25, 0.5, 0.75], axis=0)
    x = np.median([row[key] for row in rows], axis=0) / (1e3 if key == "steps" else 1)
    begin = 1 if key == "episodes" else 0  # no zero on a logarithmic axis
    edges = low[begin:], middle[begin:], high[begin:]
    band(axis, x[begin:], *edges, color=_COLORS[method], label=NAMES[method])
