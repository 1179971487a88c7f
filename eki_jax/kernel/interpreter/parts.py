"""Parts of a trace: what a result depends on, and that result alone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr
from jax.extend.core import Literal as Constant

from eki_jax.kernel.interpreter.binding import bound
from eki_jax.kernel.interpreter.calls import CALLS, bodies_of


def inlined(trace: ClosedJaxpr) -> ClosedJaxpr:
    """The trace with the equations of the functions that it calls in the place of the calls.

    >>> import jax
    >>> trace = inlined(jax.make_jaxpr(jax.jit(lambda x: 2 * x + 1))(1.0))
    >>> [eqn.primitive.name for eqn in trace.eqns]
    ['mul', 'add']
    """

    def evaluated(trace: ClosedJaxpr, *inputs: Any) -> list[Any]:
        values = _Values(trace, inputs)
        for eqn in trace.jaxpr.eqns:
            bodies = bodies_of(eqn)
            if eqn.primitive.name in CALLS and bodies:
                body = bodies[0] if isinstance(bodies[0], ClosedJaxpr) else ClosedJaxpr(bodies[0], ())
                values.known |= dict(zip(eqn.outvars, evaluated(body, *map(values.of, eqn.invars)), strict=True))
            else:
                values.find(eqn)
        return list(map(values.of, trace.jaxpr.outvars))

    return jax.make_jaxpr(partial(evaluated, trace))(*trace.in_avals)


def inputs_needed(trace: ClosedJaxpr) -> list[list[bool]]:
    """By the results of a trace, flags of its inputs, True for those that a result depends on.

    >>> import jax
    >>> inputs_needed(jax.make_jaxpr(lambda x, y: (2 * x, x + y))(1.0, 2.0))
    [[True, False], [True, True]]
    """

    def flags(result: Any) -> list[bool]:
        needed = {result}.union(*(_variables(eqn.invars) for eqn in _needed(trace, result)))
        return [variable in needed for variable in trace.jaxpr.invars]

    return [flags(atom) for atom in trace.jaxpr.outvars]


def equations_between(trace: ClosedJaxpr, number: int) -> list[Any]:
    """The equations through which one result of a trace depends on its inputs, in order.

    >>> import jax
    >>> [eqn.primitive.name for eqn in equations_between(jax.make_jaxpr(lambda x: (2 * x, x + 1))(1.0), 1)]
    ['add']
    """
    return [eqn for eqn, _ in depending_operands(trace, number)]


def depending_operands(trace: ClosedJaxpr, number: int) -> list[tuple[Any, list[int]]]:
    """The same equations, each with the places of the operands that depend on the inputs.

    >>> import jax
    >>> [places for _, places in depending_operands(jax.make_jaxpr(lambda x: 2 / x + x)(1.0), 0)]
    [[1], [0, 1]]
    """
    depending, found = set(trace.jaxpr.invars), []
    for eqn in _needed(trace, trace.jaxpr.outvars[number]):
        places = [p for p, atom in enumerate(eqn.invars) if not isinstance(atom, Constant) and atom in depending]
        if places:
            depending.update(eqn.outvars)
            found.append((eqn, places))
    return found


def one_result(trace: ClosedJaxpr, number: int, *inputs: Any) -> Any:
    """One result of a trace, from those of its equations that it depends on.

    >>> import jax
    >>> float(one_result(jax.make_jaxpr(lambda x: (2 * x, x + 1))(1.0), 1, 3.0))
    4.0
    """
    return value_of(trace, trace.jaxpr.outvars[number], *inputs)


def value_of(trace: ClosedJaxpr, wanted: Any, *inputs: Any) -> Any:
    """One value in a trace, a variable or a constant, from those of its equations that it depends on."""
    values = _Values(trace, inputs)
    for eqn in _needed(trace, wanted):
        values.find(eqn)
    return values.of(wanted)


class _Values:
    """The values of a trace's variables, as far as they are known."""

    def __init__(self, trace: ClosedJaxpr, inputs: Sequence[Any]) -> None:
        self.known: dict[Any, Any] = dict(zip(trace.jaxpr.constvars, trace.consts, strict=True))
        self.known |= dict(zip(trace.jaxpr.invars, inputs, strict=True))

    def of(self, atom: Any) -> Any:
        """The value of a variable or a constant."""
        return atom.val if isinstance(atom, Constant) else self.known[atom]

    def find(self, eqn: Any) -> None:
        """Evaluate an equation."""
        found = bound(eqn, *map(self.of, eqn.invars))
        self.known |= dict(zip(eqn.outvars, found if eqn.primitive.multiple_results else [found], strict=True))


def _needed(trace: ClosedJaxpr, result: Any) -> list[Any]:
    """The equations that a result needs, in order."""
    needed, found = {result}, []
    for eqn in reversed(trace.jaxpr.eqns):
        if needed.intersection(eqn.outvars):
            needed.update(_variables(eqn.invars))
            found.append(eqn)
    return found[::-1]


def _variables(atoms: Any) -> set[Any]:
    return {atom for atom in atoms if not isinstance(atom, Constant)}
