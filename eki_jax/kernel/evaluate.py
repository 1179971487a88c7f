"""Evaluating the model for all particles, a chunk of them at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from eki_jax._checks import function, is_known, traceable, whole
from eki_jax._types import Ensemble, ForwardFn
from eki_jax.kernel.particles import local_size

# What the intermediate values of one chunk may take, unless the caller says otherwise. A processor wants them, and the
# packed weights of the chunk's matrix products, to stay in its cache; an accelerator wants enough work to fill it.
_CACHE_BYTES = 8 * 2**20
_DEVICE_BYTES = 256 * 2**20
# ... and, of a small ensemble, no more than this share, so that a step's peak memory stays near the ensemble itself.
_ENSEMBLE_SHARE = 1 / 8


def evaluate(forward: ForwardFn, ensemble: Ensemble, x: Any, *, chunk_size: int | None = None) -> Any:
    """The outputs G(u_j | x) of every particle.

    The particles are evaluated in chunks, so that the model's intermediate values (J x batch x width) never exist all
    at once. Within a chunk the inputs are shared: a first dense layer is one matrix product with the chunk's stacked
    weights.

    Args:
        forward: function ``forward(params, x) -> outputs`` of one particle.
        ensemble: pytree of arrays of shape (J, ...).
        x: inputs that ``forward`` takes; shared by the particles.
        chunk_size: particles at a time. By default as many as keep one chunk's intermediate values below 8 MiB on a
            CPU (256 MiB elsewhere) and below an eighth of the ensemble.

    Returns:
        The outputs, each array with a leading particle axis, shape (J, ...).

    Raises:
        ValueError: leaves that disagree on J, or ``chunk_size`` < 1.

    >>> import jax.numpy as jnp
    >>> evaluate(lambda params, x: params["w"] * x, {"w": jnp.array([1.0, 2.0, 3.0])}, 10.0, chunk_size=2)
    Array([10., 20., 30.], dtype=float32)
    """
    function("forward", forward, "a model, forward(params, x) -> outputs", arguments=2)
    traceable("x", x)
    local_size(ensemble, name="ensemble")
    if chunk_size is not None:
        whole("chunk_size", chunk_size, or_="None for a memory budget")
    if chunk_size is None:
        chunk_size = default_chunk_size(forward, ensemble, x)
    return map_particles(lambda params: forward(params, x), ensemble, chunk_size)


def map_particles(fn: Callable[[Any], Any], rows: Any, chunk_size: int) -> Any:
    """``fn`` of every row, ``chunk_size`` rows at a time (a few less where that divides their number evenly).

    >>> import jax.numpy as jnp
    >>> map_particles(lambda row: 2 * row, jnp.arange(5), chunk_size=2)
    Array([0, 2, 4, 6, 8], dtype=int32)
    """
    size = jax.tree.leaves(rows)[0].shape[0]
    chunk_size = whole("chunk_size", chunk_size)
    if chunk_size >= size:
        return jax.vmap(fn)(rows)
    chunk_size = next((n for n in range(chunk_size, chunk_size // 2, -1) if size % n == 0), chunk_size)
    if all(map(is_known, jax.tree.leaves(rows))):
        part = lambda start: jax.vmap(fn)(jax.tree.map(lambda leaf: leaf[start : start + chunk_size], rows))
        first = part(0)
        if all(map(is_known, jax.tree.leaves(first))):
            # Outside of a compiled function a loop of JAX's would be compiled anew in every call, and kept.
            parts = [first, *map(part, range(chunk_size, size, chunk_size))]
            return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)
    # Without a batch a matrix product stays one; with a batch of one it would become a batched one.
    return lax.map(fn, rows) if chunk_size == 1 else lax.map(fn, rows, batch_size=chunk_size)


def default_chunk_size(forward: ForwardFn, ensemble: Ensemble, x: Any) -> int:
    """The particles whose intermediate values fit into the budget; at least one."""
    budget = _CACHE_BYTES if jax.default_backend() == "cpu" else _DEVICE_BYTES
    share = int(_ENSEMBLE_SHARE * sum(leaf.nbytes for leaf in jax.tree.leaves(ensemble)))
    return max(1, min(budget, share) // max(1, activation_bytes(forward, ensemble, x)))


def activation_bytes(forward: ForwardFn, ensemble: Ensemble, x: Any) -> int:
    """An upper bound of what one particle's intermediate values take: every value that its trace names."""
    particle = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), ensemble)
    jaxpr = jax.make_jaxpr(forward)(particle, x)
    return sum(math.prod(v.aval.shape) * v.aval.dtype.itemsize for e in jaxpr.jaxpr.eqns for v in e.outvars)
