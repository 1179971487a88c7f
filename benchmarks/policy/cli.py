"""``python -m benchmarks policy``: returns against episodes and environment steps, all methods in one run."""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

from benchmarks.harness.command import Parser, Refused, command, folder, require, say
from benchmarks.harness.peers import default_folder
from benchmarks.harness.store import Cells, result, show
from benchmarks.policy import optimum
from benchmarks.policy.jobs import perform
from benchmarks.policy.picture import draw
from benchmarks.policy.settings import GRIDS, NAMES, PRESETS, TASKS, TUNING_SEED, Preset, methods_for, task
from benchmarks.policy.summary import MOST, at_end, table
from benchmarks.reporting import RESULTS, print_result
from eki_jax.training.files import claimed


def parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="python -m benchmarks policy",
        description="Policies without derivatives: the natural policy gradient, natural and EKI steps on episodes as "
        "a black box, evosax's OpenES and PGPE, and PPO, which differentiates. One setting of each is chosen from a "
        "grid, with a seed that no reported run has. What is finished is kept and not repeated, so an interrupted "
        "command goes on. The last line on standard output is one JSON object.",
    )
    parser.add_preset(choices=tuple(PRESETS), help="size (default: cpu)")
    add = parser.add_argument
    add("--env", metavar="NAME", nargs="+", choices=tuple(TASKS), help=f"run only these of {', '.join(TASKS)}")
    add("--method", metavar="M", nargs="+", choices=tuple(NAMES), help=f"run only these of {', '.join(NAMES)}")
    add("--out", metavar="DIR", type=folder, default=RESULTS, help="folder for numbers, picture, table")
    parser.add_peers()
    parser.add_draw("--summary")
    return parser


@command("policy")
def main(argv: list[str]) -> int:
    """Run the command line; 2 for what the user can mend."""
    arguments = parser().parse_args(argv)
    require("matplotlib", "gymnax", "optax")
    have = PRESETS[arguments.preset].environments
    if arguments.env and not set(arguments.env) & set(have):
        raise Refused(f"--env: {', '.join(arguments.env)}; preset {arguments.preset} has {', '.join(have)}")
    asked = arguments.env or have
    if arguments.method and not any(name in methods_for(one) for one in asked for name in arguments.method):
        known = "; ".join(f"{one} has {', '.join(methods_for(one))}" for one in asked)
        raise Refused(f"--method: {', '.join(arguments.method)}; {known}")
    path = arguments.out / f"policy_{arguments.preset}.jsonl"
    with claimed(arguments.out, f".policy_{arguments.preset}.lock"):
        remedy = f"run python -m benchmarks policy --preset {arguments.preset}"
        found = result(path, remedy) if arguments.draw else run(arguments, path)
        text, files = show(path, found, table, draw, remedy)
    print(text)
    print_result({"preset": arguments.preset, "returns": at_end(found), "files": files})
    return 0


def run(arguments: argparse.Namespace, path: Path) -> dict[str, Any]:
    """Run what is missing of what is asked for; returns the whole result."""
    preset = PRESETS[arguments.preset]
    asked = [name for name in preset.environments if not arguments.env or name in arguments.env]
    wanted = [name for name in NAMES if not arguments.method or name in arguments.method]
    command = f"python -m benchmarks policy --preset {arguments.preset}"
    head = {"experiment": "policy", "preset": arguments.preset, "command": command}
    cells = Cells(path, head, keep=True)
    peers = arguments.peers or default_folder()
    for environment in asked:
        if grid := optimum.GRIDS.get(environment):
            measure = functools.partial(optimum.pendulum, grid)
            cells.get(f"{environment}, {MOST}", grid._asdict(), measure)
        for method in (name for name in wanted if name in methods_for(environment)):
            best = _best(cells, preset, environment, method, peers)
            if best is not None:
                wish = task(preset, environment, method, best, preset.seeds)
                _cell(cells, f"{environment}, {method}", wish, peers)
    return cells.finish(is_whole=not (arguments.env or arguments.method))


def _best(cells: Cells, preset: Preset, environment: str, method: str, peers: Path) -> float | None:
    """The setting of the grid with the best last three measurements of a tuning run; None where none could be run."""
    scores = {}
    for value in GRIDS[method][1]:
        wish = task(preset, environment, method, value, (TUNING_SEED,))
        found = _cell(cells, f"{environment}, {method}, {GRIDS[method][0]} {value:g}", wish, peers)
        if "skipped" in found:
            say(f"{environment}, {method}: not run ({found['skipped']})")
            return None
        scores[value] = sum(found["rows"][0]["returns"][-3:])
    return max(scores, key=lambda value: scores[value])


def _cell(cells: Cells, name: str, wish: dict[str, Any], peers: Path) -> Any:
    return cells.get(name, wish, lambda: perform(wish, peers))
