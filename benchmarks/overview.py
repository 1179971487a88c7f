"""The page of all results: each with its picture, its command, its machine and its day."""

from __future__ import annotations

import posixpath
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.harness import store
from benchmarks.harness.experiment import ROOT, Experiment, beside
from benchmarks.harness.tables import machine, markdown
from benchmarks.reporting import RESULTS

_HEAD = """# All results

Every result that is committed, with its picture, the command that measured it, the machine and the day (of those until
2026-11-29, the day on which they were committed). The numbers are lines of JSON, a file a result. This page, all tables
and all pictures are made of them by `python -m benchmarks report`; with `--check` it says which are not what they give.
Seconds are those of the machine, which other work shared; accuracies and passes do not depend on it.
"""

REMEDY = "wanted a clone of the repository, which has the numbers"


class Shown(NamedTuple):
    """A result on the page.

    Attributes:
        title: its heading.
        path: file of its numbers.
        pictures: its pictures, of which those are shown that are there.
    """

    title: str
    path: Path
    pictures: tuple[Path, ...] = ()


class Part(NamedTuple):
    """A part of the page.

    Attributes:
        title: its heading.
        about: words below it, with links to the pages that discuss it and to its tables.
        shown: its results.
    """

    title: str
    about: str
    shown: list[Shown]


def text() -> str:
    """The page, in Markdown."""
    lines = [_HEAD]
    for part in parts():
        there = [one for one in part.shown if one.path.is_file()]
        if not there:
            continue  # nothing is committed of it yet
        lines += [f"## {part.title}\n", f"{part.about}\n"]
        for one in there:
            lines += [f"### {one.title}\n"] * (one.title != part.title)
            pictures = [path.relative_to(ROOT).as_posix() for path in one.pictures if path.is_file()]
            lines += [f"![{one.title}]({posixpath.relpath(picture, 'docs')})\n" for picture in pictures]
            lines.append(f"{origin(one.path)}\n")
    return "\n".join([*lines, _training()])


def parts() -> list[Part]:
    """What is on the page, in its order, but for training runs."""
    paper, (budget,), (kinds,), (language,), (policies,), calibrations, flows, speeds, (devices,), (models,) = (
        experiments()
    )
    table = lambda page, name: f"[How it was measured]({page}.md), and [the table](../benchmarks/results/{name}.md)."
    speed = "![The step, and other libraries](../benchmarks/results/performance.png)"
    return [
        Part("The paper's experiments", table("paper", "paper"), _shown(*paper)),
        Part(budget.title, table("forward_budget", "forward_budget_cpu"), _shown(budget)),
        Part(kinds.title, "[How to read it, and the table](deviations.md).", _shown(kinds)),
        Part(language.title, "[How it was measured, and the table](per_sample.md#what-it-reaches).", _shown(language)),
        Part(policies.title, table("policy", "policy_cpu"), _shown(policies)),
        Part("Calibration", "[The tables](calibration_benchmarks.md).", _shown(*calibrations)),
        Part("Exponentially decaying flows", "[The tables](edf.md#experiments).", _shown(*flows)),
        Part("Speed and memory", f"{table('performance', 'performance')}\n\n{speed}", _shown(*speeds, pictures=False)),
        Part(devices.title, "[How to read them](scaling.md).", _shown(devices)),
        Part(models.title, "[The table](models.md), a line a model.", _shown(models)),
    ]


def experiments() -> tuple[tuple[Experiment, ...], ...]:
    """All experiments, a tuple a command, in the order of the page."""
    from benchmarks.calibration.cli import MODULES, calibration
    from benchmarks.deviations import DEVIATIONS
    from benchmarks.edf.cli import EXPERIMENTS, flow
    from benchmarks.forward_budget.cli import BUDGETS
    from benchmarks.language import comparison
    from benchmarks.models.cli import ZOO
    from benchmarks.paper.cli import EXPERIMENTS as TABLES
    from benchmarks.paper.cli import paper
    from benchmarks.performance.cli import PARTS, part
    from benchmarks.policy.cli import POLICIES
    from benchmarks.scaling.cli import scaling

    one = (BUDGETS,), (DEVIATIONS,), (comparison.BUDGETS,), (POLICIES,)
    several = tuple(map(calibration, MODULES)), tuple(map(flow, EXPERIMENTS)), tuple(map(part, PARTS))
    return tuple(map(paper, TABLES)), *one, *several, (scaling(),), (ZOO,)


def _shown(*several: Experiment, pictures: bool = True) -> list[Shown]:
    """The committed results of some experiments, with their presets where there are several files of presets."""

    def of(one: Experiment, path: Path) -> tuple[Path, ...]:
        made = [file.path for file in beside(one, path, one.read(path, REMEDY))] if pictures else []
        return tuple(file for file in made if file.suffix == ".png")

    found = []
    for one in several:
        paths = list(one.committed())
        for path in paths:
            is_one_of = "{preset}" in one.file and max(len(several), len(paths)) > 1
            preset = f" ({path.stem.rsplit('_', 1)[1]})" if is_one_of else ""
            found.append(Shown(f"{one.title}{preset}", path, of(one, path)))
    return found


def origin(path: Path) -> str:
    """A result's command, machine and day, with a link to its file."""
    found = store.result(path, REMEDY)
    skipped = f"Not run: {found['skipped']}\n\n" if isinstance(found.get("skipped"), str) else ""
    numbers = f"[numbers](../{path.relative_to(ROOT)})"
    return f"{skipped}`{found['command']}`; {_on(found['environment'])}; {numbers}"


def _on(environment: dict[str, Any]) -> str:
    return f"{machine(environment).removeprefix('cpu: ')}, {environment['date']}"


def _training() -> str:
    """Single runs, a line each."""
    rows = []
    for run in store.result(RESULTS / "train.jsonl", REMEDY)["runs"].values():
        last = run["history"][-1]
        accuracy = last.get("test_accuracy_mean", last.get("test_accuracy"))
        rows.append([f"`{run['command']}`", f"{accuracy:.4f}", _on(run["environment"])])
    table = markdown(["command", "test accuracy", "machine"], rows, "---")
    return f"## Training runs\n\n[Numbers](../benchmarks/results/train.jsonl), the history of each.\n\n{table}\n"
