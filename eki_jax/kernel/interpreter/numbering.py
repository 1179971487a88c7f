"""Where in an array the numbers of a leaf lie, or what comes out of a matrix: followed through whatever arranges it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

#: A digit of an index: how many values it has, and by how much it moves the number.
Digit = tuple[int, int]


class Numbering(NamedTuple):
    """Which number lies where, the same for two arrays that may be added number by number.

    An index of an axis is written in digits, the first one the largest. The number that lies in a place is the sum of
    all digits times their steps; a step of 0 is that of copies, of samples and of places.

    Attributes:
        axes: digits of each axis, those that go on with one another as one.
        turns: loops of which a turn has a slice: the loop's depth and the digits of its turn.
    """

    axes: tuple[tuple[Digit, ...], ...]
    turns: tuple[tuple[int, tuple[Digit, ...]], ...] = ()

    @classmethod
    def of(cls, axes: Iterable[Sequence[Digit]], turns: Iterable[tuple[int, Sequence[Digit]]] = ()) -> Numbering:
        """A numbering by its digits.

        >>> Numbering.of([[(2, 3), (3, 1)], [(4, 0)]])
        Numbering(axes=(((6, 1),), ((4, 0),)), turns=())
        """
        return cls(tuple(map(_merged, axes)), tuple((depth, _merged(digits)) for depth, digits in turns))

    @classmethod
    def in_order(cls, shape: Sequence[int]) -> Numbering:
        """That of an array itself, row by row.

        >>> Numbering.in_order((2, 3))
        Numbering(axes=(((2, 3),), ((3, 1),)), turns=())
        """
        return cls.of([digit] for digit in counted(shape))

    def after(self, eqn: Any) -> Numbering | None:
        """That behind an equation that arranges an array; None where no digits say it."""
        kind, old, new = eqn.primitive.name, eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
        if kind == "transpose":
            return self._replace(axes=tuple(self.axes[axis] for axis in eqn.params["permutation"]))
        if kind == "broadcast_in_dim":
            places = eqn.params["broadcast_dimensions"]
            axes = [self.axes[places.index(axis)] if axis in places else () for axis in range(len(new))]
            return self._replace(axes=tuple(axes)).spread(new)
        if kind in ("reshape", "squeeze", "expand_dims"):
            in_order = kind != "reshape" or eqn.params["dimensions"] is None
            return self._reshaped(old, new) if in_order and 0 not in new else None
        return self

    def spread(self, shape: Sequence[int]) -> Numbering:
        """That of an array whose axes of one index become as long as these sizes; one number has none yet.

        >>> Numbering.in_order((1, 3)).spread((2, 3))
        Numbering(axes=(((2, 0),), ((3, 1),)), turns=())
        """
        axes = zip(self.axes or [()] * len(shape), shape, strict=True)
        return self.of((own or [(size, 0)] for own, size in axes), self.turns)

    def at_turn(self, depth: int) -> Numbering:
        """That of the slice along the first axis that a loop takes at a turn."""
        first, *rest = self.axes
        return Numbering(tuple(rest), (*self.turns, (depth, first)))

    def _reshaped(self, old: Sequence[int], new: Sequence[int]) -> Numbering | None:
        axes: list[Sequence[Digit]] = [()] * len(new)
        for before, after in same_numbers(old, new):
            digits = list(_merged(digit for axis in before for digit in self.axes[axis]))
            for axis in after:
                taken = _taken(digits, new[axis])
                if taken is None:
                    return None
                axes[axis] = taken
        return self.of(axes, self.turns)


def same_numbers(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The smallest groups of axes before and after a reshape that have the same numbers.

    >>> same_numbers((6, 4), (2, 3, 4))
    [([0], [0, 1]), ([1], [2])]
    """
    groups: list[tuple[list[int], list[int]]] = []
    before, after = list(range(len(old))), list(range(len(new)))
    while before or after:
        olds, news = [before.pop(0)] if before else [], [after.pop(0)] if after else []
        while (a := math.prod(old[i] for i in olds)) != (b := math.prod(new[i] for i in news)):
            if a < b:
                olds.append(before.pop(0))
            else:
                news.append(after.pop(0))
        groups.append((olds, news))
    return groups


def counted(sizes: Sequence[int]) -> list[Digit]:
    """Digits of these sizes that count.

    >>> counted((2, 3, 4))
    [(2, 12), (3, 4), (4, 1)]
    """
    step, digits = 1, []
    for size in reversed(sizes):
        digits.append((size, step))
        step *= size
    return digits[::-1]


def _merged(digits: Iterable[Digit]) -> tuple[Digit, ...]:
    found: list[Digit] = []
    for size, step in digits:
        if found and found[-1][1] == size * step:
            size *= found.pop()[0]
        if size != 1:
            found.append((size, step))
    return tuple(found)


def _taken(digits: list[Digit], size: int) -> list[Digit] | None:
    """The first digits, which make an axis of that size, taken from a list; None where none do."""
    taken: list[Digit] = []
    while size > 1:
        own, step = digits.pop(0)
        if size % own and own % size:
            return None
        if own > size:
            digits.insert(0, (own // size, step))
            own, step = size, step * (own // size)
        taken.append((own, step))
        size //= own
    return taken
