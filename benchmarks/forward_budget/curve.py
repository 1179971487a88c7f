"""A run as a curve: test accuracy against forward passes and against seconds."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.problems.registry import Problem
from eki_jax.training import Method


def follow(problem: Problem, method: Method, task: dict[str, Any]) -> dict[str, Any]:
    """Train until the budget is spent; batches are drawn without replacement within every epoch.

    Args:
        problem: Its training set and test set.
        method: Its initial state, step, estimate and passes; and its redrawing, which happens between epochs.
        task: ``batch``, ``seed``, ``budget`` (sample-forward passes in all) and ``every`` (how many between two
            measurements, rounded down to whole steps, at least one); and ``particles``, where it has some.

    Returns:
        ``passes``, ``seconds`` (of the steps alone: neither compilation nor measuring) and
        ``test_accuracy``, one number a measurement, and ``compile_seconds``.

    Raises:
        ValueError: The budget does not pay for one step.
    """
    batch = min(task["batch"], len(problem.train[1]))
    cost = method.passes(task.get("particles", 1)) * batch
    if cost > task["budget"]:
        raise ValueError(f"budget: {task['budget']} passes; wanted at least the {cost} of one step")
    steps = max(1, task["every"] // cost)
    x, labels, test_x, test_labels = jax.device_put((*problem.train, *problem.test))
    first_key, key = jax.random.split(jax.random.key(task["seed"]))
    an_epoch = max(1, len(problem.train[1]) // batch)

    def one(state: Any, rows: jax.Array, index: jax.Array, x: jax.Array, labels: jax.Array) -> Any:
        step_key, is_last = jax.random.fold_in(key, index), index % an_epoch == an_epoch - 1
        state = method.step(state, step_key, (x[rows], labels[rows]))[0]
        if method.redraw is None:
            return state
        redrawn = lambda: method.redraw(state, jax.random.fold_in(step_key, 1), task["particles"])
        return lax.cond(is_last, redrawn, lambda: state)

    def several(state: Any, chosen: jax.Array, indices: jax.Array, x: jax.Array, labels: jax.Array) -> Any:
        body = lambda state, inputs: (one(state, *inputs, x, labels), None)
        return lax.scan(body, state, (chosen, indices))[0]

    def accuracy(state: Any, test_x: jax.Array, test_labels: jax.Array) -> jax.Array:
        return jnp.mean(jnp.argmax(problem.logits(method.estimate(state), test_x), axis=-1) == test_labels)

    batches = _batches(len(problem.train[1]), batch, task["seed"])
    chosen = jnp.stack([next(batches) for _ in range(steps)])
    state = jax.jit(method.init)(first_key)
    started = time.perf_counter()
    if method.compiled_loop:
        advance = jax.jit(several).lower(state, chosen, jnp.arange(steps), x, labels).compile()
    else:
        step = jax.jit(one).lower(state, chosen[0], jnp.int32(0), x, labels).compile()

        def advance(state: Any, chosen: jax.Array, indices: jax.Array, x: jax.Array, labels: jax.Array) -> Any:
            for rows, index in zip(chosen, indices, strict=True):
                state = step(state, rows, index, x, labels)
            return state

    measure = jax.jit(accuracy).lower(state, test_x, test_labels).compile()
    curve: dict[str, Any] = {"compile_seconds": time.perf_counter() - started}
    passes, seconds = [0], [0.0]
    accuracies = [float(measure(state, test_x, test_labels))]
    while passes[-1] + steps * cost <= task["budget"]:
        indices = passes[-1] // cost + jnp.arange(steps)
        started = time.perf_counter()
        state = jax.block_until_ready(advance(state, chosen, indices, x, labels))
        seconds.append(seconds[-1] + time.perf_counter() - started)
        chosen = jnp.stack([next(batches) for _ in range(steps)])
        passes.append(passes[-1] + steps * cost)
        accuracies.append(round(float(measure(state, test_x, test_labels)), 6))
    return {**curve, "passes": passes, "seconds": seconds, "test_accuracy": accuracies}


def _batches(samples: int, size: int, seed: int) -> Iterator[np.ndarray]:
    """Rows of the batches, epoch after epoch; those that do not fill a batch wait for the next shuffle."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(samples)
        yield from order[: samples // size * size].reshape(-1, size)
