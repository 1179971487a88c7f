"""``python -m benchmarks calibration NAME``: run it, write its numbers, its picture and its table."""

from __future__ import annotations

import importlib
from pathlib import Path

from benchmarks.calibration import page
from benchmarks.harness import store
from benchmarks.harness.command import Parser, command, folder, require
from benchmarks.harness.peers import default_folder
from benchmarks.reporting import RESULTS, print_result
from eki_jax.training.files import claimed

# name -> module with TITLE, run(preset, cells, peers), table(result) and draw(result, path)
EXPERIMENTS = {
    "linear": "benchmarks.calibration.linear",
    "lorenz63": "benchmarks.calibration.lorenz63",
    "lorenz96": "benchmarks.calibration.lorenz96",
    "crashes": "benchmarks.calibration.crashes",
    "bounds": "benchmarks.calibration.bounds",
    "peers": "benchmarks.calibration.others",
}
COMMITTED = RESULTS / "calibration"


@command("calibration")
def main(argv: list[str]) -> int:
    """Run one experiment; its picture and its table go into the page where the numbers are the committed ones."""
    arguments = _parser().parse_args(argv)
    if arguments.name == "list":
        for name, module in EXPERIMENTS.items():
            print(f"{name:12}{importlib.import_module(module).TITLE}")
        return 0
    require("matplotlib")
    experiment = importlib.import_module(EXPERIMENTS[arguments.name])
    out = arguments.out or (Path("runs/calibration-smoke") if arguments.preset == "smoke" else COMMITTED)
    path = out / f"{arguments.name}.jsonl"
    text = f"python -m benchmarks calibration {arguments.name} --preset {arguments.preset}"
    with claimed(out, ".calibration.lock"):
        if arguments.draw:
            remedy = "wanted a run without --draw"
            result = store.result(path, remedy)
            store.made_of(path, result, experiment.table, remedy)
        else:
            cells = store.Cells(path, {"command": text, "preset": arguments.preset}, keep=arguments.keep)
            experiment.run(arguments.preset, cells, (arguments.peers or default_folder()).resolve())
            result = cells.finish()
        is_committed = out.resolve() == COMMITTED.resolve()
        written = page.write(arguments.name, result, experiment, out, is_committed=is_committed)
    print(experiment.table(result))
    summary = {key: result[key] for key in ("preset", "claims", "skipped") if key in result}
    print_result({"experiment": arguments.name, **summary, "numbers": path.name, **written})
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="python -m benchmarks calibration",
        description="Calibrate simulators with every method, and with other libraries. What an interrupted run "
        "finished is kept, so that the same command goes on. The last line on standard output is one JSON object.",
    )
    parser.add_argument("name", metavar="NAME", choices=[*EXPERIMENTS, "list"], help="an experiment, or: list")
    parser.add_preset(help="smoke: seconds; cpu: some ten minutes on one core; full: more seeds, sizes (default: cpu)")
    parser.add_argument("--out", metavar="DIR", type=folder, help="folder (default: benchmarks/results/calibration)")
    parser.add_keep()
    parser.add_draw()
    parser.add_peers()
    return parser
