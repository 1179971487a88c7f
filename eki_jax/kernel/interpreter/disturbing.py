"""Noise added to what layers return, sample by sample, and the gradient of their parameters from that of the noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from eki_jax._types import Array
from eki_jax.kernel.interpreter.binding import bound
from eki_jax.kernel.interpreter.shapes import ARRANGED
from eki_jax.kernel.interpreter.values import Tagged, plain
from eki_jax.kernel.interpreter.watching import Watcher

# Equations that are linear in a parameter: layers.
_LAYERS = {"dot_general", "conv_general_dilated", "gather", "mul", "add", "sub"}
_SUMS = {"add", "add_any", "sub"}
#: A leaf's name, and the function that makes its gradient of the leaf and of that at a point.
Pull = tuple[str, Callable[[Array, Array], Array]]


class Point(NamedTuple):
    """A place in the model where noise is added: what one layer returns.

    Attributes:
        shape: shape of what it returns.
        axis: axis of the samples.
        dtype: dtype of it.
        size: root mean square of its numbers.
        value: output of the layer, with what is added to it, such as a bias.
        pulls: leaves of the layer, each with the function that makes its gradient.
    """

    shape: tuple[int, ...]
    axis: int
    dtype: Any
    size: Array
    value: Array
    pulls: list[Pull]

    @property
    def of_one(self) -> tuple[int, ...]:
        """The shape with one sample."""
        return (*self.shape[: self.axis], 1, *self.shape[self.axis + 1 :])


@dataclass(frozen=True, eq=False)
class _Link:
    """One equation that arranged a leaf."""

    eqn: Any


class Disturber(Watcher):
    """Adds noise to what layers return.

    A layer is an equation that is linear in one parameter: a product, a convolution, a lookup, a scale, a bias. What is
    added to a layer's outputs, such as a bias, is no layer of its own.

    A layer has a number, its place among those of the trace, which is the same with any number of samples.

    Attributes:
        axis_of: function ``axis_of(number, shape)`` that says along which axis of what a layer returns the samples are;
            None for one to which no noise is added.
        noise: function ``noise(number, shape, dtype)`` of the point's number; None adds none.
        met: shapes of what the layers return, in the order of the trace.
        points: points that were met, by their numbers.
        exact: place among the outputs of each point that is one of them, by the point's number.
        others: names of leaves that were used otherwise too, or in loops.
    """

    def __init__(
        self,
        axis_of: Callable[[int, tuple[int, ...]], int | None],
        noise: Callable[[int, tuple[int, ...], Any], Any] | None = None,
    ) -> None:
        super().__init__()
        self.axis_of = axis_of
        self.noise = noise
        self.met: list[tuple[int, ...]] = []
        self.points: dict[int, Point] = {}
        self.exact: dict[int, int] = {}

    def finished(self, results: Sequence[Any]) -> None:
        """Note the points that are outputs, whose gradient is known."""
        for place, value in enumerate(results):
            if isinstance(value, Tagged) and value.product:  # of nothing else: else it has lost its tag
                self.exact[int(value.product)] = place

    def computed(self, value: Tagged) -> None:
        """Note a leaf that is used for something else."""
        if value.leaf:
            self.others.add(value.leaf)

    def tagged(self, eqn: Any, operands: Sequence[Any], results: list[Any], inside: tuple[str, ...]) -> list[Any]:
        """The results of an equation, disturbed where it is a layer."""
        kind = eqn.primitive.name
        tagged = [value for value in operands if isinstance(value, Tagged)]
        if kind in ARRANGED and len(operands) == 1 and len(results) == 1:
            (value,), (result,) = tagged, results
            # Not behind a transpose: the point's numbers are in another order there.
            kept = value.product if result.size == value.value.size and kind != "transpose" else ""
            return [Tagged(result, value.leaf, None, kept, (*value.chain, _Link(eqn)) if value.leaf else ())]
        leaves = [place for place, value in enumerate(operands) if isinstance(value, Tagged) and value.leaf]
        if inside or kind not in _LAYERS or len(leaves) != 1 or (kind == "gather" and leaves != [0]):
            for place in leaves:
                self.computed(operands[place])
            return results
        (place,), (result,) = leaves, results
        leaf = operands[place]
        known = [plain(value) for value in operands]

        def layer(parameter: Array) -> Array:
            return bound(eqn, *known[:place], _arranged(leaf.chain, parameter), *known[place + 1 :])

        number = len(self.met)
        self.met.append(result.shape)
        at = [value.product for value in tagged if value.product and value.value.shape == result.shape]
        if kind in _SUMS and at:
            point = self.points[int(at[0])]
            point.pulls.append((leaf.leaf, partial(_pulled, layer)))
            self.points[int(at[0])] = point._replace(value=result.reshape(point.shape))
            return [Tagged(result, product=at[0])]
        axis = self.axis_of(number, result.shape)
        if axis is None:
            self.computed(leaf)
            return results
        size = jnp.sqrt(jnp.mean(jnp.square(result)))
        pulls: list[Pull] = [(leaf.leaf, partial(_pulled, layer))]
        self.points[number] = Point(result.shape, axis, result.dtype, size, result, pulls)
        if self.noise is not None:
            result = result + self.noise(number, result.shape, result.dtype)
        return [Tagged(result, product=str(number))]


def _arranged(chain: Sequence[_Link], parameter: Array) -> Array:
    for link in chain:
        parameter = bound(link.eqn, parameter)
    return parameter


def _pulled(layer: Callable[[Array], Array], parameter: Array, gradient: Array) -> Array:
    """The transpose of a layer, which is linear in its parameter up to a constant."""
    return jax.vjp(layer, parameter)[1](gradient)[0]
