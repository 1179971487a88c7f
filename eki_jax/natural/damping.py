"""A damping that adapts itself."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp

from eki_jax._checks import POSITIVE, is_known, real
from eki_jax._types import Array


class AdaptiveDamping(NamedTuple):
    """See :func:`adaptive_damping`."""

    initial: Any
    decrease: Any
    increase: Any
    low: Any
    high: Any
    least: Any
    most: Any

    def next(self, damping: Array, ratio: Array) -> Array:
        """The damping after a step whose loss fell by ``ratio`` times the prediction."""
        factor = jnp.where(ratio > self.high, self.decrease, jnp.where(ratio >= self.low, 1.0, self.increase))
        return jnp.clip(damping * factor.astype(damping.dtype), self.least, self.most)


def adaptive_damping(
    initial: float = 1e-3,
    *,
    decrease: float = 0.9,
    increase: float = 1.5,
    low: float = 0.25,
    high: float = 0.75,
    least: float = 1e-8,
    most: float = 1e4,
) -> AdaptiveDamping:
    r"""Levenberg and Marquardt's rule on the mini-batch: lambda follows how far the second-order model holds.

    After each step the loss of the mean particle on the same batch has fallen by ``measured``, where the model said
    ``predicted``. Above ``high`` of it, lambda is multiplied by ``decrease``; below ``low`` (or not finite), by
    ``increase``. It costs two forward passes of one particle a step.

    Args:
        initial: the first lambda, > 0.
        decrease: factor after a good prediction, in (0, 1).
        increase: factor after a bad one, > 1.
        low: measured over predicted below which a prediction is bad.
        high: measured over predicted above which it is good, > ``low``.
        least: lambda never falls below, > 0.
        most: lambda never rises above.

    Raises:
        ValueError: numbers outside of their ranges.

    >>> rule = adaptive_damping(1.0, decrease=0.5, increase=2.0)
    >>> rule.next(jnp.array(1.0), jnp.array([0.9, 0.5, -3.0]))
    Array([0.5, 1. , 2. ], dtype=float32)
    """
    for name, value in (("initial", initial), ("least", least), ("most", most), ("increase", increase)):
        real(name, value, POSITIVE)
    for name, value in (("decrease", decrease), ("low", low), ("high", high)):
        real(name, value)
    if not all(map(is_known, (initial, decrease, increase, low, high, least, most))):
        return AdaptiveDamping(initial, decrease, increase, low, high, least, most)
    if not 0 < least <= initial <= most:
        raise ValueError(f"initial, least, most: {initial}, {least}, {most}; wanted 0 < least <= initial <= most")
    if not (0 < decrease < 1 < increase and low < high):
        raise ValueError(
            f"decrease, increase, low, high: {decrease}, {increase}, {low}, {high}; wanted 0 < decrease < 1 < increase "
            "and low < high"
        )
    return AdaptiveDamping(initial, decrease, increase, low, high, least, most)
