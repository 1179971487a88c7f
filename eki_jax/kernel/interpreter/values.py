"""What stands in the place of an array while a trace is evaluated."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from eki_jax._types import Array
from eki_jax.kernel.interpreter.numbering import Numbering


def leaf_name(path: Any) -> str:
    """The name of a leaf in errors and notes: its place in the tree, and a word where it is all of the tree.

    An empty name would be that of no leaf at all.

    >>> [leaf_name(path) for path, _ in jax.tree_util.tree_leaves_with_path({"w": 1.0})]
    ["['w']"]
    >>> leaf_name(())
    'params'
    """
    return jax.tree_util.keystr(path) or "params"


class Turns(NamedTuple):
    """A loop that takes a slice a turn.

    Attributes:
        depth: number of loops and branches around it.
        size: number of its turns.
        is_left: flag, True where the left factor is sliced.
    """

    depth: int
    size: int
    is_left: bool


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["mean", "left", "right"],
    meta_fields=["left_axes", "names", "whole", "turns"],
)
@dataclass(frozen=True)
class Perturbed:
    """An array plus a perturbation of low rank that is not added to it: ``mean + sum_r left[i, r] right[j, r]``.

    Every axis of the array belongs to one of the two factors, i stands for all of the one's and j for all of the
    other's.

    Attributes:
        mean: array without the perturbation.
        left: left factor, its axes in the array's order and then r.
        right: right factor, likewise.
        left_axes: axes of the array that the left factor has, in order.
        names: names of the leaf, or of the leaves that it was put together from.
        whole: flag, True where the factors are still the leaf's own, up to their shapes and their dtype, or a turn's
            slices of them.
        turns: loops of which this is a turn's slice, the outermost first.
    """

    mean: Array
    left: Array
    right: Array
    left_axes: tuple[int, ...]
    names: tuple[str, ...] = ()
    whole: bool = True
    turns: tuple[Turns, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array."""
        return self.mean.shape

    @property
    def rank(self) -> int:
        """The number of terms r."""
        return self.left.shape[-1]

    @property
    def right_axes(self) -> tuple[int, ...]:
        """The axes that the right factor has."""
        return tuple(axis for axis in range(self.mean.ndim) if axis not in self.left_axes)

    def dense(self) -> Array:
        """The array itself, added up."""
        left, right = (factor.reshape(-1, self.rank) for factor in (self.left, self.right))
        axes = (*self.left_axes, *self.right_axes)
        product = (left @ right.T).reshape([self.shape[axis] for axis in axes])
        order = sorted(range(len(axes)), key=axes.__getitem__)
        return self.mean + jnp.transpose(product, order).astype(self.mean.dtype)

    def changed(self, mean: Array, left: Array, right: Array, left_axes: tuple[int, ...], whole: bool) -> Perturbed:
        """The same leaf after an equation."""
        return replace(self, mean=mean, left=left, right=right, left_axes=left_axes, whole=self.whole and whole)

    def by_axes(self, mean: Array, change: Any) -> Perturbed:
        """The leaf after an equation that treats its axes one by one: ``change(factor, axes)`` of each factor."""
        left, right = change(self.left, self.left_axes), change(self.right, self.right_axes)
        return self.changed(mean, left, right, self.left_axes, whole=False)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["value"],
    meta_fields=["leaf", "vectors", "product", "chain", "numbering", "carried"],
)
@dataclass(frozen=True)
class Tagged:
    """An array of which it is known what it is, while somebody watches.

    Attributes:
        value: array.
        leaf: name of the vector that it is, or ""; names of all that it was put together from, with a chain.
        vectors: names of the vectors that it was computed from and nothing else; None where the inputs are in it.
        product: name of the matrix whose product it is, or of the place where it was disturbed, or "".
        chain: leaves that it was put together from, each with the equations that arranged it before, the first one
            first, where somebody keeps them.
        numbering: numbering of the leaf's numbers, or of what comes out of the matrix; None where it is not known.
        carried: number of a note of what was done to the outputs of a layer since, all of it linear in them, where
            somebody keeps such notes; None where it is not known.
    """

    value: Array
    leaf: str = ""
    vectors: frozenset[str] | None = None
    product: str = ""
    chain: tuple[Any, ...] = ()
    numbering: Numbering | None = None
    carried: int | None = None

    @property
    def parts(self) -> tuple[tuple[str, tuple[Any, ...]], ...]:
        """The leaves that it was put together from, each with what was done to it; none for what is no leaf."""
        return self.chain or (((self.leaf, ()),) if self.leaf else ())


def plain(value: Any) -> Any:
    """The array that a value stands for; a perturbation is added up."""
    if isinstance(value, Perturbed):
        return value.dense()
    return value.value if isinstance(value, Tagged) else value
