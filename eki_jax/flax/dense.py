"""Fully connected networks: DNN 1 to DNN 4 of Kovachki & Stuart (2019), Figure 4, and any other widths."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
from flax import linen as nn
from jax import Array

from eki_jax._checks import function, sizes


class DenseNetwork(nn.Module):
    """Dense layers with an activation between them and a softmax at the end.

    Attributes:
        widths: outputs of every layer, the last being the number of classes.
        activation: nonlinearity between layers.

    Calling it returns probabilities, shape ``(batch, widths[-1])``; the method ``logits`` stops before the softmax.
    Inputs of any shape ``(batch, ...)`` are flattened.

    Raises:
        TypeError: ``widths`` that are no whole numbers, or an ``activation`` that is no function.
        ValueError: no widths, or widths below one.
    """

    widths: Sequence[int]
    activation: Callable[[Array], Array] = jax.nn.relu

    def __post_init__(self) -> None:
        sizes("widths", self.widths)
        function("activation", self.activation, "a function of an array", arguments=1)
        super().__post_init__()

    @nn.compact
    def logits(self, x: Array) -> Array:
        """Values before the softmax, shape ``(batch, classes)``."""
        x = x.reshape((x.shape[0], -1))
        for width in self.widths[:-1]:
            x = self.activation(nn.Dense(width)(x))
        return nn.Dense(self.widths[-1])(x)

    def __call__(self, x: Array) -> Array:
        """Class probabilities, shape ``(batch, classes)``."""
        return jax.nn.softmax(self.logits(x))


def dense_network(widths: Sequence[int], activation: Callable[[Array], Array] = jax.nn.relu) -> DenseNetwork:
    """A dense network with these output widths (the input's width comes from the data).

    Args:
        widths: hidden widths, then the number of classes: ``(100, 10)`` is the paper's 784-100-10.
        activation: nonlinearity between layers.

    Raises:
        TypeError: ``widths`` that are no whole numbers, or an ``activation`` that is no function.
        ValueError: ``widths`` is empty or has a width below one.

    Example:
        >>> from eki_jax.flax import dense_network
        >>> dense_network((100, 10)).widths
        (100, 10)
    """
    return DenseNetwork(sizes("widths", widths), activation)


def dnn1() -> DenseNetwork:
    """784-10: 7,850 parameters."""
    return dense_network((10,))


def dnn2() -> DenseNetwork:
    """784-100-10: 79,510 parameters."""
    return dense_network((100, 10))


def dnn3() -> DenseNetwork:
    """784-300-100-10: 266,610 parameters."""
    return dense_network((300, 100, 10))


def dnn4() -> DenseNetwork:
    """784-500-300-100-10: 573,910 parameters."""
    return dense_network((500, 300, 100, 10))
