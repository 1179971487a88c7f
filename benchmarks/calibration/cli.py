"""``python -m benchmarks calibration NAME``: run it, write its numbers, its picture and its table."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

from benchmarks.harness import experiment
from benchmarks.harness.command import Parser, command, folder
from benchmarks.harness.experiment import Experiment, Result
from benchmarks.harness.peers import default_folder
from benchmarks.harness.store import Cells
from benchmarks.harness.tables import with_origin

# name -> module with TITLE, run(preset, cells, peers), table(result) and draw(result, path)
MODULES = {
    "linear": "benchmarks.calibration.linear",
    "lorenz63": "benchmarks.calibration.lorenz63",
    "lorenz96": "benchmarks.calibration.lorenz96",
    "crashes": "benchmarks.calibration.crashes",
    "bounds": "benchmarks.calibration.bounds",
    "peers": "benchmarks.calibration.others",
}


def calibration(name: str) -> Experiment:
    """An experiment by its name."""
    of = importlib.import_module(MODULES[name])

    def measure(arguments: argparse.Namespace, path: Path) -> None:
        text = f"python -m benchmarks calibration {name} --preset {arguments.preset}"
        head = {"experiment": f"calibration {name}", "command": text, "preset": arguments.preset}
        cells = Cells(path, head, keep=arguments.keep)
        of.run(arguments.preset, cells, (arguments.peers or default_folder()).resolve())
        cells.finish()

    def says(found: Result) -> Result:
        return {key: found[key] for key in ("claims", "skipped") if key in found}

    table = with_origin(of.table)
    place, picture = f"calibration_benchmarks.md#{name}", f"docs/images/calibration_{name}.png"
    file = f"calibration/{name}"
    return Experiment(
        f"calibration {name}", of.TITLE, file, measure, table, of.draw, says, picture=picture, sections={place: table}
    )


@command("calibration")
def main(argv: list[str]) -> int:
    """Run one experiment, or list them; 2 for what the user can mend."""
    arguments = _parser().parse_args(argv)
    if arguments.name == "list":
        for name in MODULES:
            print(f"{name:12}{calibration(name).title}")
        return 0
    of = calibration(arguments.name)
    return experiment.run(of, arguments, of.path(arguments.preset, arguments.out))


def _parser() -> Parser:
    parser = Parser(
        prog="python -m benchmarks calibration",
        description="Calibrate simulators with every method, and with other libraries. What an interrupted run "
        "finished is kept, so that the same command goes on. The last line on standard output is one JSON object.",
    )
    parser.add_argument("name", metavar="NAME", choices=[*MODULES, "list"], help="an experiment, or: list")
    parser.add_preset(help="smoke: seconds; cpu: some ten minutes on one core; full: more seeds, sizes (default: cpu)")
    parser.add_argument("--out", metavar="DIR", type=folder, help="folder (default: benchmarks/results/calibration)")
    parser.add_keep()
    parser.add_draw()
    parser.add_peers()
    return parser
