"""Slopes of one layer from those of the layers behind it: what lies between is asked.

The slopes of a layer, through its matrix, are the loss's gradient t in what it reads. What lies between that and an
earlier layer's outputs y, a function f without matrices, is evaluated at both sides of y along t:

    (f(y + h t) - f(y - h t)) / 2h  =  J t,

with J its matrix of derivatives, which nobody forms. The slopes are ``J' t``: the same where a change of number k does
to number i what a change of i does to k, as in all that is done number by number, a softmax and a normalisation.

Of an activation beside a normalisation a change of number k does to i what one of i does to k in each, not in both
together: what is done number by number is asked by itself, and the scale of a normalisation told apart from it. What
pools, the largest or the sum of windows, returns fewer numbers: one number of every window is moved at a time, and how
the window's result changes is the derivative in it. What is cut into parts of as many numbers as are read, as the gates
of a recurrent cell are, is moved one part at a time. What only moves numbers or adds them, such as the last of many
places or their mean, need not be asked. Nor need what is linear behind an array of as many numbers as are moved, as
behind a choice by which rows are multiplied: t is then the gradient in that array.

In a loop over time the last turn comes first: what a turn carries on and hands out is asked as what is read is, and the
gradient in what it began with is that in what the turn before carries on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial, reduce
from itertools import product
from operator import add
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

# Equations that move numbers, add or scale them: linear in what depends on what is asked, which for some has to be one
# operand, in a place or in any.
_MOVES = {"broadcast_in_dim", "concatenate", "copy", "expand_dims", "neg", "reduce_sum", "reshape", "rev", "slice"}
_MOVES |= {"squeeze", "transpose", "add", "sub", "cumsum"}
_ARRANGES = {"broadcast_in_dim", "expand_dims", "reshape", "rev", "squeeze", "transpose"}
_CUTS = {"slice", "split"}
_ONE = {"mul": (0, 1), "div": (0,), "dynamic_slice": (0,), "gather": (0,)}
# Equations that make as many numbers as they read, and each of several.
_MIXES = {"cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp", "sort"}
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
        passes: flag, True where it lies between others, as a bias or a scale does.
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
    if read.size != source.value.size and (parts := _parts(trace, place)):
        return partial(_by_part, source, trace, place, parts)
    if (eqn := _pool(trace, place)) is not None:
        behind = _way(Source.of(bound(eqn, source.value)), trace.behind(eqn.outvars[0]), place)
        return behind and partial(_in_turn, (partial(_by_window, source, eqn), behind))
    if (cut := _cut(trace, place)) is not None:
        first = _way(source, cut[0], 0)
        behind = _way(Source.of(cut[0].result(0, source.value)), cut[1], place)
        return first and behind and partial(_in_turn, (first, behind))
    if read.size != source.value.size or _mixes(trace, place):
        return None
    return partial(_along, source, trace, place)


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
    """The answer of what lies before one array that is read, of as many numbers: moved along the gradient.

    Where the last of it multiplies each number by one of its own, s, it is moved along s times the gradient, and what
    that does divided by s: the answer of what is multiplied.
    """
    moves = _moves(trace, place)
    arranged = lambda value: reduce(lambda rows, eqn: bound(eqn, rows), moves, value)
    read, back = jax.vjp(arranged, source.value)
    own = lambda rows: back(rows.reshape(read.shape).astype(read.dtype))[0]  # as they lie in the source
    times = _multiplier(trace, place, source.value)
    along = times * asked
    scale = _scale(along, size, batch)
    up, down = (trace.result(place, source.value + own(step * along)) for step in (scale, -scale))
    answer = (up - down) / (2 * scale) / jnp.where(times == 0, 1, times)
    return Answer(*(source.arranged(own(rows)) for rows in (answer, asked)))


def _multiplier(trace: Trace, place: int, value: Array) -> Array:
    """The numbers by which a result is multiplied that depend on nothing that is moved, where they can be told; or 1.

    As in a normalisation, which multiplies by a scale what it divides numbers by, and these by that.
    """
    one = jnp.ones((), value.dtype)
    if _by_number(trace, place):
        return one
    made = {out: (eqn, places) for eqn, places in trace.depending(place) for out in eqn.outvars}
    last, places = made[trace.results[place]]
    if last.primitive.name != "mul" or len(places) < 2:
        return one
    for atom in last.invars:
        arranged = list[Any]()
        while (found := made.get(atom)) is not None and found[0].primitive.name in _ARRANGES:
            arranged.insert(0, found[0])
            atom = found[0].invars[0]
        if found is not None and found[0].primitive.name == "mul" and len(found[1]) == 1:
            own = jnp.broadcast_to(trace.value(found[0].invars[1 - found[1][0]], value), atom.aval.shape)
            return reduce(lambda rows, eqn: bound(eqn, rows), arranged, own)
    return one


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


def _cut(trace: Trace, place: int) -> tuple[Trace, Trace] | None:
    """Where what cannot be asked at once is cut, at an array of as many numbers as are moved: before it, and behind it.

    That is where something is pooled; before what is linear, if fewer numbers are read; else where what is done number
    by number ends, or begins.
    """
    (moved,) = trace.inputs
    arrays = [out for eqn, _ in trace.depending(place) for out in eqn.outvars if _alike(out.aval, moved.aval)]
    cuts = [(trace._replace(results=[out]), trace.behind(out)) for out in arrays]
    cuts = [(first, behind) for first, behind in cuts if not behind.depends(place, moved) and behind.depending(place)]
    found = [cut for cut in cuts if _pool(cut[1], place) is not None][:1]
    if not _alike(trace.results[place].aval, moved.aval):
        found += [cut for cut in cuts if _is_linear(cut[1], place)][:1]
    elif not _by_number(trace, place):
        found += [cut for cut in cuts if _by_number(cut[0], 0)][-1:]
        found += [cut for cut in cuts if _by_number(cut[1], place)][:1]
    return found[0] if found else None


def _alike(one: Any, other: Any) -> bool:
    """Whether two arrays have as many numbers, of the same kind."""
    return one.size == other.size and one.dtype == other.dtype


def _by_number(trace: Trace, place: int) -> bool:
    """Whether all before a result is done number by number, as far as names and sizes tell."""
    size = trace.inputs[0].aval.size
    alike = all(out.aval.size == size for eqn, _ in trace.depending(place) for out in eqn.outvars)
    return alike and not _mixes(trace, place)


def _mixes(trace: Trace, place: int) -> bool:
    """Whether windows, or all that came before, are made one number of between what is moved and a result."""
    names = (eqn.primitive.name for eqn, _ in trace.depending(place))
    return any(name in _MIXES or name in _WINDOWS for name in names)


def _in_turn(ways: Sequence[Way], asked: Array, size: Array, batch: Axis) -> Answer:
    """The answer of one after the other, of which the last is asked first."""
    found = ways[-1](asked, size, batch)
    for way in reversed(ways[:-1]):
        found = Answer(way(found.slopes, size, batch).slopes, way(found.asked, size, batch).asked)
    return found


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


def _pool(trace: Trace, place: int) -> Any:
    """The equation that pools what is moved, where nothing else depends on this; None where there is none."""
    (moved,) = trace.inputs
    eqn, _ = trace.depending(place)[0]
    alone = eqn.primitive.name in _WINDOWS and not trace.behind(eqn.outvars[0]).depends(place, moved)
    return eqn if alone else None


def _by_window(source: Source, eqn: Any, asked: Array, size: Array, batch: Axis) -> Answer:
    """The answer of what pools."""
    found = source.arranged(_WINDOWS[eqn.primitive.name](eqn, source.value, size.astype(source.value.dtype), asked))
    return Answer(found, found)


def _of_sums(eqn: Any, value: Array, size: Array, asked: Array) -> Array:
    """The gradient in numbers from that in the sums of their windows, at no evaluation."""
    return jax.vjp(partial(bound, eqn), value)[1](asked)[0]


def _of_largest(eqn: Any, value: Array, size: Array, asked: Array) -> Array:
    """The gradient in numbers from that in the largest of their windows, by how these change where a number moves."""
    strides, shape = eqn.params["window_strides"], eqn.outvars[0].aval.shape
    edges = [(*ends, step - 1) for ends, step in zip(eqn.params["padding"], eqn.params["base_dilation"], strict=True)]
    numbers, unpad = jax.vjp(lambda rows: lax.pad(rows, jnp.array(-jnp.inf, rows.dtype), edges), value)
    places = np.array([*product(*map(range, eqn.params["window_dimensions"]))]) * eqn.params["window_dilation"]
    reach = [(many - 1) * step + 1 for many, step in zip(shape, strides, strict=True)]

    def of_each(start: Array, rows: Array) -> Array:
        """Of every window the number at one place in it."""
        return lax.slice(lax.dynamic_slice(rows, start, reach), [0] * rows.ndim, reach, strides)

    def ranked(two: tuple[Array, Array], start: Array) -> tuple[tuple[Array, Array], None]:
        one = of_each(start, numbers)
        return (jnp.maximum(two[0], one), jnp.maximum(two[1], jnp.minimum(two[0], one))), None

    none = jnp.full(shape, -jnp.inf, value.dtype)
    (largest, second), _ = lax.scan(ranked, (none, none), places)

    def moved(total: Array, start: Array) -> tuple[Array, None]:
        one, spread = jax.vjp(partial(of_each, start), numbers)
        up = jnp.maximum(largest, one + size)
        down = jnp.where(one < largest, largest, jnp.maximum(second, one - size))
        return total + spread((up - down) / (2 * size) * asked)[0], None

    return unpad(lax.scan(moved, jnp.zeros_like(numbers), places)[0])[0]


# Equations that make one number of every window, and what sends a gradient back through them.
_WINDOWS = {"reduce_window_max": _of_largest, "reduce_window_sum": _of_sums}
