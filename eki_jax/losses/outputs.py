"""Losses of a model's outputs as they are: probabilities and real numbers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eki_jax._checks import NOT_NEGATIVE, arrays, is_known, real
from eki_jax._types import Array
from eki_jax.kernel.particles import wide_dtype
from eki_jax.losses.protocol import Curvature, Reduction, Shortcut, least_of, sample_means

# What sums of bfloat16 probabilities may be off by.
_ROUNDING = 0.02


@dataclass(frozen=True)
class CrossEntropy:
    """See :func:`cross_entropy`.

    Attributes:
        delta: number added to the probabilities.
        classes: length of the one-hot rows that the integer labels stand for; None where they stand for themselves.
    """

    delta: Any = 0.005
    classes: int | None = None

    @property
    def reduction(self) -> Reduction:
        """The mean over the samples."""
        return "mean"

    def __call__(self, outputs: Array, targets: Array) -> Array:
        """The mean cross-entropy of probabilities (..., classes) against labels."""
        one_array("outputs", outputs)
        one_array("targets", targets)
        return jnp.mean(self._values(outputs, targets))

    def per_sample(self, outputs: Array, targets: Array) -> Array:
        """The samples' cross-entropies, shape (B,)."""
        return sample_means(self._values(outputs, targets))

    def has_support(self, targets: Any) -> bool:
        """Whether the labels are integers, so that one probability a sample matters."""
        one_array("targets", targets)
        return bool(jnp.issubdtype(jnp.result_type(targets), jnp.integer))

    def support(self, outputs: Array, targets: Array) -> Array:
        """The probabilities (...,) of the labelled classes."""
        one_array("outputs", outputs)
        shape = jnp.shape(outputs)
        if self.classes is not None and shape != (*jnp.shape(targets), self.classes):
            raise ValueError(_wrong_labels(shape, f"{(*jnp.shape(targets), self.classes)}"))
        if jnp.shape(targets) != shape[:-1]:
            raise ValueError(
                f"targets: shape {jnp.shape(targets)}; wanted integer labels of shape {shape[:-1]}, one for each row "
                f"of the outputs {shape}, or one-hot labels of a floating-point dtype"
            )
        check_labels(targets, shape[-1])
        # An index out of range reads NaN rather than another class's probability.
        labels = jnp.where(targets < 0, shape[-1], targets)[..., None]
        return jnp.take_along_axis(outputs, labels, axis=-1, mode="fill")[..., 0]

    def of_support(self, entries: Array, targets: Array) -> Array:
        """The loss from the labelled classes' probabilities."""
        del targets
        return -jnp.mean(self._log(entries))

    def shortcut(self, targets: Any) -> Shortcut | None:
        """Integer labels in the place of one-hot ones, with the flag that says whether these are one-hot."""
        if self.has_support(targets) or jnp.ndim(targets) == 0:
            return None
        # NumPy where the values can be looked at: what JAX computes inside of a compiled function is not known there.
        library: Any = np if is_known(targets) else jnp
        targets = library.asarray(targets)
        ones = targets == 1
        flag = library.all(ones | (targets == 0)) & library.all(ones.sum(axis=-1) == 1)
        labels = library.argmax(ones, axis=-1).astype(np.int32)
        return Shortcut(flag, CrossEntropy(self.delta, targets.shape[-1]), labels)

    def curvature(self, outputs: Array, targets: Array) -> Curvature:
        """The model: H is diagonal, ``y / (G + delta)^2`` over the number of samples."""
        outputs = jnp.asarray(outputs)
        outputs = outputs.astype(wide_dtype(outputs.dtype))
        if self.has_support(targets):
            return self._of_integers(outputs, targets)
        value, share = self(outputs, targets), outputs.shape[-1] / max(1, outputs.size)
        labels = jnp.asarray(targets, outputs.dtype)
        inverse = 1 / self._safe(outputs, labels)  # 1 where it is multiplied by a label of zero
        root, hessian = jnp.sqrt(share * jnp.maximum(labels, 0)), (share * labels * inverse**2).ravel()
        gradient, scale = (-share * labels * inverse).ravel(), (root * inverse).ravel()
        outside = jnp.where(labels.ravel() < 0, gradient, 0)
        return Curvature(value, gradient, lambda rows: rows * scale, -root.ravel(), outside, least_of(hessian))

    def _of_integers(self, outputs: Array, labels: Array) -> Curvature:
        value, gradient = jax.value_and_grad(self)(outputs, labels)
        share = 1 / jnp.sqrt(jnp.asarray(max(1, labels.size), outputs.dtype))
        scale = share / (self.support(outputs, labels) + self.delta).ravel()

        def times_factor(rows: Array) -> Array:
            entries = jax.vmap(lambda row: self.support(row.reshape(outputs.shape), labels))(rows)
            return scale * entries.reshape(len(rows), -1)

        return Curvature(value, gradient.ravel(), times_factor, jnp.full_like(scale, -share))

    def _values(self, outputs: Array, targets: Array) -> Array:
        """The cross-entropy of each row of classes, shape (...,)."""
        if self.has_support(targets):
            return -self._log(self.support(outputs, targets))
        if jnp.shape(targets) != jnp.shape(outputs):
            raise ValueError(_wrong_labels(jnp.shape(outputs), f"{jnp.shape(targets)} of {jnp.result_type(targets)}"))
        outputs = jnp.asarray(outputs)
        outputs = outputs.astype(wide_dtype(outputs.dtype))
        _check_shares(targets)
        labels = jnp.asarray(targets, outputs.dtype)
        values = -jnp.sum(labels * jnp.log(self._safe(_probabilities(outputs), labels)), axis=-1)
        return jnp.where(_are_shares(labels), values, jnp.nan)

    def _safe(self, outputs: Array, labels: Array) -> Array:
        """``G + delta``, and 1 where the label is zero: 0 log 0 is 0, and so is its gradient."""
        return jnp.where(labels == 0, 1, outputs + self.delta)

    def _log(self, probabilities: Array) -> Array:
        probabilities = jnp.asarray(probabilities)
        return jnp.log(_probabilities(probabilities.astype(wide_dtype(probabilities.dtype))) + self.delta)


