"""``python -m benchmarks policy``: returns against episodes and environment steps, all methods in one run."""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

from benchmarks.harness import experiment
from benchmarks.harness.command import Parser, Refused, command, folder, say
from benchmarks.harness.experiment import Experiment
from benchmarks.harness.peers import default_folder
from benchmarks.harness.store import Cells
from benchmarks.harness.tables import with_origin
from benchmarks.policy import optimum
from benchmarks.policy.jobs import perform
from benchmarks.policy.picture import draw
from benchmarks.policy.settings import NAMES, PRESETS, TASKS, TUNING_SEED, Preset, grid, methods_for, task
from benchmarks.policy.summary import MOST, at_end, at_the_end, table


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
    add("--out", metavar="DIR", type=folder, help="folder for numbers, picture, table")
    parser.add_peers()
    parser.add_draw("--summary")
    return parser


@command("policy")
def main(argv: list[str]) -> int:
    """Run the command line; 2 for what the user can mend."""
    arguments = parser().parse_args(argv)
    have = PRESETS[arguments.preset].environments
    if arguments.env and not set(arguments.env) & set(have):
        raise Refused(f"--env: {', '.join(arguments.env)}; preset {arguments.preset} has {', '.join(have)}")
    asked = arguments.env or have
    if arguments.method and not any(name in methods_for(one) for one in asked for name in arguments.method):
        known = "; ".join(f"{one} has {', '.join(methods_for(one))}" for one in asked)
        raise Refused(f"--method: {', '.join(arguments.method)}; {known}")
    return experiment.run(POLICIES, arguments, POLICIES.path(arguments.preset, arguments.out))


def measure(arguments: argparse.Namespace, path: Path) -> None:
    """Run what is missing of what is asked for."""
    preset = PRESETS[arguments.preset]
    asked = [name for name in preset.environments if not arguments.env or name in arguments.env]
    wanted = [name for name in NAMES if not arguments.method or name in arguments.method]
    command = f"python -m benchmarks policy --preset {arguments.preset}"
    head = {"experiment": "policy", "preset": arguments.preset, "command": command}
    cells = Cells(path, head, keep=True, part=bool(arguments.env or arguments.method))
    peers = arguments.peers or default_folder()
    for environment in asked:
        if states := optimum.GRIDS.get(environment):
            cells.get(f"{environment}, {MOST}", states._asdict(), functools.partial(optimum.pendulum, states))
        for method in (name for name in wanted if name in methods_for(environment)):
            best = _best(cells, preset, environment, method, peers)
            if best is not None:
                wish = task(preset, environment, method, best, preset.seeds)
                _cell(cells, f"{environment}, {method}", wish, peers)
    cells.finish()


def _best(cells: Cells, preset: Preset, environment: str, method: str, peers: Path) -> float | None:
    """The setting of the grid with the best last three measurements of a tuning run; None where none could be run."""
    scores = {}
    setting, values = grid(environment, method)
    for value in values:
        wish = task(preset, environment, method, value, (TUNING_SEED,))
        found = _cell(cells, f"{environment}, {method}, {setting} {value:g}", wish, peers)
        if "skipped" in found:
            say(f"{environment}, {method}: not run ({found['skipped']})")
            return None
        scores[value] = sum(found["rows"][0]["returns"][-3:])
    return max(scores, key=lambda value: scores[value])


def _cell(cells: Cells, name: str, wish: dict[str, Any], peers: Path) -> Any:
    return cells.get(name, wish, lambda: perform(wish, peers))


POLICIES = Experiment(
    "policy",
    "Policies, by environment steps",
    "policy_{preset}",
    measure,
    table,
    draw,
    says=lambda found: {"returns": at_end(found)},
    sections={"policy.md#policies": with_origin(at_the_end)},
    needs=("matplotlib", "gymnax", "optax"),
)
