"""Environments as two pure functions, and gymnax's among them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from eki_jax._types import Array


class Step(NamedTuple):
    """What an environment answers to an action.

    Attributes:
        state: state to go on from: of a new episode where the old one has ended.
        observation: observation of that state, the one that the next action is chosen by.
        reward: reward, a scalar.
        terminated: flag, True where the episode has ended and nothing would follow.
        truncated: flag, True where a limit of time has ended it.
        final_observation: observation that the action led to, before a new episode began.
    """

    state: Any
    observation: Any
    reward: Array
    terminated: Array
    truncated: Array
    final_observation: Any


class Environment(NamedTuple):
    """A Markov decision process, as functions of ONE copy of it that ``vmap`` and ``scan`` take.

    Attributes:
        name: name of it.
        reset: function ``reset(key) -> (state, observation)``.
        step: function ``step(key, state, action) -> Step``; it begins a new episode where one has ended.
        observation_shape: shape of an observation.
        choices: number of actions to choose among; None where actions are real numbers.
        action_shape: shape of an action.
        most_steps: number of steps after which an episode ends in any case.
        action_range: least and largest action that differ from others; None where actions are choices.
    """

    name: str
    reset: Callable[[Array], tuple[Any, Any]]
    step: Callable[[Array, Any, Array], Step]
    observation_shape: tuple[int, ...]
    choices: int | None
    action_shape: tuple[int, ...]
    most_steps: int
    action_range: tuple[float, float] | None = None


def check_environment(environment: Any) -> Environment:
    """``environment``, if it is one.

    Raises:
        TypeError: anything else.
    """
    if not isinstance(environment, Environment):
        wanted = "an Environment, such as eki_jax.policy.from_gymnax('CartPole-v1')"
        raise TypeError(f"environment: {repr(environment)[:80]}; wanted {wanted}")
    return environment


def from_gymnax(name: str, **parameters: Any) -> Environment:
    """An environment of gymnax.

    Args:
        name: name of it, such as "CartPole-v1".
        **parameters: parameters of the environment in the place of its defaults, such as ``max_steps_in_episode=200``.

    Raises:
        ImportError: gymnax is not installed; the error names the extra.
        ValueError: a name that gymnax does not know, or a parameter that this environment does not have.

    >>> cart_pole = from_gymnax("CartPole-v1")
    >>> cart_pole.observation_shape, cart_pole.choices, cart_pole.most_steps
    ((4,), 2, 500)
    """
    try:
        import gymnax
    except ImportError as error:
        raise ImportError("gymnax is not installed: pip install 'eki_jax[rl]'") from error
    known = gymnax.registered_envs
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"name: {name!r}, which gymnax does not know; wanted one of {', '.join(sorted(known))}")
    environment, defaults = gymnax.make(name)
    for parameter in parameters:
        if not hasattr(defaults, parameter):
            raise ValueError(f"{parameter}: no parameter of {name}, which has {', '.join(sorted(vars(defaults)))}")
    settings = defaults.replace(**parameters)
    actions = environment.action_space(settings)
    choices = getattr(actions, "n", None)

    def reset(key: Array) -> tuple[Any, Any]:
        observation, state = environment.reset(key, settings)
        return state, _numbers(observation)

    def step(key: Array, state: Any, action: Array) -> Step:
        observation, state, reward, terminated, truncated, info = environment.step(key, state, action, settings)
        flags = jnp.asarray(terminated, bool), jnp.asarray(truncated, bool)
        reward = jnp.asarray(reward, jnp.float32).reshape(())
        return Step(state, _numbers(observation), reward, *flags, _numbers(info["final_observation"]))

    _, observation = jax.eval_shape(reset, jax.random.key(0))
    shape = () if choices is not None else tuple(actions.shape)
    limits = None if choices is not None else (float(jnp.min(actions.low)), float(jnp.max(actions.high)))
    return Environment(name, reset, step, observation.shape, choices, shape, int(settings.max_steps_in_episode), limits)


def _numbers(observation: Any) -> Array:
    """Observations of flags, as MinAtar has them, as numbers."""
    return jnp.asarray(observation, jnp.float32)
