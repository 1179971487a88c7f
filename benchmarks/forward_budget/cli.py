"""``python -m benchmarks forward-budget``: test accuracy for a number of forward passes, all methods in one run."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import jax

from benchmarks.forward_budget.jobs import perform
from benchmarks.forward_budget.picture import draw
from benchmarks.forward_budget.settings import (
    GRIDS,
    NAMES,
    PRESETS,
    RIVALS,
    TITLES,
    TUNING_SEED,
    methods_for,
    task,
)
from benchmarks.forward_budget.summary import best_rate, derivatives_table, discrete_table, is_cut, summarized, table
from benchmarks.harness import experiment, store
from benchmarks.harness.command import Parser, Refused, command, folder
from benchmarks.harness.experiment import Experiment
from benchmarks.harness.peers import Unavailable, default_folder
from benchmarks.harness.tables import with_origin
from benchmarks.problems import registry


def parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="python -m benchmarks forward-budget",
        description="Test accuracy against sample-forward passes and against wall time: natural-gradient EKI, EKI(R), "
        "evosax's OpenES and PGPE at the best step size of a grid, and momentum SGD (a gradient is three passes). "
        "Finished runs are kept in DIR/forward_budget_PRESET.jsonl and not repeated, so an interrupted command goes "
        "on; all of them are in the table. The last line on standard output is one JSON object.",
    )
    parser.add_preset(choices=tuple(PRESETS), help="size (default: cpu)")
    parser.add_argument("--out", metavar="DIR", type=folder, help="folder for numbers, picture, table")
    parser.add_data()
    parser.add_argument(
        "--problem", metavar="P", nargs="+", choices=tuple(TITLES), help="run only these of the preset's"
    )
    parser.add_argument(
        "--method", metavar="M", nargs="+", choices=tuple(NAMES), help=f"run only these of {', '.join(NAMES)}"
    )
    parser.add_peers()
    parser.add_draw("--summary")
    return parser


@command("forward-budget")
def main(argv: list[str]) -> int:
    """Run the command line; 2 for what the user can mend."""
    arguments = parser().parse_args(argv)
    _asked(arguments)
    return experiment.run(BUDGETS, arguments, BUDGETS.path(arguments.preset, arguments.out))


def measure(arguments: argparse.Namespace, path: Path) -> None:
    """Run what is missing of what is asked for, each rival at the best step size of its grid."""
    preset = PRESETS[arguments.preset]
    asked, wanted = _asked(arguments)
    text = f"python -m benchmarks forward-budget --preset {arguments.preset}"
    head = {"experiment": "forward-budget", "preset": arguments.preset, "command": text}
    is_part = bool(arguments.problem or arguments.method)
    cells = store.Cells(path, head, keep=True, part=is_part, cut=_cut)
    is_asked = lambda of: of.get("problem") in asked and of.get("method") in wanted
    others = {n: cell for n, cell in cells.earlier.get("cells", {}).items() if not is_asked(cell.get("settings", {}))}
    summarized(path, {**cells.earlier, "cells": others})  # which are to be whole before the work begins
    cells.extra = {
        "seeds": preset.seeds,
        "budgets": preset.budgets,
        "grids": GRIDS,
        "parameters": cells.earlier.get("parameters", {}) | {one: _parameters(one, arguments.data) for one in asked},
    }
    peers = arguments.peers or default_folder()
    get = lambda wish: _curve(cells, wish, arguments.data, peers)
    for problem in asked:
        for method in (name for name in wanted if name in methods_for(problem)):
            chosen = {}
            if method in RIVALS:
                rates = GRIDS[method]
                tried = [get(task(preset, problem, method, TUNING_SEED, learning_rate=rate)) for rate in rates]
                if None in tried:
                    continue
                chosen = {"learning_rate": best_rate(dict(zip(rates, tried, strict=True)))}
            for seed in preset.seeds:
                get(task(preset, problem, method, seed, **chosen))
    cells.finish()


def _cut(cell: dict[str, Any]) -> str:
    return is_cut(cell["found"], cell["settings"]["budget"])


def _curve(cells: store.Cells, wish: dict[str, Any], data: Path | None, peers: Path) -> dict[str, Any] | None:
    """The task's curve, or None where it cannot be had."""
    rate = f"-{wish['learning_rate']:g}" if wish["seed"] == TUNING_SEED else ""

    def curve() -> dict[str, Any]:
        try:
            return perform(wish, data, peers)
        except (Unavailable, RuntimeError) as error:
            return {"skipped": str(error)}

    found = cells.get(f"{wish['problem']}-{wish['method']}-{wish['seed']}{rate}", wish, curve)
    return None if "skipped" in found else found


def _asked(arguments: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Names of the problems and of the methods that are asked for.

    Raises:
        Refused: the preset has none of the problems, or they have none of the methods.
    """
    budgets = PRESETS[arguments.preset].budgets
    asked = [name for name in budgets if not arguments.problem or name in arguments.problem]
    wanted = [name for name in NAMES if not arguments.method or name in arguments.method]
    if not asked:
        raise Refused(f"--problem: {arguments.problem}; preset {arguments.preset} has {', '.join(budgets)}")
    if not any(name in methods_for(one) for one in asked for name in wanted):
        known = "; ".join(f"{one} has {', '.join(methods_for(one))}" for one in asked)
        raise Refused(f"--method: {', '.join(wanted)}; {known}")
    return asked, wanted


def _parameters(problem: str, data: Path | None) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(registry.get(problem, data).template))


def _says(found: dict[str, Any]) -> dict[str, Any]:
    held = [claim["holds"] for claim in found["claims"]]
    shown = {key: found[key] for key in ("results", "skipped")}
    return {**shown, "claims_held": f"{sum(held)} of {len(held)}"}


BUDGETS = Experiment(
    "forward-budget",
    "Test accuracy for a number of forward passes",
    "forward_budget_{preset}",
    measure,
    table,
    draw,
    _says,
    sections={
        "forward_budget.md#discrete": with_origin(discrete_table),
        "per_sample.md#budget": with_origin(derivatives_table),
    },
    summarized=summarized,
)
