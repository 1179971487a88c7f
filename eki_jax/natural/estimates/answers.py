"""Slopes of one layer from those of the layers behind it: what lies between is asked.

The slopes of a layer, through its matrix, are the loss's gradient t in what it reads. What lies between that and an
earlier layer's outputs y, a function f without matrices, is evaluated at both sides of y along t:

    (f(y + h t) - f(y - h t)) / 2h  =  J t,

with J its matrix of derivatives, which nobody forms. The slopes are ``J' t``: the same where a change of number k does
to number i what a change of i does to k, as in all that is done number by number, a softmax and a normalisation.

What pools, the largest or the sum of windows, reads more numbers than it returns. There those that share no window are
moved together, and how a window's result changes is the derivative in the one that moved in it. What is cut into parts
of as many numbers as are read, as the gates of a recurrent cell are, is moved one part at a time. What only moves
numbers or adds them, such as the last of many places or their mean, need not be asked. Nor need what is linear behind
an array of as many numbers as are moved, as behind a choice by which rows are multiplied: t is then the gradient in
that array.

In a loop over time the last turn comes first: what a turn carries on and hands out is asked as what is read is, and the
gradient in what it began with is that in what the turn before carries on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial, reduce
from itertools import product
from operator import add, mul
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from eki_jax._types import Array
from eki_jax.kernel.axes import Axis
from eki_jax.kernel.interpreter import Held, Point, Read
from eki_jax.kernel.interpreter.binding import bound
from eki_jax.kernel.interpreter.parts import Trace

# Equations that make one number of every window.
_WINDOWS = {"reduce_window_max", "reduce_window_sum"}
# Equations that move numbers, add or scale them: linear in what depends on what is asked, which for some has to be one
# operand, in a place or in any.
_MOVES = {"broadcast_in_dim", "concatenate", "copy", "expand_dims", "neg", "reduce_sum", "reshape", "rev", "slice"}
_MOVES |= {"squeeze", "transpose", "add", "sub"}
_ARRANGES = {"broadcast_in_dim", "expand_dims", "reshape", "rev", "squeeze", "transpose"}
_CUTS = {"slice", "split"}
_ONE = {"mul": (0, 1), "div": (0,), "dynamic_slice": (0,), "gather": (0,)}
#: Function of the gradient in what is read, the size of a change and the devices over which samples are spread.
Way = Callable[[Array, Array, Axis], "Answer"]
#: Function of what is held, by its key, that gives what all layers read, and what else has a gradient.
Reads = Callable[[Mapping[Held, Array]], list[Array]]


class Answer(NamedTuple):
    """What is said of a layer's slopes, like what lies at its point.

    Attributes:
        slopes: slopes, if what lies between answers alike from both sides.
        asked: gradient in what the layers behind read.
    """

    slopes: Array
    asked: Array


class Source(NamedTuple):
    """What can be held, and moved while all else is held: what a layer returns, or a loop, or what a turn begins with.

    Attributes:
        value: array.
        arranged: function that gives the slopes' shape to an array like ``value``.
        passes: flag, True where it lies between others, as a bias does.
    """

    value: Array
    arranged: Callable[[Array], Array]
    passes: bool = False

    @classmethod
    def of(cls, value: Array) -> Source:
        """An array whose slopes are like it."""
        return cls(value, lambda value: value)

    @classmethod
    def layer(cls, point: Point, returned: Array) -> Source:
        """What a layer returned."""
        return cls(returned, point.arranged)


class Between(NamedTuple):
    """What lies between the layers of a model, or of one turn of a loop in it.

    Attributes:
        points: points of the layers, by their numbers.
        leaves: leaves of the parameters by name.
        sources: arrays that can be held, by their keys; of layers the number.
        reads: function that evaluates the model with some of that held.
        held: arrays that are held where others are moved, by their keys.
        trace: trace of ``reads`` of that.
    """

    points: dict[int, Point]
    leaves: dict[str, Array]
    sources: dict[Held, Source]
    reads: Reads
    held: dict[Held, Array]
    trace: Trace

    @classmethod
    def of(
        cls, points: dict[int, Point], leaves: dict[str, Array], sources: dict[Held, Source], reads: Reads
    ) -> Between:
        """The same, traced once for all that is held."""
        held = {key: source.value for key, source in sources.items() if not source.passes}
        trace = Trace.of(lambda *values: reads(dict(zip(held, values, strict=True))), *held.values())
        return cls(points, leaves, sources, reads, held, trace)

    def behind(self, key: Held) -> list[tuple[list[int], Way]]:
        """What answers right behind a source: numbers of what is read, those of one array together, and how to ask."""
        source = self.sources[key]
        if key in self.held:
            trace = self.trace.of_one([*self.held].index(key), [*self.held.values()])
        else:
            trace = Trace.of(lambda moved: self.reads(self.held | {key: moved}), source.value)
        together: dict[int, tuple[list[int], Way]] = {}
        every = self._every
        for place, (depends,) in enumerate(trace.needed()):
            if depends and (way := _way(source, trace, place)) is not None:
                same = id(every[place][1].value) if place < len(every) else -place
                together.setdefault(same, ([], way))[0].append(place)
        return list(together.values())

    def answer(
        self, key: Held, slopes: Mapping[int, Array], ends: Sequence[Array | None], size: Array, batch: Axis
    ) -> Answer:
        """The answer at a source that has something behind it.

        Args:
            key: key of the source.
            slopes: slopes at later points.
            ends: gradients in what ``reads`` gives beyond what layers read; None where there is none yet, which is of
                what does not depend on the source.
            size: size of a change of it.
            batch: devices over which samples are spread.
        """
        answers = [way(self._gradient(places, slopes, ends), size, batch) for places, way in self.behind(key)]
        found, asked = (reduce(add, parts) for parts in zip(*answers, strict=True))
        return Answer(jnp.where(jnp.isfinite(found), found, 0), asked)  # of a side where the model fails, nothing

    @property
    def _every(self) -> list[tuple[int, Read]]:
        """All that layers read, in the order in which ``reads`` gives it, each with its point's number."""
        return [(number, read) for number, point in self.points.items() for read in point.reads]

    def _gradient(self, places: list[int], slopes: Mapping[int, Array], ends: Sequence[Array | None]) -> Array:
        """The gradient in one array that several layers read, or that is an end."""
        every = self._every
        if places[0] >= len(every):
            found = ends[places[0] - len(every)]
            assert found is not None, "what comes later has its gradient first"
            return found
        return reduce(add, (every[place][1].back(self.leaves, slopes[every[place][0]]) for place in places))


