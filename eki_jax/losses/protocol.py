"""What a loss may offer besides its value. Methods ask for these attributes and never for a class.

A plain function ``loss(outputs, targets) -> scalar`` offers nothing and works with every method. What it gains by
offering more:

| attributes | who asks | without them |
|---|---|---|
| ``support``, ``has_support``, ``of_support`` | the kernel's products, on these entries alone | all outputs take part |
| ``per_sample``, ``reduction`` | the natural gradient, for a Hessian of blocks, one a sample | one of all outputs |
| ``reduction`` alone | samples spread over devices | such a loss cannot be spread over samples |
| ``curvature`` | the natural gradient, before it forms any Hessian | the Hessian of ``per_sample`` or of the loss |
| ``shortcut`` | solvers and vector fields, at run time | targets are taken as they come |

:func:`eki_jax.losses.check_loss` compares what a loss offers with its value.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, cast

import jax.numpy as jnp

from eki_jax._types import Array, LossFn

if TYPE_CHECKING:
    from jaxtyping import Float

#: How the samples' losses make the loss; None where they do not.
Reduction = Literal["mean", "sum"] | None

#: Eigenvalues below minus this share of the largest are curvature the wrong way, not rounding.
TOLERANCE = 1e-4


class Curvature(NamedTuple):
    """The second-order model of a loss at one point.

    Attributes:
        value: value of the loss there.
        gradient: gradient g, shape (M,).
        times_factor: function from rows (J, M) to rows (J, R), ``Z S`` with ``S S^T = H``.
        coordinates: coordinates gamma, shape (R,), with ``S gamma`` the part of g in the range of H.
        remainder: rest ``g - S gamma``, shape (M,), or None where it is zero whatever the values.
        least: least eigenvalue of H over its largest, or None where H cannot be other than semi-definite.

    >>> import jax.numpy as jnp
    >>> z = jnp.array([3.0, 4.0])  # half the sum of squares: H = I
    >>> bool(Curvature(0.5 * z @ z, z, lambda rows: rows, z).is_convex)
    True
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
        return jnp.asarray(True) if self.least is None else self.least >= -TOLERANCE


class Shortcut(NamedTuple):
    """Other targets for the same loss.

    Attributes:
        flag: scalar, True where the other loss of the other targets equals the loss of the targets that were given, in
            value and in gradient; a NumPy or Python bool where it is known while tracing.
        loss: loss that takes the other targets, of the same dtype.
        targets: other targets, with the particles' axis of the given ones where those have one.
    """

    flag: Any
    loss: LossFn
    targets: Any


class SupportedLoss(LossFn, Protocol):
    """A loss that may depend on few entries of the outputs."""

    def has_support(self, targets: Any, /) -> bool:
        """Whether the loss has a smaller support for such targets; their shapes and dtypes decide, not their values."""

    def support(self, outputs: Any, targets: Any, /) -> Any:
        """The entries of one particle's outputs on which the loss depends."""

    def of_support(self, entries: Any, targets: Any, /) -> Any:
        """The loss as a function of these entries."""


class SeparableLoss(LossFn, Protocol):
    """A loss made of the losses of samples, which lie along the outputs' first axis."""

    @property
    def reduction(self) -> Reduction:
        """How the samples' losses make the loss: "mean", "sum", or None where they do not."""

    def per_sample(self, outputs: Any, targets: Any, /) -> Array:
        """The samples' losses, shape (B,), each of its own rows of outputs and targets alone."""


class CurvedLoss(LossFn, Protocol):
    """A loss that knows its second-order model."""

    def curvature(self, outputs: Any, targets: Any, /) -> Curvature:
        """The model around ``outputs``, those of one particle, with M numbers in the order of its flat leaves."""


class ShortcutLoss(LossFn, Protocol):
    """A loss that some values of the targets make cheaper."""

    def shortcut(self, targets: Any, /) -> Shortcut | None:
        """Targets with a smaller support and the flag that says whether they are the same; None where there are none.

        Targets of many particles have an axis more in front; the flag is then for all of them together.
        """


