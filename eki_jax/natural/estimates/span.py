"""From the particles' outputs to the weights of their deviations, on one device or spread over many."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from eki_jax._checks import one_of
from eki_jax._types import Array, Batch, ForwardFn, LossFn, Params, Space
from eki_jax.kernel.axes import Axes, Axis
from eki_jax.kernel.health import finite_particles, near_particles
from eki_jax.kernel.linear_algebra import HIGHEST, damped_solve
from eki_jax.kernel.particles import flatten_outputs, wide_dtype
from eki_jax.kernel.precision import is_bf16
from eki_jax.losses.curvature import check_convex, curvature
from eki_jax.losses.protocol import reduction_of
from eki_jax.losses.shortcut import by_shortcut
from eki_jax.natural.deviations import PerSample
from eki_jax.natural.direction import Direction, Setup, refusal
from eki_jax.natural.linear_algebra import cheaper_space


class SpanStep(NamedTuple):
    """A step in the span of the deviations.

    Attributes:
        weights: weights w of this device's particles, shape (J,); the step is ``-sigma sum_j w_j e_j / sqrt(J - 1)``.
            Zero for particles that failed.
        loss: loss of the mean output.
        slope: first-order decrease of the loss, ``v^T w``.
        bend: second derivative along the step, ``w^T A A^T w``.
        healthy: the number of particles that took part.
        fallback: flag, True where Cholesky's factorization failed.
        is_convex: flag, True where the loss's Hessian was positive semi-definite.
        matrix: product ``A A^T`` where it was formed, else None.
    """

    weights: Array
    loss: Array
    slope: Array
    bend: Array
    healthy: Array
    fallback: Array
    is_convex: Array
    matrix: Array | None


def span_step(
    loss: LossFn,
    outputs: Any,
    targets: Any,
    damping: Array,
    *,
    space: Space | None = None,
    axes: Axes = Axes(),  # noqa: B008
    precision: Any = HIGHEST,
    outlier_cut: Any = None,
) -> SpanStep:
    """The weights of one damped Gauss-Newton step.

    Args:
        loss: loss of one particle's outputs.
        outputs: particles' outputs, shape (J, ...) on this device; with ``axes.batch`` the second axis is of samples.
        targets: targets of this device's samples.
        damping: lambda > 0.
        space: space in which to solve; by default that of the smaller matrix.
        axes: devices over which particles and samples are spread.
        precision: precision of the products that form the matrix.
        outlier_cut: largest squared distance of a particle's outputs from the others', as a multiple of the median.

    Raises:
        ValueError: a loss that cannot be spread over samples in that space, or samples that the devices do not divide.
    """
    kind = reduction_of(loss)
    local = jax.tree.leaves(outputs)[0].shape[0]
    count = local * axes.particles.size
    numbers = sum(leaf.size for leaf in jax.tree.leaves(outputs)) // local * axes.batch.size
    if space is None:
        space = cheaper_space(count, numbers)
        if axes.both.is_mapped and kind is None:  # all outputs at once: nothing can be spread over samples
            space = "output"
    if space == "output":
        return _in_output_space(loss, outputs, targets, damping, axes, precision, outlier_cut)
    if axes.both.is_mapped and kind is None:
        raise ValueError(
            "space: 'ensemble' on several devices, for a loss that is no sum of samples; wanted 'output', or a loss "
            "with reduction = 'mean' or 'sum'"
        )
    return _in_ensemble_space(loss, outputs, targets, damping, axes, precision, outlier_cut, kind)


def _in_ensemble_space(
    loss: LossFn, outputs: Any, targets: Any, damping: Array, axes: Axes, precision: Any, cut: Any, kind: str | None
) -> SpanStep:
    healthy = healthy_outputs(outputs, axes, cut)
    outputs, targets = _all_particles(outputs, targets, axes)
    every = _of_all(healthy, axes.particles)
    rows, mean, number = _centred(outputs, every, Axis())
    model = curvature(loss, mean, targets)
    check_convex(model)
    factor = model.times_factor(rows)
    # A mean over samples is the mean of the devices' means; a sum is their sum.
    share = 1 / axes.both.size if kind == "mean" else 1.0
    # The slope is one more column of the matrix, so that one sum over devices brings both.
    right = rows @ model.gradient
    sums = jnp.concatenate([jnp.matmul(factor, factor.T, precision=precision), right[:, None]], axis=1)
    sums = share * axes.both.sum(sums)
    matrix, right = sums[:, :-1], sums[:, -1]
    weights, fallback = damped_solve(matrix, right, damping)
    value, convex = share * axes.both.sum(model.value), axes.both.all(model.is_convex)
    bend = jnp.vdot(weights, jnp.matmul(matrix, weights, precision=HIGHEST))
    slope = jnp.vdot(right, weights)
    own = axes.particles.own_part(weights)
    return SpanStep(own, value, slope, bend, number, fallback, convex, matrix)


def _in_output_space(
    loss: LossFn, outputs: Any, targets: Any, damping: Array, axes: Axes, precision: Any, cut: Any
) -> SpanStep:
    healthy = healthy_outputs(outputs, axes, cut)
    outputs, targets = axes.batch.gathered(outputs, axis=1), axes.batch.gathered(targets)
    rows, mean, number = _centred(outputs, healthy, axes.particles)
    model = curvature(loss, mean, targets)
    check_convex(model)
    factor = model.times_factor(rows)
    copies = 1 / axes.batch.size  # every device along the batch axis now has the same
    matrix = copies * axes.both.sum(jnp.matmul(factor.T, factor, precision=precision))
    # A gradient outside of the Hessian's range cannot be written in R numbers; it goes around the system.
    outside, inner = jnp.zeros((), factor.dtype), model.coordinates
    if model.remainder is not None:
        outside = rows @ model.remainder / damping.astype(rows.dtype)
        inner = inner - copies * axes.both.sum(outside @ factor)
    solution, fallback = damped_solve(matrix, axes.batch.mean(inner), damping)
    weights = axes.batch.mean(jnp.matmul(factor, solution, precision=precision) + outside)
    slope = copies * axes.both.sum(jnp.vdot(rows @ model.gradient, weights))
    moved = copies * axes.both.sum(weights @ factor)
    value, convex = axes.batch.mean(model.value), axes.batch.all(model.is_convex)
    return SpanStep(weights, value, slope, jnp.vdot(moved, moved), number, fallback, convex, None)


def centred(outputs: Any, axes: Axes, cut: Any = None) -> tuple[Array, Array, Array]:
    """Rows ``(z_j - mean z) / sqrt(J - 1)``, zero for particles that failed; which did not; how many on all devices."""
    healthy = healthy_outputs(outputs, axes, cut)
    rows, _, number = _centred(outputs, healthy, axes.particles)
    return rows, healthy, number


def share_of_loss(loss: LossFn, axes: Axes) -> float:
    """What this device's samples count in the loss of all samples: a mean is the mean of the devices' means.

    Raises:
        ValueError: a loss that is no sum over samples, spread over them.
    """
    kind = reduction_of(loss)
    if axes.batch.is_mapped and kind is None:
        raise ValueError(
            "loss: is not known to be a sum over samples, which are spread over devices; wanted one that says so by "
            "reduction = 'mean' or 'sum', such as mean_over_samples(fn)"
        )
    return 1 / axes.batch.size if kind == "mean" else 1.0


def _centred(outputs: Any, healthy: Array, axis: Axis) -> tuple[Array, Any, Array]:
    """Rows ``(z_j - mean z) / sqrt(J - 1)`` of the healthy particles, zeros for others; the mean; their number."""
    flat = flatten_outputs(outputs, len(healthy), name="outputs")
    flat = jnp.where(healthy[:, None], flat.astype(wide_dtype(flat.dtype)), 0)
    count, total = axis.sum((jnp.sum(healthy).astype(flat.dtype), jnp.sum(flat, axis=0)))
    mean = total / jnp.maximum(count, 1)
    rows = jnp.where(healthy[:, None], (flat - mean[None]) * lax.rsqrt(jnp.maximum(count - 1, 1)), 0)
    return rows, _like_one(mean, outputs), count


def healthy_outputs(outputs: Any, axes: Axes, cut: Any) -> Array:
    """Which of this device's particles have outputs that are finite, on all samples, and not far from all others."""
    finite = axes.batch.all(finite_particles(outputs))
    return finite & near_particles(outputs, None, finite, cut, axes)


