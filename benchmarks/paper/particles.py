"""Figure 7: the test accuracy of every particle of EKI against that of their mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness.figures import legend, panels, save
from benchmarks.paper.classification import shown_runs
from benchmarks.paper.common import row
from benchmarks.paper.epochs import Figure, Look, Seen, shown_seen, sizes
from benchmarks.problems.registry import Problem
from eki_jax.training import Method

TITLE = "EKI on DNN 1 and 2: every particle's accuracy against the mean's (Figure 7)"


def _look(method: Method, problem: Problem) -> Look:
    """The accuracies on the test images."""

    def look(state: Any, key: jax.Array) -> dict[str, jax.Array]:
        found = method.accuracy(state, *problem.test)
        return {"mean": found.mean, "particles": jnp.sort(found.particles), "ensemble": found.ensemble}

    return look


def _rows(label: str, seen: Seen, note: str) -> list[dict[str, Any]]:
    return [
        row(label, "accuracy of the mean particle", None, seen["mean"][-1], note),
        row(label, "accuracy of the particles", None, seen["particles"][-1], of="particles"),
    ]


def _says(seen: Seen) -> dict[str, float]:
    mean, particles = seen["mean"][-1], seen["particles"][-1]
    return {
        "mean": float(mean),
        "best": float(particles.max()),
        "worst": float(particles.min()),
        "deviation": float(particles.std()),
        "share_below_the_mean_particle": float(np.mean(particles < mean)),
        "whole_ensemble": float(seen["ensemble"][-1]),
    }


FIGURE = Figure("eki", sizes(epochs=4), _look, _rows, "accuracies", _says)


def draw(result: dict[str, Any], path: Path) -> None:
    """All particles as bands of shares of them, and the mean particle."""
    shown = {label: shown_seen(record) for label, (record,) in shown_runs(result).items()}
    bands = {"all particles": (0, 100, 0.2), "all but the extreme twentieths": (5, 95, 0.3), "half": (25, 75, 0.5)}
    figure, axes = panels(1, len(shown), (5.2 * len(shown), 3.8))
    for axis, (label, seen) in zip(axes[0], shown.items(), strict=True):
        particles = seen["particles"]
        epochs = np.arange(1, len(particles) + 1)
        for name, (low, high, alpha) in bands.items():
            least, most = np.percentile(particles, [low, high], axis=1)
            axis.fill_between(epochs, least, most, color="tab:blue", alpha=alpha, linewidth=0, label=name)
        axis.plot(epochs, np.median(particles, axis=1), ".-", color="tab:blue", linewidth=1, label="median particle")
        axis.plot(epochs, seen["mean"], ".-", color="k", label="mean particle")
        axis.set(title=f"{label}, J = {particles.shape[1]}", xlabel="epoch", ylabel="test accuracy", xticks=epochs)
    legend(axes[0, 0], loc="lower right")
    save(figure, path)
