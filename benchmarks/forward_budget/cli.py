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
    Preset,
    methods_for,
    task,
)
from benchmarks.forward_budget.summary import best_rate, is_cut, summarized, table
from benchmarks.harness import store
from benchmarks.harness.command import Parser, Refused, command, folder, require, say
from benchmarks.harness.peers import Unavailable, default_folder
from benchmarks.problems import registry
from benchmarks.reporting import RESULTS, print_result
from eki_jax.training.files import claimed, write_text


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
    parser.add_argument("--out", metavar="DIR", type=folder, default=RESULTS, help="folder for numbers, picture, table")
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
    require("matplotlib")
    _asked(arguments)
    with claimed(arguments.out, f".forward_budget_{arguments.preset}.lock"):
        result = run(arguments)
    print(table(result))
    held = [claim["holds"] for claim in result["claims"]]
    print_result(
        {
            "preset": result["preset"],
            "results": result["results"],
            "claims_held": f"{sum(held)} of {len(held)}",
            "skipped": result["skipped"],
            "files": [f"forward_budget_{result['preset']}.{ending}" for ending in ("jsonl", "png", "md")],
        }
    )
    return 0


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run what is missing of what is asked for, and write all that is there with its picture and its table."""
    preset = PRESETS[arguments.preset]
    asked, wanted = _asked(arguments)
    path = arguments.out / f"forward_budget_{arguments.preset}.jsonl"
    remedy = f"run python -m benchmarks forward-budget --preset {arguments.preset}"
    if arguments.draw:
        found = store.result(path, remedy)
        if store.is_begun(found):
            raise Refused(f"{path}: of a run that was interrupted; {remedy}")
        found = summarized(path, found)
    else:
        before, skipped = store.earlier(path, experiment="forward-budget") or {}, {}
        runs = Curves(path, arguments.data, arguments.peers or default_folder())
        is_asked = lambda run: run.get("problem") in asked and run.get("method") in wanted
        others = {name: run for name, run in runs.kept.all.items() if not is_asked(run)}
        summarized(path, {**before, store.RUNS: others})  # which are to be whole before the work begins
        for problem in asked:
            for method in (name for name in wanted if name in methods_for(problem)):
                try:
                    runs.measure(preset, problem, method)
                except (Unavailable, RuntimeError) as error:
                    skipped[f"{problem}, {method}"] = str(error)
        had = [one for one in preset.budgets if one in asked or any(run["problem"] == one for run in others.values())]
        head = {
            "experiment": "forward-budget",
            "command": f"python -m benchmarks forward-budget --preset {arguments.preset}",
            "preset": arguments.preset,
            "seeds": preset.seeds,
            "budgets": preset.budgets,
            "grids": GRIDS,
            "parameters": before.get("parameters", {}) | {one: _parameters(one, arguments.data) for one in had},
            "skipped": skipped,
        }
        found = {**head, store.RUNS: runs.kept.all}
        store.save(path, found)
        found = summarized(path, store.read(path))
    draw(found["curves"], path.with_suffix(".png"))
    write_text(path.with_suffix(".md"), table(found) + "\n")
    return found


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


class Curves:
    """Runs by task: those in the file are read, others performed and kept at once."""

    def __init__(self, path: Path, data: Path | None, peers: Path) -> None:
        self.kept, self._data, self._peers = store.Runs(path), data, peers

    def measure(self, preset: Preset, problem: str, method: str) -> None:
        """The curves of all seeds, at the best step size of the grid where the method has one."""
        chosen = {}
        if method in RIVALS:
            rates = GRIDS[method]
            tried = [self.get(task(preset, problem, method, TUNING_SEED, learning_rate=rate)) for rate in rates]
            chosen = {"learning_rate": best_rate(tried)}
        for seed in preset.seeds:
            self.get(task(preset, problem, method, seed, **chosen))

    def get(self, wanted: dict[str, Any]) -> dict[str, Any]:
        """The task's curve; a line of other settings is another run, and is made again."""
        rate = f"-{wanted['learning_rate']:g}" if wanted["seed"] == TUNING_SEED else ""
        name = f"{wanted['problem']}-{wanted['method']}-{wanted['seed']}{rate}"
        found = self.kept.find(name, lambda run: store.differences(run, wanted) or is_cut(run))
        if found is None:
            found = self.kept.keep(name, perform(wanted, self._data, self._peers))
            say(f"{name}: {found['test_accuracy'][-1]:.4f}, {found['seconds'][-1]:.1f} s")
        return found


def _parameters(problem: str, data: Path | None) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(registry.get(problem, data).template))
