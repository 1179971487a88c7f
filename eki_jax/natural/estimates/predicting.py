"""What is expected of the layers' slopes before there is noise, from all that was learned and from what answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from eki_jax._types import Array
from eki_jax.kernel.interpreter import Disturber, Held, Passed, Point
from eki_jax.natural.direction import Setup
from eki_jax.natural.estimates.answers import Answer, Between, Source
from eki_jax.natural.estimates.feedback import (
    Features,
    Memory,
    Prediction,
    asked_by_range,
    predicted,
    rightness,
    several,
    updated,
    updated_ways,
    weighted,
    weights,
)
from eki_jax.natural.estimates.undisturbed import Undisturbed, of_setup


class Known(NamedTuple):
    """What is known of a point's slopes before there is noise.

    Attributes:
        features: numbers from which they are predicted.
        alone: prediction by the outputs.
        slopes: slopes that are expected, shape (B, n).
        each: several predictions of which they are a sum, each of shape (B, n); None where there is one.
        answer: answer of what lies behind, shapes (B, n); None for none.
    """

    features: Features
    alone: Prediction
    slopes: Array
    each: list[Array] | None = None
    answer: Answer | None = None

    def at(self, point: Point, rows: Array) -> Array:
        """Numbers (B, n) as they lie at the point."""
        return jnp.moveaxis(rows.reshape(self.features.shape), 0, point.axis).astype(point.dtype)


class Rule(NamedTuple):
    """How the slopes at a point of a loop are made of an answer, turn by turn: arrays with a first axis of the turns.

    Attributes:
        own: slopes that are expected without it.
        answer: factor of the slopes that it says.
        asked: factors of the gradient in what is read.
    """

    own: Array
    answer: Array
    asked: Array

    def slopes(self, said: Answer | None) -> Array:
        """The slopes of one turn."""
        return self.own if said is None else self.own + self.answer * said.slopes + self.asked * said.asked


def between_layers(seen: Undisturbed) -> Between | None:
    """What lies between the layers, and the loops; None where turns of a loop cannot be evaluated one by one."""
    if not all(loop.turns.is_flat for loop in seen.loops):
        return None

    def reads(held: Mapping[Held, Array]) -> list[Array]:
        disturber = seen.disturber(held=held)
        outputs = seen.evaluated(disturber)
        begins = [value for loop in disturber.loops for value in loop.turns.given]
        return [*_read(disturber.points), *begins, *jax.tree.leaves(outputs)]

    results = [value for loop in seen.loops for value in loop.turns.results]
    points = {u: point for u, point in seen.points.items() if seen.loop_of(u) is None}
    sources = _of_layers(points, seen.returned, seen.passing) | _of_arrays("result", results)
    return Between.of(points, seen.leaves, sources, reads)


def in_a_turn(
    seen: Undisturbed, loop: Passed, turn: Any, begun: list[Array], row: list[Array], returned: dict[int, Array]
) -> Between:
    """What lies between the layers of one turn of a loop, by their numbers in it, and its beginning and its end.

    Args:
        seen: model without noise.
        loop: loop.
        turn: number of the turn.
        begun: values that the turn began with.
        row: slices of the turn.
        returned: outputs that its layers returned themselves, by their numbers in the model.
    """
    first = loop.numbers.start
    known: dict[Any, Array] = {number - first: value for number, value in returned.items()}

    def axis_of(number: int, shape: tuple[int, ...]) -> int | None:
        axis = seen.axes.get(first + number)
        return None if axis is None else axis - 1

    def evaluated(held: Mapping[Held, Array]) -> tuple[Disturber, list[Array]]:
        disturber = Disturber(axis_of, held=held)
        own = lambda name, values: [held.get((name, place), value) for place, value in enumerate(values)]
        return disturber, loop.turns.at(turn, own("begun", begun), own("row", row), disturber)

    def reads(held: Mapping[Held, Array]) -> list[Array]:
        disturber, results = evaluated(held)
        return [*_read(disturber.points), *results]

    met, _ = evaluated(known)
    sources = _of_layers(met.points, known, met.passing) | _of_arrays("begun", begun)
    sources |= _of_arrays(
        "row", [one if leaf is None else None for one, leaf in zip(row, loop.turns.leaves, strict=True)]
    )
    return Between.of(met.points, seen.leaves, sources, reads)


def what_answers(seen: Undisturbed) -> set[int]:
    """The numbers of the points to which what lies behind answers."""
    between = between_layers(seen)
    if between is None:
        return set()
    found = {u for u in between.points if between.behind(u)}
    for loop in seen.loops:
        first = jax.tree.map(lambda every: every[0], (loop.begun, loop.turns.rows, loop.returned))
        one = in_a_turn(seen, loop, 0, *first)
        found |= {loop.numbers.start + u for u in one.points if one.behind(u)}
    return found & {*seen.noisy}


def expected(seen: Undisturbed, setup: Setup, in_outputs: Any, memory: Memory, sigma: Array) -> dict[int, Known]:
    """What is known of the slopes at every point where noise is added."""
    deviations, batch = of_setup(setup), setup.axes.batch
    assert deviations.feedback is not None
    if {*memory.layers} != {*map(str, seen.noisy)}:
        raise ValueError(
            f"feedback: learned of layers {', '.join(memory.layers)} and the batch meets "
            f"{', '.join(map(str, seen.noisy))}; wanted an example with the batch's shapes, but for the number of "
            "samples"
        )
    unknowns = sum(math.prod(seen.points[u].of_one) for u in seen.noisy) / setup.cloud.particles
    if deviations.causal:
        unknowns /= jax.tree.leaves(in_outputs)[0].shape[1]
    features, alone = dict[int, Features](), dict[int, Prediction]()
    for u in seen.noisy:
        returned = jnp.moveaxis(seen.points[u].value, seen.points[u].axis, 0)
        feedback = deviations.feedback
        features[u] = Features.of(in_outputs, returned, feedback.bins, batch, balanced=feedback.balanced)
        alone[u] = predicted(memory.layers[str(u)], features[u], unknowns)
    answered = [u for u in seen.noisy if (ways := memory.ways.get(str(u))) is not None and ways.by_range is not None]
    known = {u: Known(features[u], alone[u], alone[u].slopes) for u in seen.noisy}
    nothing = jnp.zeros(())
    for u in seen.noisy:
        own, ways = memory.layers[str(u)], memory.ways.get(str(u))
        if ways is not None and u not in answered:
            each = several(ways, own, features[u], [alone[other] for other in seen.alike(u)], None)
            known[u] = known[u]._replace(slopes=weighted(weights(ways, own, nothing), each), each=each)
    if not answered:
        return known
    right = rightness([memory.ways[str(u)] for u in answered], [memory.layers[str(u)] for u in answered])
    factors = {u: weights(memory.ways[str(u)], memory.layers[str(u)], right) for u in answered}

    def rule(u: int) -> Rule:
        point, turns = seen.points[u], seen.points[u].shape[0]
        at = lambda rows: known[u].at(point, rows)
        if u not in factors:
            return Rule(at(known[u].slopes), jnp.zeros(turns), at(jnp.zeros_like(known[u].slopes)))
        by_outputs, answer, asked = factors[u]
        asked = asked * asked_by_range(memory.ways[str(u)], memory.layers[str(u)], features[u])
        return Rule(at(by_outputs * alone[u].whole), jnp.full(turns, answer, point.dtype), at(asked))

    slopes = {u: one.at(seen.points[u], one.slopes) for u, one in known.items() if u not in factors}
    outputs = jax.tree.leaves(in_outputs)
    slopes |= {u: outputs[place].reshape(seen.points[u].shape) for u, place in seen.exact.items()}
    asking = Asking(seen, setup, sigma, slopes, outputs, {*answered})
    for u in reversed(seen.noisy):  # what lies behind first
        said = asking.answer(u, rule)
        if u not in factors:
            continue
        rows = (jnp.moveaxis(part, seen.points[u].axis, 0).reshape(alone[u].whole.shape) for part in said)
        answer = Answer(*(part.astype(jnp.float32) for part in rows))
        each = several(memory.ways[str(u)], memory.layers[str(u)], features[u], [alone[u]], answer)
        known[u] = known[u]._replace(slopes=weighted(factors[u], each), each=each, answer=answer)
        slopes[u] = known[u].at(seen.points[u], known[u].slopes)
    return known


def learned(
    seen: Undisturbed, setup: Setup, memory: Memory, known: dict[int, Known], slopes: Mapping[int, Array]
) -> Memory:
    """The memory with a step's slopes, which have noise and no bias."""
    feedback, batch = of_setup(setup).feedback, setup.axes.batch
    assert feedback is not None
    decay = feedback.decay
    layers, ways = dict(memory.layers), dict(memory.ways)
    for u, part in known.items():
        found = jnp.moveaxis(slopes[u], seen.points[u].axis, 0).reshape(part.slopes.shape)
        found = found.astype(jnp.float32)
        own, number, features = memory.layers[str(u)], str(u), part.features.in_proportion(part.slopes, batch)
        layers[number] = updated(own, features, part.alone, part.slopes, found, decay, batch)
        if part.each is not None:
            ways[number] = updated_ways(memory.ways[number], features, part.each, part.answer, found, decay, batch)
    return Memory(layers, ways)


