r"""Nesterov's acceleration around a solver's own step: the particles look ahead before they are evaluated.

.. math:: u_{n+1} = \mathrm{step}(v_n), \qquad v_{n+1} = u_{n+1} + \lambda_k (u_{n+1} - u_n)

with k the number of steps since the momentum began.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from eki_jax._checks import SHARE, flag, pair
from eki_jax._types import Array, Batch, Ensemble, Params
from eki_jax.kernel.health import finite_particles, unmoved_particles
from eki_jax.kernel.particles import wide_dtype
from eki_jax.solvers.protocol import Info, Solver, check_state, compiled, extended, makes_its_particles
from eki_jax.solvers.reasons import Reason
from eki_jax.solvers.step_sizes import momentum_schedule, su_boyd_candes


class AcceleratedState(NamedTuple):
    """State of :func:`accelerated`.

    Attributes:
        inner: state of the solver; its particles v are ahead, where the outputs of the next step are wanted.
        position: particles u behind them, to predict with, shape (J, ...).
        loss: mean loss of the last step, which a rising one is compared with.
        since: number of steps since the momentum began anew, int32.
    """

    inner: Any
    position: Ensemble
    loss: Array
    since: Array

    @property
    def ensemble(self) -> Ensemble:
        """The particles where the outputs of the next step are wanted."""
        return self.inner.ensemble

    @property
    def time(self) -> Array:
        """The sum of the step sizes so far, of a solver that has it."""
        return self.inner.time

    @property
    def count(self) -> Array:  # type: ignore[override]  # hides tuple.count
        """The number of steps taken, int32."""
        return self.inner.count


class AcceleratedInfo(NamedTuple):
    """Numbers of one step: those of :class:`eki_jax.Info`, at the particles that are ahead, and of the momentum.

    Attributes:
        losses: losses of this device's particles, shape (J,).
        step_size: step size of the solver.
        drift_norm: norm of the drift, as the solver has it.
        spread: root mean square distance of a particle from the mean.
        is_finite: flag, True where no particle had failed and the step was taken, or had nothing left to do.
        failed: number of particles that took no part, int32.
        loss: mean loss of the particles that did not fail, a scalar.
        moved: flag, True where the step was taken; False where it was refused, and the state is what it was.
        reason: code of :class:`eki_jax.Reason` that says why the step was refused, int32; 0 where it was taken.
        momentum: factor lambda by which the particles were moved ahead after the step.
        restarted: flag, True where the loss had risen, so that the momentum was given up.
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
    momentum: Array
    restarted: Array


