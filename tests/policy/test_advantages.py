"""Advantages and returns against their sums, written out."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eki_jax import policy

T, N = 7, 3


def rows(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    terminated = rng.random((T, N)) < 0.2
    return {
        "rewards": rng.normal(size=(T, N)).astype(np.float32),
        "values": rng.normal(size=(T, N)).astype(np.float32),
        "next_values": rng.normal(size=(T, N)).astype(np.float32),
        "terminated": terminated,
        "ended": terminated | (rng.random((T, N)) < 0.2),
    }


def written_out(given: dict[str, Any], discount: float, decay: float) -> np.ndarray:
    """A_t = sum_l (gamma lambda)^l delta_(t+l), up to the end of the episode."""
    found = np.zeros((T, N))
    for n in range(N):
        for t in range(T):
            for later in range(t, T):
                after = 0 if given["terminated"][later, n] else given["next_values"][later, n]
                error = given["rewards"][later, n] + discount * after - given["values"][later, n]
                found[t, n] += (discount * decay) ** (later - t) * error
                if given["ended"][later, n]:
                    break
    return found


@pytest.mark.parametrize(("discount", "decay"), [(0.9, 0.8), (1.0, 1.0), (0.9, 0.0)])
def test_advantages_are_the_sums(discount: float, decay: float) -> None:
    """The recursion is the sum over an episode's errors, episode by episode."""
    given = rows()
    assert (given["ended"] & ~given["terminated"]).any()  # limits of time are among them
    advantages, returns = jax.jit(policy.generalized_advantages)(**given, discount=discount, decay=decay)
    np.testing.assert_allclose(advantages, written_out(given, discount, decay), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(returns, advantages + given["values"], rtol=1e-6)


def test_a_limit_of_time_is_no_end() -> None:
    """What would have followed counts where an episode was cut, and not where it was over."""
    one = jnp.ones((1, 1))
    arguments = {"rewards": one, "values": 0 * one, "next_values": 10 * one, "ended": one > 0, "discount": 0.5}
    cut, _ = policy.generalized_advantages(terminated=one > 1, **arguments)
    over, _ = policy.generalized_advantages(terminated=one > 0, **arguments)
    assert (float(cut[0, 0]), float(over[0, 0])) == (6.0, 1.0)


def test_returns_to_go_are_sums() -> None:
    """Discounted sums of what followed in the same episode."""
    ended = np.array([[False], [True], [False], [False]])
    found = policy.returns_to_go(jnp.ones((4, 1)), ended, 0.5)
    np.testing.assert_allclose(found[:, 0], [1.5, 1.0, 1.5, 1.0])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"values": np.zeros((T, 2))}, r"values: shape \(7, 2\); wanted that of rewards"),
        ({"discount": 1.5}, r"discount: 1.5; wanted a number in \[0, 1\]"),
        ({"decay": np.nan}, "decay: nan"),
    ],
)
def test_what_advantages_refuse(change: Any, words: str) -> None:
    """Shapes and factors that do not fit are named."""
    with pytest.raises(ValueError, match=words):
        policy.generalized_advantages(**(rows() | change))
