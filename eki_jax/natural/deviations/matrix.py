"""A matrix plus a perturbation of low rank that is never added to it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from eki_jax._checks import array
from eki_jax._types import Array
from eki_jax.natural.deviations.watching import How, tell_bias, tell_use


@partial(jax.tree_util.register_dataclass, data_fields=["mean", "left", "right"], meta_fields=["name", "watched"])
@dataclass(frozen=True)
class LowRankMatrix:
    """``mean + left @ right.T`` where products with it are cheap: what a model gets in the place of a weight matrix.

    It knows the products a model makes: ``x @ w``, ``w @ x``, ``w.T``, and rows ``w[i]`` (an embedding). One written
    with these needs no change; for flax modules see :func:`eki_jax.flax.low_rank_forward`. :meth:`dense` adds up.

    Attributes:
        mean: matrix without the perturbation, shape (..., n, k). All axes but the last are one: a convolution's window
            and inputs.
        left: left factor, shape (..., n, r).
        right: right factor, shape (k, r).
        name: name of the leaf, for errors and for whoever watches.
        watched: flag, True where the trace is to tell what the model does with it.

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
    watched: bool = field(default=False, kw_only=True, repr=False)

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
        w = self.used("transposed")
        return LowRankMatrix(w.mean.T, w.right, w.left, name=w.name)

    def __rmatmul__(self, x: Any) -> Array:
        """``x @ w``."""
        self._matrix("a product with it")
        w = self.multiplies(x)
        return jnp.matmul(x, w.mean) + w.perturbation(x)

    def __matmul__(self, x: Any) -> Array:
        """``w @ x``."""
        self._matrix("a product with it")
        w = self.used("transposed")
        return jnp.matmul(w.mean, x) + jnp.matmul(w.left, jnp.matmul(w.right.T, x))

    def __getitem__(self, index: Any) -> Array:
        """Rows, by integers or a slice of the first axis."""
        self._matrix("its rows")
        if isinstance(index, tuple):
            raise TypeError(f"{self!r}: an index with {len(index)} axes; wanted rows, w[i]")
        w = self.used("rows")
        return w.mean[index] + w.perturbation_of_rows(index)

    def __repr__(self) -> str:
        return f"LowRankMatrix(leaf {self.name or '?'}, shape {self.mean.shape}, rank {self.right.shape[-1]})"

    def perturbation(self, x: Array, bias: str | None = None) -> Array:
        """``(x @ left) @ right.T``, without the mean.

        Args:
            x: inputs, shape (B, ..., n).
            bias: key of the vector that is then added, in the dictionary that holds the matrix; None for none.
        """
        self._matrix("a product with it")
        w = self.multiplies(x, bias=bias)
        inner = jnp.matmul(x, w.left)
        if w.right.shape[-1] == 1:  # an outer product, which fuses with what follows
            return inner * _along(w.right[:, 0], inner)
        return jnp.matmul(inner, w.right.T)

    def multiplies(
        self,
        operand: Array,
        rows: Callable[[Array], Array] | None = None,
        *,
        bias: str | None = None,
        batched: bool = True,
    ) -> LowRankMatrix:
        """Tell whoever watches of a product that is written without ``@``, such as a convolution.

        Args:
            operand: rows, shape (B, ..., n), that are multiplied, or what ``rows`` makes them from.
            rows: function of the operand that returns the rows; of a convolution the windows. Not called where nobody
                asks.
            bias: key of the vector that is then added, in the dictionary that holds the matrix; None for none.
            batched: flag, False where the operand is one sample's, without the first axis.

        Returns:
            The matrix whose mean and factors are to be used for that product.
        """
        return self._told("product" if batched else "unbatched", operand, rows, bias)

    def used(self, how: How) -> LowRankMatrix:
        """Tell whoever watches of a use that is no product ``x @ w``; the matrix for that use comes back."""
        return self._told(how)

    def meets(self, bias: Array) -> Array:
        """Tell whoever watches of a vector that is added to the product with this matrix and used nowhere else.

        Args:
            bias: array that the model was given.

        Returns:
            The array that is to be added.
        """
        return tell_bias(bias, matrix=self.name) if self.watched else bias

    def perturbation_of_rows(self, index: Array) -> Array:
        """``left[index] @ right.T``, without the mean."""
        w = self.used("rows")
        return jnp.matmul(w.left[index], w.right.T)

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
        w = self.used("formed")
        return w.mean + jnp.matmul(w.left, w.right.T).astype(w.mean.dtype)

    def _told(self, how: How, operand: Any = None, rows: Any = None, bias: str | None = None) -> LowRankMatrix:
        if not self.watched:
            return self
        operand = operand if operand is None else jnp.asarray(operand)
        told = tell_use(
            self.left, self.mean, self.right, name=self.name, how=how, operand=operand, rows=rows, bias=bias
        )
        left, mean, right = told
        return replace(self, mean=mean, left=left, right=right, watched=False)

    def _matrix(self, what: str) -> None:
        if self.right.ndim != 2 or self.left.ndim != self.mean.ndim:
            raise TypeError(f"{self!r}: has been mapped over; {what} is defined for the matrix as it is")
        if self.mean.ndim != 2:
            raise TypeError(f"{self!r}: has {self.mean.ndim} axes; {what} is defined for 2")


def affine(x: Array, w: Array | LowRankMatrix, bias: Array) -> Array:
    """``x @ w + bias`` of a model of your own, for arrays and for matrices of low rank alike.

    A localized estimate then knows that matrix and bias reach a sample in one place, and looks for one slope instead of
    two. (flax's dense layers tell it by themselves.)

    Args:
        x: inputs, shape (B, n).
        w: weights, shape (n, k).
        bias: vector, shape (k,), a leaf of the parameters that is used nowhere else.

    Raises:
        TypeError: arguments that are no arrays of real numbers.
        ValueError: shapes that do not fit.

    >>> import jax.numpy as jnp
    >>> affine(jnp.ones((1, 2)), jnp.ones((2, 3)), jnp.arange(3.0))
    Array([[2., 3., 4.]], dtype=float32)
    """
    array("x", x)
    array("bias", bias)
    if w is None or not isinstance(w, LowRankMatrix):
        array("w", w)
    if jnp.ndim(x) == 0 or len(w.shape) != 2 or jnp.shape(x)[-1] != w.shape[0]:
        raise ValueError(f"w: shape {w.shape} for x of shape {jnp.shape(x)}; wanted (n, k) for x of (B, n)")
    if jnp.shape(bias)[-1:] != w.shape[1:] or math.prod(jnp.shape(bias)) != w.shape[1]:
        raise ValueError(f"bias: shape {jnp.shape(bias)} for w of shape {w.shape}; wanted {w.shape[1:]}")
    if isinstance(w, LowRankMatrix):
        bias = w.meets(bias)
    outputs = x @ w
    return outputs + _along(bias, outputs)


def _along(vector: Array, rows: Array) -> Array:
    """``vector`` with as many axes as ``rows``, of which it is the last: broadcasting that nobody has to guess."""
    return jnp.reshape(vector, (1,) * (rows.ndim - jnp.ndim(vector)) + jnp.shape(vector))


def is_low_rank(leaf: Any) -> bool:
    """Whether a leaf of a particle's parameters is a :class:`LowRankMatrix`."""
    return isinstance(leaf, LowRankMatrix)


def largest_rank(shape: tuple[int, ...]) -> int:
    """The rank of a full matrix of that shape, all axes but the last taken as one.

    >>> largest_rank((3, 3, 2, 8)), largest_rank((5, 9))
    (8, 5)
    """
    return min(math.prod(shape[:-1]), shape[-1])