def cross_entropy(delta: Any = 0.005) -> CrossEntropy:
    r"""Cross-entropy of probabilities, ``-mean_b sum_c y_bc log(G_bc + delta)``.

    Its gradient with respect to the probabilities is ``-y / (G + delta)`` over the number of samples: the paper's
    stabilised cotangent (arXiv:1808.03620, section 5.3, where delta = 0.005).

    Args:
        delta: number >= 0 that keeps the gradient bounded by 1/delta.

    Returns:
        ``loss(outputs, targets)``; outputs (..., classes) are probabilities, targets are integer labels (...), or
        one-hot or soft labels (..., classes). With integer labels the kernel works on one output a sample. Solvers do
        so with one-hot labels too, after a test at run time where their values are not known before.

    Raises:
        TypeError: ``delta`` is no number.
        ValueError: ``delta`` < 0; when called, labels of another shape or (where they are known) out of range, or soft
            labels that are negative or do not sum to one. The loss is NaN where that is known too late, and for outputs
            below 0 or above 1, which are no probabilities: :func:`eki_jax.losses.softmax_cross_entropy` takes logits.

    >>> import jax, jax.numpy as jnp
    >>> jax.grad(cross_entropy(delta=0.0))(jnp.array([[0.25, 0.75], [0.5, 0.5]]), jnp.array([0, 1]))
    Array([[-2.,  0.],
           [ 0., -1.]], dtype=float32)
    """
    return CrossEntropy(real("delta", delta, NOT_NEGATIVE))


