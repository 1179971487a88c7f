"""A direction of descent, and what every way to estimate one is given."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from eki_jax._checks import POSITIVE
from eki_jax._types import Array, Batch, ForwardFn, LossFn, Params
from eki_jax.kernel.axes import Axes, Axis
from eki_jax.losses.protocol import reduction_of
from eki_jax.natural.draws import Cloud
from eki_jax.solvers.reasons import Reason, first_reason


class Direction(NamedTuple):
    """A direction of descent and what is known of it.

    Attributes:
        ascent: a pytree like the parameters: minus it is the whole step. Zero where there is none that can be used.
        loss: value of the loss where it was expanded.
        slope: the first-order decrease of the loss along ``-ascent``.
        bend: second derivative of the loss there.
        healthy: the number of particles that took part.
        fallback: flag, True where Cholesky's factorization failed.
        reason: code of :class:`eki_jax.Reason`: 0 where the direction can be used, else why not.
        matrix: the particles' ``Z H Z^T / (J - 1)`` where it was formed, shape (J, J), else None.
        memory: record of what the estimate has learned, for the next step; None for one that learns nothing.
    """

    ascent: Params
    loss: Array
    slope: Array
    bend: Array
    healthy: Array
    fallback: Array
    reason: Array
    matrix: Array | None = None
    memory: Any = None

    def within(self, norm_constraint: Any) -> Direction:
        """The step made shorter where ``bend``, its squared norm in the outputs' curvature, is above the constraint."""
        if norm_constraint is None:
            return self
        share = jnp.sqrt(jnp.minimum(1.0, norm_constraint / jnp.maximum(self.bend, norm_constraint)))
        ascent = jax.tree.map(lambda leaf: share.astype(leaf.dtype) * leaf, self.ascent)
        return self._replace(ascent=ascent, slope=share * self.slope, bend=share**2 * self.bend)

    def predicted(self, rate: Array) -> Array:
        """The decrease of the loss's second-order model after ``rate`` times the step."""
        rate = rate.astype(self.slope.dtype)
        return rate * self.slope - 0.5 * rate**2 * self.bend


class Setup(NamedTuple):
    """The settings of a step that it does not change.

    Attributes:
        loss: loss of one particle's outputs.
        cloud: particles around the mean.
        batch_axis: devices over which samples are spread.
        chunk_size: number of particles evaluated at a time.
        precision: precision of the products that form the matrix, or None for the highest; "bf16" is the model's.
        norm_constraint: largest squared norm of a step in the outputs' curvature, or None.
        outlier_cut: largest squared distance of a particle's outputs from the others', as a multiple of the median, or
            None.
    """

    loss: LossFn
    cloud: Cloud
    batch_axis: Axis = Axis()
    chunk_size: int | None = None
    precision: Any = None
    norm_constraint: Any = None
    outlier_cut: Any = None

    @property
    def axes(self) -> Axes:
        """Devices over which particles and samples are spread."""
        return Axes(self.cloud.axis, self.batch_axis)


class Estimate(Protocol):
    """A way to estimate the direction from the particles: :func:`span`, :func:`localized` or :func:`gradient`."""

    def extra_passes(self, setup: Setup) -> int:
        """Forward passes a sample beyond one for each particle."""

    @property
    def needs_model(self) -> bool:
        """Whether outputs that came from elsewhere are not enough."""

    def check(self, setup: Setup) -> None:
        """Raise where it does not fit the settings."""

    def memory(self, setup: Setup, forward: ForwardFn, mean: Params) -> Any:
        """What it keeps from step to step, before the first; None where it keeps nothing."""

    def direction(
        self,
        setup: Setup,
        forward: ForwardFn,
        mean: Params,
        drawn: Any,
        sigma: Array,
        damping: Array,
        batch: Batch,
        memory: Any = None,
    ) -> Direction:
        """The direction, evaluating the model, and in it what is to be kept."""

    def from_outputs(
        self, setup: Setup, mean: Params, drawn: Any, sigma: Array, damping: Array, outputs: Any, targets: Any
    ) -> Direction:
        """The direction from the particles' outputs."""


def mean_loss(loss: LossFn, outputs: Any, targets: Any, axes: Axes) -> Array:
    """The loss of one particle's outputs, the samples of all devices together.

    Of a loss that is a mean or a sum over samples one number crosses, of others all outputs and targets.
    """
    kind = reduction_of(loss)
    if axes.batch.is_mapped and kind is not None:
        value = loss(outputs, targets)
        return axes.batch.mean(value) if kind == "mean" else axes.batch.sum(value)
    outputs, targets = axes.batch.gathered((outputs, targets))
    return axes.batch.mean(loss(outputs, targets))


def refusal(
    slope: Array, bend: Array, sigma: Array, damping: Array, *, is_convex: Array, healthy: Array, setup: Setup
) -> Array:
    """The code of :class:`eki_jax.Reason` of a direction: 0 where it can be used.

    Args:
        slope: first-order decrease of the loss.
        bend: second derivative along the direction.
        sigma: scale of the deviations, as a schedule may give it.
        damping: lambda, as a schedule may give it.
        is_convex: flag, True where the loss's Hessian was positive semi-definite.
        healthy: number of particles that took part.
        setup: settings of the step.
    """
    limit = jnp.asarray(1.0 if setup.norm_constraint is None else setup.norm_constraint)
    in_range = POSITIVE.holds(sigma) & POSITIVE.holds(damping) & POSITIVE.holds(limit)
    return first_reason(
        (Reason.SETTING, ~in_range),
        (Reason.FEW_PARTICLES, healthy < 2),
        (Reason.NOT_CONVEX, ~is_convex),
        (Reason.NOT_FINITE, ~(jnp.isfinite(slope) & jnp.isfinite(bend))),
    )
