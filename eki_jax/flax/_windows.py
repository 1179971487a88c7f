"""What a convolution multiplies its kernel by."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax.numpy as jnp

from eki_jax._types import Array
from eki_jax.natural.deviations.matrix import LowRankMatrix


def told_windows(
    w: LowRankMatrix, convolved: Callable[[Array, Array], Array], inputs: Array, groups: int, use_bias: bool
) -> LowRankMatrix:
    """Tell of the matrix's windows: the products of one group's convolution are those with a matrix.

    Args:
        w: kernel, shape (..., window, channels, k).
        convolved: function ``convolved(kernel, inputs)``, the layer with a kernel of any number of outputs and no bias.
        inputs: images, shape (B, ..., channels), or without the first axis.
        groups: number of groups of the layer.
        use_bias: flag, True where the layer adds a bias, which then lies beside the kernel.

    Returns:
        The matrix whose factors are to be used.
    """
    if groups > 1:
        return w.used("grouped")
    numbers = math.prod(w.shape[:-1])

    def windows(inputs: Array) -> Array:
        # Each output of this kernel picks one number of the window.
        return convolved(jnp.eye(numbers, dtype=inputs.dtype).reshape(*w.shape[:-1], numbers), inputs)

    return w.multiplies(inputs, windows, bias="bias" if use_bias else None, batched=inputs.ndim >= w.ndim)
