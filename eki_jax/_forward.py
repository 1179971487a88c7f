"""Evaluating the model for all particles, a chunk of them at a time."""

from __future__ import annotations

import math
from typing import Any

import jax
from jax import lax

from eki_jax._tree import local_size
from eki_jax._types import Ensemble, ForwardFn

# What the intermediate values of one chunk may take, unless the caller says otherwise.
ACTIVATION_BYTES = 256 * 2**20


def evaluate(forward: ForwardFn, ensemble: Ensemble, x: Any, *, chunk_size: int | None = None) -> Any:
    """The outputs G(u_j | x) of every particle.

    The particles are evaluated in chunks, so that the model's intermediate values (J x batch x width) never exist all
    at once.

    Args:
        forward: ``forward(params, x) -> outputs`` for one particle.
        ensemble: pytree of arrays of shape (J, ...).
        x: what ``forward`` takes; shared by the particles.
        chunk_size: particles at a time; by default as many as keep one chunk's intermediate values below 256 MiB.

    Returns:
        The outputs, each array with a leading particle axis, shape (J, ...).

    Raises:
        ValueError: leaves that disagree on J, or ``chunk_size`` < 1.

    >>> import jax.numpy as jnp
    >>> evaluate(lambda params, x: params["w"] * x, {"w": jnp.array([1.0, 2.0, 3.0])}, 10.0, chunk_size=2)
    Array([10., 20., 30.], dtype=float32)
    """
    size = local_size(ensemble, name="ensemble")
    if chunk_size is None:
        chunk_size = max(1, ACTIVATION_BYTES // max(1, activation_bytes(forward, ensemble, x)))
    if chunk_size < 1:
        raise ValueError(f"chunk_size: {chunk_size}; wanted a number of particles >= 1")
    if chunk_size >= size:
        return jax.vmap(forward, in_axes=(0, None))(ensemble, x)
    return lax.map(lambda params: forward(params, x), ensemble, batch_size=chunk_size)


def activation_bytes(forward: ForwardFn, ensemble: Ensemble, x: Any) -> int:
    """An upper bound of what one particle's intermediate values take: every value that its trace names."""
    particle = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), ensemble)
    jaxpr = jax.make_jaxpr(forward)(particle, x)
    return sum(math.prod(v.aval.shape) * v.aval.dtype.itemsize for e in jaxpr.jaxpr.eqns for v in e.outvars)
