"""Image experiments: a table's cells, each one training run, each kept so that a table can be finished later."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import matplotlib.pyplot as plt

from benchmarks import methods
from benchmarks.paper.common import check_preset, finish, row, skipped
from benchmarks.problems import registry
from benchmarks.problems.files import MissingFile
from benchmarks.reporting import RESULTS, save_result
from eki_jax.training import fit

NAMES = {"eki": "EKI", "meki": "MEKI", "eki-r": "EKI(R)", "meki-r": "MEKI(R)", "sgd": "SGD", "msgd": "momentum SGD"}

RUNS = Path("runs/paper")  # what unfinished runs leave


class Cell(NamedTuple):
    """One training run of a table.

    Attributes:
        problem: As ``benchmarks.problems.registry.names()`` has it.
        method: As ``benchmarks.methods.METHODS`` has it.
        label: The network's name in the table.
        epochs: Passes over the training set.
        batch: Samples a step.
        particles: J of the first epoch.
        growth: Added to J after every epoch, up to ``limit``.
        limit: The largest J.
        rate: Learning rate of gradient methods.
        images: How many training images are used, and at most as many test images; None for all.
        first: The paper's accuracy after the first epoch, if it has one.
        final: The paper's final accuracy of the mean particle.
        best: The paper's final accuracy of the best particle.
        reason: Why the cell does not run in this preset; empty if it does.
    """

    problem: str
    method: str
    label: str
    epochs: int
    batch: int = 600
    particles: int = 2000
    growth: int = 0
    limit: int = 0
    rate: float = 0.1
    images: int | None = None
    first: float | None = None
    final: float | None = None
    best: float | None = None
    reason: str = ""

    @property
    def name(self) -> str:
        """As the table has it: the network and the method."""
        return f"{self.label}, {NAMES[self.method]}"

    @property
    def forward_passes(self) -> float:
        """How many forward passes of one sample through one particle the run takes, with 60,000 images for all."""
        sizes = sum(self.ensemble_size(epoch) for epoch in range(self.epochs)) if self.is_ensemble else 3 * self.epochs
        return float(sizes * (self.images or 60_000))

    @property
    def is_ensemble(self) -> bool:
        """Whether the run moves an ensemble."""
        return methods.is_ensemble(self.method)

    def ensemble_size(self, epoch: int) -> int:
        """J in an epoch, counted from 0."""
        return min(self.particles + self.growth * epoch, max(self.limit, self.particles))

    def settings(self, seed: int) -> dict[str, Any]:
        """What the run is; a run of other settings is another run."""
        known = ("problem", "method", "epochs", "batch", "images")
        chosen = {name: getattr(self, name) for name in known} | {"seed": seed}
        if self.is_ensemble:
            return chosen | {"particles": self.particles, "growth": self.growth, "limit": self.limit}
        return chosen | {"rate": self.rate}


def run_cell(cell: Cell, folder: Path, data: Path | None, seed: int) -> dict[str, Any]:
    """Train one cell, or take what an earlier run of the same settings left in ``folder``, or go on with it.

    Returns:
        The settings, the history (a dict an epoch) and the seconds.
    """
    settings, path = cell.settings(seed), _path(cell, folder, seed)
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    trained = _trained(cell, seed)
    if trained is not None:
        return trained
    problem = registry.get(cell.problem, data)
    train = tuple(array[: cell.images] for array in problem.train)
    test = problem.test if cell.images is None else tuple(array[: cell.images] for array in problem.test)
    size = cell.ensemble_size if cell.growth else cell.particles
    method = methods.get(cell.method, problem, size, cell.rate)
    # A run on all images takes minutes to hours: it leaves checkpoints, and goes on from them, for more epochs too.
    endless = {name: value for name, value in settings.items() if name != "epochs"}
    directory = RUNS / _name(endless) if cell.images is None else None
    result = fit(
        method,
        train,
        test,
        batch_size=cell.batch,
        epochs=cell.epochs,
        key=jax.random.key(seed),
        directory=directory,
        settings=endless,
        resume=directory is not None and (directory / "checkpoints").is_dir(),
        progress=False,
    )
    if result.interrupted:
        raise KeyboardInterrupt
    if directory is not None:
        shutil.rmtree(directory)
    history = result.history[: cell.epochs]
    save_result(path, {"settings": settings, "history": history, "seconds": sum(line["seconds"] for line in history)})
    return json.loads(path.read_text(encoding="utf-8"))


def run_table(
    experiment: str,
    title: str,
    cells: Callable[[str], Sequence[Cell]],
    preset: str,
    out: Path,
    data: Path | None,
    seed: int,
    only: str = "",
) -> dict[str, Any]:
    """Run a table's cells in a preset; writes ``experiment.json`` and ``experiment.png``.

    What is missing is named, not replaced. Where a run at the paper's own settings is there, the `cpu` preset shows it
    in the place of its smaller one. Every finished cell is kept under ``out/cells``, so that a table may be run
    in parts: with ``only``, cells whose name does not contain it are taken from there, or left out with the reason.
    """
    check_preset(preset)
    full = {cell.name: cell for cell in cells("full")}
    rows, runs = [], {}
    for cell in cells(preset):
        shown, paper = preset, full[cell.name]
        if preset == "cpu" and (cell == paper or _finished(paper, out / "cells", seed)):
            cell, shown = paper, "full"
        record = _record(cell, out / "cells", data, seed, only)
        if isinstance(record, str):
            lines = [skipped(cell.name, "test accuracy", cell.final, record)]
        else:
            runs[cell.name] = record
            lines = _rows(cell, record["history"])
        rows += [line | {"preset": shown} for line in lines]
    draw_epochs(out / f"{experiment}.png", runs, list(dict.fromkeys(cell.label for cell in full.values())))
    result: dict[str, Any] = {"accuracies": numbers(runs), "rows": rows}
    if not runs:
        result["skipped"] = rows[0]["note"].removeprefix("not run: ")
    details = {"runs": {name: {key: run[key] for key in ("settings", "history")} for name, run in runs.items()}}
    return finish(experiment, title, preset, seed, out, result, details)


def _record(cell: Cell, folder: Path, data: Path | None, seed: int, only: str) -> dict[str, Any] | str:
    """The cell's run, or why there is none."""
    if cell.reason:
        return cell.reason
    if only not in cell.name and not _finished(cell, folder, seed):
        return f"left out by --only; {cell.forward_passes:.1e} forward passes"
    try:
        return run_cell(cell, folder, data, seed)
    except MissingFile as error:
        return error.reason


