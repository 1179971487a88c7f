"""Nesterov's accelerated steps: the paper's MEKI."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp

from eki_jax._types import Array, Ensemble, ForwardFn, LossFn, StepSizeFn
from eki_jax.solvers.discretization import discretization
from eki_jax.solvers.protocol import Settings, Solver
from eki_jax.solvers.step_sizes import frobenius_step_size, momentum_schedule, steps_with_momentum


class NesterovState(NamedTuple):
    """State of :func:`nesterov`.

    The momentum is kept as such: as the difference of two stored positions it would lose most of its digits.

    Attributes:
        ensemble: extrapolated particles v, shape (J, ...); where the outputs of the next step are wanted.
        lookahead: distance v - u by which they are ahead of the positions.
        count: number of steps taken, int32.
    """

    ensemble: Ensemble
    lookahead: Ensemble
    count: Array  # type: ignore[assignment]  # hides tuple.count, as in optax

    @property
    def position(self) -> Ensemble:
        """The particles u to predict with."""
        return jax.tree.map(lambda v, m: v - m, self.ensemble, self.lookahead)

    def with_ensemble(self, ensemble: Ensemble) -> NesterovState:
        """The state with other extrapolated particles and the same positions: for noise on the momenta."""
        lookahead = jax.tree.map(lambda m, new, v: m + (new - v), self.lookahead, ensemble, self.ensemble)
        return self._replace(ensemble=ensemble, lookahead=lookahead)


def nesterov(
    forward: ForwardFn | None,
    loss: LossFn,
    step_size: StepSizeFn = frobenius_step_size(h0=1.0, eps=0.5),  # noqa: B008
    momentum: float | Callable[[Array], Any] = 0.9,
    **settings: Unpack[Settings],
) -> Solver:
    r"""Nesterov's steps, the paper's MEKI (arXiv:1808.03620, section 4.3.3).

    .. math:: u_{n+1} = v_n - dt\, C_{uG}(v_n) \nabla L(G(v_n), y), \qquad
              v_{n+1} = u_{n+1} + \lambda_n (u_{n+1} - u_n)

    Args:
        forward: function ``forward(params, x) -> outputs`` of one particle; None where only ``update`` is used.
        loss: function ``loss(outputs, targets) -> scalar`` of one particle.
        step_size: function ``step_size(drift_norm, J, count) -> dt``.
        momentum: factor lambda in [0, 1), or a schedule of the step count n = 0, 1, ..., such as
            :func:`su_boyd_candes`.
        **settings: keywords that all discretizations share, see :class:`eki_jax.Settings`.

    Returns:
        A :class:`eki_jax.Solver` with :class:`NesterovState`: twice the memory of :func:`euler`, and no more if
        donated.

    Raises:
        TypeError: ``step_size`` is not a function; an unknown setting; leaves that are not floating-point.
        ValueError: ``momentum`` outside [0, 1); outputs or targets that do not fit.

    >>> import jax.numpy as jnp
    >>> from eki_jax import losses
    >>> solver = nesterov(lambda u, x: x * u, losses.squared_error(), momentum=0.5)
    >>> state = solver.init(jnp.array([[1.0], [3.0]]))
    >>> for _ in range(10):
    ...     state, info = solver.step(state, (2.0, jnp.array([8.0])))
    >>> bool(jnp.allclose(state.position, 4.0, atol=0.2))
    True
    """
    schedule = momentum_schedule(momentum)

    def start(ensemble: Ensemble) -> NesterovState:
        return NesterovState(ensemble, jax.tree.map(jnp.zeros_like, ensemble), jnp.zeros((), jnp.int32))

    def move(dt: Array, count: Array) -> Callable[..., tuple[Array, ...]]:
        factor = jnp.asarray(schedule(count))

        def blocks(d: Array, v: Array, ahead: Array) -> tuple[Array, ...]:
            g = dt.astype(d.dtype) * d
            ahead = factor.astype(d.dtype) * (ahead - g)  # lambda (u_{n+1} - u_n)
            return v + (ahead - g), ahead

        return blocks

    return discretization(forward, loss, steps_with_momentum(step_size, schedule), start, move, **settings)
