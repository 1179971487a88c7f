"""``python -m benchmarks language-budget``: nats of held-out text for a number of passes a step, all methods."""

from __future__ import annotations

import argparse
import contextlib
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.harness import experiment, figures
from benchmarks.harness.command import Parser, Refused, command, file, folder, say, whole
from benchmarks.harness.experiment import Experiment
from benchmarks.harness.store import Cells
from benchmarks.harness.tables import machine, markdown
from benchmarks.language import cli
from benchmarks.language.text import Text, load
from benchmarks.language.training import Diverged, bits, train

NAMES = {
    "natural-eki-per-sample": "noise per sample, answers of the layers behind",
    "natural-eki-outputs": "noise per sample, feedback from the outputs",
    "node-noise": "node perturbation",
    "msgd": "backpropagation",
}
# The one that has no particles.
WITHOUT = "msgd"
# What was to be reached: fewer nats than its rival for as many particles, and this much more than backpropagation.
OURS, RIVAL, NEAR = "natural-eki-per-sample", "node-noise", {256: 0.03}
# Rates, from the middle of which the search of the best begins; it goes on until both neighbours are worse.
LADDER = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
FIRST = 0.3
# Of the runs that choose a rate: a seed that no reported run has, and what they hold out of the text to learn from.
TUNING_SEED, TUNING_SHARE = 100, 0.1


class Preset(NamedTuple):
    """A size of the comparison.

    Attributes:
        passes: numbers of particles.
        seeds: seeds of the reported runs.
        steps: steps of a reported run.
        tuning_steps: steps of a run that chooses a rate.
        sizes: settings of the transformer and of the batch that are not the command line's.
        ladder: rates to choose from.
    """

    passes: tuple[int, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 1000
    tuning_steps: int = 300
    sizes: tuple[tuple[str, int], ...] = ()
    ladder: tuple[float, ...] = LADDER


SMALL = (("layers", 1), ("width", 16), ("heads", 2), ("context", 8), ("batch", 64))
PRESETS = {
    "smoke": Preset((4,), (0, 1), 4, 2, SMALL, (FIRST,)),
    "cpu": Preset((16, 64, 256)),
    "full": Preset((16, 64, 256), (0, 1, 2, 3, 4), 10_000, 1000),
}


def parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="python -m benchmarks language-budget",
        description="Train the transformer of `language` with every method and number of passes a step, each at the "
        "rate that was best on text held out of what it learns from. What is finished is kept and not repeated, so an "
        "interrupted command goes on. The last line on standard output is one JSON object.",
    )
    parser.add_preset(choices=tuple(PRESETS), help="size (default: cpu)")
    add = parser.add_argument
    add("--text", metavar="FILE", type=file, help="text of UTF-8 (default: the topics of Python's help())")
    add("--method", metavar="M", nargs="+", choices=tuple(NAMES), help=f"run only these of {', '.join(NAMES)}")
    add("--passes", metavar="K", nargs="+", type=whole(2), help="run only these numbers of particles of the preset")
    add("--out", metavar="DIR", type=folder, help="folder for numbers, picture, table")
    parser.add_draw()
    return parser


@command("language-budget")
def main(argv: list[str]) -> int:
    """Run the command line; 2 for what the user can mend."""
    arguments = parser().parse_args(argv)
    have = PRESETS[arguments.preset].passes
    if arguments.passes and not set(arguments.passes) <= set(have):
        raise Refused(f"--passes: {arguments.passes}; preset {arguments.preset} has {', '.join(map(str, have))}")
    return experiment.run(BUDGETS, arguments, BUDGETS.path(arguments.preset, arguments.out))


