"""Figures of what particles do: dense networks trained epoch by epoch with a look at the ensemble in between.

Every network's run is kept by itself, and goes on from its checkpoints where it was stopped.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import methods, precision
from benchmarks.harness import store
from benchmarks.harness.command import say
from benchmarks.harness.store import Runs, differences
from benchmarks.paper.classification import RUNS
from benchmarks.paper.common import Found, finish, skipped
from benchmarks.problems import registry
from benchmarks.problems.files import MissingFile
from benchmarks.problems.registry import Problem
from eki_jax.training import Checkpoints, Method, abstract, epoch

Seen = dict[str, np.ndarray]
Look = Callable[[Any, jax.Array], dict[str, jax.Array]]


class Size(NamedTuple):
    """A run: number of particles, samples a step, passes over the images, and number of images, or None for all."""

    particles: int
    batch: int
    epochs: int
    images: int | None = None

    def note(self, name: str) -> str:
        """What the table says of it in a precision by name."""
        images = "" if self.images is None else f", {self.images} images"
        rounded = "" if name == "float32" else f", {name}"
        return f"J = {self.particles}, {self.epochs} epochs, batch {self.batch}{images}{rounded}"


_OWN = Size(2000, 600, 20)  # the paper's


def sizes(epochs: int) -> dict[str, dict[str, Size]]:
    """Sizes by preset and network's label; ``cpu`` has DNN 2 smaller, with so many epochs."""
    return {
        "smoke": {"DNN 1": Size(8, 50, 2, 100)},
        "cpu": {"DNN 1": _OWN, "DNN 2": Size(300, 600, epochs, 20_000)},
        "full": {"DNN 1": _OWN, "DNN 2": _OWN},
    }


class Figure(NamedTuple):
    """A figure of what an ensemble does from epoch to epoch.

    Attributes:
        method: What moves the ensemble, as ``benchmarks.methods.METHODS`` has it.
        sizes: Sizes by preset and network's label.
        look: Function of a method and a problem; that returns a function of a state and a key, whose dictionary of
            arrays is what there is to see after an epoch, before a method that redraws does so.
        rows: Function of a network's label, what was seen, an array with an entry an epoch by name, and a note; the
            lines of the table.
        key: Name of what the result says of every network.
        says: Function of what was seen that returns it.
    """

    method: str
    sizes: dict[str, dict[str, Size]]
    look: Callable[[Method, Problem], Look]
    rows: Callable[[str, Seen, str], list[dict[str, Any]]]
    key: str
    says: Callable[[Seen], dict[str, float]]


class _Run(NamedTuple):
    """One network's run: its settings are those of the record that is kept of it."""

    method: str
    label: str
    size: Size
    seed: int
    precision: str = "float32"

    @property
    def settings(self) -> dict[str, Any]:
        return {"method": self.method, "label": self.label, **self.size._asdict(), "seed": self.seed} | (
            {} if self.precision == "float32" else {"precision": self.precision}
        )

    @property
    def name(self) -> str:
        return "-".join(str(value).replace(" ", "") for value in self.settings.values() if value is not None)

    def kept(self, runs: Runs) -> dict[str, Any] | None:
        return runs.find(self.name, lambda record: differences(record, {"settings": self.settings}) or _cut(record))


def run(experiment: str, figure: Figure, preset: str, out: Path, data: Path | None, seed: int, asked: str) -> None:
    """Train the networks of a figure on MNIST, and write ``experiment.jsonl``.

    Where a run at the paper's own settings is kept, the `cpu` preset shows it in the place of its smaller one. The
    ensembles are trained in the precision that is ``asked`` for, one of ``precision.CHOICES``; with ``"auto"`` those on
    all images, of which no run is kept, in the one that this machine is faster in. Of runs in both, float32's is shown.
    """
    kept = Runs(out / f"{experiment}.jsonl")
    rows, shown, says = [], {}, {}
    for label, size in figure.sizes[preset].items():
        own = figure.sizes["full"].get(label)
        wanted = _Run(figure.method, label, size, seed)
        if preset == "cpu" and own is not None and any(_in_both(wanted._replace(size=own), kept)):
            wanted = wanted._replace(size=own)
        try:
            chosen, record = _record(wanted, figure, kept, data, asked)
        except MissingFile as error:
            rows.append(skipped(label, "accuracy", None, error.reason))
            continue
        seen = shown_seen(record)
        made = figure.rows(label, seen, wanted.size.note(chosen.precision))
        rows += [line | {"preset": "full" if wanted.size == own else preset} for line in made]
        shown[label], says[label] = [chosen.name], figure.says(seen)
    details = {"shown": shown, store.RUNS: kept.all}
    finish(experiment, preset, seed, out, Found({figure.key: says, "rows": rows}, details))


