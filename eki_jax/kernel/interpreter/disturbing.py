"""Noise added to what layers return, sample by sample, and the gradient of their parameters from that of the noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from eki_jax._types import Array
from eki_jax.kernel.interpreter import forming
from eki_jax.kernel.interpreter.binding import bound, varying, varying_over
from eki_jax.kernel.interpreter.calls import TimeLoop
from eki_jax.kernel.interpreter.places import Axes, followed_back, source
from eki_jax.kernel.interpreter.shapes import ARRANGED
from eki_jax.kernel.interpreter.values import Tagged, plain
from eki_jax.kernel.interpreter.watching import Loop, Watcher

# Equations that are linear in a parameter: layers.
_LAYERS = {"dot_general", "conv_general_dilated", "gather", "mul", "add", "sub"}
_SUMS = {"add", "add_any", "sub"}
# Layers that are linear in what they read, too, and no scales of it.
_PRODUCTS = {"dot_general", "conv_general_dilated"}
# Equations that take parts of a leaf.
_CUTS = {"slice", "split"}
# Equations that are linear in one operand, or in either: what carries a layer's outputs on as they are, but for a map.
_LINEAR = {"dot_general", "mul", "div", "neg"}
#: A layer's number, or what else is held and its number.
Held = int | tuple[str, int]
#: A leaf's name, and the function that makes its gradient of the leaf and of that at a point.
Pull = tuple[str, Callable[[Array, Array], Array]]


class Read(NamedTuple):
    """What a layer reads, other than its leaf, and is linear in.

    Attributes:
        value: array that is read.
        back: function ``back(leaves, gradient)`` that makes its gradient of the leaves by name and of the gradient at
            the layer's point.
    """

    value: Array
    back: Callable[[dict[str, Array], Array], Array]


class Point(NamedTuple):
    """A place in the model where noise is added: what one layer returns.

    Attributes:
        shape: shape of what it returns.
        axis: axis of the samples.
        dtype: dtype of it.
        size: root mean square of its numbers.
        value: output of the layer, with what is added to it, such as a bias.
        pulls: leaves of the layer, each with the function that makes its gradient.
        reads: arrays that its products and convolutions read; of no loop.
        arranged: function that gives the point's shape to what the layer's equation returns, or the product that the
            point lies behind.
    """

    shape: tuple[int, ...]
    axis: int
    dtype: Any
    size: Array
    value: Array
    pulls: list[Pull]
    reads: list[Read]
    arranged: Callable[[Array], Array]

    @property
    def of_one(self) -> tuple[int, ...]:
        """The shape with one sample."""
        return (*self.shape[: self.axis], 1, *self.shape[self.axis + 1 :])


@dataclass(frozen=True, eq=False)
class _Link:
    """One equation that arranged a leaf, or put it together with others.

    Attributes:
        eqn: equation; None for the slice that a loop takes at every turn.
        place: place of the leaf among the equation's operands, of which the others are zero here.
        result: place among its results.
        turn: number of the turn of which it is the slice; None for the one that is asked for.
    """

    eqn: Any
    place: int = 0
    result: int = 0
    turn: Any = None

    def apply(self, value: Array, turn: Any) -> Array:
        """What becomes of the leaf."""
        if self.eqn is None:
            return value[turn if self.turn is None else self.turn]
        operands = [jnp.zeros(atom.aval.shape, atom.aval.dtype) for atom in self.eqn.invars]
        operands[self.place] = value
        found = bound(self.eqn, *operands)
        return found[self.result] if self.eqn.primitive.multiple_results else found


@dataclass(frozen=True, eq=False)
class _Behind:
    """One equation behind a layer that is linear in what the layer returns.

    Attributes:
        eqn: equation.
        place: place of the layer's outputs among its operands.
        known: other operands.
        value: the layer's outputs; None where nothing asks for them.
    """

    eqn: Any
    place: int
    known: list[Any]
    value: Any = None

    def other(self, arranged: _Arranged) -> Read:
        """What a product of two operands reads beside the layer's outputs."""
        (other,) = self.known

        def product(other: Array) -> Array:
            operands = (other, self.value) if self.place else (self.value, other)
            return arranged.apply(bound(self.eqn, *operands))

        return Read(other, lambda leaves, gradient: jax.vjp(product, other)[1](gradient)[0])

    def apply(self, value: Array) -> Array:
        """What becomes of the outputs."""
        found = bound(self.eqn, *self.known[: self.place], value, *self.known[self.place :])
        return found[0] if self.eqn.primitive.multiple_results else found


