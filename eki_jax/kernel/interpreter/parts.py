"""Parts of a trace: what a result depends on, and that result alone."""

from __future__ import annotations

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
        known: dict[Any, Any] = dict(zip(trace.jaxpr.constvars, trace.consts, strict=True))
        known |= dict(zip(trace.jaxpr.invars, inputs, strict=True))
        value = lambda atom: atom.val if isinstance(atom, Constant) else known[atom]
        for eqn in trace.jaxpr.eqns:
            operands, bodies = list(map(value, eqn.invars)), bodies_of(eqn)
            if eqn.primitive.name in CALLS and bodies:
                body = bodies[0] if isinstance(bodies[0], ClosedJaxpr) else ClosedJaxpr(bodies[0], ())
                found = evaluated(body, *operands)
            else:
                found = bound(eqn, *operands)
                found = found if eqn.primitive.multiple_results else [found]
            known |= dict(zip(eqn.outvars, found, strict=True))
        return list(map(value, trace.jaxpr.outvars))

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
    known: dict[Any, Any] = dict(zip(trace.jaxpr.constvars, trace.consts, strict=True))
    known |= dict(zip(trace.jaxpr.invars, inputs, strict=True))
    value = lambda atom: atom.val if isinstance(atom, Constant) else known[atom]
    for eqn in _needed(trace, wanted):
        found = bound(eqn, *map(value, eqn.invars))
        known |= dict(zip(eqn.outvars, found if eqn.primitive.multiple_results else [found], strict=True))
    return value(wanted)


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
