"""Step sizes dt of the discretizations, and schedules of the momentum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from eki_jax._checks import NOT_NEGATIVE, POSITIVE, SHARE, Within, real, schedule
from eki_jax._types import Array, StepSizeFn


def frobenius_step_size(h0: Any = 1.0, eps: Any = 0.5) -> StepSizeFn:
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
        TypeError: ``h0`` or ``eps`` is no number.
        ValueError: ``h0`` <= 0, ``eps`` < 0, or one of them not finite. Where they are traced, the step size is NaN
            then, and the step that it is for is refused.

    >>> frobenius_step_size(h0=2.0, eps=0.5)(3.5, 10, 0)
    5.0
    """
    real("h0", h0, POSITIVE)
    real("eps", eps, NOT_NEGATIVE)

    def step_size(drift_norm: Any, ensemble_size: Any, count: Any) -> Any:
        del count
        # From the left: whole numbers come first and make no traced number wider.
        dt = h0 * ensemble_size / (drift_norm + eps)
        return _nan_unless(dt, (h0, POSITIVE), (eps, NOT_NEGATIVE))

    return step_size


def paper_step_size() -> StepSizeFn:
    """The step of the paper's experiments, ``frobenius_step_size(h0=2, eps=0.5)`` (arXiv:1808.03620, section 5).

    It is at the edge of stability of :func:`eki_jax.euler` where one direction dominates, and beyond that of
    :func:`eki_jax.nesterov` with momentum 0.9, which is at h0 = 1.36: on the losses of classifiers it is fast, on
    least squares it may ring or diverge. The defaults of the solvers are half as long.

    >>> paper_step_size()(3.5, 10, 0)
    5.0
    """
    return frobenius_step_size(h0=2.0, eps=0.5)


def constant_step_size(step_size: float | Callable[[Array], Any]) -> StepSizeFn:
    """A step size that does not look at the ensemble: a number, or a schedule of the step count.

    Args:
        step_size: step size dt > 0, or a schedule ``schedule(count) -> dt``.

    Returns:
        ``f(drift_norm, ensemble_size, count) -> dt``.

    Raises:
        TypeError: neither a number nor a function.
        ValueError: a number <= 0 or not finite; from a schedule, one that is negative.

    >>> constant_step_size(0.1)(3.5, 10, 0)
    0.1
    """
    of_count = schedule("step_size", step_size, NOT_NEGATIVE if callable(step_size) else POSITIVE)

    def constant(drift_norm: Any, ensemble_size: Any, count: Any) -> Any:
        del drift_norm, ensemble_size
        return of_count(count) if callable(step_size) else _nan_unless(step_size, (step_size, POSITIVE))

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
    """``momentum`` as a schedule whose numbers are checked where they are known.

    >>> momentum_schedule(0.9)(7)
    0.9
    """
    return schedule("momentum", momentum, SHARE)


def steps_with_momentum(step_size: StepSizeFn, momentum: Callable[[Any], Any]) -> StepSizeFn:
    """``step_size``, but NaN where a traced momentum is out of its range, so that the step is refused.

    >>> float(steps_with_momentum(constant_step_size(0.1), lambda count: jnp.array(1.5))(3.5, 10, 0))
    nan
    """

    def both(drift_norm: Any, ensemble_size: Any, count: Any) -> Any:
        return _nan_unless(step_size(drift_norm, ensemble_size, count), (momentum(count), SHARE))

    return both


def _nan_unless(step_size: Any, *settings: tuple[Any, Within]) -> Any:
    """The step size, or NaN where a setting that is not known while tracing is out of its range."""
    for value, within in settings:
        if not isinstance(value, int | float):
            step_size = jnp.where(within.holds(value), step_size, jnp.nan)
    return step_size
