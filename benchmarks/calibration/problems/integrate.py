"""Steps of Runge and Kutta's fourth order, with statistics of what they pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

Rate = Callable[[jax.Array], jax.Array]


def runge_kutta(rate: Rate, x: jax.Array, dt: float) -> jax.Array:
    """One step of length ``dt`` of ``dx/dt = rate(x)``."""
    k1 = rate(x)
    k2 = rate(x + 0.5 * dt * k1)
    k3 = rate(x + 0.5 * dt * k2)
    k4 = rate(x + dt * k3)
    return x + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


def after(rate: Rate, x: jax.Array, steps: int, dt: float) -> jax.Array:
    """The state after so many steps."""
    return jax.lax.fori_loop(0, steps, lambda _, x: runge_kutta(rate, x, dt), x)


def accumulate(
    rate: Rate, x: jax.Array, steps: int, dt: float, add: Callable[[Any, jax.Array], Any], start: Any
) -> tuple[jax.Array, Any]:
    """The state after so many steps, and ``add(...add(start, x_0)..., x_steps)`` over all states on the way."""

    def one(_: Any, carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        x, sums = carry
        x = runge_kutta(rate, x, dt)
        return x, add(sums, x)

    return jax.lax.fori_loop(0, steps, one, (x, add(start, x)))
