"""The solver: a mean, deviations drawn from a key, and one damped Gauss-Newton step after another."""

from __future__ import annotations

from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp

from eki_jax._types import Array, Batch, Ensemble, ForwardFn, LossFn, Params, Schedule
from eki_jax.kernel.axes import Axis
from eki_jax.natural.damping import AdaptiveDamping, as_schedule
from eki_jax.natural.deviations import Deviations, FullRank, low_rank
from eki_jax.natural.direction import Direction, Estimate, mean_loss
from eki_jax.natural.estimates import span
from eki_jax.natural.estimator import EstimatorSettings, make_estimator
from eki_jax.natural.linear_algebra import inverse_square_root
from eki_jax.solvers.protocol import Solver, check_rows, check_settings, given, never_done


class NaturalState(NamedTuple):
    """State of :func:`natural_gradient`: a mean and a key, whatever the number of particles.

    Attributes:
        position: mean m, one particle's parameters.
        average: average of the iterates, a pytree like ``position``, or None without averaging.
        key: data of the key of all deviations, uint32, so that any checkpoint can hold it; the deviations of a step
            are a function of it, of ``count`` and of the particle's index.
        damping: lambda, where it adapts itself, else None.
        transform: matrix T with deviations ``sum_k T_jk e_k``, shape (J, J), where they are transformed, else None.
        count: number of steps taken, int32.
    """

    position: Params
    average: Params | None
    key: Array
    damping: Array | None
    transform: Array | None
    count: Array  # type: ignore[assignment]  # hides tuple.count, as in optax


class NaturalInfo(NamedTuple):
    """Numbers of one step that a person wants to see; all from before it moved anything, but for ``measured``.

    Attributes:
        loss: loss of the particles' mean output (of the mean particle's, for localized steps).
        predicted: decrease of the loss by its second-order model.
        measured: decrease of the loss of the mean particle on the same batch; None where lambda does not adapt.
        sigma: scale of the deviations.
        damping: lambda.
        fallback: flag, True where Cholesky's factorization failed and eigenvalues were used.
        is_finite: flag, True where all particles and the step were finite, the loss convex, and what schedules gave for
            sigma and lambda positive.
        failed: number of particles whose outputs were not finite; they took no part.
        moved: flag, True where the step was taken; the mean stays where it was unless all but the particles were
            finite.
    """

    loss: Array
    predicted: Array
    measured: Array | None
    sigma: Array
    damping: Array
    fallback: Array
    is_finite: Array
    failed: Array
    moved: Array


class NaturalSettings(EstimatorSettings, total=False):
    """Keywords of :func:`natural_gradient`: those of :class:`EstimatorSettings`, and what follows the direction.

    Attributes:
        learning_rate: factor eta > 0 of a step, or a schedule of the step count; by default 1.
        redraw_every: number of steps between fresh deviations; the steps of an epoch for one draw an epoch.
        square_root: flag; True keeps the first deviations and transforms them too, by
            ``(I + Z H Z^T / ((J - 1) lambda))^(-1/2)``: with lambda = 1 and a loss that is a negative log-likelihood,
            the solver's ``ensemble(state)`` then has the posterior's covariance (exactly, for a linear model). For
            :func:`full_rank` on one device.
        averaging: factor in [0, 1) of an exponential average of the iterates, corrected for its start, or a schedule of
            factors (n -> n / (n + 1) for the plain mean); in ``state.average``. None for none.
    """

    learning_rate: Schedule
    redraw_every: int
    square_root: bool
    averaging: Schedule | None


