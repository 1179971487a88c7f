"""A matrix plus a perturbation of low rank that is never added to it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import get_opaque_trace_state

from eki_jax._types import Array

# What a convolution may give to one sample: more would take the memory of the batch's outputs as often as there are
# numbers, and there are never particles enough for it.
_MOST_NUMBERS = 4096


class Tape:
    """What a model multiplied its low-rank matrices by: one entry for each matrix's name.

    A matrix that is multiplied twice, or inside of a loop or another function that is traced by itself, has no one
    product that the outputs depend on; its entry is None. So is that of a matrix with fewer numbers than its products
    with one sample have, or with very many of these.

    Attributes:
        entries: the left factors x of ``x @ w``, shape (B, ..., n), by the matrix's name.
        matrix_of: the name of the matrix to whose product a vector is added, by the vector's name.
        vectors: the arrays that the model was given as vectors, and their names.
    """

    def __init__(self) -> None:
        self.entries: dict[str, Array | None] = {}
        self.matrix_of: dict[str, str] = {}
        self.vectors: list[tuple[Array, str]] = []
        self._trace = get_opaque_trace_state()

    def record(self, name: str, inputs: Callable[[], Array] | None) -> None:
        """Remember one product, or (None) another use."""
        own = name not in self.entries and self._trace == get_opaque_trace_state()
        self.entries[name] = inputs() if own and inputs is not None else None

    def meet(self, matrix: str, bias: Array | str) -> None:
        """Remember that a vector is added to a matrix's product: one of ``vectors``, or the leaf beside the matrix."""
        if isinstance(bias, str):
            name = f"{matrix[: matrix.rindex('[')]}[{bias!r}]"
        else:
            name = next((name for vector, name in self.vectors if vector is bias), "")
        self.matrix_of[name] = matrix if self.matrix_of.get(name, matrix) == matrix else ""


