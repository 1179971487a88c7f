"""The solver: a mean, deviations drawn from a key, and one damped Gauss-Newton step after another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from eki_jax._checks import ABOVE_ONE, POSITIVE, SHARE, function, offers, pair, real, schedule, whole
from eki_jax._types import Array, Batch, Ensemble, ForwardFn, LossFn, Params, Schedule
from eki_jax.kernel.axes import Axis
from eki_jax.kernel.health import finite_particles
from eki_jax.kernel.interpreter import on_devices
from eki_jax.kernel.keys import particle_key
from eki_jax.kernel.linear_algebra import inverse_root
from eki_jax.natural.damping import AdaptiveDamping
from eki_jax.natural.deviations import Deviations, FullRank, low_rank
from eki_jax.natural.direction import Direction, Estimate, mean_loss
from eki_jax.natural.estimates import span
from eki_jax.natural.estimator import EstimatorSettings, floating_params, make_estimator
from eki_jax.solvers.protocol import (
    Solver,
    bad_targets,
    check_rows,
    check_settings,
    check_state,
    compiled,
    given,
    never_done,
)
from eki_jax.solvers.reasons import Reason, first_reason

_SHORTEST = 4.0**-4  # of the shares of a step that are tried


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
        memory: record of what the estimate has learned of the model, see :func:`learned_feedback`; None where it learns
            nothing.
        inner: state of the optimizer; None without one.
    """

    position: Params
    average: Params | None
    key: Array
    damping: Array | None
    transform: Array | None
    count: Array  # type: ignore[assignment]  # hides tuple.count, as in optax
    memory: Any = None
    inner: Any = None


class NaturalInfo(NamedTuple):
    """Numbers of one step that a person wants to see; all from before it moved anything, but for ``measured``.

    The settings are those that were used.

    Attributes:
        loss: loss of the particles' mean output (of the mean particle's, for localized steps).
        predicted: decrease of the loss by its second-order model; with an optimizer, along the direction itself.
        measured: decrease of the loss of the mean particle on the same batch that the step makes, or would have made
            where it is refused; None where nobody asks: ``loss_limit=None`` and a lambda that does not adapt.
        share: share of the whole step that was taken, 1 unless that would have raised the loss beyond the limit.
        sigma: scale of the deviations.
        damping: lambda.
        fallback: flag, True where Cholesky's factorization failed and eigenvalues were used.
        is_finite: flag, True where the step was taken and no particle had failed.
        failed: number of particles that took no part, int32: their outputs were not finite, or beyond the cut
            (``outlier_cut`` of :class:`EstimatorSettings`).
        moved: flag, True where the step was taken; False where it was refused, and the state is what it was (but for a
            lambda that adapts).
        reason: code of :class:`eki_jax.Reason` that says why the step was refused, int32; 0 where it was taken.
    """

    loss: Array
    predicted: Array
    measured: Array | None
    share: Array
    sigma: Array
    damping: Array
    fallback: Array
    is_finite: Array
    failed: Array
    moved: Array
    reason: Array


