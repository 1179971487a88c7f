"""The natural direction of one mini-batch: what the solver follows, and a gradient for other optimizers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp
from jax import lax

from eki_jax._types import Array, Batch, ForwardFn, LossFn, Params, Schedule
from eki_jax.natural import _axes
from eki_jax.natural._axes import Axes
from eki_jax.natural._cloud import Cloud
from eki_jax.natural._curvature import check_convex, curvature
from eki_jax.natural._damping import as_schedule
from eki_jax.natural._deviations import Deviations, LowRank, low_rank
from eki_jax.natural._localized import damped_newton, estimated_jacobian
from eki_jax.natural._solve import HIGHEST, Space
from eki_jax.natural._span import centred, everywhere, share_of_loss, span_step


class Direction(NamedTuple):
    """A direction of descent and what is known of it.

    Attributes:
        ascent: a pytree like the parameters: minus it is the whole step. Zero where there is none that can be used.
        loss: at the outputs where the loss was expanded.
        slope: the first-order decrease of the loss along ``-ascent``.
        bend: its second derivative there.
        healthy: the number of particles that took part.
        fallback: whether Cholesky's factorization failed.
        usable: whether the direction is finite and the loss convex.
        matrix: the particles' ``Z H Z^T / (J - 1)`` where it was formed, shape (J, J), else None.
    """

    ascent: Params
    loss: Array
    slope: Array
    bend: Array
    healthy: Array
    fallback: Array
    usable: Array
    matrix: Array | None = None

    def within(self, norm_constraint: float | None) -> Direction:
        """The step made shorter where ``bend``, its squared norm in the outputs' curvature, is above the constraint."""
        if norm_constraint is None:
            return self
        share = jnp.sqrt(jnp.minimum(1.0, norm_constraint / jnp.maximum(self.bend, norm_constraint)))
        ascent = jax.tree.map(lambda leaf: share.astype(leaf.dtype) * leaf, self.ascent)
        return self._replace(ascent=ascent, slope=share * self.slope, bend=share**2 * self.bend)

    def predicted(self, rate: Array) -> Array:
        """The decrease of the loss's second-order model after ``rate`` times the step."""
        return rate * self.slope - 0.5 * rate**2 * self.bend


class Estimator(NamedTuple):
    """How a direction is found; the settings of :func:`natural_gradient` that a step does not change.

    Attributes:
        loss: of one particle's outputs.
        cloud: the particles.
        iterations: of conjugate gradients, for localized estimates; 0 for the span of the deviations.
        space: where the span's system is solved.
        batch_axis_name: mapped axis over which samples are spread.
        chunk_size: particles evaluated at a time.
        precision: of the products that form the span's matrix.
        norm_constraint: the largest squared norm of a step in the outputs' curvature.
    """

    loss: LossFn
    cloud: Cloud
    iterations: int = 0
    space: Space | None = None
    batch_axis_name: str | None = None
    chunk_size: int | None = None
    precision: Any = HIGHEST
    norm_constraint: float | None = None

    @property
    def axes(self) -> Axes:
        """Over which particles and samples are spread."""
        return Axes(self.cloud.axis_name, self.batch_axis_name)

    def from_model(
        self, forward: ForwardFn, mean: Params, drawn: Any, sigma: Array, damping: Array, batch: Batch
    ) -> Direction:
        """The direction, evaluating the model."""
        x, targets = batch
        if self.iterations:
            return self._localized(forward, mean, drawn, sigma, damping, batch)
        outputs = self.cloud.evaluate(forward, mean, drawn, sigma, x, self.chunk_size)
        return self.from_outputs(mean, drawn, sigma, damping, outputs, targets)

    def from_outputs(
        self, mean: Params, drawn: Any, sigma: Array, damping: Array, outputs: Any, targets: Any
    ) -> Direction:
        """The direction from the particles' outputs."""
        found = span_step(
            self.loss, outputs, targets, damping, space=self.space, axes=self.axes, precision=self.precision
        )
        usable = _usable(found.slope, found.bend, sigma, damping) & found.is_convex
        weights = sigma * found.weights * lax.rsqrt(jnp.maximum(found.healthy - 1, 1))
        ascent = self.cloud.combine(mean, drawn, jnp.where(usable, weights, 0))
        direction = Direction(
            ascent, found.loss, found.slope, found.bend, found.healthy, found.fallback, usable, found.matrix
        )
        return direction.within(self.norm_constraint)

    def _localized(
        self, forward: ForwardFn, mean: Params, drawn: Any, sigma: Array, damping: Array, batch: Batch
    ) -> Direction:
        x, targets = batch
        deviations, axes = self.cloud.deviations, self.axes
        assert isinstance(deviations, LowRank)
        seen = self.cloud.see(forward, mean, drawn, x)
        outputs = self.cloud.evaluate(forward, mean, drawn, sigma, x, self.chunk_size)
        rows, healthy, number = centred(outputs, axes)
        model = curvature(self.loss, seen.outputs, targets)
        check_convex(model)
        share = share_of_loss(self.loss, axes)
        jacobian = estimated_jacobian(deviations, mean, drawn, rows, sigma, seen, healthy, number, axes)
        gradient = lambda z: curvature(self.loss, z, targets).gradient
        flat, unravel = jax.flatten_util.ravel_pytree(seen.outputs)
        curve = lambda q: share * jax.jvp(lambda z: gradient(unravel(z)), (flat,), (q.astype(flat.dtype),))[1]
        residual = share * model.gradient
        d = damped_newton(jacobian, curve, residual, damping / sigma**2, self.iterations)
        along = jacobian.times(d)
        over_samples = Axes(batch=axes.batch)
        value, slope, bend = over_samples.sum(
            (share * model.value, jnp.vdot(residual, along), jnp.vdot(along, curve(along)))
        )
        usable = _usable(slope, bend, sigma, damping) & everywhere(model.is_convex, over_samples)
        scales = deviations.scales(mean)
        ascent = jax.tree.map(lambda m, v, s: jnp.where(usable, (s * v).astype(m.dtype), 0), mean, d, scales)
        direction = Direction(ascent, value, slope, bend, number, jnp.asarray(False), usable)
        return direction.within(self.norm_constraint)


