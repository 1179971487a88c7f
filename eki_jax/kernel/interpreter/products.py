"""Equations that multiply by a perturbed array, or look up its rows: the factors go in one after the other."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from eki_jax._types import Array
from eki_jax.kernel.interpreter.binding import bound
from eki_jax.kernel.interpreter.values import Perturbed


class Product(NamedTuple):
    """A product with a perturbed array, as whoever watches wants to know it.

    Attributes:
        w: perturbed array.
        contracted: factor that the operand is multiplied by, where it is all of it and no more: the other's numbers
            then come out at every place; None for another product.
        shape: sizes (B, ..., n) of the operand's rows that the contracted factor multiplies.
        rows: function that returns those rows.
    """

    w: Perturbed
    contracted: str | None = None
    shape: tuple[int, ...] = ()
    rows: Callable[[], Array] | None = None


def dot_general(eqn: Any, operands: Sequence[Any]) -> tuple[Array, Product]:
    """``x w`` or ``w x``, over any axes: the mean's product, and that with the two factors."""
    first, second = operands
    is_first = isinstance(first, Perturbed)
    w, x = (first, second) if is_first else (second, first)
    contracting, batch = eqn.params["dimension_numbers"]
    (w_contracting, x_contracting), (w_batch, x_batch) = (
        pair if is_first else pair[::-1] for pair in (contracting, batch)
    )
    mean = bound(eqn, *((w.mean, x) if is_first else (x, w.mean)))
    # Every axis has a number: those of w come first, the terms of the perturbation last.
    w_axes = list(range(w.mean.ndim))
    x_axes = [w.mean.ndim + axis for axis in range(x.ndim)]
    for ours, theirs in ((w_contracting, x_contracting), (w_batch, x_batch)):
        for own, other in zip(ours, theirs, strict=True):
            x_axes[other] = own
    x_free = [axis for axis in x_axes if axis >= w.mean.ndim]
    w_free = [axis for axis in w_axes if axis not in (*w_contracting, *w_batch)]
    out = [*w_batch, *(w_free + x_free if is_first else x_free + w_free)]
    sums = _Sums(eqn.params.get("precision"), mean.dtype)
    found = sums.of_factors(x, x_axes, w, out)
    return mean + found.astype(mean.dtype), _dot_product(w, x, x_axes, x_free, set(w_contracting))


class _Sums(NamedTuple):
    """Sums of products of arrays with numbered axes.

    Attributes:
        precision: precision of the equation; that of a pair is for two operands, and serves both products.
        dtype: dtype of the results.
    """

    precision: Any
    dtype: Any

    def of_factors(self, x: Array, x_axes: list[int], w: Perturbed, out: list[int]) -> Array:
        """``sum_r (x left_r) right_r``, or the other factor first where less comes out of it."""
        terms = w.mean.ndim + x.ndim
        sizes = dict(enumerate(w.shape)) | dict(zip(x_axes, x.shape, strict=True))
        factors = [(w.left, list(w.left_axes)), (w.right, list(w.right_axes))]
        kept = [sorted(set(x_axes + own) & {*out, *other}) for (_, own), (_, other) in (factors, factors[::-1])]
        if math.prod(sizes[i] for i in kept[1]) < math.prod(sizes[i] for i in kept[0]):
            factors, kept = factors[::-1], kept[::-1]
        (first, own), (second, other) = factors
        inner = self.einsum(x, x_axes, first, [*own, terms], [*kept[0], terms])
        if w.rank == 1 and not set(kept[0]) & set(other):  # an outer product, which fuses with what follows
            return _outer(inner[..., 0], kept[0], second[..., 0].astype(inner.dtype), other, out)
        return self.einsum(inner, [*kept[0], terms], second.astype(inner.dtype), [*other, terms], out)

    def einsum(self, a: Array, a_axes: list[int], b: Array, b_axes: list[int], out: list[int]) -> Array:
        """The sum over the axes that ``out`` does not name."""
        return jnp.einsum(a, a_axes, b, b_axes, out, precision=self.precision, preferred_element_type=self.dtype)


def _outer(a: Array, a_axes: list[int], b: Array, b_axes: list[int], out: list[int]) -> Array:
    """``a[i] b[j]`` with the axes in that order, as a broadcast."""

    def along(x: Array, axes: list[int]) -> Array:
        own = [axis for axis in out if axis in axes]
        x = jnp.transpose(x, [axes.index(axis) for axis in own])
        return x.reshape([x.shape[own.index(axis)] if axis in own else 1 for axis in out])

    return along(a, a_axes) * along(b, b_axes)


