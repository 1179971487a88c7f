"""Figure 7: the test accuracy of every particle of EKI against that of their mean."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness.figures import legend, panels, save
from benchmarks.paper.common import Found, row
from benchmarks.paper.epochs import Look, Size, observed, sizes, with_presets
from benchmarks.problems.registry import Problem
from eki_jax.training import Method

TITLE = "EKI on DNN 1 and 2: every particle's accuracy against the mean's (Figure 7)"
SIZES = sizes(epochs=4)


def measure(preset: str, data: Path | None, seed: int) -> Found:
    """The accuracies after every epoch."""
    started = time.perf_counter()

    def look(method: Method, problem: Problem, size: Size) -> Look:
        test = problem.test if preset != "smoke" else tuple(array[:100] for array in problem.test)
        return lambda state, key: method.accuracy(state, *test)

    seen, rows = observed("eki", SIZES[preset], look, data, seed)
    results = {}
    for label, epochs in seen.items():
        last = epochs[-1]
        results[label] = {
            "mean": float(last.mean),
            "best": float(last.particles.max()),
            "worst": float(last.particles.min()),
            "deviation": float(last.particles.std()),
            "share_below_the_mean_particle": float(np.mean(last.particles < last.mean)),
            "whole_ensemble": float(last.ensemble),
        }
        rows.append(row(label, "accuracy of the mean particle", None, last.mean, SIZES[preset][label].note))
        rows.append(row(label, "accuracy of the particles", None, last.particles, of="particles"))
    curves = {
        label: {"mean": [a.mean for a in epochs], "particles": [np.sort(a.particles) for a in epochs]}
        for label, epochs in seen.items()
    }
    numbers = {
        "accuracies": results,
        "rows": with_presets(rows, SIZES, preset),
        "seconds": time.perf_counter() - started,
    }
    return Found(numbers, {"curves": curves})


def draw(result: dict[str, Any], path: Path) -> None:
    """All particles as bands of shares of them, and the mean particle."""
    curves = result["curves"]
    bands = {"all particles": (0, 100, 0.2), "all but the extreme twentieths": (5, 95, 0.3), "half": (25, 75, 0.5)}
    figure, axes = panels(1, len(curves), (5.2 * len(curves), 3.8))
    for axis, (label, curve) in zip(axes[0], curves.items(), strict=True):
        particles = np.array(curve["particles"])
        epochs = np.arange(1, len(particles) + 1)
        for name, (low, high, alpha) in bands.items():
            least, most = np.percentile(particles, [low, high], axis=1)
            axis.fill_between(epochs, least, most, color="tab:blue", alpha=alpha, linewidth=0, label=name)
        axis.plot(epochs, np.median(particles, axis=1), ".-", color="tab:blue", linewidth=1, label="median particle")
        axis.plot(epochs, curve["mean"], ".-", color="k", label="mean particle")
        axis.set(title=f"{label}, J = {particles.shape[1]}", xlabel="epoch", ylabel="test accuracy", xticks=epochs)
    legend(axes[0, 0], loc="lower right")
    save(figure, path)
