"""One generation (ask, evaluate, tell) of evosax's OpenES or PGPE with the same network and batch, compiled."""

from __future__ import annotations

from itertools import pairwise

import evosax.algorithms
import jax
import jax.numpy as jnp
import optax
from timing import measure, resident, serve


def main(task: dict) -> dict:
    """Time it."""
    size, batch, widths = task["J"], task["batch"], task["widths"]
    key = jax.random.key(0)
    square = jnp.ones((2048, 2048))
    product = jax.jit(lambda a: a @ a)
    rate = measure(lambda: product(square).block_until_ready(), 7)
    baseline = resident()
    solution = [(jnp.zeros((i, o)), jnp.zeros(o)) for i, o in pairwise(widths)]
    x, labels = jax.random.normal(key, (batch, widths[0])), jax.random.randint(key, (batch,), 0, widths[-1])
    strategy = getattr(evosax.algorithms, task["strategy"])(
        population_size=size, solution=solution, optimizer=optax.adam(0.01)
    )
    parameters = strategy.default_params

    def loss(layers: list) -> jax.Array:
        hidden = x
        for w, b in layers[:-1]:
            hidden = jax.nn.relu(hidden @ w + b)
        w, b = layers[-1]
        return optax.softmax_cross_entropy_with_integer_labels(hidden @ w + b, labels).mean()

    @jax.jit
    def generation(key: jax.Array, state: object) -> object:
        ask, tell = jax.random.split(key)
        population, state = strategy.ask(ask, state, parameters)
        fitness = jax.vmap(loss)(population)
        return strategy.tell(tell, population, fitness, state, parameters)[0]

    state = [strategy.init(key, solution, parameters)]

    def run() -> None:
        state[0] = jax.block_until_ready(generation(key, state[0]))

    result = measure(run, task["repeats"], baseline)
    return {
        **result,
        "matmul_rate": 2 * 2048**3 / rate["median"],
        "matmul_processor_rate": 2 * 2048**3 / rate["processor_median"],
    }


if __name__ == "__main__":
    serve(main)
