r"""The loss's second-order model around the mean output.

For outputs z with M numbers, ``L(z + d) ~ L(z) + g^T d + 1/2 d^T H d``. H is never needed by itself: with a factor
``H = S S^T`` the curvature of the ensemble is ``(Z S)(Z S)^T``. For a sum over samples S has a block for each.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np

from eki_jax._checks import arrays, function, is_known
from eki_jax._types import Array, LossFn
from eki_jax.kernel.particles import wide_dtype
from eki_jax.losses.protocol import TOLERANCE, Curvature, SeparableLoss, curved, least_of, scalar, separable

# A Hessian over all outputs at once has M^2 numbers: beyond this the loss has to say that it is a sum over samples.
_LARGEST = 4096


def curvature(loss: LossFn, outputs: Any, targets: Any) -> Curvature:
    """The second-order model of ``loss`` at ``outputs``, those of one particle.

    The loss's own where it offers ``curvature``; from a Hessian of one block a sample where it offers ``per_sample``
    and ``reduction``; else from the Hessian of all outputs at once (M x M).

    Args:
        loss: any loss of the library, :func:`mean_over_samples` of a function, or a loss of one's own, see
            :mod:`eki_jax.losses.protocol`.
        outputs: array, or pytree of arrays for a loss that takes one.
        targets: targets that the loss takes.

    Raises:
        TypeError: ``loss`` is no function, or offers half of what goes together; outputs that are no arrays.
        ValueError: a loss that is not a scalar, one of more than 4,096 outputs that says nothing of its samples, or a
            curvature whose shapes do not fit.

    >>> import jax.numpy as jnp
    >>> model = curvature(lambda z, y: jnp.sum(jnp.exp(z) * y), jnp.zeros(2), jnp.array([1.0, 4.0]))
    >>> model.gradient, jnp.round(jnp.sum(model.times_factor(jnp.eye(2)) ** 2, axis=1), 4)
    (Array([1., 4.], dtype=float32), Array([1., 4.], dtype=float32))
    """
    function("loss", loss, "a function of outputs and targets", arguments=2)
    arrays("outputs", outputs, floating=True, some=True)
    own, by_samples = curved(loss), separable(loss)
    if own is not None:
        return _checked(own.curvature(outputs, targets), outputs)
    if by_samples is not None:
        return _by_samples(by_samples, outputs, targets)
    return _generic(loss, outputs, targets)


def _checked(model: Curvature, outputs: Any) -> Curvature:
    """A loss's own model, if its arrays have the shapes that products with it take for granted."""
    size = sum(math.prod(jnp.shape(leaf)) for leaf in jax.tree.leaves(outputs))
    for name, shape in (("value", ()), ("gradient", (size,)), ("remainder", (size,))):
        found = getattr(model, name)
        if found is not None and jnp.shape(found) != shape:
            raise ValueError(f"loss: its curvature's {name} has shape {jnp.shape(found)}; wanted {shape}")
    return model