@dataclass(frozen=True, eq=False)
class _Shaped:
    """The same numbers in another shape, in which the equations behind a layer take them."""

    shape: tuple[int, ...]

    def apply(self, value: Array) -> Array:
        """What becomes of the outputs."""
        return value.reshape(self.shape)


@dataclass(frozen=True, eq=False)
class _Arranged:
    """The samples as the first axis, and the places as the second; one sample may have had no axis."""

    axes: Axes

    def apply(self, value: Array) -> Array:
        """What becomes of the outputs."""
        samples, places = self.axes
        assert places is not None
        if samples is None:
            return jnp.moveaxis(value, places, 0)[None]
        return jnp.moveaxis(value, (samples, places), (0, 1))

    def undone(self, value: Array) -> Array:
        """The axes where they were."""
        samples, places = self.axes
        assert places is not None
        if samples is None:
            return jnp.moveaxis(value[0], 0, places)
        return jnp.moveaxis(value, (0, 1), (samples, places))


class Mixing(NamedTuple):
    """A product that mixes places, linear in what a layer returns.

    Attributes:
        asked: outputs of the layer.
        links: equations between them and the point behind the product.
        earlier: number of products among them before this one, which mix no places.
    """

    asked: Array
    links: tuple[_Behind | _Shaped | _Arranged, ...]
    earlier: int

    def through(self, asked: Array) -> Array:
        """What the product makes of other outputs of the layer."""
        for link in self.links:
            asked = link.apply(asked)
        return asked


class _Carried(NamedTuple):
    """What a value is of what lies at a point.

    Attributes:
        number: number of the point.
        shape: shape in which its numbers lay there.
        links: equations since.
    """

    number: int
    shape: tuple[int, ...]
    links: tuple[_Behind, ...] = ()

    @property
    def products(self) -> int:
        """The number of products among them, which is the same with any number of samples."""
        return sum(link.eqn.primitive.name == "dot_general" for link in self.links)


@dataclass(frozen=True, eq=False)
class _Layer:
    """An equation that is linear in one leaf.

    Attributes:
        leaf: name of the leaf.
        eqn: equation.
        place: place of the leaf among its operands.
        known: other operands; with those of all turns along a first axis, of one in a loop.
        chain: equations that arranged the leaf before.
        shape: shape of what it returns, of all turns too.
        dtype: dtype of it.
        turns: number of turns of the loop that it is in; None for none.
        sign: factor 1, or -1 where it is subtracted.
        after: equations between it and the point, linear in what it returns; of no loop.
    """

    leaf: str
    eqn: Any
    place: int
    known: list[Any]
    chain: tuple[_Link, ...]
    shape: tuple[int, ...]
    dtype: Any
    turns: int | None = None
    sign: int = 1
    after: tuple[_Behind | _Shaped | _Arranged, ...] = ()

    def pulled(self, parameter: Array, gradient: Array) -> Array:
        """The leaf's gradient, from that of what the layer returns: the layer is linear, up to a constant."""
        gradient = self.sign * gradient.reshape(self.shape).astype(self.dtype)
        # Of this device's samples: of a parameter that is the same on all devices JAX would return the sum over them.
        own = varying_over(parameter, varying([gradient]))
        return jax.vjp(self._outputs, own)[1](gradient)[0]

    def reads(self) -> list[Read]:
        """What it reads, if it is a product with that, and no scale of it; of no loop."""
        if self.eqn.primitive.name not in _PRODUCTS or self.turns is not None:
            return []

        def back(leaves: dict[str, Array], gradient: Array) -> Array:
            gradient = self.sign * gradient.reshape(self.shape).astype(self.dtype)
            return jax.vjp(lambda read: self._once([read], leaves[self.leaf]), self.known[0])[1](gradient)[0]

        return [Read(self.known[0], back)]

    def _once(self, known: list[Any], parameter: Array) -> Array:
        value = self._at(None, known, parameter)
        for link in self.after:
            value = link.apply(value)
        return value

    def _outputs(self, parameter: Array) -> Array:
        if self.turns is None:
            return self._once(self.known, parameter)
        turns = jnp.arange(self.turns)
        return jax.vmap(self._at, in_axes=(0, 0, None))(turns, self.known, parameter)

    def _at(self, turn: Any, known: list[Any], parameter: Array) -> Array:
        for link in self.chain:
            parameter = link.apply(parameter, turn)
        return bound(self.eqn, *known[: self.place], parameter, *known[self.place :])


