"""The evaluation of a trace, its calls, branches and loops included."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.extend.core import Literal as Constant

from eki_jax.kernel.interpreter import binding, products, shapes
from eki_jax.kernel.interpreter.binding import varying, varying_over
from eki_jax.kernel.interpreter.values import Perturbed, Tagged, Turns, plain
from eki_jax.kernel.interpreter.watching import Loop, Watcher

# Calls that are their body, for whoever does not differentiate or map them.
CALLS = {"jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint"}
CALLS |= {"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr", "custom_vmap_call"}
PRODUCTS = {"dot_general": products.dot_general, "conv_general_dilated": products.conv_general_dilated}


def interpreted(
    forward: Callable[..., Any], params: Any, values: Sequence[Any], inputs: Any, watcher: Watcher | None = None
) -> Any:
    """``forward(params, *inputs)``, evaluated with other values in the places of the parameters.

    Args:
        forward: function of parameters and inputs.
        params: pytree of arrays that it is traced with.
        values: list of what takes their places, in the order of ``jax.tree.leaves``: arrays, or :class:`Perturbed`
            of the same shapes and dtypes.
        inputs: inputs, a tuple.
        watcher: listener that is told of what becomes of the values, or None.

    Returns:
        The outputs, as arrays.
    """
    return evaluated(Interpreter(watcher), forward, (params, *inputs), [*values, *jax.tree.leaves(inputs)])


def on_devices(forward: Callable[..., Any], params: Any, *inputs: Any) -> Any:
    """``forward(params, *inputs)`` in a mapped function, where a model with a loop of its own could not be called.

    ``jax.shard_map`` knows which values differ from device to device, and asks of a loop that it carries on what it
    begins with. Zeros that a recurrent network begins with are the same on all devices, what it carries on is not.
    """
    if not varying(jax.tree.leaves((params, inputs))):
        return forward(params, *inputs)
    return interpreted(forward, params, jax.tree.leaves(params), inputs)


def evaluated(interpreter: Interpreter, fn: Callable[..., Any], args: tuple[Any, ...], values: Sequence[Any]) -> Any:
    """``fn(*args)``, evaluated by an interpreter with these values in the places of the arguments' leaves."""
    structures: list[Any] = []

    def flat(*args: Any) -> list[Any]:
        found, structure = jax.tree.flatten(fn(*args))
        structures.append(structure)
        return found

    # Of shapes alone: the values may be spread over devices, of which the function's own constants know nothing.
    trace = jax.make_jaxpr(flat)(*jax.tree.map(_shape, args))
    if interpreter.watcher is not None:
        interpreter.watcher.begun(trace)
    results = interpreter.closed(trace, values, ())
    if interpreter.watcher is not None:
        interpreter.watcher.finished(results)
    return structures[-1].unflatten(interpreter.added_up(results, ()))


def _shape(value: Any) -> jax.ShapeDtypeStruct:
    kind: Any = jax.typeof(value)
    return jax.ShapeDtypeStruct(kind.shape, kind.dtype, weak_type=kind.weak_type)


