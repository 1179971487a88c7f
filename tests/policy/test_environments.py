"""Environments of gymnax: what they look like from here."""

from __future__ import annotations

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eki_jax import policy


@pytest.mark.parametrize(
    ("name", "shape", "choices", "action_shape", "limits"),
    [
        ("CartPole-v1", (4,), 2, (), None),
        ("Acrobot-v1", (6,), 3, (), None),
        ("Pendulum-v1", (3,), None, (1,), (-2.0, 2.0)),
        ("MountainCarContinuous-v0", (2,), None, (1,), (-1.0, 1.0)),
        ("Breakout-MinAtar", (10, 10, 4), 3, (), None),
        ("Asterix-MinAtar", (10, 10, 4), 5, (), None),
    ],
)
def test_an_environment_is_described(name: str, shape: Any, choices: Any, action_shape: Any, limits: Any) -> None:
    """Shapes, choices and limits are those of its page, and a step gives what is said."""
    environment = policy.from_gymnax(name)
    found = environment.observation_shape, environment.choices, environment.action_shape, environment.action_range
    assert found == (shape, choices, action_shape, limits)
    action = jax.ShapeDtypeStruct(action_shape, jnp.int32 if choices else jnp.float32)
    state, observation = jax.eval_shape(environment.reset, jax.random.key(0))
    after = jax.eval_shape(environment.step, jax.random.key(0), state, action)
    assert after.observation.shape == after.final_observation.shape == observation.shape == shape
    assert (after.reward.shape, after.terminated.dtype, after.truncated.dtype) == ((), bool, bool)


def test_an_episode_is_cut_by_its_limit() -> None:
    """A limit of time is a parameter, and ends an episode without terminating it."""
    environment = policy.from_gymnax("CartPole-v1", max_steps_in_episode=3)
    assert environment.most_steps == 3
    state, _ = environment.reset(jax.random.key(0))
    step = jax.jit(environment.step)
    for _ in range(3):
        after = step(jax.random.key(1), state, jnp.array(0))
        state = after.state
    assert (bool(after.terminated), bool(after.truncated)) == (False, True)
    assert not np.array_equal(after.observation, after.final_observation)  # a new episode has begun


def test_names_and_parameters_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unknown names and parameters are errors that say what there is; a missing package names the extra."""
    with pytest.raises(ValueError, match="name: 'Cart', which gymnax does not know; wanted one of Acrobot-v1"):
        policy.from_gymnax("Cart")
    with pytest.raises(ValueError, match=r"gravitas: no parameter of CartPole-v1, which has .*gravity"):
        policy.from_gymnax("CartPole-v1", gravitas=1.0)
    monkeypatch.setitem(sys.modules, "gymnax", None)
    with pytest.raises(ImportError, match=r"pip install 'eki_jax\[rl\]'"):
        policy.from_gymnax("CartPole-v1")