@dataclass(frozen=True, eq=False)
class _Found:
    """A point while the trace is evaluated.

    Attributes:
        axis: axis of the samples in what all turns return.
        value: output of the layers together.
        mean_square: mean square of its numbers before biases are added.
        layers: layers whose sum it is.
        product: product that it lies behind, as a link of what the layer returned, and how its result is arranged.
    """

    axis: int
    value: Array
    mean_square: Array
    layers: list[_Layer]
    product: tuple[_Behind, _Arranged] | None = None

    def point(self) -> Point:
        """The point as others know it."""
        first = self.layers[0]
        pulls: list[Pull] = [(layer.leaf, layer.pulled) for layer in self.layers]
        reads = [read for layer in self.layers for read in layer.reads()]
        arranged = lambda value: value.reshape(first.shape)
        if self.product is not None:
            link, arrangement = self.product
            reads.append(link.other(arrangement))
            arranged = arrangement.apply
        return Point(
            first.shape, self.axis, first.dtype, jnp.sqrt(self.mean_square), self.value, pulls, reads, arranged
        )


class _Loop(Loop):
    """A loop whose turns are places of a sample, as those of a recurrent network are.

    Attributes:
        turns: number of them.
        turn: number of the one that is evaluated.
        found: points that were met in it.
        returned: outputs that its layers return themselves, by number.
    """

    def __init__(self, disturber: Disturber, turns: int) -> None:
        self.turns, self._disturber, self._before = turns, disturber, len(disturber.met)
        self.turn: Any = None
        self.found: dict[int, _Found] = {}
        self.returned: dict[int, Array] = {}

    def begin(self, turn: Any) -> None:
        """Forget an earlier evaluation: JAX may trace a loop's body more than once."""
        self.turn, self.found, self.returned = turn, {}, {}
        del self._disturber.met[self._before :]
        self._disturber.loop_entered = self

    def end(self, begun: list[Any]) -> Any:
        """What has to be known of a turn once the loop is over, arrays."""
        self._disturber.loop_entered = None
        if self._disturber.noise is not None:
            self.found = {}
        if not self.found:
            return {}, [], {}
        found = {
            number: (found.value, found.mean_square, [list(map(jnp.asarray, layer.known)) for layer in found.layers])
            for number, found in self.found.items()
        }
        return found, begun, self.returned

    def over(self, stacked: Any, turns: TimeLoop) -> list[Any]:
        """Make points of what all turns left, with a first axis of the turns."""
        disturber, (found, begun, returned) = self._disturber, stacked
        for number, (value, squares, known) in found.items():
            layers = [
                replace(layer, known=operands) for layer, operands in zip(self.found[number].layers, known, strict=True)
            ]
            axis = self.found[number].axis
            disturber.found[number] = _Found(axis, value, jnp.mean(squares), layers)
        self.found = {}
        if not found:
            return turns.results
        before = sum(len(loop.turns.results) for loop in disturber.loops)
        disturber.loops.append(Passed(turns, begun, returned, range(self._before, len(disturber.met)), before))
        return [disturber.held.get(("result", before + place), result) for place, result in enumerate(turns.results)]

    def sliced(self, leaf: Tagged, row: Array) -> Tagged:
        """A turn's own slice of a leaf."""
        return self._disturber.sliced(leaf, row, None)


class Passed(NamedTuple):
    """A loop that is over and has layers in it.

    Attributes:
        turns: turns of the loop.
        begun: values that each began with, along a first axis.
        returned: outputs that layers returned themselves, by number, with a first axis of the turns.
        numbers: numbers of its layers.
        before: number of results of the loops before it.
    """

    turns: TimeLoop
    begun: list[Array]
    returned: dict[int, Array]
    numbers: range
    before: int


