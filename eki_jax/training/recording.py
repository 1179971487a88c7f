"""What a run leaves in its folder, and the bar that a person watches meanwhile."""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from eki_jax._checks import whole
from eki_jax.training.checkpoints import Checkpoints
from eki_jax.training.files import claimed, replacing, write_text

History = list[dict[str, Any]]
SETTINGS = "settings.json"


class Recorder:
    """Settings, metrics, picture and checkpoints of one run; a context that holds its folder against other processes.

    Args:
        directory: folder to write to; nothing is written if None.
        settings: description of the run.
        resume: flag; True goes on with what is there.
        checkpoint_every: number of epochs between checkpoints; 0 for none but the last.

    Raises:
        InUse: another process writes to ``directory``.
        ValueError: ``directory`` holds a checkpoint and ``resume`` is False.
        FileNotFoundError: ``resume`` and there is no run.
    """

    def __init__(
        self, directory: Path | str | None, settings: dict[str, Any], resume: bool, checkpoint_every: int = 1
    ) -> None:
        self._directory = None if directory is None else Path(directory)
        self._settings = settings
        self._every = whole("checkpoint_every", checkpoint_every, 0)
        self._resume = resume
        self._checkpoints: Checkpoints | None = None
        self._held = contextlib.ExitStack()
        if self._directory is None and resume:
            raise ValueError("directory: None with resume; wanted the folder of the run to go on with")

    def __enter__(self) -> Recorder:
        if self._directory is None:
            return self
        begun = any((self._directory / name).exists() for name in (SETTINGS, "checkpoints"))
        if self._resume and not begun:
            raise FileNotFoundError(f"{self._directory}: no checkpoints there; wanted the folder of a run to resume")
        with self._held as held:
            if jax.process_index() == 0:
                held.enter_context(claimed(self._directory))
            self._checkpoints = Checkpoints(self._directory / "checkpoints", self._settings)
            held.callback(self._checkpoints.close)  # waits until everything is written
            if not self._resume and self._checkpoints.latest is not None:
                raise ValueError(f"directory: {self._directory} holds a run already; resume it or name another folder")
            self._held = held.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._held.close()

    def restore(self, like: Callable[[int], Any]) -> tuple[Any, History]:
        """The last state and the history, or ``(None, [])``; ``like(epochs_done)`` gives the state's shapes."""
        if not self._resume or self._checkpoints is None:
            return None, []
        if self._checkpoints.latest is None:
            warnings.warn(f"{self._directory}: no checkpoint yet; the run begins anew", stacklevel=3)
            return None, []
        return self._checkpoints.restore(lambda history: like(len(history)))

    def begin(self, epochs: int) -> None:
        """Write down what the run is and how far it is to go, once it is known to be possible."""
        if self._directory is not None and jax.process_index() == 0:
            text = json.dumps({**self._settings, "epochs": epochs}, indent=1)
            write_text(self._directory / SETTINGS, text + "\n")

    def save(self, state: Any, history: History, *, last: bool) -> None:
        """Write a line of metrics, the picture, and a checkpoint if one is due."""
        if self._directory is None or self._checkpoints is None:
            return
        if jax.process_index() == 0:  # of several processes one is enough; the checkpoints need them all
            write_text(self._directory / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in history))
            plot_accuracy(self._directory / "accuracy.png", history)
        if last or (self._every and len(history) % self._every == 0):
            self._checkpoints.save(len(history), state, history)


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
    with replacing(path) as new:
        figure.savefig(new, dpi=120, format="png")


@contextlib.contextmanager
def progress_bar(shown: bool, done: int, epochs: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A bar on standard error with the accuracy and the time left; standard output stays the caller's."""
    if not shown or jax.process_index() != 0:
        yield lambda row: None
        return
    try:
        rich = importlib.import_module("rich.progress")
        console = importlib.import_module("rich.console").Console(stderr=True)
    except ImportError:  # lines do for a bar
        yield lambda row: print(_line(row, epochs), file=sys.stderr, flush=True)
        return
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
            bar.update(task, advance=1, description=_reached(row))
            if not console.is_terminal:  # a log wants lines, not a bar that is redrawn
                console.print(_line(row, epochs))

        yield show


def _reached(row: dict[str, Any]) -> str:
    return f"accuracy {row['test_accuracy_mean']:.4f}, best {row['test_accuracy_best']:.4f}"


def _line(row: dict[str, Any], epochs: int) -> str:
    return f"epoch {row['epoch']}/{epochs}: {_reached(row)}, {row['seconds']:.1f} s"
