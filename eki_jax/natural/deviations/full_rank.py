"""Deviations with independent entries: every particle in full."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from eki_jax._types import Array, Params
from eki_jax.ensembles.priors import Gaussian
from eki_jax.natural.deviations.base import Scale, check_scale, scales_of


class FullRank(NamedTuple):
    """See :func:`full_rank`."""

    scale: Scale = "xavier"

    def draw(self, key: Array, mean: Params) -> Any:
        """A deviation itself."""
        if hasattr(self.scale, "noise") and not isinstance(self.scale, Gaussian):
            return self.scale.noise(key)
        return Gaussian(mean, scales_of(self.scale, mean)).noise(key)

    def particle(self, mean: Params, factors: Any, sigma: Array) -> Params:
        """The sum, leaf by leaf."""
        return jax.tree.map(lambda m, e: (m + sigma.astype(e.dtype) * e).astype(m.dtype), mean, factors)

    def dense(self, mean: Params, factors: Any) -> Params:
        """What was drawn."""
        del mean
        return factors

    def combine(self, mean: Params, factors: Any, weights: Array) -> Params:
        """One product of a vector and a matrix for each leaf."""
        del mean
        return jax.tree.map(lambda e: jnp.tensordot(weights.astype(e.dtype), e, axes=1), factors)


def full_rank(scale: Scale = "xavier") -> FullRank:
    """Deviations with independent entries: the whole ensemble exists while a step uses it.

    Args:
        scale: standard deviations: "xavier" (those of :func:`eki_jax.xavier` for each layer), a number, a pytree of
            numbers or arrays like the parameters, or a prior, whose centred noise is drawn.

    Raises:
        ValueError: a scale that is negative or does not fit.

    >>> import jax, jax.numpy as jnp
    >>> full_rank(1.0).draw(jax.random.key(0), {"w": jnp.zeros((3, 2))})["w"].shape
    (3, 2)
    """
    check_scale(scale)
    return FullRank(scale)
