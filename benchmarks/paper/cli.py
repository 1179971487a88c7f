"""``python -m benchmarks paper NAME``: one command a table or figure of the paper."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from benchmarks.harness import store
from benchmarks.harness.command import Parser, Refused, command, folder, require
from benchmarks.paper.classification import run_table
from benchmarks.paper.common import finish
from benchmarks.paper.experiments import EXPERIMENTS, module, title
from benchmarks.paper.table import results, write_table
from benchmarks.reporting import RESULTS, print_result
from eki_jax.training.files import claimed

COMMITTED = RESULTS / "paper"


@command("paper")
def main(argv: list[str]) -> int:
    """Run an experiment, or list them; 2 for what the user can mend."""
    arguments = _parser().parse_args(argv)
    if arguments.name == "list":
        for name in EXPERIMENTS:
            print(f"{name:22}{title(name)}")
        return 0
    require("matplotlib")
    out = arguments.out or (Path("runs/paper-smoke") if arguments.preset == "smoke" else COMMITTED)
    experiment = module(arguments.name)
    only = "" if arguments.only is None else _checked(arguments.only, arguments.name, experiment)
    size = arguments.preset, out, arguments.data, arguments.seed
    with claimed(out, ".paper.lock"):
        results(out, but=arguments.name)
        merges = hasattr(experiment, "cells") and arguments.preset != "smoke"  # cell by cell
        path = out / f"{arguments.name}.jsonl"
        store.earlier(path, None if merges else arguments.preset, experiment=arguments.name)
        summary = run(arguments.name, *size, only)
        table = write_table(out, RESULTS / "paper.md" if out.resolve() == COMMITTED.resolve() else out / "paper.md")
    print(f"numbers: {path}\ntable: {table}", file=sys.stderr)
    print_result(summary)
    return 0


def run(name: str, preset: str, out: Path, data: Path | None, seed: int, only: str = "") -> dict[str, Any]:
    """Run an experiment, and write its file and its picture; returns what is printed."""
    of = module(name)
    if hasattr(of, "measure"):
        return finish(name, preset, seed, out, of.measure(preset, data, seed), of.draw)
    if hasattr(of, "run"):
        return of.run(preset, out, data, seed, only)
    return run_table(name, of.cells, preset, out, data, seed, only)


def _checked(only: str, name: str, experiment: Any) -> str:
    """The text of ``--only``, which some cell's name has in it."""
    if not hasattr(experiment, "cells"):
        tables = [other for other in EXPERIMENTS if hasattr(module(other), "cells")]
        raise Refused(f"--only: {name} has no cells; wanted one of {', '.join(tables)}")
    names = [cell.name for cell in experiment.cells("full")]
    if not only or not any(only in cell for cell in names):
        raise Refused(f"--only: {only!r}; wanted a part of a cell's name, of {'; '.join(names)}")
    return only


def _parser() -> Parser:
    parser = Parser(
        prog="python -m benchmarks paper",
        description="Re-run a table or a figure of the paper. The last line on standard output is one JSON object.",
    )
    parser.add_argument("name", metavar="NAME", choices=[*EXPERIMENTS, "list"], help="an experiment, or: list")
    parser.add_preset(
        help="smoke: seconds; cpu: at most an hour on two cores; full: the paper's settings (default: cpu)"
    )
    parser.add_argument(
        "--out", metavar="DIR", type=folder, help="folder for numbers and pictures (default: benchmarks/results/paper)"
    )
    parser.add_data()
    parser.add_seed(default=0)
    parser.add_argument(
        "--only",
        metavar="TEXT",
        help="for tables of networks: run only the cells whose name contains TEXT, such as 'DNN 1'; cells that an "
        "earlier run finished are kept",
    )
    return parser
