"""What a model does with its matrices of low rank: told by the matrices, read from the model's trace.

A matrix tells by an equation in the trace, which gives its factors back as they are. The trace is read with its calls
in line, so that a layer inside of ``jax.jit`` or ``jax.checkpoint`` tells as much as any other, and evaluated with the
operands of the products as additional results.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Primitive
from jax.extend.core import Literal as Constant
from jax.interpreters import ad, batching, mlir

from eki_jax._types import Array

#: Uses of a matrix: a product ``x @ w``; that of a convolution without an axis of samples; a grouped convolution; rows;
#: its transpose; the sum of mean and perturbation; a product that is differentiated; factors with an axis of particles.
How = Literal["product", "unbatched", "grouped", "rows", "transposed", "formed", "differentiated", "mapped"]

# Calls that are their body, and calls that are it for whoever does not differentiate or map them.
_CALLS = {"jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint"}
_CUSTOM_CALLS = {"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr", "custom_vmap_call"}
# Equations behind which a leaf is still that leaf: for the numbers that one adds up or multiplies by, a cast is none.
_SAME = {
    "convert_element_type",
    "copy",
    "copy_p",
    "device_put",
    "name",
    "optimization_barrier",
    "pcast",
    "pvary",
    "sharding_constraint",
    "stop_gradient",
}
_SAME_VECTOR = {*_SAME, "broadcast_in_dim", "expand_dims", "reshape", "squeeze"}


class Use(NamedTuple):
    """One use of a matrix of low rank.

    Attributes:
        name: name of the leaf.
        how: kind of the use.
        rows: operand's shape (B, ..., n) in a product; empty for other uses.
        inside: loops, branches and other functions around it that cannot be read in line, the outermost first.
    """

    name: str
    how: How
    rows: tuple[int, ...]
    inside: tuple[str, ...]


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


class Leaf(NamedTuple):
    """A leaf of the parameters, or one of the three arrays of a matrix of low rank.

    Attributes:
        name: name of the leaf.
        part: place in it.
    """

    name: str
    part: Literal["vector", "mean", "left", "right"]

    @property
    def is_factor(self) -> bool:
        """Whether it is half of a perturbation, with which nothing but a product makes sense."""
        return self.part in ("left", "right")


class Watched(NamedTuple):
    """A model's trace for the mean particle.

    Attributes:
        trace: the trace, a function of ``leaves``.
        leaves: arrays of the particle.
        structure: structure of the outputs.
        uses: uses of the matrices, in the order of the trace.
        additions: additions of biases.
    """

    trace: ClosedJaxpr
    leaves: list[Array]
    structure: Any
    uses: tuple[Use, ...]
    additions: tuple[Addition, ...]

    @property
    def samples(self) -> int:
        """B, the length of the outputs' first axis; 0 where they have none."""
        shapes = [aval.shape for aval in self.trace.out_avals]
        return int(shapes[0][0]) if shapes and shapes[0] else 0

    def evaluate(self, wanted: set[str]) -> tuple[Any, dict[str, Array]]:
        """The outputs, and what each of the named matrices multiplies, shape (B, ..., n)."""
        found: dict[str, Array] = {}
        flat = _evaluated(self.trace.jaxpr, self.trace.consts, self.leaves, wanted, found)
        return self.structure.unflatten(flat), found


def watch(call: Callable[[Any], Any], particle: Any, origins: Sequence[Leaf]) -> Watched:
    """Trace ``call(particle)`` and read what it does.

    Args:
        call: function of the particle.
        particle: parameters with matrices of low rank that tell.
        origins: name and place of each of its arrays, in the order of ``jax.tree.leaves``.

    Raises:
        TypeError: a matrix of low rank whose factors were changed one by one; it is named.
    """
    leaves = jax.tree.leaves(particle)
    structure: Any = jax.tree.structure(particle)
    outputs: list[Any] = []

    def traced(*leaves: Array) -> list[Any]:
        flat, found = jax.tree.flatten(call(structure.unflatten(leaves)))
        outputs.append(found)
        return flat

    trace = jax.make_jaxpr(traced)(*leaves)
    reader = _Reader()
    reader.read(trace.jaxpr, [_Known(origin, _named(origin)) for origin in origins], ())
    return Watched(trace, leaves, outputs[-1], tuple(reader.uses), tuple(reader.additions))


