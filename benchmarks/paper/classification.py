"""Image experiments: a table's cells, each one training run, each kept so that a table can be finished later."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks import methods, precision
from benchmarks.harness import store
from benchmarks.harness.command import Refused, say
from benchmarks.harness.figures import band, legend, logarithmic, panels, save, whole_numbers
from benchmarks.harness.store import Runs, differences
from benchmarks.paper.common import Found, finish, row, skipped
from benchmarks.paper.experiments import title
from benchmarks.problems import registry
from benchmarks.problems.files import MissingFile
from benchmarks.reporting import RESULTS
from eki_jax.training import fit

NAMES = {
    "sgd": "SGD",
    "msgd": "momentum SGD",
    "eki": "EKI",
    "meki": "MEKI",
    "eki-r": "EKI(R)",
    "meki-r": "MEKI(R)",
    "natural-eki-per-sample": "natural EKI",
}

_MARKS = {"EKI": "o-", "MEKI": "s-", "EKI(R)": "^--", "MEKI(R)": "D--"}  # of the picture, where lines coincide
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
        rate: Learning rate of gradient methods, and of the natural one.
        sigma: Scale of the natural method's noise.
        images: How many training images are used, and at most as many test images; None for all.
        precision: Of an ensemble's products in training, ``"float32"`` or ``"bf16"``; tests are in float32.
        seeds: How many seeds run, one after the other from the command's.
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
    sigma: float = 0.1
    images: int | None = None
    precision: str = "float32"
    seeds: int = 1
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
        """How many forward passes of one sample through one particle a seed takes, with 60,000 images for all."""
        if self.is_ensemble:
            passes = sum(self.ensemble_size(epoch) for epoch in range(self.epochs))
        else:
            # Beside the particles the mean is evaluated, and what answers to the layers.
            passes = self.epochs * (self.particles + 2 if self.kind == "per_sample" else 3)
        return float(passes * (self.images or 60_000))

    @property
    def kind(self) -> str:
        """What the method moves."""
        return methods.METHODS[self.method].kind

    @property
    def is_ensemble(self) -> bool:
        """Whether the run moves an ensemble."""
        return self.kind == "ensemble"

    def ensemble_size(self, epoch: int) -> int:
        """J in an epoch, counted from 0."""
        return min(self.particles + self.growth * epoch, max(self.limit, self.particles))

    def settings(self, seed: int) -> dict[str, Any]:
        """What the run is; a run of other settings is another run."""
        known = ("problem", "method", "epochs", "batch", "images")
        chosen = {name: getattr(self, name) for name in known} | {"seed": seed}
        if self.is_ensemble:
            rounded = {"precision": self.precision} if self.precision != "float32" else {}
            return chosen | {"particles": self.particles, "growth": self.growth, "limit": self.limit} | rounded
        noise = {"particles": self.particles, "sigma": self.sigma} if self.kind == "per_sample" else {}
        return chosen | noise | {"rate": self.rate}


def natural_cell(problem: str, label: str, epochs: int, rate: float) -> Cell:
    """The row "natural EKI": five forward passes a sample; held-out training images have chosen its settings."""
    method = "natural-eki-per-sample"
    own = {"particles": 3, "rate": rate, "sigma": 0.05}
    return Cell(problem, method, label, epochs, batch=100, seeds=3, **own)


def costly(cell: Cell) -> Cell:
    """A cell that is not run at a size that two cores can pay for, and says what it costs."""
    return cell._replace(reason=f"in the full preset alone; {cell.forward_passes:.1e} forward passes")


def smoke(cells: Sequence[Cell], runs: Callable[[Cell], bool], **sizes: Any) -> list[Cell]:
    """Cells in sizes for tests, where those run for which ``runs`` holds."""
    reason = lambda cell: "" if runs(cell) else "not in the smoke preset"
    return [cell._replace(reason=reason(cell), **sizes) for cell in cells]


def run_cell(cell: Cell, kept: Runs, data: Path | None, seed: int) -> dict[str, Any]:
    """Train one cell, or take what an earlier run of the same settings left, or go on with it.

    Returns:
        The settings, the history (a dict an epoch) and the seconds.
    """
    found = kept_run(cell, kept, seed)
    if found is not None:
        return found
    settings = cell.settings(seed)
    problem = registry.get(cell.problem, data)
    train = tuple(array[: cell.images] for array in problem.train)
    test = problem.test if cell.images is None else tuple(array[: cell.images] for array in problem.test)
    size = cell.ensemble_size if cell.growth else cell.particles
    natural = methods.Natural(sigma=cell.sigma)
    method = methods.get(cell.method, problem, size, cell.rate, settings=natural, precision=cell.precision)
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
    history = result.history[: cell.epochs]
    record = {"settings": settings, "history": history, "seconds": sum(line["seconds"] for line in history)}
    found = kept.keep(_name(settings), record)
    if directory is not None:
        shutil.rmtree(directory)
    return found


def run_table(
    experiment: str,
    cells: Callable[[str], Sequence[Cell]],
    preset: str,
    out: Path,
    data: Path | None,
    seed: int,
    only: str | None = "",
    asked: str = "float32",
) -> dict[str, Any]:
    """Run a table's cells in a preset; writes ``experiment.jsonl``.

    What is missing is named, not replaced. Where a run at the paper's own settings is there, the `cpu` preset shows it
    in the place of its smaller one. Every finished run is kept in the file at once, so that a table may be run
    in parts: with ``only``, cells whose name does not contain it (with None, all of them) are taken from there or from
    the other tables in the folder, or of a result with the same seed, or left out with the reason. Ensembles are
    trained in the precision that is ``asked`` for, one of ``precision.CHOICES``; with ``"auto"`` those on all images,
    of which no run is kept, in the one that this machine is faster in. Of runs in both, float32's is shown.

    Raises:
        Refused: A cell of the earlier table is not run, and cannot be kept, as its seed is another; or nothing is run.
    """
    path, full = out / f"{experiment}.jsonl", {cell.name: cell for cell in cells("full")}
    before = _Table(store.earlier(path, experiment=experiment) or {}, seed)
    if only != "" and before.is_of_another_seed:
        raise Refused(f"{path}: has seed {before.seed}, not {seed}; name another folder by --out, or leave out --only")
    others = [store.read(other).get(store.RUNS, {}) for other in out.glob("*.jsonl") if other != path]
    kept = Runs(path, others={name: run for runs in others for name, run in runs.items()})
    rows, runs, accuracies, is_new, choice = [], {}, {}, False, _Choice(asked)
    for cell in cells(preset):
        paper, wanted = full[cell.name], only is not None and only in cell.name
        is_own = cell == paper
        if preset == "cpu" and not is_own and kept_run(_as_kept(paper, kept, seed), kept, seed):
            cell, is_own, wanted = paper, True, False
        if wanted:
            asked_for = choice.of(cell, kept, data, seed)
            _records(asked_for, kept, data, seed, wanted)
        cell = _as_kept(cell, kept, seed)
        wanted = wanted and cell == asked_for
        shown = "full" if preset == "cpu" and is_own else preset
        records = None if before.is_larger(cell.name, shown) else _records(cell, kept, data, seed, wanted)
        if isinstance(records, list) and len(records) >= before.seeds(cell.name, shown, wanted):
            is_new, runs[cell.name] = True, records
            accuracies |= numbers({cell.name: records})
            histories = [record["history"] for record in records]
            rows += [line | {"preset": shown} for line in _rows(cell, histories, _beside(cell, kept, seed))]
        elif cell.name in before.runs:
            runs[cell.name], accuracies[cell.name] = before.runs[cell.name], before.accuracies[cell.name]
            rows += before.rows(cell.name)
        else:
            rows.append(skipped(cell.name, "test accuracy", cell.final, str(records)) | {"preset": shown})
    if before.runs and not is_new:
        raise Refused(f"{path}: left as it is; nothing was run ({rows[0]['note'] or 'a larger run is there'})")
    result: dict[str, Any] = {"accuracies": accuracies, "rows": rows}
    shown = {_name(record["settings"]): record for records in runs.values() for record in records}
    details = {
        "shown": {name: [_name(record["settings"]) for record in records] for name, records in runs.items()},
        store.RUNS: {**kept.all, **shown},
    }
    return finish(experiment, preset, seed, out, Found(result, details))


def shown_runs(result: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The runs that a table shows, by the cells' names, one a seed."""
    return {name: [result[store.RUNS][run] for run in runs] for name, runs in result.get("shown", {}).items()}


