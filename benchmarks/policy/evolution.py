"""Runs of evosax's OpenES or PGPE, in the environment that holds evosax: ``python -m ... TASK``.

Network, start, episodes and measurements are those of the other methods; the algorithms, their antithetic sampling and
optimizers are evosax's and optax's own.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.forward_budget.evolution import strategy
from benchmarks.performance.peers.timing import serve
from benchmarks.policy.curve import Run, Used, follow
from benchmarks.policy.networks import Network, build
from benchmarks.policy.settings import TASKS
from eki_jax import policy


def evolution(network: Network, task: dict[str, Any]) -> Run:
    """The strategy of a task: all members play the same episodes of a generation, with the likeliest actions."""
    algorithm, parameters = strategy(task["method"], network.init(jax.random.key(0)), task)

    def init(key: jax.Array) -> Any:
        start, rest = jax.random.split(key)
        return algorithm.init(rest, network.init(start), parameters)

    def returns(params: Any, keys: jax.Array) -> policy.Episodes:
        choose = lambda seen, key: network.distribution.mode(network.forward(params, seen))
        return policy.play(network.environment, choose, keys)[0]

    def step(state: Any, key: jax.Array) -> Any:
        asking, playing, telling = jax.random.split(key, 3)
        population, state = algorithm.ask(asking, state, parameters)
        keys = jax.random.split(playing, task["episodes"])
        played = jax.vmap(returns, (0, None))(population, keys)
        fitness = -jnp.mean(played.returns, axis=1)  # evosax minimizes
        state = algorithm.tell(telling, population, fitness, state, parameters)[0]
        return state, Used(jnp.asarray(played.lengths.size, float), jnp.sum(played.lengths).astype(float))

    return Run(init, step, algorithm.get_mean)


def main(task: dict[str, Any]) -> dict[str, Any]:
    """Run the task."""
    of = TASKS[task["environment"]]
    network = build(task["environment"], of.widths, of.units)
    return {"rows": follow(network, evolution(network, task), task)}


if __name__ == "__main__":
    serve(main)
