"""The natural direction of one mini-batch: what the solver follows, and a gradient for other optimizers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypedDict, Unpack

import jax
import jax.numpy as jnp

from eki_jax._checks import ABOVE_ONE, POSITIVE, arrays, function, pair, real, schedule, traceable, whole
from eki_jax._types import Array, Batch, ForwardFn, LossFn, Params, Schedule, Space
from eki_jax.kernel.axes import Axis
from eki_jax.kernel.health import OUTLIER_CUT
from eki_jax.kernel.keys import particle_key
from eki_jax.kernel.once import compiled_once
from eki_jax.kernel.precision import check_precision
from eki_jax.natural.deviations import Deviations, PerSample, low_rank
from eki_jax.natural.direction import Direction, Estimate, Setup
from eki_jax.natural.draws import Cloud
from eki_jax.natural.estimates import gradient, span
from eki_jax.natural.estimates import localized as localized_estimate


class EstimatorSettings(TypedDict, total=False):
    """Keywords of everything that estimates a natural direction.

    Attributes:
        antithetic: flag; True draws deviations in pairs of opposite sign; J even.
        axis_name: mapped axis over which the particles are spread; all its devices have the same state, x and targets.
        batch_axis_name: mapped axis over which the samples of x and targets are spread.
        chunk_size: number of particles evaluated at a time; by default from a memory budget.
        precision: precision of the products that form the matrix; by default the highest. ``"bf16"`` is for the model,
            whose products are then in bfloat16 (see :func:`eki_jax.evaluate`), and leaves the matrix at the highest.
        norm_constraint: largest squared norm ``w^T Z H Z^T w`` of a whole step (before eta); a longer one is made
            shorter, as in K-FAC (Ba, Grosse, Martens, 2017). For :func:`softmax_cross_entropy` half of it is, to second
            order, how far the predictions move: their mean Kullback-Leibler divergence in nats. None for no limit.
        outlier_cut: largest squared distance of a particle's outputs from all others', as a multiple of the median
            distance, > 1; those beyond count as failed. By default 10^6; None for no cut.
        localized: flag; True is short for ``estimate=localized(iterations)``.
        iterations: number of conjugate gradients of a localized step; by default 10.
        space: space in which the span's system is solved, short for ``estimate=span(space)``.
    """

    antithetic: bool
    axis_name: str | None
    batch_axis_name: str | None
    chunk_size: int | None
    precision: Any
    norm_constraint: Any
    outlier_cut: Any
    localized: bool
    iterations: int
    space: Space | None


class Estimator(NamedTuple):
    """A way to estimate directions, and the settings that it is given.

    Attributes:
        setup: settings that a step does not change.
        estimate: way to estimate the direction.
    """

    setup: Setup
    estimate: Estimate

    def memory(self, forward: ForwardFn | None, mean: Params) -> Any:
        """What the estimate keeps from step to step, before the first; None for nothing, as without a model."""
        return None if forward is None else self.estimate.memory(self.setup, forward, mean)

    def from_model(
        self, forward: ForwardFn, mean: Params, drawn: Any, sigma: Array, damping: Array, batch: Batch, memory: Any
    ) -> Direction:
        """The direction, evaluating the model."""
        return self.estimate.direction(self.setup, forward, mean, drawn, sigma, damping, batch, memory)

    def from_outputs(
        self, mean: Params, drawn: Any, sigma: Array, damping: Array, outputs: Any, targets: Any
    ) -> Direction:
        """The direction from the particles' outputs."""
        return self.estimate.from_outputs(self.setup, mean, drawn, sigma, damping, outputs, targets)


