"""One analysis by cuthbert's ensemble Kalman filter, compiled; in the ensemble's space where M > J."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from cuthbertlib.ensemble_kalman import filter_update
from linear import problem
from timing import measure, resident, serve


def main(task: dict) -> dict:
    """Time it."""
    baseline = resident()
    ensemble, index, weights, data = map(jnp.asarray, problem(task))
    subspace = task["M"] > task["J"]
    noise = jnp.ones(task["M"]) if subspace else jnp.eye(task["M"])

    def one(key: jax.Array, ensemble: jax.Array, noise: jax.Array) -> jax.Array:
        observe = lambda u: weights * u[index]
        return filter_update(key, ensemble, observe, noise, data, perturbed_obs=True, ensemble_subspace=subspace)[0]

    compiled = jax.jit(one, donate_argnums=1)
    state = [ensemble]
    del ensemble

    def update() -> None:
        state[0] = jax.block_until_ready(compiled(jax.random.key(0), state[0], noise))

    return {**measure(update, task["repeats"], baseline), "mean": float(state[0][:, index[0]].mean())}


if __name__ == "__main__":
    serve(main)