def _of_all(healthy: Array, axis: Axis) -> Array:
    """The flags of all particles, as numbers that are known to be the same on all devices."""
    if not axis.is_mapped:
        return healthy
    own = jnp.zeros(len(healthy) * axis.size, jnp.int32)
    return axis.sum(own.at[axis.own_indices(len(healthy))].set(healthy.astype(jnp.int32))) > 0


def _all_particles(outputs: Any, targets: Any, axes: Axes) -> tuple[Any, Any]:
    """From some particles' outputs on many samples to all particles' outputs on fewer samples."""
    if not axes.particles.is_mapped:
        return outputs, targets
    devices = axes.particles.size
    samples = jax.tree.leaves(outputs)[0].shape[1]
    if samples % devices:
        raise ValueError(f"batch: {samples} samples a device on {devices} devices of particles; wanted a multiple")
    exchanged = jax.tree.map(lambda z: lax.all_to_all(z, axes.particles.name, 1, 0, tiled=True), outputs)
    return exchanged, jax.tree.map(lambda y: axes.particles.own_part(jnp.asarray(y)), targets)


def _like_one(flat: Array, outputs: Any) -> Any:
    """A flat (M,) array as one particle's outputs."""
    leaves = jax.tree.leaves(outputs)
    structure: Any = jax.tree.structure(outputs)
    parts, start = [], 0
    for leaf in leaves:
        numbers = leaf.size // leaf.shape[0]
        parts.append(flat[start : start + numbers].reshape(leaf.shape[1:]))
        start += numbers
    return structure.unflatten(parts)


