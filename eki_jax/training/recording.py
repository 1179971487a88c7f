"""What a run leaves in its folder, and the bar that a person watches meanwhile."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from eki_jax.training.checkpoints import Checkpoints

History = list[dict[str, Any]]


class Recorder:
    """Metrics, picture and checkpoints of one run.

    Args:
        directory: folder to write to; nothing is written if None.
        settings: description of the run.
        resume: flag; True goes on with what is there.
        checkpoint_every: number of epochs between checkpoints; 0 for none but the last.

    Raises:
        ValueError: ``directory`` holds a run and ``resume`` is False.
        FileNotFoundError: ``resume`` and there is nothing to go on with.
    """

    def __init__(
        self, directory: Path | str | None, settings: dict[str, Any], resume: bool, checkpoint_every: int = 1
    ) -> None:
        self._directory = None if directory is None else Path(directory)
        self._every = checkpoint_every
        self._resume = resume
        self._checkpoints: Checkpoints | None = None
        if self._directory is None:
            if resume:
                raise ValueError("directory: None with resume; wanted the folder of the run to go on with")
            return
        if resume and not (self._directory / "checkpoints").is_dir():
            raise FileNotFoundError(f"{self._directory}: no checkpoints there; wanted the folder of a run to resume")
        self._checkpoints = Checkpoints(self._directory / "checkpoints", settings)
        if not resume and self._checkpoints.latest is not None:
            self.close()
            raise ValueError(f"directory: {self._directory} holds a run already; resume it or name another folder")

    def restore(self, like: Callable[[int], Any]) -> tuple[Any, History]:
        """The last state and the history, or ``(None, [])``; ``like(epochs_done)`` gives the state's shapes."""
        if not self._resume or self._checkpoints is None:
            return None, []
        return self._checkpoints.restore(lambda history: like(len(history)))

    def save(self, state: Any, history: History, *, last: bool) -> None:
        """Write a line of metrics, the picture, and a checkpoint if one is due."""
        if self._directory is None or self._checkpoints is None:
            return
        if jax.process_index() == 0:  # of several processes one is enough; the checkpoints need them all
            lines = "".join(json.dumps(row) + "\n" for row in history)
            (self._directory / "metrics.jsonl").write_text(lines, encoding="utf-8")
            plot_accuracy(self._directory / "accuracy.png", history)
        if last or (self._every and len(history) % self._every == 0):
            self._checkpoints.save(len(history), state, history)

    def close(self) -> None:
        """Wait until everything is written."""
        if self._checkpoints is not None:
            self._checkpoints.close()


def plot_accuracy(path: Path, history: History) -> None:
    """Draw the test accuracy after every epoch; without matplotlib, draw nothing."""
    try:
        figures = importlib.import_module("matplotlib.figure")
    except ImportError:
        return
    figure = figures.Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    epochs = [row["epoch"] for row in history]
    curves = {"mean particle": "mean", "best particle": "best", "average of all outputs": "ensemble"}
    values = {label: [row[f"test_accuracy_{key}"] for row in history] for label, key in curves.items()}
    single = len({tuple(curve) for curve in values.values()}) == 1  # one particle: gradient methods
    for (label, curve), style in zip(values.items(), ("-o", "--", ":"), strict=True):
        if not (single and label != "mean particle"):
            axes.plot(epochs, curve, style, markersize=3, label="test accuracy" if single else label)
    axes.set(
        xlabel="epoch", ylabel="test accuracy", title=f"{values['mean particle'][-1]:.4f} after {epochs[-1]} epochs"
    )
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)


@contextmanager
def progress_bar(shown: bool, done: int, epochs: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A bar on standard error with the accuracy and the time left; standard output stays the caller's."""
    if not shown or jax.process_index() != 0:
        yield lambda row: None
        return
    rich = importlib.import_module("rich.progress")
    console = importlib.import_module("rich.console").Console(stderr=True)
    columns = (
        rich.TextColumn("epoch {task.completed}/{task.total}"),
        rich.BarColumn(),
        rich.TextColumn("{task.description}"),
        rich.TimeElapsedColumn(),
        rich.TextColumn("left:"),
        rich.TimeRemainingColumn(),
    )
    with rich.Progress(*columns, console=console) as bar:
        task = bar.add_task("compiling", total=epochs, completed=done)

        def show(row: dict[str, Any]) -> None:
            text = f"accuracy {row['test_accuracy_mean']:.4f}, best {row['test_accuracy_best']:.4f}"
            bar.update(task, advance=1, description=text)
            if not console.is_terminal:  # a log wants lines, not a bar that is redrawn
                console.print(f"epoch {row['epoch']}/{epochs}: {text}, {row['seconds']:.1f} s")

        yield show