class Interpreter:
    """Evaluates traces; what it meets with a value that is no array it does by its own rules."""

    def __init__(self, watcher: Watcher | None) -> None:
        self.watcher = watcher

    def closed(self, closed: Any, args: Sequence[Any], inside: tuple[str, ...]) -> list[Any]:
        """The results of a trace with its constants."""
        consts = closed.consts if isinstance(closed, ClosedJaxpr) else ()
        jaxpr: Jaxpr = closed.jaxpr if isinstance(closed, ClosedJaxpr) else closed
        if self.watcher is not None:
            consts = [Tagged(const, vectors=frozenset()) for const in consts]
        values: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
        read = lambda atom: atom.val if isinstance(atom, Constant) else values[atom]
        # Of how many equations a value is an operand: what a product is added to says something where it is one.
        used = Counter(atom for eqn in jaxpr.eqns for atom in eqn.invars if not isinstance(atom, Constant))
        used.update(atom for atom in jaxpr.outvars if not isinstance(atom, Constant))
        for eqn in jaxpr.eqns:
            operands = [read(atom) for atom in eqn.invars]
            if self.watcher is not None:
                alone = [isinstance(atom, Constant) or used[atom] == 1 for atom in eqn.invars]
                operands = self.watcher.seen(operands, alone)
            values.update(zip(eqn.outvars, self.equation(eqn, operands, inside), strict=True))
        results = [read(atom) for atom in jaxpr.outvars]
        if self.watcher is None:
            return results
        return self.watcher.seen(results, [isinstance(atom, Constant) or used[atom] == 1 for atom in jaxpr.outvars])

    def equation(self, eqn: Any, operands: list[Any], inside: tuple[str, ...]) -> list[Any]:
        """The results of an equation; ``inside`` names the loops that it is in."""
        kind, bodies = eqn.primitive.name, bodies_of(eqn)
        is_plain = not any(isinstance(value, Perturbed | Tagged) for value in operands)
        if is_plain and not (bodies and varying(operands)):
            results = self.bound(eqn, operands)
            of_nothing = self.watcher is not None and all(isinstance(atom, Constant) for atom in eqn.invars)
            return [Tagged(result, vectors=frozenset()) for result in results] if of_nothing else results
        if kind in CALLS and bodies:
            if self.watcher is not None:  # inside nothing else would say that they are constants
                pairs = zip(eqn.invars, operands, strict=True)
                operands = [Tagged(v, vectors=frozenset()) if isinstance(a, Constant) else v for a, v in pairs]
            return self.closed(bodies[0], operands, inside)
        if kind in LOOPS:
            return LOOPS[kind](self, eqn, operands, (*inside, kind))
        if not any(isinstance(value, Perturbed) for value in operands):
            return self._told(eqn, operands, self.bound(eqn, [plain(value) for value in operands]), inside)
        known = [value if isinstance(value, Perturbed) else plain(value) for value in operands]
        if kind in shapes.SAME and len(known) == len(eqn.outvars):
            return [self._same(eqn, value) for value in known]
        result = self._by_rule(eqn, known, inside)
        if result is not None:
            return result if eqn.primitive.multiple_results else [result]
        if self.watcher is not None:
            for value in known:
                if isinstance(value, Perturbed):
                    self.watcher.used(value, "formed", (*inside, *([kind] if bodies else [])), eqn)
        return self.bound(eqn, [plain(value) for value in known])

    def _by_rule(self, eqn: Any, operands: list[Any], inside: tuple[str, ...]) -> Any:
        """The result of an equation with a perturbed operand; None where it must be added up."""
        kind = eqn.primitive.name
        if kind in PRODUCTS:
            if all(isinstance(value, Perturbed) for value in operands):
                operands = [*self.added_up(operands[:1], inside), operands[1]]
            found = PRODUCTS[kind](eqn, operands)
            if found is None:
                return None
            result, product = found
            return result if self.watcher is None else self.watcher.multiplied(result, product, inside, eqn)
        if kind == "gather":
            rows = products.gather(eqn, operands)
            if rows is not None and self.watcher is not None:
                self.watcher.used(operands[0], "rows", inside, eqn)
            return rows
        rule = shapes.RULES.get(kind)
        return None if rule is None else rule(eqn, operands)

    def _same(self, eqn: Any, value: Any) -> Any:
        """A value behind an equation that leaves it what it is."""
        own = lambda x: self.bound(eqn, [x])[0]
        if not isinstance(value, Perturbed):
            return own(value)
        # The factors are of another shape, and may be spread over devices already.
        placed = eqn.primitive.name in ("device_put", "sharding_constraint", "pvary", "pcast")
        left, right = (value.left, value.right) if placed else (own(value.left), own(value.right))
        return replace(value, mean=own(value.mean), left=left, right=right)

    def _told(self, eqn: Any, operands: list[Any], results: list[Any], inside: tuple[str, ...]) -> list[Any]:
        return results if self.watcher is None else self.watcher.tagged(eqn, operands, results, inside)

    def added_up(self, values: Sequence[Any], inside: tuple[str, ...]) -> list[Any]:
        """Arrays, for what takes nothing else."""
        if self.watcher is not None:
            for value in values:
                if isinstance(value, Perturbed):
                    self.watcher.used(value, "formed", inside, value)
                elif isinstance(value, Tagged):
                    self.watcher.computed(value)
        return [plain(value) for value in values]

    def start(self, values: Sequence[Any], operands: Sequence[Any], inside: tuple[str, ...]) -> list[Any]:
        """What a loop begins with: spread over the devices over which it will be."""
        axes = varying(jax.tree.leaves(list(operands)))
        if self.watcher is not None:
            axes |= self.watcher.spread
        return [varying_over(value, axes) for value in self.added_up(values, inside)]

    @staticmethod
    def bound(eqn: Any, operands: Sequence[Any]) -> list[Any]:
        """The results of an equation with arrays for its operands."""
        if eqn.primitive.name == "pvary":  # here values may vary already
            return [varying_over(value, frozenset(eqn.params["axes"])) for value in operands]
        results = binding.bound(eqn, *operands)
        return list(results) if eqn.primitive.multiple_results else [results]