def _by_samples(loss: SeparableLoss, outputs: Any, targets: Any) -> Curvature:
    leaves = jax.tree.leaves(outputs)
    structure: Any = jax.tree.structure(outputs)
    samples = _samples(leaves, targets)
    dtype = wide_dtype(*(leaf.dtype for leaf in leaves))
    widths = [math.prod(leaf.shape[1:]) for leaf in leaves]
    cuts = np.cumsum(widths)[:-1]
    share = 1 / samples if loss.reduction == "mean" else 1.0

    def sample(z: Array, y: Any) -> Array:
        parts = [part.reshape(1, *leaf.shape[1:]) for part, leaf in zip(jnp.split(z, cuts), leaves, strict=True)]
        value = loss.per_sample(structure.unflatten(parts), jax.tree.map(lambda leaf: leaf[None], y))
        if jnp.shape(value) != (1,):
            raise ValueError(f"loss: per_sample returned shape {jnp.shape(value)} for 1 sample; wanted (1,)")
        return share * value[0]

    def blocks(rows: Array) -> Array:
        """Rows (n, M), leaf after leaf, as (n, B, m), sample after sample."""
        parts = jnp.split(rows, samples * cuts, axis=1)
        return jnp.concatenate([part.reshape(len(rows), samples, -1) for part in parts], axis=2)

    def flat(of_samples: Array) -> Array:
        """The way back, of one row."""
        return jnp.concatenate([part.ravel() for part in jnp.split(of_samples, cuts, axis=1)])

    z = jnp.concatenate([leaf.reshape(samples, -1).astype(dtype) for leaf in leaves], axis=1)
    value, gradient = jax.vmap(jax.value_and_grad(sample))(z, targets)
    factor, gamma, remainder, least = _factored(jax.vmap(jax.hessian(sample))(z, targets), gradient)

    def times_factor(rows: Array) -> Array:
        return jnp.einsum("jbm,bmr->jbr", blocks(rows), factor).reshape(len(rows), -1)

    return Curvature(jnp.sum(value), flat(gradient), times_factor, gamma.ravel(), flat(remainder), least)


def _samples(outputs: list[Any], targets: Any) -> int:
    """The samples B along the first axis of all outputs and targets."""
    for name, leaves in (("outputs", outputs), ("targets", jax.tree.leaves(targets))):
        for leaf in leaves:
            if jnp.ndim(leaf) == 0 or jnp.shape(leaf)[0] != jnp.shape(outputs[0])[0]:
                raise ValueError(
                    f"{name}: shape {jnp.shape(leaf)}; wanted a first axis of {jnp.shape(outputs[0])[:1]} samples, for "
                    "a loss with per_sample"
                )
    return int(jnp.shape(outputs[0])[0])


def _generic(loss: LossFn, outputs: Any, targets: Any) -> Curvature:
    flat, unravel = jax.flatten_util.ravel_pytree(outputs)
    flat = flat.astype(wide_dtype(flat.dtype))
    if flat.size > _LARGEST:
        raise ValueError(
            f"loss: its Hessian over {flat.size} outputs would have {flat.size**2} numbers; wanted at most {_LARGEST} "
            "outputs, mean_over_samples(fn) of a loss of one sample, a loss with per_sample and reduction, or one with "
            "curvature"
        )

    def of_flat(z: Array) -> Array:
        return scalar(loss(unravel(z), targets))

    value, gradient = jax.value_and_grad(of_flat)(flat)
    factor, gamma, remainder, least = _factored(jax.hessian(of_flat)(flat)[None], gradient[None])
    return Curvature(value, gradient, lambda rows: rows @ factor[0], gamma[0], remainder[0], least)


def _factored(hessians: Array, gradients: Array) -> tuple[Array, Array, Array, Array]:
    """For blocks (B, m, m): S, gamma, g - S gamma, and how far the least eigenvalue is below zero."""
    values, vectors = jnp.linalg.eigh(hessians)
    largest = jnp.max(jnp.abs(values), axis=-1, keepdims=True)
    root = jnp.sqrt(jnp.maximum(values, 0))
    inside = values > 1e-6 * largest
    components = jnp.einsum("bmr,bm->br", vectors, gradients)
    gamma = jnp.where(inside, components / jnp.where(inside, root, 1), 0)
    factor = vectors * jnp.where(inside, root, 0)[:, None, :]
    return factor, gamma, gradients - jnp.einsum("bmr,br->bm", factor, gamma), least_of(values)


def check_convex(model: Curvature) -> None:
    """Raise where the values are known, that is outside of a compiled function, and curve the wrong way."""
    if model.least is not None and is_known(model.least):
        least = float(np.asarray(model.least))
        if least < -TOLERANCE:
            raise ValueError(
                f"loss: its Hessian in the outputs has an eigenvalue {least:.3g} times the largest; wanted a loss that "
                "is convex in the outputs"
            )