class Disturber(Watcher):
    """Adds noise to what layers return.

    A layer is an equation that is linear in one parameter: a product, a convolution, a lookup, a scale, a bias. What is
    added to a layer's outputs, such as a bias or those of another layer, is no layer of its own. What a layer in a loop
    returns at all turns counts as what one layer returns, with a first axis of the turns.

    A layer has a number, its place among those of the trace, which is the same with any number of samples.

    Where places are credited apart, what a layer returns may act on other places than its own, as keys and values of
    attention do. A product that mixes places is linear in them, though: noise in what it returns, place by place, says
    as much of the layer, whose point moves there.

    Attributes:
        axis_of: function ``axis_of(number, shape)`` that says along which axis of what a layer returns the samples are;
            None for one to which no noise is added.
        noise: function ``noise(number, shape, dtype)`` of the point's number; None adds none.
        samples: number of samples, where points are moved behind products that mix places; None where not.
        asked: outputs of layers by their numbers, with what is added to them; of loops those of one turn.
        mixing: products that mix places, by the numbers of the points behind them.
        moves: numbers of products before the one that a point moves behind, by the points' numbers; with noise, or
            with what is held.
        held: arrays in the place of what layers return, by number; of those that moved, of what the product returns.
            In the place of what loops return, by "result" and its number among those of all loops with points.
        returned: outputs that they return themselves, by number; of no loop.
        passing: numbers of those that what they read passes through, as a bias or a scale.
        met: shapes of what the layers return, in the order of the trace.
        found: points while the trace is evaluated, those in a loop once it is over.
        loop_entered: loop that is being evaluated, or None.
        loops: loops with points, once they are over; none where there is noise.
        axes: axis of the samples in what each layer returns, by number; None where there is none.
        points: points that were met, by their numbers, once all is evaluated; none where there is noise.
        exact: place among the outputs of each point that is one of them, by the point's number.
        others: names of leaves that were used otherwise too, or in loops in loops.
        formed: names of leaves that went through a function of their own, number by number.
        scaled: names of those whose function has a scale that is computed from the leaf, as if it were a constant.
    """

    def __init__(
        self,
        axis_of: Callable[[int, tuple[int, ...]], int | None],
        noise: Callable[[int, tuple[int, ...], Any], Any] | None = None,
        *,
        samples: int | None = None,
        moves: dict[int, int] | None = None,
        held: Mapping[Held, Array] | None = None,
    ) -> None:
        super().__init__()
        self.axis_of = axis_of
        self.noise = noise
        self.samples = samples
        self.moves: dict[int, int] = {} if moves is None else moves
        self.held: Mapping[Held, Array] = {} if held is None else held
        self.met: list[tuple[int, ...]] = []
        self.found: dict[int, _Found] = {}
        self.loop_entered: _Loop | None = None
        self.loops: list[Passed] = []
        self.axes: dict[int, int | None] = {}
        self.points: dict[int, Point] = {}
        self.exact: dict[int, int] = {}
        self.formed: set[str] = set()
        self.scaled: set[str] = set()
        self.asked: dict[int, Array] = {}
        self.returned: dict[int, Array] = {}
        self.passing: set[int] = set()
        self.mixing: dict[int, Mixing] = {}
        self._axes: dict[int, Axes] = {}
        self._carried: list[_Carried] = []

    def begun(self, trace: Any) -> None:
        """Follow samples and places back through it."""
        if self.samples is not None:
            self._axes = followed_back(trace)

    def loop(self, turns: int, inside: tuple[str, ...]) -> Loop | None:
        """A loop over time, unless it is itself in another, or in a branch."""
        return _Loop(self, turns) if inside == ("scan",) else None

    def sliced(self, leaf: Tagged, row: Array, turn: Any) -> Tagged:
        """A turn's own slice of a leaf."""
        return replace(leaf, value=row, product="", chain=_behind(leaf, _Link(None, turn=turn)))

    def finished(self, results: Sequence[Any]) -> None:
        """Note the points, and those that are outputs, whose gradient is known."""
        for place, value in enumerate(results):
            if isinstance(value, Tagged) and value.product:  # of nothing else: else it has lost its tag
                self.exact[int(value.product)] = place
        if self.noise is None:
            self.points = {number: found.point() for number, found in sorted(self.found.items())}

    def computed(self, value: Tagged) -> None:
        """Note leaves that are used for something else."""
        self.others |= {name for name, _ in value.parts} | (value.vectors or frozenset())

    def tagged(self, eqn: Any, operands: Sequence[Any], results: list[Any], inside: tuple[str, ...]) -> list[Any]:
        """The results of an equation, disturbed where it is a layer."""
        kind = eqn.primitive.name
        if (constants := forming.of_constants(eqn, operands, results)) is not None:
            return list(constants)
        tagged = [value for value in operands if isinstance(value, Tagged)]
        if (made := forming.formed(eqn, operands, results[0], inside)) is not None:
            self.formed.add(made.leaf)
            self.scaled |= {name for value in tagged if not value.leaf for name in value.vectors or ()}
            return [made]
        for value in tagged:
            if value.vectors:  # made of all of a leaf's numbers, and no scale of that leaf alone
                self.computed(value)
        if any(value.leaf and not jnp.issubdtype(value.value.dtype, jnp.floating) for value in tagged):
            for value in tagged:
                self.computed(value)
            return results
        if kind in ARRANGED and len(operands) == 1 and len(results) == 1:
            (value,), (result,) = tagged, results
            # Not behind a transpose: the point's numbers are in another order there.
            kept = value.product if result.size == value.value.size and kind != "transpose" else ""
            note = self._noted(value, _Behind(eqn, 0, [])) if not inside else None
            return [replace(value, value=result, product=kept, chain=_behind(value, _Link(eqn)), carried=note)]
        if kind in _CUTS and tagged[0].leaf and len(tagged) == len(operands):
            (value,) = tagged
            return [Tagged(r, value.leaf, chain=_behind(value, _Link(eqn, 0, i))) for i, r in enumerate(results)]
        if kind == "concatenate" and len(tagged) == len(operands) and all(_is_parameter(value) for value in tagged):
            chain = tuple(part for place, value in enumerate(tagged) for part in _behind(value, _Link(eqn, place)))
            return [Tagged(results[0], ", ".join(name for name, _ in chain), frozenset(), chain=chain)]
        leaves = [place for place, value in enumerate(operands) if isinstance(value, Tagged) and value.leaf]
        is_known_loop = not inside or (inside == ("scan",) and self.loop_entered is not None)
        found = self.found if self.loop_entered is None else self.loop_entered.found
        sums = operands[:1] if kind == "sub" and leaves else operands  # what is subtracted has slopes of another sign
        at = [int(v.product) for v in sums if isinstance(v, Tagged) and v.product and v.value.shape == results[0].shape]
        if kind in _SUMS and not leaves and len(at) == 2 and at[0] != at[1] and {*at} <= {*found}:
            return [self._added(found, at, results[0], -1 if kind == "sub" else 1)]
        if kind in _LINEAR and not leaves and not inside:
            return self._passed(eqn, operands, results)
        if not is_known_loop or kind not in _LAYERS or len(leaves) != 1 or (kind == "gather" and leaves != [0]):
            for place in leaves:
                self.computed(operands[place])
            return results
        (place,), (result,) = leaves, results
        known = [plain(value) for value in operands]
        turns = None if self.loop_entered is None else self.loop_entered.turns
        shape = result.shape if turns is None else (turns, *result.shape)
        layers = [
            _Layer(name, eqn, place, known[:place] + known[place + 1 :], links, shape, result.dtype, turns)
            for name, links in operands[place].parts
        ]
        number = len(self.met)
        self.met.append(shape)
        if kind in _SUMS and at:
            point = found[at[0]]
            value = result.reshape(point.value.shape)
            found[at[0]] = replace(point, value=value, layers=[*point.layers, *layers])
            return [self._layer(result, at[0])]
        self.axes[number] = axis = self.axis_of(number, shape)
        if axis is None:
            self.computed(operands[place])
            return results
        if self.loop_entered is not None:
            self.loop_entered.returned[number] = result
        else:
            self.returned[number] = result
            if number not in self.moves:
                result = self.held.get(number, result)
            if kind not in {"gather", *_PRODUCTS}:
                self.passing.add(number)
        found[number] = _Found(axis, result, jnp.mean(jnp.square(result)), layers)
        if self.noise is not None and number not in self.moves:
            noise = self.noise(number, shape, result.dtype)
            each = noise if self.loop_entered is None or not jnp.ndim(noise) else noise[self.loop_entered.turn]
            result = result + each
        return [self._layer(result, number)]

    def _layer(self, result: Array, number: int) -> Tagged:
        """What lies at a point."""
        self._carried.append(_Carried(number, result.shape))
        self.asked[number] = result
        return Tagged(result, product=str(number), carried=len(self._carried) - 1)

    def _noted(self, value: Tagged, link: _Behind) -> int | None:
        """The number of a note of one more equation behind a layer; None where there was none before."""
        if value.carried is None:
            return None
        carried = self._carried[value.carried]
        self._carried.append(carried._replace(links=(*carried.links, link)))
        return len(self._carried) - 1

    def _passed(self, eqn: Any, operands: Sequence[Any], results: list[Any]) -> list[Any]:
        """The result of an equation that is linear in what a layer returned, whose point may move behind it."""
        (result,), known = results, [plain(value) for value in operands]
        at = {place: v.carried for place, v in enumerate(operands) if isinstance(v, Tagged) and v.carried is not None}
        links = {place: _Behind(eqn, place, known[:place] + known[place + 1 :], known[place]) for place in at}
        for place, note in at.items() if eqn.primitive.name == "dot_general" else ():
            if self._moves(eqn, place, self._carried[note]):
                return [self._moved(self._carried[note], links[place], result)]
        if len(at) != 1 or (eqn.primitive.name == "div" and 0 not in at):
            return results
        ((place, link),) = links.items()
        return [Tagged(result, carried=self._noted(operands[place], link))]

    def _moves(self, eqn: Any, place: int, carried: _Carried) -> bool:
        """Whether a point moves behind a product: if the places of what that returns are the other operand's."""
        samples, places = self._axes.get(id(eqn), Axes(None, None))
        if self.noise is not None:
            return places is not None and self.moves.get(carried.number) == carried.products
        if places is None or carried.number not in self.found or carried.number in self.mixing:
            return False
        has_samples = self.samples == 1 or source(eqn, place, samples) is not None
        return has_samples and source(eqn, place, places) is None

    def _moved(self, carried: _Carried, link: _Behind, result: Array) -> Tagged:
        """What lies behind the product that a point moves to."""
        number, arranged = carried.number, _Arranged(self._axes[id(link.eqn)])
        self.returned[number] = result
        result = self.held.get(number, result)
        value = arranged.apply(result)
        after: tuple[_Behind | _Shaped | _Arranged, ...] = (_Shaped(carried.shape), *carried.links, link, arranged)
        self.mixing[number] = Mixing(self.asked[number], after, carried.products)
        layers = [replace(layer, after=after, shape=value.shape) for layer in self.found[number].layers]
        self.found[number] = _Found(0, value, jnp.mean(jnp.square(value)), layers, (link, arranged))
        if self.noise is None:
            return Tagged(result)
        return Tagged(result + arranged.undone(self.noise(number, value.shape, value.dtype)))

    @staticmethod
    def _added(found: dict[int, _Found], at: Sequence[int], result: Array, sign: int) -> Tagged:
        """Two layers that are added, with one noise for both: there is nothing between them and their sum."""
        first, second = found[at[0]], found.pop(at[1])
        layers = [*first.layers, *(replace(layer, sign=sign * layer.sign) for layer in second.layers)]
        value = result.reshape(first.value.shape)
        found[at[0]] = replace(first, value=value, mean_square=jnp.mean(jnp.square(result)), layers=layers)
        return Tagged(result, product=str(at[0]))


def _behind(value: Tagged, link: _Link) -> tuple[tuple[str, tuple[_Link, ...]], ...]:
    """The same behind one more equation."""
    return tuple((name, (*links, link)) for name, links in value.parts)


def _is_parameter(value: Tagged) -> bool:
    """Whether no inputs are in it."""
    return bool(value.leaf) or value.vectors == frozenset()
