"""Forward Euler: the paper's EKI."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Unpack

import jax.numpy as jnp

from eki_jax._types import Array, Ensemble, ForwardFn, LossFn, StepSizeFn
from eki_jax.solvers.discretization import discretization
from eki_jax.solvers.protocol import Settings, Solver
from eki_jax.solvers.step_sizes import frobenius_step_size


class EulerState(NamedTuple):
    """State of :func:`euler`.

    Attributes:
        ensemble: particles, shape (J, ...); where the outputs of the next step are wanted.
        count: number of steps taken, int32.
    """

    ensemble: Ensemble
    count: Array  # type: ignore[assignment]  # hides tuple.count, as in optax

    @property
    def position(self) -> Ensemble:
        """The particles to predict with."""
        return self.ensemble

    def with_ensemble(self, ensemble: Ensemble) -> EulerState:
        """The state with other particles, after noise for example."""
        return self._replace(ensemble=ensemble)


def euler(
    forward: ForwardFn | None,
    loss: LossFn,
    step_size: StepSizeFn = frobenius_step_size(h0=1.0, eps=0.5),  # noqa: B008
    **settings: Unpack[Settings],
) -> Solver:
    r"""Forward Euler, ``u <- u - dt C_uG grad L(G(u), y)``: the paper's EKI (arXiv:1808.03620, section 4.3.3).

    Args:
        forward: function ``forward(params, x) -> outputs`` of one particle; None where only ``update`` is used.
        loss: function ``loss(outputs, targets) -> scalar`` of one particle.
        step_size: function ``step_size(drift_norm, J, count) -> dt``, such as :func:`frobenius_step_size`.
        **settings: keywords that all discretizations share: ``axis_name``, ``failures``, ``targets_axis``,
            ``chunk_size``, ``contraction``, ``communication`` and ``precision`` of :class:`eki_jax.Settings`.

    Returns:
        A :class:`eki_jax.Solver` with :class:`EulerState`. A step works in place if its state is donated.

    Raises:
        TypeError: ``step_size`` is not a function; an unknown setting; leaves that are not floating-point.
        ValueError: outputs or targets that do not fit, from ``step`` and ``update``.

    >>> import jax.numpy as jnp
    >>> from eki_jax import losses
    >>> solver = euler(lambda u, x: x * u, losses.squared_error())
    >>> state = solver.init(jnp.array([[1.0], [3.0]]))
    >>> for _ in range(20):
    ...     state, info = solver.step(state, (2.0, jnp.array([8.0])))
    >>> bool(jnp.allclose(state.ensemble, 4.0, atol=0.2))
    True
    """

    def start(ensemble: Ensemble) -> EulerState:
        return EulerState(ensemble, jnp.zeros((), jnp.int32))

    def move(dt: Array, count: Array) -> Callable[..., tuple[Array, ...]]:
        del count
        return lambda d, u: (u - dt.astype(d.dtype) * d,)

    return discretization(forward, loss, step_size, start, move, **settings)
