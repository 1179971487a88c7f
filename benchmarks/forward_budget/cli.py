"""``python -m benchmarks forward-budget``: test accuracy for a number of forward passes, all methods in one run."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import jax

from benchmarks.forward_budget.jobs import perform
from benchmarks.forward_budget.picture import draw
from benchmarks.forward_budget.settings import GRIDS, NAMES, PRESETS, RIVALS, TITLES, TUNING_SEED, Preset, task
from benchmarks.forward_budget.summary import claims, statistics, table
from benchmarks.harness.command import Parser, Refused, command, folder, require, say
from benchmarks.harness.peers import Unavailable, default_folder
from benchmarks.harness.store import Runs, differences, earlier, read
from benchmarks.problems import registry
from benchmarks.reporting import RESULTS, print_result, save_result
from eki_jax.training.files import claimed, write_text


def parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="python -m benchmarks forward-budget",
        description="Test accuracy against sample-forward passes and against wall time: natural-gradient EKI, EKI(R),\n"
        "evosax's OpenES and PGPE at the best step size of a grid, and momentum SGD (a gradient is three passes).\n"
        "Finished runs are kept under DIR/forward_budget_PRESET.runs and not repeated, so an interrupted command goes\n"
        "on; all of them are in the table. The last line on standard output is one JSON object.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_preset(choices=tuple(PRESETS), help="size (default: cpu)")
    parser.add_argument("--out", metavar="DIR", type=folder, default=RESULTS, help="folder for JSON, picture and table")
    parser.add_data()
    parser.add_argument(
        "--problem", metavar="P", nargs="+", choices=tuple(TITLES), help="run only these of the preset's"
    )
    parser.add_argument(
        "--method", metavar="M", nargs="+", choices=tuple(NAMES), help=f"run only these of {', '.join(NAMES)}"
    )
    parser.add_peers()
    parser.add_argument("--summary", action="store_true", help="run nothing: summarize the runs that are there")
    return parser


@command("forward-budget")
def main(argv: list[str]) -> int:
    """Run the command line; 2 for what the user can mend."""
    arguments = parser().parse_args(argv)
    require("matplotlib")
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
            "files": [f"forward_budget_{result['preset']}.{ending}" for ending in ("json", "png", "md")],
        }
    )
    return 0


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run what is missing of what is asked for, and write all that is there with its picture and its table."""
    preset = PRESETS[arguments.preset]
    asked = [name for name in preset.budgets if not arguments.problem or name in arguments.problem]
    wanted = [name for name in NAMES if not arguments.method or name in arguments.method]
    if not asked:
        raise Refused(f"--problem: {arguments.problem}; preset {arguments.preset} has {', '.join(preset.budgets)}")
    store = Store(arguments)
    curves: dict[str, dict[str, list[dict[str, Any]]]] = {}
    chosen, tuning, skipped = {}, [], {}
    for problem in preset.budgets:
        curves[problem] = {}
        for method in NAMES:
            is_asked = problem in asked and method in wanted
            try:
                best, tried = _best_rate(store, preset, problem, method, is_asked)
                settings = {} if best is None else {"learning_rate": best}
                tasks = [task(preset, problem, method, seed, **settings) for seed in preset.seeds]
                runs = [store.get(one, is_asked) for one in tasks]
            except (Unavailable, RuntimeError, Missing) as error:
                skipped |= {f"{problem}, {method}": str(error)} if is_asked else {}
                continue
            tuning += tried
            chosen.update({} if best is None else {f"{problem} {NAMES[method]}": best})
            curves[problem][method] = runs
        if not curves[problem] and problem not in asked:
            del curves[problem]
    return _write(arguments, preset, curves, chosen, tuning, skipped)


class Missing(Exception):
    """A run that is not there, and that nobody asked for."""


