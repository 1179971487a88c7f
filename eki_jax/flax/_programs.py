"""What a traced program does with its inputs: which of them its outputs are made of, and which it hands on."""

from __future__ import annotations

from collections.abc import Sequence

from jax.extend.core import Jaxpr, Literal, jaxprs_in_params
from jax.interpreters import partial_eval

# Calls of a program whose inputs and outputs are those of the equation.
_CALLS = frozenset(
    ("jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint", "custom_jvp_call", "custom_vjp_call")
)


def read_for(jaxpr: Jaxpr, wanted: Sequence[bool]) -> list[bool]:
    """Which inputs the wanted ones of a program's outputs depend on.

    Args:
        jaxpr: program.
        wanted: flags of the outputs.

    >>> import jax
    >>> program = jax.make_jaxpr(lambda a, b, c: (jax.jit(lambda a, b: (a, 2 * b))(a, b)[1], c))(1.0, 2.0, 3.0)
    >>> read_for(program.jaxpr, [True, False])
    [False, True, False]
    """
    return list(partial_eval.dce_jaxpr(jaxpr, list(wanted))[1])


def handed_on(jaxpr: Jaxpr) -> list[int | None]:
    """For each output of a program the number of the input that it is, unchanged, or None.

    >>> import jax
    >>> program = jax.make_jaxpr(lambda a, b: jax.checkpoint(lambda a, b: (b, a + 1))(a, b))(1.0, 2.0)
    >>> handed_on(program.jaxpr)
    [1, None]
    """
    same = {var: number for number, var in enumerate(jaxpr.invars)}
    for equation in jaxpr.eqns:
        inner = list(jaxprs_in_params(equation.params)) if equation.primitive.name in _CALLS else []
        if len(inner) != 1 or len(inner[0].invars) != len(equation.invars):
            continue
        for var, number in zip(equation.outvars, handed_on(inner[0]), strict=True):
            before = None if number is None else equation.invars[number]
            if before is not None and not isinstance(before, Literal) and before in same:
                same[var] = same[before]
    return [None if isinstance(var, Literal) else same.get(var) for var in jaxpr.outvars]
