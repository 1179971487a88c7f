"""Step sizes of the Kalman steps that lead from prior to posterior: they sum to one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np

from eki_jax._checks import POSITIVE, SHARE, function, one_of, quantities, real, whole
from eki_jax._types import Array


class TemperingFn(Protocol):
    """The step size of a Kalman step."""

    def __call__(self, misfits: Array, outputs: int, time: Array, count: Array, /) -> Any:
        """The step from the particles' misfits, the number of outputs M, the time so far and the count of steps."""


def tempered(steps: int | Sequence[float]) -> TemperingFn:
    """Fixed step sizes that sum to one; after the last of them the step size is zero.

    The time so far says which step is next, so that a step that was refused is taken again.

    Step n turns the likelihood's power from h_0 + ... + h_{n-1} to h_0 + ... + h_n, the tempering of sequential Monte
    Carlo (slides; Iglesias, Law and Stuart, Inverse Problems 29, 2013).

    Args:
        steps: number of equal steps, or the step sizes themselves.

    Returns:
        ``f(misfits, outputs, time, count) -> step size``.

    Raises:
        TypeError: neither a whole number nor real numbers.
        ValueError: fewer than one step, a step that is not positive (time does not go backwards), or a sum that differs
            from 1 by more than 1e-6.

    >>> schedule = tempered([0.1, 0.2, 0.7])
    >>> [round(float(schedule(None, 1, time, 0)), 2) for time in (0.0, 0.1, 0.3, 1.0)]
    [0.1, 0.2, 0.7, 0.0]
    """
    if isinstance(steps, str | bytes) or not (isinstance(steps, Sequence) or np.ndim(steps)):
        sizes = np.full(whole("steps", steps), 1 / whole("steps", steps))
    else:
        sizes = np.asarray(quantities("steps", steps), np.float64)
    if sizes.ndim != 1 or not np.all(sizes > 0):
        raise ValueError(f"steps: {steps}; wanted a number of steps or a sequence of positive step sizes")
    if abs(sizes.sum() - 1) > 1e-6:
        raise ValueError(f"steps: they sum to {sizes.sum()}; wanted 1")
    ends = np.append(np.cumsum(sizes)[:-1], 1.0)

    def schedule(misfits: Array, outputs: int, time: Array, count: Array) -> Array:
        del misfits, outputs, count
        rounding = 4 * jnp.finfo(time.dtype if hasattr(time, "dtype") else float).eps
        time = jnp.asarray(time, float)
        # The rounding of a time is far below a step; one that is there is the end of its step, not before it.
        later = jnp.asarray(ends, time.dtype) > time + rounding
        return jnp.where(later.any(), jnp.asarray(ends, time.dtype)[jnp.argmax(later)] - time, 0)

    return schedule


def data_misfit_controller(*, ddof: int = 1, tolerance: float = 1e-6, most_steps: int | None = None) -> TemperingFn:
    r"""Step sizes from the spread of the misfits, clipped so that they sum to one.

    .. math:: h = \max\left(\frac{M}{2\,\mathrm{mean}\,\Phi}, \sqrt{\frac{M}{2\,\mathrm{var}\,\Phi}}\right),
              \qquad \Phi_j = \tfrac12 \|y - G(u_j)\|_\Gamma^2

    It bounds the change of distribution that one step makes (Iglesias and Yang, Inverse Problems 37, 2021). A step that
    would end within ``tolerance`` of time 1 ends at 1, so that rounding leaves no sliver of a step behind; after that
    the step size is zero. Particles whose misfit is NaN are left out.

    Args:
        ddof: number subtracted from J in the variance of the J misfits; 1 (unbiased) or 0.
        tolerance: share of the remaining time, >= 0 and below 1.
        most_steps: number of steps at most; the last of them takes all the time that is left, however large that is.
            None for no limit.

    Returns:
        ``f(misfits, outputs, time, count) -> step size``.

    Raises:
        ValueError: ``ddof`` other than 0 or 1, or a tolerance out of range.

    >>> import jax.numpy as jnp
    >>> controller = data_misfit_controller()
    >>> misfits = jnp.array([10.0, 30.0])  # mean 20, variance 200: h = max(4 / 40, sqrt(4 / 400))
    >>> round(float(controller(misfits, 4, 0.0, 0)), 4), round(float(controller(misfits, 4, 0.95, 7)), 4)
    (0.1, 0.05)
    """
    one_of("ddof", ddof, (0, 1))
    real("tolerance", tolerance, SHARE)
    if most_steps is not None:
        whole("most_steps", most_steps, or_="None for no limit")

    def controller(misfits: Array, outputs: int, time: Array, count: Array) -> Array:
        mean, variance = jnp.nanmean(misfits), jnp.nanvar(misfits, ddof=ddof)
        wanted = jnp.maximum(outputs / (2 * mean), jnp.sqrt(outputs / (2 * variance)))
        remaining = jnp.maximum(1 - time, 0)
        last = False if most_steps is None else count >= most_steps - 1
        step = jnp.where((wanted >= remaining - tolerance) | last, remaining, wanted)
        return jnp.where(remaining <= tolerance, 0, step)

    return controller


def check_step_size(step_size: Any) -> None:
    """Raise unless it is a step size h > 0 or a function of misfits, outputs, time and count.

    >>> check_step_size(lambda count: 0.1)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    TypeError: step_size: <function ...>, which does not take 4 arguments; wanted a step size, or a function of ...
    """
    if callable(step_size):
        kind = "a step size, or a function of misfits, outputs, time and count such as tempered(10)"
        function("step_size", step_size, kind, arguments=4)
    else:
        real("step_size", step_size, POSITIVE, or_="a function such as tempered(10)")
