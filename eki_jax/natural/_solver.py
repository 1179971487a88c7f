"""The solver: a mean, deviations drawn from a key, and one damped Gauss-Newton step in their span."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from eki_jax._tree import local_size
from eki_jax._types import Array, Batch, Ensemble, ForwardFn, LossFn, Params, Schedule
from eki_jax.natural import _axes
from eki_jax.natural._damping import AdaptiveDamping, as_schedule
from eki_jax.natural._deviations import Deviations, FullRank, low_rank
from eki_jax.natural._direction import Direction, make_estimator, mean_loss
from eki_jax.natural._solve import HIGHEST, Space, inverse_square_root


class NaturalState(NamedTuple):
    """State of :func:`natural_gradient`: a mean and a key, whatever the number of particles.

    Attributes:
        position: m, one particle's parameters.
        average: the average of the iterates, a pytree like ``position``, or None without averaging.
        key: the data of the key of all deviations, uint32, so that any checkpoint can hold it; the deviations of a step
            are a function of it, of ``count`` and of the particle's index.
        damping: lambda, if it adapts itself, else None.
        transform: T with deviations ``sum_k T_jk e_k``, shape (J, J), where they are transformed, else None.
        count: the number of steps taken, int32.
    """

    position: Params
    average: Params | None
    key: Array
    damping: Array | None
    transform: Array | None
    count: Array  # type: ignore[assignment]  # hides tuple.count, as in optax


class NaturalInfo(NamedTuple):
    """What a person wants to see of a step; all of it before the step moved anything, but for ``measured``.

    Attributes:
        loss: of the particles' mean output (of the mean particle's, for localized steps).
        predicted: by how much the second-order model of the loss falls.
        measured: by how much the loss of the mean particle fell on the same batch; None where lambda does not adapt.
        sigma: scale of the deviations.
        damping: lambda.
        fallback: whether Cholesky's factorization failed and eigenvalues were used.
        is_finite: whether all particles and the step were finite, the loss convex, and what schedules gave for sigma
            and lambda positive. The mean stays where it was unless all but the particles were so.
        failed: the number of particles whose outputs were not finite; they took no part.
    """

    loss: Array
    predicted: Array
    measured: Array | None
    sigma: Array
    damping: Array
    fallback: Array
    is_finite: Array
    failed: Array


class NaturalSolver(NamedTuple):
    """The natural gradient as pure functions; the first three are those of :class:`eki_jax.Solver`.

    Attributes:
        init: ``init(params, key) -> state``, from ONE particle's parameters.
        step: ``step(state, (x, targets)) -> (state, info)``; evaluates the model and updates.
        update: ``update(state, outputs, targets) -> (state, info)``, for models that run somewhere else: evaluate
            ``ensemble(state)`` there and hand in the outputs, shape (J, ...).
        ensemble: ``ensemble(state) -> (J, ...)``, the particles of the next step, formed in full.
        passes: forward passes that ``step`` spends on a sample.
    """

    init: Callable[[Params, Array], NaturalState]
    step: Callable[[NaturalState, Batch], tuple[NaturalState, NaturalInfo]]
    update: Callable[[NaturalState, Any, Any], tuple[NaturalState, NaturalInfo]]
    ensemble: Callable[[NaturalState], Ensemble]
    passes: int


def natural_gradient(
    forward: ForwardFn | None,
    loss: LossFn,
    particles: int = 1000,
    sigma: Schedule = 0.1,
    damping: Schedule | AdaptiveDamping = 1e-4,
    deviations: Deviations = low_rank(1),  # noqa: B008
    *,
    learning_rate: Schedule = 1.0,
    antithetic: bool = False,
    redraw_every: int = 1,
    square_root: bool = False,
    averaging: Schedule | None = None,
    localized: bool = False,
    iterations: int = 10,
    space: Space | None = None,
    axis_name: str | None = None,
    batch_axis_name: str | None = None,
    chunk_size: int | None = None,
    precision: Any = HIGHEST,
    norm_constraint: float | None = None,
) -> NaturalSolver:
    r"""A damped Gauss-Newton step in the span of random deviations: the Kalman update with the loss's own Hessian.

    Particles ``u_j = m + sigma e_j`` have outputs whose centred rows are Z. With the loss's gradient g and Hessian H in
    the outputs, both at the mean output,

    .. math:: w = (\tfrac{Z H Z^T}{J - 1} + \lambda I)^{-1} \tfrac{Z g}{\sqrt{J - 1}}, \qquad
              m \leftarrow m - \eta\, \sigma \sum_j w_j e_j / \sqrt{J - 1} .

    The model is evaluated and never differentiated. See ``docs/natural_gradient.md`` for the derivation.

    Args:
        forward: ``forward(params, x) -> outputs`` for one particle: logits for :func:`softmax_cross_entropy`. With
            :func:`low_rank` deviations its matrices come as :class:`LowRankMatrix`, which knows ``x @ w``; for flax
            modules :func:`eki_jax.flax.low_rank_forward` makes such a function. None where only ``update`` is used.
        loss: convex in the outputs: :func:`softmax_cross_entropy`, :func:`eki_jax.squared_error`,
            :func:`mean_over_samples`, or any ``loss(outputs, targets) -> scalar`` of at most 4,096 outputs.
        particles: J >= 2, on all devices together.
        sigma: scale of the deviations, > 0, or a schedule of the step count.
        damping: lambda > 0, a schedule, or :func:`adaptive_damping`. lambda = 1 is the Kalman update of the prior
            N(m, sigma^2 C) with C the covariance of the deviations.
        deviations: :func:`low_rank` or :func:`full_rank`.
        learning_rate: eta > 0, or a schedule.
        antithetic: draw deviations in pairs of opposite sign; J even.
        redraw_every: steps between fresh deviations; the steps of an epoch for one draw an epoch.
        square_root: keep the first deviations and transform them too, by ``(I + Z H Z^T / ((J - 1) lambda))^(-1/2)``:
            with lambda = 1 and a loss that is a negative log-likelihood, :attr:`NaturalSolver.ensemble` then has the
            posterior's covariance (exactly, for a linear model). For :func:`full_rank` on one device.
        averaging: factor in [0, 1) of an exponential average of the iterates, corrected for its start, or a schedule of
            factors (n -> n / (n + 1) for the plain mean); in ``state.average``. None for none.
        localized: estimate the derivative of each sample's outputs by a regression on what reached that sample, and
            solve for all parameters instead of the deviations' span, with fewer particles for the same accuracy. For
            vectors, and for matrices of :func:`low_rank` deviations that each sample meets in no more places than the
            matrix has rows (dense layers: one; convolutions of few pixels and many channels: each pixel); other leaves
            keep the plain estimate, from what the regressions leave unexplained. Gradient and Hessian are then those at
            the mean particle's output. See :mod:`eki_jax.natural._localized` for the estimate.
        iterations: of conjugate gradients for a ``localized`` step.
        space: "ensemble" (J x J) or "output" forces where the system is solved; the smaller by default.
        axis_name: mapped axis over which the particles are spread; all its devices have the same state, x and targets.
        batch_axis_name: mapped axis over which the samples of x and targets are spread.
        chunk_size: particles evaluated at a time; from a memory budget by default.
        precision: of the products that form the matrix.
        norm_constraint: the largest squared norm ``w^T Z H Z^T w`` of a whole step (before eta); a longer one is made
            shorter, as in K-FAC (Ba, Grosse, Martens, 2017). For :func:`softmax_cross_entropy` half of it is, to second
            order, how far the predictions move: their mean Kullback-Leibler divergence in nats. None for no limit.

    Returns:
        A :class:`NaturalSolver` with :class:`NaturalState`.

    Raises:
        TypeError: a ``loss`` that is no function; from ``init``, parameters that are not floating-point; from
            ``update``, adaptive damping, which needs the model.
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
    if redraw_every < 1:
        raise ValueError(f"redraw_every: {redraw_every}; wanted a number of steps >= 1")
    if not (averaging is None or callable(averaging) or 0 <= averaging < 1):
        raise ValueError(f"averaging: {averaging}; wanted a factor in [0, 1), a schedule, or None")
    estimator = make_estimator(
        loss,
        particles,
        deviations,
        antithetic=antithetic,
        localized=localized,
        iterations=iterations,
        space="ensemble" if square_root else space,
        axis_name=axis_name,
        batch_axis_name=batch_axis_name,
        chunk_size=chunk_size,
        precision=precision,
        norm_constraint=norm_constraint,
    )
    if square_root and (not isinstance(deviations, FullRank) or axis_name or batch_axis_name or localized):
        raise ValueError("square_root: True wants full_rank(...) deviations, localized=False and one device")
    sigma_of, rate_of = as_schedule(sigma, "sigma"), as_schedule(learning_rate, "learning_rate")
    damping_of = None if isinstance(damping, AdaptiveDamping) else as_schedule(damping, "damping")

    def init(params: Params, key: Array) -> NaturalState:
        params = _floating(params)
        initial = jnp.asarray(damping.initial, jnp.float32) if isinstance(damping, AdaptiveDamping) else None
        alone = estimator.cloud._replace(axis_name=None)
        jax.eval_shape(lambda: alone.draw(key, params))  # raises where the deviations do not fit the parameters
        average = None if averaging is None else jax.tree.map(jnp.copy, params)  # a buffer of its own, to donate
        transform = jnp.eye(particles) if square_root else None
        return NaturalState(params, average, jax.random.key_data(key), initial, transform, jnp.zeros((), jnp.int32))

    def drawn(state: NaturalState) -> Any:
        number = 0 if square_root else state.count // redraw_every
        rows = estimator.cloud.draw(jax.random.fold_in(jax.random.wrap_key_data(state.key), number), state.position)
        return rows if state.transform is None else _transformed(state.transform, *rows)

    def settings(state: NaturalState) -> tuple[Array, Array]:
        lam = state.damping if damping_of is None else damping_of(state.count)
        return jnp.asarray(sigma_of(state.count), jnp.float32), jnp.asarray(lam, jnp.float32)

    def step(state: NaturalState, batch: Batch) -> tuple[NaturalState, NaturalInfo]:
        if forward is None:
            raise TypeError("forward: None; wanted a model for step(), or call update() with the outputs")
        found = estimator.from_model(forward, state.position, drawn(state), *settings(state), batch)
        new, info = moved(state, found)
        if isinstance(damping, AdaptiveDamping):
            x, targets = batch
            losses = (mean_loss(loss, forward(s.position, x), targets, estimator.axes) for s in (state, new))
            measured = next(losses) - next(losses)
            ratio = jnp.where(jnp.isfinite(measured), measured / jnp.maximum(info.predicted, 1e-30), -jnp.inf)
            new, info = new._replace(damping=damping.next(info.damping, ratio)), info._replace(measured=measured)
        return new, info

    def update(state: NaturalState, outputs: Any, targets: Any) -> tuple[NaturalState, NaturalInfo]:
        if isinstance(damping, AdaptiveDamping):
            raise TypeError("damping: adaptive, which evaluates the model; wanted a number or a schedule for update()")
        if localized:
            raise TypeError("localized: True, which sees inside of the model; wanted False for update()")
        local = particles // _axes.size(axis_name)
        size = local_size(outputs, name="outputs")
        if size != local:
            raise ValueError(f"outputs: leading axis {size} for {local} particles; wanted shape ({local}, ...)")
        return moved(state, estimator.from_outputs(state.position, drawn(state), *settings(state), outputs, targets))

    def moved(state: NaturalState, found: Direction) -> tuple[NaturalState, NaturalInfo]:
        rate = jnp.asarray(rate_of(state.count), jnp.float32)
        scale, lam = settings(state)
        position = jax.tree.map(lambda m, d: (m - rate * d).astype(m.dtype), state.position, found.ascent)
        failed = jnp.asarray(particles - found.healthy, jnp.int32)
        finite = found.usable & (failed == 0)
        info = NaturalInfo(found.loss, found.predicted(rate), None, scale, lam, found.fallback, finite, failed)
        new = state._replace(position=position, average=_averaged(state, position, averaging), count=state.count + 1)
        if state.transform is not None and found.matrix is not None:
            shrink = inverse_square_root(found.matrix, lam) @ state.transform
            new = new._replace(transform=jnp.where(found.usable, shrink, state.transform))
        return new, info

    def ensemble(state: NaturalState) -> Ensemble:
        return estimator.cloud.ensemble(state.position, drawn(state), settings(state)[0])

    passes = particles + localized + 2 * isinstance(damping, AdaptiveDamping)
    return NaturalSolver(init, step, update, ensemble, passes)


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