def tell_use(
    left: Array,
    mean: Array,
    right: Array,
    *,
    name: str,
    how: How,
    operand: Array | None = None,
    rows: Callable[[Array], Array] | None = None,
    bias: str | None = None,
) -> tuple[Array, Array, Array]:
    """The factors as they are, and an equation that tells of their use: the use is to be made with what comes back.

    Args:
        left: left factor, shape (..., n, r).
        mean: matrix, shape (..., n, k).
        right: right factor, shape (k, r).
        name: name of the leaf.
        how: kind of the use.
        operand: array that a product multiplies, or that from which ``rows`` makes it.
        rows: function of the operand that returns the rows, shape (B, ..., n); the operand itself by default.
        bias: key of the vector that is added, beside the leaf; None for none.
    """
    operands = () if operand is None else (operand,)
    left, mean, right = _use.bind(left, mean, right, *operands, name=name, how=how, rows=rows, bias=bias)
    return left, mean, right


def tell_bias(bias: Array, *, matrix: str) -> Array:
    """The bias as it is, and an equation that tells that it is added to the product with a matrix."""
    return _bias.bind(jnp.asarray(bias), matrix=matrix)


_use = Primitive("low_rank_use")
_use.multiple_results = True
_use.def_impl(lambda *args, **params: list(args[:3]))
_use.def_abstract_eval(lambda *avals, **params: list(avals[:3]))
mlir.register_lowering(_use, lambda context, *args, **params: list(args[:3]))


def _use_of_a_batch(args: Any, axes: Any, *, how: How, rows: Any, **params: Any) -> Any:
    """A map over samples gives the operand their axis; one over the factors leaves no matrix of low rank."""
    operands = [jnp.moveaxis(x, axis, 0) for x, axis in zip(args[3:], axes[3:], strict=True) if axis is not None]
    if any(axis is not None for axis in axes[:3]):
        how, operands = "mapped", list(args[3:])
    elif rows is not None:
        rows = jax.vmap(rows)
    how = "product" if how == "unbatched" else how
    return _use.bind(*args[:3], *operands, how=how, rows=rows, **params), axes[:3]


def _use_differentiated(primals: Any, tangents: Any, *, how: How, **params: Any) -> Any:
    """Whoever differentiates in the operand multiplies by the matrix once more."""
    return _use.bind(*primals, how="differentiated", **params), list(tangents[:3])


batching.primitive_batchers[_use] = _use_of_a_batch
ad.primitive_jvps[_use] = _use_differentiated

_bias = Primitive("low_rank_bias")
_bias.def_impl(lambda bias, **params: bias)
_bias.def_abstract_eval(lambda aval, **params: aval)
mlir.register_lowering(_bias, lambda context, bias, **params: [bias])
# One bias for each sample is none of the parameters; whoever differentiates in it adds it all the same.
batching.primitive_batchers[_bias] = lambda args, axes, **params: (_bias.bind(1 * args[0], **params), axes[0])
ad.primitive_jvps[_bias] = lambda primals, tangents, **params: (_bias.bind(*primals, **params), tangents[0])


class _Known(NamedTuple):
    """What is known of a variable of the trace.

    Attributes:
        leaf: leaf that it is; None for what was computed, "unknown" where it cannot be told.
        vectors: names of the vectors that it depends on.
    """

    leaf: Leaf | Literal["unknown"] | None = None
    vectors: frozenset[str] = frozenset()


_UNKNOWN = _Known("unknown")


