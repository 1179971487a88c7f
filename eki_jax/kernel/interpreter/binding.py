"""Equations evaluated with other operands than those that they were traced with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from eki_jax._types import Array


def bound(eqn: Any, *operands: Any) -> Any:
    """The results of an equation.

    In a mapped function its operands may vary over axes over which those of the trace did not, one more than another.
    """
    axes = varying(operands)
    with eqn.ctx.manager:
        spread = [varying_over(operand, axes) for operand in operands] if axes else operands
        return eqn.primitive.bind(*spread, **eqn.primitive.get_bind_params(eqn.params))


def varying(values: Sequence[Any]) -> frozenset[str]:
    """The mapped axes over which any of the values varies."""
    found: frozenset[str] = frozenset()
    for value in values:
        kind: Any = jax.typeof(value)
        found |= kind.mat.varying if hasattr(kind, "mat") else getattr(kind, "vma", frozenset())
    return found


def varying_over(value: Any, axes: frozenset[str]) -> Array:
    """A value that varies over these axes too."""
    missing = axes - varying([value])
    return lax.pcast(jnp.asarray(value), tuple(sorted(missing)), to="varying") if missing else value
