r"""Unscented Kalman inversion: a mean and a covariance, moved by the model at two points along each of its deviations.

With S the lower triangular root of the covariance C of P parameters and :math:`c = \min(2, \sqrt P)`, the model is
evaluated at m and at :math:`m \pm c\,s_i`, the columns of S. Whitened by the noise and measured from G(m), the outputs
make differences and curvatures, one row for each column,

.. math:: z_i = \frac{G(m + c s_i) - G(m - c s_i)}{2 c}, \qquad
          e_i = \frac{G(m + c s_i) + G(m - c s_i) - 2 G(m)}{2 c},

of which the modified unscented transform's covariances are sums: ``C_uw = S Z`` and ``C_ww = Z^T Z + E^T E``.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, TypedDict, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.linalg import block_diag, solve_triangular

from eki_jax._checks import NOT_NEGATIVE, arrays, flag, function, is_known, one_of, pair, random_key, real, whole
from eki_jax._types import Array, Batch, Ensemble, ForwardFn, Params
from eki_jax.ensembles.priors import Gaussian
from eki_jax.kernel.axes import Axis
from eki_jax.kernel.evaluate import evaluate
from eki_jax.kernel.linear_algebra import HIGHEST, damped_solve
from eki_jax.kernel.particles import check_like, wide_dtype
from eki_jax.solvers.kalman.analysis import covariance_and_data
from eki_jax.solvers.kalman.differences import flat_residuals
from eki_jax.solvers.kalman.flat import as_params, flat_params
from eki_jax.solvers.kalman.noise_covariance import as_noise_covariance, is_usable
from eki_jax.solvers.kalman.tempering import TemperingFn, check_step_size
from eki_jax.solvers.kalman.tikhonov import prior_residuals, whitened_prior
from eki_jax.solvers.protocol import (
    Info,
    Options,
    Solver,
    bad_targets,
    check_rows,
    check_state,
    compiled,
    given,
    health,
    never_done,
    one_pass_a_particle,
)
from eki_jax.solvers.reasons import Reason, first_reason

Form = Literal["transform", "covariance"]


class UnscentedState(NamedTuple):
    """State of :func:`uki`: the same on all devices.

    Attributes:
        position: mean m, one particle's parameters.
        factor: lower triangular root S of the covariance, shape (P, P), for the parameters in the order of the leaves.
        time: sum of the step sizes so far; tempering ends at 1.
        count: number of steps taken, int32.
    """

    position: Params
    factor: Array
    time: Array
    count: Array  # type: ignore[assignment]  # hides tuple.count, as in optax

    @property
    def covariance(self) -> Array:
        """The covariance ``C = S S^T`` of the parameters in the order of the leaves, shape (P, P)."""
        return jnp.matmul(self.factor, self.factor.T, precision=HIGHEST)


class UnscentedSettings(TypedDict, total=False):
    """Keywords of :func:`uki`: those of :class:`eki_jax.SharedSettings` that mean something for it.

    There are no ``failures`` to choose, since the points are made anew in every step; no ``targets_axis``, since they
    are no particles with data of their own; and no ``precision``, since nothing but P x P matrices is multiplied.

    Attributes:
        axis_name: mapped axis over which the points are spread (vmap, pmap, shard_map); None on one device.
        outlier_cut: largest squared misfit of a point that takes part, as a multiple of the median, > 1; None for no
            cut. See :class:`eki_jax.SharedSettings`.
        chunk_size: number of points evaluated at a time; by default from a memory budget.
    """

    axis_name: str | None
    outlier_cut: Any
    chunk_size: int | None


def uki(
    forward: ForwardFn | None,
    noise_covariance: Any,
    step_size: float | TemperingFn = 1.0,
    *,
    prior: Any,
    form: Form = "transform",
    impose_prior: bool = False,
    particles: int | None = None,
    **settings: Unpack[UnscentedSettings],
) -> Solver:
    r"""Unscented Kalman inversion, deterministic and with as many runs as it takes, ``2 P + 1`` for P parameters.

    (Huang, Schneider and Stuart, Journal of Computational Physics 463, 2022, with the modified unscented transform of
    its section 3.2; Huang, Huang, Reich and Stuart, Inverse Problems 38, 2022.) A step of size h is

    .. math:: m \leftarrow m + C_{uw} (C_{ww} + \Gamma / h)^{-1} (y - G(m)), \qquad
              C \leftarrow C - C_{uw} (C_{ww} + \Gamma / h)^{-1} C_{uw}^T .

    Steps whose sizes sum to one lead from prior to posterior, and for a linear model they are exact. Beyond time 1
    ``impose_prior=True`` is wanted: the covariance is first grown to ``(1 + h) C``, which forgets as much as the step
    learns, the outputs are joined by the parameters themselves, the data by the prior's mean, and the step has the size
    ``h / (1 + h)``. For every h > 0 its fixed point is the posterior's Gaussian approximation, for a linear model the
    posterior, approached as ``(1 + h)^-n`` from any start. h = 1 is the papers' choice.

    A point whose run failed is replaced by its partner, mirrored in the mean's run: exact for a linear model. Where
    both failed, nothing is learned of that direction, which keeps its variance. ``info.failed`` counts the points, and
    where the run of the mean itself failed the step is refused with ``Reason.MEAN_FAILED``.

    Args:
        forward: function ``forward(params, x) -> outputs`` of one particle; None where only ``update`` is used.
        noise_covariance: covariance Gamma of the noise, as for :func:`enkf`.
        step_size: step size h > 0, or a function such as :func:`tempered` and :func:`data_misfit_controller`. What the
            function is given are the misfits at the points where they have the mean and variance of the misfit under
            N(m, C), at :math:`\sqrt P` deviations, by the parabola through the three runs of each direction.
        prior: Gaussian prior, from :func:`eki_jax.gaussian`, whose covariance is numbers. The state starts with its
            covariance, at the parameters that ``init`` is given, commonly ``prior.mean``.
        form: name of the algebra, for one result. "transform" works on the roots, by an orthogonal factorization of
            (M + 2 P) x 2 P numbers, and subtracts no covariances: for single precision and small noise. "covariance"
            solves an M x M system: cheaper where outputs are few.
        impose_prior: flag; True imposes the prior in every step, for runs beyond time 1.
        particles: number of points J, at least ``2 P + 1``, the default. More are copies of the mean without a weight,
            so that devices can share them evenly; on n devices n has to divide J.
        **settings: keywords of the step, see :class:`UnscentedSettings`.

    Returns:
        A :class:`eki_jax.Solver` with :class:`UnscentedState`, whose ``init(params, key)`` takes one particle's
        parameters; the key, which the protocol wants, is not used. ``ensemble(state)`` are the points, the mean first.
        In its ``Info``, ``losses`` are the points' misfits ``1/2 ||y - G||^2_Gamma`` and ``loss`` that of the mean;
        ``drift_norm`` is the length of the mean's move in standard deviations, ``||S^-1 (m' - m)||``.

    Raises:
        TypeError: a prior that is no Gaussian, or whose covariance is a function; an unknown setting; parameters that
            are not floating-point; from ``with_ensemble``, always: the points are a mean and a covariance.
        ValueError: an unknown form; a step size <= 0; a function of step sizes, which has an end, with
            ``impose_prior``, which has none, or a singular prior with it; fewer than ``2 P + 1`` particles; parameters
            that are not those of the prior; outputs or targets that do not fit.

    >>> import jax, jax.numpy as jnp
    >>> import eki_jax
    >>> solver = uki(lambda u, x: x @ u, 1.0, prior=eki_jax.gaussian(jnp.zeros(2), 1.0))
    >>> state = solver.init(jnp.zeros(2), jax.random.key(0))
    >>> state, info = solver.step(state, (jnp.eye(2), jnp.array([2.0, 4.0])))
    >>> state.position.round(4), state.covariance.round(4)  # half of the way from prior to data
    (Array([1., 2.], dtype=float32), Array([[0.5, 0. ],
           [0. , 0.5]], dtype=float32))
    """
    covariance = None if noise_covariance is None else as_noise_covariance(noise_covariance)
    one_of("form", form, ("transform", "covariance"))
    flag("impose_prior", impose_prior)
    check_step_size(step_size)
    if callable(step_size) and impose_prior:
        raise ValueError("step_size: a function with impose_prior=True, whose steps have no end; wanted a number")
    if particles is not None:
        particles = whole("particles", particles, 3, or_="None for 2 P + 1")
    if forward is not None:
        function("forward", forward, "a model, forward(params, x) -> outputs", arguments=2)
    options = Options.of(settings, UnscentedSettings)
    roots = _prior_roots(prior)
    imposed = whitened_prior(prior) if impose_prior else None
    axis = options.axis

    def init(params: Params, key: Array) -> UnscentedState:
        random_key("key", key)
        arrays("params", params, floating=True)
        check_like(params, prior.mean, name="params", other="prior's parameters", hint="those of the prior")
        dtype = wide_dtype(*(jnp.result_type(leaf) for leaf in jax.tree.leaves(params)))
        state = UnscentedState(
            # Buffers of their own: a state that is donated must not take the caller's parameters with it.
            jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), params),
            block_diag(*(jnp.asarray(root, dtype) for root in roots)),
            jnp.zeros((), dtype),
            jnp.zeros((), jnp.int32),
        )
        _local_points(len(state.factor), particles, axis)  # raises where the devices do not divide them
        return state

    def deviations(state: UnscentedState) -> Array:
        """The root of the covariance that the points are drawn from."""
        if not impose_prior:
            return state.factor
        return jnp.sqrt(1 + jnp.asarray(step_size, state.factor.dtype)) * state.factor

    def points(state: UnscentedState) -> Array:
        """All points on every device, shape (2 P + 1, P)."""
        centre = flat_params(state.position, state.factor.dtype)[None]
        away = _distance(len(state.factor)) * deviations(state).T
        return jnp.concatenate([centre, centre + away, centre - away])

    def ensemble(state: UnscentedState) -> Ensemble:
        check_state(state, UnscentedState, "uki")
        rows = points(state)
        local = _local_points(rows.shape[1], particles, axis)
        copies = local * axis.size - len(rows)
        rows = jnp.concatenate([rows, jnp.broadcast_to(rows[:1], (copies, rows.shape[1]))])
        return as_params(axis.own_part(rows), state.position)

    def step(state: UnscentedState, batch: Batch) -> tuple[UnscentedState, Info]:
        check_state(state, UnscentedState, "uki")
        x, targets = pair("batch", batch)
        outputs = evaluate(
            given(forward), ensemble(state), x, chunk_size=options.chunk_size, axis_name=options.axis_name
        )
        return update(state, outputs, targets)

    def update(state: UnscentedState, outputs: Any, targets: Any) -> tuple[UnscentedState, Info]:
        check_state(state, UnscentedState, "uki")
        size = len(state.factor)
        check_rows(outputs, _local_points(size, particles, axis))
        gamma, targets = covariance_and_data(covariance, targets, outputs)
        own = gamma.whiten(flat_residuals(arrays("outputs", outputs), arrays("targets", targets), None))
        rows = _everywhere(own, axis)[: 2 * size + 1]
        misfits = 0.5 * jnp.sum(rows * rows, axis=1)
        healthy = health(rows, rows, misfits, (), options._replace(axis_name=None))
        rows = _mirrored(jnp.where(healthy[:, None], rows, 0), healthy)
        h: Any = step_size
        if callable(step_size):
            h = step_size(_typical(0.5 * jnp.sum(rows * rows, axis=1)), rows.shape[1], state.time, state.count)
        h = jnp.asarray(real("step_size", h, NOT_NEGATIVE), rows.dtype)
        root, used = deviations(state), h
        if imposed is not None:
            of_prior = prior_residuals(imposed, as_params(points(state), state.position))
            rows = jnp.concatenate([rows, of_prior.astype(rows.dtype)], axis=1)
            used = h / (1 + h)
        solve = _by_roots if form == "transform" else _by_covariances
        weights, shrunk = solve(*_differences(rows), rows[0], used, root.astype(rows.dtype))
        shrunk = _lower(shrunk).astype(state.factor.dtype)
        move = jnp.matmul(root, weights.astype(root.dtype), precision=HIGHEST)
        moved = flat_params(state.position, root.dtype) - move
        failed = jnp.sum(~healthy, dtype=jnp.int32)
        reason = first_reason(
            (Reason.ENDED, done(state)),
            (Reason.TARGETS, bad_targets(targets, None)),
            (Reason.SETTING, ~is_usable(gamma) | ~NOT_NEGATIVE.holds(h)),
            (Reason.PARAMETERS, ~jnp.isfinite(points(state)).all()),
            (Reason.MEAN_FAILED, ~healthy[0]),
            (Reason.FEW_PARTICLES, failed >= 2 * size),
            (Reason.NOT_FINITE, ~(jnp.isfinite(moved).all() & jnp.isfinite(shrunk).all())),
        )
        ok = reason == 0
        later = state.time + h.astype(state.time.dtype)
        if callable(step_size):  # tempering ends at exactly 1, whatever the rounding of its sum
            later = jnp.where(h.astype(state.time.dtype) >= 1 - state.time, 1, later).astype(later.dtype)
        new = UnscentedState(as_params(moved, state.position), shrunk, later, state.count + 1)
        info = Info(
            losses=0.5 * jnp.sum(own * own, axis=1),
            step_size=h,
            drift_norm=jnp.sqrt(jnp.sum(weights * weights)),
            spread=jnp.sqrt(jnp.sum(root * root)),
            is_finite=(ok | (reason == Reason.ENDED)) & (failed == 0),
            failed=failed,
            loss=jnp.where(healthy[0], misfits[0], jnp.nan),
            moved=ok,
            reason=reason,
        )
        return jax.tree.map(lambda new, old: jnp.where(ok, new, old), new, state), info

    def done(state: UnscentedState) -> Array:
        return state.time >= 1 if callable(step_size) else never_done(state)

    def with_ensemble(state: UnscentedState, ensemble: Ensemble) -> UnscentedState:
        raise TypeError(
            "with_ensemble: the points of an unscented step are a mean and the root of a covariance, and cannot be "
            "replaced; wanted state._replace(position=..., factor=...)"
        )

    return compiled(
        Solver(init, step, update, ensemble, lambda state: state.position, with_ensemble, done, one_pass_a_particle)
    )


def _prior_roots(prior: Any) -> list[Any]:
    """The lower triangular root of each leaf's covariance, in double precision where its numbers are known."""
    if not isinstance(prior, Gaussian):
        raise TypeError(f"prior: {type(prior).__name__}; wanted a Gaussian, such as eki_jax.gaussian(mean, scale)")
    structure: Any = jax.tree.structure(prior.mean)
    roots = []
    for (path, mean), factor in zip(
        jax.tree_util.tree_leaves_with_path(prior.mean), structure.flatten_up_to(prior.factor), strict=True
    ):
        if callable(factor):
            where = f"prior{jax.tree_util.keystr(path)}"
            raise TypeError(f"{where}: its factor is a function; wanted numbers or a matrix, which have a covariance")
        xp: Any = np if is_known(factor) else jnp
        values = xp.asarray(factor, np.float64 if is_known(factor) else mean.dtype)
        if values.ndim == 0 or values.shape == mean.shape:
            roots.append(xp.diag(xp.broadcast_to(values, mean.shape).reshape(-1)))
        else:
            roots.append(_lower(xp.pad(values, ((0, 0), (0, max(0, mean.size - values.shape[1])))), xp))
    return roots


