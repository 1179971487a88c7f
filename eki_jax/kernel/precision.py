"""Products of reduced precision: the kernel's own, and a model's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from eki_jax._types import Array
from eki_jax.kernel.interpreter import narrowed

Precision = Any


def check_precision(value: Any) -> None:
    """Raise ValueError for what no matrix product takes for its precision.

    >>> check_precision("exact")
    Traceback (most recent call last):
        ...
    ValueError: precision: 'exact'; wanted None, 'bf16', or what jax.numpy.matmul takes, such as 'highest'
    """
    try:
        if value != "bf16":
            jax.eval_shape(lambda a: jnp.matmul(a, a, precision=value), jax.ShapeDtypeStruct((1, 1), jnp.float32))
    except (TypeError, ValueError):
        raise ValueError(
            f"precision: {value!r}; wanted None, 'bf16', or what jax.numpy.matmul takes, such as 'highest'"
        ) from None


def product(a: Array, b: Array, precision: Precision = None) -> Array:
    """``a @ b`` with the precision of :func:`jax.numpy.matmul`, or ``"bf16"``.

    ``"bf16"`` rounds both factors to bfloat16 and sums in float32, on every backend; on processors and accelerators
    with such units it is twice as fast as float32 or more. The names that JAX offers for it leave a CPU at float32.

    >>> import jax.numpy as jnp
    >>> product(jnp.array([[1.0, 2**-9]]), jnp.array([[2.0**-9], [1.0]]), "bf16")
    Array([[0.00390625]], dtype=float32)
    >>> product(jnp.array([[1.0 + 2**-9]]), jnp.array([[1.0]]), "bf16")
    Array([[1.]], dtype=float32)
    """
    if not is_bf16(precision):
        return jnp.matmul(a, b, precision=precision)
    narrow = jnp.matmul(a.astype(jnp.bfloat16), b.astype(jnp.bfloat16), preferred_element_type=jnp.float32)
    return narrow.astype(jnp.result_type(a, b))


def model_in(precision: Precision, model: Callable[..., Any]) -> Callable[..., Any]:
    """A function that evaluates a model, with its products in bfloat16 for ``"bf16"``; else as it is.

    >>> a = jnp.array([[1.0 + 2**-9]])
    >>> model_in("bf16", lambda a: a @ a)(a), bool(model_in("highest", lambda a: a @ a)(a) == a * a)
    (Array([[1.]], dtype=float32), True)
    """
    return narrowed(model) if is_bf16(precision) else model


def is_bf16(precision: Precision) -> bool:
    """Whether a precision is ``"bf16"``, which JAX has no name for.

    >>> is_bf16("bf16"), is_bf16(jax.lax.Precision.HIGHEST)
    (True, False)
    """
    return isinstance(precision, str) and precision == "bf16"
