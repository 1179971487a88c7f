"""The paper's cells that are still to be run at the paper's own settings, in the order of value for time."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax

from benchmarks.harness import store
from benchmarks.harness.experiment import beside
from benchmarks.paper import classification, cli, experiments
from benchmarks.paper.classification import Cell
from benchmarks.problems import registry
from benchmarks.scaling.measured import forward_flops
from eki_jax import flax as models

#: What a cell is worth: one beside which the paper has a number, and one beside which it has none; and a further seed.
VALUES = {"with the paper's number": 1.0, "without": 0.5, "a further seed": 0.1}
#: Of the rate of matrix products, where no step has been measured yet; what a process takes before it begins, seconds.
SHARE, START = 0.25, 20.0
# A forward pass, and the kernel's two products, which are a pass each; gradient methods have a backward pass among
# their passes already.
_PASSES_OF_A_STEP = 3
_IMAGES = {"cifar10": (32, 32, 3), "svhn": (32, 32, 3)}


class Job(NamedTuple):
    """One seed of one cell.

    Attributes:
        table: As ``python -m benchmarks paper`` has it.
        name: The cell's.
        seed: Its seed.
        value: What it is worth.
        seconds: What it takes, about.
    """

    table: str
    name: str
    seed: int
    value: float
    seconds: float

    @property
    def title(self) -> str:
        """As the list of stages has it."""
        return f"paper, {self.table}: {self.name}, seed {self.seed}"


def tables() -> dict[str, Any]:
    """The experiments that are tables of trained networks, and their modules."""
    modules = {name: experiments.module(name) for name in experiments.EXPERIMENTS}
    return {name: module for name, module in modules.items() if hasattr(module, "cells") and not hasattr(module, "run")}


def plan(preset: str, folder: Path, seed: int, rate: float) -> list[Job]:
    """Every seed of every cell that neither ``folder`` nor the committed results have, the best value first.

    Args:
        preset: Of the cells.
        folder: Where the tables of finished cells are.
        seed: The first.
        rate: Operations a second of a step.
    """
    jobs = []
    files = [path for place in (cli.COMMITTED, folder) for path in sorted(place.glob("*.jsonl"))]
    finished = {name: run for path in files for name, run in store.read(path).get(store.RUNS, {}).items()}
    for table, module in tables().items():
        kept = store.Runs(folder / f"{table}.jsonl", others=finished)
        for cell in module.cells(preset):
            if cell.reason:
                continue
            first = VALUES["without" if cell.final is None else "with the paper's number"]
            for one in range(seed, seed + cell.seeds):
                if classification.kept_run(cell, kept, one):
                    continue
                value = first if one == seed else VALUES["a further seed"]
                jobs.append(Job(table, cell.name, one, value, START + operations(cell) / rate))
    return sorted(jobs, key=lambda job: job.seconds / job.value)


def operations(cell: Cell) -> float:
    """About how many operations a seed takes."""
    return _of_one_pass(cell.problem) * cell.forward_passes * (_PASSES_OF_A_STEP if cell.is_ensemble else 1)


@functools.cache
def _of_one_pass(problem: str) -> float:
    kind, _, _ = problem.partition("-")
    shape = (28, 28) if problem.endswith("rnn") else _IMAGES.get(kind, (28, 28, 1))
    x = jax.ShapeDtypeStruct((1, *shape), "float32")
    forward, template = models.linen_forward(registry.PROBLEMS[problem][1](), x)
    return forward_flops(forward, template, x)


def run(table: str, name: str, seed: int, preset: str, out: Path, data: Path | None) -> dict[str, Any]:
    """Train one seed of a cell, or go on with it, and make its table of all that are finished.

    Raises:
        MissingFile: A file of the images is missing.
    """
    module, path = tables()[table], out / f"{table}.jsonl"
    (cell,) = (cell for cell in module.cells(preset) if cell.name == name)
    record = classification.run_cell(cell, store.Runs(path), data, seed)
    classification.run_table(table, module.cells, preset, out, data, seed, only=None)
    for made in beside(cli.paper(table), path, store.read(path)):
        made.write(made.path)
    return {"seconds": record["seconds"], "test_accuracy": record["history"][-1]["test_accuracy_mean"]}