def _way(source: Source, trace: Trace, place: int) -> Way | None:
    """How a result of a trace, of what the source is, can be asked; None where it cannot."""
    read = trace.results[place].aval
    if not jnp.issubdtype(read.dtype, jnp.floating):
        return None
    if _is_linear(trace, place):
        return partial(_through, source, trace, place)
    if read.size == source.value.size:
        return partial(_along, source, trace, place)
    if parts := _parts(trace, place):
        return partial(_by_part, source, trace, place, parts)
    if (eqn := _window(trace, place, source.value)) is not None:
        return partial(_by_window, source, trace, place, eqn)
    if (cut := _cut_before_linear(trace, place)) is not None:
        return partial(_along_first, source, *cut, place)
    return None


def _is_linear(trace: Trace, place: int) -> bool:
    """Whether what lies before a result of a trace moves numbers or adds them, and does no more than scale them."""
    return all(_keeps(eqn, places) for eqn, places in trace.depending(place))


def _keeps(eqn: Any, depending: list[int]) -> bool:
    """Whether an equation moves, adds or scales what depends on what is asked."""
    kind = eqn.primitive.name
    return kind in _MOVES or (len(depending) == 1 and depending[0] in _ONE.get(kind, ()))


def _parts(trace: Trace, place: int) -> list[Any]:
    """The parts into which what is moved is cut before anything else is done to it, each of the result's size.

    There are none where something depends on it otherwise.
    """
    size = trace.results[place].aval.size
    whole, parts = {*trace.inputs}, list[Any]()
    for eqn, places in trace.depending(place):
        if whole.isdisjoint(atom for at, atom in enumerate(eqn.invars) if at in places):
            continue
        if all(out.aval.size == size for out in eqn.outvars) and eqn.primitive.name in _CUTS:
            parts += eqn.outvars
        elif _keeps(eqn, places) and eqn.outvars[0].aval.size == eqn.invars[places[0]].aval.size:
            whole |= {*eqn.outvars}
        else:
            return []
    return parts


def _through(source: Source, trace: Trace, place: int, asked: Array, size: Array, batch: Axis) -> Answer:
    """The answer of what moves numbers, adds or scales them: the gradient sent back, at no evaluation."""
    (found,) = jax.vjp(lambda moved: trace.result(place, moved), source.value)[1](asked)
    return Answer(source.arranged(found), source.arranged(found))


