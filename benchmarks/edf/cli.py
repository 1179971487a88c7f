"""``python -m benchmarks edf EXPERIMENT``: run it, write numbers and a picture, print a table."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks.edf import convergence, full_vs_stochastic, harness, stochastic
from benchmarks.edf.pictures import draw
from benchmarks.edf.tables import table
from benchmarks.harness import experiment, store
from benchmarks.harness.command import Parser, Refused, command, file
from benchmarks.harness.experiment import Experiment, Result
from benchmarks.harness.store import Job

# name -> module with plan(arguments), and what it is
EXPERIMENTS: dict[str, tuple[ModuleType, str]] = {
    "convergence": (convergence, "full batch on CIFAR-10: EDF-G, EDF-H, momentum, NAG, Adam"),
    "stochastic": (stochastic, "mini-batches on MNIST and CIFAR-10: EDF-G with W1 and W2, momentum SGD, Adam"),
    "full-vs-stochastic": (full_vs_stochastic, "full batch against mini-batches on MNIST"),
    "harness": (harness, "EKI, EDF-G and SGD on one problem with one budget of forward passes"),
}


def flow(name: str) -> Experiment:
    """An experiment by its name."""
    module, about = EXPERIMENTS[name]

    def measure(arguments: argparse.Namespace, path: Path) -> None:
        identity = {"experiment": f"edf {name}", "preset": arguments.preset}
        before = store.earlier(path, arguments.preset, experiment=identity["experiment"]) or {}
        settings, jobs = module.plan(arguments)
        _refuse_less(path, before.get("cells", {}), jobs)
        text = f"python -m benchmarks edf {name} --preset {arguments.preset}"
        head = {**identity, "command": text, "seed": arguments.seed, **settings}
        store.fill(path, head, jobs, keep=arguments.keep)

    stem = f"edf_{name.replace('-', '_')}_{{preset}}"
    says = lambda found: {key: found[key] for key in ("claims",) if key in found}
    return Experiment(
        f"edf {name}",
        f"{about[0].upper()}{about[1:]}",
        stem,
        measure,
        table,
        draw,
        says,
        sections={f"edf.md#{stem}": table},
        summarized=lambda path, found: summarized(found),
    )


def summarized(found: Result) -> Result:
    """A result with its curves by their names, those of several problems by these, and with what they claim."""
    curves = {name: cell["found"] for name, cell in found["cells"].items()}
    if found["experiment"] == "edf convergence":
        return {**found, "curves": curves, "claims": convergence.claims(curves, tuple(found["orders"]))}
    if found["experiment"] != "edf stochastic":
        return {**found, "curves": curves}
    problems: dict[str, dict[str, Any]] = {}
    sizes = {}
    for name, cell in found["cells"].items():
        problem, method = name.split(": ", 1)
        problems.setdefault(problem, {})[method] = cell["found"]
        sizes[problem] = cell["settings"]["images"]
    return {**found, "problems": problems, "sizes": sizes}


def _refuse_less(path: Path, before: Mapping[str, Any], jobs: Mapping[str, Job]) -> None:
    """Refuse to replace a curve by one of fewer images, such as where a data set is there in part only."""
    for name, job in jobs.items():
        settings = before.get(name, {}).get("settings", {})
        for key, count in job.settings.items():
            if (more := settings.get(key, 0)) > count:
                raise Refused(f"{path}: {name} has {more} {key}, and here are {count}; name another by --out")


@command("edf")
def main(argv: list[str]) -> int:
    """Run one experiment, or print a result's table; 2 for what the user can mend."""
    arguments = _parser().parse_args(argv)
    if arguments.experiment == "table":
        remedy = "wanted a file that one of the experiments wrote"
        found = store.result(arguments.result, remedy)
        print(store.made_of(arguments.result, found, lambda found: table(summarized(found)), remedy))
        return 0
    of = flow(arguments.experiment)
    return experiment.run(of, arguments, arguments.out or of.path(arguments.preset))


def _parser() -> Parser:
    parser = Parser(prog="python -m benchmarks edf", description=__doc__)
    commands = parser.add_subparsers(dest="experiment", required=True)
    for name, (_, summary) in EXPERIMENTS.items():
        one = commands.add_parser(name, help=summary, description=summary)
        one.add_preset(help="size (default: cpu)")
        one.add_data()
        one.add_argument("--out", metavar="FILE", type=file, help="file for the numbers; the picture goes beside it")
        one.add_seed(default=0)
        one.add_keep()
        one.add_draw()
        if name == "stochastic":
            one.add_argument("--problem", nargs="+", choices=tuple(stochastic.PROBLEMS), default=["mnist", "cifar10"])
    one = commands.add_parser("table", help="print a result's table", description="print a result's table")
    one.add_argument("result", type=file, help="a file that one of the others wrote")
    return parser