@dataclass(frozen=True, eq=False)
class SquaredError:
    """See :func:`squared_error`.

    Attributes:
        precision: Gamma^-1, in one of the forms of :func:`squared_error`.
    """

    precision: Any = None

    @property
    def reduction(self) -> Reduction:
        """The sum over the samples, where all of them have the same precision; else None."""
        return "sum" if self.precision is None or jnp.ndim(self.precision) == 0 else None

    def __call__(self, outputs: Array, targets: Array) -> Array:
        """Half the weighted squared distance of outputs and targets."""
        residual = _residual(outputs, targets)
        return 0.5 * jnp.vdot(residual, self.apply(residual))

    def per_sample(self, outputs: Array, targets: Array) -> Array:
        """The samples' shares, shape (B,); raises ValueError for a matrix, which mixes them."""
        residual = _residual(outputs, targets)
        if self._is_matrix(residual):
            raise ValueError("precision: a matrix, in which samples have no losses of their own; wanted a diagonal")
        values = residual * self.apply(residual)
        return 0.5 * jnp.sum(values.reshape(len(values), -1), axis=1)

    def curvature(self, outputs: Array, targets: Array) -> Curvature:
        """The model: H is Gamma^-1; only a matrix is factored, by its eigenvalues."""
        residual = _residual(outputs, targets)
        value, gradient = 0.5 * jnp.vdot(residual, self.apply(residual)), self.apply(residual).ravel()
        residual = residual.ravel()
        if self.precision is None:
            return Curvature(value, gradient, lambda rows: rows, residual)
        precision = jnp.asarray(self.precision, residual.dtype)
        if not self._is_matrix(jnp.asarray(outputs)):
            root = jnp.sqrt(jnp.maximum(precision, 0)).ravel()
            least = least_of(precision.ravel())
            return Curvature(value, gradient, lambda rows: rows * root, root * residual, None, least)
        values, vectors = jnp.linalg.eigh(precision)
        factor = vectors * jnp.sqrt(jnp.maximum(values, 0))
        return Curvature(value, gradient, lambda rows: rows @ factor, residual @ factor, None, least_of(values))

    def apply(self, residual: Array) -> Array:
        """Gamma^-1 times ``residual``."""
        if self.precision is None:
            return residual
        precision = jnp.asarray(self.precision, residual.dtype)
        if not self._is_matrix(residual):
            if self._least < 0:
                raise ValueError(f"precision: least value {self._least}; wanted Gamma^-1, which is not negative")
            return precision * residual
        size = residual.size
        if precision.shape != (size, size):
            raise ValueError(
                f"precision: shape {precision.shape} for outputs of shape {residual.shape}; wanted a scalar, the "
                f"outputs' shape (a diagonal) or ({size}, {size})"
            )
        if self._is_known and not np.allclose(known := np.asarray(self.precision), known.T):
            raise ValueError("precision: a matrix that is not symmetric; wanted Gamma^-1")
        if self._least_eigenvalue < 0:
            raise ValueError(
                f"precision: least eigenvalue {self._least_eigenvalue:.3g}; wanted Gamma^-1, positive semi-definite"
            )
        return (precision @ residual.ravel()).reshape(residual.shape)

    @property
    def _is_known(self) -> bool:
        """Whether there is a precision whose numbers can be looked at."""
        return self.precision is not None and is_known(self.precision)

    @cached_property
    def _least(self) -> float:
        """The least number of the precision, 0 where it is not known."""
        return float(np.asarray(self.precision, np.float64).min(initial=0)) if self._is_known else 0.0

    @cached_property
    def _least_eigenvalue(self) -> float:
        """The least eigenvalue of a matrix, 0 where it is not known or rounding."""
        if not self._is_known:
            return 0.0
        values = np.linalg.eigvalsh(np.asarray(self.precision, np.float64))
        return float(min(0.0, values[0] if values[0] < -1e-6 * values[-1] else 0.0))

    def _is_matrix(self, outputs: Array) -> bool:
        """Whether Gamma^-1 is more than a number or a diagonal."""
        return self.precision is not None and jnp.shape(self.precision) not in ((), outputs.shape)


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
    if precision is not None:
        one_array("precision", precision)
    if precision is not None and is_known(precision):
        values = np.asarray(precision, np.float64)
        if not np.all(np.isfinite(values)):
            raise ValueError("precision: has values that are not finite; wanted Gamma^-1")
        if values.ndim < 2 and np.any(values < 0):
            raise ValueError(f"precision: least value {values.min()}; wanted Gamma^-1, which is not negative")
    return SquaredError(precision)