def measure(arguments: argparse.Namespace, path: Path) -> None:
    """Run what is missing of what is asked for."""
    preset = PRESETS[arguments.preset]
    defaults = vars(cli.parser().parse_args([])) | dict(preset.sizes)
    text = load(arguments.text, defaults["context"])
    of_text = "" if arguments.text is None else f" --text {text.name}"
    head = {
        "experiment": "language",
        "preset": arguments.preset,
        "command": f"python -m benchmarks language-budget --preset {arguments.preset}{of_text}",
        "text": text.name,
        "characters": len(text.train) + len(text.test),
    }
    inner = text.without(TUNING_SHARE)
    if len(inner.test) <= defaults["context"]:
        least = int((defaults["context"] + 1) / (TUNING_SHARE * len(text.train) / head["characters"])) + 1
        raise Refused(f"--text {text.name}: {head['characters']} characters; wanted at least {least}")
    cells = Cells(path, head, keep=True, part=bool(arguments.method or arguments.passes))
    wanted = {name: value for name, value in defaults.items() if name not in cli.ELSEWHERE}
    # What has no particles runs once, and is a line of its own; then what takes the shortest.
    for passes in (None, *(arguments.passes or preset.passes)):
        for method in arguments.method or NAMES:
            if (method == WITHOUT) != (passes is None):
                continue
            own = {**wanted, "method": method, "passes": passes}
            rate = _best(cells, preset, own, inner)
            for seed in preset.seeds:
                settings = {**own, "steps": preset.steps, "seed": seed, "learning_rate": rate}
                _cell(cells, f"{_label(method, passes)}, seed {seed}", settings, text)
    cells.finish()


def _best(cells: Cells, preset: Preset, own: dict[str, Any], inner: Text) -> float:
    """The rate with the fewest nats of text that was held out; the ladder is climbed until its neighbours are worse."""
    ladder = preset.ladder
    here, scores = ladder.index(FIRST), dict[int, float]()
    while True:
        for at in (here, here - 1, here + 1):
            if 0 <= at < len(ladder) and at not in scores:
                settings = {**own, "steps": preset.tuning_steps, "seed": TUNING_SEED, "learning_rate": ladder[at]}
                name = f"{_label(own['method'], own['passes'])}, rate {ladder[at]:g}"
                scores[at] = _cell(cells, name, settings, inner).get("test_nats", [np.inf])[-1]
        best = min(scores, key=lambda at: scores[at])
        if best == here:
            return ladder[here]
        here = best


def _cell(cells: Cells, name: str, settings: dict[str, Any], text: Text) -> Any:
    """The curve of a run, or why it has none; it leaves checkpoints until it is whole."""
    place = cells.path.with_suffix(".unfinished") / name.replace(", ", "-").replace(" ", "-")

    def measure() -> dict[str, Any]:
        try:
            for progress in train(text, settings, place):
                row = progress.history[-1]
                say(f"{name}: step {row['step']} of {settings['steps']}, {row['test_nats']:.3f} nats")
        except Diverged as error:
            return {"diverged": str(error)}
        return {key: [row[key] for row in progress.history] for key in progress.history[0]}

    found = cells.get(name, settings, measure)
    shutil.rmtree(place, ignore_errors=True)
    with contextlib.suppress(OSError):  # others are in it
        place.parent.rmdir()
    return found


def _label(method: str, passes: int | None) -> str:
    return method if passes is None else f"{method} {passes}"


def _reported(found: dict[str, Any]) -> dict[tuple[str, int | None], list[dict[str, Any]]]:
    """By method and passes the cells of the reported seeds, those without a curve included."""
    by: dict[tuple[str, int | None], list[dict[str, Any]]] = {}
    for cell in found["cells"].values():
        if (settings := cell["settings"])["seed"] != TUNING_SEED:
            by.setdefault((settings["method"], settings["passes"]), []).append(cell)
    return dict(sorted(by.items(), key=lambda item: (list(NAMES).index(item[0][0]), item[0][1] or 0)))


def _last(cells: list[dict[str, Any]]) -> list[float]:
    """Nats at the end of the runs that came there."""
    return [cell["found"]["test_nats"][-1] for cell in cells if "test_nats" in cell["found"]]


def _tried(found: dict[str, Any], method: str, passes: int | None) -> list[float]:
    settings = [cell["settings"] for cell in found["cells"].values()]
    mine = [s for s in settings if (s["method"], s["passes"], s["seed"]) == (method, passes, TUNING_SEED)]
    return sorted(s["learning_rate"] for s in mine)


def at_the_end(found: dict[str, Any]) -> dict[str, float]:
    """Mean nats of the seeds at the end, by method and number of passes."""
    last = {_label(*of): _last(cells) for of, cells in _reported(found).items()}
    return {name: float(np.mean(nats)) for name, nats in last.items() if nats}


