"""A run as a curve: the return of a policy against episodes and against environment steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.policy.networks import Network
from eki_jax import policy


class Used(NamedTuple):
    """What a run has used so far, floating-point numbers.

    Attributes:
        episodes: number of episodes that ended.
        steps: number of environment steps.
    """

    episodes: jax.Array
    steps: jax.Array


class Run(NamedTuple):
    """A method as the curve needs it.

    Attributes:
        init: function ``init(key) -> state``.
        step: function ``step(state, key) -> (state, used)`` of one iteration, with what that alone used.
        estimate: function ``estimate(state) -> params`` of the policy.
    """

    init: Callable[[jax.Array], Any]
    step: Callable[[Any, jax.Array], tuple[Any, Used]]
    estimate: Callable[[Any], Any]


def follow(network: Network, run: Run, task: dict[str, Any]) -> list[dict[str, Any]]:
    """Train with each of the task's seeds until the environment steps are spent.

    Returns:
        For each seed ``episodes``, ``steps``, ``seconds`` (of training alone), ``returns`` and ``quartiles`` (of the
        greedy policy's episodes, the same ones at each point), one entry a measurement.
    """

    def advance(state: Any, used: Used, until: jax.Array, key: jax.Array) -> Any:
        def body(carry: Any) -> Any:
            state, used, index = carry
            state, more = run.step(state, jax.random.fold_in(key, index))
            return state, Used(used.episodes + more.episodes, used.steps + more.steps), index + 1

        return jax.lax.while_loop(lambda carry: carry[1].steps < until, body, (state, used, 0))[:2]

    def measure(state: Any, key: jax.Array) -> jax.Array:
        params, episodes = run.estimate(state), task["test_episodes"]
        return policy.evaluate(
            network.environment, network.forward, network.distribution, params, key, episodes
        ).returns

    advance, measure, init = jax.jit(advance), jax.jit(measure), jax.jit(run.init)
    return [_one(advance, measure, init, task, seed) for seed in task["seeds"]]


def _one(advance: Any, measure: Any, init: Any, task: dict[str, Any], seed: int) -> dict[str, Any]:
    starting, training, testing = jax.random.split(jax.random.key(seed), 3)
    state, used = init(starting), Used(jnp.zeros(()), jnp.zeros(()))
    # Compiled before the clock starts: until nothing, so that no step is taken.
    jax.block_until_ready(advance(state, used, jnp.zeros(()), training))
    found: dict[str, Any] = {"seed": seed, "episodes": [], "steps": [], "seconds": [], "returns": [], "quartiles": []}
    seconds = 0.0
    for point in range(task["points"] + 1):
        if point:
            until = jnp.asarray(task["budget"] * point / task["points"], jnp.float32)
            begun = time.perf_counter()
            state, used = jax.block_until_ready(advance(state, used, until, jax.random.fold_in(training, point)))
            seconds += time.perf_counter() - begun
        returns = measure(state, testing)
        found["episodes"].append(int(used.episodes))
        found["steps"].append(int(used.steps))
        found["seconds"].append(round(seconds, 3))
        found["returns"].append(float(jnp.mean(returns)))
        found["quartiles"].append([float(q) for q in jnp.quantile(returns, jnp.array([0.25, 0.75]))])
    return found
