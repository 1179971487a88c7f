"""Parts of a function's trace: what a result depends on, and that result alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, reduce
from operator import or_
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr
from jax.extend.core import Literal as Constant

from eki_jax.kernel.interpreter.binding import bound
from eki_jax.kernel.interpreter.calls import CALLS, bodies_of


class Trace(NamedTuple):
    """A trace of a function of arrays, without calls of other functions.

    Attributes:
        eqns: equations, in order.
        inputs: variables that are the function's arguments.
        results: variables, or constants, that are its results.
        known: values of other variables.
    """

    eqns: Sequence[Any]
    inputs: Sequence[Any]
    results: Sequence[Any]
    known: dict[Any, Any]

    @classmethod
    def of(cls, fn: Callable[..., Any], *arguments: Any) -> Trace:
        """The trace of a function; only shapes and dtypes of the arguments matter.

        >>> trace = Trace.of(jax.jit(lambda x: (2 * x, x + 1)), 1.0)
        >>> [eqn.primitive.name for eqn in trace.eqns]
        ['mul', 'add']
        """
        closed = jax.make_jaxpr(fn)(*arguments)
        closed = jax.make_jaxpr(partial(_inlined, closed))(*closed.in_avals)
        jaxpr = closed.jaxpr
        return cls(jaxpr.eqns, jaxpr.invars, jaxpr.outvars, dict(zip(jaxpr.constvars, closed.consts, strict=True)))

    def of_one(self, place: int, values: Sequence[Any]) -> Trace:
        """The trace as one of one input alone, the others having these values.

        >>> trace = Trace.of(lambda x, y: x - y, 1.0, 2.0).of_one(1, [1.0, 2.0])
        >>> float(trace.result(0, 5.0))
        -4.0
        """
        others = dict(zip(self.inputs, values, strict=True))
        return self._replace(inputs=[self.inputs[place]], known=self.known | others)

    def needed(self) -> list[list[bool]]:
        """By the results, flags of the inputs, True for those that a result depends on.

        >>> Trace.of(lambda x, y: (2 * x, x + y), 1.0, 2.0).needed()
        [[True, False], [True, True]]
        """
        # One pass, with a bit for each input.
        needs = {variable: 1 << place for place, variable in enumerate(self.inputs)}
        need = lambda atom: 0 if isinstance(atom, Constant) else needs.get(atom, 0)
        for eqn in self.eqns:
            needs |= dict.fromkeys(eqn.outvars, reduce(or_, map(need, eqn.invars), 0))
        return [[bool(need(atom) >> place & 1) for place in range(len(self.inputs))] for atom in self.results]

    def depending(self, number: int) -> list[tuple[Any, list[int]]]:
        """The equations through which one result depends on the inputs, in order, and which operands of theirs do.

        >>> [(e.primitive.name, places) for e, places in Trace.of(lambda x: (x + 1, 2 / x + x), 1.0).depending(1)]
        [('div', [1]), ('add', [0, 1])]
        """
        depending, found = {*self.inputs}, []
        for eqn in self._before(self.results[number]):
            places = [p for p, atom in enumerate(eqn.invars) if not isinstance(atom, Constant) and atom in depending]
            if places:
                depending.update(eqn.outvars)
                found.append((eqn, places))
        return found

    def behind(self, variable: Any) -> Trace:
        """The same as one of one of the variables, whose value is given.

        >>> trace = Trace.of(lambda x: 3 * (x * x), 2.0)
        >>> float(trace.behind(trace.eqns[0].outvars[0]).result(0, 5.0))
        15.0
        """
        return self._replace(eqns=[eqn for eqn in self.eqns if variable not in eqn.outvars], inputs=[variable])

    def depends(self, number: int, variable: Any) -> bool:
        """Whether one result depends on a variable.

        >>> trace = Trace.of(lambda x: 3 * (x * x), 2.0)
        >>> trace.depends(0, trace.inputs[0]), trace.behind(trace.eqns[0].outvars[0]).depends(0, trace.inputs[0])
        (True, False)
        """
        atoms = (atom for eqn in self._before(self.results[number]) for atom in eqn.invars)
        return any(atom is variable for atom in (self.results[number], *atoms))

    def result(self, number: int, *inputs: Any) -> Any:
        """One result, from those of the equations that it depends on.

        >>> float(Trace.of(lambda x: (2 * x, x + 1), 1.0).result(1, 3.0))
        4.0
        """
        return self.value(self.results[number], *inputs)

    def value(self, wanted: Any, *inputs: Any) -> Any:
        """The value of one variable or constant, from those of the equations that it depends on.

        >>> trace = Trace.of(lambda x: 3 * (x + 1), 2.0)
        >>> [float(trace.value(atom, 5.0)) for atom in trace.eqns[1].invars]
        [3.0, 6.0]
        """
        known = self.known | dict(zip(self.inputs, inputs, strict=True))
        for eqn in self._before(wanted):
            _evaluate(eqn, known)
        return _read(wanted, known)

    def _before(self, wanted: Any) -> list[Any]:
        """The equations that a variable needs, in order."""
        needed, found = set() if isinstance(wanted, Constant) else {wanted}, []
        for eqn in reversed(self.eqns):
            if needed.intersection(eqn.outvars):
                needed.update(atom for atom in eqn.invars if not isinstance(atom, Constant))
                found.append(eqn)
        return found[::-1]


def _inlined(trace: ClosedJaxpr, *inputs: Any) -> list[Any]:
    """The results of a trace, with the equations of the functions that it calls in the place of the calls."""
    known = dict(zip(trace.jaxpr.constvars, trace.consts, strict=True))
    known |= dict(zip(trace.jaxpr.invars, inputs, strict=True))
    for eqn in trace.jaxpr.eqns:
        bodies = bodies_of(eqn)
        if eqn.primitive.name in CALLS and bodies:
            body = bodies[0] if isinstance(bodies[0], ClosedJaxpr) else ClosedJaxpr(bodies[0], ())
            operands = (_read(atom, known) for atom in eqn.invars)
            known |= dict(zip(eqn.outvars, _inlined(body, *operands), strict=True))
        else:
            _evaluate(eqn, known)
    return [_read(atom, known) for atom in trace.jaxpr.outvars]


def _read(atom: Any, known: dict[Any, Any]) -> Any:
    return atom.val if isinstance(atom, Constant) else known[atom]


def _evaluate(eqn: Any, known: dict[Any, Any]) -> None:
    found = bound(eqn, *(_read(atom, known) for atom in eqn.invars))
    known.update(zip(eqn.outvars, found if eqn.primitive.multiple_results else [found], strict=True))