class Asking:
    """The layers asked one after the other, the last one first, and the loops turn by turn.

    Args:
        seen: model without noise.
        setup: settings of the step.
        sigma: scale of the noise.
        slopes: slopes that are known, by the points' numbers; the caller adds those of each layer as they are known.
        outputs: gradients in the outputs.
        answered: numbers of the layers to which something answers.
    """

    def __init__(
        self,
        seen: Undisturbed,
        setup: Setup,
        sigma: Array,
        slopes: dict[int, Array],
        outputs: list[Array],
        answered: set[int],
    ) -> None:
        between = between_layers(seen)
        assert between is not None
        self._seen, self._slopes, self._answered, self._between = seen, slopes, answered, between
        self._batch = setup.axes.batch
        self._size = lambda value: seen.size(setup, sigma, value)
        self._sizes = seen.sizes(setup, sigma)
        # Gradients in what each loop begins with and has slices of.
        self._begins: list[list[Array | None]] = [[None] * len(loop.turns.given) for loop in seen.loops]
        self._outputs = outputs
        self._in_loops: dict[int, dict[int, Answer]] = {}

    def answer(self, u: int, rule: Callable[[int], Rule]) -> Any:
        """The answer to one layer, or nothing; of a loop that is met, all layers' in it."""
        for index, loop in enumerate(self._seen.loops):
            if u in loop.numbers:
                if index not in self._in_loops:
                    self._in_loops[index] = self._in_turns(index, loop, rule)
                return self._in_loops[index].get(u)
        if u not in self._answered:
            return None
        return self._between.answer(u, self._slopes, self._ends, self._sizes[u], self._batch)

    @property
    def _ends(self) -> list[Array | None]:
        return [*(gradient for begins in self._begins for gradient in begins), *self._outputs]

    def _gradient(
        self, between: Between, key: Held, slopes: Mapping[int, Array], ends: list[Array | None], size: Any
    ) -> Array | None:
        """The gradient in a source that is no layer; None for what has none."""
        source = between.sources.get(key)
        if source is None:
            return None
        if not between.behind(key):
            return 0 * source.value
        return between.answer(key, slopes, ends, size, self._batch).slopes.astype(source.value.dtype)

    def _in_turns(self, index: int, loop: Passed, rule: Callable[[int], Rule]) -> dict[int, Answer]:
        """The answers to a loop's layers, turns along a first axis; notes the gradient in what the loop is given."""
        seen, turns, first = self._seen, loop.turns, loop.numbers.start
        results = [("result", loop.before + place) for place in turns.moving]
        sized = lambda source: None if source is None else self._size(source.value)
        ends = [
            self._gradient(self._between, key, self._slopes, self._ends, sized(self._between.sources.get(key)))
            for key in results
        ]
        after, handed = ends[: len(turns.start)], ends[len(turns.start) :]
        rules = {str(u): rule(u) for u in seen.noisy if u in loop.numbers}
        given = [("begun", place) for place in range(len(turns.start))]
        given += [("row", place) for place in range(len(turns.rows))]
        every = zip(given, (*loop.begun, *turns.rows), strict=True)
        sizes = {key: self._size(value) for key, value in every if jnp.issubdtype(value.dtype, jnp.floating)}

        def one(after: list[Array | None], at_turn: Any) -> tuple[list[Array | None], Any]:
            number, begun, row, returned, handed, rules = at_turn
            between = in_a_turn(seen, loop, number, begun, row, returned)
            slopes, said = dict[int, Array](), dict[str, Answer]()
            ends = [*after, *handed]
            for local in reversed(between.points):
                u = first + local
                if u in self._answered:
                    said[str(u)] = between.answer(local, slopes, ends, self._sizes[u], self._batch)
                slopes[local] = rules[str(u)].slopes(said.get(str(u))).astype(between.points[local].dtype)
            before = [self._gradient(between, key, slopes, ends, sizes.get(key)) for key in given]
            return before[: len(begun)], (said, before[len(begun) :])

        numbers = jnp.arange(len(jax.tree.leaves(rules)[0]))
        inputs = (numbers, loop.begun, turns.rows, loop.returned, handed, rules)
        start, (said, rows) = lax.scan(one, after, inputs, reverse=not turns.reverse)
        self._begins[index] = [*start, *rows]
        return {int(u): answer for u, answer in said.items()}


def _read(points: dict[int, Point]) -> list[Array]:
    return [read.value for point in points.values() for read in point.reads]


def _of_layers(points: dict[int, Point], returned: dict[int, Array], passing: set[int]) -> dict[Held, Source]:
    """What layers return: of those that are added to another's point too, which are held, and never asked."""
    of = lambda u, value: Source.layer(points[u], value) if u in points else Source.of(value)
    return {u: of(u, value)._replace(passes=u in passing) for u, value in returned.items()}


def _of_arrays(name: str, values: list[Any]) -> dict[Held, Source]:
    """Arrays of numbers with a gradient, by a name and their place."""
    return {
        (name, place): Source.of(value)
        for place, value in enumerate(values)
        if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jnp.floating)
    }