def draw(result: dict[str, Any], path: Path, cells: Callable[[str], Sequence[Cell]]) -> None:
    """The picture of a table's result, see :func:`draw_epochs`."""
    labels = list(dict.fromkeys(cell.label for cell in cells("full")))
    draw_epochs(path, shown_runs(result), labels, title(result["experiment"]))


class _Choice:
    """In which precision cells run: as asked, or those on all images in the one that this machine is faster in."""

    def __init__(self, asked: str) -> None:
        self._asked, self._found = asked, {}

    def of(self, cell: Cell, kept: Runs, data: Path | None, seed: int) -> Cell:
        """The cell as it is to run: where any will do, in the precision in which it has run already."""
        if not cell.is_ensemble or cell.reason:
            return cell
        if self._asked != "auto":
            return cell._replace(precision=self._asked)
        found = _as_kept(cell, kept, seed)
        if cell.images is not None or kept_run(found, kept, seed):
            return found
        try:
            return cell._replace(precision=self._of_machine(cell, data).name)
        except MissingFile:  # which the run will say
            return found

    def _of_machine(self, cell: Cell, data: Path | None) -> precision.Choice:
        if cell.problem not in self._found:
            found = precision.choose("auto", cell.method, registry.get(cell.problem, data))
            say(f"{cell.problem}: precision {found.name} ({found.why})")
            self._found[cell.problem] = found
        return self._found[cell.problem]