def natural_gradient(
    forward: ForwardFn | None,
    loss: LossFn,
    particles: int = 1000,
    sigma: Schedule = 0.1,
    damping: Schedule | AdaptiveDamping = 1e-4,
    deviations: Deviations = low_rank(1),  # noqa: B008
    *,
    estimate: Estimate | None = None,
    **settings: Unpack[NaturalSettings],
) -> Solver:
    r"""A damped Gauss-Newton step in the span of random deviations: the Kalman update with the loss's own Hessian.

    Particles ``u_j = m + sigma e_j`` have outputs whose centred rows are Z. With the loss's gradient g and Hessian H in
    the outputs, both at the mean output,

    .. math:: w = (\tfrac{Z H Z^T}{J - 1} + \lambda I)^{-1} \tfrac{Z g}{\sqrt{J - 1}}, \qquad
              m \leftarrow m - \eta\, \sigma \sum_j w_j e_j / \sqrt{J - 1} .

    The model is evaluated and never differentiated. See ``docs/natural_gradient.md`` for the derivation.

    Args:
        forward: function ``forward(params, x) -> outputs`` of one particle, logits for :func:`softmax_cross_entropy`.
            With :func:`low_rank` deviations its matrices come as :class:`LowRankMatrix`, which knows ``x @ w``; for
            flax modules :func:`eki_jax.flax.low_rank_forward` makes one. None where only ``update`` is used.
        loss: function convex in the outputs: :func:`softmax_cross_entropy`, :func:`eki_jax.squared_error`,
            :func:`eki_jax.cross_entropy`, :func:`mean_over_samples`, one of your own that says what it knows of itself
            (:mod:`eki_jax.losses.protocol`), or any ``loss(outputs, targets) -> scalar`` of at most 4,096 outputs.
        particles: number J >= 2 of particles on all devices together.
        sigma: scale of the deviations, > 0, or a schedule of the step count.
        damping: lambda > 0, a schedule, or :func:`adaptive_damping`. lambda = 1 is the Kalman update of the prior
            N(m, sigma^2 C) with C the covariance of the deviations.
        deviations: kind of deviations, :func:`low_rank` or :func:`full_rank`.
        estimate: way to estimate the direction. :func:`span`, the default, solves in the span of the deviations.
            :func:`localized` estimates the derivative of each sample's outputs by a regression on what reached that
            sample, and solves for all parameters, with fewer particles for the same accuracy. It is for vectors, and
            for matrices of :func:`low_rank` deviations that each sample meets in no more places than the matrix has
            rows (dense layers: one; convolutions of few pixels and many channels: each pixel); other leaves keep the
            plain estimate, from what the regressions leave unexplained. Gradient and Hessian are then those at the mean
            particle's output. See :mod:`eki_jax.natural.estimates.localized`.
        **settings: keywords of the step, see :class:`NaturalSettings`.

    Returns:
        A :class:`eki_jax.Solver` with :class:`NaturalState`, whose ``init`` takes one particle's parameters and a key.

    Raises:
        TypeError: a ``loss`` that is no function; an unknown setting; from ``init``, parameters that are not
            floating-point; from ``update``, adaptive damping or a localized estimate, which need the model; from
            ``with_ensemble``, always: the particles are a mean and a key.
        ValueError: fewer than 2 particles; sigma, lambda, eta, a norm or an averaging factor out of range; a loss that
            is not convex, where values are known (in a compiled function the step is refused and ``info.is_finite``
            is False); a rank above a leaf's; outputs or targets that do not fit.

    >>> import jax, jax.numpy as jnp
    >>> import eki_jax
    >>> solver = natural_gradient(lambda u, x: x @ u, eki_jax.squared_error(), 20, damping=1e-6)
    >>> x = jax.random.normal(jax.random.key(0), (8, 3))
    >>> state = solver.init(jnp.zeros(3), jax.random.key(1))
    >>> state, info = solver.step(state, (x, x @ jnp.array([1.0, -2.0, 3.0])))
    >>> jnp.round(state.position, 1)  # linear least squares: one step
    Array([ 1., -2.,  3.], dtype=float32)
    """
    check_settings(settings, NaturalSettings)
    follow = _Following.of(settings)
    estimating: Any = {name: value for name, value in settings.items() if name not in _Following._fields}
    if follow.square_root:
        if not isinstance(deviations, FullRank) or settings.get("axis_name") or settings.get("batch_axis_name"):
            raise ValueError("square_root: True wants full_rank(...) deviations, localized=False and one device")
        if estimate is None and not settings.get("localized"):
            estimate = span("ensemble")
            estimating.pop("space", None)
    estimator = make_estimator(loss, particles, deviations, estimate, **estimating)
    cloud, axes = estimator.setup.cloud, estimator.setup.axes
    if follow.square_root and estimator.estimate != span("ensemble"):
        raise ValueError("square_root: True wants full_rank(...) deviations, localized=False and one device")
    sigma_of, rate_of = as_schedule(sigma, "sigma"), as_schedule(follow.learning_rate, "learning_rate")
    adaptive = damping if isinstance(damping, AdaptiveDamping) else None
    damping_of = None if isinstance(damping, AdaptiveDamping) else as_schedule(damping, "damping")

    def init(params: Params, key: Array) -> NaturalState:
        params = _floating(params)
        jax.eval_shape(lambda: cloud._replace(axis=Axis()).draw(key, params))  # raises where deviations do not fit
        average = None if follow.averaging is None else jax.tree.map(jnp.copy, params)  # a buffer to donate
        initial = None if adaptive is None else jnp.asarray(adaptive.initial, jnp.float32)
        transform = jnp.eye(particles) if follow.square_root else None
        return NaturalState(params, average, jax.random.key_data(key), initial, transform, jnp.zeros((), jnp.int32))

    def drawn(state: NaturalState) -> Any:
        number = 0 if follow.square_root else state.count // follow.redraw_every
        rows = cloud.draw(jax.random.fold_in(jax.random.wrap_key_data(state.key), number), state.position)
        return rows if state.transform is None else _transformed(state.transform, *rows)

    def scales(state: NaturalState) -> tuple[Array, Array]:
        lam = state.damping if damping_of is None else damping_of(state.count)
        return jnp.asarray(sigma_of(state.count), jnp.float32), jnp.asarray(lam, jnp.float32)

    def step(state: NaturalState, batch: Batch) -> tuple[NaturalState, NaturalInfo]:
        model = given(forward)
        found = estimator.from_model(model, state.position, drawn(state), *scales(state), batch)
        new, info = moved(state, found)
        if adaptive is None:
            return new, info
        x, targets = batch
        before, after = (mean_loss(loss, model(s.position, x), targets, axes) for s in (state, new))
        measured = before - after
        ratio = jnp.where(jnp.isfinite(measured), measured / jnp.maximum(info.predicted, 1e-30), -jnp.inf)
        return new._replace(damping=adaptive.next(info.damping, ratio)), info._replace(measured=measured)

    def update(state: NaturalState, outputs: Any, targets: Any) -> tuple[NaturalState, NaturalInfo]:
        if adaptive is not None:
            raise TypeError("damping: adaptive, which evaluates the model; wanted a number or a schedule for update()")
        if not estimator.estimate.needs_model:
            check_rows(outputs, particles // cloud.axis.size)
        return moved(state, estimator.from_outputs(state.position, drawn(state), *scales(state), outputs, targets))

    def moved(state: NaturalState, found: Direction) -> tuple[NaturalState, NaturalInfo]:
        rate = jnp.asarray(rate_of(state.count), jnp.float32)
        scale, lam = scales(state)
        position = jax.tree.map(lambda m, d: (m - rate * d).astype(m.dtype), state.position, found.ascent)
        failed = jnp.asarray(particles - found.healthy, jnp.int32)
        info = NaturalInfo(
            loss=found.loss,
            is_finite=found.usable & (failed == 0),
            failed=failed,
            moved=found.usable,
            predicted=found.predicted(rate),
            measured=None,
            sigma=scale,
            damping=lam,
            fallback=found.fallback,
        )
        average = _averaged(state, position, follow.averaging)
        new = state._replace(position=position, average=average, count=state.count + 1)
        if state.transform is not None and found.matrix is not None:
            shrink = inverse_square_root(found.matrix, lam) @ state.transform
            new = new._replace(transform=jnp.where(found.usable, shrink, state.transform))
        return new, info

    def ensemble(state: NaturalState) -> Ensemble:
        return cloud.ensemble(state.position, drawn(state), scales(state)[0])

    def estimated(state: NaturalState) -> Params:
        return state.position if state.average is None else state.average

    extra = estimator.estimate.extra_passes + (0 if adaptive is None else 2)
    return Solver(init, step, update, ensemble, estimated, _no_particles_to_replace, never_done, lambda J: J + extra)


class _Following(NamedTuple):
    """The settings of what follows the direction, with their defaults; see :class:`NaturalSettings`."""

    learning_rate: Schedule = 1.0
    redraw_every: int = 1
    square_root: bool = False
    averaging: Schedule | None = None

    @classmethod
    def of(cls, settings: Any) -> _Following:
        """Those among ``settings``, checked."""
        found = cls(**{name: settings[name] for name in cls._fields if name in settings})
        if found.redraw_every < 1:
            raise ValueError(f"redraw_every: {found.redraw_every}; wanted a number of steps >= 1")
        if not (found.averaging is None or callable(found.averaging) or 0 <= found.averaging < 1):
            raise ValueError(f"averaging: {found.averaging}; wanted a factor in [0, 1), a schedule, or None")
        return found


def _no_particles_to_replace(state: NaturalState, ensemble: Ensemble) -> NaturalState:
    raise TypeError(
        "with_ensemble: the particles of a natural gradient are a mean and a key, drawn anew in every step, and cannot "
        "be replaced; wanted state._replace(position=...) for another mean"
    )


def _transformed(transform: Array, factors: Any, signs: Array) -> tuple[Any, Array]:
    """Deviations ``sum_k T_jk sign_k e_k``; their signs are then all positive."""
    t = transform * signs
    return jax.tree.map(lambda e: jnp.tensordot(t.astype(e.dtype), e, axes=1), factors), jnp.ones_like(signs)


def _averaged(state: NaturalState, position: Params, averaging: Schedule | None) -> Params | None:
    if averaging is None:
        return None
    if callable(averaging):
        factor = jnp.asarray(averaging(state.count), jnp.float32)
    else:  # as the weights c^n, c^(n-1), ..., 1 over their sum: the start has no weight
        n = state.count.astype(jnp.float32)
        factor = averaging * (1 - averaging**n) / (1 - averaging ** (n + 1))
    return jax.tree.map(lambda a, m: (a + (1 - factor) * (m - a)).astype(m.dtype), state.average, position)


def _floating(params: Params) -> Params:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if not leaves:
        raise ValueError("params: has no arrays; wanted one particle's parameters")
    for path, leaf in leaves:
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(f"params{jax.tree_util.keystr(path)}: dtype {dtype}; wanted a floating-point dtype")
    return jax.tree.map(jnp.asarray, params)
