"""The protocol of deviations, and the scales that all of them take."""

from __future__ import annotations

import math
from typing import Any, Protocol

import jax

from eki_jax._types import Array, Params
from eki_jax.ensembles.priors import Gaussian, xavier

#: Standard deviations of the entries: "xavier", a number, a pytree of numbers, or a prior with such factors.
Scale = Any


class Deviations(Protocol):
    """The protocol between a solver and its deviations; ``factors`` is whatever represents one deviation."""

    def draw(self, key: Array, mean: Params) -> Any:
        """The factors of one deviation e."""

    def particle(self, mean: Params, factors: Any, sigma: Array) -> Params:
        """``mean + sigma e``, as the model is to see it."""

    def dense(self, mean: Params, factors: Any) -> Params:
        """E itself, a pytree like ``mean``."""

    def combine(self, mean: Params, factors: Any, weights: Array) -> Params:
        """``sum_j w_j e_j``, from factors with a leading axis J and weights (J,), without forming any e_j."""


def scales_of(scale: Scale, mean: Params) -> Any:
    """One standard deviation (or array of them) for each leaf, a pytree like ``mean``."""
    if isinstance(scale, str):
        return xavier(mean).factor
    if isinstance(scale, Gaussian):
        return scale.factor
    structure: Any = jax.tree.structure(mean)
    if jax.tree_util.all_leaves([scale]):
        return structure.unflatten([scale] * structure.num_leaves)
    try:
        return structure.unflatten(structure.flatten_up_to(scale))
    except (ValueError, TypeError) as error:
        raise ValueError(f"scale: its structure does not fit the parameters': {error}") from error


def check_scale(scale: Scale) -> None:
    """Raise ValueError for a scale that is an unknown name or a number that is not > 0."""
    if isinstance(scale, str) and scale != "xavier":
        raise ValueError(f"scale: {scale!r}; wanted 'xavier', numbers, or a prior")
    if isinstance(scale, int | float) and not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"scale: {scale}; wanted a number > 0")
