"""``python -m benchmarks edf EXPERIMENT``: run it, write JSON and a picture, print a table."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks.edf import convergence, full_vs_stochastic, harness, stochastic
from benchmarks.edf.pictures import draw
from benchmarks.edf.progress import partial_file
from benchmarks.edf.tables import table
from benchmarks.problems.files import MissingFile
from benchmarks.reporting import RESULTS, print_result, save_result

EXPERIMENTS = {
    "convergence": "full batch on CIFAR-10: EDF-G, EDF-H, momentum, NAG, Adam",
    "stochastic": "mini-batches on MNIST and CIFAR-10: EDF-G with W1 and W2, momentum SGD, Adam",
    "full-vs-stochastic": "full batch against mini-batches on MNIST",
    "harness": "EKI, EDF-G and SGD on one problem with one budget of forward passes",
}


def main(argv: list[str]) -> int:
    """Run one experiment; 0 if it ran to its end, 1 if its data are missing."""
    options = _parser().parse_args(argv)
    if options.experiment == "table":
        print(table(json.loads(options.result.read_text(encoding="utf-8"))))
        return 0
    out = options.out or RESULTS / f"edf_{options.experiment.replace('-', '_')}_{options.preset}.json"
    try:
        result = _run(options, out)
    except MissingFile as error:
        print(f"edf {options.experiment}: {error}")
        return 1
    save_result(out, result)
    partial_file(out).unlink(missing_ok=True)
    saved = json.loads(out.read_text(encoding="utf-8"))
    picture = draw(saved, out.with_suffix(".png"))
    print(table(saved))
    summary = {key: saved[key] for key in ("experiment", "preset", "claims") if key in saved}
    print_result({**summary, "out": out.name, "picture": picture.name})
    return 0


def _run(options: argparse.Namespace, out: Path) -> dict:
    if options.experiment == "stochastic":
        return stochastic.run(options.preset, options.data, out, options.problem, options.seed)
    modules = {"convergence": convergence, "full-vs-stochastic": full_vs_stochastic, "harness": harness}
    return modules[options.experiment].run(options.preset, options.data, out, options.seed)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks edf", description=__doc__)
    commands = parser.add_subparsers(dest="experiment", required=True)
    for name, summary in EXPERIMENTS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        command.add_argument("--preset", choices=("smoke", "cpu", "full"), default="cpu", help="size (default: cpu)")
        command.add_argument("--data", type=Path, help="folder with the data; else EKI_JAX_DATA, else a download")
        command.add_argument("--out", type=Path, help="JSON to write; the picture goes beside it")
        command.add_argument("--seed", type=int, default=0)
        if name == "stochastic":
            command.add_argument(
                "--problem", nargs="+", choices=tuple(stochastic.PROBLEMS), default=["mnist", "cifar10"]
            )
    command = commands.add_parser("table", help="print a result's table", description="print a result's table")
    command.add_argument("result", type=Path, help="a JSON file that one of the others wrote")
    return parser
