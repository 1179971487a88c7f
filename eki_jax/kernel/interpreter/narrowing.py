"""Functions whose products are in bfloat16, whatever they are written with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from eki_jax._types import Array
from eki_jax.kernel.interpreter.calls import CALLS, LOOPS, PRODUCTS, Interpreter, bodies_of, evaluated


def narrowed(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A function with its products and convolutions in bfloat16, and their sums in float32.

    Their factors are rounded to bfloat16, so that what one product hands to the next is an array of bfloat16 where
    nothing else asks for it; everything else stays in the dtype that it is in. A product whose precision is named keeps
    it, and so does one of whole numbers. For values, not for derivatives: rules of its own for these are lost.

    >>> a = jnp.array([[1.0 + 2**-9]])
    >>> narrowed(lambda a: a @ a + 2**-9)(a)
    Array([[1.0019531]], dtype=float32)
    >>> bool(narrowed(lambda a: jnp.matmul(a, a, precision="highest"))(a) == a * a)
    True
    """
    return lambda *args: evaluated(_Narrowing(None), fn, args, jax.tree.leaves(args))


class _Narrowing(Interpreter):
    """Looks for products in calls, branches and loops."""

    def equation(self, eqn: Any, operands: list[Any], inside: tuple[str, ...]) -> list[Any]:
        """The results of an equation."""
        kind, bodies = eqn.primitive.name, bodies_of(eqn)
        if kind in PRODUCTS and _is_open(eqn, operands):
            return [_product(eqn, operands)]
        if kind in CALLS and bodies:
            return self.closed(bodies[0], operands, inside)
        if kind in LOOPS:
            return LOOPS[kind](self, eqn, operands, (*inside, kind))
        return self.bound(eqn, operands)


def _is_open(eqn: Any, operands: Sequence[Any]) -> bool:
    """Whether a product is of real numbers, and says nothing of its precision."""
    named = eqn.params["precision"]
    parts = named if isinstance(named, tuple) else (named,)
    is_real = all(jnp.issubdtype(value.dtype, jnp.floating) for value in operands)
    return is_real and all(part in (None, lax.Precision.DEFAULT) for part in parts)


def _product(eqn: Any, operands: Sequence[Any]) -> Array:
    factors = [value.astype(jnp.bfloat16) for value in operands]
    narrow = eqn.replace(params={**eqn.params, "precision": None, "preferred_element_type": jnp.dtype(jnp.float32)})
    (found,) = Interpreter.bound(narrow, factors)
    return found.astype(eqn.outvars[0].aval.dtype)
