"""Running one task: ours in this process, an evolution strategy in evosax's environment."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import methods
from benchmarks.forward_budget.curve import follow
from benchmarks.forward_budget.settings import RIVALS
from benchmarks.harness.peers import ask, python_of
from benchmarks.problems import registry

_ROOT = Path(__file__).parents[2]


def perform(task: dict[str, Any], data: Path | None, peers: Path) -> dict[str, Any]:
    """The task's curve, see :func:`benchmarks.forward_budget.curve.follow`.

    Raises:
        Unavailable: evosax cannot be installed, or the strategy's process failed; with its last words.
    """
    if task["method"] not in RIVALS:
        return ours(task, data)
    return rival(task, data, peers)


def ours(task: dict[str, Any], data: Path | None = None) -> dict[str, Any]:
    """A method of :mod:`benchmarks.methods`."""
    problem = registry.get(task["problem"], data)
    natural = methods.Natural(**{name: task[name] for name in methods.Natural._fields if name in task})
    rates = task.get("learning_rate", 0.1), task.get("momentum", 0.9)
    particles = task.get("particles", 1)
    return follow(problem, methods.get(task["method"], problem, particles, *rates, natural), task)


def rival(task: dict[str, Any], data: Path | None, peers: Path) -> dict[str, Any]:
    """An evolution strategy, in a process of the environment that holds evosax."""
    python = python_of("evosax", peers)
    problem = registry.get(task["problem"], data)
    arrays = dict(zip(("train_x", "train_y", "test_x", "test_y"), (*problem.train, *problem.test), strict=True))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "data.npz"
        np.savez(file, **arrays, classes=10)
        task = json.dumps({**task, "data": str(file)})
        return ask([str(python), "-m", "benchmarks.forward_budget.evolution", task], _ROOT)