class _Reader:
    """Follows the leaves through a trace.

    Attributes:
        uses: uses of the matrices that were met.
        additions: additions of biases.
    """

    def __init__(self) -> None:
        self.uses: list[Use] = []
        self.additions: list[Addition] = []

    def read(self, jaxpr: Jaxpr, args: Sequence[_Known], inside: tuple[str, ...]) -> list[_Known]:
        """What is known of the results, from what is known of the arguments."""
        known: dict[Any, _Known] = dict(zip(jaxpr.invars, args, strict=True))
        of = lambda atom: _Known() if isinstance(atom, Constant) else known.get(atom, _Known())
        for eqn in jaxpr.eqns:
            results = self._equation(eqn, [of(atom) for atom in eqn.invars], inside)
            known.update(zip(eqn.outvars, results, strict=True))
        return [of(atom) for atom in jaxpr.outvars]

    def _equation(self, eqn: Any, args: list[_Known], inside: tuple[str, ...]) -> list[_Known]:
        vectors = frozenset().union(*(arg.vectors for arg in args))
        computed = [_Known(None, vectors)] * len(eqn.outvars)
        if eqn.primitive is _use:
            self._use(eqn, args, inside)
            return computed
        if eqn.primitive is _bias:
            self._addition(eqn.params["matrix"], args[0])
            return computed
        if _bodies(eqn):
            return self._call(eqn, args, inside) or computed
        if _keeps(eqn, args):
            return args
        _refuse_factors(args)
        return computed

    def _use(self, eqn: Any, args: list[_Known], inside: tuple[str, ...]) -> None:
        name, how, rows = eqn.params["name"], eqn.params["how"], ()
        own = Leaf(name, "left"), Leaf(name, "mean"), Leaf(name, "right")
        if how == "mapped" or any(arg.leaf not in (leaf, "unknown") for arg, leaf in zip(args, own, strict=False)):
            raise _changed(name)
        if len(eqn.invars) > 3:
            rows = jax.eval_shape(eqn.params["rows"] or (lambda x: x), _abstract(eqn.invars[3])).shape
        self.uses.append(Use(name, how, rows, inside))
        if eqn.params["bias"] is not None:
            self.additions.append(Addition(name, beside(name, eqn.params["bias"])))

    def _addition(self, matrix: str, bias: _Known) -> None:
        if isinstance(bias.leaf, Leaf):
            self.additions.append(Addition(matrix, bias.leaf.name))
        elif bias.vectors:
            self.additions.append(Addition(matrix, "", bias.vectors))

    def _call(self, eqn: Any, args: list[_Known], inside: tuple[str, ...]) -> list[_Known] | None:
        """Read the bodies; what is known of the results where it is more than of any other equation's."""
        kind, bodies = eqn.primitive.name, _bodies(eqn)
        if kind in _CALLS | _CUSTOM_CALLS:
            return self.read(bodies[0], args, inside)
        within = (*inside, kind)
        if kind == "scan":
            # What goes through a loop as it is: first what is fixed, then what is carried. The rest is a slice a turn.
            carried = _unsliced(eqn.invars, bodies[0].invars)
            fixed = carried - _unsliced(eqn.outvars, bodies[0].outvars)
            _refuse_factors(args[carried:])  # a slice of a factor is another factor
            sliced = [_Known(None, arg.vectors) for arg in args[carried:]]
            results = self.read(bodies[0], args[:carried] + sliced, within)
            return _carried(args[fixed:carried], results)
        if kind == "while":
            conditions, fixed = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
            carry = args[conditions + fixed :]
            self.read(_open(eqn.params["cond_jaxpr"]), args[:conditions] + carry, within)
            return _carried(carry, self.read(_open(eqn.params["body_jaxpr"]), args[conditions:], within))
        if kind == "cond":
            for body in bodies:
                self.read(body, args[1:], within)
        elif len(bodies) == 1 and len(bodies[0].invars) == len(args):
            self.read(bodies[0], args, within)
        else:
            for body in bodies:
                self.read(body, [_UNKNOWN] * len(body.invars), within)
        return None


