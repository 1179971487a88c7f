"""The walk of a step over the ensemble's leaves, a block of columns at a time and in place.

Only a block of the direction exists at any time, so that with donated buffers a step keeps one copy of the ensemble.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from eki_jax._types import Array, Ensemble

# A block's copies are kept below this share of the ensemble and below this many bytes, ...
_BLOCK_SHARE = 1 / 4
_BLOCK_BYTES = 64 * 2**20
# ... and on a processor within its cache between the two products (at P = 1e6 and J = 100 that is three times as fast),
# unless they would be narrower than products need to run at full speed.
_CACHE_BYTES = 8 * 2**20
_FULL_SPEED_WIDTH = 1024

#: From a block (J, w) of the ensemble's columns to its direction, and its share of J tr C(u).
BlockDirection = Callable[[Array], tuple[Array, Array]]


def map_blocks(
    fn: Callable[..., tuple[Array, ...]],
    direction: BlockDirection,
    trees: tuple[Ensemble, ...],
    width: int,
    when: Array | None = None,
) -> tuple[tuple[Ensemble, ...], Array]:
    """``fn(direction, *blocks)`` on one block of columns after another, in place.

    Args:
        fn: function from the direction of a block and the blocks of all trees to new blocks, at most as many, in the
            shapes and dtypes of its arguments.
        direction: function that returns the direction of a block of the first tree.
        trees: ensemble and its companions: pytrees of one structure and one number of columns a leaf; a companion may
            have another leading axis.
        width: number of columns in a block.
        when: flag, a scalar array; where it is False, the blocks stay as they are. Wanted wherever ``fn`` returns more
            than one.

    Returns:
        The trees that ``fn`` returns, and the sum of the blocks' shares.
    """
    columns = [_as_columns(tree) for tree in trees]
    results, shares = [], []
    for leaves in zip(*columns, strict=True):
        new, squares = _map_leaf(fn, direction, leaves, width, when)
        results.append(new)
        shares.append(squares)
    structure: Any = jax.tree.structure(trees[0])
    reshaped = tuple(
        structure.unflatten(
            [leaf.reshape(jnp.shape(old)) for leaf, old in zip(new, jax.tree.leaves(tree), strict=True)]
        )
        for new, tree in zip(zip(*results, strict=True), trees, strict=False)
    )
    return reshaped, sum(shares[1:], shares[0])


def _map_leaf(
    fn: Callable[..., tuple[Array, ...]],
    direction: BlockDirection,
    leaves: tuple[Array, ...],
    width: int,
    when: Array | None,
) -> tuple[tuple[Array, ...], Array]:
    kept = len(jax.eval_shape(lambda *blocks: fn(blocks[0], *blocks), *leaves))

    def one_block(blocks: tuple[Array, ...]) -> tuple[tuple[Array, ...], Array]:
        d, squares = direction(blocks[0])
        # Nothing may be written before the share is summed, or the compiler keeps a copy of the whole leaf for the sum.
        d = jnp.where(jnp.isnan(squares), jnp.nan, d)
        if when is None:
            return fn(d, *blocks), squares
        if kept == 1:  # nothing to keep apart: a select is fused with the write
            (block,) = fn(d, *blocks)
            return (jnp.where(when, block, blocks[0]),), squares
        return lax.cond(when, fn, lambda d, *blocks: blocks[:kept], d, *blocks), squares

    total = leaves[0].shape[1]
    if total <= width:
        return one_block(leaves)
    width = _even_width(total, width)
    count = total // width

    def at(start: Any, size: int, carry: tuple[tuple[Array, ...], Array]) -> tuple[tuple[Array, ...], Array]:
        arrays, squares = carry
        blocks = tuple(lax.dynamic_slice_in_dim(a, start, size, axis=1) for a in arrays)
        new, more = one_block(blocks)
        written = tuple(
            lax.dynamic_update_slice_in_dim(a, block, start, axis=1) for a, block in zip(arrays, new, strict=False)
        )
        return (*written, *arrays[len(written) :]), squares + more

    _, shape = jax.eval_shape(one_block, leaves)
    start = jnp.zeros((), shape.dtype)  # summed over devices, so it does not vary over a mesh
    carry = lax.fori_loop(0, count, lambda i, c: at(i * width, width, c), (leaves, start))
    if total % width:
        carry = at(count * width, total % width, carry)
    arrays, squares = carry
    return arrays[:kept], squares


def block_width(anomalies: Array, ensemble: Ensemble) -> int:
    """The columns of a block, whose copies fit the budget of memory and, on a processor, its cache.

    Args:
        anomalies: centred outputs Z, shape (J, M).
        ensemble: pytree that is walked over.
    """
    size, outputs = anomalies.shape
    row = (2 * size + min(size, outputs)) * anomalies.dtype.itemsize  # bytes of one column's copies
    budget = min(_BLOCK_BYTES, _BLOCK_SHARE * sum(leaf.nbytes for leaf in jax.tree.leaves(ensemble)))
    if jax.default_backend() == "cpu":
        budget = min(budget, max(_CACHE_BYTES, _FULL_SPEED_WIDTH * row))
    return max(64, int(budget / row))


def _even_width(total: int, width: int) -> int:
    """The largest divisor of ``total`` in (width / 2, width]; where there is none, a width with a short remainder."""
    divisors = (n for n in range(width, width // 2, -1) if total % n == 0)
    return next(divisors, total // -(-total // width))


def _as_columns(tree: Any) -> list[Array]:
    return [leaf.reshape(leaf.shape[0], math.prod(leaf.shape[1:])) for leaf in map(jnp.asarray, jax.tree.leaves(tree))]