def _scan(self: Interpreter, eqn: Any, operands: list[Any], inside: tuple[str, ...]) -> list[Any]:
    """A loop that is handed what is fixed, what is carried, and a slice a turn of the rest."""
    (body,) = bodies_of(eqn)
    carried = _unsliced(eqn.invars, body.jaxpr.invars)
    fixed = carried - _unsliced(eqn.outvars, body.jaxpr.outvars)
    # What a loop carries on as it is, is fixed.
    same = [old is new for old, new in zip(body.jaxpr.invars[fixed:carried], body.jaxpr.outvars, strict=False)]
    own = operands[fixed:carried]
    start = self.start([value for value, is_same in zip(own, same, strict=True) if not is_same], operands, inside)
    options = {name: eqn.params[name] for name in ("length", "reverse", "unroll")}
    loop = None if self.watcher is None else self.watcher.loop(options["length"], inside)
    slices = [_Slices.of(self, value, inside, loop) for value in operands[carried:]]
    # A turn adds to no product that all of them share.
    shared = [replace(value, product="") if isinstance(value, Tagged) else value for value in operands[:carried]]

    def turn(carry: list[Any], step: tuple[Any, list[Any]]) -> tuple[list[Any], tuple[list[Any], Any]]:
        number, rows = step
        if loop is not None:
            loop.begin(number)
        all_carried = _carried(shared[fixed:], same, carry)
        parts = [piece.at(row) for piece, row in zip(slices, rows, strict=True)]
        results = self.closed(body, [*shared[:fixed], *all_carried, *parts], inside)
        after = [value for value, is_same in zip(results, same, strict=False) if not is_same]
        after, rest = self.added_up(after, inside), self.added_up(results[len(own) :], inside)
        return after, (rest, None if loop is None else loop.end(carry))

    numbers = None if loop is None else jnp.arange(options["length"])
    end, (stacked, handed_on) = lax.scan(turn, start, (numbers, [piece.rows for piece in slices]), **options)
    results = _carried(own, same, end) + list(stacked)
    if loop is None:
        return results
    rows = [piece.rows for piece in slices]
    leaves = [value if isinstance(value, Tagged) and value.leaf else None for value in operands[carried:]]
    return loop.over(handed_on, TimeLoop(body, shared, same, start, rows, leaves, results, options["reverse"]))


class TimeLoop(NamedTuple):
    """A loop over time, whose turns can be evaluated again, one by one.

    Attributes:
        body: trace of a turn.
        shared: values that are the same at every turn, and in their places what the loop begins with of the others.
        same: flags of what is carried on, True for what no turn changes.
        start: values that the loop begins with, of what turns change.
        rows: arrays of which a turn has a slice along the first axis.
        leaves: leaves that they are; None for others.
        results: results of the loop: what it ends with, and what every turn handed out.
        reverse: flag, True where the last slice comes first.
    """

    body: Any
    shared: list[Any]
    same: list[bool]
    start: list[Any]
    rows: list[Any]
    leaves: list[Tagged | None]
    results: list[Any]
    reverse: bool

    @property
    def is_flat(self) -> bool:
        """Whether no loop or branch is in it."""
        return not _has_loops(self.body)

    @property
    def given(self) -> list[Any]:
        """What it begins with, and what turns have slices of."""
        return [*self.start, *self.rows]

    @property
    def moving(self) -> list[int]:
        """The places, among the results, of what turns change or hand out."""
        return [place for place in range(len(self.results)) if not (place < len(self.same) and self.same[place])]

    def at(self, turn: Any, begun: Sequence[Any], row: Sequence[Any], watcher: Watcher) -> list[Any]:
        """What one turn changes and hands out.

        Args:
            turn: number of the turn.
            begun: values that it begins with, like ``start``.
            row: slices of the turn.
            watcher: listener.
        """
        pairs = zip(self.leaves, row, strict=True)
        row = [value if leaf is None else watcher.sliced(leaf, value, turn) for leaf, value in pairs]
        fixed = len(self.shared) - len(self.same)
        carried = _carried(self.shared[fixed:], self.same, begun)
        results = Interpreter(watcher).closed(self.body, [*self.shared[:fixed], *carried, *row], ())
        watcher.finished(results)
        return [plain(results[place]) for place in self.moving]