def supported(loss: LossFn) -> SupportedLoss | None:
    """``loss`` as one that offers its support, or None.

    Raises:
        TypeError: the loss has some of ``support``, ``has_support`` and ``of_support`` but not all.

    >>> from eki_jax.losses import cross_entropy
    >>> supported(cross_entropy()) is None, supported(lambda outputs, targets: 0.0) is None
    (False, True)
    """
    names = ("support", "has_support", "of_support")
    missing = [name for name in names if not callable(getattr(loss, name, None))]
    if len(missing) == len(names):
        return None
    if missing:
        raise TypeError(f"loss: {loss!r} has no method {missing[0]}; wanted all of {', '.join(names)}, or none")
    return cast(SupportedLoss, loss)


def separable(loss: LossFn) -> SeparableLoss | None:
    """``loss`` as one that is the mean or the sum of its samples' losses, or None.

    Raises:
        TypeError: the loss has ``per_sample`` but no ``reduction``.
        ValueError: an unknown ``reduction``.

    >>> from eki_jax.losses import squared_error
    >>> separable(squared_error()).reduction
    'sum'
    """
    if not callable(getattr(loss, "per_sample", None)):
        return None
    if not hasattr(loss, "reduction"):
        raise TypeError(f"loss: {loss!r} has per_sample but no reduction; wanted reduction = 'mean', 'sum' or None")
    return None if reduction_of(loss) is None else cast(SeparableLoss, loss)


def curved(loss: LossFn) -> CurvedLoss | None:
    """``loss`` as one that knows its second-order model, or None.

    >>> from eki_jax.losses import softmax_cross_entropy
    >>> curved(softmax_cross_entropy()) is None
    False
    """
    return cast(CurvedLoss, loss) if callable(getattr(loss, "curvature", None)) else None


def shortcut_of(loss: LossFn, targets: Any) -> Shortcut | None:
    """The loss's shortcut for such targets, or None.

    >>> import numpy as np
    >>> from eki_jax.losses import cross_entropy
    >>> found = shortcut_of(cross_entropy(), np.eye(3))
    >>> bool(found.flag), found.targets
    (True, array([0, 1, 2], dtype=int32))
    """
    if not callable(getattr(loss, "shortcut", None)):
        return None
    return cast(ShortcutLoss, loss).shortcut(targets)


def reduction_of(loss: LossFn) -> Reduction:
    """How the samples' losses make ``loss``; None where it does not say.

    Raises:
        ValueError: an unknown ``reduction``.

    >>> from eki_jax.losses import softmax_cross_entropy
    >>> reduction_of(softmax_cross_entropy())
    'mean'
    """
    found = getattr(loss, "reduction", None)
    if found not in ("mean", "sum", None):
        raise ValueError(f"reduction: {found!r} of the loss {loss!r}; wanted 'mean', 'sum' or None")
    return found


def sample_means(values: Float[Array, " B *outputs"]) -> Float[Array, " B"]:
    """The mean of each sample's values, shape (B, ...) to (B,).

    Raises:
        ValueError: no axis of samples.

    >>> sample_means(jnp.array([[1.0, 2.0], [3.0, 5.0]]))
    Array([1.5, 4. ], dtype=float32)
    """
    if jnp.ndim(values) == 0:
        raise ValueError("outputs: one sample without an axis of samples; wanted shape (B, ...)")
    return jnp.mean(values.reshape(values.shape[0], -1), axis=1)


def least_of(eigenvalues: Array) -> Array:
    """The least eigenvalue over the largest in size; 0 where all are zero.

    >>> float(least_of(jnp.array([-1.0, 0.5, 4.0])))
    -0.25
    """
    largest = jnp.max(jnp.abs(eigenvalues))
    return jnp.min(eigenvalues) / jnp.where(largest > 0, largest, 1)


def scalar(value: Any) -> Array:
    """``value``, if it is a scalar.

    Raises:
        ValueError: another shape.
    """
    value = jnp.asarray(value)
    if value.ndim:
        raise ValueError(f"loss: returned shape {value.shape}; wanted a scalar")
    return value