class Span(NamedTuple):
    """See :func:`span`."""

    space: Space | None = None

    def extra_passes(self, setup: Setup) -> int:
        """None."""
        del setup
        return 0

    @property
    def needs_model(self) -> bool:
        """No: the particles' outputs are all that it takes."""
        return False

    def check(self, setup: Setup) -> None:
        """Raise for deviations that are none of the parameters."""
        if isinstance(setup.cloud.deviations, PerSample):
            raise ValueError("estimate: span() with per_sample(...) deviations; wanted gradient(), their default")

    def memory(self, setup: Setup, forward: ForwardFn, mean: Params) -> None:
        """None: every step stands alone."""

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
        """The direction, evaluating the model."""
        del memory
        x, targets = batch
        outputs = setup.cloud.evaluate(forward, mean, drawn, sigma, x, setup.chunk_size, setup.precision)
        return self.from_outputs(setup, mean, drawn, sigma, damping, outputs, targets)

    def from_outputs(
        self, setup: Setup, mean: Params, drawn: Any, sigma: Array, damping: Array, outputs: Any, targets: Any
    ) -> Direction:
        """The direction from the particles' outputs."""

        def solved(loss: LossFn, targets: Any) -> SpanStep:
            space, axes = self.space, setup.axes
            # What is inverted has no digits to lose: "bf16" is for the model.
            precision = HIGHEST if setup.precision is None or is_bf16(setup.precision) else setup.precision
            cut = setup.outlier_cut
            return span_step(
                loss, outputs, targets, damping, space=space, axes=axes, precision=precision, outlier_cut=cut
            )

        found = by_shortcut(solved, setup.loss, targets, axis=setup.axes.batch)
        reason = refusal(
            found.slope,
            found.bend,
            sigma,
            damping,
            is_convex=found.is_convex,
            healthy=found.healthy,
            setup=setup,
        )
        over = lax.rsqrt(jnp.maximum(found.healthy - 1, 1)).astype(found.weights.dtype)
        weights = sigma.astype(over.dtype) * found.weights * over
        ascent = setup.cloud.combine(mean, drawn, jnp.where(reason == 0, weights, 0))
        direction = Direction(
            ascent, found.loss, found.slope, found.bend, found.healthy, found.fallback, reason, found.matrix
        )
        return direction.within(setup.norm_constraint)


def span(space: Space | None = None) -> Span:
    """The estimate of a step in the span of the deviations, from the particles' outputs alone.

    Args:
        space: space in which the system is solved, "ensemble" (J x J) or "output"; by default the smaller.

    Raises:
        ValueError: an unknown space.

    >>> span("ensemble").space
    'ensemble'
    """
    return Span(one_of("space", space, ("ensemble", "output", None)))