def _has_loops(body: Any) -> bool:
    return any(eqn.primitive.name in LOOPS or any(map(_has_loops, bodies_of(eqn))) for eqn in body.eqns)


class _Slices:
    """A value of which a loop takes a slice a turn.

    Attributes:
        rows: pytree of arrays with the loop's axis first.
        at: function that makes the turn's value of the turn's rows.
    """

    def __init__(self, rows: Any, at: Callable[[Any], Any]) -> None:
        self.rows, self.at = rows, at

    @classmethod
    def of(cls, interpreter: Interpreter, value: Any, inside: tuple[str, ...], loop: Loop | None) -> _Slices:
        """Of layers that lie one behind the other only the factor with that axis is sliced."""
        if isinstance(value, Tagged) and value.leaf and loop is not None:
            return cls(value.value, lambda row: loop.sliced(value, row))
        if not isinstance(value, Perturbed):
            return cls(interpreter.added_up([value], inside)[0], lambda row: row)
        axes = value.left_axes
        turns = (*value.turns, Turns(len(inside) - 1, value.shape[0], 0 in axes))
        own = replace(value, left_axes=tuple(axis - 1 for axis in axes if axis > 0), turns=turns)
        if 0 in axes:
            return cls((own.mean, own.left), lambda row: replace(own, mean=row[0], left=row[1]))
        return cls((own.mean, own.right), lambda row: replace(own, mean=row[0], right=row[1]))


def _while(self: Interpreter, eqn: Any, operands: list[Any], inside: tuple[str, ...]) -> list[Any]:
    """A loop with a condition, both of which may close over values."""
    conditions, fixed = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    test, body = eqn.params["cond_jaxpr"], eqn.params["body_jaxpr"]
    own = operands[conditions + fixed :]
    invars, outvars = body.jaxpr.invars[fixed:], body.jaxpr.outvars
    same = [old is new for old, new in zip(invars, outvars, strict=True)]
    start = self.start([value for value, is_same in zip(own, same, strict=True) if not is_same], operands, inside)

    def turn(carry: Any) -> Any:
        carried = _carried(own, same, carry)
        results = self.closed(body, [*operands[conditions : conditions + fixed], *carried], inside)
        return self.added_up([new for new, is_same in zip(results, same, strict=True) if not is_same], inside)

    def goes_on(carry: Any) -> Any:
        return plain(self.closed(test, [*operands[:conditions], *_carried(own, same, carry)], inside)[0])

    return _carried(own, same, lax.while_loop(goes_on, turn, start))


def _carried(own: list[Any], same: list[bool], moved: Sequence[Any]) -> list[Any]:
    """All that a loop carries: what it carries on as it is, and in the other places what it moved."""
    moving = iter(moved)
    return [value if is_same else next(moving) for value, is_same in zip(own, same, strict=True)]


def _cond(self: Interpreter, eqn: Any, operands: list[Any], inside: tuple[str, ...]) -> list[Any]:
    """Branches, each of which may close over values."""
    index, *args = operands
    branch = lambda body: lambda: self.added_up(self.closed(body, args, inside), inside)
    return lax.switch(*self.added_up([index], inside), [branch(body) for body in eqn.params["branches"]])


LOOPS: dict[str, Callable[..., list[Any]]] = {"scan": _scan, "while": _while, "cond": _cond}


def bodies_of(eqn: Any) -> list[Any]:
    """The traces that an equation holds."""
    params = [param if isinstance(param, tuple | list) else [param] for param in eqn.params.values()]
    return [value for values in params for value in values if isinstance(value, Jaxpr | ClosedJaxpr)]


def _unsliced(outside: Sequence[Any], inside: Sequence[Any]) -> int:
    """How many variables have as many axes inside of a loop as outside."""
    return sum(len(a.aval.shape) == len(b.aval.shape) for a, b in zip(outside, inside, strict=True))
