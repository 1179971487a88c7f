"""A linen module as the ``forward(params, x)`` of one particle."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from eki_jax._checks import traceable


def linen_forward(
    module: nn.Module,
    *example_inputs: Any,
    method: str | None = None,
    constants: Mapping[str, Any] | None = None,
) -> tuple[Callable[..., Any], Any]:
    """Turn a linen module into a forward map and the shapes of one particle.

    Nothing is initialized: the shapes come from tracing. An ensemble is drawn from a prior over the template.

    Args:
        module: linen module whose trainable values live in the collection ``params``.
        *example_inputs: inputs like those of a mini-batch (arrays or ``jax.ShapeDtypeStruct``), usually one.
        method: name of the method to call; ``None`` for ``__call__``.
        constants: values of the module's other collections (for example ``batch_stats`` that stay as they are), shared
            by all particles.

    Returns:
        ``(forward, template)``: ``forward(params, x)`` for one particle, and the pytree of
        ``jax.ShapeDtypeStruct`` that ``params`` has to look like.

    Raises:
        TypeError: ``module`` is no linen module, ``constants`` no mapping, or the inputs are no arrays.
        ValueError: ``method`` is no method of the module.
        ValueError: The module has a collection besides ``params`` that ``constants`` does not give.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import linen as nn

    from eki_jax._checks import traceable
        >>> from eki_jax.flax import linen_forward
        >>> forward, template = linen_forward(nn.Dense(3), jnp.ones((5, 2)))
        >>> template["kernel"].shape
        (2, 3)
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: {module!r}; wanted a flax module, such as nn.Dense(3)")
    if constants is not None and not isinstance(constants, Mapping):
        raise TypeError(f"constants: {constants!r}; wanted a mapping from collections to their values")
    check_method(module, method)
    traceable("example_inputs", example_inputs)
    fixed = dict(constants or {})
    shapes = jax.eval_shape(lambda *inputs: module.init(jax.random.key(0), *inputs, method=method), *example_inputs)
    unknown = sorted(set(shapes) - {"params"} - set(fixed))
    if unknown:
        raise ValueError(
            f"module: {type(module).__name__} has the collections {unknown} besides 'params'; give their fixed values "
            "through `constants` (a particle is its parameters alone)"
        )

    def forward(params: Any, *inputs: Any) -> Any:
        return module.apply({"params": params, **fixed}, *inputs, method=method)

    template = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(leaf.dtype)), shapes["params"])
    return forward, template


def check_method(module: Any, method: str | None) -> None:
    """Raise ValueError unless a flax module has a method of that name."""
    if method is not None and not (isinstance(method, str) and callable(getattr(type(module), method, None))):
        raise ValueError(f"method: {method!r}; wanted the name of a method of {type(module).__name__}")
