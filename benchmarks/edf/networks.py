"""The networks of the EDF experiments, as flax modules that return logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class PatchConvolution(nn.Module):
    """A stride-1 convolution with zero padding, computed as one matrix product over gathered patches.

    XLA's CPU backend runs its own convolution many times slower inside a loop, and MINRES is a loop; the matrix
    product has no such penalty. Parameters are those of a convolution, with the kernel's window flattened.

    Attributes:
        features: Output channels.
        width: Side of the square kernel, odd.
    """

    features: int
    width: int = 3

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``(batch, height, width, channels)`` to the same with ``features`` channels."""
        height, length, margin = x.shape[1], x.shape[2], self.width // 2
        padded = jnp.pad(x, ((0, 0), (margin, margin), (margin, margin), (0, 0)))
        window = [padded[:, i : i + height, j : j + length] for i in range(self.width) for j in range(self.width)]
        return nn.Dense(self.features)(jnp.concatenate(window, axis=-1))


def max_pool(x: jax.Array) -> jax.Array:
    """Maximum over 2x2 windows; an odd last row or column is dropped."""
    x = x[:, : x.shape[1] // 2 * 2, : x.shape[2] // 2 * 2]
    rows = jnp.maximum(x[:, 0::2], x[:, 1::2])
    return jnp.maximum(rows[:, :, 0::2], rows[:, :, 1::2])


class TwoConvolutions(nn.Module):
    """The paper's network of section 6.1: two convolutions with ReLU and max pooling, two fully connected layers.

    The paper names no sizes; those here are small enough for a processor.

    Attributes:
        channels: Features of the two convolutions.
        hidden: Units of the first fully connected layer.
        classes: Number of classes.
    """

    channels: Sequence[int] = (8, 16)
    hidden: int = 32
    classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Images ``(batch, height, width, channels)`` to logits ``(batch, classes)``."""
        for features in self.channels:
            # ReLU and the maximum commute; pooling first leaves it a quarter of the work.
            x = nn.relu(max_pool(PatchConvolution(features)(x)))
        x = nn.relu(nn.Dense(self.hidden)(x.reshape(x.shape[0], -1)))
        return nn.Dense(self.classes)(x)


class _Block(nn.Module):
    """Two 3x3 convolutions with batch normalisation around a parameter-free shortcut."""

    features: int
    stride: int
    normalise: Callable[..., Any]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        convolve = lambda stride: nn.Conv(self.features, (3, 3), (stride, stride), padding=1, use_bias=False)
        out = nn.relu(self.normalise()(convolve(self.stride)(x)))
        out = self.normalise()(convolve(1)(out))
        if self.stride != 1:
            missing = self.features - x.shape[-1]
            x = jnp.pad(x[:, :: self.stride, :: self.stride], ((0, 0),) * 3 + ((missing // 2, missing - missing // 2),))
        return nn.relu(out + x)


class ResNet(nn.Module):
    """The residual network for CIFAR of He et al. (2016), section 4.2, with batch normalisation.

    Three stages of 16, 32 and 64 features with (depth - 2) / 6 blocks each; shortcuts without parameters (option A).

    Attributes:
        depth: 6 n + 2: 20, 32, 56, 110, ...
        classes: Number of classes.
    """

    depth: int = 56
    classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Images to logits; with ``train`` the batch's own statistics normalise, and the moving ones are updated."""
        blocks, rest = divmod(self.depth - 2, 6)
        if rest or blocks < 1:
            raise ValueError(f"depth: {self.depth}; wanted 6 n + 2 with n >= 1")
        normalise = lambda: nn.BatchNorm(use_running_average=not train, momentum=0.9)
        x = nn.relu(normalise()(nn.Conv(16, (3, 3), padding=1, use_bias=False)(x)))
        for stage, features in enumerate((16, 32, 64)):
            for block in range(blocks):
                x = _Block(features, 2 if stage > 0 and block == 0 else 1, normalise)(x)
        return nn.Dense(self.classes)(x.mean((1, 2)))


def resnet56(classes: int = 10) -> ResNet:
    """ResNet-56: 853,018 parameters with ten classes."""
    return ResNet(56, classes)


def resnet110(classes: int = 10) -> ResNet:
    """ResNet-110: 1,727,962 parameters with ten classes."""
    return ResNet(110, classes)