@dataclass(frozen=True)
class MeanSquaredError:
    """The mean of the squared differences, of outputs and targets of one shape (B, ...).

    >>> float(MeanSquaredError()(jnp.array([1.0, 2.0]), jnp.array([0.0, 4.0])))
    2.5
    """

    @property
    def reduction(self) -> Reduction:
        """The mean over the samples."""
        return "mean"

    def __call__(self, outputs: Array, targets: Array) -> Array:
        """The mean over all outputs; raises ValueError for targets of another shape."""
        return jnp.mean(_residual(outputs, targets) ** 2)

    def per_sample(self, outputs: Array, targets: Array) -> Array:
        """The samples' means, shape (B,)."""
        return sample_means(_residual(outputs, targets) ** 2)

    def curvature(self, outputs: Array, targets: Array) -> Curvature:
        """The model: H is 2 / M times the identity."""
        residual = _residual(outputs, targets).ravel()
        root = jnp.sqrt(jnp.asarray(2 / max(1, residual.size), residual.dtype))
        return Curvature(jnp.mean(residual**2), root**2 * residual, lambda rows: root * rows, root * residual)


def _residual(outputs: Any, targets: Any) -> Array:
    """Outputs minus targets of the same shape, in float32 or wider."""
    one_array("outputs", outputs)
    one_array("targets", targets)
    outputs = jnp.asarray(outputs)
    if jnp.shape(targets) != outputs.shape:
        raise ValueError(f"targets: shape {jnp.shape(targets)}; wanted the outputs' shape {outputs.shape}")
    return (outputs - targets).astype(wide_dtype(outputs.dtype))


def one_array(name: str, value: Any) -> None:
    """Raise TypeError for what is not one array of real numbers."""
    if isinstance(value, bool) or not (hasattr(value, "shape") or isinstance(value, int | float | list | tuple)):
        raise TypeError(f"{name}: {type(value).__name__}; wanted one array, or a loss of your own for a pytree")
    arrays(name, value)


def _probabilities(outputs: Array) -> Array:
    """The outputs, NaN where they are below 0 or above 1 (beyond rounding): what is no probability has no entropy."""
    return jnp.where((outputs >= -_ROUNDING) & (outputs <= 1 + _ROUNDING), outputs, jnp.nan)


def _are_shares(labels: Array) -> Array:
    """Whether each row of soft labels is not negative and sums to one, shape (...,)."""
    return (jnp.min(labels, axis=-1) >= -_ROUNDING) & (jnp.abs(jnp.sum(labels, axis=-1) - 1) <= _ROUNDING)


def _check_shares(targets: Any) -> None:
    """Raise for soft labels that are no shares, where their values are known."""
    if not is_known(targets) or jnp.size(targets) == 0:
        return
    values = np.asarray(targets, np.float64)
    sums = values.sum(axis=-1)
    if values.min() < -_ROUNDING or np.abs(sums - 1).max() > _ROUNDING or np.isnan(sums).any():
        raise ValueError(
            f"targets: soft labels from {values.min():.3g} on, with sums from {sums.min():.3g} to {sums.max():.3g}; "
            "wanted labels >= 0 that sum to one"
        )


def _wrong_labels(outputs: tuple[int, ...], found: str) -> str:
    return (
        f"targets: shape {found}; wanted one-hot or soft labels of the outputs' shape {outputs}, or integer labels of "
        f"{outputs[:-1]}"
    )


def check_labels(labels: Any, classes: int) -> None:
    """Raise for labels out of range, where their values are known (not while tracing)."""
    if not is_known(labels) or jnp.size(labels) == 0:
        return
    values = np.asarray(labels)  # as NumPy's: reductions of a JAX array would be traced here, values or not
    low, high = int(values.min()), int(values.max())
    if low < 0 or high >= classes:
        raise ValueError(f"targets: labels from {low} to {high}; wanted 0 to {classes - 1} for {classes} classes")
