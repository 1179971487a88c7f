"""A convolutional network of two layers: what evolution strategies are usually shown on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
from flax import linen as nn
from jax import Array

from eki_jax._checks import function, sizes, whole


class SmallConvolutionalNetwork(nn.Module):
    """Unpadded 5x5 convolutions, each followed by a 2x2 max-pooling, then one dense layer and a softmax.

    Attributes:
        channels: output channels of the convolutions.
        classes: length of the output.
        activation: nonlinearity after every convolution.

    Calling it on images ``(batch, height, width, channels)`` returns probabilities ``(batch, classes)``; the method
    ``logits`` stops before the softmax.

    Raises:
        TypeError: sizes that are no whole numbers, or an ``activation`` that is no function.
        ValueError: no channels, or sizes below one.
    """

    channels: Sequence[int] = (8, 16)
    classes: int = 10
    activation: Callable[[Array], Array] = jax.nn.relu

    def __post_init__(self) -> None:
        sizes("channels", self.channels)
        whole("classes", self.classes)
        function("activation", self.activation, "a function of an array", arguments=1)
        super().__post_init__()

    @nn.compact
    def logits(self, x: Array) -> Array:
        """Values before the softmax, shape ``(batch, classes)``."""
        for channels in self.channels:
            x = self.activation(nn.Conv(channels, (5, 5), padding="VALID")(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        return nn.Dense(self.classes)(x.reshape((x.shape[0], -1)))

    def __call__(self, x: Array) -> Array:
        """Class probabilities, shape ``(batch, classes)``."""
        return jax.nn.softmax(self.logits(x))


def small_cnn() -> SmallConvolutionalNetwork:
    """Two convolutions of 8 and 16 filters: 5,994 parameters for 28x28 images of one channel, 7,834 for 32x32 of three.

    >>> small_cnn().channels
    (8, 16)
    """
    return SmallConvolutionalNetwork()