def _as_kept(cell: Cell, kept: Runs, seed: int) -> Cell:
    """The cell in the precision in which it has run, float32 of both; as it is where it has not."""
    found = (cell._replace(precision=name) for name in precision.NAMES if cell.is_ensemble)
    return next((other for other in found if kept_run(other, kept, seed)), cell)


def _beside(cell: Cell, kept: Runs, seed: int) -> str:
    """What the same run came to in the other precision, for a note; empty where there is none."""
    others = (cell._replace(precision=name) for name in precision.NAMES if cell.is_ensemble and name != cell.precision)
    runs = ((other, kept_run(other, kept, seed)) for other in others)
    return "".join(f"; in {o.precision} {r['history'][-1]['test_accuracy_mean']:.4f}" for o, r in runs if r)


class _Table:
    """What an earlier run of a table left: its runs count for a run with the same seed."""

    def __init__(self, result: dict[str, Any], seed: int) -> None:
        self.seed = result.get("seed", seed)
        self.is_of_another_seed = self.seed != seed
        self._rows = [] if self.is_of_another_seed else result.get("rows", [])
        self.runs = {} if self.is_of_another_seed else shown_runs(result)
        self.accuracies = result.get("accuracies", {})

    def rows(self, name: str) -> list[dict[str, Any]]:
        """The lines of a cell; a cell's name is the beginning of none of another's."""
        return [line for line in self._rows if line["name"] == name]

    def seeds(self, name: str, preset: str, wanted: bool) -> int:
        """How many seeds a cell has there, of which a run that does not want the cell must not show fewer.

        None count of a smaller preset: one run at the paper's settings is worth more than three shorter ones.
        """
        return 0 if wanted or self._rank(name) < store.RANKS[preset] else len(self.runs.get(name, []))

    def is_larger(self, name: str, preset: str) -> bool:
        """Whether the cell was run there in a larger preset."""
        return self._rank(name) > store.RANKS[preset]

    def _rank(self, name: str) -> int:
        """The rank of the preset in which the cell was run there; below all of them where it was not."""
        rows = self.rows(name) if name in self.runs else []
        return max((store.RANKS[line.get("preset", "smoke")] for line in rows), default=-1)


