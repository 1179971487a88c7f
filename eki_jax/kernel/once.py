"""Functions that compile once, however they are called."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import jax

Function = TypeVar("Function", bound=Callable[..., object])


def compiled_once(function: Function, static: Iterable[str] = ()) -> Function:
    """``function``, compiled for each shape where it is called as it is, and traced in line inside of another.

    Loops and branches of JAX are compiled anew in every call outside of a compiled function, and kept.

    Args:
        function: pure function of arrays.
        static: names of the arguments that are none.

    >>> import jax.numpy as jnp
    >>> compiled_once(lambda x: 2 * x)(jnp.array(3))
    Array(6, dtype=int32, weak_type=True)
    """
    return jax.jit(function, static_argnames=tuple(static), inline=True)  # type: ignore[return-value]
