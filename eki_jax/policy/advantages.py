r"""How much better than usual an action was, from the rewards that followed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from eki_jax._checks import Within, array, real
from eki_jax._types import Array

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

UNIT = Within("a number in [0, 1]", low=0, high=1, low_counts=True, high_counts=True)


def generalized_advantages(
    rewards: Float[Array, " T *envs"],
    values: Float[Array, " T *envs"],
    next_values: Float[Array, " T *envs"],
    terminated: Bool[Array, " T *envs"],
    ended: Bool[Array, " T *envs"],
    discount: Any = 0.99,
    decay: Any = 0.95,
) -> tuple[Float[Array, " T *envs"], Float[Array, " T *envs"]]:
    r"""Advantages and returns by generalized advantage estimation.

    .. math:: \delta_t = r_t + \gamma\, (1 - \text{terminated}_t)\, V(s'_t) - V(s_t), \qquad
              A_t = \delta_t + \gamma \lambda\, (1 - \text{ended}_t)\, A_{t+1} .

    An episode that ran into its time limit has ended and has not terminated: what would have followed counts with its
    value.

    Args:
        rewards: rewards r, shape (T, ...): time first, then environments.
        values: values V(s) of the states in which the actions were taken, of the same shape.
        next_values: values V(s') of the states that followed, before a new episode began there.
        terminated: flags, True where nothing follows.
        ended: flags, True where the next row is of another episode, for whatever reason.
        discount: factor gamma in [0, 1] of a reward that is one step later.
        decay: factor lambda in [0, 1]: 0 trusts the values, 1 the rewards.

    Returns:
        ``(advantages, returns)``, both like ``rewards``; the returns, ``A + V``, are what values learn.

    Raises:
        TypeError: what is no array.
        ValueError: shapes that differ; factors out of range.

    Source: Schulman et al., *High-dimensional continuous control using generalized advantage estimation* (2016),
    equation 16.

    >>> import jax.numpy as jnp
    >>> zero, no = jnp.zeros(3), jnp.zeros(3, bool)
    >>> over = jnp.array([False, False, True])
    >>> generalized_advantages(jnp.ones(3), zero, zero, over, over, discount=0.5, decay=1.0)[0]
    Array([1.75, 1.5 , 1.  ], dtype=float32)
    """
    given = {"rewards": rewards, "values": values, "next_values": next_values, "terminated": terminated, "ended": ended}
    for name, value in given.items():
        array(name, value)
        if jnp.shape(value) != jnp.shape(rewards) or not jnp.ndim(value):
            raise ValueError(f"{name}: shape {jnp.shape(value)}; wanted that of rewards, (T, ...)")
    discount, decay = real("discount", discount, UNIT), real("decay", decay, UNIT)
    errors = rewards + discount * jnp.where(terminated, 0, next_values) - values

    def back(later: Array, row: Any) -> tuple[Array, Array]:
        error, ended = row
        advantage = error + discount * decay * jnp.where(ended, 0, later)
        return advantage, advantage

    _, advantages = jax.lax.scan(back, jnp.zeros_like(errors[0]), (errors, jnp.asarray(ended)), reverse=True)
    return advantages, advantages + values


def returns_to_go(
    rewards: Float[Array, " T *envs"], ended: Bool[Array, " T *envs"], discount: Any = 0.99
) -> Float[Array, " T *envs"]:
    """The discounted sums of the rewards from each step to the end of its episode, like ``rewards``.

    Args:
        rewards: rewards, shape (T, ...), time first.
        ended: flags, True in the last row of an episode.
        discount: factor gamma in [0, 1] of a reward that is one step later.

    Raises:
        TypeError, ValueError: as :func:`generalized_advantages`.

    >>> import jax.numpy as jnp
    >>> returns_to_go(jnp.ones(3), jnp.array([False, True, False]), discount=0.5)
    Array([1.5, 1. , 1. ], dtype=float32)
    """
    zero = jnp.zeros_like(array("rewards", rewards))
    if jnp.shape(array("ended", ended)) != zero.shape:
        raise ValueError(f"rewards: shape {zero.shape} and ended of {jnp.shape(ended)}; wanted one shape, (T, ...)")
    return generalized_advantages(rewards, zero, zero, jnp.zeros_like(ended), ended, discount, 1.0)[0]
