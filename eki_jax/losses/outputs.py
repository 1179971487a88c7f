"""Losses of a model's outputs as they are: probabilities and real numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eki_jax._types import Array
from eki_jax.kernel.particles import wide_dtype


@dataclass(frozen=True)
class CrossEntropy:
    """See :func:`cross_entropy`."""

    delta: float = 0.005

    def __call__(self, outputs: Array, targets: Array) -> Array:
        """The mean cross-entropy of probabilities (..., classes) against labels."""
        if self.has_support(targets):
            return self.of_support(self.support(outputs, targets), targets)
        if jnp.shape(targets) != jnp.shape(outputs):
            raise ValueError(
                f"targets: shape {jnp.shape(targets)} of dtype {jnp.result_type(targets)}; wanted one-hot or soft "
                f"labels of the outputs' shape {jnp.shape(outputs)}, or integer labels of {jnp.shape(outputs)[:-1]}"
            )
        per_sample = -jnp.sum(targets * self._log(outputs), axis=-1)
        return jnp.mean(per_sample)

    def has_support(self, targets: Any) -> bool:
        """Whether the labels are integers, so that one probability a sample matters."""
        return bool(jnp.issubdtype(jnp.result_type(targets), jnp.integer))

    def support(self, outputs: Array, targets: Array) -> Array:
        """The probabilities (...,) of the labelled classes."""
        if jnp.shape(targets) != jnp.shape(outputs)[:-1]:
            raise ValueError(
                f"targets: shape {jnp.shape(targets)}; wanted integer labels of shape {jnp.shape(outputs)[:-1]}, one "
                f"for each row of the outputs {jnp.shape(outputs)}"
            )
        _check_labels(targets, jnp.shape(outputs)[-1])
        # An index out of range reads NaN rather than another class's probability.
        labels = jnp.where(targets < 0, jnp.shape(outputs)[-1], targets)[..., None]
        return jnp.take_along_axis(outputs, labels, axis=-1, mode="fill")[..., 0]

    def of_support(self, entries: Array, targets: Array) -> Array:
        """The loss from the labelled classes' probabilities."""
        del targets
        return -jnp.mean(self._log(entries))

    def _log(self, probabilities: Array) -> Array:
        probabilities = jnp.asarray(probabilities)
        return jnp.log(probabilities.astype(wide_dtype(probabilities.dtype)) + self.delta)


def cross_entropy(delta: float = 0.005) -> CrossEntropy:
    r"""Cross-entropy of probabilities, ``-mean_b sum_c y_bc log(G_bc + delta)``.

    Its gradient with respect to the probabilities is ``-y / (G + delta)`` over the number of samples: the paper's
    stabilised cotangent (arXiv:1808.03620, section 5.3, where delta = 0.005).

    Args:
        delta: keeps the gradient bounded by 1/delta; >= 0.

    Returns:
        ``loss(outputs, targets)``; outputs (..., classes) are probabilities, targets are integer labels (...), or
        one-hot or soft labels (..., classes). With integer labels the kernel works on one output a sample.

    Raises:
        ValueError: ``delta`` < 0; when called, labels of another shape or (where they are known) out of range.

    >>> import jax, jax.numpy as jnp
    >>> jax.grad(cross_entropy(delta=0.0))(jnp.array([[0.25, 0.75], [0.5, 0.5]]), jnp.array([0, 1]))
    Array([[-2.,  0.],
           [ 0., -1.]], dtype=float32)
    """
    if not delta >= 0:
        raise ValueError(f"delta: {delta}; wanted a number >= 0")
    return CrossEntropy(delta)


@dataclass(frozen=True, eq=False)
class SquaredError:
    """See :func:`squared_error`."""

    precision: Any = None

    def __call__(self, outputs: Array, targets: Array) -> Array:
        """Half the weighted squared distance of outputs and targets."""
        outputs = jnp.asarray(outputs)
        if jnp.shape(targets) != outputs.shape:
            raise ValueError(f"targets: shape {jnp.shape(targets)}; wanted the outputs' shape {outputs.shape}")
        residual = (outputs - targets).astype(wide_dtype(outputs.dtype))
        return 0.5 * jnp.vdot(residual, self.apply(residual))

    def apply(self, residual: Array) -> Array:
        """Gamma^-1 times ``residual``."""
        if self.precision is None:
            return residual
        precision = jnp.asarray(self.precision, residual.dtype)
        if precision.ndim == 0 or precision.shape == residual.shape:
            return precision * residual
        size = residual.size
        if precision.shape != (size, size):
            raise ValueError(
                f"precision: shape {precision.shape} for outputs of shape {residual.shape}; wanted a scalar, the "
                f"outputs' shape (a diagonal) or ({size}, {size})"
            )
        if _is_known(self.precision) and not np.allclose(self.precision, np.transpose(self.precision)):
            raise ValueError("precision: a matrix that is not symmetric; wanted Gamma^-1")
        return (precision @ residual.ravel()).reshape(residual.shape)


def squared_error(precision: Any = None) -> SquaredError:
    r"""Half the squared error in the noise's norm, ``1/2 (G - y)^T Gamma^-1 (G - y)``.

    The cotangent is ``Gamma^-1 (G - y)``: with it the method is the original ensemble Kalman inversion
    (arXiv:1808.03620, equation 12). It is a sum over the outputs, not a mean.

    Args:
        precision: Gamma^-1, the inverse of the observation noise's covariance: None for the identity, a number,
            an array of the outputs' shape (its diagonal), or a symmetric positive semi-definite (M, M) matrix.

    Returns:
        ``loss(outputs, targets)``, both of one shape with M numbers.

    Raises:
        ValueError: a precision that is negative, not finite or not symmetric; when called, shapes that do not fit.

    >>> import jax, jax.numpy as jnp
    >>> jax.grad(squared_error(precision=4.0))(jnp.array([1.0, 3.0]), jnp.array([1.0, 2.0]))
    Array([0., 4.], dtype=float32)
    """
    if _is_known(precision):
        values = np.asarray(precision, np.float64)
        if not np.all(np.isfinite(values)):
            raise ValueError("precision: has values that are not finite; wanted Gamma^-1")
        if values.ndim < 2 and np.any(values < 0):
            raise ValueError(f"precision: least value {values.min()}; wanted Gamma^-1, which is not negative")
    return SquaredError(precision)


def _is_known(value: Any) -> bool:
    """Whether the values can be looked at: not None, and not being traced."""
    return value is not None and not isinstance(value, jax.core.Tracer)


def _check_labels(labels: Any, classes: int) -> None:
    """Raise for labels out of range, where their values are known (not while tracing)."""
    if not _is_known(labels) or jnp.size(labels) == 0:
        return
    values = np.asarray(labels)  # as NumPy's: reductions of a JAX array would be traced here, values or not
    low, high = int(values.min()), int(values.max())
    if low < 0 or high >= classes:
        raise ValueError(f"targets: labels from {low} to {high}; wanted 0 to {classes - 1} for {classes} classes")
