"""Equations that leave a perturbation of low rank what it is: they arrange, cut or scale its entries."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from jax import lax

from eki_jax._types import Array
from eki_jax.kernel.interpreter.binding import bound
from eki_jax.kernel.interpreter.numbering import same_numbers
from eki_jax.kernel.interpreter.values import Perturbed

#: A function ``rule(eqn, operands)`` of an equation, one of whose operands is :class:`Perturbed`: its result, or None
#: where this one must be added up.
Rule = Callable[[Any, Sequence[Any]], Any]


def _transpose(eqn: Any, operands: Sequence[Any]) -> Any:
    (w,) = operands
    order = eqn.params["permutation"]
    axes = tuple(new for new, old in enumerate(order) if old in w.left_axes)

    def moved(factor: Array, old_axes: tuple[int, ...], is_left: bool) -> tuple[Array, bool]:
        places = [old_axes.index(old) for new, old in enumerate(order) if (new in axes) == is_left]
        return jnp.transpose(factor, (*places, len(places))), places == sorted(places)

    left, left_same = moved(w.left, w.left_axes, True)
    right, right_same = moved(w.right, w.right_axes, False)
    return w.changed(jnp.transpose(w.mean, order), left, right, axes, left_same and right_same)


def _reshape(eqn: Any, operands: Sequence[Any]) -> Any:
    (w,) = operands
    sizes = eqn.outvars[0].aval.shape
    if 0 in sizes or (eqn.primitive.name == "reshape" and eqn.params["dimensions"] is not None):
        return None
    axes: list[int] = []
    for old, new in same_numbers(w.shape, sizes):
        factors = {axis in w.left_axes for axis in old if w.shape[axis] > 1}
        if len(factors) > 1:
            return None  # an axis of both factors
        axes += new if factors == {True} else []
    others = [axis for axis in range(len(sizes)) if axis not in axes]
    left, right = (
        factor.reshape(*(sizes[axis] for axis in kept), w.rank) for factor, kept in ((w.left, axes), (w.right, others))
    )
    return w.changed(w.mean.reshape(sizes), left, right, tuple(axes), whole=True)


def _broadcast(eqn: Any, operands: Sequence[Any]) -> Any:
    w, *dynamic = operands
    if dynamic:
        return None
    sizes, places = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    rights = {places[axis] for axis in w.right_axes}
    axes = tuple(axis for axis in range(len(sizes)) if axis not in rights)

    def spread(factor: Array, own: tuple[int, ...], new: Sequence[int]) -> Array:
        where = [new.index(places[axis]) for axis in own]
        return lax.broadcast_in_dim(factor, (*(sizes[axis] for axis in new), w.rank), (*where, len(new)))

    left, right = spread(w.left, w.left_axes, axes), spread(w.right, w.right_axes, sorted(rights))
    return w.changed(
        lax.broadcast_in_dim(w.mean, sizes, places), left, right, axes, math.prod(sizes) == math.prod(w.shape)
    )


def _cast(eqn: Any, operands: Sequence[Any]) -> Any:
    (w,) = operands
    dtype = eqn.params["new_dtype"]
    if not jnp.issubdtype(dtype, jnp.floating):
        return None
    return replace(w, mean=w.mean.astype(dtype), left=w.left.astype(dtype), right=w.right.astype(dtype))


def _scaled(eqn: Any, operands: Sequence[Any]) -> Any:
    """A product with one number, or a quotient."""
    first, second = operands
    w, factor = (first, second) if isinstance(first, Perturbed) else (second, first)
    if isinstance(factor, Perturbed) or jnp.size(factor) != 1 or (eqn.primitive.name == "div" and w is second):
        return None
    one = jnp.reshape(factor, ())
    by = lambda x: x / one.astype(x.dtype) if eqn.primitive.name == "div" else x * one.astype(x.dtype)
    return w.changed(by(w.mean), by(w.left), w.right, w.left_axes, whole=False)


def _negated(eqn: Any, operands: Sequence[Any]) -> Any:
    (w,) = operands
    return w.changed(-w.mean, -w.left, w.right, w.left_axes, whole=False)


def _sum(eqn: Any, operands: Sequence[Any]) -> Any:
    """A sum or difference with an array, or with one that has its axes in the same factors."""
    first, second = operands
    bind = lambda a, b: bound(eqn, a, b)
    if eqn.outvars[0].aval.shape != (first if isinstance(first, Perturbed) else second).shape:
        return None
    if not isinstance(second, Perturbed):
        return replace(first, mean=bind(first.mean, second), whole=False)
    negative = eqn.primitive.name == "sub"
    left = -second.left if negative else second.left
    if not isinstance(first, Perturbed):
        return replace(second, mean=bind(first, second.mean), left=left, whole=False)
    if first.left_axes != second.left_axes:
        return None
    lefts, rights = jnp.concatenate([first.left, left], -1), jnp.concatenate([first.right, second.right], -1)
    names = first.names + second.names
    return Perturbed(bind(first.mean, second.mean), lefts, rights, first.left_axes, names, whole=False)


def _slice(eqn: Any, operands: Sequence[Any]) -> Any:
    (w,) = operands
    if eqn.outvars[0].aval.shape == w.shape:
        return w
    start, limit = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or [1] * len(start)
    cut = lambda x, axes: x[tuple(slice(start[i], limit[i], strides[i]) for i in axes)]
    return w.by_axes(cut(w.mean, range(w.mean.ndim)), cut)


def _dynamic_slice(eqn: Any, operands: Sequence[Any]) -> Any:
    w, *starts = operands
    sizes = eqn.params["slice_sizes"]
    if not isinstance(w, Perturbed) or any(isinstance(start, Perturbed) for start in starts):
        return None

    def cut(factor: Array, axes: tuple[int, ...]) -> Array:
        zero = jnp.zeros_like(starts[0])
        return lax.dynamic_slice(factor, (*(starts[i] for i in axes), zero), (*(sizes[i] for i in axes), w.rank))

    return w.by_axes(lax.dynamic_slice(w.mean, starts, sizes), cut)


def _reversed(eqn: Any, operands: Sequence[Any]) -> Any:
    (w,) = operands
    turned = set(eqn.params["dimensions"])
    turn = lambda x, axes: lax.rev(x, [place for place, axis in enumerate(axes) if axis in turned])
    return w.by_axes(turn(w.mean, range(w.mean.ndim)), turn)


def _split(eqn: Any, operands: Sequence[Any]) -> Any:
    (w,) = operands
    axis, parts, start = eqn.params["axis"], [], 0
    for size in eqn.params["sizes"]:
        cut = lambda x, axes, start=start, size=size: (
            lax.slice_in_dim(x, start, start + size, axis=axes.index(axis)) if axis in axes else x
        )
        parts.append(w.by_axes(cut(w.mean, range(w.mean.ndim)), cut))
        start += size
    return parts


def _concatenated(eqn: Any, operands: Sequence[Any]) -> Any:
    """Side by side, as cells of recurrent networks have their gates: each part keeps its terms, zero elsewhere."""
    axis = eqn.params["dimension"]
    if not all(isinstance(w, Perturbed) and w.left_axes == operands[0].left_axes for w in operands):
        return None
    first = operands[0]
    on_left = axis in first.left_axes
    own = (first.left_axes if on_left else first.right_axes).index(axis)
    total, blocks, shared, before = sum(w.rank for w in operands), [], [], 0
    for w in operands:
        inner, other = (w.left, w.right) if on_left else (w.right, w.left)
        blocks.append(jnp.pad(inner, [(0, 0)] * (inner.ndim - 1) + [(before, total - before - w.rank)]))
        shared.append(other)
        before += w.rank
    along, across = jnp.concatenate(blocks, axis=own), jnp.concatenate(shared, axis=-1)
    left, right = (along, across) if on_left else (across, along)
    mean = jnp.concatenate([w.mean for w in operands], axis=axis)
    names = tuple(name for w in operands for name in w.names)
    return Perturbed(mean, left, right, first.left_axes, names, whole=False)


#: The rules by their equations' names.
RULES: dict[str, Rule] = {
    "transpose": _transpose,
    "reshape": _reshape,
    "squeeze": _reshape,
    "expand_dims": _reshape,
    "broadcast_in_dim": _broadcast,
    "convert_element_type": _cast,
    "mul": _scaled,
    "div": _scaled,
    "neg": _negated,
    "add": _sum,
    "add_any": _sum,
    "sub": _sum,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "rev": _reversed,
    "split": _split,
    "concatenate": _concatenated,
}

#: Equations behind which a value is still that value, one for each operand.
SAME = {
    "copy",
    "copy_p",
    "device_put",
    "name",
    "optimization_barrier",
    "pcast",
    "pvary",
    "sharding_constraint",
    "stop_gradient",
}

#: Equations behind which a vector, or a product with a matrix, is still that: they only arrange it.
ARRANGED = {*SAME, "broadcast_in_dim", "convert_element_type", "expand_dims", "reshape", "squeeze", "transpose"}
