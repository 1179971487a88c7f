"""One particle's parameters as a vector of P numbers, in the order of the leaves, and back."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eki_jax._types import Array, Ensemble, Params


def flat_params(params: Params, dtype: Any) -> Array:
    """The numbers of one particle, shape (P,).

    >>> flat_params({"a": jnp.array([[1.0, 2.0]]), "b": jnp.array(3.0)}, jnp.float32)
    Array([1., 2., 3.], dtype=float32)
    """
    return jnp.concatenate([jnp.ravel(leaf).astype(dtype) for leaf in jax.tree.leaves(params)])


def flat_rows(ensemble: Ensemble, dtype: Any) -> Array:
    """The numbers of the particles, one row each, shape (J, P)."""
    rows = jax.tree.leaves(ensemble)
    return jnp.concatenate([leaf.reshape(leaf.shape[0], -1).astype(dtype) for leaf in rows], axis=1)


def as_params(numbers: Array, like: Params) -> Any:
    """Vectors of P numbers, shape (..., P), as parameters of one particle's structure and dtypes.

    >>> as_params(jnp.array([[1.0, 2.0], [3.0, 4.0]]), {"a": jnp.zeros(1), "b": jnp.zeros(())})["b"]
    Array([2., 4.], dtype=float32)
    """
    leaves: list[Any] = jax.tree.leaves(like)
    structure: Any = jax.tree.structure(like)
    sizes = [math.prod(jnp.shape(leaf)) for leaf in leaves]
    parts = jnp.split(numbers, np.cumsum(sizes)[:-1].tolist(), axis=-1)
    shaped = [
        part.reshape(*numbers.shape[:-1], *jnp.shape(leaf)).astype(jnp.result_type(leaf))
        for part, leaf in zip(parts, leaves, strict=True)
    ]
    return structure.unflatten(shaped)
