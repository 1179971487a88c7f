"""``python -m benchmarks paper NAME``: one command a table or figure of the paper."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import precision
from benchmarks.harness import experiment, store
from benchmarks.harness.command import Parser, Refused, command, folder
from benchmarks.harness.experiment import Experiment, Made, Result
from benchmarks.paper import classification, epochs
from benchmarks.paper.common import finish, measured
from benchmarks.paper.experiments import EXPERIMENTS, module, title
from benchmarks.paper.table import results, section, write_table
from benchmarks.reporting import RESULTS

COMMITTED = RESULTS / "paper"


def paper(name: str) -> Experiment:
    """An experiment by its name; the page of tables is of all in a folder."""
    of = module(name)
    draw = of.draw if hasattr(of, "draw") else lambda found, path: classification.draw(found, path, of.cells)

    def makes(path: Path, found: Result) -> Iterator[Made]:
        if measured(found):
            yield Made(path.with_suffix(".png"), lambda target: draw(found, target))
        out = path.parent
        page = RESULTS / "paper.md" if out.resolve() == COMMITTED.resolve() else out / "paper.md"
        yield Made(page, lambda target: write_table(out, target))

    return Experiment(
        f"paper {name}",
        title(name),
        f"paper/{name}",
        lambda arguments, path: _measure(of, name, arguments, path),
        section,
        says=_said,
        makes=makes,
        lock=".paper.lock",
    )


def _said(found: Result) -> Result:
    """The rows, and all that is no list or table of its own."""
    named = ("rows", "accuracies")
    return {key: value for key, value in found.items() if key in named or not isinstance(value, list | dict)}


@command("paper")
def main(argv: list[str]) -> int:
    """Run an experiment, or list them; 2 for what the user can mend."""
    arguments = _parser().parse_args(argv)
    if arguments.name == "list":
        for name in EXPERIMENTS:
            print(f"{name:22}{title(name)}")
        return 0
    _check(arguments)
    of = paper(arguments.name)
    return experiment.run(of, arguments, of.path(arguments.preset, arguments.out))


def _measure(of: Any, name: str, arguments: argparse.Namespace, path: Path) -> None:
    """Run an experiment, and write its file."""
    preset, out, only = arguments.preset, path.parent, arguments.only or ""
    results(out, but=name)
    merges = (hasattr(of, "cells") or hasattr(of, "FIGURE")) and preset != "smoke"  # run by run
    store.earlier(path, None if merges else preset, experiment=name)
    if hasattr(of, "measure"):
        finish(name, preset, arguments.seed, out, of.measure(preset, arguments.data, arguments.seed))
    elif hasattr(of, "run"):
        of.run(preset, out, arguments.data, arguments.seed, only)
    elif hasattr(of, "FIGURE"):
        epochs.run(name, of.FIGURE, preset, out, arguments.data, arguments.seed, arguments.precision or "auto")
    else:
        more = only, arguments.precision or "auto"
        classification.run_table(name, of.cells, preset, out, arguments.data, arguments.seed, *more)


def _check(arguments: argparse.Namespace) -> None:
    """Refuse what a table of networks alone has, and a text of ``--only`` that no cell's name has in it."""
    of, only = module(arguments.name), arguments.only
    if only is not None and not hasattr(of, "cells"):
        tables = [other for other in EXPERIMENTS if hasattr(module(other), "cells")]
        raise Refused(f"--only: {arguments.name} has no cells; wanted one of {', '.join(tables)}")
    names = [] if only is None else [cell.name for cell in of.cells("full")]
    if only is not None and (not only or not any(only in cell for cell in names)):
        raise Refused(f"--only: {only!r}; wanted a part of a cell's name, of {'; '.join(names)}")
    if arguments.precision is not None and not _is_of_networks(of):
        tables = [other for other in EXPERIMENTS if _is_of_networks(module(other))]
        raise Refused(f"--precision: {arguments.name} has none; wanted one of {', '.join(tables)}")


def _is_of_networks(of: Any) -> bool:
    return not hasattr(of, "measure") and not hasattr(of, "run")


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
    parser.add_draw()
    parser.add_argument(
        "--only",
        metavar="TEXT",
        help="for tables of networks: run only the cells whose name contains TEXT, such as 'DNN 1'; cells that an "
        "earlier run finished are kept",
    )
    parser.add_argument(
        "--precision",
        choices=precision.CHOICES,
        help="for tables and figures of networks: of an ensemble's products in training, float32, bf16 or auto, the "
        "one that this machine is faster in for runs on all images (default: auto)",
    )
    return parser
