"""Equations that multiply by a perturbed array, or look up its rows: the factors go in one after the other."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from eki_jax._types import Array
from eki_jax.kernel.interpreter.binding import bound
from eki_jax.kernel.interpreter.numbering import Numbering, counted
from eki_jax.kernel.interpreter.values import Perturbed

Kind = Literal["shared", "summed", "free"]
_KINDS: tuple[Kind, ...] = ("shared", "summed", "free")


@jax.tree_util.register_static
@dataclass(frozen=True)
class Roles:
    """What a product does with the axes of an array of low rank, which is a matrix there, or several of one size.

    Axes of a kind that lie side by side in a factor count as one, those of one index not at all, so that two products
    that do the same have the same roles however the array is shaped.

    Attributes:
        left: kind and size of each axis of the left factor. The product sums over "summed" axes; "free" ones come out;
            "shared" ones are the other operand's too and come out: a matrix for each index.
        right: kind and size of each axis of the right factor.
    """

    left: tuple[tuple[Kind, int], ...]
    right: tuple[tuple[Kind, int], ...]

    @classmethod
    def of(cls, left: Sequence[tuple[Kind, int]], right: Sequence[tuple[Kind, int]]) -> Roles:
        """The roles of axes in the order of each factor."""

        def merged(axes: Sequence[tuple[Kind, int]]) -> tuple[tuple[Kind, int], ...]:
            groups = itertools.groupby([axis for axis in axes if axis[1] != 1], key=lambda axis: axis[0])
            return tuple((kind, math.prod(size for _, size in group)) for kind, group in groups)

        return cls(merged(left), merged(right))

    @property
    def axes(self) -> tuple[tuple[Kind, int], ...]:
        """All axes, the left factor's first."""
        return (*self.left, *self.right)

    def sizes(self, kind: Kind) -> tuple[int, ...]:
        """The sizes of the axes of a kind."""
        return tuple(size for own, size in self.axes if own == kind)

    def size(self, kind: Kind) -> int:
        """Their product."""
        return math.prod(self.sizes(kind))

    @property
    def features(self) -> int:
        """The number of what comes out at each place."""
        return self.size("shared") * self.size("free")

    @property
    def side(self) -> str:
        """The factor over which the product sums where that is all of it and the other comes out, "left"; else ""."""
        kinds = {"left": {kind for kind, _ in self.left}, "right": {kind for kind, _ in self.right}}
        for side, other in (("left", "right"), ("right", "left")):
            if kinds[side] <= {"summed"} and kinds[other] <= {"free"}:
                return side
        return ""

    def matrices(self, leaf: Array) -> Array:
        """The array as matrices, shape (g, n, k), of one whose factors are its first and its last axes."""
        leaf = leaf.reshape([size for _, size in self.axes])
        return jnp.transpose(leaf, self._order()).reshape([self.size(kind) for kind in _KINDS])

    def array(self, matrices: Array, shape: tuple[int, ...]) -> Array:
        """The array of that shape from its matrices."""
        order = self._order()
        matrices = matrices.reshape([self.axes[place][1] for place in order])
        return jnp.transpose(matrices, [order.index(place) for place in range(len(order))]).reshape(shape)

    def _order(self) -> list[int]:
        return [place for kind in _KINDS for place, (own, _) in enumerate(self.axes) if own == kind]


class Product(NamedTuple):
    """A product with a perturbed array, as whoever watches wants to know it.

    Attributes:
        w: perturbed array.
        roles: roles of its axes in the product; None where it multiplies no rows.
        shape: sizes (B, ..., g n) of the other operand's rows; of several matrices theirs lie side by side.
        rows: function that returns those rows.
        is_formed: flag, True where the array was added up for it.
        numbering: numbering of what comes out, in the order of the roles, in the result; of all turns of a loop of
            which the array is a slice.
    """

    w: Perturbed
    roles: Roles | None = None
    shape: tuple[int, ...] = ()
    rows: Callable[[], Array] | None = None
    is_formed: bool = False
    numbering: Numbering | None = None


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
    product = _dot_product(w, x, x_axes, x_free, w_contracting, w_batch)
    return mean + found.astype(mean.dtype), product._replace(numbering=_numbering(w, w_batch, w_free, out, mean.shape))


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


def _roles(w: Perturbed, kinds: Callable[[Sequence[int]], list[tuple[Kind, int]]]) -> Roles | None:
    """The roles of a perturbed array's axes: the turns of a loop are matrices side by side, as shared axes are.

    None where the rows of all turns, which lie turn by turn, would not be in the order of the roles.
    """
    left, right = kinds(w.left_axes), kinds(w.right_axes)
    sides = {turns.is_left for turns in w.turns}
    if len(sides) > 1 or (sides == {False} and any(kind == "shared" for kind, _ in left)):
        return None
    turns: list[tuple[Kind, int]] = [("shared", turns.size) for turns in w.turns]
    return Roles.of(*((turns + left, right) if sides == {True} else (left, turns + right)))


def _numbering(
    w: Perturbed, shared: Sequence[int], free: Sequence[int], out: Sequence[int], shape: Sequence[int]
) -> Numbering:
    """Where in a product of these axes lies what comes out of a perturbed array."""
    own = (*w.left_axes, *w.right_axes)
    order = [axis for kind in (shared, free) for axis in own if axis in kind]
    digits = counted([*(turns.size for turns in w.turns), *(w.shape[axis] for axis in order)])
    turns, place = digits[: len(w.turns)], dict(zip(order, digits[len(w.turns) :], strict=True))
    axes = [[place.get(axis, (size, 0))] for axis, size in zip(out, shape, strict=True)]
    return Numbering.of(axes, ((loop.depth, [digit]) for loop, digit in zip(w.turns, turns, strict=True)))


