r"""Flows beside `vector_field`: with momentum, and with half of the innovation. All run in any ODE solver.

A field has the signature ``f(t, state, batch)`` with ``batch = (x, targets)``, which is that of diffrax's terms. The
state of a first-order flow is the ensemble; that of a second-order flow is the pair ``(ensemble, velocity)``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify

from eki_jax._checks import POSITIVE, arrays, function, is_known, pair, real, traceable
from eki_jax._types import Array, Batch, Ensemble, ForwardFn, LossFn
from eki_jax.flows.first_order import seen_by_solvers, vector_field
from eki_jax.kernel.axes import Axes, Axis
from eki_jax.kernel.evaluate import evaluate
from eki_jax.kernel.health import OUTLIER_CUT, finite_particles, masked_mean, near_particles
from eki_jax.kernel.particles import check_like, ensemble_size, local_size
from eki_jax.kernel.products import direction
from eki_jax.losses.shortcut import by_shortcut
from eki_jax.losses.support import supported_outputs, value_and_cotangents

Field = Callable[[Any, Any, Batch], Any]

__all__ = ["guarded", "heavy_ball_flow", "nesterov_flow", "nesterov_start", "square_root_flow"]


def nesterov_flow(
    forward: ForwardFn,
    loss: LossFn,
    *,
    friction: float = 3.0,
    axis_name: str | None = None,
    chunk_size: int | None = None,
) -> Field:
    r"""Nesterov's flow, ``u'' + (3/t) u' = -C_uG(u) grad L(G(u), y)``, as a system in ``(u, u')``.

    It is the limit of :func:`eki_jax.nesterov` with the momentum n / (n + 3), whose step ``dt`` advances this flow's
    time by ``sqrt(dt)``. The friction is infinite at t = 0: begin at a small t > 0 with :func:`nesterov_start`.
    (Kovachki and Stuart, arXiv:1808.03620, equation 14; Su, Boyd and Candes, JMLR 2016.)

    Args:
        forward: function ``forward(params, x) -> outputs`` of one particle.
        loss: function ``loss(outputs, targets) -> scalar`` of one particle.
        friction: constant in front of 1/t, > 0; below 3 the fast convergence is lost.
        axis_name: mapped axis over which the particles are spread.
        chunk_size: number of particles evaluated at a time; by default from a memory budget.

    Returns:
        ``f(t, (ensemble, velocity), (x, targets))``, the pair's time derivative.

    Raises:
        ValueError: ``friction`` <= 0; from ``f``, a time t <= 0. While t is traced it cannot be looked at: the
            derivative is then NaN, which :func:`guarded` reports.

    >>> import jax.numpy as jnp
    >>> from eki_jax import losses
    >>> f = nesterov_flow(lambda u, x: x * u, losses.squared_error())
    >>> u = jnp.array([[1.0], [3.0]])
    >>> f(0.5, (u, jnp.ones((2, 1))), (2.0, jnp.array([0.0])))[1]  # -(3 / 0.5) - 4 u
    Array([[-10.],
           [-18.]], dtype=float32)
    """
    real("friction", friction, POSITIVE)

    def damping(t: Any) -> Any:
        if is_known(t) and not t > 0:
            raise ValueError(f"t: {t}; wanted a time > 0, because the friction is {friction}/t; see nesterov_start")
        return jnp.where(t > 0, friction / t, jnp.nan)

    return _second_order(vector_field(forward, loss, axis_name=axis_name, chunk_size=chunk_size), damping)


def nesterov_start(
    forward: ForwardFn,
    loss: LossFn,
    ensemble: Ensemble,
    batch: Batch,
    t: float,
    *,
    friction: float = 3.0,
    axis_name: str | None = None,
    chunk_size: int | None = None,
) -> tuple[Ensemble, Ensemble]:
    r"""The state of Nesterov's flow at a small time t > 0, having started from rest at time 0.

    At t = 0 the equation demands ``u' = 0`` and ``(1 + friction) u'' = F(u_0)`` with F the vector field, so that
    ``u(t) = u_0 + t^2 F / (2 (1 + friction))`` and ``u'(t) = t F / (1 + friction)``. The solution that goes on from
    there is wrong by O(t^4).

    Args:
        forward: function ``forward(params, x) -> outputs`` of one particle.
        loss: function ``loss(outputs, targets) -> scalar`` of one particle.
        ensemble: particles at time 0, pytree of arrays of shape (J, ...).
        batch: pair ``(x, targets)``.
        t: time at which to begin, > 0; short against the time that the flow takes.
        friction: constant in front of 1/t, the one of :func:`nesterov_flow`.
        axis_name: mapped axis over which the particles are spread.
        chunk_size: number of particles evaluated at a time; by default from a memory budget.

    Returns:
        ``(ensemble, velocity)`` at time t.

    Raises:
        ValueError: ``t`` <= 0 or ``friction`` <= 0.

    >>> import jax.numpy as jnp
    >>> from eki_jax import losses
    >>> u = jnp.array([[1.0], [3.0]])
    >>> nesterov_start(lambda u, x: x * u, losses.squared_error(), u, (2.0, jnp.array([0.0])), 0.5)[1]  # -t/4 * 4 u
    Array([[-0.5],
           [-1.5]], dtype=float32)
    """
    real("t", t, POSITIVE)
    real("friction", friction, POSITIVE)
    force = vector_field(forward, loss, axis_name=axis_name, chunk_size=chunk_size)(0.0, ensemble, batch)
    velocity = jax.tree.map(lambda f: (t / (1 + friction) * f).astype(f.dtype), force)
    return jax.tree.map(lambda u, v: (u + 0.5 * t * v).astype(u.dtype), ensemble, velocity), velocity


def heavy_ball_flow(
    forward: ForwardFn,
    loss: LossFn,
    friction: float,
    *,
    axis_name: str | None = None,
    chunk_size: int | None = None,
) -> Field:
    r"""The heavy-ball flow, ``u'' + friction u' = -C_uG(u) grad L(G(u), y)``, as a system in ``(u, u')``.

    A momentum method with the fixed factor lambda and steps dt is a discretization of it in the time ``n sqrt(dt)``
    with ``friction = (1 - lambda) / sqrt(dt)``; what a fixed factor does for small steps is in `eki_jax.momentum`.

    Args:
        forward: function ``forward(params, x) -> outputs`` of one particle.
        loss: function ``loss(outputs, targets) -> scalar`` of one particle.
        friction: damping rate, > 0, in units of 1 / time.
        axis_name: mapped axis over which the particles are spread.
        chunk_size: number of particles evaluated at a time; by default from a memory budget.

    Returns:
        ``f(t, (ensemble, velocity), (x, targets))``, the pair's time derivative. It does not depend on t.

    Raises:
        ValueError: ``friction`` <= 0.

    >>> import jax.numpy as jnp
    >>> from eki_jax import losses
    >>> f = heavy_ball_flow(lambda u, x: x * u, losses.squared_error(), 2.0)
    >>> u = jnp.array([[1.0], [3.0]])
    >>> f(0.0, (u, jnp.ones((2, 1))), (2.0, jnp.array([0.0])))[1]  # -2 - 4 u
    Array([[ -6.],
           [-14.]], dtype=float32)
    """
    real("friction", friction, POSITIVE)
    return _second_order(vector_field(forward, loss, axis_name=axis_name, chunk_size=chunk_size), lambda t: friction)


def square_root_flow(
    forward: ForwardFn, loss: LossFn, *, axis_name: str | None = None, chunk_size: int | None = None
) -> Field:
    r"""The flow with half of the innovation: the loss's gradient is taken at ``(G(u_j) + mean G) / 2``.

    For squared error this is the ensemble Kalman-Bucy square-root flow (Bergemann and Reich, 2012),
    ``u_j' = -C_uG Gamma^-1 ((G(u_j) + mean G) / 2 - y)``. The plain field moves every particle by its own residual and
    contracts the covariance twice as fast, ``C(t)^-1 = C(0)^-1 + 2 t A^T Gamma^-1 A`` for a linear model A; here the
    factor is 1, so that mean and covariance at t = 1 are those of Bayes' rule applied to the ensemble's Gaussian.

    Args:
        forward: function ``forward(params, x) -> outputs`` of one particle.
        loss: function ``loss(outputs, targets) -> scalar`` of one particle; any loss, though the statement on Bayes'
            rule is one on squared error.
        axis_name: mapped axis over which the particles are spread.
        chunk_size: number of particles evaluated at a time; by default from a memory budget.

    Returns:
        ``f(t, ensemble, (x, targets))``, the ensemble's time derivative. It does not depend on t. A particle that is
        not finite takes no part, and its own row is NaN, as in :func:`eki_jax.vector_field`.

    Raises:
        TypeError, ValueError: from ``f``, as :func:`eki_jax.direction` does.

    >>> import jax.numpy as jnp
    >>> from eki_jax import losses
    >>> f = square_root_flow(lambda u, x: x * u, losses.squared_error())
    >>> f(0.0, jnp.array([[1.0], [3.0]]), (2.0, jnp.array([0.0])))  # -4 (u + 2) / 2
    Array([[ -6.],
           [-10.]], dtype=float32)
    """

    def f(t: Any, ensemble: Ensemble, batch: Batch) -> Ensemble:
        del t
        ensemble_size(ensemble, axis_name=axis_name)
        x, targets = traceable("batch", pair("batch", batch))
        outputs = evaluate(forward, ensemble, x, chunk_size=chunk_size)

        def of_targets(loss: LossFn, targets: Any) -> Ensemble:
            entries, reduced = supported_outputs(loss, outputs, targets)
            axis, finite = Axis(axis_name), finite_particles((entries, ensemble))
            near = near_particles(entries, None, finite, OUTLIER_CUT, Axes(axis))
            mean = masked_mean(entries, finite & near, axis)
            halfway = jax.tree.map(lambda g, m: 0.5 * (g + m), entries, mean)
            _, cotangents = value_and_cotangents(reduced, halfway, targets)
            field = jax.tree.map(jnp.negative, direction(ensemble, entries, cotangents, axis_name=axis_name))
            return seen_by_solvers(field, finite_particles((entries, cotangents, ensemble)), Axis(axis_name))

        return by_shortcut(of_targets, loss, targets)

    return f


def guarded(field: Field, times: Sequence[float] | Array) -> Field:
    """``field`` with checks, for a solve from ``times[0]`` to ``times[-1]``.

    Backwards in time the covariance of an ensemble grows without bound within a finite time, so that a solve in that
    direction is an error and not a question. A field that is not finite makes an adaptive solver shrink its steps until
    it gives up, for a reason that its message does not know; here the message does.

    Args:
        field: function ``f(t, state, batch)``, a vector field.
        times: times to pass through in increasing order, two at least.

    Returns:
        A field of the same signature. Where the derivative is not finite it raises while evaluated eagerly; in compiled
        code it needs :func:`eki_jax.checked` around the whole solve (and ``throw=False`` in diffrax, which would
        otherwise complain first).

    Raises:
        TypeError: ``field`` is no function, or ``times`` are no numbers; from the field, a state that is not real.
        ValueError: fewer than two times, times that are not finite, or times that do not increase.

    >>> guarded(lambda t, u, batch: -u, times=[1.0, 0.5])
    Traceback (most recent call last):
        ...
    ValueError: times: goes from 1.0 back to 0.5; wanted increasing times
    """
    function("field", field, "a vector field f(t, state, batch)", arguments=3)
    arrays("times", times, some=True)
    if is_known(times):
        _increasing(times)

    def f(t: Any, state: Any, batch: Batch) -> Any:
        arrays("state", state, some=True)
        derivative = field(t, state, batch)
        finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(derivative)]))
        checkify.check(finite, "the field is not finite at t = {t}", t=jnp.asarray(t))
        return derivative

    return f


def _second_order(field: Field, damping: Callable[[Any], Any]) -> Field:
    """``u'' + damping(t) u' = field(t, u)`` as a first-order system."""

    def f(t: Any, state: tuple[Ensemble, Ensemble], batch: Batch) -> tuple[Ensemble, Ensemble]:
        ensemble, velocity = pair("state", state, "(ensemble, velocity)")
        local_size(ensemble, name="ensemble", floating=True)
        check_like(velocity, ensemble, name="velocity", other="ensemble's leaves", hint="its shape")
        rate = damping(t)
        force = field(t, ensemble, batch)
        return velocity, jax.tree.map(lambda f, v: (f - rate * v).astype(v.dtype), force, velocity)

    return f


def _increasing(given: Any) -> None:
    if isinstance(given, dict):
        raise TypeError(f"times: {given}; wanted a sequence of numbers")
    times = np.asarray(given, np.float64)
    if times.ndim != 1 or times.size < 2:
        raise ValueError(f"times: shape {times.shape}; wanted two times or more")
    if not np.all(np.isfinite(times)):
        raise ValueError(f"times: {times}; wanted finite times")
    for before, after in itertools.pairwise(times.tolist()):
        if not before < after:
            raise ValueError(f"times: goes from {before} back to {after}; wanted increasing times")