def _lower(root: Any, xp: Any = jnp) -> Any:
    """The lower triangular L with ``L L^T = root root^T`` and a diagonal >= 0, which is Cholesky's where that exists.

    By an orthogonal factorization, which never forms the product.
    """
    upper = xp.linalg.qr(root.T, mode="r")
    return (upper * xp.where(xp.diagonal(upper) < 0, -1, 1).astype(upper.dtype)[:, None]).T


def _distance(parameters: int) -> float:
    """c: how many deviations away from the mean the points are."""
    return min(2.0, float(parameters) ** 0.5)


def _local_points(parameters: int, particles: int | None, axis: Axis) -> int:
    """The number of points on this device."""
    least, devices = 2 * parameters + 1, axis.size
    total = least if particles is None else particles
    if total < least:
        raise ValueError(f"particles: {total} for {parameters} parameters; wanted at least 2 P + 1 = {least}")
    if total % devices:
        nearest = -(-total // devices) * devices
        raise ValueError(f"particles: {total} on {devices} devices; wanted a multiple of {devices}, such as {nearest}")
    return total // devices


def _everywhere(own: Array, axis: Axis) -> Array:
    """The rows of all devices on each of them: a sum, so that JAX knows them to be the same everywhere."""
    if not axis.is_mapped:
        return own
    padded = jnp.zeros((len(own) * axis.size, own.shape[1]), own.dtype)
    return axis.sum(lax.dynamic_update_slice_in_dim(padded, own, axis.index * len(own), axis=0))


def _mirrored(rows: Array, healthy: Array) -> Array:
    """The rows with those of failed points replaced by their partners', mirrored in the first; shape (2 P + 1, M)."""
    first, up, down = rows[:1], *jnp.split(rows[1:], 2)
    up_is_there, down_is_there = jnp.split(healthy[1:, None], 2)
    instead = lambda there, other: jnp.where(there, 2 * first - other, first)
    return jnp.concatenate(
        [
            first,
            jnp.where(up_is_there, up, instead(down_is_there, down)),
            jnp.where(down_is_there, down, instead(up_is_there, up)),
        ]
    )


def _differences(rows: Array) -> tuple[Array, Array]:
    """Z and E of the module, shape (P, M) each."""
    up, down = jnp.split(rows[1:], 2)
    width = jnp.asarray(2 * _distance(len(up)), rows.dtype)
    return (up - down) / width, ((up - rows[:1]) + (down - rows[:1])) / width


def _typical(misfits: Array) -> Array:
    """The misfits at points of which plain mean and variance are those of N(m, C), shape (2 P,)."""
    up, down = jnp.split(misfits[1:], 2)
    reach = len(up) ** 0.5 / _distance(len(up))
    slope, curvature = reach * (up - down) / 2, reach**2 * ((up - misfits[0]) + (down - misfits[0])) / 2
    return jnp.maximum(misfits[0] + jnp.concatenate([curvature + slope, curvature - slope]), 0)


def _by_roots(z: Array, e: Array, residual: Array, h: Array, root: Array) -> tuple[Array, Array]:
    """The weights w of the mean's move ``-S w``, and a root of the new covariance, by an orthogonal factorization.

    ``(I + h [E; Z] [E; Z]^T)`` is ``R^T R`` for the R of these rows over those of I. The last P x P block of R is that
    of Z once the curvatures' directions are integrated out, and ``S R^-1`` the new root.
    """
    size, scale = len(z), jnp.sqrt(h)
    above = scale * jnp.concatenate([e, z, residual[None]]).T
    below = jnp.eye(2 * size, 2 * size + 1, dtype=z.dtype)
    upper = jnp.linalg.qr(jnp.concatenate([above, below]), mode="r")
    corner, right = upper[size : 2 * size, size : 2 * size], upper[size : 2 * size, 2 * size]
    return solve_triangular(corner, right), solve_triangular(corner, root.T, trans=1).T


def _by_covariances(z: Array, e: Array, residual: Array, h: Array, root: Array) -> tuple[Array, Array]:
    """The same by ``(C_ww + Gamma / h)^-1``, whitened, and a difference of covariances, in units of the old one."""
    both = jnp.concatenate([e, z])
    gram = h * jnp.matmul(both.T, both, precision=HIGHEST)
    right = jnp.concatenate([residual[None], z]).T
    solved = h * jnp.matmul(z, damped_solve(gram, right, jnp.ones((), z.dtype))[0], precision=HIGHEST)
    left = jnp.eye(len(z), dtype=z.dtype) - 0.5 * (solved[:, 1:] + solved[:, 1:].T)
    cholesky = jnp.linalg.cholesky(left)

    def by_eigenvalues() -> Array:
        finite = jnp.isfinite(left).all()
        values, vectors = jnp.linalg.eigh(jnp.where(finite, left, 0))
        return jnp.where(finite, vectors * jnp.sqrt(jnp.maximum(values, 0)), jnp.nan)

    inner = lax.cond(jnp.isfinite(cholesky).all(), lambda: cholesky, by_eigenvalues)
    return solved[:, 0], jnp.matmul(root, inner, precision=HIGHEST)
