"""An nnx module as the ``forward(params, x)`` of one particle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from eki_jax._checks import traceable
from eki_jax.flax.linen import check_method


def nnx_forward(module: nnx.Module, *, method: str = "__call__") -> tuple[Callable[..., Any], Any]:
    """Turn an nnx module into a forward map and the shapes of one particle.

    The module is split into its graph, its ``nnx.Param`` values and the rest (running statistics, random streams).
    The rest is shared by all particles and read only: what a call writes to it is dropped. Put the module into the
    mode you want first, for example ``module.eval()``.

    Args:
        module: nnx module, initialized.
        method: name of the method to call.

    Returns:
        ``(forward, template)``: ``forward(params, x)`` for one particle, where ``params`` is a nested dictionary of
        arrays, and the same dictionary of ``jax.ShapeDtypeStruct``.

    Raises:
        TypeError: ``module`` is no nnx module; from ``forward``, inputs that are no arrays.
        ValueError: ``method`` is no method of the module. The module has no ``nnx.Param``.

    Example:
        >>> from flax import nnx

    from eki_jax._checks import traceable
    from eki_jax.flax.linen import check_method
        >>> from eki_jax.flax import nnx_forward
        >>> forward, template = nnx_forward(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
        >>> template["kernel"].shape
        (2, 3)
    """
    if not isinstance(module, nnx.Module):
        raise TypeError(f"module: {module!r}; wanted an nnx module that is made, such as nnx.Linear(2, 3, rngs=rngs)")
    check_method(module, method)
    graph, *states = nnx.split(module, nnx.Param, ...)
    params, rest = nnx.to_pure_dict(states[0]), states[1]
    if not jax.tree.leaves(params):
        raise ValueError(f"module: {type(module).__name__} has no nnx.Param, so there is nothing to train")
    template = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)

    def forward(params: Any, *inputs: Any) -> Any:
        traceable("inputs", inputs)
        # `rest` is copied by merge, so that nothing traced leaks into the caller's module.
        return getattr(nnx.merge(graph, params, rest, copy=True), method)(*inputs)

    return forward, template
