"""What a convolution multiplies its kernel by."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from eki_jax._types import Array
from eki_jax.natural.deviations.matrix import LowRankMatrix


def tell_windows(
    w: LowRankMatrix, convolved: Callable[[Array, Array], Array], inputs: Array, groups: int, use_bias: bool
) -> None:
    """Tell the matrix of its windows: the products of one group's convolution are those with a matrix.

    Args:
        w: kernel, shape (..., window, channels, k).
        convolved: ``convolved(kernel, inputs)``, the layer with a kernel of any number of outputs and no bias.
        inputs: shape (B, ..., channels).
        groups: of the layer.
        use_bias: whether the layer adds a bias, which then lies beside the kernel.
    """
    if w.tape is None:
        return
    if groups > 1 or inputs.ndim < w.ndim:
        w.tape.record(w.name, None)
        return
    numbers = math.prod(w.shape[:-1])
    one = jax.eval_shape(convolved, w.left, inputs)
    # Each output of this kernel picks one number of the window.
    pick = jnp.eye(numbers, dtype=inputs.dtype).reshape(*w.shape[:-1], numbers)
    w.multiplies(math.prod(one.shape[1:-1]), lambda: convolved(pick, inputs))
    if use_bias:
        w.meets("bias")
