"""The methods of this library, and PPO: the same learner with a solver that differentiates."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import eki_jax
from benchmarks.methods import Steps, descent
from benchmarks.policy.curve import Run, Used
from benchmarks.policy.networks import Network
from benchmarks.policy.settings import DISCRETE, TASKS
from eki_jax import natural, policy

# Of proximal policy optimization: how often an iteration's states are used, and in how many pieces.
EPOCHS, BATCHES = 4, 8


def build(network: Network, task: dict[str, Any]) -> Run:
    """The method of a task."""
    makers = {
        "natural": _natural,
        **dict.fromkeys(DISCRETE, _natural),
        "per-sample": _per_sample,
        "ppo": _ppo,
        "eki": _eki,
        "natural-episodes": _natural_episodes,
    }
    return makers[task["method"]](network, task)


def _natural(network: Network, task: dict[str, Any]) -> Run:
    own = {name: task[name] for name in ("particles", "divergence", "sigma") if name in task}
    agent = policy.natural_policy_gradient(*_parts(network), **own, **_collection(task))
    return _of_learner(network, agent)


def _per_sample(network: Network, task: dict[str, Any]) -> Run:
    """PPO's settings below, with gradients from noise."""
    own = {"particles": task["particles"], "entropy": _entropy(network), "epochs": EPOCHS, "batches": BATCHES}
    agent = policy.clipped_policy_gradient(*_parts(network), _optimizer(task), **own, **_collection(task))
    return _of_learner(network, agent)


def _ppo(network: Network, task: dict[str, Any]) -> Run:
    """Schulman et al. (2017): clipped ratios, four epochs of eight mini-batches, Adam with a clipped gradient."""
    loss = policy.policy_loss(network.distribution, clip=0.2, entropy=_entropy(network))
    squares = natural.mean_over_samples(lambda z, y: 0.5 * (z - y) ** 2)
    actor = policy.Part(network.forward, _descent(network.forward, loss, _optimizer(task)), EPOCHS, BATCHES)
    critic = policy.Part(network.value, _descent(network.value, squares, _optimizer(task)), EPOCHS, BATCHES)
    agent = policy.learner(network.environment, network.distribution, actor, critic, **_collection(task))
    return _of_learner(network, agent)


def _parts(network: Network) -> tuple[Any, ...]:
    return network.environment, network.forward, network.distribution, network.value


def _optimizer(task: dict[str, Any]) -> optax.GradientTransformation:
    """Adam, whose rate falls to zero by the end of the budget, on a clipped gradient."""
    iterations = -(-task["budget"] // (task["copies"] * task["steps"]))
    rate = optax.linear_schedule(task["learning_rate"], 0.0, iterations * EPOCHS * BATCHES)
    return optax.chain(optax.clip_by_global_norm(0.5), optax.adam(rate, eps=1e-5))


def _entropy(network: Network) -> float:
    return 0.0 if network.environment.choices is None else 0.01


def _collection(task: dict[str, Any]) -> dict[str, Any]:
    return {"copies": task["copies"], "steps": task["steps"], "discount": TASKS[task["environment"]].discount}


def _of_learner(network: Network, agent: policy.Learner) -> Run:
    def init(key: jax.Array) -> Any:
        keys = jax.random.split(key, 3)
        return agent.init(network.init(keys[0]), network.init_critic(keys[1]), keys[2])

    def step(state: Any, key: jax.Array) -> Any:  # its state has a key of its own
        state, info = agent.step(state)
        return state, Used(info.episodes.astype(float), jnp.asarray(agent.steps, float))

    return Run(init, step, agent.estimate)


class Taken(NamedTuple):
    """What a learner reads of a step: that it was taken, and no reason why not."""

    moved: jax.Array
    reason: jax.Array


def _descent(forward: Any, loss: Any, optimizer: optax.GradientTransformation) -> Steps:
    """Descent as a solver, by derivatives of the model: for comparison."""
    by = descent(lambda params, batch: loss(forward(params, batch[0]), batch[1]), optimizer)

    def step(state: Any, batch: Any) -> Any:
        return by.step(state, batch)[0], Taken(jnp.asarray(True), jnp.zeros((), jnp.int32))

    return by._replace(step=step)


def _eki(network: Network, task: dict[str, Any]) -> Run:
    """Ensemble Kalman inversion, redrawn around its mean before every step, as EKI(R) is before every epoch."""
    solver = eki_jax.euler(None, eki_jax.squared_error())
    spread = lambda params: eki_jax.gaussian(params, task["sigma"])

    def init(key: jax.Array) -> Any:
        start, drawing = jax.random.split(key)
        return solver.init(eki_jax.sample_ensemble(drawing, spread(network.init(start)), task["particles"]))

    def redrawn(state: Any, key: jax.Array) -> Any:
        mean = solver.estimate(state)
        return solver.with_ensemble(state, eki_jax.sample_ensemble(key, spread(mean), task["particles"]))

    return Run(init, _asking(network, task, solver, redrawn), solver.estimate)


def _natural_episodes(network: Network, task: dict[str, Any]) -> Run:
    """Natural steps whose outputs are the rewards by time, told to the solver."""
    solver = natural.natural_gradient(None, eki_jax.squared_error(), task["particles"], task["sigma"], damping=1.0)

    def init(key: jax.Array) -> Any:
        start, drawing = jax.random.split(key)
        return solver.init(network.init(start), drawing)

    return Run(init, _asking(network, task, solver, lambda state, key: state), solver.estimate)


def _asking(network: Network, task: dict[str, Any], solver: eki_jax.Solver, before: Any) -> Any:
    """Steps by ask and tell: the particles play the same episodes, and the solver is told what they earned.

    Rewards by time are in units of what a part of an episode can differ by, so that the noise of one is of their order.
    """
    of, parts = TASKS[task["environment"]], task["parts"]
    unit = of.span / parts
    goals = jnp.full((task["episodes"], parts), of.goal / parts / unit)

    def played(params: Any, keys: jax.Array) -> Any:
        choose = lambda seen, key: network.distribution.mode(network.forward(params, seen))
        return policy.play(network.environment, choose, keys, parts=parts)

    def step(state: Any, key: jax.Array) -> Any:
        drawing, playing = jax.random.split(key)
        state = before(state, drawing)
        keys = jax.random.split(playing, task["episodes"])
        episodes, rewards = jax.vmap(played, (0, None))(solver.ensemble(state), keys)
        state, _ = solver.update(state, rewards / unit, goals)
        return state, Used(jnp.asarray(episodes.lengths.size, float), jnp.sum(episodes.lengths).astype(float))

    return step
