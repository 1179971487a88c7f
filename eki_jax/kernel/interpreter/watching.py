"""What a model does with its parameters, told while its trace is evaluated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jax.extend.core import Literal as Constant

from eki_jax._types import Array
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
        roles: what the product does with the matrix's axes; None for other uses.
        shape: shape (B, ..., g n) of the rows in a product; empty for other uses.
        rows: function that returns the rows, where they are known outside of the loops.
        is_formed: flag, True where the matrix was added up for a product.
    """

    name: str
    how: How
    inside: tuple[str, ...]
    roles: Roles | None = None
    shape: tuple[int, ...] = ()
    rows: Callable[[], Array] | None = None
    is_formed: bool = False


class Addition(NamedTuple):
    """One addition of a bias to the product with a matrix of low rank.

    Attributes:
        matrix: name of the matrix's leaf.
        bias: name of the bias's leaf, or "" where it was computed.
        computed_from: names of the vectors that it was computed from.
    """

    matrix: str
    bias: str
    computed_from: frozenset[str] = frozenset()


class Loop:
    """A loop with a number of turns that is known, as a watcher sees it; this one takes no notice.

    The values that it hands out are arrays of one turn until it is over.
    """

    def begin(self, turn: Any) -> None:
        """The turn of this number begins."""

    def end(self) -> Any:
        """A turn is over; returns a pytree of arrays of it that the loop hands on to :meth:`over`."""

    def over(self, stacked: Any) -> None:
        """The loop is over, and this is what all turns handed on, along a first axis."""

    def sliced(self, leaf: Tagged, row: Array) -> Any:
        """A turn's slice of a leaf, an array that may be tagged."""
        return row


class Watcher:
    """Notes of one evaluation.

    Attributes:
        uses: uses of the matrices, in the order of the trace.
        additions: additions of biases.
        others: names of vectors that were used for something else than to be added to a product.
    """

    def __init__(self) -> None:
        self.uses: list[Use] = []
        self.additions: list[Addition] = []
        self.others: set[str] = set()
        self._in_loops: set[tuple[int, tuple[str, ...]]] = set()

    def seen(self, operands: list[Any], alone: Sequence[bool]) -> list[Any]:
        """The operands of an equation; a product that others have too is no longer one that a bias alone is added to.

        Args:
            operands: values of the equation.
            alone: flags, True for those that no other equation has.
        """
        return [
            replace(value, product="") if isinstance(value, Tagged) and value.product and not is_alone else value
            for value, is_alone in zip(operands, alone, strict=True)
        ]

    def finished(self, results: Sequence[Any]) -> None:
        """Note what became of the model's results."""

    def loop(self, turns: int, inside: tuple[str, ...]) -> Loop | None:
        """What watches a loop in a watcher's place, or None.

        Args:
            turns: number of turns.
            inside: loops and branches around its body, itself the last.
        """
        return None

    def used(self, w: Perturbed, how: How, inside: tuple[str, ...], eqn: Any) -> None:
        """Note a use that is no product."""
        if self._is_new(w, inside, eqn):
            self.uses += [Use(name, how, inside) for name in w.names]

    def multiplied(self, result: Array, product: Product, inside: tuple[str, ...], eqn: Any) -> Any:
        """Note a product, and say of its result whose it is."""
        w = product.w
        if not self._is_new(w, inside, eqn):
            return result
        if not w.whole or product.roles is None:
            how: How = "formed" if product.is_formed else "other product" if w.whole else "part"
            self.uses += [Use(name, how, inside) for name in w.names]
            return result
        (name,) = w.names
        rows = None if inside else product.rows
        self.uses.append(Use(name, "product", inside, product.roles, product.shape, rows, product.is_formed))
        return Tagged(result, product=name)

    def computed(self, value: Tagged) -> None:
        """Note that a vector was used for something else than to be added to a product."""
        self.others |= value.vectors or set()

    def tagged(self, eqn: Any, operands: Sequence[Any], results: list[Any], inside: tuple[str, ...]) -> list[Any]:
        """The results of an equation without perturbed operands, with what is known of them."""
        kind = eqn.primitive.name
        if kind in ARRANGED and len(results) == len(operands):
            return [_arranged(new, old) for new, old in zip(results, operands, strict=True)]
        known = [value if isinstance(value, Tagged) else Tagged(value) for value in operands]
        layers = [value.product for value in known if value.product]
        if kind in ("add", "add_any") and layers:
            for value in known:
                if value.leaf:
                    self.additions.append(Addition(layers[0], value.leaf))
                elif value.vectors and value.value.size > 1:
                    self.additions.append(Addition(layers[0], "", value.vectors))
                elif value.vectors:
                    self.computed(value)
            if all(value.product or value.vectors is not None for value in known):
                return [Tagged(result, product=layers[0]) for result in results]
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

    def _is_new(self, w: Perturbed, inside: tuple[str, ...], eqn: Any) -> bool:
        """Whether it was not noted before: JAX may trace a loop's body more than once."""
        key = (id(eqn), w.names)
        if inside and key in self._in_loops:
            return False
        self._in_loops.add(key)
        return True


def _arranged(new: Any, old: Any) -> Any:
    """A result that is the operand but for its shape and dtype."""
    if not isinstance(old, Tagged) or not jnp.issubdtype(new.dtype, jnp.floating):
        return new
    return replace(old, value=new)
