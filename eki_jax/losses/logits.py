"""Losses of a model's raw outputs whose second derivative is known sample by sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from eki_jax._checks import function
from eki_jax._types import Array
from eki_jax.kernel.particles import local_size, wide_dtype
from eki_jax.losses.outputs import check_labels, one_array
from eki_jax.losses.protocol import Curvature, Reduction, sample_means, scalar


@dataclass(frozen=True)
class SoftmaxCrossEntropy:
    """See :func:`softmax_cross_entropy`."""

    @property
    def reduction(self) -> Reduction:
        """The mean over the samples."""
        return "mean"

    def __call__(self, outputs: Array, targets: Array) -> Array:
        """The mean cross-entropy of logits (..., classes) against labels."""
        one_array("outputs", outputs)
        one_array("targets", targets)
        return jnp.mean(self._values(outputs, targets))

    def per_sample(self, outputs: Array, targets: Array) -> Array:
        """The samples' cross-entropies, shape (B,)."""
        return sample_means(self._values(outputs, targets))

    def curvature(self, outputs: Array, targets: Array) -> Curvature:
        """The model: for every sample H is ``diag p - p p^T`` over their number."""
        logits = jnp.asarray(outputs)
        logits = logits.astype(wide_dtype(logits.dtype))
        samples = logits.size // logits.shape[-1]
        p = jax.nn.softmax(logits).reshape(samples, -1)
        labels = self.distribution(logits, targets).reshape(samples, -1)
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
        rest = (residual - carried).ravel()
        return Curvature(self(logits, targets), residual.ravel(), times_factor, gamma.ravel(), rest)

    def _values(self, outputs: Array, targets: Array) -> Array:
        """The cross-entropy of each row of logits, shape (...,)."""
        logits = jnp.asarray(outputs)
        logits = logits.astype(wide_dtype(logits.dtype))
        return -jnp.sum(self.distribution(logits, targets) * jax.nn.log_softmax(logits), axis=-1)

    @staticmethod
    def distribution(logits: Array, targets: Any) -> Array:
        """The labels as probabilities, shape (..., classes)."""
        if jnp.issubdtype(jnp.result_type(targets), jnp.integer) and jnp.shape(targets) == logits.shape[:-1]:
            check_labels(targets, logits.shape[-1])
            # A label out of range has no distribution: NaN, so that it cannot be mistaken for another class.
            known = (targets >= 0) & (targets < logits.shape[-1])
            one_hot = jax.nn.one_hot(targets, logits.shape[-1], dtype=logits.dtype)
            return jnp.where(known[..., None], one_hot, jnp.nan)
        if jnp.shape(targets) != logits.shape:
            raise ValueError(
                f"targets: shape {jnp.shape(targets)} of dtype {jnp.result_type(targets)}; wanted integer labels of "
                f"shape {logits.shape[:-1]}, or one-hot or soft labels of the logits' shape {logits.shape}"
            )
        return jnp.asarray(targets, logits.dtype)


def softmax_cross_entropy() -> SoftmaxCrossEntropy:
    r"""Cross-entropy of logits z, ``-mean_b sum_c y_bc log softmax(z_b)_c``.

    With the probabilities p its gradient is ``(p - y) / B`` and its Hessian, for every sample,
    ``(diag p - p p^T) / B``: that is the Fisher matrix of the predicted class.

    Returns:
        ``loss(outputs, targets)``; outputs (B, classes) are logits, targets are integer labels (B,), or one-hot or soft
        labels (B, classes).

    Raises:
        ValueError: when called, labels of another shape, or (where they are known) out of range.

    >>> import jax, jax.numpy as jnp
    >>> jax.grad(softmax_cross_entropy())(jnp.zeros((1, 2)), jnp.array([0]))
    Array([[-0.5,  0.5]], dtype=float32)
    """
    return SoftmaxCrossEntropy()


@dataclass(frozen=True)
class SampleLoss:
    """See :func:`mean_over_samples`."""

    sample_loss: Callable[[Any, Any], Any]

    @property
    def reduction(self) -> Reduction:
        """The mean over the samples."""
        return "mean"

    def __call__(self, outputs: Any, targets: Any) -> Array:
        """The mean of the samples' losses."""
        return jnp.mean(self.per_sample(outputs, targets))

    def per_sample(self, outputs: Any, targets: Any) -> Array:
        """The samples' losses, shape (B,)."""
        samples = local_size(outputs, name="outputs")
        if local_size(targets, name="targets") != samples:
            raise ValueError(f"targets: {jnp.shape(jax.tree.leaves(targets)[0])}; wanted a row for each of {samples}")
        return jax.vmap(lambda output, target: scalar(self.sample_loss(output, target)))(outputs, targets)


def mean_over_samples(sample_loss: Callable[[Any, Any], Any]) -> SampleLoss:
    """The mean over a batch of a convex loss of one sample, with a Hessian of one block a sample.

    Args:
        sample_loss: function ``sample_loss(output, target) -> scalar`` of ONE sample, twice differentiable and
            convex in the output, an array of any shape or a pytree of them.

    Returns:
        ``loss(outputs, targets)``, both with a leading axis of samples.

    Raises:
        TypeError: ``sample_loss`` is not a function.

    >>> import jax.numpy as jnp
    >>> loss = mean_over_samples(lambda z, y: jnp.sum(jnp.cosh(z - y)))
    >>> float(loss(jnp.zeros((4, 3)), jnp.zeros((4, 3))))
    3.0
    """
    function("sample_loss", sample_loss, "a function of one sample's output and target", arguments=2)
    return SampleLoss(sample_loss)
