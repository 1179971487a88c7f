"""An environment whose best policy is known: a point on a line, which is pushed to the left or to the right."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from eki_jax import policy

LENGTH = 8


def reset(key: Any) -> Any:
    place = jax.random.uniform(key, minval=-1.0)
    return (place, jnp.zeros((), jnp.int32)), jnp.array([place, 1.0])


def step(key: Any, state: Any, action: Any) -> policy.Step:
    """The reward is minus the distance from zero; it is over beyond 2, and cut after eight steps."""
    place, time = state[0] + 0.25 * (2.0 * action - 1.0), state[1] + 1
    terminated, truncated = jnp.abs(place) > 2, time >= LENGTH
    begun, first = reset(key)
    choose = lambda new, old: jnp.where(terminated | truncated, new, old)
    seen = jnp.array([place, 1.0])
    return policy.Step(
        jax.tree.map(choose, begun, (place, time)), choose(first, seen), -jnp.abs(place), terminated, truncated, seen
    )


LINE = policy.Environment("line", reset, step, (2,), 2, (), LENGTH)


def forward(params: Any, x: Any) -> Any:
    return x @ params


def value(params: Any, x: Any) -> Any:
    return jnp.concatenate([x, jnp.abs(x[:, :1])], axis=1) @ params
