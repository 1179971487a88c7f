"""Polyak's heavy ball: momentum without looking ahead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp

from eki_jax._types import Array, Ensemble, ForwardFn, LossFn, StepSizeFn
from eki_jax.solvers.discretization import discretization
from eki_jax.solvers.protocol import Settings, Solver
from eki_jax.solvers.step_sizes import frobenius_step_size, momentum_schedule, steps_with_momentum


class HeavyBallState(NamedTuple):
    """State of :func:`heavy_ball`.

    Attributes:
        ensemble: particles, shape (J, ...); where the outputs of the next step are wanted.
        velocity: last move of each particle, shaped like them.
        count: number of steps taken, int32.
    """

    ensemble: Ensemble
    velocity: Ensemble
    count: Array  # type: ignore[assignment]  # hides tuple.count, as in optax

    @property
    def position(self) -> Ensemble:
        """The particles to predict with."""
        return self.ensemble


def heavy_ball(
    forward: ForwardFn | None,
    loss: LossFn,
    step_size: StepSizeFn = frobenius_step_size(h0=0.1, eps=0.5),  # noqa: B008
    momentum: float | Callable[[Array], Any] = 0.9,
    **settings: Unpack[Settings],
) -> Solver:
    r"""Polyak's steps of the ensemble: the gradient where the particles are, added to what is left of the last move.

    .. math:: v_{n+1} = \lambda_n v_n - dt\, C_{uG}(u_n) \nabla L(G(u_n), y), \qquad u_{n+1} = u_n + v_{n+1}

    (Polyak, USSR Comput. Math. Math. Phys. 4, 1964.) It discretizes :func:`eki_jax.flows.heavy_ball_flow`. A move lives
    on for 1 / (1 - lambda) steps, so the step is a tenth of Euler's by default.

    Args:
        forward: function ``forward(params, x) -> outputs`` of one particle; None where only ``update`` is used.
        loss: function ``loss(outputs, targets) -> scalar`` of one particle.
        step_size: function ``step_size(drift_norm, J, count) -> dt``.
        momentum: factor lambda in [0, 1), or a schedule of the step count n = 0, 1, ....
        **settings: keywords that all discretizations share, see :class:`eki_jax.Settings`.

    Returns:
        A :class:`eki_jax.Solver` with :class:`HeavyBallState`: twice the memory of :func:`euler`, and no more if
        donated.

    Raises:
        TypeError: ``step_size`` is not a function; an unknown setting; leaves that are not floating-point.
        ValueError: ``momentum`` outside [0, 1); outputs or targets that do not fit.

    >>> import jax.numpy as jnp
    >>> import eki_jax
    >>> solver = heavy_ball(lambda u, x: x * u, eki_jax.squared_error(), momentum=0.5)
    >>> state = solver.init(jnp.array([[1.0], [3.0]]))
    >>> for _ in range(40):
    ...     state, info = solver.step(state, (2.0, jnp.array([8.0])))
    >>> bool(jnp.allclose(solver.estimate(state), 4.0, atol=0.2))
    True
    """
    schedule = momentum_schedule(momentum)

    def start(ensemble: Ensemble) -> HeavyBallState:
        return HeavyBallState(ensemble, jax.tree.map(jnp.zeros_like, ensemble), jnp.zeros((), jnp.int32))

    def move(dt: Array, count: Array) -> Callable[..., tuple[Array, ...]]:
        factor = jnp.asarray(schedule(count))

        def blocks(d: Array, u: Array, velocity: Array) -> tuple[Array, ...]:
            velocity = factor.astype(d.dtype) * velocity - dt.astype(d.dtype) * d
            return u + velocity, velocity

        return blocks

    return discretization(forward, loss, steps_with_momentum(step_size, schedule), start, move, **settings)
