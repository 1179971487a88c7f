"""What a model does with its parameters, told while its trace is evaluated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jax.extend.core import Literal as Constant

from eki_jax._types import Array
from eki_jax.kernel.interpreter.numbering import Numbering
from eki_jax.kernel.interpreter.products import Product, Roles
from eki_jax.kernel.interpreter.shapes import ARRANGED
from eki_jax.kernel.interpreter.values import Perturbed, Tagged

#: Uses of a matrix: a product with rows; one with a part of it (or with it and others); another product, that
#: multiplies no rows; rows of its own; the sum of mean and perturbation.
How = Literal["product", "part", "other product", "rows", "formed"]


class Use(NamedTuple):
    """One use of a matrix of low rank.

    Attributes:
        name: name of the leaf.
        how: kind of the use.
        inside: loops, branches and other functions around it that cannot be read in line, the outermost first.
        roles: roles of the matrix's axes in a product; None for other uses.
        shape: sizes (B, ..., g n) of the rows in a product, (B, T, ..., g n) in loops; empty for other uses.
        rows: function that returns the rows, where they are known outside of the loops: in scans they are.
        turns: numbers of turns of the scans around it.
        sliced: depths of those that hand it a slice of the leaf at a turn.
        is_formed: flag, True where the matrix was added up for a product.
    """

    name: str
    how: How
    inside: tuple[str, ...]
    roles: Roles | None = None
    shape: tuple[int, ...] = ()
    rows: Callable[[], Array] | None = None
    turns: frozenset[int] = frozenset()
    sliced: frozenset[int] = frozenset()
    is_formed: bool = False


class Turn(NamedTuple):
    """What a scan's body is seen to do in one turn.

    Attributes:
        met: numbers of times that each product was met: a function may be called twice.
        rows: rows of the products, in their order, by the place of the use among all.
    """

    met: Counter[Any]
    rows: dict[int, Array]


class Addition(NamedTuple):
    """One addition of a bias to the product with a matrix of low rank.

    Attributes:
        matrix: name of the matrix's leaf.
        bias: name of the bias's leaf, or "" where it was computed.
        computed_from: names of the vectors that it was computed from.
        in_order: flag, True where its numbers lie as what comes out of the matrix does.
    """

    matrix: str
    bias: str
    computed_from: frozenset[str] = frozenset()
    in_order: bool = False


class Loop:
    """A loop with a number of turns that is known, as a watcher sees it; this one takes no notice.

    The values that it hands out are arrays of one turn until it is over.
    """

    def begin(self, turn: Any) -> None:
        """The turn of this number begins."""

    def end(self, begun: list[Any]) -> Any:
        """A turn is over; returns a pytree of arrays of it that the loop hands on to :meth:`over`.

        Args:
            begun: values that the turn began with, of what changes from turn to turn.
        """

    def over(self, stacked: Any, turns: Any) -> list[Any]:
        """The loop is over; returns its results.

        Args:
            stacked: arrays that all turns handed on, along a first axis.
            turns: turns, as they can be evaluated again.
        """
        return list(turns.results)

    def sliced(self, leaf: Tagged, row: Array) -> Any:
        """A turn's slice of a leaf, an array that may be tagged."""
        return row