def value_and_natural_direction(
    forward: ForwardFn,
    loss: LossFn,
    particles: int = 1000,
    sigma: Schedule = 0.1,
    damping: Schedule = 1e-4,
    deviations: Deviations = low_rank(1),  # noqa: B008
    *,
    estimate: Estimate | None = None,
    **settings: Unpack[EstimatorSettings],
) -> Callable[..., tuple[Array, Params]]:
    """The natural counterpart of :func:`jax.value_and_grad`, for any optimizer that takes a gradient.

    Args:
        forward: function ``forward(params, x) -> outputs`` as for :func:`natural_gradient`.
        loss: loss as for :func:`natural_gradient`.
        particles: number of particles J >= 2.
        sigma: scale of the deviations, > 0, or a schedule of ``count``.
        damping: lambda > 0, or a schedule of ``count``.
        deviations: kind of deviations, :func:`low_rank`, :func:`full_rank` or :func:`per_sample`.
        estimate: way to estimate the direction, :func:`span` or :func:`localized`; by default the span.
        **settings: keywords of the estimate, see :class:`EstimatorSettings`.

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
    estimator = make_estimator(loss, particles, deviations, estimate, **settings)
    sigma_of, damping_of = schedule("sigma", sigma, POSITIVE), schedule("damping", damping, POSITIVE)

    function("forward", forward, "a model, forward(params, x) -> outputs", arguments=2)
    if isinstance(deviations, PerSample) and deviations.feedback is not None:
        raise TypeError(
            "deviations: per_sample(feedback=...), which learns from step to step; wanted natural_gradient(...), whose "
            "state keeps that and whose optimizer= takes any of optax's, or feedback=None"
        )

    def f(params: Params, batch: Batch, key: Array, count: Any = 0) -> tuple[Array, Params]:
        scale, lam = (jnp.asarray(of_count(count), jnp.float32) for of_count in (sigma_of, damping_of))
        drawn = estimator.setup.cloud.draw(key, params)
        found = estimator.from_model(forward, params, drawn, scale, lam, batch, None)
        return found.loss, found.ascent

    once = compiled_once(f)

    def checked(params: Params, batch: Batch, key: Array, count: Any = 0) -> tuple[Array, Params]:
        params, batch = floating_params(params), traceable("batch", pair("batch", batch))
        return once(params, batch, particle_key("key", key), count)

    return checked


def floating_params(params: Params) -> Params:
    """One particle's parameters as arrays, if they are of a floating-point dtype.

    Raises:
        TypeError: another dtype, or no array.
        ValueError: no arrays.

    >>> floating_params(None)
    Traceback (most recent call last):
        ...
    ValueError: params: has no arrays; wanted one particle's parameters
    """
    if not jax.tree.leaves(params):
        raise ValueError("params: has no arrays; wanted one particle's parameters")
    return jax.tree.map(jnp.asarray, arrays("params", params, floating=True))


def make_estimator(
    loss: LossFn,
    particles: int,
    deviations: Deviations,
    estimate: Estimate | None = None,
    *,
    antithetic: bool = False,
    axis_name: str | None = None,
    batch_axis_name: str | None = None,
    chunk_size: int | None = None,
    precision: Any = None,
    norm_constraint: Any = None,
    localized: bool = False,
    iterations: int | None = None,
    space: Space | None = None,
    outlier_cut: Any = OUTLIER_CUT,
) -> Estimator:
    """An estimator of checked settings."""
    function("loss", loss, "a function of outputs and targets", arguments=2)
    particles = whole("particles", particles, 2)
    if chunk_size is not None:
        whole("chunk_size", chunk_size, or_="None for a memory budget")
    if outlier_cut is not None:
        real("outlier_cut", outlier_cut, ABOVE_ONE, or_="None for no cut")
    if antithetic and particles % 2:
        raise ValueError(f"particles: {particles} with antithetic=True; wanted an even number, for pairs")
    check_precision(precision)
    if norm_constraint is not None:
        real("norm_constraint", norm_constraint, POSITIVE, or_="None for no constraint")
    short: dict[str, Any] = {"space": space} if localized else {"iterations": iterations}
    if estimate is not None:
        short = {"localized": localized or None, "iterations": iterations, "space": space}
    for name, value in short.items():
        if value is not None:
            raise TypeError(f"{name}: {value!r}, which is for another estimate than the one asked for; wanted none")
    if estimate is None:
        if localized:
            estimate = localized_estimate(*([] if iterations is None else [iterations]))
        else:
            estimate = gradient() if isinstance(deviations, PerSample) else span(space)
    cloud = Cloud(deviations, particles, antithetic, Axis(axis_name))
    setup = Setup(loss, cloud, Axis(batch_axis_name), chunk_size, precision, norm_constraint, outlier_cut)
    estimate.check(setup)
    return Estimator(setup, estimate)
