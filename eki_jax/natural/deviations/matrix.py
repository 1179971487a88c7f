"""A matrix plus a perturbation of low rank that is never added to it, and models evaluated with such matrices."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from eki_jax._checks import array, arrays, function, traceable
from eki_jax._types import Array, Params
from eki_jax.kernel.interpreter import Numbering, Perturbed, Tagged, Watcher, interpreted, leaf_name, on_devices

if TYPE_CHECKING:
    from jaxtyping import Real


@partial(jax.tree_util.register_dataclass, data_fields=["mean", "left", "right"], meta_fields=["name"])
@dataclass(frozen=True)
class LowRankMatrix:
    """``mean + left @ right.T`` where products with it are cheap: a leaf of one particle's parameters.

    :func:`low_rank_call` evaluates any model with such leaves. :meth:`dense` adds up. Both ask whether the factors fit;
    the class itself does not, since mapped functions and gradients make it of other things than arrays.

    Attributes:
        mean: matrix without the perturbation, shape (..., n, k). All axes but the last are one, a convolution's window
            and inputs; or all but the first, see :func:`axes_of_left`.
        left: left factor, shape (..., n, r).
        right: right factor, shape (k, r).
        name: name of the leaf.

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
        if self.ndim != 2:
            raise TypeError(f"{self!r}: has {self.ndim} axes; its transpose is defined for 2")
        return LowRankMatrix(self.mean.T, self.right, self.left, name=self.name)

    def __rmatmul__(self, x: Any) -> Array:
        """``x @ w``."""
        array("x", x)
        return low_rank_call(lambda w, x: jnp.matmul(x, w), self, x)

    def __matmul__(self, x: Any) -> Array:
        """``w @ x``."""
        array("x", x)
        return low_rank_call(jnp.matmul, self, x)

    def __getitem__(self, index: Any) -> Array:
        """Rows, by integers or a slice of the first axis."""
        return low_rank_call(lambda w: w[index], self)

    def __repr__(self) -> str:
        return f"LowRankMatrix(leaf {self.name or '?'}, shape {self.mean.shape}, rank {self.right.shape[-1]})"

    def dense(self) -> Array:
        """The matrix itself, added up."""
        return self._perturbed("").dense()

    def _perturbed(self, name: str) -> Perturbed:
        parts = {"mean": self.mean, "left": self.left, "right": self.right}
        for part, numbers in parts.items():
            arrays(part, array(part, numbers), floating=True)
        shapes = ", ".join(f"{part} {jnp.shape(numbers)}" for part, numbers in parts.items())
        if jnp.ndim(self.left) + jnp.ndim(self.right) != jnp.ndim(self.mean) + 2:
            raise TypeError(f"LowRankMatrix: {shapes}, which has been mapped over; wanted the matrix as it is")
        (*rows, rank), (*columns, other) = jnp.shape(self.left), jnp.shape(self.right)
        if (*rows, *columns) != jnp.shape(self.mean) or rank != other:
            raise ValueError(f"LowRankMatrix: {shapes}; wanted left (..., r) and right (..., r) of mean's axes")
        return Perturbed(self.mean, self.left, self.right, tuple(range(self.left.ndim - 1)), (self.name or name,))


def low_rank_call(forward: Callable[..., Any], params: Params, *inputs: Any, watcher: Watcher | None = None) -> Any:
    """``forward(params, *inputs)`` where some matrices are :class:`LowRankMatrix`, which the model knows nothing of.

    The model is traced with the means in their places, and its trace evaluated: whatever multiplies by such a matrix,
    convolves with it or looks up its rows does so with the mean and the two factors. Where something else is done with
    it, it is added up there.

    Args:
        forward: function of parameters and inputs, written for arrays.
        params: pytree of arrays and of :class:`LowRankMatrix`.
        *inputs: inputs that ``forward`` takes.
        watcher: listener that is told what the model does with its parameters, or None.

    Returns:
        The outputs of ``forward``, in its structure.

    Raises:
        TypeError: a ``forward`` that does not take so many arguments; a matrix or inputs that are no arrays of real
            numbers, or a matrix that has been mapped over.
        ValueError: factors that do not fit their mean.

    >>> import jax.numpy as jnp
    >>> w = LowRankMatrix(jnp.zeros((2, 3)), jnp.ones((2, 1)), jnp.ones((3, 1)))
    >>> low_rank_call(lambda params, x: jnp.tanh(x @ params["w"]), {"w": w}, jnp.zeros((1, 2)))
    Array([[0., 0., 0.]], dtype=float32)
    """
    function("forward", forward, "a model, forward(params, *inputs) -> outputs", arguments=1 + len(inputs))
    traceable("inputs", inputs)
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_low_rank)
    if watcher is None and not any(is_low_rank(leaf) for _, leaf in leaves):
        return on_devices(forward, params, *inputs)
    means = jax.tree.map(lambda leaf: leaf.mean if is_low_rank(leaf) else leaf, params, is_leaf=is_low_rank)

    def value(name: str, leaf: Any) -> Any:
        if is_low_rank(leaf):
            return leaf._perturbed(name)
        if watcher is None:
            return leaf
        return Tagged(leaf, leaf=name, vectors=frozenset([name]), numbering=Numbering.in_order(jnp.shape(leaf)))

    values = [value(leaf_name(path), leaf) for path, leaf in leaves]
    return interpreted(forward, means, values, inputs, watcher)


