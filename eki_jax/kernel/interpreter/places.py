"""The axes of samples and of places, followed back from a model's outputs through its trace.

Where a model mixes places, as attention does, a value has two axes that are as long: of those that ask, whose outputs
change with it, and of those that are asked. The outputs' own axis leads back to the former.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.extend.core import Literal as Constant

from eki_jax.kernel.interpreter.calls import CALLS
from eki_jax.kernel.interpreter.numbering import same_numbers
from eki_jax.kernel.interpreter.shapes import ARRANGED

# Equations whose axes are not the operands' in any order that is known here.
_UNKNOWN = {"gather", "scatter", "scatter-add", "scan", "while", "cond", "sort", "fft", "custom_linear_solve"}


class Axes(NamedTuple):
    """Where a value has its samples and places: the numbers of the axes, or None for one that it has not."""

    samples: int | None
    places: int | None


def followed_back(trace: Any) -> dict[int, Axes]:
    """The axes of every equation's first result that reaches the outputs, by the equation's ``id``.

    Args:
        trace: trace of a model whose outputs have the samples as their first axis and the places as their second.

    An equation of a function that is called twice has axes if both calls agree on them.
    """
    found: dict[int, Axes] = {}
    jaxpr = trace.jaxpr if isinstance(trace, ClosedJaxpr) else trace
    _back(jaxpr, [Axes(0, 1) if len(atom.aval.shape) > 1 else None for atom in jaxpr.outvars], found)
    return found


def _back(jaxpr: Jaxpr, ends: Sequence[Axes | None], found: dict[int, Axes]) -> list[Axes | None]:
    """The axes of a trace's inputs from those of its results."""
    known: dict[Any, Axes] = {}

    def note(atom: Any, axes: Axes | None) -> None:
        # The first to say: of several uses that which is nearest to the outputs.
        if axes is not None and axes != (None, None) and not isinstance(atom, Constant):
            known.setdefault(atom, axes)

    for atom, axes in zip(jaxpr.outvars, ends, strict=True):
        note(atom, axes)
    for eqn in reversed(jaxpr.eqns):
        ends_here = [known.get(atom) for atom in eqn.outvars]
        axes = ends_here[0]
        bodies = [value for value in eqn.params.values() if isinstance(value, Jaxpr | ClosedJaxpr)]
        if eqn.primitive.name in CALLS and bodies:
            body = bodies[0].jaxpr if isinstance(bodies[0], ClosedJaxpr) else bodies[0]
            for atom, starts in zip(eqn.invars, _back(body, ends_here, found), strict=True):
                note(atom, starts)
        elif axes is not None:
            found[id(eqn)] = axes if found.get(id(eqn), axes) == axes else Axes(None, None)
            for number, atom in enumerate(eqn.invars):
                note(atom, Axes(*(source(eqn, number, axis) for axis in axes)))
    return [known.get(atom) for atom in jaxpr.invars]


def source(eqn: Any, operand: int, axis: int | None) -> int | None:
    """The axis of an operand that becomes an axis of the equation's result; None for none."""
    old, new = eqn.invars[operand].aval.shape, eqn.outvars[0].aval.shape
    kind, params = eqn.primitive.name, eqn.params
    if axis is None or kind in _UNKNOWN:
        return None
    if kind == "dot_general":
        return _of_product(params["dimension_numbers"], operand, len(eqn.invars[0].aval.shape), len(old), axis)
    if kind == "conv_general_dilated":
        numbers = params["dimension_numbers"]
        place = numbers.out_spec.index(axis)
        return numbers.lhs_spec[place] if operand == 0 and place != 1 else None
    if kind == "transpose":
        return params["permutation"][axis]
    if kind == "broadcast_in_dim":
        places = params["broadcast_dimensions"]
        own = places.index(axis) if axis in places else None
        return own if own is not None and old[own] == new[axis] else None
    if kind in ARRANGED and old != new:
        groups = [[i for i in before if old[i] != 1] for before, after in same_numbers(old, new) if axis in after]
        own = groups[0][0] if groups and len(groups[0]) == 1 else None
        return own if own is not None and old[own] == new[axis] else None
    if "axes" in params and len(old) == len(new) + len(params["axes"]):  # a reduction
        return [i for i in range(len(old)) if i not in params["axes"]][axis]
    return axis if len(old) == len(new) and old[axis] == new[axis] else None


def _of_product(numbers: Any, operand: int, rank_of_first: int, rank: int, axis: int) -> int | None:
    contracting, batch = numbers
    if axis < len(batch[0]):
        return batch[operand][axis]
    free = [i for i in range(rank) if i not in (*contracting[operand], *batch[operand])]
    free_of_first = rank_of_first - len(contracting[0]) - len(batch[0])
    place = axis - len(batch[0]) - (free_of_first if operand else 0)
    return free[place] if 0 <= place < len(free) else None
