r"""Sparse ensemble Kalman inversion: after each Kalman step the mean is drawn towards zeros by an L1 penalty.

Of a linear model the mean of a step minimizes :math:`h \Phi(u) + \tfrac12 \|u - \bar u\|_C^2`, which is, up to a
constant, :math:`\tfrac12 \|u - \bar u^+\|_{C^+}^2` with the analysed mean and covariance. The penalty so enters by a
proximal step in the metric of the analysed covariance:

.. math:: \bar u \leftarrow \operatorname{argmin}_w\; h \sum_i \lambda_i |w_i| + \tfrac12 \|w - \bar u^+\|_{C^+}^2,
          \qquad C^+ = C - C_{uw} (C_{ww} + \Gamma / h)^{-1} C_{uw}^T .
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.linalg import cho_factor, cho_solve

from eki_jax._checks import NOT_NEGATIVE, arrays, function, is_known, one_of, pair, quantities, real
from eki_jax._types import Array, Batch, Ensemble, ForwardFn, Params
from eki_jax.ensembles.priors import Gaussian
from eki_jax.kernel.evaluate import evaluate
from eki_jax.kernel.linear_algebra import HIGHEST, inverse_root
from eki_jax.kernel.particles import local_size, wide_dtype
from eki_jax.kernel.products import centred
from eki_jax.solvers.kalman.analysis import KalmanState, covariance_and_data
from eki_jax.solvers.kalman.differences import whitened_differences
from eki_jax.solvers.kalman.enkf import enkf, is_resolved, resolved_singular_values
from eki_jax.solvers.kalman.etki import etki
from eki_jax.solvers.kalman.flat import as_params, flat_rows
from eki_jax.solvers.kalman.noise_covariance import as_noise_covariance
from eki_jax.solvers.kalman.tempering import TemperingFn
from eki_jax.solvers.kalman.tikhonov import prior_residuals, whitened_prior
from eki_jax.solvers.protocol import (
    Info,
    Options,
    SharedSettings,
    Solver,
    check_state,
    compiled,
    given,
    health,
)
from eki_jax.solvers.reasons import Reason

if TYPE_CHECKING:
    from jaxtyping import Float

# Steps of the interior-point and of the active-set method at most.
_INTERIOR, _ACTIVE = 80, 20


class SparseState(NamedTuple):
    """State of :func:`sparse`.

    Attributes:
        inner: state of the Kalman step, with the particles.
        support: flags of the numbers of the mean that are not zero, a pytree of booleans like one particle.
    """

    inner: KalmanState
    support: Params

    @property
    def ensemble(self) -> Ensemble:
        """The particles where the outputs of the next step are wanted."""
        return self.inner.ensemble

    @property
    def position(self) -> Ensemble:
        """The particles to predict with."""
        return self.inner.ensemble

    @property
    def time(self) -> Array:
        """The sum of the step sizes so far."""
        return self.inner.time

    @property
    def count(self) -> Array:  # type: ignore[override]  # hides tuple.count
        """The number of steps taken, int32."""
        return self.inner.count


class SparseInfo(NamedTuple):
    """Numbers of one step: those of :class:`eki_jax.Info`, and of the proximal step.

    Attributes:
        losses: misfits of this device's particles, without the penalty, shape (J,).
        step_size: step size h.
        drift_norm: norm of the drift, as the Kalman step has it.
        spread: root mean square distance of a particle from the mean.
        is_finite: flag, True where no particle had failed and the step was taken, or had nothing left to do.
        failed: number of particles that took no part, int32.
        loss: mean misfit of the particles that did not fail, a scalar.
        moved: flag, True where the step was taken; False where it was refused, and the state is what it was.
        reason: code of :class:`eki_jax.Reason` that says why the step was refused, int32; 0 where it was taken.
        nonzero: number of the mean's numbers that are not zero after the step, int32.
        residual: largest violation of the proximal step's optimality, in deviations of the analysed covariance; of the
            order of the rounding where it was solved.
    """

    losses: Array
    step_size: Array
    drift_norm: Array
    spread: Array
    is_finite: Array
    failed: Array
    loss: Array
    moved: Array
    reason: Array
    nonzero: Array
    residual: Array


def sparse(
    forward: ForwardFn | None,
    noise_covariance: Any,
    step_size: float | TemperingFn = 1.0,
    *,
    penalty: Any,
    threshold: Any = 0.0,
    method: Literal["etki", "enkf"] = "etki",
    key: Array | None = None,
    prior: Gaussian | None = None,
    **settings: Unpack[SharedSettings],
) -> Solver:
    r"""Ensemble Kalman inversion with an L1 penalty, for few parameters out of many.

    (Schneider, Stuart and Wu, Journal of Computational Physics 470, 2022.) The paper solves a quadratic program for
    every particle; a parameter that is zero in all of them has then no variance left to come back with. Here the mean
    alone is made sparse, by the proximal step of this module, and the particles follow it: their deviations are the
    Kalman step's own. For a linear model one step from an ensemble of mean m and covariance C ends exactly at the
    minimum of :math:`h\,(\Phi(u) + \sum_i \lambda_i |u_i|) + \tfrac12 \|u - m\|_C^2`, and with growing time the mean
    goes to the Lasso's solution, the prior fading as 1 / time, in the span of the ensemble where J <= P.

    After the proximal step penalized numbers of the mean that are at most the threshold are set to zero, as in the
    paper; with the threshold 0 the zeros are those of the minimum, and exact: they are kept as ``state.support``, and
    ``estimate(state)`` has them.

    Args:
        forward: function ``forward(params, x) -> outputs`` of one particle; None where only ``update`` is used.
        noise_covariance: covariance Gamma of the noise, as for :func:`etki`.
        step_size: step size h > 0, or a function such as :func:`tempered`.
        penalty: weights lambda >= 0 of the absolute values beside the misfit :math:`\tfrac12 \|y - G(u)\|_\Gamma^2`, in
            units of 1 / parameter: a number, or a pytree like one particle of numbers or of arrays of the leaves'
            shapes; zero for what is not penalized.
        threshold: absolute value >= 0, in units of the parameters, up to which a penalized number is set to zero.
        method: name of the Kalman step, "etki" or "enkf".
        key: JAX random key that perturbs the data, for "enkf"; None for none.
        prior: Gaussian prior that every step imposes beside the penalty, see :class:`KalmanSettings`; None for none.
        **settings: keywords that all solvers of ensembles share, see :class:`eki_jax.SharedSettings`.

    Returns:
        A :class:`eki_jax.Solver` with :class:`SparseState` and :class:`SparseInfo`.

    Raises:
        TypeError: a penalty that is neither a number nor a pytree of them; a key that is none; an unknown setting.
        ValueError: a penalty or threshold that is negative or not finite (where it is traced, the step is refused); a
            penalty of another structure or of other shapes than a particle, from ``update``; an unknown method; a key
            with "etki", which draws nothing; and what the Kalman step refuses.

    >>> import jax, jax.numpy as jnp
    >>> import eki_jax
    >>> solver = sparse(lambda u, x: x @ u, 1.0, 1e4, penalty=2.0)
    >>> ensemble = eki_jax.sample_ensemble(jax.random.key(0), eki_jax.gaussian(jnp.zeros(3), 1.0), 20)
    >>> state, info = solver.step(solver.init(ensemble), (jnp.eye(3), jnp.array([5.0, 1.0, -3.0])))
    >>> solver.estimate(state).round(2), int(info.nonzero)  # each number 2 nearer to zero, or zero
    (Array([ 3.,  0., -1.], dtype=float32), 2)
    """
    one_of("method", method, ("etki", "enkf"))
    if key is not None and method == "etki":
        raise ValueError("key: given for 'etki', which draws nothing; wanted None, or method='enkf'")
    options = Options.of(settings, SharedSettings)
    if forward is not None:
        function("forward", forward, "a model, forward(params, x) -> outputs", arguments=2)
    _check_penalty(penalty)
    real("threshold", threshold, NOT_NEGATIVE)
    covariance = None if noise_covariance is None else as_noise_covariance(noise_covariance)
    make: Any = etki if method == "etki" else enkf
    kalman = make(None, noise_covariance, step_size, prior=prior, **({} if key is None else {"key": key}), **settings)
    whitened = None if prior is None else whitened_prior(prior)
    axis = options.axis

    def init(ensemble: Ensemble) -> SparseState:
        inner = kalman.init(ensemble)
        _weights(penalty, ensemble, inner.time.dtype)  # raises where it does not fit
        return SparseState(inner, _everywhere_nonzero(ensemble))

    def analysed(state: KalmanState, outputs: Any, targets: Any, h: Array) -> tuple[Array, Array]:
        """The covariance that the Kalman step leaves, shape (P, P), and which particles took part in it."""
        gamma, targets = covariance_and_data(covariance, targets, outputs)
        residuals, differences = whitened_differences(gamma, outputs, targets, options)
        if whitened is not None:
            of_prior = prior_residuals(whitened, state.ensemble).astype(differences.dtype)
            residuals, differences = (jnp.concatenate([rows, of_prior], axis=1) for rows in (residuals, differences))
        misfits = 0.5 * jnp.sum(residuals * residuals, axis=1)
        healthy = health(residuals, residuals, misfits, (state.ensemble,), options)
        number = axis.sum(jnp.sum(healthy, dtype=jnp.int32))
        size = jnp.maximum(number, 1).astype(residuals.dtype)
        z = centred(differences, healthy, size, axis)
        u = centred(flat_rows(state.ensemble, residuals.dtype), healthy, size, axis)
        everyone, scale = axis.gathered(z), h.astype(z.dtype) / size
        gram = scale * jnp.matmul(everyone, everyone.T, precision=HIGHEST)

        def by_singular_values() -> Array:
            left, values, _ = resolved_singular_values(everyone)
            shrunk = 1 - lax.rsqrt(1 + scale * values**2)
            return jnp.eye(len(left), dtype=z.dtype) - jnp.matmul(left * shrunk[None], left.T, precision=HIGHEST)

        root = lax.cond(is_resolved(gram), lambda: inverse_root(gram)[0], by_singular_values)
        factor = jnp.matmul(axis.own_part(root), axis.gathered(u), precision=HIGHEST)
        return axis.sum(jnp.matmul(factor.T, factor, precision=HIGHEST)) / size, healthy

    def update(state: SparseState, outputs: Any, targets: Any) -> tuple[SparseState, SparseInfo]:
        check_state(state, SparseState, "sparse")
        inner, info = kalman.update(state.inner, outputs, targets)
        metric, healthy = analysed(state.inner, outputs, targets, info.step_size)
        rows, dtype = flat_rows(inner.ensemble, metric.dtype), metric.dtype
        size = jnp.maximum(axis.sum(jnp.sum(healthy, dtype=jnp.int32)), 1).astype(dtype)
        mean = axis.sum(jnp.sum(jnp.where(healthy[:, None], rows, 0), axis=0)) / size
        weights, cut = _weights(penalty, inner.ensemble, dtype), jnp.asarray(threshold, dtype)
        nearest, residual = proximal_step(mean, metric, info.step_size.astype(dtype) * weights)
        nearest = jnp.where((weights > 0) & (jnp.abs(nearest) <= cut), 0, nearest)
        like = jax.tree.map(lambda leaf: leaf[0], inner.ensemble)
        in_range = NOT_NEGATIVE.holds(weights).all() & NOT_NEGATIVE.holds(cut)
        finite = jnp.isfinite(nearest).all()
        ok = info.moved & in_range & finite

        def moved(u: Array, shift: Array) -> Array:
            there = healthy.reshape(-1, *[1] * (u.ndim - 1))
            wide = wide_dtype(u.dtype)
            return jnp.where(there, (u.astype(wide) + shift.astype(wide)[None]).astype(u.dtype), u)

        shifted = jax.tree.map(moved, inner.ensemble, as_params(nearest - mean, like))
        support = jax.tree.map(lambda leaf: leaf != 0, as_params(nearest, like))
        new = SparseState(inner._replace(ensemble=shifted), support)
        new = jax.tree.map(lambda new, old: jnp.where(ok, new, old), new, state)
        mine = jnp.where(in_range, int(Reason.NOT_FINITE), int(Reason.SETTING)).astype(info.reason.dtype)
        told: Info = info._replace(
            moved=ok,
            reason=jnp.where(info.moved & ~ok, mine, info.reason),
            is_finite=info.is_finite & (ok | ~info.moved),
        )
        nonzero = sum(jnp.sum(leaf, dtype=jnp.int32) for leaf in jax.tree.leaves(new.support))
        return new, SparseInfo(**told._asdict(), nonzero=jnp.asarray(nonzero, jnp.int32), residual=residual)

    def step(state: SparseState, batch: Batch) -> tuple[SparseState, SparseInfo]:
        check_state(state, SparseState, "sparse")
        x, targets = pair("batch", batch)
        outputs = evaluate(
            given(forward),
            state.inner.ensemble,
            x,
            chunk_size=options.chunk_size,
            axis_name=options.axis_name,
            precision=options.precision,
        )
        return update(state, outputs, targets)

    def estimate(state: SparseState) -> Params:
        mean = kalman.estimate(state.inner)
        return jax.tree.map(lambda m, there: jnp.where(there, m, jnp.zeros((), m.dtype)), mean, state.support)

    return compiled(
        Solver(
            init,
            step,
            update,
            lambda state: state.inner.ensemble,
            estimate,
            lambda state, ensemble: SparseState(
                kalman.with_ensemble(state.inner, ensemble), _everywhere_nonzero(ensemble)
            ),
            lambda state: kalman.done(state.inner),
            kalman.passes,
        )
    )


def proximal_step(
    mean: Float[Array, " P"], covariance: Float[Array, "P P"], weights: Float[Array, " P"]
) -> tuple[Float[Array, " P"], Float[Array, ""]]:
    r"""The minimum of :math:`\sum_i \tau_i |w_i| + \tfrac12 \|w - m\|_C^2` over w in m plus the range of C.

    By its dual, :math:`w = m - C q` with :math:`|q_i| \le \tau_i`, which wants no inverse of C: a number is zero where
    q is inside of its bounds, and moved by the full penalty where it is at one of them. An interior-point method finds
    which is which, whatever the condition of C; then linear systems for those inside, as an active-set method solves
    them, give the digits.

    Args:
        mean: vector m, shape (P,).
        covariance: positive semi-definite matrix C, shape (P, P).
        weights: weights tau >= 0, shape (P,).

    Returns:
        The vector w, whose zeros are exact, and the largest violation of optimality in units of the deviations,
        ``max |q - clip(q + w)|`` for coordinates over the roots of C's diagonal.

    >>> w, residual = proximal_step(jnp.array([3.0, 0.5]), jnp.diag(jnp.array([2.0, 1.0])), jnp.array([1.0, 1.0]))
    >>> w.round(4)  # with a diagonal C, soft thresholds C tau
    Array([1., 0.], dtype=float32)
    """
    deviations = jnp.sqrt(jnp.maximum(jnp.diagonal(covariance), 0))
    moves = deviations > 0
    scale = jnp.where(moves, deviations, 1)
    start = mean / scale
    dual = _Dual(covariance / (scale[:, None] * scale[None]), start, jnp.where(moves, weights * deviations, 0))
    q = dual.polished(dual.interior())
    w = dual.reached(q)
    inside = (jnp.abs(q + w) < dual.bounds) & jnp.isfinite(w)
    return jnp.where(inside, 0, jnp.where(moves, w * scale, mean)), dual.violation(q)


class _Dual(NamedTuple):
    """``q^T A q / 2 - q^T start`` is to be as low as can be, with ``|q| <= bounds`` and a matrix A of correlations."""

    matrix: Array
    start: Array
    bounds: Array

    def reached(self, q: Array) -> Array:
        """w, minus the gradient."""
        return self.start - jnp.matmul(self.matrix, q, precision=HIGHEST)

    def violation(self, q: Array) -> Array:
        """Zero at the minimum and there alone."""
        return jnp.max(jnp.abs(q - jnp.clip(q + self.reached(q), -self.bounds, self.bounds)))

    def unsolved(self, q: Array) -> Array:
        """Whether the violation is more than what rounding explains."""
        terms = jnp.max(jnp.abs(self.start) + jnp.matmul(jnp.abs(self.matrix), jnp.abs(q), precision=HIGHEST))
        return self.violation(q) > 20 * jnp.finfo(q.dtype).eps * (1 + terms)

    def solve(self, added: Array, among: Array, right: Array) -> Array:
        """``(A + diag(added))^-1 right`` among some of the numbers, and zero for the others."""
        eps = jnp.finfo(right.dtype).eps
        both = among[:, None] & among[None]
        diagonal = jnp.where(among, added, 1)
        system = jnp.where(both, self.matrix, 0) + jnp.diag(diagonal)
        largest = jnp.max(jnp.sum(jnp.abs(jnp.where(both, self.matrix, 0)), axis=1))
        factor = cho_factor(system + jnp.diag(jnp.full_like(diagonal, 4 * len(right) * eps) * (1 + largest)))
        right = jnp.where(among, right, 0)
        found = cho_solve(factor, right)
        # Refined, since what keeps the factorization from failing is not a part of the system.
        return found + cho_solve(factor, right - jnp.matmul(system, found, precision=HIGHEST))

    def interior(self) -> Array:
        """A point near the minimum, by a primal-dual interior-point method."""
        free = self.bounds > 0
        number = jnp.maximum(jnp.sum(free), 1).astype(self.start.dtype)
        bounds = jnp.where(free, self.bounds, 1)

        def reach(values: Array, changes: Array) -> Array:
            """How much of the changes keeps all values positive."""
            falls = free & (changes < 0)
            return jnp.min(jnp.where(falls, -values / jnp.where(falls, changes, -1), jnp.inf))

        def body(state: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
            q, low, high, rounds = state
            above, below = q + bounds, bounds - q
            centre = 0.1 * jnp.sum(jnp.where(free, low * above + high * below, 0)) / (2 * number)
            right = self.reached(q) + centre / above - centre / below
            dq = self.solve(low / above + high / below, free, right)
            d_low = centre / above - low - low / above * dq
            d_high = centre / below - high + high / below * dq
            changes = ((above, dq), (below, -dq), (low, d_low), (high, d_high))
            step = jnp.minimum(1, 0.95 * jnp.min(jnp.stack([reach(*pair) for pair in changes])))
            moved = (q + step * dq, low + step * d_low, high + step * d_high)
            fine = jnp.stack([jnp.isfinite(part).all() for part in moved]).all()
            kept = tuple(jnp.where(fine, new, old) for new, old in zip(moved, (q, low, high), strict=True))
            return (*kept, jnp.where(fine, rounds + 1, _INTERIOR))  # type: ignore[return-value]

        first = jnp.where(free, 1 + jnp.max(jnp.abs(self.start)), 0)
        state = (jnp.zeros_like(self.start), first, first, jnp.zeros((), jnp.int32))
        return lax.while_loop(lambda state: self.unsolved(state[0]) & (state[3] < _INTERIOR), body, state)[0]

    def polished(self, q: Array) -> Array:
        """The best of some points, each the minimum for the bounds that the one before it seems to be at."""

        def body(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            best, q, rounds = state
            towards = q + self.reached(q)
            inside = jnp.abs(towards) < self.bounds
            fixed = jnp.where(inside, 0, jnp.clip(towards, -self.bounds, self.bounds))
            q = jnp.where(inside, self.solve(jnp.zeros_like(q), inside, self.reached(fixed)), fixed)
            return jnp.where(self.violation(q) < self.violation(best), q, best), q, rounds + 1

        going = lambda state: (state[2] == 0) | (self.unsolved(state[0]) & (state[2] < _ACTIVE))
        return lax.while_loop(going, body, (q, q, jnp.zeros((), jnp.int32)))[0]


def _check_penalty(penalty: Any) -> None:
    """Raise unless all its numbers are weights, where they are known."""
    if jax.tree_util.all_leaves([penalty]) and np.ndim(penalty) == 0:
        real("penalty", penalty, NOT_NEGATIVE, or_="a pytree of such numbers like one particle")
        return
    for path, leaf in jax.tree_util.tree_leaves_with_path(arrays("penalty", penalty)):
        quantities(f"penalty{jax.tree_util.keystr(path)}", leaf)
        if is_known(leaf) and not np.all(NOT_NEGATIVE.holds(np.asarray(leaf, np.float64))):
            raise ValueError(f"penalty{jax.tree_util.keystr(path)}: {leaf}; wanted {NOT_NEGATIVE.words}")


def _weights(penalty: Any, ensemble: Ensemble, dtype: Any) -> Array:
    """The penalty of each number of a particle, shape (P,)."""
    local_size(ensemble, name="ensemble", floating=True)
    leaves = jax.tree_util.tree_leaves_with_path(ensemble)
    structure: Any = jax.tree.structure(ensemble)
    if jax.tree_util.all_leaves([penalty]) and np.ndim(penalty) == 0:
        values = [penalty] * len(leaves)
    elif jax.tree.structure(penalty) == structure:
        values = jax.tree.leaves(penalty)
    else:
        raise ValueError(
            f"penalty: structure {jax.tree.structure(penalty)}, but a particle has {structure}; wanted the same, or a "
            "number"
        )
    parts = []
    for (path, leaf), value in zip(leaves, values, strict=True):
        shape = leaf.shape[1:]
        if np.shape(value) not in ((), shape):
            where = f"penalty{jax.tree_util.keystr(path)}"
            raise ValueError(f"{where}: shape {np.shape(value)} for a leaf of shape {shape}; wanted that, or a number")
        parts.append(jnp.ravel(jnp.broadcast_to(jnp.asarray(value, dtype), shape)))
    return jnp.concatenate(parts)


def _everywhere_nonzero(ensemble: Ensemble) -> Params:
    return jax.tree.map(lambda leaf: jnp.ones(leaf.shape[1:], bool), ensemble)