def _records(cell: Cell, kept: Runs, data: Path | None, seed: int, wanted: bool) -> list[dict[str, Any]] | str:
    """The cell's runs, one a seed, or why there is none; of a cell that is not ``wanted``, those that are finished."""
    if cell.reason:
        return cell.reason
    try:
        seeds = range(seed, seed + cell.seeds)
        if wanted:
            return [run_cell(cell, kept, data, one) for one in seeds]
        finished = [found for one in seeds if (found := kept_run(cell, kept, one))]
    except MissingFile as error:
        return error.reason
    return finished or f"left out by --only; {cell.forward_passes:.1e} forward passes"


def numbers(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Every number of the table by "LABEL, METHOD", medians over seeds: first, final, best particle, whole ensemble."""
    kept = ("test_accuracy_mean", "test_accuracy_best", "test_accuracy_ensemble", "forward_passes")
    return {
        name: {
            "seeds": len(records),
            "first": _median([record["history"][0]["test_accuracy_mean"] for record in records]),
            **{key: _median([record["history"][-1][key] for record in records]) for key in kept},
            "seconds": round(sum(record["seconds"] for record in records), 1),
        }
        for name, records in runs.items()
    }


def _median(values: list[float | None]) -> float | None:
    """None for what a gradient method does not have."""
    return None if None in values else float(np.median(values))


def draw_epochs(path: Path, runs: dict[str, list[dict[str, Any]]], labels: list[str], heading: str = "") -> None:
    """Test accuracy of the mean particle per epoch, one panel a network: mean of the seeds, and their range.

    Each panel says the sizes of its ensembles. Epochs are on a logarithmic axis where some runs are much shorter than
    others; networks that did not run are named.
    """
    shown = [label for label in labels if any(name.startswith(f"{label},") for name in runs)]
    if not shown:
        return
    lengths = [len(record["history"]) for records in runs.values() for record in records]
    is_mixed, ticks = max(lengths) >= 5 * min(lengths), [1, 2, 3, 5, 10, 20, 30, 50, 100, 200]
    figure, axes = panels(1, len(shown), (max(4.2 * len(shown), 6.0), 4))
    missing = [label for label in labels if label not in shown]
    notes = [heading] * bool(heading) + [f"not run: {', '.join(missing)}"] * bool(missing)
    figure.suptitle("\n".join(notes), fontsize=10)
    for axis, label in zip(axes[0], shown, strict=True):
        for name, records in runs.items():
            if name.startswith(f"{label},"):
                seeds = np.array([[line["test_accuracy_mean"] for line in record["history"]] for record in records])
                epochs, method = np.arange(1, seeds.shape[1] + 1), name.removeprefix(f"{label}, ")
                style = {"alpha": 0.25, "marks": _MARKS.get(method, ".-"), "label": method, "markersize": 5}
                band(axis, epochs, seeds.min(0), seeds.mean(0), seeds.max(0), **style)
        axis.set(xlabel="epoch", ylabel="test accuracy")
        of_panel = [record for name, records in runs.items() if name.startswith(f"{label},") for record in records]
        axis.set_title("\n".join(filter(None, (label, _sizes(of_panel)))), fontsize=10)
        if is_mixed:
            logarithmic(axis)
            axis.set_xlim(0.92, 1.08 * max(lengths))
            axis.set_xticks([tick for tick in ticks if tick <= max(lengths)], minor=False)
            axis.xaxis.set_major_formatter("{x:.0f}")
        else:
            whole_numbers(axis)
        legend(axis)
    save(figure, path)


def _sizes(records: list[dict[str, Any]]) -> str:
    """J of the ensembles among some runs, and their images where these are not all.

    >>> _sizes([{"settings": {"particles": 50, "growth": 50, "limit": 200, "epochs": 9, "images": 2000}}])
    'J = 50 to 200, 2,000 images'
    """
    found = {}
    for of in (record["settings"] for record in records if "growth" in record["settings"]):
        first, images = of["particles"], of["images"]
        last = min(first + of["growth"] * (of["epochs"] - 1), max(of["limit"], first))
        sizes = f"J = {first}" if last == first else f"J = {first} to {last}"
        found[sizes if images is None else f"{sizes}, {images:,} images"] = True
    return "; ".join(found)


def kept_run(cell: Cell, kept: Runs, seed: int) -> dict[str, Any] | None:
    """The run as an earlier one left it, or as the training command left it among the results."""
    settings = cell.settings(seed)

    def trouble(record: dict[str, Any]) -> str:
        if len(record["history"]) != cell.epochs or not all("test_accuracy_mean" in line for line in record["history"]):
            return f"history: {len(record['history'])} epochs, wanted {cell.epochs} with their accuracies"
        return differences(record, {"settings": settings}) or "seconds"[: 0 if "seconds" in record else None]

    return kept.find(_name(settings), trouble) or _trained(cell, seed)


def _trained(cell: Cell, seed: int) -> dict[str, Any] | None:
    """The same run as ``python -m benchmarks train`` left it among the results, if there is one."""
    path = RESULTS / "train.jsonl"
    if not path.is_file() or cell.images is not None or cell.growth:
        return None
    result = store.result(path, "remove it")[store.RUNS].get(f"{cell.problem}-{cell.method}", {})
    known = {"particles": cell.particles if cell.is_ensemble else 1, "batch": cell.batch, "epochs": cell.epochs}
    known |= {"seed": seed} | ({} if cell.is_ensemble else {"learning_rate": cell.rate})
    if differences(result, known) or result.get("precision", "float32") != cell.precision:
        return None
    kept = ("history", "seconds", "environment")
    return {"settings": cell.settings(seed), **{name: result[name] for name in kept if name in result}}


def _rows(cell: Cell, histories: list[list[dict[str, Any]]], beside: str) -> list[dict[str, Any]]:
    """The cell's lines of the table, from one history a seed; the first says what is beside them."""
    last = lambda kind: [history[-1][f"test_accuracy_{kind}"] for history in histories]
    note = _note(cell) + beside
    lines = [row(cell.name, "test accuracy", cell.final, last("mean"), note)]
    if cell.first is not None:
        first = [history[0]["test_accuracy_mean"] for history in histories]
        lines.insert(0, row(cell.name, "after the first epoch", cell.first, first, note))
    if cell.is_ensemble:
        lines.append(row(cell.name, "best particle", cell.best, last("best")))
        lines.append(row(cell.name, "whole ensemble", None, last("ensemble")))
    return lines


def _note(cell: Cell) -> str:
    epochs = f"{cell.epochs} epoch{'s' if cell.epochs > 1 else ''}, batch {cell.batch}"
    images = "" if cell.images is None else f", {cell.images} images to train, at most as many to test"
    if cell.kind == "per_sample":
        sizes = f"J = {cell.particles} with noise per sample, {cell.forward_passes:.2g} forward passes"
        return f"{sizes}, rate {cell.rate}, {epochs}{images}"
    if not cell.is_ensemble:
        return f"rate {cell.rate}, {epochs}{images}"
    sizes = f"J = {cell.particles}"
    if cell.growth:
        sizes += f" + {cell.growth} an epoch to {cell.ensemble_size(cell.epochs - 1)}"
    return f"{sizes}, {epochs}{images}" + (f", {cell.precision}" if cell.precision != "float32" else "")


def _name(settings: dict[str, Any]) -> str:
    return "-".join(str(value) for value in settings.values() if value is not None)