def affine(x: Real[Array, "*B n"], w: Real[Array, "n k"], bias: Real[Array, " k"]) -> Real[Array, "*B k"]:
    """``x @ w + bias`` of a model of your own, its shapes checked.

    Args:
        x: inputs, shape (B, n).
        w: weights, shape (n, k).
        bias: vector, shape (k,).

    Raises:
        TypeError: arguments that are no arrays of real numbers.
        ValueError: shapes that do not fit.

    >>> import jax.numpy as jnp
    >>> affine(jnp.ones((1, 2)), jnp.ones((2, 3)), jnp.arange(3.0))
    Array([[2., 3., 4.]], dtype=float32)
    """
    array("x", x)
    array("bias", bias)
    if not is_low_rank(w):
        array("w", w)
    if jnp.ndim(x) == 0 or len(w.shape) != 2 or jnp.shape(x)[-1] != w.shape[0]:
        raise ValueError(f"w: shape {w.shape} for x of shape {jnp.shape(x)}; wanted (n, k) for x of (B, n)")
    if jnp.shape(bias)[-1:] != w.shape[1:] or math.prod(jnp.shape(bias)) != w.shape[1]:
        raise ValueError(f"bias: shape {jnp.shape(bias)} for w of shape {w.shape}; wanted {w.shape[1:]}")
    outputs = x @ w
    return outputs + jnp.reshape(bias, (1,) * (outputs.ndim - jnp.ndim(bias)) + jnp.shape(bias))


def is_low_rank(leaf: Any) -> bool:
    """Whether a leaf of a particle's parameters is a :class:`LowRankMatrix`."""
    return isinstance(leaf, LowRankMatrix)


def is_matrix(shape: tuple[int, ...]) -> bool:
    """Whether a leaf of that shape is one, and no vector with more axes than it needs.

    >>> is_matrix((3, 2)), is_matrix((8, 1, 1))
    (True, False)
    """
    return sum(size > 1 for size in shape) > 1


def axes_of_left(shape: tuple[int, ...]) -> int:
    """How many of a matrix's axes its left factor has: all but the last, or only the first where that is long.

    To one side of the cut is to lie what a product sums over, to the other what comes out of it. Kernels of shape
    (window, inputs, outputs), as flax has them, and (heads, features, outputs) are cut before their last axis; those of
    shape (outputs, inputs, window), as equinox has them, and (inputs, heads, features) behind their first. A window of
    two axes or more tells by its sizes, which mostly are one number. Elsewhere a product with the factors is as right,
    and dearer.

    >>> axes_of_left((3, 3, 2, 8)), axes_of_left((8, 16, 3, 3)), axes_of_left((64, 4, 16)), axes_of_left((4, 16, 64))
    (3, 1, 1, 2)
    >>> axes_of_left((5, 5, 1, 4)), axes_of_left((1, 8, 4, 4))
    (3, 1)
    """
    first_is_long = len(shape) > 2 and shape[0] > shape[-1] and (len(shape) > 3 or shape[0] >= shape[1])
    if len(shape) > 3:
        is_last, is_first = len(set(shape[2:])) == 1, len(set(shape[:-2])) == 1
        first_is_long = is_last if is_last != is_first else first_is_long
    return 1 if first_is_long else len(shape) - 1


def cuts_by_module(params: Params) -> dict[Any, int]:
    """The cut behind the outputs of each kernel whose module says that it is a convolution's, by the kernel's path.

    Equinox's modules say their number of spatial axes, before which the kernel has its outputs and inputs.

    >>> cuts_by_module({"w": jnp.ones((5, 4, 3))})
    {}
    """
    is_module = lambda node: isinstance(getattr(node, "num_spatial_dims", None), int)
    nodes = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_module)
    return {
        (*place, *path): leaf.ndim - 1 - node.num_spatial_dims
        for place, node in nodes
        if is_module(node)
        for path, leaf in jax.tree_util.tree_leaves_with_path(node)
        if leaf.ndim >= 2 + node.num_spatial_dims
    }


def largest_rank(shape: tuple[int, ...], cut: int) -> int:
    """The rank of a full matrix of that shape, the axes of each factor taken as one.

    >>> largest_rank((3, 3, 2, 8), 3), largest_rank((5, 9), 1)
    (8, 5)
    """
    return min(math.prod(shape[:cut]), math.prod(shape[cut:]))
