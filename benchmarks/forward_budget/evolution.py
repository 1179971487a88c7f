"""One run of evosax's OpenES or PGPE, in the environment that holds evosax: ``python -m ... TASK``.

Data, network, first mean (a draw of the same start) and loss are those of the other methods; the algorithms, their
antithetic sampling, rank shaping and optimizers are evosax's and optax's own, as published.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.forward_budget.curve import follow
from benchmarks.performance.peers.timing import serve
from benchmarks.problems import registry
from benchmarks.problems.data import Dataset
from benchmarks.problems.registry import Problem
from eki_jax.metrics import particle_accuracy
from eki_jax.training import Method


def strategy(name: str, template: Any, task: dict[str, Any]) -> tuple[Any, Any]:
    """The algorithm of evosax and its parameters, at a step size, for parameters of the template's shapes.

    OpenES moves by Adam and ranks the fitness, as in arXiv:1703.03864; PGPE moves by ClipUp, whose largest velocity is
    twice its step size as its authors advise (arXiv:2008.02387), and adapts a standard deviation for every parameter.
    """
    import evosax.algorithms  # which this module's importers need not have
    from evosax.core.optimizer import clipup

    solution = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), template)
    size, rate, sigma = task["particles"], task["learning_rate"], task["sigma"]
    if name == "open-es":
        algorithm = evosax.algorithms.Open_ES(
            size, solution, optimizer=optax.adam(rate), std_schedule=optax.constant_schedule(sigma)
        )
        return algorithm, algorithm.default_params
    algorithm = evosax.algorithms.PGPE(size, solution, optimizer=clipup(learning_rate=rate, max_velocity=2 * rate))
    return algorithm, algorithm.default_params.replace(std_init=sigma)


def run(task: dict[str, Any], problem: Problem) -> dict[str, Any]:
    """The accuracy curve of a task: method, particles, batch, learning_rate, sigma, seed, budget, every."""
    algorithm, parameters = strategy(task["method"], problem.template, task)

    def init(key: jax.Array) -> Any:
        mean, rest = jax.random.split(key)
        return algorithm.init(rest, problem.start.sample(mean), parameters)

    def step(state: Any, key: jax.Array, batch: Any) -> Any:
        x, labels = batch
        ask, tell = jax.random.split(key)
        population, state = algorithm.ask(ask, state, parameters)

        def fitness(params: Any) -> jax.Array:
            logits = problem.particle_logits(params, x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        return algorithm.tell(tell, population, jax.vmap(fitness)(population), state, parameters)[0], {}

    accuracy = lambda state, x, labels: particle_accuracy(problem.logits, algorithm.get_mean(state), x, labels)
    return follow(problem, Method(init, step, accuracy, estimate=algorithm.get_mean), task)


def main(task: dict[str, Any]) -> dict[str, Any]:
    """Run the task on the data set in the file that it names."""
    with np.load(task.pop("data")) as arrays:
        problem = registry.build(task["problem"], Dataset(**{name: arrays[name] for name in arrays.files}))
    return run(task, problem)


if __name__ == "__main__":
    serve(main)
