"""Training epoch by epoch with a look at the ensemble in between, for figures of what particles do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks.problems.registry import Problem
from eki_jax.training import Method, epoch


def observe_epochs(
    method: Method,
    problem: Problem,
    observe: Callable[[Any, jax.Array], Any],
    *,
    batch_size: int,
    epochs: int,
    key: jax.Array,
) -> list[Any]:
    """Train, and keep what ``observe(state, key)`` says after every epoch.

    Args:
        method: What to train with; a method that redraws does so after the look.
        problem: Its training data are used.
        observe: Compiled; a pytree of arrays.
        batch_size: Samples a step.
        epochs: Passes over the data.
        key: Of everything random.

    Returns:
        One pytree of NumPy arrays an epoch.
    """
    x, labels = jax.device_put(problem.train)
    run = jax.jit(epoch(method, batch_size), donate_argnums=0)
    look = jax.jit(observe)
    state, seen = jax.jit(method.init)(jax.random.fold_in(key, 0)), []
    for index in range(epochs):
        epoch_key, look_key, redraw_key = jax.random.split(jax.random.fold_in(key, index + 1), 3)
        state, _ = run(state, epoch_key, x, labels)
        seen.append(jax.tree.map(np.asarray, look(state, look_key)))
        if method.redraw is not None:
            state = method.redraw(state, redraw_key, method.ensemble_size(index))
    return seen