@partial(jax.tree_util.register_dataclass, data_fields=["mean", "left", "right"], meta_fields=["name", "tape"])
@dataclass(frozen=True)
class LowRankMatrix:
    """``mean + left @ right.T`` where products with it are cheap: what a model gets in the place of a weight matrix.

    It knows the products a model makes: ``x @ w``, ``w @ x``, ``w.T``, and rows ``w[i]`` (an embedding). One written
    with these needs no change; for flax modules see :func:`eki_jax.flax.low_rank_forward`. :meth:`dense` adds up.

    Attributes:
        mean: shape (..., n, k). All axes but the last are one: a convolution's window and inputs.
        left: shape (..., n, r).
        right: shape (k, r).
        name: of the leaf, for errors and for the tape.
        tape: where to record products, or None.

    >>> import jax.numpy as jnp
    >>> w = LowRankMatrix(jnp.zeros((2, 3)), jnp.ones((2, 1)), jnp.array([[1.0], [2.0], [3.0]]))
    >>> jnp.array([1.0, 1.0]) @ w
    Array([2., 4., 6.], dtype=float32)
    >>> w[0], w.T.shape
    (Array([1., 2., 3.], dtype=float32), (3, 2))
    """

    mean: Array
    left: Array
    right: Array
    name: str = field(default="", kw_only=True)
    tape: Tape | None = field(default=None, kw_only=True, repr=False, compare=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the matrix."""
        return self.mean.shape

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return self.mean.ndim

    @property
    def dtype(self) -> Any:
        """The dtype of the mean."""
        return self.mean.dtype

    @property
    def T(self) -> LowRankMatrix:
        """The transpose of a matrix with two axes."""
        self._matrix("its transpose")
        self._used()
        return LowRankMatrix(self.mean.T, self.right, self.left, name=self.name)

    def __rmatmul__(self, x: Any) -> Array:
        """``x @ w``."""
        self._matrix("a product with it")
        return jnp.matmul(x, self.mean) + self.perturbation(x)

    def __matmul__(self, x: Any) -> Array:
        """``w @ x``."""
        self._matrix("a product with it")
        self._used()
        return jnp.matmul(self.mean, x) + jnp.matmul(self.left, jnp.matmul(self.right.T, x))

    def __getitem__(self, index: Any) -> Array:
        """Rows, by integers or a slice of the first axis."""
        self._matrix("its rows")
        if isinstance(index, tuple):
            raise TypeError(f"{self!r}: an index with {len(index)} axes; wanted rows, w[i]")
        return self.mean[index] + self.perturbation_of_rows(index)

    def __repr__(self) -> str:
        return f"LowRankMatrix(leaf {self.name or '?'}, shape {self.mean.shape}, rank {self.right.shape[-1]})"

    def perturbation(self, x: Array) -> Array:
        """``(x @ left) @ right.T``, without the mean."""
        self.multiplies(math.prod(x.shape[1:-1]), lambda: x)
        inner = jnp.matmul(x, self.left)
        if self.right.shape[-1] == 1:  # an outer product, which fuses with what follows
            return inner * self.right[:, 0]
        return jnp.matmul(inner, self.right.T)

    def multiplies(self, places: int, inputs: Callable[[], Array]) -> None:
        """Tell the tape of the product that the model makes with this matrix, at so many places of each sample.

        Args:
            places: p, the number of rows of a sample that are multiplied: 1 for a dense layer of vectors, the pixels
                that a convolution returns.
            inputs: returns them, shape (B, ..., n); of a convolution the windows. Not called where nobody asks.
        """
        if self.tape is not None:
            few = places == 1 or places * self.shape[-1] <= min(_MOST_NUMBERS, math.prod(self.shape))
            self.tape.record(self.name, inputs if few else None)

    def meets(self, bias: Array | str) -> None:
        """Tell the tape of a vector that is added to the product with this matrix and used nowhere else.

        Args:
            bias: the array that the model was given, or its key in the dictionary that holds the matrix.
        """
        if self.tape is not None:
            self.tape.meet(self.name, bias)

    def perturbation_of_rows(self, index: Array) -> Array:
        """``left[index] @ right.T``, without the mean."""
        self._used()
        return jnp.matmul(self.left[index], self.right.T)

    def expanded(self, inner: Array, groups: int = 1) -> Array:
        """``inner @ right.T`` for the inner products (..., groups r) of a convolution with ``left`` for each group."""
        rank = self.right.shape[-1]
        if groups == 1:
            return inner * self.right[:, 0] if rank == 1 else jnp.matmul(inner, self.right.T)
        inner = inner.reshape(*inner.shape[:-1], groups, rank)
        right = self.right.reshape(groups, -1, rank)
        return jnp.einsum("...gr,gkr->...gk", inner, right).reshape(*inner.shape[:-2], -1)

    def dense(self) -> Array:
        """The matrix itself, added up."""
        self._used()
        return self.mean + jnp.matmul(self.left, self.right.T).astype(self.mean.dtype)

    def _used(self) -> None:
        """Tell the tape of a use that is no product ``x @ w``."""
        if self.tape is not None:
            self.tape.record(self.name, None)

    def _matrix(self, what: str) -> None:
        if self.mean.ndim != 2:
            raise TypeError(f"{self!r}: has {self.mean.ndim} axes; {what} is defined for 2")


def affine(x: Array, w: Array | LowRankMatrix, bias: Array) -> Array:
    """``x @ w + bias`` of a model of your own, for arrays and for matrices of low rank alike.

    A localized estimate then knows that matrix and bias reach a sample in one place, and looks for one slope instead of
    two. (flax's dense layers tell it by themselves.)

    Args:
        x: shape (B, n).
        w: shape (n, k).
        bias: shape (k,), a leaf of the parameters that is used nowhere else.

    >>> import jax.numpy as jnp
    >>> affine(jnp.ones((1, 2)), jnp.ones((2, 3)), jnp.arange(3.0))
    Array([[2., 3., 4.]], dtype=float32)
    """
    if isinstance(w, LowRankMatrix):
        w.meets(bias)
    return x @ w + bias


def is_low_rank(leaf: Any) -> bool:
    """Whether a leaf of a particle's parameters is a :class:`LowRankMatrix`."""
    return isinstance(leaf, LowRankMatrix)


def largest_rank(shape: tuple[int, ...]) -> int:
    """The rank of a full matrix of that shape, all axes but the last taken as one.

    >>> largest_rank((3, 3, 2, 8)), largest_rank((5, 9))
    (8, 5)
    """
    return min(math.prod(shape[:-1]), shape[-1])