def _along(source: Source, trace: Trace, place: int, asked: Array, size: Array, batch: Axis) -> Answer:
    """The answer of what lies before one array that is read, of as many numbers: moved along the gradient."""
    moves = _moves(trace, place)
    arranged = lambda value: reduce(lambda rows, eqn: bound(eqn, rows), moves, value)
    read, back = jax.vjp(arranged, source.value)
    own = lambda rows: back(rows.reshape(read.shape).astype(read.dtype))[0]  # as they lie in the source
    scale = _scale(asked, size, batch)
    up, down = (trace.result(place, source.value + own(step * asked)) for step in (scale, -scale))
    return Answer(*(source.arranged(own(rows)) for rows in ((up - down) / (2 * scale), asked)))


def _moves(trace: Trace, place: int) -> list[Any]:
    """The equations that arrange numbers anew between what is moved and a result of as many, one after the other."""
    (moved,) = trace.inputs
    behind = {moved: list[Any]()}
    for eqn, places in trace.depending(place):
        same = [atom for at, atom in enumerate(eqn.invars) if at in places and atom in behind]
        if same:
            own = [eqn] if eqn.primitive.name in _ARRANGES else []
            sized = [out for out in eqn.outvars if out.aval.size == moved.aval.size]
            behind |= dict.fromkeys(sized, behind[same[0]] + own)
    return behind.get(trace.results[place], [])


def _cut_before_linear(trace: Trace, place: int) -> tuple[Trace, Trace] | None:
    """The trace of an array of as many numbers as are moved, behind which all is linear, and that of what is behind."""
    (moved,) = trace.inputs
    for eqn, _ in trace.depending(place):
        for out in eqn.outvars:
            if out.aval.size == moved.aval.size and jnp.issubdtype(out.aval.dtype, jnp.floating):
                behind = trace.behind(out)
                if not behind.depends(place, moved) and _is_linear(behind, place):
                    return trace._replace(results=[out]), behind
    return None


def _along_first(
    source: Source, first: Trace, behind: Trace, place: int, asked: Array, size: Array, batch: Axis
) -> Answer:
    """The answer of what is linear behind an array of as many numbers: the gradient in this, and that moved along."""
    (array,) = behind.inputs
    (asked,) = jax.vjp(lambda rows: behind.result(place, rows), jnp.zeros(array.aval.shape, array.aval.dtype))[1](asked)
    return _along(source, first, 0, asked, size, batch)


def _scale(asked: Array, size: Array, batch: Axis) -> Array:
    """The factor that makes a step of a size of a gradient."""
    mean_square = batch.mean(jnp.mean(jnp.square(asked)))
    return size / jnp.sqrt(jnp.where(mean_square > 0, mean_square, 1)).astype(asked.dtype)


def _by_part(
    source: Source, trace: Trace, place: int, parts: list[Any], asked: Array, size: Array, batch: Axis
) -> Answer:
    """The answer of what is cut into parts, moved along the gradient one by one."""

    def answer(part: Any) -> Answer:
        cut, back = jax.vjp(lambda moved: trace.value(part, moved), source.value)
        whole = lambda rows: back(rows.reshape(cut.shape).astype(cut.dtype))[0]
        up, down = (trace.result(place, source.value + whole(step * asked)) for step in (scale, -scale))
        return Answer(*(source.arranged(whole(rows)) for rows in ((up - down) / (2 * scale), asked)))

    scale = _scale(asked, size, batch)
    return Answer(*(reduce(add, rows) for rows in zip(*map(answer, parts), strict=True)))


def _window(trace: Trace, place: int, returned: Array) -> Any:
    """The equation that pools, where all else before what is read is done number by number; None where it is not."""
    between = [eqn for eqn, _ in trace.depending(place)]
    found = [eqn for eqn in between if eqn.primitive.name in _WINDOWS]
    if len(found) != 1 or found[0].invars[0].aval.size != returned.size:
        return None
    sizes = {returned.size, found[0].outvars[0].aval.size}
    return found[0] if all(eqn.outvars[0].aval.size in sizes for eqn in between) else None


def _by_window(source: Source, trace: Trace, place: int, eqn: Any, asked: Array, size: Array, batch: Axis) -> Answer:
    """The answer of what pools, by moving one number of every window at a time."""
    returned = source.value
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
        up, down = (trace.result(place, returned + (step * mask).reshape(returned.shape)) for step in (size, -size))
        (found,) = spread((up - down).reshape(asked.shape) / (2 * size) * asked)
        return mask * found

    firsts = jnp.array(list(product(*map(range, every))))
    slopes = lax.scan(lambda total, first: (total + moved(first), None), 0 * returned.reshape(shape), firsts)[0]
    arranged = lambda value: source.arranged(value.reshape(returned.shape))
    return Answer(arranged(slopes), arranged(spread(asked)[0]))
