"""Transformations that would mix the particles of a stacked ensemble, applied to each by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import optax

from eki_jax._types import Ensemble
from eki_jax.optax._checks import check_stacked, check_transformation


def per_particle(
    tx: optax.GradientTransformation, *, mapped: Sequence[str] = ()
) -> optax.GradientTransformationExtraArgs:
    """``tx`` for every particle by itself: ``init`` and ``update`` are vmapped over the particle axis.

    A stacked ensemble is one pytree to optax, so that whatever takes a norm, a mean or a shape of a whole leaf mixes
    the particles: clipping by the global norm, adafactor, lamb, lars, muon, adaptive clipping. This is the remedy. What
    works element by element (sgd, adam, weight decay) does not need it.

    Args:
        tx: transformation of optax that does not itself need the ensemble.
        mapped: names of extra arguments with a particle axis, such as ``("value",)`` for the losses; the others are
            handed to every particle as they are.

    Returns:
        A transformation whose state has a leading particle axis on every leaf.

    Raises:
        TypeError: ``tx`` is no transformation.
        ValueError: parameters that are not stacked.

    >>> import jax.numpy as jnp, optax
    >>> tx = per_particle(optax.clip_by_global_norm(1.0))
    >>> ensemble, d = jnp.zeros((2, 2)), jnp.array([[3.0, 4.0], [0.3, 0.4]])
    >>> tx.update(d, tx.init(ensemble), ensemble)[0]
    Array([[0.6, 0.8],
           [0.3, 0.4]], dtype=float32)
    """
    check_transformation("tx", tx)
    inner = optax.with_extra_args_support(tx)

    def init(params: Ensemble) -> Any:
        check_stacked(params, "per_particle")
        # Without leaves all is masked, or it is a placeholder of `optax.tree.map_params`.
        return jax.vmap(inner.init)(params) if jax.tree.leaves(params) else inner.init(params)

    def update(updates: Ensemble, state: Any, params: Ensemble | None = None, **extra: Any) -> tuple[Ensemble, Any]:
        if not jax.tree.leaves(updates):  # all masked
            return inner.update(updates, state, params, **extra)
        check_stacked(updates, "per_particle")
        per = {name: extra.pop(name) for name in mapped if name in extra}

        def one(g: Any, s: Any, u: Any, own: dict[str, Any]) -> tuple[Any, Any]:
            return inner.update(g, s, u, **own, **extra)

        return jax.vmap(one)(updates, state, params, per)

    return optax.GradientTransformationExtraArgs(init, update)