class Store:
    """Runs by task: those on disk are read, others performed and kept at once.

    A run whose file is gone is taken from the earlier result, which has them all.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.path = arguments.out / f"forward_budget_{arguments.preset}.json"
        self.runs = Runs(self.path.with_suffix(".runs"), is_open=not arguments.summary)
        self.data, self.peers = arguments.data, arguments.peers or default_folder()
        self.only_read = arguments.summary
        before = earlier(self.path, experiment="forward-budget") or {}
        self._before = [*before.get("tuning", []), *before.get("runs", [])]

    def get(self, wanted: dict[str, Any], is_asked: bool = True) -> dict[str, Any]:
        """The task's curve; a file of other settings is another run, and is set aside."""
        rate = f"-{wanted['learning_rate']:g}" if wanted["seed"] == TUNING_SEED else ""
        name = f"{wanted['problem']}-{wanted['method']}-{wanted['seed']}{rate}"
        found = self.runs.find(name, lambda run: differences(run, wanted) or is_cut(run))
        if found is not None:
            return found
        for run in self._before:
            if not (differences(run, wanted) or is_cut(run)):
                return run if self.only_read else self.runs.keep(name, run)
        if self.only_read or not is_asked:
            raise Missing("not run")
        found = self.runs.keep(name, perform(wanted, self.data, self.peers))
        say(f"{name}: {found['test_accuracy'][-1]:.4f}, {found['seconds'][-1]:.1f} s")
        return found


def is_cut(run: dict[str, Any]) -> str:
    """What a curve lacks: it has as many numbers of each kind, and its passes are those of the whole budget."""
    lengths = {name: len(run[name]) for name in ("passes", "seconds", "test_accuracy")}
    if len(set(lengths.values())) > 1 or min(lengths.values()) < 2:
        return f"cut: {lengths}, wanted as many of each, and two at least"
    passes = run["passes"]
    if passes[-1] + (passes[1] - passes[0]) <= run["budget"]:
        return f"cut: {passes[-1]} of {run['budget']} passes"
    return ""


def _best_rate(
    store: Store, preset: Preset, problem: str, method: str, is_asked: bool
) -> tuple[float | None, list[dict[str, Any]]]:
    """The step size of the grid with the best accuracy at the end of a tuning run; None for methods without a grid."""
    if method not in RIVALS:
        return None, []
    tasks = [task(preset, problem, method, TUNING_SEED, learning_rate=rate) for rate in GRIDS[method]]
    runs = [store.get(one, is_asked) for one in tasks]
    best = max(runs, key=lambda run: run["test_accuracy"][-1] or 0.0)
    return best["learning_rate"], runs


def _write(
    arguments: argparse.Namespace,
    preset: Preset,
    curves: dict[str, Any],
    chosen: dict[str, float],
    tuning: list[dict[str, Any]],
    skipped: dict[str, str],
) -> dict[str, Any]:
    results = {
        problem: {method: statistics(runs, preset.budgets[problem]) for method, runs in by_method.items()}
        for problem, by_method in curves.items()
    }
    command = f"python -m benchmarks forward-budget --preset {arguments.preset}"
    path = arguments.out / f"forward_budget_{arguments.preset}.json"
    before = earlier(path) or {}
    parameters = before.get("parameters", {}) if arguments.summary else {}  # which needs no data
    payload = {
        "experiment": "forward-budget",
        "command": command,
        "preset": arguments.preset,
        "seeds": preset.seeds,
        "budgets": {problem: preset.budgets[problem] for problem in curves},
        "parameters": {problem: parameters.get(problem) or _parameters(problem, arguments.data) for problem in curves},
        "grids": GRIDS,
        "chosen": chosen,
        "results": results,
        "claims": claims(results),
        "skipped": skipped,
        "tuning": [_brief(run) for run in tuning],
        "runs": [_brief(run) for by_method in curves.values() for runs in by_method.values() for run in runs],
    }
    had = before.get("results", {}).items()
    lost = [f"{problem}, {m}" for problem, methods in had for m in methods if m not in curves.get(problem, {})]
    if lost:
        beside = save_result(path.with_suffix(".partial"), payload).name
        raise Refused(f"{path}: left as it is, since it has what this run lacks: {'; '.join(lost)}; it is in {beside}")
    save_result(path, payload)
    draw(curves, path.with_suffix(".png"))
    result = read(path)
    write_text(path.with_suffix(".md"), table(result) + "\n")
    return result


def _brief(run: dict[str, Any]) -> dict[str, Any]:
    rounded = {"seconds": [round(value, 3) for value in run["seconds"]]}
    return {name: value for name, value in {**run, **rounded}.items() if name != "environment"}


def _parameters(problem: str, data: Path | None) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(registry.get(problem, data).template))