def shown_seen(record: dict[str, Any]) -> Seen:
    """What was seen in a run that is kept, as arrays."""
    return {name: np.asarray(values) for name, values in record["seen"].items()}


def _cut(record: dict[str, Any]) -> str:
    lengths = {name: len(values) for name, values in record["seen"].items()}
    epochs = record["settings"]["epochs"]
    return "" if set(lengths.values()) == {epochs} else f"seen: {lengths}, wanted {epochs} epochs of each"


def _in_both(of: _Run, kept: Runs) -> Iterator[_Run]:
    """The run in every precision in which it is kept, float32 first."""
    return (other for name in precision.NAMES if (other := of._replace(precision=name)).kept(kept))


def _record(wanted: _Run, figure: Figure, kept: Runs, data: Path | None, asked: str) -> tuple[_Run, dict[str, Any]]:
    """The run as it is kept, or else made now; in the precision that is asked for."""
    if asked != "auto":
        wanted = wanted._replace(precision=asked)
    found = next(_in_both(wanted, kept), wanted) if asked == "auto" else wanted
    record = found.kept(kept)
    if record is not None:
        return found, record
    problem = registry.get("mnist-" + wanted.label.lower().replace(" ", ""), data)
    if asked == "auto" and wanted.size.images is None:
        choice = precision.choose("auto", wanted.method, problem)
        say(f"{problem.name}: precision {choice.name} ({choice.why})")
        found = wanted._replace(precision=choice.name)
    problem = problem._replace(train=tuple(array[: found.size.images] for array in problem.train))
    seen, seconds = _epochs(found, figure, problem)
    record = {"settings": found.settings, "seen": seen, "seconds": seconds}
    return found, kept.keep(found.name, record)


def _epochs(run: _Run, figure: Figure, problem: Problem) -> tuple[Seen, float]:
    """What there was to see after every epoch, and the seconds."""
    size, key = run.size, jax.random.key(run.seed)
    method = methods.get(run.method, problem, size.particles, precision=run.precision)
    x, labels = jax.device_put(problem.train)
    advance, see = jax.jit(epoch(method, size.batch), donate_argnums=0), jax.jit(figure.look(method, problem))
    init = jax.jit(method.init)
    directory = RUNS / run.name if size.images is None else None  # of what takes an hour
    checkpoints = None if directory is None else Checkpoints(directory, run.settings)
    state, every, seconds = None, [], 0.0
    if checkpoints is not None and checkpoints.latest is not None:
        like = {"state": abstract(init, key), "seen": jax.eval_shape(see, jax.eval_shape(init, key), key)}
        many = lambda notes: jax.tree.map(lambda leaf: jnp.zeros((notes["epochs"], *leaf.shape)), like["seen"])
        restored, notes = checkpoints.restore(lambda notes: {**like, "seen": many(notes)})
        state, seconds = restored["state"], notes["seconds"]
        every = [jax.tree.map(lambda leaf, i=i: np.asarray(leaf[i]), restored["seen"]) for i in range(notes["epochs"])]
        say(f"{run.label}: going on after epoch {len(every)}")
    if state is None:
        state = init(jax.random.fold_in(key, 0))
    for index in range(len(every), size.epochs):
        started = time.perf_counter()
        epoch_key, look_key, redraw_key = jax.random.split(jax.random.fold_in(key, index + 1), 3)
        state, _ = advance(state, epoch_key, x, labels)
        every.append(jax.tree.map(np.asarray, see(state, look_key)))
        if method.redraw is not None:
            state = method.redraw(state, redraw_key, method.ensemble_size(index))
        seconds += time.perf_counter() - started
        if checkpoints is not None:
            seen = jax.tree.map(lambda *values: jnp.stack(values), *every)
            checkpoints.save(index + 1, {"state": state, "seen": seen}, {"epochs": index + 1, "seconds": seconds})
    if checkpoints is not None:
        checkpoints.close()
        shutil.rmtree(directory)
    return jax.tree.map(lambda *values: np.stack(values), *every), seconds
