"""The slides' sequences of length 100, 200 and 300: what is learned of how many different examples.

The slides do not name the problem. Taken here is the adding problem; beside it, with the methods that are best at that,
the copying problem and digits whose pixels come one at a time. What is found:

* a run has a number of different examples, drawn once, or new ones at every step;
* its error is that of examples that it has not seen, the same ones for all;
* one setting of each method is chosen from a grid, for every network and length, by a seed and by examples of its own.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.harness.figures import band, legend_below, logarithmic, pairs, save
from benchmarks.harness.store import UNFINISHED, Cells
from benchmarks.paper.common import Found, finish, row, skipped
from benchmarks.paper.memory.learners import METHODS, NOISY, compiled, follow
from benchmarks.paper.memory.networks import KINDS, build
from benchmarks.paper.memory.tasks import REPORTED, TASKS, TUNING
from benchmarks.problems.files import MissingFile

TITLE = "Long memory: the adding problem at T = 100, 200, 300 (figure of the slides), copying, permuted digits"
ENOUGH = 0.01  # error of a problem that is solved
SOLVED = ("adding", "copying")  # those that can be
TUNING_SEED = 1000
LENGTHS = (100, 200, 300)
FEW = (100, 50, 200)  # numbers of different examples
STRINGS = (100, 30)  # of the copying problem, which has 64
IMAGES = {"cpu": (196, 10_000), "full": (784, 50_000)}  # length and number of different examples
DRAWN = (None, 100, *(count for _, count in IMAGES.values()))  # of which the picture has curves by passes
OF_IMAGES = {"natural": 5e6, "per-sample": 1e6, "adam": 1e6}  # budgets
# Forward passes of an example, a gradient counted as three: fifty steps on all of a hundred, or thousands on a few.
BUDGETS = {method: 6e5 if METHODS[method].is_small else 2e6 for method in METHODS}
SLOW = "per-sample"  # a step has noise at every place of a sequence


class Cell(NamedTuple):
    """A method on a network and a problem.

    Attributes:
        task: problem, of :data:`TASKS`.
        length: its length T.
        kind: network, of :data:`KINDS`.
        method: method, of :data:`METHODS`.
        examples: number of different examples; None for new ones at every step.
        passes: budget of forward passes of an example.
        points: number of measurements.
        seeds: number of seeds.
    """

    task: str
    length: int
    kind: str
    method: str
    examples: int | None
    passes: float
    points: int = 20
    seeds: int = 5

    @property
    def name(self) -> str:
        """What it is, as the table has it."""
        of = "new examples" if self.examples is None else f"{self.examples} examples"
        return f"{self.task}, T = {self.length}, {KINDS[self.kind].label}, {METHODS[self.method].label}, {of}"


def cells(preset: str) -> list[Cell]:
    """The cells of a preset; in ``cpu`` networks without gates and the slow method have the shortest length alone."""
    if preset == "smoke":
        small = {"passes": 40_000, "points": 2, "seeds": 2}
        pairs = [("lstm", "natural", 20), ("tanh", "eki-r", 10), ("lstm", "adam", None)]
        adding = [Cell("adding", 10, kind, method, few, **small) for kind, method, few in pairs]
        return [*adding, Cell("permuted digits", 64, "lstm", "adam", 100, **small)]
    found = []
    for length in LENGTHS:
        found += [Cell("adding", length, "lstm", "natural", few, BUDGETS["natural"] * few / 100) for few in FEW]
        found += [Cell("adding", length, "lstm", "adam", few, BUDGETS["adam"]) for few in (*FEW, None)]
        found += [Cell("adding", length, "lstm", "sgd", few, BUDGETS["sgd"]) for few in (100, None)]
    for length in LENGTHS:
        found += [Cell("adding", length, "lstm", method, 100, BUDGETS[method]) for method in ("eki", "eki-r")]
    some = LENGTHS if preset == "full" else LENGTHS[:1]
    for length in some:
        for few in STRINGS:
            found += [Cell("copying", length, "lstm", method, few, BUDGETS[method]) for method in ("natural", "adam")]
    length, images = IMAGES[preset]
    for method, passes in OF_IMAGES.items():
        found.append(Cell("permuted digits", length, "lstm", method, images, passes, points=10, seeds=3))
    for length in some:
        found.append(Cell("adding", length, "lstm", SLOW, 100, BUDGETS[SLOW]))
        for kind in KINDS:
            if kind != "lstm":
                found += [Cell("adding", length, kind, method, 100, budget) for method, budget in BUDGETS.items()]
    return found


def run(preset: str, out: Path, data: Path | None, seed: int, only: str = "") -> dict[str, Any]:
    """Writes ``long-memory.jsonl``."""
    command = f"python -m benchmarks paper long-memory --preset {preset} --seed {seed}"
    head = {"experiment": "long-memory", "preset": preset, "seed": seed, "command": command}
    store = Cells(out / "long-memory.jsonl", head, keep=True, part=bool(only))
    missing = []
    for cell in cells(preset):
        if only in cell.name:
            try:
                best = _best(store, cell, data)
                seeds = list(range(seed, seed + cell.seeds))
                _get(store, cell.name, cell, best, data, seeds=seeds, test=REPORTED)
            except MissingFile as error:
                missing.append(skipped(cell.name, "test error", None, error.reason))
    store.part = bool(only or missing)
    details = {key: value for key, value in store.finish().items() if key in ("cells", UNFINISHED)}
    found = details["cells"]
    reported = {cell.name: found[cell.name] for cell in cells(preset) if cell.name in found}
    rows = _rows(reported) + [line for line in missing if line["name"] not in reported]
    return finish("long-memory", preset, seed, out, Found({"rows": rows}, details))


def _best(store: Cells, cell: Cell, data: Path | None) -> float:
    """The setting with the least error at the end of a run on half of the budget, with a seed that is not reported."""
    method, errors = METHODS[cell.method], {}
    for value in method.values:
        half = cell._replace(passes=cell.passes / 2, points=1)
        name = f"{cell.name}, {method.setting} {value:g}"
        found = _get(store, name, half, value, data, seeds=[TUNING_SEED], test=TUNING)
        error = found["rows"][0]["errors"][-1]
        errors[value] = np.inf if error is None or np.isnan(error) else error
    return min(errors, key=lambda value: errors[value])


def _get(
    store: Cells, name: str, cell: Cell, value: float, data: Path | None, *, seeds: list[int], test: int
) -> dict[str, Any]:
    settings = cell._asdict() | {METHODS[cell.method].setting: value, "seeds": seeds, "test": test}
    if cell.method == SLOW:
        settings["particles"] = NOISY

    def measure() -> dict[str, Any]:
        followed, task = _compiled(cell.task, cell.length, cell.kind, cell.method, cell.examples, data)
        return {"rows": follow(followed, task, settings, value)}

    return store.get(name, settings, measure)


@functools.lru_cache(maxsize=1)  # the runs of one cell, one after the other
def _compiled(task: str, length: int, kind: str, method: str, examples: int | None, data: Path | None) -> Any:
    problem = TASKS[task](length, data)
    network = build(kind, problem, length)
    return compiled(network, problem, METHODS[method], examples), problem


def _last(cell: dict[str, Any]) -> list[float]:
    return [_number(row["errors"][-1]) for row in cell["found"]["rows"]]


def _number(error: float | None) -> float:
    """An error as it is stored: None is one that was not finite."""
    return np.inf if error is None else error


def needed(cell: dict[str, Any]) -> float | None:
    """The number of different examples after which the median of the seeds' errors is small; None where it never is."""
    rows = cell["found"]["rows"]
    middle = np.median([[_number(error) for error in row["errors"]] for row in rows], axis=0)
    below = np.flatnonzero(middle < ENOUGH)
    return float(rows[0]["examples"][below[0]]) if len(below) else None