def table(found: dict[str, Any]) -> str:
    """A line a method and number of passes, the seeds' mean and spread, and how far they are from backpropagation."""
    by = _reported(found)
    gradient = _last(by.get((WITHOUT, None), []))
    header = ["method", "particles", "nats", "goal", "bits", "more than backpropagation", "rate", "of", "seconds"]
    rows = []
    for (method, passes), cells in by.items():
        nats = _last(cells)
        said, lost = ["–"] * 3, len(cells) - len(nats)
        if nats:
            mean = float(np.mean(nats))
            spread = f" ± {np.std(nats, ddof=1):.3f}" if len(nats) > 1 else ""
            more = f"{mean - np.mean(gradient):.3f}" if gradient and method != WITHOUT else "–"
            said = [f"{mean:.3f}{spread}", f"{bits(mean):.3f}", more]
        said[0] += f", {lost} of {len(cells)} lost" if lost else ""
        said.insert(1, _goal(by, passes) if method == OURS else "")
        rows.append(
            [
                NAMES[method],
                "–" if passes is None else str(passes),
                *said,
                f"{cells[0]['settings']['learning_rate']:g}",
                ", ".join(f"{rate:g}" for rate in _tried(found, method, passes)),
                f"{np.mean([cell['seconds'] for cell in cells]):.0f}",
            ]
        )
    return f"{markdown(header, rows)}\n\n{_footer(found)}"


def _goal(by: dict[tuple[str, int | None], list[dict[str, Any]]], passes: int | None) -> str:
    """What was to be reached with so many particles."""
    rival, gradient = _last(by.get((RIVAL, passes), [])), _last(by.get((WITHOUT, None), []))
    goals = [f"*below {np.mean(rival):.3f}*"] if rival else []
    goals += [f"*at most {np.mean(gradient) + NEAR[passes]:.3f}*"] if gradient and passes in NEAR else []
    return ", ".join(goals)


def _footer(found: dict[str, Any]) -> str:
    settings = next(iter(found["cells"].values()))["settings"]
    seeds = {cell["settings"]["seed"] for cell in found["cells"].values()} - {TUNING_SEED}
    steps = max(cell["settings"]["steps"] for cell in found["cells"].values())
    return (
        f"Nats a character of the last tenth of {found['text']}, after {steps} steps of {settings['batch']} "
        f"characters, context {settings['context']}: mean of {len(seeds)} seeds, and standard deviation; a transformer "
        f"of {settings['layers']} layers of {settings['width']} numbers and {settings['heads']} heads. Rates were "
        f"chosen with seed {TUNING_SEED} on a tenth of the text to learn from, by shorter runs, from those that "
        "are named; the search ends where both neighbours are worse, or there are no more. "
        f"`{found['command']}`, {machine(found['environment'])}."
    )


def draw(found: dict[str, Any], path: Path) -> None:
    """Nats against steps, a panel a number of particles: lines are the seeds' means, bands their range."""
    by = _reported(found)
    numbers = sorted({passes for _, passes in by if passes is not None}) or [0]
    figure, axes = figures.panels(1, len(numbers), (4.4 * len(numbers), 3.8), sharey=True)
    for axis, number in zip(axes[0], numbers, strict=True):
        for (method, passes), cells in by.items():
            curves = [cell["found"] for cell in cells if "step" in cell["found"]]
            if passes in (None, number) and curves:
                nats = np.array([curve["test_nats"] for curve in curves])
                edges = nats.min(0), nats.mean(0), nats.max(0)
                figures.band(axis, curves[0]["step"], *edges, label=NAMES[method])
        axis.set(xlabel="steps", title=f"{number} particles")
    axes[0, 0].set_ylabel("nats a character of held-out text")
    figures.legend(axes[0, -1], "mean of the seeds, and their range")
    figures.save(figure, path)


BUDGETS = Experiment(
    "language-budget",
    "A transformer on Shakespeare, by passes a step",
    "language_{preset}",
    measure,
    table,
    draw,
    says=lambda found: {"test_nats": at_the_end(found)},
    sections={"per_sample.md#language": table},
    needs=("flax", "orbax.checkpoint", "matplotlib"),
)
