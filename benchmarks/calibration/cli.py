"""``python -m benchmarks calibration NAME``: run it, write its numbers, its picture and its table."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path

from benchmarks.calibration import page
from benchmarks.calibration.cells import Cells
from benchmarks.performance.environments import default_folder
from benchmarks.reporting import RESULTS, print_result, save_result

# name -> module with TITLE, run(preset, cells, peers), table(result) and draw(result, path)
EXPERIMENTS = {
    "linear": "benchmarks.calibration.linear",
    "lorenz63": "benchmarks.calibration.lorenz63",
    "lorenz96": "benchmarks.calibration.lorenz96",
    "crashes": "benchmarks.calibration.crashes",
    "bounds": "benchmarks.calibration.bounds",
    "peers": "benchmarks.calibration.others",
}
PRESETS = ("smoke", "cpu", "full")
COMMITTED = RESULTS / "calibration"


def main(argv: list[str]) -> int:
    """Run one experiment; its picture and its table go into the page where the numbers are the committed ones."""
    arguments = _parser().parse_args(argv)
    if arguments.name == "list":
        for name, module in EXPERIMENTS.items():
            print(f"{name:12}{importlib.import_module(module).TITLE}")
        return 0
    experiment = importlib.import_module(EXPERIMENTS[arguments.name])
    out = arguments.out or (Path("runs/calibration-smoke") if arguments.preset == "smoke" else COMMITTED)
    path = out / f"{arguments.name}.json"
    command = f"python -m benchmarks calibration {arguments.name} --preset {arguments.preset}"
    cells = Cells(path, {"command": command, "preset": arguments.preset}, keep=arguments.keep, say=_say)
    if not arguments.draw:
        experiment.run(arguments.preset, cells, arguments.env_dir.resolve())
        cells.drop_others()
        save_result(path, cells.payload())
    elif not path.exists():
        print(f"calibration {arguments.name}: no {path.name} to draw; wanted a run without --draw", file=sys.stderr)
        return 2
    result = json.loads(path.read_text(encoding="utf-8"))
    written = page.write(arguments.name, result, experiment, out, is_committed=out.resolve() == COMMITTED.resolve())
    print(experiment.table(result))
    summary = {key: result[key] for key in ("preset", "claims", "skipped") if key in result}
    print_result({"experiment": arguments.name, **summary, "numbers": path.name, **written})
    return 0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks calibration",
        description="Calibrate simulators with every method, and with other libraries. The last line on standard "
        "output is one JSON object.",
    )
    parser.add_argument("name", metavar="NAME", choices=[*EXPERIMENTS, "list"], help="an experiment, or: list")
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        default="cpu",
        help="smoke: seconds; cpu: some ten minutes on one core; full: more seeds and sizes (default: cpu)",
    )
    parser.add_argument("--out", metavar="DIR", type=Path, help="folder (default: benchmarks/results/calibration)")
    parser.add_argument("--keep", action="store_true", help="keep the cells that an interrupted run finished")
    parser.add_argument("--draw", action="store_true", help="run nothing: picture and table of the numbers there")
    parser.add_argument("--env-dir", type=Path, default=default_folder(), help="where other libraries are installed")
    return parser
