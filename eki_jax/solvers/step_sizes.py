"""Step sizes dt of the discretizations, and schedules of the momentum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from eki_jax._types import Array, StepSizeFn


def frobenius_step_size(h0: float = 2.0, eps: float = 0.5) -> StepSizeFn:
    r"""The paper's adaptive step, ``dt = J h0 / (||D||_F + eps)``.

    The paper writes ``u <- u - h D u`` with ``h = h0 / (||D||_F + eps)`` and no 1/J in D (arXiv:1808.03620, section
    4.3.3); a solver here moves by ``-dt direction``, whose 1/J makes ``dt = J h`` the same step. The closer the
    particles come to each other and to the data, the longer the step.

    Args:
        h0: length of the step, > 0.
        eps: bound of the step, >= 0, in the units of the drift norm.

    Returns:
        ``f(drift_norm, ensemble_size, count) -> dt``.

    Raises:
        ValueError: ``h0`` <= 0 or ``eps`` < 0.

    >>> frobenius_step_size(h0=2.0, eps=0.5)(3.5, 10, 0)
    5.0
    """
    _positive("h0", h0)
    if isinstance(eps, int | float) and not eps >= 0:
        raise ValueError(f"eps: {eps}; wanted a number >= 0")

    def step_size(drift_norm: Any, ensemble_size: Any, count: Any) -> Any:
        del count
        return ensemble_size * h0 / (drift_norm + eps)

    return step_size


def constant_step_size(step_size: float | Callable[[Array], Any]) -> StepSizeFn:
    """A step size that does not look at the ensemble: a number, or a schedule of the step count.

    Args:
        step_size: step size dt > 0, or a schedule ``schedule(count) -> dt``.

    Returns:
        ``f(drift_norm, ensemble_size, count) -> dt``.

    Raises:
        ValueError: a number <= 0.

    >>> constant_step_size(0.1)(3.5, 10, 0)
    0.1
    """
    if not callable(step_size):
        _positive("step_size", step_size)

    def constant(drift_norm: Any, ensemble_size: Any, count: Any) -> Any:
        del drift_norm, ensemble_size
        return step_size(count) if callable(step_size) else step_size

    return constant


def su_boyd_candes() -> Callable[[Any], Any]:
    r"""Nesterov's momentum as a schedule, ``n / (n + 3)``, whose flow is ``u'' + (3/t) u' = -C_uG grad L``.

    (Su, Boyd and Candes, JMLR 2016; arXiv:1808.03620, equation 14.)

    Returns:
        ``schedule(count) -> momentum``.

    >>> float(su_boyd_candes()(3))
    0.5
    """

    def momentum(count: Any) -> Array:
        n = jnp.asarray(count, float)  # an int32 count alone would make it float32 where all else is float64
        return n / (n + 3)

    return momentum


def momentum_schedule(momentum: float | Callable[[Array], Any]) -> Callable[[Any], Any]:
    """``momentum`` as a schedule; checks a number.

    >>> momentum_schedule(0.9)(7)
    0.9
    """
    if callable(momentum):
        return momentum
    if not isinstance(momentum, jax.core.Tracer) and not 0 <= momentum < 1:
        raise ValueError(f"momentum: {momentum}; wanted a number in [0, 1) or a schedule of the step count")
    return lambda count: momentum


def _positive(name: str, value: Any) -> None:
    if not isinstance(value, jax.core.Tracer) and not (jnp.ndim(value) == 0 and value > 0):
        raise ValueError(f"{name}: {value}; wanted a number > 0")
