"""The two accelerations of the paper: W1 (constant friction) and W2 (friction alpha / t)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from eki_jax._types import Array
from eki_jax.edf import _vectors as vectors

PyTree = Any


class Acceleration(NamedTuple):
    """How the velocity is carried from step to step; made by :func:`heavy_ball` and :func:`nesterov`.

    Attributes:
        momentum: the share of the velocity that is kept, as a function of the step count n = 0, 1, 2, ...
        look_ahead: whether the parameters handed to the optimizer are the extrapolated ones (Nesterov).
    """

    momentum: Callable[[Array], Any]
    look_ahead: bool

    def init(self, params: PyTree) -> PyTree:
        """The velocity at rest, a pytree like ``params``."""
        return vectors.zeros_like(params)

    def update(self, step: PyTree, velocity: PyTree, count: Array) -> tuple[PyTree, PyTree]:
        """The update that ``step`` (minus the learning rate times the direction) becomes, and the new velocity."""
        if not self.look_ahead:
            velocity = vectors.combine((1, step), (self.momentum(count), velocity))
            return velocity, velocity
        # The step leads from the extrapolated point to the next iterate; then comes the next extrapolation. This is
        # exact for a momentum that changes from step to step.
        before = jnp.where(count > 0, self.momentum(jnp.maximum(count - 1, 0)), 0)
        velocity = vectors.combine((1, step), (before, velocity))
        return vectors.combine((1, step), (self.momentum(count), velocity)), velocity


def heavy_ball(kappa: float = 0.9) -> Acceleration:
    r"""W1: the velocity decays by the constant factor ``kappa`` a step, ``m <- kappa m + P``, ``w <- w - eta m``.

    With learning rate ``eta = dt^2`` this discretises the paper's equation (25), ``w'' + c w' + P = 0`` with constant
    friction ``c``, where ``kappa = 1 - c dt``. The paper's experiments use the momentum coefficient 0.9.

    Args:
        kappa: momentum coefficient, in [0, 1).

    Returns:
        An :class:`Acceleration` for :func:`edf_g` and :func:`edf_h`.

    Raises:
        ValueError: ``kappa`` outside [0, 1).

    Example:
        >>> float(heavy_ball(0.9).momentum(jnp.asarray(7)))
        0.9
    """
    if not isinstance(kappa, jax.core.Tracer) and not 0 <= kappa < 1:
        raise ValueError(f"kappa must lie in [0, 1); got {kappa}")
    return Acceleration(lambda count: kappa, look_ahead=False)


def nesterov(alpha: float = 3.0) -> Acceleration:
    r"""W2: friction ``alpha / t``, discretised with the momentum coefficient ``n / (n + alpha)``, n = 0, 1, 2, ...

    The parameters that the optimizer sees are the extrapolated ones, at which gradient and curvature are to be taken:
    ``w_(n+1) = y_n - eta P(y_n)``, ``y_(n+1) = w_(n+1) + n / (n + alpha) (w_(n+1) - w_n)``. With ``eta = dt^2`` it
    discretises ``w'' + (alpha / t) w' + P = 0``, the paper's equation (25) with ``t = n dt``.

    Args:
        alpha: positive; 3 is Nesterov's sequence.

    Returns:
        An :class:`Acceleration` for :func:`edf_g` and :func:`edf_h`.

    Raises:
        ValueError: ``alpha`` <= 0.

    Source: the paper's section 4; Su, Boyd and Candès, "A differential equation for modeling Nesterov's accelerated
    gradient method" (2014).

    Example:
        >>> [float(nesterov(3.0).momentum(jnp.asarray(n))) for n in (0, 3)]
        [0.0, 0.5]
    """
    if not isinstance(alpha, jax.core.Tracer) and not alpha > 0:
        raise ValueError(f"alpha must be positive; got {alpha}")
    return Acceleration(lambda count: count / (count + alpha), look_ahead=True)
