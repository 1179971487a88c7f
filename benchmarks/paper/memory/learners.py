"""Methods that learn a task, with one way to run them and to count what they use."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import eki_jax
from benchmarks.methods import descent
from benchmarks.paper.memory.networks import Network
from benchmarks.paper.memory.tasks import Task
from eki_jax import natural

PARTICLES = 400  # of an ensemble, more than the networks have parameters
NOISY = 3  # particles with noise of each sample's own
REDRAW = 20  # steps between two redraws of EKI(R)
BATCH = 50  # examples a step of the methods that do not take all


class Learner(NamedTuple):
    """A method on a network.

    Attributes:
        init: function ``init(params, key) -> state``.
        step: function ``step(state, batch, key) -> state``.
        estimate: function ``estimate(state) -> params``.
        passes: forward passes that a step spends on an example; a gradient counts for three.
        batch: examples a step; None for all.
    """

    init: Callable[[Any, jax.Array], Any]
    step: Callable[[Any, Any, jax.Array], Any]
    estimate: Callable[[Any], Any]
    passes: int
    batch: int | None


class TunedMethod(NamedTuple):
    """A method as the table has it, one setting of which is chosen from a grid.

    Attributes:
        label: its name.
        build: function of the network, the task and the value of the setting.
        setting: name of the setting that is chosen.
        values: values that are tried.
        is_small: flag, True where a step is so small that all seeds go together.
    """

    label: str
    build: Callable[[Network, Task, float], Learner]
    setting: str
    values: tuple[float, ...]
    is_small: bool = False


class Followed(NamedTuple):
    """A method on a network, compiled once for all its settings, seeds and budgets.

    Attributes:
        batch: examples a step.
        passes: forward passes a step.
        together: number of seeds at a time; None for all.
        begin: function ``begin(keys, value) -> (state, examples)``; all have a leading axis of the seeds.
        advance: function ``advance(state, examples, keys, value, steps) -> state``.
        measure: function ``measure(state, value, test) -> errors``.
    """

    batch: int
    passes: int
    together: int | None
    begin: Callable[..., Any]
    advance: Callable[..., Any]
    measure: Callable[..., Any]


def compiled(network: Network, task: Task, method: TunedMethod, examples: int | None) -> Followed:
    """The functions of a run on so many different examples, or, with None, on new ones at every step."""
    build = lambda value: method.build(network, task, value)
    learner = build(method.values[0])
    batch = min(learner.batch or np.inf, examples or np.inf)
    if batch == np.inf:
        raise ValueError(f"examples: None; wanted a number of them for {method.label}, which takes all at every step")

    def batch_of(known: Any, key: jax.Array) -> Any:
        if examples is None:
            return task.draw(key, batch)
        if batch == examples:
            return known
        chosen = jax.random.choice(key, examples, (batch,), replace=False)
        return jax.tree.map(lambda array: array[chosen], known)

    def begin(key: jax.Array, value: Any) -> Any:
        of_examples, of_start, of_state = jax.random.split(key, 3)
        known = None if examples is None else task.draw(of_examples, examples)
        return build(value).init(network.start(of_start), of_state), known

    def advance(state: Any, known: Any, key: jax.Array, value: Any, steps: Any) -> Any:
        step = build(value).step

        def one(index: Any, state: Any) -> Any:
            of_batch, of_step = jax.random.split(jax.random.fold_in(key, index))
            return step(state, batch_of(known, of_batch), of_step)

        return jax.lax.fori_loop(0, steps, one, state)

    def measure(state: Any, value: Any, test: Any) -> Any:
        return task.error(network.forward(build(value).estimate(state), test[0]), test[1])

    over = jax.vmap if method.is_small else _alone
    return Followed(
        batch,
        batch * learner.passes,
        None if method.is_small else 1,
        jax.jit(lambda keys, value: over(lambda key: begin(key, value))(keys)),
        jax.jit(
            lambda states, known, keys, value, steps: over(lambda *of: advance(*of, value, steps))(states, known, keys)
        ),
        jax.jit(lambda states, value, test: over(lambda state: measure(state, value, test))(states)),
    )


def _alone(function: Any) -> Any:
    """The function of one seed for arrays with a leading axis of one: a map would take both sides of every choice."""
    first = lambda tree: jax.tree.map(lambda array: array[0], tree)
    return lambda *trees: jax.tree.map(lambda array: array[None], function(*map(first, trees)))


def follow(followed: Followed, task: Task, run: dict[str, Any], value: float) -> list[dict[str, Any]]:
    """Learn with each of the run's seeds.

    Args:
        followed: method on a network.
        task: what it learns.
        run: ``examples``, the number of different examples, or None for new ones at every step; ``passes``, the budget
            of forward passes of an example; ``points``, how often the error is measured; ``seeds``; and ``test``, the
            seed of the examples that measure it.
        value: setting of the method.

    Returns:
        For each seed ``passes`` and ``examples`` (different ones, used so far), ``errors``, and ``seconds``
        of training, of a seed's share where seeds go together.
    """
    steps = max(1, round(run["passes"] / (run["points"] * followed.passes)))
    test = task.tests(run["test"])
    taken = steps * np.arange(run["points"] + 1)
    seen = taken * followed.batch if run["examples"] is None else np.full(len(taken), run["examples"])
    found, seeds = [], run["seeds"]
    size = followed.together or len(seeds)
    for first in range(0, len(seeds), size):
        keys = jnp.stack([jax.random.key(seed) for seed in seeds[first : first + size]])
        state, known = followed.begin(keys, value)
        jax.block_until_ready(followed.advance(state, known, keys, value, 0))  # compiled before the clock starts
        errors, seconds = [followed.measure(state, value, test)], 0.0
        for point in range(run["points"]):
            begun = time.perf_counter()
            of_steps = jax.vmap(lambda key, point=point: jax.random.fold_in(key, 1 + point))(keys)
            state = jax.block_until_ready(followed.advance(state, known, of_steps, value, steps))
            seconds += time.perf_counter() - begun
            errors.append(followed.measure(state, value, test))
        for seed, curve in zip(seeds[first : first + size], np.array(errors).T, strict=True):
            numbers = {"passes": taken * followed.passes, "examples": seen, "errors": curve}
            found.append({"seed": seed, **numbers, "seconds": round(seconds / len(keys), 2)})
    return found


def _ensemble(network: Network, task: Task, spread: float, *, redraws: bool) -> Learner:
    """EKI from particles around one start, with deviations of ``spread`` times Xavier's; with ``redraws`` EKI(R).

    The noise of the redraws becomes smaller, to 1/2, 1/3 and so on, as in the series that are learned online.
    """
    solver = eki_jax.euler(network.forward, task.loss, eki_jax.paper_step_size())

    def around(mean: Any, key: jax.Array, scale: Any) -> Any:
        deviations = eki_jax.sample_ensemble(key, eki_jax.xavier(mean), PARTICLES)
        return jax.tree.map(lambda leaf, e: leaf + scale * e, mean, deviations)

    def step(state: Any, batch: Any, key: jax.Array) -> Any:
        state, _ = solver.step(state, batch)
        if not redraws:
            return state
        share = spread / (1 + state.count / REDRAW)
        redrawn = lambda: solver.with_ensemble(state, around(solver.estimate(state), key, share))
        return jax.lax.cond(state.count % REDRAW == 0, redrawn, lambda: state)

    init = lambda params, key: solver.init(around(params, key, spread))
    return Learner(init, step, solver.estimate, PARTICLES, task.batch)


def _natural(network: Network, task: Task, sigma: float) -> Learner:
    """One damped Gauss-Newton step after another in the span of full-rank deviations."""
    damping, deviations = natural.adaptive_damping(1e-4), natural.full_rank()
    solver = natural.natural_gradient(network.forward, task.loss, PARTICLES, sigma, damping, deviations)
    return Learner(solver.init, _stepping(solver), solver.estimate, PARTICLES + 2, task.batch)


def _per_sample(network: Network, task: Task, rate: float) -> Learner:
    """Noise of a sample's own at every place of a sequence, answers of the turns behind, and Adam."""
    example = jax.eval_shape(lambda key: task.draw(key, 1)[0], jax.random.key(0))
    deviations = natural.per_sample(feedback=natural.learned_feedback(example))
    solver = natural.natural_gradient(
        network.forward, task.loss, NOISY, 0.05, deviations=deviations, optimizer=_clipped(optax.adam(rate))
    )
    return Learner(solver.init, _stepping(solver), solver.estimate, solver.passes(NOISY), BATCH)


