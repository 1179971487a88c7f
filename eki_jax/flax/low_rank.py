"""Flax modules as forward maps that take matrices of low rank: what every forward map is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from flax import linen as nn
from flax import nnx

from eki_jax.flax.linen import linen_forward
from eki_jax.flax.nnx import nnx_forward
from eki_jax.natural.deviations.matrix import low_rank_call


def low_rank_forward(
    module: nn.Module | nnx.Module,
    *example_inputs: Any,
    method: str | None = None,
    constants: Mapping[str, Any] | None = None,
) -> tuple[Callable[..., Any], Any]:
    """A linen or nnx module as a forward map whose matrices may be a :class:`eki_jax.natural.LowRankMatrix`.

    It is :func:`linen_forward` or :func:`nnx_forward` in :func:`eki_jax.natural.low_rank_call`. The natural gradient's
    methods need no such wrapping: they take any forward map.

    Args:
        module: A linen module, or an initialized nnx module.
        *example_inputs: inputs for a linen module, like those of a mini-batch.
        method: Name of the method to call; ``None`` for ``__call__``.
        constants: Values of a linen module's other collections.

    Returns:
        ``(forward, template)`` as from :func:`linen_forward`.

    Raises:
        TypeError, ValueError: as :func:`linen_forward` and :func:`nnx_forward`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import linen as nn
        >>> from eki_jax.natural import LowRankMatrix
        >>> forward, template = low_rank_forward(nn.Dense(3, use_bias=False), jnp.ones((1, 2)))
        >>> w = LowRankMatrix(jnp.ones((2, 3)), jnp.ones((2, 1)), jnp.ones((3, 1)))
        >>> forward({"kernel": w}, jnp.ones((1, 2)))
        Array([[4., 4., 4.]], dtype=float32)
    """
    if isinstance(module, nnx.Module):
        plain, template = nnx_forward(module, method=method or "__call__")
    else:
        plain, template = linen_forward(module, *example_inputs, method=method, constants=constants)
    return lambda params, *inputs: low_rank_call(plain, params, *inputs), template
