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
from eki_jax.kernel.interpreter.shapes import SAME
from eki_jax.kernel.interpreter.values import Tagged, plain
from eki_jax.kernel.interpreter.watching import Watcher

# Equations that are linear in a parameter: layers.
_LAYERS = {"dot_general", "conv_general_dilated", "gather", "mul", "add", "sub"}
_SUMS = {"add", "add_any", "sub"}
# Equations that arrange the numbers of a parameter.
_ARRANGED = {*SAME, "broadcast_in_dim", "convert_element_type", "expand_dims", "reshape", "squeeze", "transpose"}


class Point(NamedTuple):
    """A place in the model where noise is added: what one layer returns.

    Attributes:
        shape: shape of what it returns.
        dtype: dtype of it.
        size: root mean square of its numbers.
        pulls: functions of a leaf and of the gradient at the point that make the leaf's gradient, by its name.
    """

    shape: tuple[int, ...]
    dtype: Any
    size: Array
    pulls: dict[str, Callable[[Array, Array], Array]]


@dataclass(frozen=True, eq=False)
class _Link:
    """One equation that arranged a leaf."""

    eqn: Any


class Disturber(Watcher):
    """Adds noise to what layers return.

    A layer is an equation that is linear in one parameter: a product, a convolution, a lookup, a scale, a bias. What is
    added to a layer's outputs, such as a bias, is no layer of its own.

    Attributes:
        samples: length B of the first axis of what layers return.
        noise: function ``noise(number, shape, dtype)`` of the point's number; None adds none.
        points: points that were met.
        exact: place among the outputs of each point that is one of them, by the point's number.
        others: names of leaves that were used otherwise too, or in loops.
    """

    def __init__(self, samples: int, noise: Callable[[int, tuple[int, ...], Any], Any] | None = None) -> None:
        super().__init__()
        self.samples = samples
        self.noise = noise
        self.points: list[Point] = []
        self.exact: dict[int, int] = {}

    def finished(self, results: Sequence[Any]) -> None:
        """Note the points that are outputs, whose gradient is known."""
        for place, value in enumerate(results):
            if isinstance(value, Tagged) and value.product:
                self.exact[int(value.product)] = place

    def computed(self, value: Tagged) -> None:
        """Note a leaf that is used for something else."""
        if value.leaf:
            self.others.add(value.leaf)

    def tagged(self, eqn: Any, operands: Sequence[Any], results: list[Any], inside: tuple[str, ...]) -> list[Any]:
        """The results of an equation, disturbed where it is a layer."""
        kind = eqn.primitive.name
        tagged = [value for value in operands if isinstance(value, Tagged)]
        if kind in _ARRANGED and len(operands) == 1 and len(results) == 1:
            (value,), (result,) = tagged, results
            kept = value.product if result.size == value.value.size else ""
            return [Tagged(result, value.leaf, None, kept, (*value.chain, _Link(eqn)) if value.leaf else ())]
        leaves = [place for place, value in enumerate(operands) if isinstance(value, Tagged) and value.leaf]
        if inside or kind not in _LAYERS or len(leaves) != 1 or (kind == "gather" and leaves != [0]):
            for place in leaves:
                self.computed(operands[place])
            return results
        (place,), (result,) = leaves, results
        leaf = operands[place]
        if result.shape[:1] != (self.samples,):
            self.computed(leaf)
            return results
        known = [plain(value) for value in operands]

        def layer(parameter: Array) -> Array:
            return bound(eqn, *known[:place], _arranged(leaf.chain, parameter), *known[place + 1 :])

        at = [value.product for value in tagged if value.product and value.value.shape == result.shape]
        if kind in _SUMS and at:
            self._add(int(at[0]), leaf.leaf, layer)
            return [Tagged(result, product=at[0])]
        number = len(self.points)
        size = jnp.sqrt(jnp.mean(jnp.square(result)))
        self.points.append(Point(result.shape, result.dtype, size, {}))
        self._add(number, leaf.leaf, layer)
        if self.noise is not None:
            result = result + self.noise(number, result.shape, result.dtype)
        return [Tagged(result, product=str(number))]

    def _add(self, number: int, name: str, layer: Callable[[Array], Array]) -> None:
        self.points[number].pulls[name] = partial(_pulled, layer)


def _arranged(chain: Sequence[_Link], parameter: Array) -> Array:
    for link in chain:
        parameter = bound(link.eqn, parameter)
    return parameter


def _pulled(layer: Callable[[Array], Array], parameter: Array, gradient: Array) -> Array:
    """The transpose of a layer, which is linear in its parameter up to a constant."""
    return jax.vjp(layer, parameter)[1](gradient)[0]
