"""The two accelerations of the paper: W1 with constant friction and W2 with friction that falls as 1 / t."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from eki_jax._checks import POSITIVE, SHARE, arrays, real
from eki_jax._types import Array, PyTree
from eki_jax.edf import _vectors as vectors


class Acceleration(NamedTuple):
    """How the velocity is carried from step to step; made by :func:`heavy_ball` and :func:`nesterov`.

    Attributes:
        momentum: share of the velocity that is kept, as a function of the step count n = 0, 1, 2, ...
        look_ahead: flag, True where the optimizer is handed extrapolated parameters (Nesterov).
    """

    momentum: Callable[[Array], Any]
    look_ahead: bool

    def init(self, params: PyTree) -> PyTree:
        """The velocity at rest, a pytree like ``params``."""
        return vectors.zeros_like(arrays("params", params, floating=True, some=True))

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


def heavy_ball(momentum: float = 0.9) -> Acceleration:
    r"""W1: the velocity decays by a constant factor kappa a step, ``m <- kappa m + P``, ``w <- w - eta m``.

    With learning rate ``eta = dt^2`` it is a discretization of ``w'' + c w' + P = 0`` with constant friction ``c``,
    where ``kappa = 1 - c dt``. The paper's experiments use the factor 0.9. ("Exponentially Decaying Flows for
    Optimization in Deep Learning", 2018, equation 25.)

    Args:
        momentum: factor kappa in [0, 1).

    Returns:
        An :class:`Acceleration` for :func:`edf_g` and :func:`edf_h`.

    Raises:
        ValueError: ``momentum`` outside [0, 1).

    >>> float(heavy_ball(0.9).momentum(jnp.asarray(7)))
    0.9
    """
    real("momentum", momentum, SHARE)
    return Acceleration(lambda count: momentum, look_ahead=False)


def nesterov(friction: float = 3.0) -> Acceleration:
    r"""W2: friction ``alpha / t``, as the momentum factor ``n / (n + alpha)`` of the step n = 0, 1, 2, ...

    The parameters that the optimizer sees are the extrapolated ones, at which gradient and curvature are to be taken:
    ``w_(n+1) = y_n - eta P(y_n)``, ``y_(n+1) = w_(n+1) + n / (n + alpha) (w_(n+1) - w_n)``. With ``eta = dt^2`` it is
    a discretization of ``w'' + (alpha / t) w' + P = 0`` with ``t = n dt``. ("Exponentially Decaying Flows for
    Optimization in Deep Learning", 2018, equation 25 and section 4; Su, Boyd and Candes, JMLR 2016.)

    Args:
        friction: constant alpha > 0 of the friction; 3 is Nesterov's sequence.

    Returns:
        An :class:`Acceleration` for :func:`edf_g` and :func:`edf_h`.

    Raises:
        ValueError: ``friction`` <= 0.

    >>> [float(nesterov(3.0).momentum(jnp.asarray(n))) for n in (0, 3)]
    [0.0, 0.5]
    """
    real("friction", friction, POSITIVE)
    return Acceleration(lambda count: count / (count + friction), look_ahead=True)