class Watcher:
    """Notes of one evaluation.

    Attributes:
        uses: uses of the matrices, in the order of the trace.
        additions: additions of biases.
        others: names of vectors that were used for something else than to be added to a product.
        turns: turns of the scans that are being traced, the innermost last.
        spread: mapped axes over which what it adds to values varies.
    """

    def __init__(self) -> None:
        self.uses: list[Use] = []
        self.additions: list[Addition] = []
        self.others: set[str] = set()
        self._in_loops: dict[Any, int] = {}
        self.turns: list[Turn] = []
        self.spread: frozenset[str] = frozenset()

    def seen(self, operands: list[Any], alone: Sequence[bool]) -> list[Any]:
        """The operands of an equation; a product that others have too is no longer one that a bias alone is added to.

        Args:
            operands: values of the equation.
            alone: flags, True for those that no other equation has.
        """
        return [
            replace(value, product="", carried=None)
            if isinstance(value, Tagged) and not is_alone and (value.product or value.carried is not None)
            else value
            for value, is_alone in zip(operands, alone, strict=True)
        ]

    def begun(self, trace: Any) -> None:
        """Look at the trace before it is evaluated."""

    def finished(self, results: Sequence[Any]) -> None:
        """Note what became of the model's results."""

    def loop(self, turns: int, inside: tuple[str, ...]) -> Loop | None:
        """What watches a loop in a watcher's place, or None.

        Args:
            turns: number of turns.
            inside: loops and branches around its body, itself the last.
        """
        return Looped(self, inside[:-1])

    def sliced(self, leaf: Tagged, row: Array, turn: Any) -> Any:
        """The slice of a leaf that a loop takes at a turn, where a turn is evaluated by itself."""
        return row

    def used(self, w: Perturbed, how: How, inside: tuple[str, ...], eqn: Any) -> None:
        """Note a use that is no product."""
        if self._place(w, inside, eqn)[1]:
            self.uses += [Use(name, how, inside) for name in w.names]

    def multiplied(self, result: Array, product: Product, inside: tuple[str, ...], eqn: Any) -> Any:
        """Note a product, and say of its result whose it is."""
        w = product.w
        place, is_new = self._place(w, inside, eqn)
        if not w.whole or product.roles is None:
            how: How = "formed" if product.is_formed else "other product" if w.whole and not w.turns else "part"
            self.uses += [Use(name, how, inside) for name in w.names if is_new]
            return result
        (name,) = w.names
        if is_new:
            rows = None if inside else product.rows
            sliced = frozenset(turns.depth for turns in w.turns)
            use = Use(
                name, "product", inside, product.roles, product.shape, rows, frozenset(), sliced, product.is_formed
            )
            self.uses.append(use)
        if product.rows is not None and len(self.turns) == len(inside) > 0:
            self.turns[-1].rows[place] = product.rows()
        return Tagged(result, product=name, numbering=product.numbering) if is_new else result

    def computed(self, value: Tagged) -> None:
        """Note that a vector was used for something else than to be added to a product."""
        self.others |= value.vectors or set()

    def tagged(self, eqn: Any, operands: Sequence[Any], results: list[Any], inside: tuple[str, ...]) -> list[Any]:
        """The results of an equation without perturbed operands, with what is known of them."""
        kind = eqn.primitive.name
        if kind in ARRANGED and len(results) == len(operands):
            return [_arranged(eqn, new, old) for new, old in zip(results, operands, strict=True)]
        known = [value if isinstance(value, Tagged) else Tagged(value) for value in operands]
        layers = [value for value in known if value.product]
        if kind in ("add", "add_any") and layers:
            layer, numbering = layers[0].product, _spread(layers[0], results[0])
            for value in known:
                if value.leaf:
                    in_order = numbering is not None and numbering == _spread(value, results[0])
                    self.additions.append(Addition(layer, value.leaf, in_order=in_order))
                elif value.vectors and value.value.size > 1:
                    self.additions.append(Addition(layer, "", value.vectors))
                elif value.vectors:
                    self.computed(value)
            if all(value.product or value.vectors is not None for value in known):
                return [Tagged(result, product=layer, numbering=numbering) for result in results]
            return results
        for value in known:
            if value.leaf:
                self.others.add(value.leaf)
        of = [
            frozenset[str]() if isinstance(atom, Constant) else value.vectors
            for atom, value in zip(eqn.invars, known, strict=True)
        ]
        if any(vectors is None for vectors in of):
            for value in known:
                self.computed(value)
            return results
        vectors = frozenset[str]().union(*(vectors for vectors in of if vectors is not None))
        return [Tagged(result, vectors=vectors) for result in results]

    def _place(self, w: Perturbed, inside: tuple[str, ...], eqn: Any) -> tuple[int, bool]:
        """The place of a use among all, and whether it was not noted before: JAX may trace a loop's body twice."""
        if not inside:
            return len(self.uses), True
        key: Any = (id(eqn), w.names, inside)
        if self.turns:
            met = self.turns[-1].met
            met[key] += 1
            key = (*key, met[key])
        is_new = key not in self._in_loops
        return self._in_loops.setdefault(key, len(self.uses)), is_new


class Looped(Loop):
    """A scan whose products' rows are handed out of it, all turns together.

    Attributes:
        watcher: watcher of the model.
        around: loops and branches around the scan.
    """

    def __init__(self, watcher: Watcher, around: tuple[str, ...]) -> None:
        self.watcher, self.around = watcher, around

    def begin(self, turn: Any) -> None:
        """Watch a turn, which JAX may trace more than once."""
        self.watcher.turns.append(Turn(Counter(), {}))

    def end(self, begun: list[Any]) -> dict[int, Array]:
        """The rows of the products in the turn, by their uses' places."""
        return self.watcher.turns.pop().rows

    def over(self, stacked: dict[int, Array], turns: Any) -> list[Any]:
        """Note the rows of all turns, each place's with an axis of them first."""
        uses, around = self.watcher.uses, self.watcher.turns
        for place, rows in stacked.items():
            of_loops = uses[place].turns | {len(rows)}
            if len(self.around) in uses[place].sliced:  # rows of several matrices, which lie side by side
                rows = jnp.moveaxis(rows, 0, -2)
                rows = rows.reshape(*rows.shape[:-2], -1)
            else:
                rows = jnp.moveaxis(rows, 0, 1)
            known = None if self.around else (lambda rows=rows: rows)
            uses[place] = uses[place]._replace(shape=rows.shape, rows=known, turns=of_loops)
            if len(around) == len(self.around) > 0:
                around[-1].rows[place] = rows
        return list(turns.results)

    def sliced(self, leaf: Tagged, row: Array) -> Tagged:
        """A turn's own slice of a vector."""
        numbering = None if leaf.numbering is None else leaf.numbering.at_turn(len(self.around))
        return replace(leaf, value=row, numbering=numbering)


def _spread(value: Tagged, total: Array) -> Numbering | None:
    """Where the numbers of one operand lie in the sum."""
    return None if value.numbering is None else value.numbering.spread(total.shape)


def _arranged(eqn: Any, new: Any, old: Any) -> Any:
    """A result that is the operand but for its shape and dtype."""
    if not isinstance(old, Tagged) or not jnp.issubdtype(new.dtype, jnp.floating):
        return new
    return replace(old, value=new, numbering=None if old.numbering is None else old.numbering.after(eqn))
