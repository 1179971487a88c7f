"""The small convolutional network for many particles on one batch: the same outputs, several times faster."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from eki_jax.natural import LowRankMatrix, affine


def particle_logits(params: Any, x: jax.Array) -> jax.Array:
    """What ``small_cnn().logits`` returns; the last kernel may be a :class:`LowRankMatrix`.

    Not for derivatives: particles are evaluated one after another under ``vmap``.
    """
    is_low_rank = lambda leaf: isinstance(leaf, LowRankMatrix)
    layers = [params["Conv_0"], _told(params, x)]  # their few weights are added up
    formed = lambda leaf: leaf.dense() if is_low_rank(leaf) else leaf
    layers = jax.tree.map(formed, layers, is_leaf=is_low_rank)
    return affine(_features(layers, x), params["Dense_0"]["kernel"], params["Dense_0"]["bias"])


def _told(params: Any, x: jax.Array) -> Any:
    """The second layer; whoever watches is told what its kernel multiplies. Its bias may as well come before."""
    first, second = params["Conv_0"], params["Conv_1"]
    kernel = second["kernel"]
    if not isinstance(kernel, LowRankMatrix) or not kernel.watched:
        return second

    def windows(pooled: jax.Array) -> jax.Array:
        size = pooled.shape[1] - 4
        parts = [pooled[:, i : i + size, j : j + size] for i in range(5) for j in range(5)]
        return jnp.concatenate(parts, axis=-1)

    pooled = _pooled({**first, "kernel": first["kernel"].mean}, _windows(x))
    return {**second, "kernel": kernel.multiplies(pooled, windows, bias="bias")}


@jax.custom_batching.custom_vmap
def _features(layers: Any, x: jax.Array) -> jax.Array:
    return _from_windows(layers, _windows(x))


@_features.def_vmap
def _each(size: int, in_batched: Any, layers: Any, x: jax.Array) -> tuple[jax.Array, bool]:
    batched, images_differ = in_batched
    every = jax.tree.map(lambda leaf, is_batched: leaf if is_batched else jnp.stack([leaf] * size), layers, batched)
    if images_differ:
        return lax.map(lambda one: _features(*one), (every, x)), True
    windows = _windows(x)
    return lax.map(lambda one: _from_windows(one, windows), every), True


def _windows(x: jax.Array) -> jax.Array:
    """The 6x6 windows that the pooled pixels of a 5x5 convolution see, two pixels apart: (batch, n, n, 36 channels)."""
    size = _pooled_size(x.shape[1])
    last = 2 * size - 1
    return jnp.concatenate([x[:, i : i + last : 2, j : j + last : 2] for i in range(6) for j in range(6)], axis=-1)


def _pooled_size(pixels: int) -> int:
    return (pixels - 4) // 2


def _pooled(first: Any, windows: jax.Array) -> jax.Array:
    """The first layer's outputs, pooled."""
    # The kernel at its four places in a window: one product, of which the pooling takes the largest.
    shifts = [((i, 1 - i), (j, 1 - j), (0, 0), (0, 0)) for i in range(2) for j in range(2)]
    kernel = jnp.concatenate([jnp.pad(first["kernel"], shift) for shift in shifts], axis=-1)
    places = windows @ kernel.reshape(-1, kernel.shape[-1])
    return jax.nn.relu(jnp.max(jnp.stack(jnp.split(places, 4, axis=-1)), axis=0) + first["bias"])


def _from_windows(layers: Any, windows: jax.Array) -> jax.Array:
    first, second = layers
    x = _pooled(first, windows)
    numbers = ("NHWC", "HWIO", "NHWC")
    x = lax.conv_general_dilated(x, second["kernel"], (1, 1), "VALID", dimension_numbers=numbers)
    corners = [x[:, i::2, j::2] for i in range(2) for j in range(2)]
    x = jax.nn.relu(jnp.max(jnp.stack(corners), axis=0) + second["bias"])
    return x.reshape(x.shape[0], -1)