def accelerated(
    solver: Solver, momentum: float | Callable[[Array], Any] | None = None, *, restart: bool = True
) -> Solver:
    r"""Nesterov's acceleration of a Kalman step, or of any solver that moves an ensemble.

    (Vernon, Bach and Dunbar, Journal of Computational Physics 535, 2025; Su, Boyd and Candes, JMLR 17, 2016.) A step
    evaluates the particles v ahead of the positions u, moves them by the solver, and looks ahead anew. It costs no run
    of the model more, and reaches a small misfit in fewer steps. It is for fitting: steps whose sizes sum to one no
    longer lead from prior to posterior, and the spread is not the posterior's.

    A Kalman step contracts, by factors :math:`\rho \in [0, 1)` along its directions, and with momentum by roots of
    :math:`z^2 - (1 + \lambda) \rho z + \lambda \rho`, which are inside of the unit circle for every
    :math:`\lambda < 1`: it is stable where steps explicit in the outputs are not. What may carry an ensemble too far is
    the momentum of a direction that has since collapsed or turned, or that perturbed data gave. So it is given up where
    the mean loss has risen, and begins anew at k = 0 (O'Donoghue and Candes, Foundations of Computational Mathematics
    15, 2015).

    A particle that the solver left where it was, as one that failed, or whose loss or last position was not finite,
    gets no momentum in that step.

    Args:
        solver: solver such as :func:`etki`, :func:`enkf` or :func:`eki_jax.euler`, whose particles can be replaced.
        momentum: factor lambda in [0, 1), or a schedule of the number of steps k = 0, 1, ... since the momentum began.
            By default :func:`eki_jax.su_boyd_candes`, ``k / (k + 3)``, which is zero first and to first order in 1 / k
            Nesterov's own sequence.
        restart: flag; False never gives the momentum up, for losses that rise because the batch has changed.

    Returns:
        A :class:`eki_jax.Solver` with :class:`AcceleratedState` and :class:`AcceleratedInfo`, with a flag ``refreshed``
        more for a solver from :func:`eki_jax.stateful` of a model with a state. Its ``with_ensemble``
        replaces the particles that are ahead. A step that the solver refuses changes nothing, the momentum neither.

    Raises:
        TypeError: no :class:`eki_jax.Solver`, or one that makes its own particles (:func:`uki`); a momentum that is
            neither a number nor a function.
        ValueError: a momentum outside [0, 1), where it is known; where it is traced, the step is refused.

    >>> import jax, jax.numpy as jnp
    >>> from eki_jax import kalman
    >>> plain = kalman.etki(lambda u, x: x * u, 100.0)
    >>> def misfit_after(solver, steps):
    ...     state = solver.init(jnp.array([[1.0], [3.0]]))
    ...     run = jax.lax.scan(lambda s, _: solver.step(s, (2.0, jnp.array([8.0]))), state, length=steps)
    ...     return float(run[1].loss[-1])
    >>> misfit_after(accelerated(plain), 20) < 0.5 * misfit_after(plain, 20)
    True
    """
    if not isinstance(solver, Solver):
        raise TypeError(f"solver: {solver!r}; wanted a Solver, such as kalman.etki(forward, noise_covariance)")
    if makes_its_particles(solver):
        raise TypeError(
            "solver: makes its own particles around one mean, which cannot be moved ahead; wanted one with "
            "init(ensemble), such as kalman.etki(forward, noise_covariance)"
        )
    flag("restart", restart)
    factor_of = momentum_schedule(su_boyd_candes() if momentum is None else momentum)

    def init(ensemble: Ensemble) -> AcceleratedState:
        inner = solver.init(ensemble)
        # Buffers of their own: a donated state must not hold one twice.
        position = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), solver.ensemble(inner))
        dtype = wide_dtype(*(leaf.dtype for leaf in jax.tree.leaves(position)))
        return AcceleratedState(inner, position, jnp.array(jnp.inf, dtype), jnp.zeros((), jnp.int32))

    def ahead(state: AcceleratedState, inner: Any, info: Any) -> tuple[AcceleratedState, AcceleratedInfo]:
        before, behind, reached = solver.ensemble(state.inner), state.position, solver.ensemble(inner)
        loss = jnp.asarray(info.loss, state.loss.dtype)
        restarted = jnp.asarray(restart) & (loss > state.loss)
        since = jnp.where(restarted, 0, state.since)
        factor = jnp.where(restarted, 0, jnp.asarray(factor_of(since)))
        in_range = SHARE.holds(factor)
        free = ~unmoved_particles(before, reached) & finite_particles((behind, info.losses))

        def leaf(u: Array, old: Array) -> Array:
            wide = wide_dtype(u.dtype)
            move = factor.astype(wide) * (u.astype(wide) - old.astype(wide))
            return (u + jnp.where(free.reshape(-1, *[1] * (u.ndim - 1)), move, 0).astype(u.dtype)).astype(u.dtype)

        later = solver.with_ensemble(inner, jax.tree.map(leaf, reached, behind))
        ok = info.moved & in_range
        new = AcceleratedState(later, reached, loss, since + 1)
        new = jax.tree.map(lambda new, old: jnp.where(ok, new, old), new, state)
        reason = jnp.where(info.moved & ~in_range, jnp.asarray(Reason.SETTING, info.reason.dtype), info.reason)
        told = info._replace(moved=ok, reason=reason, is_finite=info.is_finite & (in_range | ~info.moved))
        own = {name: getattr(told, name) for name in Info._fields}
        found = AcceleratedInfo(**own, momentum=jnp.where(ok, factor, 0), restarted=restarted & ok)
        if not hasattr(info, "refreshed"):
            return new, found
        return new, extended(found, "Stateful", refreshed=info.refreshed & ok)

    def step(state: AcceleratedState, batch: Batch) -> tuple[AcceleratedState, AcceleratedInfo]:
        check_state(state, AcceleratedState, "accelerated")
        return ahead(state, *solver.step(state.inner, pair("batch", batch)))

    def update(state: AcceleratedState, outputs: Any, targets: Any) -> tuple[AcceleratedState, AcceleratedInfo]:
        check_state(state, AcceleratedState, "accelerated")
        return ahead(state, *solver.update(state.inner, outputs, targets))

    def estimate(state: AcceleratedState) -> Params:
        return solver.estimate(solver.with_ensemble(state.inner, state.position))

    return compiled(
        Solver(
            init,
            step,
            update,
            lambda state: solver.ensemble(state.inner),
            estimate,
            lambda state, ensemble: state._replace(inner=solver.with_ensemble(state.inner, ensemble)),
            lambda state: solver.done(state.inner),
            solver.passes,
        )
    )
