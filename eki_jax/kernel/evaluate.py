"""Evaluating the model for all particles, a chunk of them at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from eki_jax._checks import function, is_known, traceable, whole
from eki_jax._types import Array, Ensemble, ForwardFn, Params
from eki_jax.kernel.axes import Axis
from eki_jax.kernel.interpreter import on_devices
from eki_jax.kernel.particles import local_size
from eki_jax.kernel.precision import Precision, check_precision, model_in

# What the intermediate values of one chunk may take, unless the caller says otherwise. A processor wants them, and the
# packed weights of the chunk's matrix products, to stay in its cache; an accelerator wants enough work to fill it.
_CACHE_BYTES = 8 * 2**20
_DEVICE_BYTES = 256 * 2**20
# ... and, of a small ensemble, no more than this share, so that a step's peak memory stays near the ensemble itself.
_ENSEMBLE_SHARE = 1 / 8


@dataclass(frozen=True)
class IndexedForward:
    """A model that is told which particle it evaluates, so that each can have random numbers of its own.

    Called as ``forward(params, x)`` it is ``plain``.

    Attributes:
        plain: function ``plain(params, x) -> outputs`` for parameters that are no particle's, such as their mean.
        indexed: function ``indexed(params, index, x) -> outputs`` of one particle and its index, int32, among those of
            all devices.

    >>> model = IndexedForward(lambda u, x: u * x, lambda u, index, x: u * x + index)
    >>> evaluate(model, jnp.array([1.0, 1.0]), 5.0), model(1.0, 5.0)
    (Array([5., 6.], dtype=float32), 5.0)
    """

    plain: ForwardFn
    indexed: Callable[[Params, Array, Any], Any]

    def __call__(self, params: Params, x: Any) -> Any:
        """The outputs for parameters that are no particle's."""
        return self.plain(params, x)


def of_rows(
    forward: ForwardFn, particle: Callable[[Any], Params] | None, rows: Any, axis: Axis
) -> tuple[Callable[[Any, Any], Any], Any]:
    """A model as a function of a row, and the rows; an :class:`IndexedForward` is told each row's index.

    Args:
        forward: function ``forward(params, x) -> outputs`` of one particle.
        particle: function of a row that returns its particle; None where the rows are the particles.
        rows: pytree of arrays of shape (J, ...), this device's.
        axis: devices over which the rows are spread.

    Returns:
        ``(one, rows)`` with ``one(row, x) -> outputs``; the rows are those given, or pairs of these with their indices.

    >>> one, rows = of_rows(lambda u, x: u + x, lambda row: 2 * row, jnp.array([1.0, 2.0]), Axis())
    >>> jax.vmap(lambda row: one(row, 1.0))(rows)
    Array([3., 5.], dtype=float32)
    """
    made = (lambda row: row) if particle is None else particle
    if isinstance(forward, IndexedForward):
        indices = axis.own_indices(local_size(rows, name="ensemble"))
        return lambda row, x: on_devices(forward.indexed, made(row[0]), row[1], x), (rows, indices)
    return lambda row, x: on_devices(forward, made(row), x), rows


def evaluate(
    forward: ForwardFn,
    ensemble: Ensemble,
    x: Any,
    *,
    chunk_size: int | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    precision: Precision = None,
) -> Any:
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
        axis_name: mapped axis over which the particles are spread; only a model that is told their indices asks.
        precision: precision of the model's products: ``"bf16"`` has them in bfloat16 with float32 sums, whatever the
            model is written with. Matrices and what layers return are rounded where a product takes them; all else is
            what it was, the outputs' dtype included, and a product whose precision the model names keeps it. Others
            leave the model as it is.

    Returns:
        The outputs, each array with a leading particle axis, shape (J, ...).

    Raises:
        ValueError: leaves that disagree on J, ``chunk_size`` < 1, or a ``precision`` that no product takes.

    >>> import jax.numpy as jnp
    >>> evaluate(lambda params, x: params["w"] * x, {"w": jnp.array([1.0, 2.0, 3.0])}, 10.0, chunk_size=2)
    Array([10., 20., 30.], dtype=float32)
    """
    function("forward", forward, "a model, forward(params, x) -> outputs", arguments=2)
    traceable("x", x)
    local_size(ensemble, name="ensemble")
    check_precision(precision)
    if chunk_size is not None:
        whole("chunk_size", chunk_size, or_="None for a memory budget")
    one, rows = of_rows(forward, None, ensemble, Axis(axis_name))
    if chunk_size is None:
        chunk_size = default_chunk_size(one, rows, x)
    every = lambda rows, x: map_particles(lambda row: one(row, x), rows, chunk_size)
    return model_in(precision, every)(rows, x)


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
