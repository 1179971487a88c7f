"""The page of all results: each with its picture, its command, its machine and its day."""

from __future__ import annotations

import importlib
import posixpath
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.harness import store
from benchmarks.harness.tables import machine, markdown
from benchmarks.reporting import RESULTS

ROOT = RESULTS.parents[1]
_HEAD = """# All results

Every result that is committed, with its picture, the command that measured it, the machine and the day (of those until
2026-11-29, the day on which they were committed). The numbers are lines of JSON, a file a result. This page, all tables
and all pictures are made of them by `python -m benchmarks report`; with `--check` it says which are not what they give.
Seconds are those of the machine, which other work shared; accuracies and passes do not depend on it.
"""


class Part(NamedTuple):
    """A part of the page.

    Attributes:
        title: its heading.
        about: words below it, with links to the pages that discuss it and to its tables.
        shown: titles of its results, by their files' names.
        pictures: where their pictures are, from the root of the repository; ``{}`` is the name.
    """

    title: str
    about: str
    shown: dict[str, str]
    pictures: tuple[str, ...] = ("benchmarks/results/{}.png",)


def text() -> str:
    """The page, in Markdown."""
    lines = [_HEAD]
    for part in parts():
        if not any((RESULTS / f"{name}.jsonl").is_file() for name in part.shown):
            continue  # nothing is committed of it yet
        lines += [f"## {part.title}\n", f"{part.about}\n"]
        for name, title in part.shown.items():
            path = RESULTS / f"{name}.jsonl"
            if path.is_file():
                lines += [f"### {title}\n"] * (title != part.title)
                pictures = [picture.format(name.replace("calibration/", "calibration_")) for picture in part.pictures]
                there = [posixpath.relpath(picture, "docs") for picture in pictures if (ROOT / picture).is_file()]
                lines += [f"![{title}]({picture})\n" for picture in there]
                lines.append(f"{origin(path)}\n")
    return "\n".join([*lines, _training()])


def parts() -> list[Part]:
    """What is on the page, in its order, but for training runs."""
    from benchmarks.calibration.cli import EXPERIMENTS as CALIBRATIONS
    from benchmarks.edf.cli import EXPERIMENTS as FLOWS
    from benchmarks.paper.experiments import EXPERIMENTS as PAPER
    from benchmarks.performance.tables import TITLES

    titles = lambda folder, modules: {
        f"{folder}/{name}": importlib.import_module(module).TITLE for name, module in modules.items()
    }
    flows = {
        f"edf_{name.replace('-', '_')}_{preset}": f"{about[0].upper()}{about[1:]} ({preset})"
        for name, about in FLOWS.items()
        for preset in ("cpu", "full")
    }
    budget, language, policy, scaling, models = (
        "Test accuracy for a number of forward passes",
        "A transformer on Shakespeare, by passes a step",
        "Policies, by environment steps",
        "Scaling over devices",
        "Models that people bring",
    )
    table = lambda page, name: f"[How it was measured]({page}.md), and [the table](../benchmarks/results/{name}.md)."
    speed = "![The step, and other libraries](../benchmarks/results/performance.png)"
    devices = ("docs/images/scaling_measured.png", "docs/images/scaling_predicted.png")
    return [
        Part("The paper's experiments", table("paper", "paper"), titles("paper", PAPER)),
        Part(budget, table("forward_budget", "forward_budget_cpu"), {"forward_budget_cpu": budget}),
        Part(language, table("per_sample", "language_cpu"), {"language_cpu": language}),
        Part(policy, table("policy", "policy_cpu"), {"policy_cpu": policy}),
        Part(
            "Calibration",
            "[The tables](calibration_benchmarks.md).",
            titles("calibration", CALIBRATIONS),
            ("docs/images/{}.png",),
        ),
        Part("Exponentially decaying flows", "[The tables](edf.md#experiments).", flows),
        Part(
            "Speed and memory",
            f"{table('performance', 'performance')}\n\n{speed}",
            {f"performance-{name}": title for name, title in TITLES.items()},
        ),
        Part(scaling, "[How to read them](scaling.md).", {"scaling": scaling}, devices),
        Part(models, "[The table](models.md), a line a model.", {"models": models}),
    ]


def origin(path: Path) -> str:
    """A result's command, machine and day, with a link to its file."""
    found = store.result(path, "wanted a clone of the repository, which has the numbers")
    skipped = f"Not run: {found['skipped']}\n\n" if isinstance(found.get("skipped"), str) else ""
    numbers = f"[numbers](../{path.relative_to(ROOT)})"
    return f"{skipped}`{found['command']}`; {_on(found['environment'])}; {numbers}"


def _on(environment: dict[str, Any]) -> str:
    return f"{machine(environment).removeprefix('cpu: ')}, {environment['date']}"


def _training() -> str:
    """Single runs, a line each."""
    rows = []
    for run in store.result(RESULTS / "train.jsonl", "wanted a clone of the repository")["runs"].values():
        last = run["history"][-1]
        accuracy = last.get("test_accuracy_mean", last.get("test_accuracy"))
        rows.append([f"`{run['command']}`", f"{accuracy:.4f}", _on(run["environment"])])
    table = markdown(["command", "test accuracy", "machine"], rows, "---")
    return f"## Training runs\n\n[Numbers](../benchmarks/results/train.jsonl), the history of each.\n\n{table}\n"
