"""The protocol of deviations, and the scales that all of them take."""

from __future__ import annotations

from typing import Any, Protocol

import jax
import numpy as np

from eki_jax._checks import POSITIVE, arrays, is_known, real
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
    """Raise for a scale that is no name, no numbers > 0 and no prior.

    Raises:
        TypeError: of another kind.
        ValueError: an unknown name, or numbers out of range.
    """
    wanted = "'xavier', or a prior"
    if isinstance(scale, str):
        if scale != "xavier":
            raise ValueError(f"scale: {scale!r}; wanted 'xavier', numbers, or a prior")
    elif not hasattr(scale, "noise"):
        leaves = jax.tree_util.tree_leaves_with_path(scale)
        if not leaves:
            raise TypeError(f"scale: {scale!r}; wanted numbers > 0, {wanted}")
        for path, leaf in leaves:
            where = f"scale{jax.tree_util.keystr(path)}"
            if isinstance(leaf, bool | str) or not np.ndim(leaf):
                real(where, leaf, POSITIVE, or_=wanted)
            elif is_known(arrays(where, leaf)) and not np.all(POSITIVE.holds(np.asarray(leaf, np.float64))):
                raise ValueError(f"{where}: numbers that are not finite and > 0; wanted numbers > 0, {wanted}")
