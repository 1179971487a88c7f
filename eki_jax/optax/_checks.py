"""Errors that say what to do, raised while tracing."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eki_jax._checks import arrays, is_known, offers
from eki_jax.kernel.particles import local_size


def check_given(name: str, outputs: Any, cotangents: Any) -> None:
    missing = [arg for arg, value in (("outputs", outputs), ("cotangents", cotangents)) if value is None]
    if missing:
        raise TypeError(
            f"{name}: no {' and no '.join(missing)}; wanted update(updates, state, ensemble, outputs=..., "
            "cotangents=...), which value_and_extra_args(forward, loss) makes. Where extra arguments cannot be passed, "
            "take the direction of eki_jax.value_and_direction for the gradient and leave this transformation out"
        )


def check_transformation(name: str, value: Any) -> None:
    offers(name, value, ("init", "update"), "a transformation of optax, such as optax.clip_by_global_norm(1.0)")


def check_params(params: Any, name: str) -> None:
    if params is None:
        raise ValueError(f"{name}: no params; wanted the ensemble as the third argument of update")
    check_stacked(params, name)


def check_stacked(params: Any, name: str) -> None:
    """Raise unless all leaves share a leading axis; a tree without leaves passes (optax's placeholders)."""
    if not jax.tree.leaves(params):
        return
    try:
        local_size(params, name="params")
    except ValueError as error:
        raise ValueError(
            f"{name}: the parameters are not a stacked ensemble: {error}. Every leaf wants a leading particle axis, "
            "(J, ...), as eki_jax.sample_ensemble draws it"
        ) from None


def check_zeros(updates: Any, params: Any) -> None:
    wanted = [jnp.shape(leaf) for leaf in jax.tree.leaves(params)]
    found = [jnp.shape(leaf) for leaf in jax.tree.leaves(updates)]
    if found != wanted:
        raise ValueError(
            f"updates: shapes {found[:3]}, but the ensemble has {wanted[:3]}; wanted zeros like the ensemble, not the "
            "gradient of one particle's parameters"
        )
    # By NumPy: inside a compiled function JAX would trace even an operation on values that are known.
    if any(is_known(leaf) and np.any(np.asarray(leaf) != 0) for leaf in jax.tree.leaves(updates)):
        raise ValueError(
            "updates: not zero; ensemble_gradient makes the gradient itself and wants zeros like the ensemble. To "
            "transform a gradient that you have, leave ensemble_gradient out of the chain"
        )


def check_extra_args(outputs: Any, cotangents: Any, tree: Any, *, name: str = "ensemble") -> None:
    """What the kernel would not say of itself: whose J is wrong, and gradients of the parameters as cotangents."""
    if not jax.tree.leaves(tree):  # all masked
        return
    arrays("outputs", outputs)
    arrays("cotangents", cotangents)
    found, wanted = local_size(outputs, name="outputs"), local_size(tree, name=name)
    if found != wanted:
        raise ValueError(
            f"outputs: leading axis {found}, but the {name} has J = {wanted}; wanted the outputs of every particle, "
            f"shape ({wanted}, ...), of an ensemble whose leaves are stacked"
        )
    if _shapes(cotangents) == _shapes(tree) != _shapes(outputs):
        raise ValueError(
            "cotangents: shaped like the parameters; wanted the loss's gradient with respect to the model's outputs, "
            "shaped like those: eki_jax.losses.value_and_cotangents(loss, outputs, targets)"
        )


def _shapes(tree: Any) -> Any:
    return jax.tree.structure(tree), [jnp.shape(leaf) for leaf in jax.tree.leaves(tree)]
