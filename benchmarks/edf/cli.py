"""``python -m benchmarks edf EXPERIMENT``: run it, write numbers and a picture, print a table."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from benchmarks.edf import convergence, full_vs_stochastic, harness, stochastic
from benchmarks.edf.pictures import draw
from benchmarks.edf.tables import table
from benchmarks.harness import store
from benchmarks.harness.command import Parser, Refused, command, file, require
from benchmarks.reporting import RESULTS, print_result
from eki_jax.training.files import claimed

EXPERIMENTS = {
    "convergence": "full batch on CIFAR-10: EDF-G, EDF-H, momentum, NAG, Adam",
    "stochastic": "mini-batches on MNIST and CIFAR-10: EDF-G with W1 and W2, momentum SGD, Adam",
    "full-vs-stochastic": "full batch against mini-batches on MNIST",
    "harness": "EKI, EDF-G and SGD on one problem with one budget of forward passes",
}


@command("edf")
def main(argv: list[str]) -> int:
    """Run one experiment, or print a result's table; 2 for what the user can mend."""
    options = _parser().parse_args(argv)
    if options.experiment == "table":
        remedy = "wanted a file that one of the experiments wrote"
        print(store.made_of(options.result, store.result(options.result, remedy), table, remedy))
        return 0
    require("matplotlib")
    out = options.out or RESULTS / f"edf_{options.experiment.replace('-', '_')}_{options.preset}.jsonl"
    with claimed(out.parent, f".{out.name}.lock"):
        before = store.earlier(out, options.preset, experiment=f"edf {options.experiment}") or {}
        command = f"python -m benchmarks edf {options.experiment} --preset {options.preset}"
        result = {"command": command, **_run(options, out)}
        store.save(out, _merged(out, before, result))
        saved = store.read(out)
        picture = draw(saved, out.with_suffix(".png"))
    print(table(saved))
    summary = {key: saved[key] for key in ("experiment", "preset", "claims") if key in saved}
    print_result({**summary, "out": out.name, "picture": picture.name})
    return 0


def _run(options: argparse.Namespace, out: Path) -> dict[str, Any]:
    if options.experiment == "stochastic":
        return stochastic.run(options.preset, options.data, out, options.problem, options.seed)
    modules = {"convergence": convergence, "full-vs-stochastic": full_vs_stochastic, "harness": harness}
    return modules[options.experiment].run(options.preset, options.data, out, options.seed)


def _merged(out: Path, before: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """The result with the problems of an earlier one that it has not.

    Raises:
        Refused: These are of other settings, or the earlier one has more images. It stays; the other is beside it.
    """
    parts = ("problems", "sizes")
    lost = sorted(set(before.get("problems", {})) - set(result.get("problems", {})))
    other = store.differences(before, {key: value for key, value in result.items() if key not in parts}) if lost else ""
    fewer = [key for key in ("images", "test_images") if (before.get(key) or 0) > (result.get(key) or math.inf)]
    fewer += [
        f"{problem}, {key}"
        for problem, sizes in result.get("sizes", {}).items()
        for key, value in sizes.items()
        if value < before.get("sizes", {}).get(problem, {}).get(key, 0)
    ]
    if other or fewer:
        reason = (
            f"other settings ({other}) than those of {', '.join(lost)}" if other else f"fewer of {', '.join(fewer)}"
        )
        beside = store.save(out.with_suffix(".partial"), result)
        raise Refused(f"{out}: left as it is, since this run has {reason}; it is in {beside.name}")
    return {**result, **{key: {**before[key], **result[key]} for key in parts if lost}}


def _parser() -> Parser:
    parser = Parser(prog="python -m benchmarks edf", description=__doc__)
    commands = parser.add_subparsers(dest="experiment", required=True)
    for name, summary in EXPERIMENTS.items():
        one = commands.add_parser(name, help=summary, description=summary)
        one.add_preset(help="size (default: cpu)")
        one.add_data()
        one.add_argument("--out", metavar="FILE", type=file, help="file for the numbers; the picture goes beside it")
        one.add_seed(default=0)
        if name == "stochastic":
            one.add_argument("--problem", nargs="+", choices=tuple(stochastic.PROBLEMS), default=["mnist", "cifar10"])
    one = commands.add_parser("table", help="print a result's table", description="print a result's table")
    one.add_argument("result", type=file, help="a file that one of the others wrote")
    return parser
