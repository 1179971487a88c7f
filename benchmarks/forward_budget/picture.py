"""Accuracy against forward passes and against seconds, a column a problem."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.forward_budget.settings import NAMES, TITLES
from benchmarks.harness.figures import save

_COLORS = dict(
    zip(NAMES, ("tab:purple", "tab:red", "tab:orange", "tab:blue", "tab:cyan", "tab:green", "tab:gray"), strict=True)
)


def draw(curves: dict[str, dict[str, list[dict[str, Any]]]], path: Path) -> None:
    """Mean over the seeds as a line, least to largest as a band; nothing is drawn of nothing."""
    import matplotlib.pyplot as plt

    curves = {problem: by_method for problem, by_method in curves.items() if by_method}
    if not curves:
        return
    figure, axes = plt.subplots(2, len(curves), figsize=(4.6 * len(curves), 7), squeeze=False, constrained_layout=True)
    for column, (problem, by_method) in enumerate(curves.items()):
        for axis, key in zip(axes[:, column], ("passes", "seconds"), strict=True):
            for method, runs in by_method.items():
                length = min(len(run["passes"]) for run in runs)
                values = np.array([run["test_accuracy"][1:length] for run in runs])
                x = np.mean([run[key][1:length] for run in runs], axis=0) / (1e6 if key == "passes" else 1)
                axis.plot(x, values.mean(0), color=_COLORS[method], label=NAMES[method])
                axis.fill_between(x, values.min(0), values.max(0), color=_COLORS[method], alpha=0.2, linewidth=0)
            axis.set(ylabel="test accuracy")
        axes[0, column].set(title=TITLES[problem], xlabel="sample-forward passes, millions")
        axes[1, column].set(xlabel="seconds", xscale="log")
        axes[1, column].xaxis.set_minor_formatter("")  # its labels would run into each other
    title = "line: mean of the seeds\nband: least to largest"
    axes[0, 0].legend(fontsize=8, title=title, title_fontsize=8, loc="lower right")
    save(figure, path, dpi=90)