def _rows(reported: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The table: every cell's error, and of every method on every network the least number of examples."""
    rows, least = [], {}
    for name, cell in reported.items():
        settings = cell["settings"]
        setting = METHODS[settings["method"]].setting
        note = f"{cell['found']['rows'][0]['passes'][-1]:.2g} forward passes, {setting} {settings[setting]:g}"
        rows.append(row(name, "test error", None, _last(cell), note))
        group = ", ".join(name.split(", ")[:-1]) + (", new examples" if settings["examples"] is None else "")
        if settings["task"] not in SOLVED:
            continue
        count = needed(cell)
        least[group] = min(filter(None, (least.get(group), count)), default=None)
    for group, count in least.items():
        note = "" if count else "none of those that were tried"
        rows.append(row(group, f"different examples to a median error below {ENOUGH:g}", None, count, note))
    return rows


def draw(result: dict[str, Any], path: Path) -> None:
    """Test error against forward passes, a panel a network and length, and against the number of examples."""
    by: dict[str, list[dict[str, Any]]] = {}
    for cell in result["cells"].values():
        of = cell["settings"]
        if of["seeds"] != [TUNING_SEED]:
            by.setdefault(f"{of['task']}, T = {of['length']}, {KINDS[of['kind']].label}", []).append(cell)
    by = dict(sorted(by.items(), key=lambda item: _order(item[1][0]["settings"])))
    figure, below = pairs(len(by), (4.4, 6.4))
    for (where, cells), pair in zip(by.items(), below, strict=True):
        for axis, key in zip(pair, ("passes", "examples"), strict=True):
            for cell in cells:
                _line(axis, cell, key)
            if cells[0]["settings"]["task"] in SOLVED:
                axis.axhline(ENOUGH, color="0.6", linewidth=1, linestyle=":")
            axis.set(yscale="log", ylabel="test error")
            axis.set_xlabel("forward passes of an example" if key == "passes" else "different examples")
            logarithmic(axis)
        pair[0].set_title(where, fontsize=9)
    title = "line: median of the seeds; band: least to most; dashed: new examples at every step; points: end of a run"
    legend_below(figure, [axis for pair in below for axis in pair], title)
    save(figure, path, dpi=90)


def _order(settings: dict[str, Any]) -> tuple[int, int, int]:
    """The place of a panel: by problem, by network with gates first, and by length."""
    return list(TASKS).index(settings["task"]), -list(KINDS).index(settings["kind"]), settings["length"]


_COLORS = dict(zip(METHODS, ("tab:blue", "tab:cyan", "tab:red", "tab:purple", "0.6", "0.2"), strict=True))


def _line(axis: Any, cell: dict[str, Any], key: str) -> None:
    settings, rows = cell["settings"], cell["found"]["rows"]
    errors = np.array([[_number(error) for error in row["errors"]] for row in rows])
    low, middle, high = errors.min(axis=0), np.median(errors, axis=0), errors.max(axis=0)
    x = np.array(rows[0][key], float)
    style = {"color": _COLORS[settings["method"]], "label": METHODS[settings["method"]].label}
    if settings["examples"] is None:
        style |= {"marks": "--", "label": f"{style['label']}, new examples"}
    if key == "examples" and settings["examples"] is not None:
        spread = [[middle[-1] - low[-1]], [high[-1] - middle[-1]]]
        axis.errorbar(x[-1:], middle[-1:], yerr=spread, fmt="o", capsize=2, color=style["color"])
    elif key == "examples" or settings["examples"] in DRAWN:
        band(axis, x[1:], low[1:], middle[1:], high[1:], **style)
