"""``python -m benchmarks models``: every model of the zoo, trained, compared and described."""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path
from typing import Any

import jax

from benchmarks.harness import store
from benchmarks.harness.command import Parser, Refused, command, file, say
from benchmarks.harness.tables import replaced, where
from benchmarks.models import measures
from benchmarks.models.entry import Model
from benchmarks.models.table import cell_name, table, troubles
from benchmarks.models.zoo import MODELS
from benchmarks.reporting import RESULTS, print_result
from eki_jax.training.files import claimed, write_text

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
COMMITTED = RESULTS / "models.jsonl"
DEVICES = 8


@command("models")
def main(argv: list[str]) -> int:
    """Measure, write the numbers and print the table; 1 where a cell is wrong, 2 for what the user can mend."""
    arguments = _parser().parse_args(argv)
    path = arguments.out or (Path("runs/models-smoke.jsonl") if arguments.preset == "smoke" else COMMITTED)
    chosen = [
        model
        for model in MODELS
        if (not arguments.api or model.api in arguments.api)
        and (not arguments.model or any(part in model.name for part in arguments.model))
    ]
    if not chosen:
        raise Refused(f"--model {arguments.model} --api {arguments.api}: no model of the zoo")
    with claimed(path.parent, f".{path.name}.lock"):
        if arguments.draw:
            remedy = "wanted a run without --draw"
            result = store.result(path, remedy)
            store.made_of(path, result, table, remedy)
        else:
            result = run(chosen, arguments.preset, path, keep=arguments.keep)
        if path.resolve() == COMMITTED.resolve():
            text = f"{table(result)}\n\n{where(result)}"
            write_text(PAGE, replaced(PAGE.read_text(encoding="utf-8"), "models", text))
    print(table(result))
    wrong = troubles(result)
    for line in wrong:
        say(line)
    print_result({"preset": result["preset"], "models": len(result["cells"]), "wrong": wrong, "numbers": path.name})
    return int(bool(wrong))


def run(models: list[Model], preset: str, path: Path, *, keep: bool = False) -> dict[str, Any]:
    """Measure the models and write what was found, beside the models of an earlier run with the same preset."""
    _make_devices()
    sizes = measures.PRESETS[preset]
    head = {"command": f"python -m benchmarks models --preset {preset}", "preset": preset}
    cells = store.Cells(path, head, keep=keep)
    optimized = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)  # nearly all of the time is the compiler's
    try:
        for model in models:
            cells.get(cell_name(model), {"sizes": sizes._asdict()}, lambda model=model: _columns(model, sizes))
            jax.clear_caches()
    finally:
        jax.config.update("jax_disable_most_optimizations", optimized)
    return cells.finish(is_whole=len(models) == len(MODELS))


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
