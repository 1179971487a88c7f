"""Accuracy against forward passes and against seconds, a column a problem."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.forward_budget.settings import NAMES, TITLES
from benchmarks.harness.figures import band, legend_below, logarithmic, pairs, save

_PALETTE = ("tab:purple", "tab:red", "tab:orange", "tab:blue", "tab:cyan", "tab:green", "tab:gray", "black")
_COLORS = dict(zip(NAMES, _PALETTE, strict=True))


def draw(result: dict[str, Any], path: Path) -> None:
    """Mean over the seeds as a line, least to largest as a band; nothing is drawn of nothing."""
    if not (curves := result["curves"]):
        return
    figure, below = pairs(len(curves), (4.6, 7), columns=4)
    for pair, (problem, by_method) in zip(below, curves.items(), strict=True):
        for axis, key in zip(pair, ("passes", "seconds"), strict=True):
            for method, runs in by_method.items():
                length = min(len(run["passes"]) for run in runs)
                values = np.array([run["test_accuracy"][1:length] for run in runs])
                x = np.mean([run[key][1:length] for run in runs], axis=0) / (1e6 if key == "passes" else 1)
                style = {"color": _COLORS[method], "label": NAMES[method]}
                band(axis, x, values.min(0), values.mean(0), values.max(0), **style)
            axis.set(ylabel="test accuracy")
        pair[0].set(title=TITLES[problem], xlabel="sample-forward passes, millions")
        pair[1].set_xlabel("seconds")
        logarithmic(pair[1])
    legend_below(figure, [pair[0] for pair in below], "line: mean of the seeds; band: least to largest")
    save(figure, path, dpi=90)