def _evaluated(
    jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any], wanted: set[str], found: dict[str, Array]
) -> list[Any]:
    """The values of a trace; what the wanted matrices multiply comes into ``found``."""
    values: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
    of = lambda atom: atom.val if isinstance(atom, Constant) else values[atom]
    for eqn in jaxpr.eqns:
        operands, kind = [of(atom) for atom in eqn.invars], eqn.primitive.name
        results: Any = None
        if eqn.primitive is _use:
            name, rows = eqn.params["name"], eqn.params["rows"]
            if name in wanted:
                found[name] = operands[3] if rows is None else rows(operands[3])
            results = operands[:3]
        elif eqn.primitive is _bias:
            results = operands
        elif kind in _CALLS | _CUSTOM_CALLS and _tells(_bodies(eqn)[0]):
            (body,) = [value for value in eqn.params.values() if isinstance(value, Jaxpr | ClosedJaxpr)]
            closed = body.consts if isinstance(body, ClosedJaxpr) else ()
            results = _evaluated(_open(body), closed, operands, wanted, found)
        if results is None or kind in _CUSTOM_CALLS:  # whose results keep their own derivatives
            with eqn.ctx.manager:
                results = eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(eqn.params))
            results = results if eqn.primitive.multiple_results else [results]
        values.update(zip(eqn.outvars, results, strict=True))
    return [of(atom) for atom in jaxpr.outvars]


def beside(matrix: str, key: str) -> str:
    """The name of the leaf with that key in the dictionary that holds the matrix.

    >>> beside("['Dense_0']['kernel']", "bias")
    "['Dense_0']['bias']"
    """
    return f"{matrix[: matrix.rindex('[')]}[{key!r}]"


def _bodies(eqn: Any) -> list[Jaxpr]:
    """The traces that an equation holds."""
    params = [param if isinstance(param, tuple | list) else [param] for param in eqn.params.values()]
    return [_open(value) for values in params for value in values if isinstance(value, Jaxpr | ClosedJaxpr)]


def _open(jaxpr: Jaxpr | ClosedJaxpr) -> Jaxpr:
    return jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr


def _tells(jaxpr: Jaxpr) -> bool:
    return any(eqn.primitive in (_use, _bias) or any(map(_tells, _bodies(eqn))) for eqn in jaxpr.eqns)


def _keeps(eqn: Any, args: list[_Known]) -> bool:
    """Whether an equation's results are its arguments for everything that is done with them here."""
    if len(eqn.outvars) != len(args) or any(arg.leaf is None for arg in args):
        return False
    vectors = all(isinstance(arg.leaf, Leaf) and arg.leaf.part == "vector" for arg in args)
    same = eqn.primitive.name in (_SAME_VECTOR if vectors else _SAME)
    pairs = zip(eqn.invars, eqn.outvars, strict=True)
    return same and all(
        math.prod(old.aval.shape) == math.prod(new.aval.shape) and jnp.issubdtype(new.aval.dtype, jnp.floating)
        for old, new in pairs
    )


def _unsliced(outside: Sequence[Any], inside: Sequence[Any]) -> int:
    """How many variables have as many axes inside of a loop as outside."""
    return sum(len(a.aval.shape) == len(b.aval.shape) for a, b in zip(outside, inside, strict=True))


def _carried(before: list[_Known], after: list[_Known]) -> list[_Known]:
    """What is known of a loop's results; a factor may be carried along, but not changed."""
    _refuse_factors([old for old, new in zip(before, after, strict=False) if old.leaf != new.leaf])
    vectors = frozenset().union(*(known.vectors for known in [*before, *after]))
    same = [old.leaf == new.leaf for old, new in zip(before, after, strict=False)]
    same += [False] * (len(after) - len(before))
    return [known if is_same else _Known(None, vectors) for known, is_same in zip(after, same, strict=True)]


def _refuse_factors(args: Sequence[_Known]) -> None:
    for arg in args:
        if isinstance(arg.leaf, Leaf) and arg.leaf.is_factor:
            raise _changed(arg.leaf.name)


def _changed(name: str) -> TypeError:
    return TypeError(
        f"forward: computes with the factors of the leaf {name}, a LowRankMatrix: jax.tree.map and jax.tree.leaves "
        "meet its mean and its two factors one by one, and what is done to each is not done to the matrix; wanted "
        "products with it as it is, its name in low_rank(..., plain=...), or formed=True"
    )


def _named(origin: Leaf) -> frozenset[str]:
    return frozenset([origin.name] if origin.part == "vector" else [])


def _abstract(atom: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(atom.aval.shape, atom.aval.dtype)