def numbers(runs: dict[str, Any]) -> dict[str, Any]:
    """Every number of the table by "LABEL, METHOD": first, final, best particle and whole ensemble."""
    kept = ("test_accuracy_mean", "test_accuracy_best", "test_accuracy_ensemble", "forward_passes")
    return {
        name: {
            "first": record["history"][0]["test_accuracy_mean"],
            **{key: record["history"][-1][key] for key in kept},
            "seconds": round(record["seconds"], 1),
        }
        for name, record in runs.items()
    }


def draw_epochs(path: Path, runs: dict[str, Any], labels: list[str]) -> None:
    """Test accuracy of the mean particle per epoch, one panel a network."""
    shown = [label for label in labels if any(name.startswith(f"{label},") for name in runs)]
    if not shown:
        return
    figure, axes = plt.subplots(1, len(shown), figsize=(4.2 * len(shown), 3.6), squeeze=False, constrained_layout=True)
    for axis, label in zip(axes[0], shown, strict=True):
        for name, record in runs.items():
            if name.startswith(f"{label},"):
                accuracies = [line["test_accuracy_mean"] for line in record["history"]]
                axis.plot(range(1, len(accuracies) + 1), accuracies, ".-", label=name.removeprefix(f"{label}, "))
        axis.set(title=label, xlabel="epoch", ylabel="test accuracy")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _trained(cell: Cell, seed: int) -> dict[str, Any] | None:
    """The same run as ``python -m benchmarks train`` left it among the results, if there is one."""
    path = RESULTS / "train" / f"{cell.problem}-{cell.method}.json"
    if not path.is_file() or cell.images is not None or cell.growth:
        return None
    result = json.loads(path.read_text(encoding="utf-8"))
    known = {"particles": cell.particles if cell.is_ensemble else 1, "batch": cell.batch, "epochs": cell.epochs}
    known |= {"seed": seed} | ({} if cell.is_ensemble else {"learning_rate": cell.rate})
    if any(result[name] != value for name, value in known.items()):
        return None
    return {"settings": cell.settings(seed), "history": result["history"], "seconds": result["seconds"]}


def _rows(cell: Cell, history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    note = _note(cell)
    lines = [row(cell.name, "test accuracy", cell.final, history[-1]["test_accuracy_mean"], note)]
    if cell.first is not None:
        lines.insert(0, row(cell.name, "after the first epoch", cell.first, history[0]["test_accuracy_mean"], note))
    if cell.is_ensemble:
        lines.append(row(cell.name, "best particle", cell.best, history[-1]["test_accuracy_best"]))
        lines.append(row(cell.name, "whole ensemble", None, history[-1]["test_accuracy_ensemble"]))
    return lines


def _note(cell: Cell) -> str:
    epochs = f"{cell.epochs} epoch{'s' if cell.epochs > 1 else ''}, batch {cell.batch}"
    images = "" if cell.images is None else f", {cell.images} images to train, at most as many to test"
    if not cell.is_ensemble:
        return f"rate {cell.rate}, {epochs}{images}"
    sizes = f"J = {cell.particles}"
    if cell.growth:
        sizes += f" + {cell.growth} an epoch to {cell.ensemble_size(cell.epochs - 1)}"
    return f"{sizes}, {epochs}{images}"


def _path(cell: Cell, folder: Path, seed: int) -> Path:
    return folder / f"{_name(cell.settings(seed))}.json"


def _name(settings: dict[str, Any]) -> str:
    return "-".join(str(value) for value in settings.values() if value is not None)


def _finished(cell: Cell, folder: Path, seed: int) -> bool:
    return _path(cell, folder, seed).is_file() or _trained(cell, seed) is not None
