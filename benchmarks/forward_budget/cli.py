"""``python -m benchmarks forward-budget``: test accuracy for a number of forward passes, all methods in one run."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import jax

from benchmarks.forward_budget.jobs import perform
from benchmarks.forward_budget.picture import draw
from benchmarks.forward_budget.settings import GRIDS, NAMES, PRESETS, RIVALS, TITLES, TUNING_SEED, Preset, task
from benchmarks.forward_budget.summary import claims, statistics, table
from benchmarks.performance.environments import Unavailable, default_folder
from benchmarks.problems import registry
from benchmarks.problems.files import MissingFile
from benchmarks.reporting import RESULTS, print_result, save_result


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks forward-budget",
        description="Test accuracy against sample-forward passes and against wall time: natural-gradient EKI, EKI(R),\n"
        "evosax's OpenES and PGPE at the best step size of a grid, and momentum SGD (a gradient is three passes).\n"
        "Finished runs are kept under DIR/forward_budget_PRESET.runs and not repeated, so an interrupted command goes\n"
        "on. The last line on standard output is one JSON object.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--preset", choices=tuple(PRESETS), default="cpu", help="size (default: cpu)")
    parser.add_argument("--out", metavar="DIR", type=Path, default=RESULTS, help="folder for JSON, picture and table")
    parser.add_argument(
        "--data", metavar="DIR", type=Path, help="folder with the data; else EKI_JAX_DATA, else download"
    )
    parser.add_argument("--problem", metavar="P", nargs="+", choices=tuple(TITLES), help="only these of the preset's")
    parser.add_argument(
        "--method", metavar="M", nargs="+", choices=tuple(NAMES), help=f"only these of {', '.join(NAMES)}"
    )
    parser.add_argument("--peers", metavar="DIR", type=Path, help="folder of the environment that holds evosax")
    parser.add_argument("--summary", action="store_true", help="run nothing: summarize the runs that are there")
    return parser


def main(argv: list[str]) -> int:
    """Run the command line; 2 for what the user can mend."""
    arguments = parser().parse_args(argv)
    try:
        result = run(arguments)
    except (ValueError, MissingFile) as error:
        print(f"forward-budget: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("forward-budget: interrupted; the same command goes on with the runs that are left", file=sys.stderr)
        return 130
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
    """Run what is missing and write the result, its picture and its table; returns the result."""
    preset = PRESETS[arguments.preset]
    store = Store(arguments)
    problems = [name for name in preset.budgets if not arguments.problem or name in arguments.problem]
    wanted = [name for name in NAMES if not arguments.method or name in arguments.method]
    if not problems:
        raise ValueError(f"--problem: {arguments.problem}; preset {arguments.preset} has {', '.join(preset.budgets)}")
    curves: dict[str, dict[str, list[dict[str, Any]]]] = {}
    chosen, tuning, skipped = {}, [], {}
    for problem in problems:
        curves[problem] = {}
        for method in wanted:
            try:
                best, tried = _best_rate(store, preset, problem, method)
                settings = {} if best is None else {"learning_rate": best}
                runs = [store.get(task(preset, problem, method, seed, **settings)) for seed in preset.seeds]
            except (Unavailable, RuntimeError, Missing) as error:
                skipped[f"{problem}, {method}"] = str(error)
                continue
            tuning += tried
            chosen.update({} if best is None else {f"{problem} {NAMES[method]}": best})
            curves[problem][method] = runs
    return _write(arguments, preset, curves, chosen, tuning, skipped)


class Missing(Exception):
    """A run that is not there, with ``--summary``."""


class Store:
    """Runs by task: those on disk are read, others performed and kept at once."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.folder = arguments.out / f"forward_budget_{arguments.preset}.runs"
        self.data, self.peers = arguments.data, arguments.peers or default_folder()
        self.only_read = arguments.summary

    def get(self, wanted: dict[str, Any]) -> dict[str, Any]:
        """The task's curve; a file of other settings is another run and is replaced."""
        rate = f"-{wanted['learning_rate']:g}" if wanted["seed"] == TUNING_SEED else ""
        path = self.folder / f"{wanted['problem']}-{wanted['method']}-{wanted['seed']}{rate}.json"
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            if all(found.get(name) == value for name, value in wanted.items()):
                return found
        if self.only_read:
            raise Missing("not run")
        save_result(path, perform(wanted, self.data, self.peers))
        found = json.loads(path.read_text(encoding="utf-8"))
        print(
            f"{path.stem}: {found['test_accuracy'][-1]:.4f}, {found['seconds'][-1]:.1f} s", file=sys.stderr, flush=True
        )
        return found


def _best_rate(store: Store, preset: Preset, problem: str, method: str) -> tuple[float | None, list[dict[str, Any]]]:
    """The step size of the grid with the best accuracy at the end of a tuning run; None for methods without a grid."""
    if method not in RIVALS:
        return None, []
    runs = [store.get(task(preset, problem, method, TUNING_SEED, learning_rate=rate)) for rate in GRIDS[method]]
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
    payload = {
        "experiment": "forward-budget",
        "command": command,
        "preset": arguments.preset,
        "seeds": preset.seeds,
        "budgets": {problem: preset.budgets[problem] for problem in curves},
        "parameters": {problem: _parameters(problem, arguments.data) for problem in curves},
        "grids": GRIDS,
        "chosen": chosen,
        "results": results,
        "claims": claims(results),
        "skipped": skipped,
        "tuning": [_brief(run) for run in tuning],
        "runs": [_brief(run) for by_method in curves.values() for runs in by_method.values() for run in runs],
    }
    path = save_result(arguments.out / f"forward_budget_{arguments.preset}.json", payload)
    draw(curves, path.with_suffix(".png"))
    result = json.loads(path.read_text(encoding="utf-8"))
    path.with_suffix(".md").write_text(table(result) + "\n", encoding="utf-8")
    return result


def _brief(run: dict[str, Any]) -> dict[str, Any]:
    rounded = {"seconds": [round(value, 3) for value in run["seconds"]]}
    return {name: value for name, value in {**run, **rounded}.items() if name != "environment"}


def _parameters(problem: str, data: Path | None) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(registry.get(problem, data).template))