def _dot_product(w: Perturbed, x: Array, x_axes: list[int], x_free: list[int], contracting: set[int]) -> Product:
    """Of which factor the product is one with, and the rows of x that it multiplies.

    Where x has some of the factor's axes only, the others tell places apart: at each of them the factor is multiplied
    by a row that is zero elsewhere.
    """
    sides = {"left": w.left_axes, "right": w.right_axes}
    met = {axis for axis in x_axes if axis < w.mean.ndim}
    inside = [side for side, axes in sides.items() if met and met <= set(axes)]
    if not inside:
        return Product(w)
    axes = sides[inside[0]]
    apart = [axis for axis in axes if axis not in contracting]
    places = {axis: 2 * w.mean.ndim + x.ndim + axis for axis in apart}
    sizes = [x.shape[x_axes.index(axis)] for axis in x_free] + [w.shape[axis] for axis in apart]
    numbers = math.prod(w.shape[axis] for axis in axes)

    def rows() -> Array:
        # An axis of both x and the places is a batch of the product: the row lies where its place is.
        args: list[Any] = [x, x_axes]
        for axis in apart:
            args += [jnp.eye(w.shape[axis], dtype=x.dtype), [places[axis], axis]]
        found = jnp.einsum(*args, [*x_free, *(places[axis] for axis in apart), *axes])
        return found.reshape(*sizes, numbers)

    return Product(w, inside[0], (*sizes, numbers), rows)


def conv_general_dilated(eqn: Any, operands: Sequence[Any]) -> tuple[Array, Product] | None:
    """A convolution, whose kernel's outputs are the axis of one factor: that with the other comes first."""
    x, w = operands
    numbers = eqn.params["dimension_numbers"]
    outputs, groups = numbers.rhs_spec[0], eqn.params["feature_group_count"]
    sides = {"left": (w.left, w.left_axes), "right": (w.right, w.right_axes)}
    outer = [side for side, (_, axes) in sides.items() if axes == (outputs,)]
    if isinstance(x, Perturbed) or not outer or eqn.params["batch_group_count"] > 1:
        return None
    contracted = "left" if outer[0] == "right" else "right"
    along, across = sides[contracted][0], sides[outer[0]][0]
    feature = numbers.out_spec[1]

    def convolved(kernel: Array) -> Array:
        """With a kernel whose outputs are the last axis; they come out last too."""
        kernel = jnp.moveaxis(kernel.astype(w.mean.dtype), -1, outputs)
        kernel = jnp.concatenate([kernel] * groups, axis=outputs)
        return jnp.moveaxis(lax.conv_general_dilated(x, kernel, **eqn.params), feature, -1)

    mean, inner = bound(eqn, x, w.mean), convolved(along)
    inner = inner.reshape(*inner.shape[:-1], groups, w.rank)
    across = across.reshape(groups, -1, w.rank).astype(inner.dtype)
    if w.rank == 1:
        found = inner * across[..., 0].reshape((1,) * (inner.ndim - 2) + across.shape[:2])
    elif groups == 1:
        found = jnp.matmul(inner, across[0].T)
    else:
        found = jnp.einsum("...gr,gkr->...gk", inner, across)
    found = jnp.moveaxis(found.reshape(*inner.shape[:-2], -1), -1, feature)
    return mean + found.astype(mean.dtype), _windows(w, x, eqn, contracted, convolved, groups)


def _windows(
    w: Perturbed, x: Array, eqn: Any, contracted: str, convolved: Callable[[Array], Array], groups: int
) -> Product:
    """A convolution as the product of its windows with the kernel."""
    axes = w.left_axes if contracted == "left" else w.right_axes
    numbers = math.prod(w.shape[axis] for axis in axes)
    spec = eqn.params["dimension_numbers"]
    if groups > 1 or spec.lhs_spec[0] != 0:
        return Product(w)
    out = eqn.outvars[0].aval.shape
    shape = (out[spec.out_spec[0]], *(out[i] for i in sorted(spec.out_spec[2:])), numbers)

    def rows() -> Array:
        # Each output of this kernel picks one number of the window.
        found = convolved(jnp.eye(numbers, dtype=w.mean.dtype).reshape(*(w.shape[axis] for axis in axes), numbers))
        return jnp.moveaxis(found, [i - (i > spec.out_spec[1]) for i in (spec.out_spec[0],)], [0])

    return Product(w, contracted, shape, rows)


def gather(eqn: Any, operands: Sequence[Any]) -> Array | None:
    """Rows of a perturbed array by their indices: those of one factor, times all of the other."""
    w, indices = operands
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    if not isinstance(w, Perturbed) or isinstance(indices, Perturbed):
        return None
    looked_up = {*numbers.start_index_map, *numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    looked_up |= {axis for axis, size in enumerate(sizes) if size != w.shape[axis]}
    sides = [(w.left, w.left_axes, w.right, w.right_axes), (w.right, w.right_axes, w.left, w.left_axes)]
    fitting = [side for side in sides if looked_up <= set(side[1])]
    if not fitting:
        return None
    own, _, other, other_axes = fitting[0]
    narrow = [1 if axis in other_axes else size for axis, size in enumerate(sizes)]
    params = {**eqn.params, "slice_sizes": tuple(narrow)}

    def found(row: Array) -> Array:
        row = row.reshape([1 if axis in other_axes else w.shape[axis] for axis in range(w.mean.ndim)])
        return lax.gather(row, indices, **params)

    mean = bound(eqn, w.mean, indices)
    inner = jax.vmap(found, in_axes=-1, out_axes=-1)(own)
    kept = [a for a in range(w.mean.ndim) if a not in (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)]
    place = dict(zip(kept, numbers.offset_dims, strict=True))
    shape = [1] * mean.ndim
    for axis in other_axes:
        shape[place[axis]] = w.shape[axis]
    across = other.reshape(*shape, w.rank).astype(inner.dtype)
    return mean + jnp.sum(inner * across, axis=-1).astype(mean.dtype)
