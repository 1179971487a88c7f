"""Figure 7: the test accuracy of every particle of EKI against that of their mean."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import methods
from benchmarks.harness.figures import legend, panels, save
from benchmarks.paper.common import check_preset, finish, row, skipped
from benchmarks.paper.epochs import observe_epochs
from benchmarks.problems import registry
from benchmarks.problems.files import MissingFile

TITLE = "EKI on DNN 1 and 2: every particle's accuracy against the mean's (Figure 7)"
# preset -> network -> (J, batch, epochs, images)
PRESETS: dict[str, dict[str, tuple[int, int, int, int | None]]] = {
    "smoke": {"dnn1": (8, 50, 2, 100)},
    "cpu": {"dnn1": (2000, 600, 4, None), "dnn2": (300, 600, 4, 20_000)},
    "full": {"dnn1": (2000, 600, 20, None), "dnn2": (2000, 600, 20, None)},
}


def run(preset: str, out: Path, data: Path | None, seed: int) -> dict[str, Any]:
    """Writes ``particles.jsonl`` and ``particles.png``."""
    check_preset(preset)
    started, rows, seen, results = time.perf_counter(), [], {}, {}
    for network, (size, batch, epochs, images) in PRESETS[preset].items():
        label = network.upper().replace("DNN", "DNN ")
        try:
            problem = registry.get(f"mnist-{network}", data)
        except MissingFile as error:
            rows.append(skipped(label, "spread of the particles' accuracies", None, error.reason))
            continue
        problem = problem._replace(train=tuple(array[:images] for array in problem.train))
        method = methods.get("eki", problem, size)
        test = problem.test if preset != "smoke" else tuple(array[:100] for array in problem.test)
        look = lambda state, key, method=method, test=test: method.accuracy(state, *test)
        seen[label] = observe_epochs(method, problem, look, batch_size=batch, epochs=epochs, key=jax.random.key(seed))
        last = seen[label][-1]
        results[label] = {
            "mean": float(last.mean),
            "best": float(last.particles.max()),
            "worst": float(last.particles.min()),
            "deviation": float(last.particles.std()),
            "share_below_the_mean_particle": float(np.mean(last.particles < last.mean)),
            "whole_ensemble": float(last.ensemble),
        }
        note = f"J = {size}, {epochs} epochs, batch {batch}" + ("" if images is None else f", {images} images")
        rows.append(row(label, "accuracy of the mean particle", None, last.mean, note))
        rows.append(row(label, "accuracy of the particles", None, last.particles, of="particles"))
    result: dict[str, Any] = {"accuracies": results, "rows": rows, "seconds": time.perf_counter() - started}
    curves = {
        label: {"mean": [a.mean for a in epochs], "particles": [np.sort(a.particles) for a in epochs]}
        for label, epochs in seen.items()
    }
    return finish("particles", TITLE, preset, seed, out, result, {"curves": curves}, draw)


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
