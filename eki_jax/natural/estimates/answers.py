"""Slopes of one layer from those of the layers behind it: what lies between is asked.

The slopes of a layer, through its matrix, are the loss's gradient t in what it reads. What lies between that and an
earlier layer's outputs y, a function f without matrices, is evaluated at both sides of y along t:

    (f(y + h t) - f(y - h t)) / 2h  =  J t,

with J its matrix of derivatives, which nobody forms. The slopes are ``J' t``: the same where a change of number k does
to number i what a change of i does to k, as in all that is done number by number, a softmax and a normalisation.

What pools, the largest or the sum of windows, reads more numbers than it returns. There those that share no window are
moved together, and how a window's result changes is the derivative in the one that moved in it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from itertools import product
from operator import add, mul
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from eki_jax._types import Array
from eki_jax.kernel.axes import Axis
from eki_jax.kernel.interpreter import Point, Read
from eki_jax.kernel.interpreter.parts import equations_between, inputs_needed, one_result

# Equations that make one number of every window.
_WINDOWS = {"reduce_window_max", "reduce_window_sum"}
#: Function of what is held of what layers return, by their numbers, that gives what all layers read.
Reads = Callable[[dict[int, Array]], list[Array]]


class Answer(NamedTuple):
    """What is said of a layer's slopes, like what lies at its point.

    Attributes:
        slopes: slopes, if what lies between answers alike from both sides.
        asked: gradient in what the layers behind read.
    """

    slopes: Array
    asked: Array


class Behind(NamedTuple):
    """What lies right behind one layer.

    Attributes:
        trace: trace of what all layers read, of what this one returns.
        places: numbers of what is read that answers, those of one array together.
    """

    trace: Any
    places: list[list[int]]


class Between(NamedTuple):
    """What lies between the layers of a model.

    Attributes:
        points: points of the layers, by their numbers.
        leaves: leaves of the parameters by name.
        returned: outputs of every layer's equation, by number.
        passing: numbers of the layers that lie between others, as biases do.
        reads: function that evaluates the model with what layers return held.
    """

    points: dict[int, Point]
    leaves: dict[str, Array]
    returned: dict[int, Array]
    passing: set[int]
    reads: Reads

    def behind(self, number: int) -> Behind:
        """What lies right behind a layer."""
        returned = self.returned[number]
        held = {u: value for u, value in self.returned.items() if u not in self.passing}
        trace = jax.make_jaxpr(lambda moved: self.reads(held | {number: moved}))(returned)
        together: dict[int, list[int]] = {}
        for place, ((depends,), (_, read)) in enumerate(zip(inputs_needed(trace), self._every, strict=True)):
            if depends and (read.value.size == returned.size or _window(trace, place, returned) is not None):
                together.setdefault(id(read.value), []).append(place)
        return Behind(trace, list(together.values()))

    def answer(self, number: int, slopes: dict[int, Array], size: Array, batch: Axis) -> Answer:
        """The answer at one layer that has something behind it.

        Args:
            number: number of the layer's point.
            slopes: slopes at later points.
            size: size of a change of what the layer returns.
            batch: devices over which samples are spread.
        """
        trace, places = self.behind(number)
        point, returned = self.points[number], self.returned[number]
        answers = []
        for place, *others in places:
            asked = self._gradient([place, *others], slopes)
            if asked.size == returned.size:
                answers.append(_along(point, trace, place, returned, asked, size, batch))
            else:
                answers.append(_by_window(point, trace, place, returned, asked, size))
        return Answer(*(reduce(add, parts) for parts in zip(*answers, strict=True)))

    @property
    def _every(self) -> list[tuple[int, Read]]:
        """All that is read, in the order in which ``reads`` gives it, each with its point's number."""
        return [(number, read) for number, point in self.points.items() for read in point.reads]

    def _gradient(self, places: list[int], slopes: dict[int, Array]) -> Array:
        """The gradient in one array that several layers read."""
        every = self._every
        return reduce(add, (every[place][1].back(self.leaves, slopes[every[place][0]]) for place in places))


def _along(point: Point, trace: Any, place: int, returned: Array, asked: Array, size: Array, batch: Axis) -> Answer:
    """The answer of what lies before one array that is read, of as many numbers: moved along the gradient."""
    arranged, undone = point.arranged
    if returned.shape != asked.shape == point.shape:  # with samples and places first, as at the point
        into, out = undone, lambda value: value
    else:
        into, out = (lambda value: value.reshape(returned.shape)), (lambda value: arranged(into(value)))
    mean_square = batch.mean(jnp.mean(jnp.square(asked)))
    scale = size / jnp.sqrt(jnp.where(mean_square > 0, mean_square, 1)).astype(asked.dtype)
    up, down = (one_result(trace, place, returned + into(step * asked)) for step in (scale, -scale))
    return Answer(out((up - down) / (2 * scale)), out(asked))


def _window(trace: Any, place: int, returned: Array) -> Any:
    """The equation that pools, where all else before what is read is done number by number; None where it is not."""
    between = equations_between(trace, place)
    found = [eqn for eqn in between if eqn.primitive.name in _WINDOWS]
    if len(found) != 1 or found[0].invars[0].aval.size != returned.size:
        return None
    sizes = {returned.size, found[0].outvars[0].aval.size}
    return found[0] if all(eqn.outvars[0].aval.size in sizes for eqn in between) else None


def _by_window(point: Point, trace: Any, place: int, returned: Array, asked: Array, size: Array) -> Answer:
    """The answer of what pools, by moving one number of every window at a time."""
    eqn = _window(trace, place, returned)
    shape, window, strides = eqn.invars[0].aval.shape, eqn.params["window_dimensions"], eqn.params["window_strides"]
    every = tuple(map(max, window, strides))  # so far apart are two numbers that share no window
    zero = np.zeros((), asked.dtype)
    settings = (window, strides, eqn.params["padding"], eqn.params["base_dilation"], eqn.params["window_dilation"])
    summed = lambda value: lax.reduce_window(value, zero, lax.add, *settings)
    spread = jax.vjp(summed, jnp.zeros_like(returned.reshape(shape)))[1]
    asked = asked.reshape(eqn.outvars[0].aval.shape)
    size = size.astype(asked.dtype)

    def moved(first: Array) -> Array:
        apart = [(jnp.arange(n) % step == at).astype(int) for n, step, at in zip(shape, every, first, strict=True)]
        mask = reduce(mul, jnp.ix_(*apart)).astype(asked.dtype)
        up, down = (
            one_result(trace, place, returned + (step * mask).reshape(returned.shape)) for step in (size, -size)
        )
        (found,) = spread((up - down).reshape(asked.shape) / (2 * size) * asked)
        return mask * found

    firsts = jnp.array(list(product(*map(range, every))))
    slopes = lax.scan(lambda total, first: (total + moved(first), None), 0 * returned.reshape(shape), firsts)[0]
    arranged = lambda value: point.arranged[0](value.reshape(returned.shape))
    return Answer(arranged(slopes), arranged(spread(asked)[0]))