class NaturalSettings(EstimatorSettings, total=False):
    """Keywords of :func:`natural_gradient`: those of :class:`EstimatorSettings`, and what follows the direction.

    Attributes:
        learning_rate: factor eta > 0 of a step, or a schedule of the step count; by default 1.
        optimizer: transformation of the direction in the place of ``learning_rate``, such as ``optax.sgd(0.1, 0.9)``:
            anything with ``init(params)`` and ``update(direction, state, params)`` that gives what is added to the
            parameters. None for plain steps.
        redraw_every: number of steps between fresh deviations; the steps of an epoch for one draw an epoch.
        square_root: flag; True keeps the first deviations and transforms them too, by
            ``(I + Z H Z^T / ((J - 1) lambda))^(-1/2)``: with lambda = 1 and a loss that is a negative log-likelihood,
            the solver's ``ensemble(state)`` then has the posterior's covariance (exactly, for a linear model). For
            :func:`full_rank` on one device.
        averaging: factor in [0, 1) of an exponential average of the iterates, corrected for its start, or a schedule of
            factors (n -> n / (n + 1) for the plain mean); in ``state.average``. None for none.
        loss_limit: largest loss of the mean particle after a step on the step's own batch, as a multiple of the loss
            before it, > 1. A step beyond is made shorter, to a quarter, a sixteenth and so on, each time at one forward
            pass of one particle; where a 256th of it is too long it is refused. (An adaptive lambda becomes larger
            either way.) By default 1.1, and None with an ``optimizer``, whose steps go on from those before. None does
            not ask, and saves two forward passes of one particle.
    """

    learning_rate: Schedule
    optimizer: Any
    redraw_every: int
    square_root: bool
    averaging: Schedule | None
    loss_limit: Any


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
            It is written for arrays, whatever the deviations. None where only ``update`` is used.
        loss: function convex in the outputs: :func:`softmax_cross_entropy`, :func:`eki_jax.squared_error`,
            :func:`eki_jax.cross_entropy`, :func:`mean_over_samples`, one of your own that says what it knows of itself
            (:mod:`eki_jax.losses.protocol`), or any ``loss(outputs, targets) -> scalar`` of at most 4,096 outputs.
        particles: number J >= 2 of particles on all devices together.
        sigma: scale of the deviations, > 0, or a schedule of the step count.
        damping: lambda > 0, a schedule, or :func:`adaptive_damping`. lambda = 1 is the Kalman update of the prior
            N(m, sigma^2 C) with C the covariance of the deviations.
        deviations: kind of deviations, :func:`low_rank` or :func:`full_rank`; or :func:`per_sample`, whose direction is
            the loss's gradient: ``damping`` is not used then.
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
    if forward is not None:
        function("forward", forward, "a model, forward(params, x) -> outputs", arguments=2)
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
    sigma_of = schedule("sigma", sigma, POSITIVE)
    rate_of = schedule("learning_rate", follow.learning_rate, POSITIVE)
    adaptive = damping if isinstance(damping, AdaptiveDamping) else None
    damping_of = None if isinstance(damping, AdaptiveDamping) else schedule("damping", damping, POSITIVE)
    if adaptive is not None and follow.optimizer is not None:
        raise TypeError("damping: adaptive with an optimizer, whose steps it cannot foresee; wanted one of them")
    factor_of = None if follow.averaging is None else schedule("averaging", follow.averaging, SHARE)
    particles = cloud.particles
    one: Any = np.float32(1)

    def init(params: Params, key: Array) -> NaturalState:
        params = floating_params(params)
        key = particle_key("key", key)
        jax.eval_shape(lambda: cloud._replace(axis=Axis()).draw(key, params))  # raises where deviations do not fit
        # Buffers of their own: a state that is donated must not take the caller's parameters with it.
        params, average = jax.tree.map(jnp.copy, params), None
        if follow.averaging is not None:
            average = jax.tree.map(jnp.copy, params)
        initial = None if adaptive is None else jnp.asarray(adaptive.initial, jnp.float32)
        transform = jnp.eye(particles) if follow.square_root else None
        memory = estimator.memory(forward, params)
        inner = None if follow.optimizer is None else follow.optimizer.init(params)
        count = jnp.zeros((), jnp.int32)
        return NaturalState(params, average, jax.random.key_data(key), initial, transform, count, memory, inner)

    def drawn(state: NaturalState) -> Any:
        number = 0 if follow.square_root else state.count // follow.redraw_every
        rows = cloud.draw(jax.random.fold_in(jax.random.wrap_key_data(state.key), number), state.position)
        return rows if state.transform is None else _transformed(state.transform, *_about_zero(*rows))

    def scales(state: NaturalState) -> tuple[Array, Array]:
        lam = state.damping if damping_of is None else damping_of(state.count)
        return jnp.asarray(sigma_of(state.count), jnp.float32), jnp.asarray(lam, jnp.float32)

    def step(state: NaturalState, batch: Batch) -> tuple[NaturalState, NaturalInfo]:
        check_state(state, NaturalState, "natural_gradient")
        model, (x, targets) = given(forward), pair("batch", batch)
        found = estimator.from_model(model, state.position, drawn(state), *scales(state), (x, targets), state.memory)
        updates, inner = followed(state, found)
        if adaptive is None and follow.loss_limit is None:
            return moved(state, found, updates, inner, targets)
        at = lambda position: mean_loss(loss, on_devices(model, position, x), targets, axes)
        before, whole_step = at(state.position), at(stepped(state, updates, one))
        share, after = one, whole_step
        if follow.loss_limit is not None:
            rose = lambda after: _rose(found.loss, before, after, follow.loss_limit)

            def shorter(carry: tuple[Array, Array]) -> tuple[Array, Array]:
                share = carry[0] / 4
                return share, at(stepped(state, updates, share))

            goes_on = lambda carry: rose(carry[1]) & (carry[0] > _SHORTEST)
            share, after = jax.lax.while_loop(goes_on, shorter, (one, whole_step))
        new, info = moved(state, found, updates, inner, targets, share, (before, after))
        if adaptive is None:
            return new, info
        # The whole step's, shortened or not: it is what lambda is to answer for.
        measured = before - whole_step
        predicted = jnp.maximum(found.predicted(rate_at(state)), 1e-30)
        ratio = jnp.where(jnp.isfinite(measured), measured / predicted, -jnp.inf)
        return new._replace(damping=adaptive.next(info.damping, ratio)), info

    def update(state: NaturalState, outputs: Any, targets: Any) -> tuple[NaturalState, NaturalInfo]:
        check_state(state, NaturalState, "natural_gradient")
        if adaptive is not None:
            raise TypeError("damping: adaptive, which evaluates the model; wanted a number or a schedule for update()")
        if not estimator.estimate.needs_model:
            check_rows(outputs, particles // cloud.axis.size)
        found = estimator.from_outputs(state.position, drawn(state), *scales(state), outputs, targets)
        return moved(state, found, *followed(state, found), targets)

    def rate_at(state: NaturalState) -> Array:
        return jnp.asarray(rate_of(state.count), jnp.float32)

    def followed(state: NaturalState, found: Direction) -> tuple[Params, Any]:
        """What a whole step adds to the parameters, and the optimizer's state after it."""
        if follow.optimizer is None:
            rate = rate_at(state)
            return jax.tree.map(lambda d: -rate.astype(d.dtype) * d, found.ascent), None
        return follow.optimizer.update(found.ascent, state.inner, state.position)

    def stepped(state: NaturalState, updates: Params, share: Array) -> Params:
        return jax.tree.map(lambda m, d: (m + share.astype(d.dtype) * d).astype(m.dtype), state.position, updates)

    def moved(
        state: NaturalState,
        found: Direction,
        updates: Params,
        inner: Any,
        targets: Any,
        share: Array = one,
        losses: tuple[Array, Array] | None = None,
    ) -> tuple[NaturalState, NaturalInfo]:
        """A share of the whole step, with the mean particle's losses before and after it, where those are known."""
        rate, (scale, lam) = share * rate_at(state), scales(state)
        position = stepped(state, updates, share)
        average, factor = _averaged(state, position, follow.averaging, factor_of)
        in_range = POSITIVE.holds(rate) & (SHARE.holds(factor) if callable(follow.averaging) else True)
        rose = jnp.zeros((), bool)
        if losses is not None and follow.loss_limit is not None:
            rose = _rose(found.loss, *losses, follow.loss_limit)
        reason = first_reason(
            (Reason.PARAMETERS, ~finite_particles(jax.tree.map(lambda m: m[None], state.position))[0]),
            (Reason.TARGETS, axes.batch.largest(jnp.asarray(bad_targets(targets, None), jnp.int32)) > 0),
            (Reason.SETTING, ~in_range),
            (found.reason, found.reason > 0),
            (Reason.LOSS_ROSE, rose),
        )
        ok = reason == 0
        failed = jnp.asarray(particles - found.healthy, jnp.int32)
        info = NaturalInfo(
            loss=found.loss,
            is_finite=ok & (failed == 0),
            failed=failed,
            moved=ok,
            reason=reason,
            predicted=found.predicted(rate),
            measured=None if losses is None else losses[0] - losses[1],
            share=share,
            sigma=scale,
            damping=lam,
            fallback=found.fallback,
        )
        new = state._replace(position=position, average=average, inner=inner, memory=found.memory)
        if state.transform is not None and found.matrix is not None:
            shrinking, _ = inverse_root(found.matrix / lam.astype(found.matrix.dtype))
            new = new._replace(transform=shrinking.astype(state.transform.dtype) @ state.transform)
        new = jax.tree.map(lambda new, old: jnp.where(ok, new, old), new, state)
        return new._replace(count=state.count + ok.astype(state.count.dtype)), info

    def ensemble(state: NaturalState) -> Ensemble:
        return cloud.ensemble(state.position, drawn(state), scales(state)[0])

    def estimated(state: NaturalState) -> Params:
        return state.position if state.average is None else state.average

    extra = estimator.estimate.extra_passes(estimator.setup) + (
        0 if adaptive is None and follow.loss_limit is None else 2
    )
    return compiled(
        Solver(init, step, update, ensemble, estimated, _no_particles_to_replace, never_done, lambda J: J + extra)
    )


class _Following(NamedTuple):
    """The settings of what follows the direction, with their defaults; see :class:`NaturalSettings`."""

    learning_rate: Schedule = 1.0
    optimizer: Any = None
    redraw_every: int = 1
    square_root: bool = False
    averaging: Schedule | None = None
    loss_limit: Any = 1.1

    @classmethod
    def of(cls, settings: Any) -> _Following:
        """Those among ``settings``, checked."""
        found = cls(**{name: settings[name] for name in cls._fields if name in settings})
        if found.optimizer is not None:
            wanted = "an optimizer with init and update, such as optax.sgd(0.1)"
            offers("optimizer", found.optimizer, ("init", "update"), wanted)
            if "learning_rate" in settings:
                raise TypeError(
                    f"learning_rate: {found.learning_rate!r} with an optimizer, which has its own; wanted one"
                )
            found = found._replace(loss_limit=settings.get("loss_limit"))
        whole("redraw_every", found.redraw_every)
        if found.loss_limit is not None:
            real("loss_limit", found.loss_limit, ABOVE_ONE, or_="None for no limit")
        return found


def _no_particles_to_replace(state: NaturalState, ensemble: Ensemble) -> NaturalState:
    raise TypeError(
        "with_ensemble: the particles of a natural gradient are a mean and a key, drawn anew in every step, and cannot "
        "be replaced; wanted state._replace(position=...) for another mean"
    )


def _transformed(transform: Array, factors: Any, signs: Array) -> tuple[Any, Array]:
    """Deviations ``sum_k T_jk sign_k e_k``; their signs are then all positive."""
    t = transform * signs.astype(transform.dtype)[None]
    return jax.tree.map(lambda e: jnp.tensordot(t.astype(e.dtype), e, axes=1), factors), jnp.ones_like(signs)


def _about_zero(factors: Any, signs: Array) -> tuple[Any, Array]:
    """The deviations minus their mean: particles that are kept would carry that mean through all steps."""
    signed = jax.tree.map(lambda e: e * signs.reshape(-1, *[1] * (e.ndim - 1)).astype(e.dtype), factors)
    return jax.tree.map(lambda e: e - jnp.mean(e, axis=0, keepdims=True), signed), jnp.ones_like(signs)


def _rose(loss: Array, before: Array, after: Array, limit: Any) -> Array:
    """Whether the mean particle's loss after a step is beyond the limit.

    ``loss`` is that of the particles' mean output; either it or the mean particle's may be small by chance, where the
    particles' noise is all that is left of both.
    """
    largest = jnp.where(jnp.isfinite(before), jnp.maximum(before, loss), loss)  # one that had failed may recover
    rise = (jnp.asarray(limit, after.dtype) - 1) * jnp.abs(largest) + float(jnp.finfo(jnp.float32).eps)
    return ~(after - largest <= rise)  # NaN has risen


def _averaged(
    state: NaturalState, position: Params, averaging: Schedule | None, factor_of: Callable[[Array], Any] | None
) -> tuple[Params | None, Array]:
    """The average with the next iterate, and the factor of the old one."""
    if factor_of is None:
        return None, jnp.zeros(())
    factor = jnp.asarray(factor_of(state.count), jnp.float32)
    if not callable(averaging):  # as the weights c^n, c^(n-1), ..., 1 over their sum: the start has no weight
        n = state.count.astype(jnp.float32)
        factor = factor * (1 - factor**n) / (1 - factor ** (n + 1))
    average = lambda a, m: (a + (1 - factor).astype(a.dtype) * (m - a)).astype(m.dtype)
    return jax.tree.map(average, state.average, position), factor
