"""``python -m benchmarks paper NAME``: one command a table or figure of the paper."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from benchmarks.paper.common import PRESETS
from benchmarks.paper.table import write_table
from benchmarks.reporting import RESULTS, print_result

# name -> module with TITLE and run(preset, out, data, seed)
EXPERIMENTS = {
    "dense": "benchmarks.paper.dense",
    "particles": "benchmarks.paper.particles",
    "noise-ratio": "benchmarks.paper.noise_ratio",
    "large-ensemble": "benchmarks.paper.large_ensemble",
    "cnn-mnist": "benchmarks.paper.cnn_mnist",
    "cnn-svhn": "benchmarks.paper.cnn_svhn",
    "rnn": "benchmarks.paper.rnn",
    "voting": "benchmarks.paper.voting",
    "online-temperatures": "benchmarks.paper.online_temperatures",
    "online-sunspots": "benchmarks.paper.online_sunspots",
    "linear": "benchmarks.paper.linear",
    "fashion-mnist": "benchmarks.paper.fashion_mnist",
}
COMMITTED = RESULTS / "paper"


def main(argv: list[str]) -> int:
    """Run an experiment, or list them; 2 for what the user can mend."""
    arguments = _parser().parse_args(argv)
    if arguments.name == "list":
        for name, module in EXPERIMENTS.items():
            print(f"{name:22}{importlib.import_module(module).TITLE}")
        return 0
    out = arguments.out or (Path("runs/paper-smoke") if arguments.preset == "smoke" else COMMITTED)
    out.mkdir(parents=True, exist_ok=True)
    experiment = importlib.import_module(EXPERIMENTS[arguments.name])
    try:
        options = {"only": arguments.only} if arguments.only else {}
        summary = experiment.run(arguments.preset, out, arguments.data, arguments.seed, **options)
    except (TypeError, ValueError) as error:
        print(f"paper: {error}", file=sys.stderr)
        return 2
    table = write_table(out, RESULTS / "paper.md" if out.resolve() == COMMITTED.resolve() else out / "paper.md")
    print(f"numbers: {out / arguments.name}.json\ntable: {table}", file=sys.stderr)
    print_result(summary)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks paper",
        description="Re-run a table or a figure of the paper. The last line on standard output is one JSON object.",
    )
    parser.add_argument("name", metavar="NAME", choices=[*EXPERIMENTS, "list"], help="an experiment, or: list")
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        default="cpu",
        help="smoke: seconds; cpu: at most an hour on two cores; full: the paper's settings (default: cpu)",
    )
    parser.add_argument(
        "--out", metavar="DIR", type=Path, help="folder for JSON and PNG (default: benchmarks/results/paper)"
    )
    parser.add_argument("--data", metavar="DIR", type=Path, help="data files; else EKI_JAX_DATA, else download")
    parser.add_argument("--seed", metavar="S", type=int, default=0, help="of everything random (default: 0)")
    parser.add_argument(
        "--only",
        metavar="TEXT",
        default="",
        help="for tables of networks: run only the cells whose name contains TEXT, such as 'DNN 1'; cells that an "
        "earlier run finished are kept",
    )
    return parser
