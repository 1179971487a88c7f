"""The pictures of the EDF experiments, drawn from their results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.harness.figures import legend, panels, save, whole_numbers


def draw(result: dict[str, Any], path: Path) -> Path:
    """Draw ``result`` (of any of the experiments) to ``path``, a PNG."""
    return save(_DRAWINGS[result["experiment"]](result), path, dpi=110)


def _convergence(result: dict[str, Any]) -> Any:
    figure, (axes,) = panels(1, 3, (13, 4.2), sharey=True)
    for name, curve in result["curves"].items():
        losses = [float("nan") if loss is None else loss for loss in curve["losses"]]
        steps = range(len(losses))
        work = [step * curve["gradients_per_step"] for step in steps]
        damped_g = name.startswith("EDF-G") and "undamped" not in name
        style = {"linewidth": 1.4, "label": name, "linestyle": "-" if damped_g else "--", "color": _colour(name)}
        if damped_g:
            axes[0].plot(steps, losses, **style)
        axes[1].plot(steps, losses, **style)
        axes[2].plot(work, losses, **style)
    axes[0].set(title="EDF-G: a larger k falls faster", xlabel="step", ylabel="training loss")
    axes[1].set(title="against the others", xlabel="step")
    axes[2].set(title="the same by work done", xlabel="gradient-equivalents (a step costs 1 + k)")
    start, lowest = _extent(result["curves"])
    axes[0].set(yscale="log", ylim=(0.8 * max(lowest, result["stops"]["loss"]), 1.5 * start))  # not what diverged
    legend(axes[0])
    legend(axes[2])
    figure.suptitle(f"Full batch of {result['images']} CIFAR-10 images, a network of two convolutions", fontsize=11)
    return figure


def _extent(curves: dict[str, Any]) -> tuple[float, float]:
    """The loss at the start, and the lowest of all."""
    losses = [loss for curve in curves.values() for loss in curve["losses"] if loss is not None]
    return losses[0], min(losses)


def _stochastic(result: dict[str, Any]) -> Any:
    problems = result["problems"]
    figure, axes = panels(2, len(problems), (5.5 * len(problems), 7))
    for column, (problem, found) in zip(axes.T, problems.items(), strict=True):
        for name, method in found.items():
            chosen = method["best"]
            epochs = range(1, len(chosen["train_loss"]) + 1)
            style = {"label": f"{name} ({chosen['rate']:g})", "color": _colour(name), "linestyle": _dash(name)}
            column[0].plot(epochs, chosen["train_loss"], marker=".", **style)
            column[1].plot(epochs, [100 * error for error in chosen["test_error"]], marker=".", **style)
        column[0].set(title=f"{problem}, {result['sizes'][problem]} images", yscale="log", ylabel="training loss")
        column[1].set(xlabel="epoch", ylabel="test error, %")
        for axis in column:
            whole_numbers(axis)
        legend(column[0])
    return figure


def _full_vs_stochastic(result: dict[str, Any]) -> Any:
    figure, (axes,) = panels(1, 2, (9.5, 4))
    for name, curve in result["curves"].items():
        chosen = curve["best"]
        steps = range(1, len(chosen["train_loss"]) + 1)
        style = {"label": f"{name} ({chosen['rate']:g})", "linestyle": "--" if "full" in name else "-", "marker": "."}
        axes[0].plot(steps, chosen["train_loss"], **style)
        axes[1].plot(steps, [100 * error for error in chosen["test_error"]], **style)
    axes[0].set(yscale="log", xlabel="full-batch step, or epoch", ylabel="training loss")
    axes[1].set(yscale="log", xlabel="full-batch step, or epoch", ylabel="test error, %")
    legend(axes[0])
    figure.suptitle(f"MNIST, {result['images']} images, mini-batches of {result['batch_size']}", fontsize=11)
    return figure


def _harness(result: dict[str, Any]) -> Any:
    figure, ((axis,),) = panels(1, 1, (7, 4.4))
    for name, curve in result["curves"].items():
        points = [(p, a) for p, a in zip(curve["passes"], curve["test_accuracy"], strict=True) if p]
        axis.plot(*zip(*points, strict=True), marker=".", label=name, linestyle="--" if name.startswith("EKI") else "-")
    axis.set(xscale="log", xlabel="sample-forward passes", ylabel="test accuracy")
    axis.set_title(f"{result['problem']}: one budget of {result['budget']:,} forward passes", fontsize=11)
    legend(axis)
    return figure


_PALETTE = {
    "k = 1": "#9ecae1",
    "k = 2": "#3182bd",
    "k = 3": "#4292c6",
    "k = 10": "#2171b5",
    "k = 30": "#08306b",
    "momentum": "#e6550d",
    "momentum SGD": "#e6550d",
    "NAG": "#fdae6b",
    "Adam": "#31a354",
}


def _colour(name: str) -> str:
    if name.startswith("EDF-H"):
        return {"k = 1": "#bcbddc", "k = 10": "#756bb1"}.get(name.split(", ")[1], "#3f007d")
    if "undamped" in name:
        return {"k = 1": "#bdbdbd", "k = 10": "#737373"}.get(name.split(", ")[1], "#252525")
    return _PALETTE[name.split(", ")[1] if name.startswith("EDF") else name]


def _dash(name: str) -> str:
    return "--" if name.endswith("W2") else "-"


_DRAWINGS = {
    "edf convergence": _convergence,
    "edf stochastic": _stochastic,
    "edf full-vs-stochastic": _full_vs_stochastic,
    "edf harness": _harness,
}
