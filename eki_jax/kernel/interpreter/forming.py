"""Leaves that reach the samples through a function of their own, number by number, such as one that rounds them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Literal as Constant

from eki_jax._types import Array
from eki_jax.kernel.interpreter.binding import bound
from eki_jax.kernel.interpreter.values import Tagged, plain

# Equations each of whose numbers is made of the numbers in its place.
# fmt: off
_ELEMENTWISE = {
    "abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2", "atanh", "cbrt", "ceil",
    "clamp", "convert_element_type", "copy", "cos", "cosh", "div", "eq", "erf", "erf_inv", "erfc", "exp", "exp2",
    "expm1", "floor", "ge", "gt", "integer_pow", "is_finite", "le", "log", "log1p", "logistic", "lt", "max", "min",
    "mul", "ne", "neg", "not", "or", "pow", "reduce_precision", "rem", "round", "rsqrt", "select_n", "sign", "sin",
    "sinh", "sqrt", "square", "stop_gradient", "sub", "tan", "tanh", "xor",
}
# fmt: on
# Equations that make numbers of all of a leaf's, such as the scale by which it is rounded.
_REDUCTIONS = {"reduce_max", "reduce_min", "reduce_sum", "reduce_prod"}
# Spacings of differences, in units of the leaf's size; the first that says what the next one says is taken.
_SPACINGS = tuple(4.0**power for power in range(-4, 5))
_AGREES = 0.1  # squared distance of the slopes at two spacings, as a share of their squared size
_WIDE = 2.0  # the spacing where none agree with the next, as of signs


@dataclass(frozen=True, eq=False)
class Formed:
    """What was made of a leaf, an equation for each number: a link of the chain from the leaf to its layer.

    Attributes:
        eqn: equation; None for the leaf itself, as the links before arranged it.
        operands: others of these, or arrays that no leaf and no sample is in.
    """

    eqn: Any = None
    operands: tuple[Any, ...] = ()

    def apply(self, value: Array, turn: Any) -> Array:
        """What becomes of the leaf, with slopes that are found by differences in the place of derivatives."""
        del turn
        here = lax.stop_gradient(value)
        return self.of(here) + slopes(self.of, here) * (value - here)

    def of(self, value: Array) -> Array:
        """What is made of a value."""
        return self._of(value, {})

    def _of(self, value: Array, known: dict[int, Array]) -> Array:
        if self.eqn is None:
            return value
        if id(self) not in known:
            parts = [part._of(value, known) if isinstance(part, Formed) else part for part in self.operands]
            known[id(self)] = bound(self.eqn, *parts)
        return known[id(self)]


def slopes(function: Callable[[Array], Array], value: Array) -> Array:
    """Slopes of a function of each number by itself, at a value: central differences, none of them a derivative.

    They are those of the smallest spacing that agrees with one four times as wide: for a smooth function a small
    one, for one that rounds about a step, so that numbers in the middle of a step have slopes too. Where no two agree,
    as of a sign, the spacing is twice the root mean square of the numbers.

    >>> rounded = lambda w: jnp.round(10 * w) / 10
    >>> w = jax.random.normal(jax.random.key(0), (1000,))
    >>> bool(jnp.all(jnp.abs(slopes(rounded, w) - 1) < 0.5)), bool(jnp.allclose(slopes(jnp.exp, w), jnp.exp(w), 0.01))
    (True, True)
    """
    size = jnp.sqrt(jnp.mean(jnp.square(value)))
    unit = jnp.where(size > 0, size, 1)

    def difference(spacing: Any) -> Array:
        s = spacing * unit
        return (function(value + s) - function(value - s)) / (2 * s)

    def wider(carry: tuple[Array, Array, Array], spacing: Array) -> tuple[tuple[Array, Array, Array], None]:
        before, chosen, is_found = carry
        now = difference(spacing)
        whole = jnp.sum(jnp.square(now))
        agrees = (jnp.sum(jnp.square(now - before)) <= _AGREES * whole) & (whole > 0)
        chosen = jnp.where(agrees & ~is_found, (before + now) / 2, chosen)
        return (now, chosen, is_found | agrees), None

    first, *others = _SPACINGS
    start = difference(first), difference(_WIDE), jnp.sum(0 * value) != 0
    (_, chosen, _), _ = lax.scan(wider, start, jnp.asarray(others, value.dtype))
    return chosen


def origins(atom: Any, value: Any) -> frozenset[str] | None:
    """Names of the leaves of which an operand has all numbers in each of its own, such as a scale; none for a constant.

    None where it is itself made of a leaf number by number, or has samples in it.
    """
    if isinstance(value, Tagged):
        return None if value.leaf else value.vectors
    return frozenset() if isinstance(atom, Constant) else None


def is_formed(value: Any) -> bool:
    """Whether a value was made of a leaf."""
    return isinstance(value, Tagged) and any(links and isinstance(links[-1], Formed) for _, links in value.parts)


def formed(eqn: Any, operands: Sequence[Any], result: Array, inside: tuple[str, ...]) -> Tagged | None:
    """The result of an equation that makes a number of each number of one leaf; None where it does something else."""
    leaves = [value for value in operands if _is_leaf(value)]
    if eqn.primitive.name not in _ELEMENTWISE or not leaves or any(len(value.chain) > 1 for value in leaves):
        return None
    is_cast = eqn.primitive.name in ("convert_element_type", "copy") and jnp.issubdtype(result.dtype, jnp.floating)
    if is_cast and not is_formed(leaves[0]):
        return None  # it only arranges the leaf
    others = [(atom, value) for atom, value in zip(eqn.invars, operands, strict=True) if not _is_leaf(value)]
    if not all(origins(atom, value) in (frozenset(), {name for name, _ in leaves[0].parts}) for atom, value in others):
        return None
    if inside and any(isinstance(plain(value), jax.core.Tracer) for _, value in others):
        return None  # it would be of a turn of the loop
    nodes: list[Any] = []
    bases: list[tuple[str, Any]] = []
    for value in operands:
        if not _is_leaf(value):
            nodes.append(plain(value))
            continue
        ((name, links),) = value.parts
        is_made = bool(links) and isinstance(links[-1], Formed)
        nodes.append(links[-1] if is_made else _ITSELF)
        bases.append((name, links[:-1] if is_made else links))
        if value.value.shape != result.shape:
            return None
    if any(base != bases[0] for base in bases):
        return None
    name, links = bases[0]
    return Tagged(result, name, chain=((name, (*links, Formed(eqn, tuple(nodes)))),))


def of_constants(eqn: Any, operands: Sequence[Any], results: Sequence[Array]) -> list[Tagged] | None:
    """The results of an equation of constants and of what is made of all of a leaf's numbers; None for any other."""
    found = [origins(atom, value) for atom, value in zip(eqn.invars, operands, strict=True)]
    if eqn.primitive.name in _REDUCTIONS and all(map(_is_leaf, operands)):
        found = [frozenset(name for name, _ in value.parts) for value in operands]
    if any(names is None for names in found):
        return None
    names = frozenset().union(*(names for names in found if names))
    return [Tagged(result, vectors=names) for result in results]


def _is_leaf(value: Any) -> bool:
    return isinstance(value, Tagged) and bool(value.leaf)


_ITSELF = Formed()