def _stepping(solver: Any) -> Callable[[Any, Any, jax.Array], Any]:
    return lambda state, batch, key: solver.step(state, batch)[0]


def _through_time(rule: Callable[[float], Any]) -> Callable[[Network, Task, float], Learner]:
    """Backpropagation through time with one of optax's rules, of gradients that are clipped to a norm of one."""

    def build(network: Network, task: Task, rate: float) -> Learner:
        loss = lambda params, batch: task.mean_loss(network.forward(params, batch[0]), batch[1])
        by = descent(loss, _clipped(rule(rate)))
        return Learner(by.init, _stepping(by), by.estimate, by.passes, BATCH)

    return build


def _clipped(rule: Any) -> Any:
    return optax.chain(optax.clip_by_global_norm(1.0), rule)


_momentum = partial(optax.sgd, momentum=0.9)
METHODS = {
    "eki": TunedMethod("EKI", partial(_ensemble, redraws=False), "spread", (0.3, 1.0)),
    "eki-r": TunedMethod("EKI(R)", partial(_ensemble, redraws=True), "spread", (0.3, 1.0)),
    "natural": TunedMethod("natural EKI", _natural, "sigma", (0.003, 0.03)),
    "per-sample": TunedMethod("natural EKI, per sample", _per_sample, "rate", (0.003, 0.01, 0.03), True),
    "sgd": TunedMethod("momentum SGD through time", _through_time(_momentum), "rate", (0.01, 0.03, 0.1, 0.3), True),
    "adam": TunedMethod("Adam through time", _through_time(optax.adam), "rate", (0.001, 0.003, 0.01, 0.03), True),
}
