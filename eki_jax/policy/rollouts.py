"""A policy in many copies of an environment at once: what it visits, and how well it does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from eki_jax._checks import arrays, flag, function, whole
from eki_jax._types import Array, ForwardFn, Params
from eki_jax.kernel.keys import particle_key
from eki_jax.policy.distributions import Distribution, a_distribution
from eki_jax.policy.environments import Environment, check_environment

_BLOCK = 16  # steps between two looks at whether episodes still run


class Running(NamedTuple):
    """Copies of an environment in the middle of their episodes.

    Attributes:
        states: states of them, with a leading axis of N copies.
        observations: observations of these states, shape (N, ...).
        returns: sums of the rewards of the episodes so far, shape (N,).
        lengths: numbers of steps of the episodes so far, int32, shape (N,).
    """

    states: Any
    observations: Any
    returns: Array
    lengths: Array


class Trajectory(NamedTuple):
    """T steps of N copies of an environment; every array begins with (T, N).

    Attributes:
        observations: observations that the actions were chosen by.
        actions: actions.
        log_probs: logarithm of the actions' probability.
        rewards: rewards.
        next_observations: observations that the actions led to, before new episodes began.
        terminated: flags, True where nothing would follow.
        ended: flags, True where the episode has ended, terminated or by its limit of time.
        returns: sums of the rewards of the episodes, up to each step.
        lengths: numbers of steps of the episodes, up to each step.
    """

    observations: Any
    actions: Array
    log_probs: Array
    rewards: Array
    next_observations: Any
    terminated: Array
    ended: Array
    returns: Array
    lengths: Array


class Episodes(NamedTuple):
    """How well a policy did.

    Attributes:
        returns: sum of the rewards of each episode, shape (N,).
        lengths: number of steps of each, int32, shape (N,).
    """

    returns: Array
    lengths: Array


def start(environment: Environment, key: Array, copies: int) -> Running:
    """Copies of an environment at the beginning of their episodes.

    Args:
        environment: the environment.
        key: JAX random key.
        copies: number N of copies.

    Raises:
        TypeError, ValueError: arguments of another kind, or out of range.

    >>> import jax
    >>> from eki_jax.policy import from_gymnax
    >>> start(from_gymnax("CartPole-v1"), jax.random.key(0), 3).observations.shape
    (3, 4)
    """
    check_environment(environment)
    keys = jax.random.split(particle_key("key", key), whole("copies", copies))
    states, observations = jax.vmap(environment.reset)(keys)
    return Running(states, observations, jnp.zeros(copies), jnp.zeros(copies, jnp.int32))


def collect(
    environment: Environment,
    forward: ForwardFn,
    distribution: Distribution,
    params: Params,
    running: Running,
    key: Array,
    steps: int,
) -> tuple[Trajectory, Running]:
    """T steps of a policy in every copy, from where they are; episodes that end begin anew.

    Args:
        environment: the environment.
        forward: function ``forward(params, observations (N, ...)) -> outputs`` of the policy.
        distribution: distribution of the actions, given the outputs.
        params: parameters of the policy, those of one particle.
        running: copies of the environment, from :func:`start` or from the steps before.
        key: JAX random key.
        steps: number T of steps.

    Returns:
        ``(trajectory, running)``.

    Raises:
        TypeError, ValueError: arguments of another kind, or out of range.

    >>> import jax, jax.numpy as jnp
    >>> from eki_jax.policy import categorical, from_gymnax
    >>> environment = from_gymnax("CartPole-v1")
    >>> running = start(environment, jax.random.key(0), 3)
    >>> forward = lambda params, x: x @ params
    >>> trajectory, running = collect(
    ...     environment, forward, categorical(), jnp.zeros((4, 2)), running, jax.random.key(1), 20
    ... )
    >>> trajectory.rewards.shape
    (20, 3)
    """
    check_environment(environment), a_distribution(distribution)
    function("forward", forward, "a policy, forward(params, observations) -> outputs", arguments=2)
    arrays("params", params)
    whole("steps", steps)

    def one(running: Running, key: Array) -> tuple[Running, Trajectory]:
        acting, moving = jax.random.split(key)
        outputs = forward(params, running.observations)
        actions = distribution.sample(acting, outputs)
        log_probs = distribution.log_prob(outputs, actions)
        keys = jax.random.split(moving, len(running.returns))
        after = jax.vmap(environment.step)(keys, running.states, actions)
        returns, lengths = running.returns + after.reward, running.lengths + 1
        ended = after.terminated | after.truncated
        row = Trajectory(
            running.observations,
            actions,
            log_probs,
            after.reward,
            after.final_observation,
            after.terminated,
            ended,
            returns,
            lengths,
        )
        zeroed = jnp.where(ended, 0.0, returns), jnp.where(ended, 0, lengths)
        return Running(after.state, after.observation, *zeroed), row

    running, trajectory = jax.lax.scan(one, running, jax.random.split(particle_key("key", key), steps))
    return trajectory, running


def play(
    environment: Environment,
    choose: Callable[[Any, Array], Array],
    keys: Array,
    most_steps: int | None = None,
    parts: int = 1,
    violations: Callable[[Any], Array] | None = None,
) -> tuple[Episodes, Array]:
    """One whole episode for each key, and its rewards by time.

    Steps are taken until the last episode has ended, so that a limit which no episode comes near costs nothing.

    Args:
        environment: the environment.
        choose: function ``choose(observations (N, ...), key) -> actions``.
        keys: JAX random keys, one an episode, shape (N,): all that is random in it.
        most_steps: number of steps to look at; by default those that the environment allows.
        parts: number of parts of equal length in which rewards are summed.
        violations: function ``violations(observations (N, ...)) -> (N, C)`` of how far limits are exceeded after a
            step, summed over the episode; None for none.

    Returns:
        ``(episodes, rewards)``, the rewards of shape (N, parts), or (N, parts + C) with the sums of the violations.

    Raises:
        TypeError, ValueError: arguments of another kind, or out of range.

    >>> import jax, jax.numpy as jnp
    >>> from eki_jax.policy import from_gymnax
    >>> push = lambda observations, key: jnp.ones(len(observations), int)
    >>> episodes, _ = play(from_gymnax("CartPole-v1"), push, jax.random.split(jax.random.key(0), 2))
    >>> bool(episodes.lengths.max() < 12)  # always to the right: it falls soon
    True
    """
    check_environment(environment)
    function("choose", choose, "a function of observations and a key", arguments=2)
    steps = environment.most_steps if most_steps is None else whole("most_steps", most_steps)
    whole("parts", parts)
    if violations is not None:
        function("violations", violations, "a function of observations, or None", arguments=1)
    if not (hasattr(keys, "dtype") and jnp.issubdtype(keys.dtype, jax.dtypes.prng_key) and jnp.ndim(keys) == 1):
        raise TypeError("keys: wanted JAX random keys of shape (N,), such as jax.random.split(jax.random.key(0), N)")
    states, observations = jax.vmap(environment.reset)(keys)
    count = len(observations)
    exceeded = (lambda observations: jnp.zeros((count, 0))) if violations is None else violations
    shape = jax.eval_shape(exceeded, observations).shape
    if len(shape) != 2 or shape[0] != count:
        raise ValueError(f"violations: gives shape {shape} for {count} episodes; wanted ({count}, C)")

    def one(carry: Any, index: Array) -> Any:
        states, observations, alive, rewards, sums, lengths = carry
        moving = jax.vmap(lambda key: jax.random.fold_in(key, index + 1))(keys)
        actions = choose(observations, jax.random.fold_in(moving[0], 0))
        after = jax.vmap(environment.step)(moving, states, actions)
        alive = alive & (index < steps)  # the last block may go beyond
        rewards = rewards.at[:, index * parts // steps].add(jnp.where(alive, after.reward, 0))
        sums = sums + jnp.where(alive[:, None], exceeded(after.final_observation), 0)
        lengths = lengths + alive
        alive = alive & ~(after.terminated | after.truncated)
        return (after.state, after.observation, alive, rewards, sums, lengths), None

    def block(carry: Any) -> Any:
        """Some steps at once: under vmap each round of the loop costs a selection of everything that it carries."""
        begun, carry = carry
        return begun + _BLOCK, jax.lax.scan(one, carry, begun + jnp.arange(_BLOCK))[0]

    def goes_on(carry: Any) -> Array:
        begun, (_, _, alive, *_) = carry
        return (begun < steps) & jnp.any(alive)

    begin = states, observations, jnp.ones(count, bool), jnp.zeros((count, parts)), jnp.zeros(shape)
    _, carry = jax.lax.while_loop(goes_on, block, (0, (*begin, jnp.zeros(count, jnp.int32))))
    *_, rewards, sums, lengths = carry
    return Episodes(jnp.sum(rewards, axis=1), lengths), jnp.concatenate([rewards, sums], axis=1)


def evaluate(
    environment: Environment,
    forward: ForwardFn,
    distribution: Distribution,
    params: Params,
    key: Array,
    episodes: int = 64,
    *,
    greedy: bool = True,
) -> Episodes:
    """Whole episodes of a policy, for its return.

    Args:
        environment: the environment.
        forward: function ``forward(params, observations) -> outputs`` of the policy.
        distribution: distribution of the actions, given the outputs.
        params: parameters of the policy, those of one particle.
        key: JAX random key.
        episodes: number of episodes.
        greedy: flag; True takes the likeliest actions, False draws them.

    Raises:
        TypeError, ValueError: arguments of another kind, or out of range.

    >>> import jax, jax.numpy as jnp
    >>> from eki_jax.policy import categorical, from_gymnax
    >>> forward = lambda params, x: x @ params
    >>> lean = jnp.array([[0.0, 0.0], [0.0, 0.0], [0.0, 1.0], [0.0, 1.0]])  # to where the pole falls
    >>> found = evaluate(from_gymnax("CartPole-v1"), forward, categorical(), lean, jax.random.key(0), 8)
    >>> bool(found.returns.mean() > 100)
    True
    """
    check_environment(environment), a_distribution(distribution)
    function("forward", forward, "a policy, forward(params, observations) -> outputs", arguments=2)
    arrays("params", params)
    flag("greedy", greedy)
    keys = jax.random.split(particle_key("key", key), whole("episodes", episodes))
    pick = lambda outputs, key: distribution.mode(outputs) if greedy else distribution.sample(key, outputs)
    return play(environment, lambda seen, key: pick(forward(params, seen), key), keys)[0]
