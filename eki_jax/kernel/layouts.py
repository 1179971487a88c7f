r"""How devices that each hold some of the particles multiply the ensemble with its covariances.

Device i holds the rows Z_i, R_i (outputs and cotangents) and U_i (a block of the ensemble's columns) of its own j of
the J particles, and wants its rows of ``R Z^T U``. Every layout computes the same numbers;
:mod:`eki_jax.kernel.costs` says what each moves and chooses:

* ``all_reduce``: ``R_i sum_k Z_k^T U_k``; the sum over devices is of M x P numbers, whatever J is.
* ``reduce_scatter``: the same, the sum being scattered in its wide dtype and gathered again in the ensemble's own,
  which halves the way back for bfloat16.
* ``bf16_sums``: the same, what is sent being rounded to bfloat16 both ways, and added in the wide dtype.
* ``all_to_all``: each device gets all particles of its n-th part of the columns, multiplies, and returns the rows.
* ``gather``: ``sum_k (R_i Z_k^T) U_k`` with all U_k fetched, a block of columns at a time.
* ``ring``: the same with the U_k passed from neighbour to neighbour, so that only two exist at a time and each
  transfer runs beside a product.

The first and the fourth are the two contraction orders of :mod:`eki_jax.kernel.products`; the others are here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax

from eki_jax._types import Array
from eki_jax.kernel.axes import Axis
from eki_jax.kernel.costs import COMMUNICATIONS, Communication
from eki_jax.kernel.precision import product

#: ``multiply(u, dtype)`` with u of shape (j, w), stored as ``dtype``: this device's rows of ``R Z^T U``, in u's dtype.
Multiply = Callable[[Array, Any], Array]
_Matmul = Callable[[Array, Array], Array]


def checked_communication(communication: Any) -> Communication | None:
    """``communication``, or an error that names the layouts.

    >>> checked_communication("ring")
    'ring'
    """
    if communication is not None and communication not in COMMUNICATIONS:
        raise ValueError(f"communication: {communication!r}; wanted {', '.join(COMMUNICATIONS)} or None")
    return communication


def multiplier(
    communication: Communication, anomalies: Array, cotangents: Array, axis: Axis, precision: Any
) -> Multiply | None:
    """The product with ``R Z^T`` in one of the layouts that are more than an order of the products.

    Args:
        communication: layout of the product.
        anomalies: centred outputs Z_i, shape (j, M); their mean is over all devices.
        cotangents: cotangents R_i, shape (j, M).
        axis: devices over which the particles are spread.
        precision: precision of the matrix products.

    Returns:
        ``multiply(u, dtype)``, to be called with one block of columns after another; None for ``all_reduce`` and
        ``gather``, and on one device.
    """

    def matmul(a: Array, b: Array) -> Array:
        return product(a.astype(b.dtype), b, precision)

    layouts: dict[str, Callable[[Array, Array, Axis, _Matmul], Multiply]] = {
        "reduce_scatter": _reduce_scatter,
        "bf16_sums": _bf16_sums,
        "all_to_all": _all_to_all,
        "ring": _ring,
    }
    make = layouts.get(communication)
    return None if make is None or axis.size == 1 else make(anomalies, cotangents, axis, matmul)


def _reduce_scatter(z: Array, r: Array, axis: Axis, matmul: _Matmul) -> Multiply:
    def multiply(u: Array, dtype: Any) -> Array:
        sums = _padded(matmul(z.T, u), axis.size)
        # Summed wide, sent back narrow: only the way back is halved, and no digit of the sum is lost before it.
        share = lax.psum_scatter(sums, axis.name, scatter_dimension=1, tiled=True)
        sums = axis.gathered(share.astype(dtype), axis=1)
        return matmul(r, sums[:, : u.shape[1]].astype(u.dtype))

    return multiply


def _bf16_sums(z: Array, r: Array, axis: Axis, matmul: _Matmul) -> Multiply:
    def multiply(u: Array, dtype: Any) -> Array:
        del dtype
        sums = _padded(matmul(z.T, u), axis.size)
        # An all-reduce in bfloat16 would round after every addition; each term is rounded once here, and so is the sum.
        terms = lax.all_to_all(sums.astype(jnp.bfloat16), axis.name, split_axis=1, concat_axis=0, tiled=True)
        share = terms.reshape(axis.size, *sums.shape[:1], -1).astype(sums.dtype).sum(axis=0)
        sums = axis.gathered(share.astype(jnp.bfloat16), axis=1)
        return matmul(r, sums[:, : u.shape[1]].astype(u.dtype))

    return multiply


def _all_to_all(z: Array, r: Array, axis: Axis, matmul: _Matmul) -> Multiply:
    devices = axis.size
    every_z, weights = axis.gathered(z), None
    if 2 * every_z.shape[1] > every_z.shape[0]:  # then J x J numbers are fewer than 2 J x M
        weights = axis.gathered(matmul(r, every_z.T))
    else:
        every_r = axis.gathered(r)

    def multiply(u: Array, dtype: Any) -> Array:
        del dtype
        columns = lax.all_to_all(_padded(u, devices), axis.name, split_axis=1, concat_axis=0, tiled=True)
        d = matmul(every_r, matmul(every_z.T, columns)) if weights is None else matmul(weights, columns)
        return lax.all_to_all(d, axis.name, split_axis=0, concat_axis=1, tiled=True)[:, : u.shape[1]]

    return multiply


def _ring(z: Array, r: Array, axis: Axis, matmul: _Matmul) -> Multiply:
    devices, local = axis.size, z.shape[0]
    weights = matmul(r, axis.gathered(z).T)
    to_next = [(i, (i + 1) % devices) for i in range(devices)]

    def multiply(u: Array, dtype: Any) -> Array:
        del dtype
        total = jnp.zeros_like(u)
        # Unrolled: the compiler then runs each transfer beside the product of the block that is already here.
        for step in range(devices):
            owner = (axis.index - step) % devices  # whose rows are here
            total += matmul(lax.dynamic_slice_in_dim(weights, owner * local, local, axis=1), u)
            if step < devices - 1:
                u = lax.ppermute(u, axis.name, to_next)
        return total

    return multiply


def _padded(columns: Array, multiple: int) -> Array:
    """Zero columns at the end, so that ``multiple`` divides their number."""
    return jnp.pad(columns, ((0, 0), (0, -columns.shape[1] % multiple)))
