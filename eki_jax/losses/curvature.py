r"""The loss's second-order model around the mean output.

For outputs z with M numbers, ``L(z + d) ~ L(z) + g^T d + 1/2 d^T H d``. H is never needed by itself: with a factor
``H = S S^T`` the curvature of the ensemble is ``(Z S)(Z S)^T``. For a sum over samples S has a block for each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np

from eki_jax._types import Array, LossFn
from eki_jax.kernel.particles import wide_dtype
from eki_jax.losses.logits import SampleLoss, SoftmaxCrossEntropy
from eki_jax.losses.outputs import SquaredError

# A Hessian over all outputs at once has M^2 numbers: beyond this the loss has to say that it is a sum over samples.
_LARGEST = 4096
# Eigenvalues below minus this share of the largest are curvature the wrong way, not rounding.
_TOLERANCE = 1e-4


class Curvature(NamedTuple):
    """The second-order model of a loss at one point.

    Attributes:
        value: the loss there.
        gradient: g, shape (M,).
        times_factor: rows (J, M) to rows (J, R), ``Z S`` with ``S S^T = H``.
        coordinates: gamma, shape (R,), with ``S gamma`` the part of g in the range of H.
        remainder: ``g - S gamma``, shape (M,), or None where it is zero whatever the values.
        least: the least eigenvalue of H over its largest, or None where H cannot be other than semi-definite.
    """

    value: Array
    gradient: Array
    times_factor: Callable[[Array], Array]
    coordinates: Array
    remainder: Array | None = None
    least: Array | None = None

    @property
    def is_convex(self) -> Array:
        """Whether H is positive semi-definite, to rounding."""
        return jnp.asarray(True) if self.least is None else self.least >= -_TOLERANCE


def curvature(loss: LossFn, outputs: Any, targets: Any) -> Curvature:
    """The second-order model of ``loss`` at ``outputs``, those of one particle.

    Args:
        loss: :func:`softmax_cross_entropy`, :func:`eki_jax.squared_error`, :func:`mean_over_samples`, or any function
            of all outputs at once, whose Hessian is then formed (M x M).
        outputs: array, or pytree of arrays for a loss that takes one.
        targets: what the loss takes.

    Raises:
        ValueError: a loss that is not a scalar, or one of more than 4,096 outputs that is not known to be a sum.

    >>> import jax.numpy as jnp
    >>> model = curvature(lambda z, y: jnp.sum(jnp.exp(z) * y), jnp.zeros(2), jnp.array([1.0, 4.0]))
    >>> model.gradient, jnp.round(jnp.sum(model.times_factor(jnp.eye(2)) ** 2, axis=1), 4)
    (Array([1., 4.], dtype=float32), Array([1., 4.], dtype=float32))
    """
    if isinstance(loss, SoftmaxCrossEntropy):
        return _softmax(loss, jnp.asarray(outputs), targets)
    if isinstance(loss, SquaredError):
        return _squared(loss, jnp.asarray(outputs), targets)
    if isinstance(loss, SampleLoss):
        return _by_samples(loss, jnp.asarray(outputs), targets)
    return _generic(loss, outputs, targets)


def _softmax(loss: SoftmaxCrossEntropy, logits: Array, targets: Any) -> Curvature:
    logits = logits.astype(wide_dtype(logits.dtype))
    samples = logits.size // logits.shape[-1]
    p = jax.nn.softmax(logits).reshape(samples, -1)
    labels = loss.distribution(logits, targets).reshape(samples, -1)
    # diag p - p p^T = S S^T with S = (diag 1 - p 1^T) diag sqrt(p). For labels that sum to 1 the gradient p - y is
    # S gamma with gamma = (p - y) / sqrt(p).
    root = jnp.sqrt(p)
    share = 1 / jnp.sqrt(jnp.asarray(samples, p.dtype))

    def times_factor(rows: Array) -> Array:
        z = rows.reshape(len(rows), *p.shape)
        inner = jnp.sum(z * p, axis=-1, keepdims=True)  # as a batched product it would be transposed first
        return ((z - inner) * (share * root)).reshape(len(rows), -1)

    residual = (p - labels) / samples
    # gamma is unbounded where the true class has no probability; the part of g it cannot carry in floats remains.
    safe = jnp.maximum(root, 1e-6)
    gamma = residual / (safe * share)
    carried = share * (root * gamma - p * jnp.sum(root * gamma, axis=-1, keepdims=True))
    return Curvature(loss(logits, targets), residual.ravel(), times_factor, gamma.ravel(), (residual - carried).ravel())


def _squared(loss: SquaredError, outputs: Array, targets: Any) -> Curvature:
    value, gradient = jax.value_and_grad(loss)(outputs, targets)
    residual = (outputs - targets).astype(wide_dtype(outputs.dtype)).ravel()
    if loss.precision is None:
        return Curvature(value, gradient.ravel(), lambda rows: rows, residual)
    precision = jnp.asarray(loss.precision, residual.dtype)
    if precision.ndim == 0 or precision.shape == outputs.shape:
        root = jnp.sqrt(precision).ravel()
        return Curvature(value, gradient.ravel(), lambda rows: rows * root, root * residual)
    values, vectors = jnp.linalg.eigh(precision)
    factor = vectors * jnp.sqrt(jnp.maximum(values, 0))
    return Curvature(value, gradient.ravel(), lambda rows: rows @ factor, residual @ factor, None, _least(values[None]))


def _by_samples(loss: SampleLoss, outputs: Array, targets: Any) -> Curvature:
    samples, shape = outputs.shape[0], outputs.shape[1:]
    outputs = outputs.astype(wide_dtype(outputs.dtype)).reshape(samples, -1)

    def sample(z: Array, y: Any) -> Array:
        return _scalar(loss.sample_loss(z.reshape(shape), y)) / samples

    value, gradient = jax.vmap(jax.value_and_grad(sample))(outputs, targets)
    factor, gamma, remainder, least = _factored(jax.vmap(jax.hessian(sample))(outputs, targets), gradient)

    def times_factor(rows: Array) -> Array:
        z = rows.reshape(len(rows), samples, -1)
        return jnp.einsum("jbm,bmr->jbr", z, factor).reshape(len(rows), -1)

    return Curvature(jnp.sum(value), gradient.ravel(), times_factor, gamma.ravel(), remainder.ravel(), least)


def _generic(loss: LossFn, outputs: Any, targets: Any) -> Curvature:
    flat, unravel = jax.flatten_util.ravel_pytree(outputs)
    flat = flat.astype(wide_dtype(flat.dtype))
    if flat.size > _LARGEST:
        raise ValueError(
            f"loss: its Hessian over {flat.size} outputs would have {flat.size**2} numbers; wanted at most {_LARGEST} "
            "outputs, or a loss that says it is a sum over samples: softmax_cross_entropy(), squared_error(), "
            "mean_over_samples(fn)"
        )

    def of_flat(z: Array) -> Array:
        return _scalar(loss(unravel(z), targets))

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
    return factor, gamma, gradients - jnp.einsum("bmr,br->bm", factor, gamma), _least(values)


def _least(values: Array) -> Array:
    """The least eigenvalue of all blocks, over the largest in size; 0 where all are zero."""
    largest = jnp.max(jnp.abs(values))
    return jnp.min(values) / jnp.where(largest > 0, largest, 1)


def _scalar(value: Any) -> Array:
    value = jnp.asarray(value)
    if value.ndim:
        raise ValueError(f"loss: returned shape {value.shape}; wanted a scalar")
    return value


def check_convex(model: Curvature) -> None:
    """Raise where the values are known, that is outside of a compiled function, and curve the wrong way."""
    if model.least is not None and not isinstance(model.least, jax.core.Tracer):
        least = float(np.asarray(model.least))
        if least < -_TOLERANCE:
            raise ValueError(
                f"loss: its Hessian in the outputs has an eigenvalue {least:.3g} times the largest; wanted a loss that "
                "is convex in the outputs"
            )
