"""The problems' simulators in NumPy, for particles of shape (J, P)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Simulate = Callable[[np.random.Generator, np.ndarray], np.ndarray]


def simulator(settings: dict) -> Simulate:
    """The simulator of a problem's settings."""
    return {"linear": linear, "lorenz63": lorenz63, "lorenz96": lorenz96}[settings["model"]](settings)


def linear(settings: dict) -> Simulate:
    """A matrix."""
    matrix = np.array(settings["matrix"])
    return lambda rng, ensemble: ensemble @ matrix.T


def lorenz63(settings: dict) -> Simulate:
    """Means, variances and covariances of the state."""
    dt, spin_up, window = settings["dt"], settings["spin_up"], settings["window"]

    def simulate(rng: np.random.Generator, ensemble: np.ndarray) -> np.ndarray:
        rho, beta = np.exp(ensemble.T)
        x = _start(rng, settings, len(ensemble))

        def rate(x: np.ndarray, out: np.ndarray) -> None:
            np.multiply(10.0, x[1] - x[0], out=out[0])
            np.subtract(x[0] * (rho - x[2]), x[1], out=out[1])
            np.subtract(x[0] * x[1], beta * x[2], out=out[2])

        for _ in range(spin_up):
            _step(rate, x, dt)
        states = np.empty((window + 1, *x.shape))
        states[0] = x
        for index in range(window):
            _step(rate, x, dt)
            states[index + 1] = x
        mean = states.mean(axis=0)
        away = states - mean
        pairs = [(0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2)]
        moments = [np.einsum("tj,tj->j", away[:, a], away[:, b]) / window for a, b in pairs]
        return np.vstack([mean, moments]).T

    return simulate


def lorenz96(settings: dict) -> Simulate:
    """Means and standard deviations of the state at every place."""
    dt, spin_up, window = settings["dt"], settings["spin_up"], settings["window"]

    def simulate(rng: np.random.Generator, ensemble: np.ndarray) -> np.ndarray:
        x = _start(rng, settings, len(ensemble))
        forcing, places = ensemble.T, len(x)
        wide = np.empty((places + 3, x.shape[1]))

        def rate(x: np.ndarray, out: np.ndarray) -> None:
            wide[2:-1], wide[:2], wide[-1] = x, x[-2:], x[0]
            np.subtract(wide[3:], wide[:-3], out=out)
            out *= wide[1:-2]
            out -= x
            out += forcing

        for _ in range(spin_up):
            _step(rate, x, dt)
        first, second = x.copy(), x * x
        for _ in range(window):
            _step(rate, x, dt)
            first += x
            second += x * x
        count = window + 1
        mean = first / count
        return np.vstack([mean, np.sqrt((second / count - mean * mean) * (count / window))]).T

    return simulate


def _start(rng: np.random.Generator, settings: dict, particles: int) -> np.ndarray:
    root = np.array(settings["start_root"])
    return np.array(settings["start"])[:, None] + root @ rng.normal(size=(len(root), particles))


def _step(rate: Callable[[np.ndarray, np.ndarray], None], x: np.ndarray, dt: float) -> None:
    """A step of Runge and Kutta's fourth order, in place."""
    k, total = np.empty_like(x), np.empty_like(x)
    rate(x, total)
    rate(x + (0.5 * dt) * total, k)
    total += 2 * k
    rate(x + (0.5 * dt) * k, k)
    total += 2 * k
    rate(x + dt * k, k)
    total += k
    x += (dt / 6) * total
