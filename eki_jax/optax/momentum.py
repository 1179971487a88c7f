"""Nesterov's momentum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from eki_jax._checks import arrays
from eki_jax._types import Array, Ensemble
from eki_jax.kernel.particles import wide_dtype
from eki_jax.optax._checks import check_transformation
from eki_jax.solvers.step_sizes import momentum_schedule


class ScaleByNesterovState(NamedTuple):
    """State of :func:`scale_by_nesterov`.

    Attributes:
        count: number of updates, int32.
        momentum: distance by which the particles are ahead of their positions u, in the sign of the updates; like the
            ensemble.
        noise: state of the transformation of the momentum; empty where there is none.
    """

    count: Array  # type: ignore[assignment]  # hides tuple.count, as in optax
    momentum: Ensemble
    noise: Any


def scale_by_nesterov(
    momentum: float | Callable[[Array], Any] = 0.9, *, noise: optax.GradientTransformation | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Nesterov's momentum, exact also where it changes from step to step.

    With g the updates that come in and m the state, ``m <- lambda_n (m + g)`` and the updates that go out are
    ``g + m``: the particles are the extrapolated points v of

    .. math:: u_{n+1} = v_n - g_n, \qquad v_{n+1} = u_{n+1} + \lambda_n (u_{n+1} - u_n),

    and ``params + momentum`` is the position u (for a chain that ends in ``scale(-1.0)``). (Kovachki and Stuart,
    arXiv:1808.03620, section 4.3.3.) ``optax.trace(nesterov=True)`` is the same for a constant lambda; with an injected
    schedule it multiplies the past by lambda_n where lambda_{n-1} belongs.

    Args:
        momentum: lambda in [0, 1), or a schedule of the step count n = 0, 1, ..., such as
            :func:`eki_jax.su_boyd_candes`.
        noise: transformation of m, such as :func:`add_prior_noise`: the noise then moves the particles and their
            momentum, as in the paper's MEKI(R). Behind this transformation in a chain it would move the particles only.

    Returns:
        A transformation with :class:`ScaleByNesterovState`, one copy of the ensemble.

    Raises:
        TypeError: ``noise`` is no transformation; parameters or updates that are not real numbers.
        ValueError: ``momentum`` is a number outside [0, 1).

    >>> import jax.numpy as jnp
    >>> tx = scale_by_nesterov(lambda n: n / 4)
    >>> state = tx.init(jnp.array([7.0]))
    >>> for g in (1.0, 2.0, 8.0):  # momentum 0, 1/4, 1/2: m = 0, (0 + 2) / 4, (0.5 + 8) / 2
    ...     updates, state = tx.update(jnp.array([g]), state)
    >>> updates, state.momentum
    (Array([12.25], dtype=float32), Array([4.25], dtype=float32))
    """
    schedule = momentum_schedule(momentum)
    if noise is not None:
        check_transformation("noise", noise)
    disturb = optax.with_extra_args_support(optax.identity() if noise is None else noise)

    def init(params: Ensemble) -> ScaleByNesterovState:
        zeros = jax.tree.map(jnp.zeros_like, arrays("params", params))
        return ScaleByNesterovState(jnp.zeros((), jnp.int32), zeros, disturb.init(params))

    def update(
        updates: Ensemble, state: ScaleByNesterovState, params: Ensemble | None = None, **extra: Any
    ) -> tuple[Ensemble, ScaleByNesterovState]:
        arrays("updates", updates)
        factor = schedule(state.count)

        def advance(m: Array, g: Array) -> Array:
            wide = wide_dtype(m.dtype)
            return (jnp.asarray(factor, wide) * (m.astype(wide) + g.astype(wide))).astype(m.dtype)

        ahead, noise_state = disturb.update(
            jax.tree.map(advance, state.momentum, updates), state.noise, params, **extra
        )
        new = jax.tree.map(lambda g, m: g + m.astype(g.dtype), updates, ahead)
        return new, ScaleByNesterovState(optax.safe_increment(state.count), ahead, noise_state)

    return optax.GradientTransformationExtraArgs(init, update)
