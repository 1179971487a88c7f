"""A simulator outside of JAX that takes all members at once, inside of a compiled step.

``jax.pure_callback`` lets a compiled step call any NumPy function. By itself that is one call for each member, one
after another, so that no pool inside could help. Two settings make it one call for all: ``vmap_method="expand_dims"``
hands the whole batch over, and ``chunk_size=J`` puts all members into one batch.

    python examples/calibration_batches.py
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

from eki_jax import kalman

PARTICLES, PLACES = 40, np.linspace(0.1, 2.0, 8)
TRUTH, SD = np.array([0.7, -0.4]), 0.02


def simulate(parameters: np.ndarray) -> np.ndarray:
    """One run: a damped oscillation, of the logarithms of its frequency and of its damping."""
    frequency, damping = np.exp(parameters)
    return np.cos(2 * frequency * PLACES) * np.exp(-damping * PLACES)


def batched(pool: ThreadPoolExecutor, sizes: list[int]) -> Callable[[np.ndarray], np.ndarray]:
    """A function of all members, shape (J, 2), that runs them on a pool and notes how many came in a call."""

    def call(members: np.ndarray) -> np.ndarray:
        members = np.asarray(members)
        rows = members.reshape(-1, 2)  # one member alone comes without an axis of members
        sizes.append(len(rows))
        found = np.stack(list(pool.map(simulate, rows))).astype(np.float32)
        return found.reshape(*members.shape[:-1], len(PLACES))

    return call


def main(chunk_size: int | None = PARTICLES) -> tuple[np.ndarray, list[int], int]:
    """The mean after the last step, the sizes of the calls, and the number of steps."""
    sizes: list[int] = []
    with ThreadPoolExecutor(2) as pool:
        call = batched(pool, sizes)

        def forward(u: jax.Array, x: None) -> jax.Array:
            shape = jax.ShapeDtypeStruct((len(PLACES),), jnp.float32)
            return jax.pure_callback(call, shape, u, vmap_method="expand_dims")

        solver = kalman.etki(forward, SD**2, kalman.data_misfit_controller(), chunk_size=chunk_size)
        state = solver.init(jax.random.normal(jax.random.key(0), (PARTICLES, 2)))
        step, count = jax.jit(solver.step), 0
        while not solver.done(state):
            state, _ = step(state, (None, jnp.asarray(simulate(TRUTH), jnp.float32)))
            count += 1
        mean = np.asarray(solver.estimate(state))
    print(f"{count} steps, calls of {sorted(set(sizes))} members, mean {mean.round(3)}, truth {TRUTH}")
    return mean, sizes, count


if __name__ == "__main__":
    main()
