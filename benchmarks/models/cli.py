"""``python -m benchmarks models``: every model of the zoo, trained, compared and described."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
from pathlib import Path
from typing import Any

import jax

from benchmarks.harness import experiment
from benchmarks.harness.command import Parser, Refused, command, file
from benchmarks.harness.experiment import Experiment
from benchmarks.harness.store import Cells
from benchmarks.harness.tables import with_origin
from benchmarks.models import measures
from benchmarks.models.entry import Model
from benchmarks.models.table import cell_name, table, troubles
from benchmarks.models.zoo import MODELS

DEVICES = 8


@command("models")
def main(argv: list[str]) -> int:
    """Run the command line; 1 where a cell is wrong, 2 for what the user can mend."""
    arguments = _parser().parse_args(argv)
    _chosen(arguments)  # refused before a folder is made
    return experiment.run(ZOO, arguments, arguments.out or ZOO.path(arguments.preset))


def measure(arguments: argparse.Namespace, path: Path) -> None:
    """Measure the models that are asked for, beside those of an earlier run with the same preset."""
    chosen = _chosen(arguments)
    _make_devices()
    sizes = measures.PRESETS[arguments.preset]
    command = f"python -m benchmarks models --preset {arguments.preset}"
    head = {"experiment": "models", "command": command, "preset": arguments.preset}
    cells = Cells(path, head, keep=arguments.keep, part=len(chosen) < len(MODELS))
    optimized = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)  # nearly all of the time is the compiler's
    try:
        for model in chosen:
            cells.get(cell_name(model), {"sizes": sizes._asdict()}, lambda model=model: _columns(model, sizes))
            jax.clear_caches()
    finally:
        jax.config.update("jax_disable_most_optimizations", optimized)
    cells.finish()


def _chosen(arguments: argparse.Namespace) -> list[Model]:
    """The models that are asked for; raises Refused where there are none."""
    chosen = [
        model
        for model in MODELS
        if (not arguments.api or model.api in arguments.api)
        and (not arguments.model or any(part in model.name for part in arguments.model))
    ]
    if not chosen:
        raise Refused(f"--model {arguments.model} --api {arguments.api}: no model of the zoo")
    return chosen


def _columns(model: Model, sizes: measures.Sizes) -> dict[str, Any]:
    instance = model.make()
    found = {column: measures.measure(model, instance, column, sizes) for column in measures.COLUMNS}
    return {"parameters": sum(leaf.size for leaf in jax.tree.leaves(instance.params)), **found}


def _make_devices() -> None:
    """Virtual devices on a processor, unless there are some already, and a compiler in a hurry."""
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_force_host_platform_device_count" in flags:
        return
    flags += f" --xla_force_host_platform_device_count={DEVICES} --xla_cpu_parallel_codegen_split_count=1"
    if importlib.metadata.version("jaxlib").startswith("0.10."):  # XLA exits at a flag that it does not know
        flags += " --xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] = flags.strip()


def _parser() -> Parser:
    parser = Parser(
        prog="python -m benchmarks models",
        description="Models that people bring, in linen, nnx, equinox and as plain functions: trained by euler and by "
        "the natural gradient, low rank against explicit particles, the localized direction against the exact one, "
        "eight devices against one. Numbers that miss their bounds are called wrong, and the exit status is 1. "
        "The last line on standard output is one JSON object.",
    )
    parser.add_preset(choices=tuple(measures.PRESETS), help="smoke: fewer particles and steps; cpu (default)")
    words = "file of the numbers (default: benchmarks/results/models.jsonl)"
    parser.add_argument("--out", "--json", metavar="FILE", type=file, help=words)
    parser.add_argument("--model", metavar="TEXT", nargs="+", help="only models whose names have one of these in them")
    parser.add_argument(
        "--api", nargs="+", choices=("linen", "nnx", "equinox", "plain"), help="only models of these APIs"
    )
    parser.add_keep()
    parser.add_draw()
    return parser


_table = with_origin(lambda found: table(found))
ZOO = Experiment(
    "models",
    "Models that people bring",
    "models",
    measure,
    _table,
    says=lambda found: {"models": len(found["cells"]), "wrong": troubles(found)},
    wrong=lambda found: troubles(found),
    sections={"models.md#models": _table},
    needs=(),
)
