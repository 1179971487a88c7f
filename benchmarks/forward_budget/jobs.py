"""Running one task: ours in this process, an evolution strategy in evosax's environment."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import jax
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
    method = methods.get(task["method"], problem, particles, *rates, natural)
    if method.redraw is None:
        return follow(problem, method, task)
    batches_an_epoch = max(1, len(problem.train[1]) // task["batch"])

    def step(state: Any, key: jax.Array, batch: Any) -> Any:  # EKI(R): the particles are redrawn between epochs
        redraw = lambda state: method.redraw(state, jax.random.fold_in(key, 1), particles)
        last = state.count % batches_an_epoch == batches_an_epoch - 1
        state, metrics = method.step(state, key, batch)
        return jax.lax.cond(last, redraw, lambda state: state, state), metrics

    return follow(problem, method._replace(step=step), task)


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
