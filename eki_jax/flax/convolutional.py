"""Convolutional networks: CNN-MNIST and CNN-1, 2, 3 of Kovachki & Stuart (2019), Figure 10."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
from flax import linen as nn
from jax import Array

from eki_jax._checks import function, sizes, whole


class Stage(NamedTuple):
    """Convolutions of one resolution, then a max-pooling.

    Attributes:
        channels: output channels of each 3x3 convolution, in order.
        window: side of the pooling window.
        stride: stride of the pooling.
    """

    channels: tuple[int, ...]
    window: int
    stride: int


class ConvolutionalNetwork(nn.Module):
    """Stages of 3x3 convolutions (padding 1) and max-pooling, then dense layers and a softmax.

    Attributes:
        stages: convolutional part, one :class:`Stage` after another.
        widths: outputs of the dense layers, the last being the number of classes.
        activation: nonlinearity after every layer but the last.

    Calling it on images ``(batch, height, width, channels)`` returns probabilities ``(batch, classes)``; the method
    ``logits`` stops before the softmax.

    Raises:
        TypeError: ``stages`` that are none, sizes that are no whole numbers, an ``activation`` that is no function.
        ValueError: no sizes, or sizes below one.
    """

    stages: Sequence[Stage]
    widths: Sequence[int]
    activation: Callable[[Array], Array] = jax.nn.relu

    def __post_init__(self) -> None:
        if not isinstance(self.stages, tuple | list) or not all(isinstance(stage, Stage) for stage in self.stages):
            raise TypeError(f"stages: {self.stages!r}; wanted a tuple of Stage(channels, window, stride)")
        stages = [
            Stage(sizes("channels", stage.channels), whole("window", stage.window), whole("stride", stage.stride))
            for stage in self.stages
        ]
        object.__setattr__(self, "stages", tuple(stages))  # as Python's own numbers, which can be hashed
        sizes("widths", self.widths)
        function("activation", self.activation, "a function of an array", arguments=1)
        super().__post_init__()

    @nn.compact
    def logits(self, x: Array) -> Array:
        """Values before the softmax, shape ``(batch, classes)``."""
        for stage in self.stages:
            for channels in stage.channels:
                x = self.activation(nn.Conv(channels, (3, 3), padding=1)(x))
            x = nn.max_pool(x, (stage.window, stage.window), (stage.stride, stage.stride))
        x = x.reshape((x.shape[0], -1))
        for width in self.widths[:-1]:
            x = self.activation(nn.Dense(width)(x))
        return nn.Dense(self.widths[-1])(x)

    def __call__(self, x: Array) -> Array:
        """Class probabilities, shape ``(batch, classes)``."""
        return jax.nn.softmax(self.logits(x))


def cnn_mnist() -> ConvolutionalNetwork:
    """CNN-MNIST for 28x28 images: six convolutions with ReLU; 10,658 parameters."""
    return ConvolutionalNetwork((Stage((16, 16), 4, 2), Stage((16, 16), 4, 2), Stage((12, 12), 2, 2)), (10,))


def cnn1() -> ConvolutionalNetwork:
    """CNN-1 for 32x32 colour images: 7 hidden layers with SELU; 42,806 parameters."""
    return _fit_net((16, 16), (16, 16), (32, 32))


def cnn2() -> ConvolutionalNetwork:
    """CNN-2 for 32x32 colour images: 10 hidden layers with SELU; 128,102 parameters."""
    return _fit_net((16, 16, 16), (32, 32, 32), (48, 48, 64))


def cnn3() -> ConvolutionalNetwork:
    """CNN-3 for 32x32 colour images: 16 hidden layers with SELU; 462,534 parameters."""
    return _fit_net((16, 16, 32, 32, 32), (48, 48, 48, 48, 48), (64, 64, 96, 96, 96))


def _fit_net(*channels: tuple[int, ...]) -> ConvolutionalNetwork:
    """Three stages, the last pooled over its whole 8x8 image, then 500 hidden units."""
    first, second, third = channels
    return ConvolutionalNetwork((Stage(first, 2, 2), Stage(second, 2, 2), Stage(third, 8, 8)), (500, 10), jax.nn.selu)