def _usable(slope: Array, bend: Array, sigma: Array, damping: Array) -> Array:
    """Whether a step is finite, and came from settings that schedules may give."""
    return jnp.isfinite(slope) & jnp.isfinite(bend) & (sigma > 0) & (damping > 0)


def value_and_natural_direction(
    forward: ForwardFn,
    loss: LossFn,
    particles: int = 1000,
    sigma: Schedule = 0.1,
    damping: Schedule = 1e-4,
    deviations: Deviations = low_rank(1),  # noqa: B008
    **options: Any,
) -> Callable[..., tuple[Array, Params]]:
    """The natural counterpart of :func:`jax.value_and_grad`, for any optimizer that takes a gradient.

    Args:
        forward: as for :func:`natural_gradient`.
        loss: as for :func:`natural_gradient`.
        particles: J >= 2.
        sigma: scale of the deviations, > 0, or a schedule of ``count``.
        damping: lambda > 0, or a schedule of ``count``.
        deviations: :func:`low_rank` or :func:`full_rank`.
        **options: ``antithetic``, ``localized``, ``iterations``, ``space``, ``axis_name``, ``batch_axis_name``,
            ``chunk_size``, ``precision`` and ``norm_constraint`` of :func:`natural_gradient`.

    Returns:
        ``f(params, batch, key, count=0) -> (loss, direction)``: params of ONE particle; the direction is like them and
        points uphill, as a gradient does, so that ``params - direction`` is the whole damped Gauss-Newton step. It is
        zero where no finite direction was found.

    Raises:
        TypeError, ValueError: as :func:`natural_gradient`.

    >>> import jax, jax.numpy as jnp, optax
    >>> import eki_jax
    >>> f = value_and_natural_direction(lambda u, x: x @ u, eki_jax.squared_error(), 20)
    >>> x = jax.random.normal(jax.random.key(0), (8, 3))
    >>> params, tx = jnp.zeros(3), optax.sgd(0.5, momentum=0.5)
    >>> state = tx.init(params)
    >>> for count in range(20):
    ...     key = jax.random.fold_in(jax.random.key(1), count)
    ...     value, direction = f(params, (x, x @ jnp.array([1.0, -2.0, 3.0])), key)
    ...     updates, state = tx.update(direction, state)
    ...     params = optax.apply_updates(params, updates)
    >>> bool(value < 0.05)
    True
    """
    estimator = make_estimator(loss, particles, deviations, **options)
    sigma_of, damping_of = as_schedule(sigma, "sigma"), as_schedule(damping, "damping")

    def f(params: Params, batch: Batch, key: Array, count: Any = 0) -> tuple[Array, Params]:
        scale, lam = (jnp.asarray(schedule(count), jnp.float32) for schedule in (sigma_of, damping_of))
        drawn = estimator.cloud.draw(key, params)
        found = estimator.from_model(forward, params, drawn, scale, lam, batch)
        return found.loss, found.ascent

    return f


def make_estimator(
    loss: LossFn,
    particles: int,
    deviations: Deviations,
    *,
    antithetic: bool = False,
    localized: bool = False,
    iterations: int = 10,
    space: Space | None = None,
    axis_name: str | None = None,
    batch_axis_name: str | None = None,
    chunk_size: int | None = None,
    precision: Any = HIGHEST,
    norm_constraint: float | None = None,
) -> Estimator:
    """An estimator of checked settings."""
    if not callable(loss):
        raise TypeError(f"loss: {loss!r}; wanted a function of outputs and targets")
    if particles < 2:
        raise ValueError(f"particles: J = {particles}; wanted at least 2")
    if antithetic and particles % 2:
        raise ValueError(f"particles: {particles} with antithetic=True; wanted an even number, for pairs")
    if localized and iterations < 1:
        raise ValueError(f"iterations: {iterations}; wanted at least 1")
    if localized and not isinstance(deviations, LowRank):
        raise ValueError("localized: True with deviations of full rank; wanted low_rank(...)")
    if norm_constraint is not None and not norm_constraint > 0:
        raise ValueError(f"norm_constraint: {norm_constraint}; wanted a number > 0, or None")
    cloud = Cloud(deviations, particles, antithetic, axis_name)
    count = iterations if localized else 0
    return Estimator(loss, cloud, count, space, batch_axis_name, chunk_size, precision, norm_constraint)


def mean_loss(loss: LossFn, outputs: Any, targets: Any, axes: Axes) -> Array:
    """The loss of one particle's outputs, the samples of all devices together."""
    outputs, targets = _axes.gathered(outputs, axes.batch), _axes.gathered(targets, axes.batch)
    value = loss(outputs, targets)
    return value if axes.batch is None else lax.pmean(value, axes.batch)