def _dot_product(
    w: Perturbed, x: Array, x_axes: list[int], x_free: list[int], summed: Sequence[int], shared: Sequence[int]
) -> Product:
    """The rows of x that are multiplied, and by what of the array."""
    if not summed and not shared:
        return Product(w)

    def kinds(axes: Sequence[int]) -> list[tuple[Kind, int]]:
        return [
            ("summed" if axis in summed else "shared" if axis in shared else "free", w.shape[axis]) for axis in axes
        ]

    own = (*w.left_axes, *w.right_axes)
    order = [*x_free, *(axis for axis in own if axis in shared), *(axis for axis in own if axis in summed)]
    free = [x.shape[x_axes.index(axis)] for axis in x_free]
    shape = (*free, x.size // math.prod(free) if x.size else 0)
    return Product(
        w,
        _roles(w, kinds),
        shape,
        lambda: jnp.transpose(x, [x_axes.index(axis) for axis in order]).reshape(shape),
    )


def conv_general_dilated(eqn: Any, operands: Sequence[Any]) -> tuple[Array, Product] | None:
    """A convolution, whose kernel's outputs are the axis of one factor: that with the other comes first.

    A kernel whose outputs share their factor with other axes is added up: to convolve with its factors one after the
    other saves nothing, since each particle has its own.
    """
    x, w = operands
    numbers, groups = eqn.params["dimension_numbers"], eqn.params["feature_group_count"]
    outputs, feature = numbers.rhs_spec[0], numbers.out_spec[1]
    if isinstance(x, Perturbed) or eqn.params["batch_group_count"] > 1:
        return None

    def convolved(kernel: Array, axes: Sequence[int]) -> Array:
        """With a kernel of these axes, of others of one index and of outputs of its own, which come out last."""
        rest = [axis for axis in range(w.mean.ndim) if axis not in (*axes, outputs)]
        order = [*axes, *rest, outputs]
        kernel = kernel.astype(w.mean.dtype).reshape(*(w.shape[axis] for axis in order[:-1]), kernel.shape[-1])
        kernel = jnp.transpose(kernel, [order.index(axis) for axis in range(len(order))])
        kernel = jnp.concatenate([kernel] * groups, axis=outputs)
        return jnp.moveaxis(lax.conv_general_dilated(x, kernel, **eqn.params), feature, -1)

    windows = partial(_windows, w, eqn, convolved)
    sides = [(w.left, w.left_axes, w.right, w.right_axes), (w.right, w.right_axes, w.left, w.left_axes)]
    fitting = [side for side in sides if all(axis == outputs or w.shape[axis] == 1 for axis in side[3])]
    if not fitting:
        return bound(eqn, x, w.dense()), windows(is_formed=True)
    along, axes, across, _ = fitting[0]
    axes = [axis for axis in axes if axis != outputs]  # one index, where the other factor has them
    mean, inner = bound(eqn, x, w.mean), convolved(along, axes)
    inner = inner.reshape(*inner.shape[:-1], groups, w.rank)
    across = across.reshape(groups, -1, w.rank).astype(inner.dtype)
    if w.rank == 1:
        found = inner * across[..., 0].reshape((1,) * (inner.ndim - 2) + across.shape[:2])
    elif groups == 1:
        found = jnp.matmul(inner, across[0].T)
    else:
        found = jnp.einsum("...gr,gkr->...gk", inner, across)
    found = jnp.moveaxis(found.reshape(*inner.shape[:-2], -1), -1, feature)
    return mean + found.astype(mean.dtype), windows(is_formed=False)


def _windows(w: Perturbed, eqn: Any, convolved: Callable[[Array, Sequence[int]], Array], *, is_formed: bool) -> Product:
    """A convolution as the product of its windows with the kernel."""
    spec, groups = eqn.params["dimension_numbers"], eqn.params["feature_group_count"]
    outputs, own = spec.rhs_spec[0], (*w.left_axes, *w.right_axes)
    if spec.lhs_spec[0] != 0:
        return Product(w, is_formed=is_formed)

    def kinds(axes: Sequence[int]) -> list[tuple[Kind, int]]:
        found: list[tuple[Kind, int]] = []
        for axis in axes:
            size = w.shape[axis]
            found += [("shared", groups), ("free", size // groups)] if axis == outputs else [("summed", size)]
        return found

    summed = [axis for axis in own if axis != outputs]
    count = math.prod(w.shape[axis] for axis in summed)
    out = eqn.outvars[0].aval.shape
    shape = (out[spec.out_spec[0]], *(out[i] for i in sorted(spec.out_spec[2:])), groups * count)

    def rows() -> Array:
        # Each output of this kernel picks one number of the window.
        found = convolved(jnp.eye(count, dtype=w.mean.dtype), summed)
        return jnp.moveaxis(found, [i - (i > spec.out_spec[1]) for i in (spec.out_spec[0],)], [0])

    axes = [outputs if axis == spec.out_spec[1] else -1 for axis in range(len(out))]
    return Product(w, _roles(w, kinds), shape, rows, is_formed, _numbering(w, [], [outputs], axes, out))


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
