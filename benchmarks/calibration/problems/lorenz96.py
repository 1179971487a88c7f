"""The forcing of the Lorenz-96 model at every place, from statistics of a chaotic run, in EKIRace's settings."""

from __future__ import annotations

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.calibration.problems.base import InverseProblem
from benchmarks.calibration.problems.integrate import accumulate, after

PLACES = 40
PRIOR_MEAN, PRIOR_DEVIATION, PRIOR_LENGTH = 8.0, 3.0, 2.0
DT = 0.01
SPIN_UP, WINDOW = 4.0, 50.0
SAMPLES = 800  # windows that estimate the noise, ten for each of 80 outputs
INFLATION = 2.0  # of the noise's covariance: the data and a simulation both have that of one window
SHARE = 0.1  # of the attractor's covariance, by which initial conditions differ
TRANSIENT = 20.0  # units of time after which a run from anywhere is on the attractor


def rate(forcing: jax.Array, x: jax.Array) -> jax.Array:
    """``dx_i/dt = (x_{i+1} - x_{i-2}) x_{i-1} - x_i + F_i`` on a circle; both have shape (places, J)."""
    # In memory once with its neighbours on both sides: slices of that are five times as fast as shifts.
    wide = jax.lax.optimization_barrier(jnp.concatenate([x[-2:], x, x[:1]]))
    return (wide[3:] - wide[:-3]) * wide[1:-2] - x + forcing


@partial(jax.jit, static_argnames=("spin_up", "window"))
def statistics(forcing: jax.Array, x: jax.Array, spin_up: int, window: int) -> tuple[jax.Array, jax.Array]:
    """The state's means and standard deviations at every place, shape (2 places, J), and the last states.

    Over ``window`` steps after ``spin_up`` steps from states ``x``, shape (places, J).
    """
    flow = partial(rate, forcing)
    x = after(flow, x, spin_up, DT)
    add = lambda sums, x: (sums[0] + x, sums[1] + x * x)
    x, (first, second) = accumulate(flow, x, window, DT, add, (jnp.zeros_like(x), jnp.zeros_like(x)))
    count = window + 1
    mean = first / count
    return jnp.concatenate([mean, jnp.sqrt((second / count - mean * mean) * (count / window))]), x


@cache
def lorenz96(window: float = WINDOW, samples: int = SAMPLES) -> InverseProblem:
    """Lorenz-96: forty forcings from the mean and the standard deviation of the state at each of forty places.

    As in EKIRace's case of a forcing vector (CliMA's EnsembleKalmanProcesses.jl, ``examples/EKIRace``; Gjini, Morzfeld,
    Dunbar and Schneider, arXiv:2511.15853): steps of 0.01, 4 units of time to forget the initial condition and 50 of
    statistics, the truth ``8 + 6 sin(4 pi i / 40)``, the prior N(8, 9 exp(-|i - j| / 2)), twice the covariance of 800
    windows as the noise's, and initial conditions that differ by a tenth of the attractor's covariance, anew in every
    run. The windows are of 800 runs side by side, not of one that is 800 times as long, and the random numbers are
    NumPy's and JAX's: the data are another draw of the same distribution.

    Places are 0 to 39 on a circle, for parameters, means and standard deviations alike.

    Args:
        window: units of time over which statistics are taken; shorter ones, with their own noise, are for tests.
        samples: number of windows that estimate the noise's covariance, more than 80.
    """
    places = np.arange(PLACES)
    truth = 8 + 6 * np.sin(4 * np.pi * places / PLACES)
    steps, spin_up = round(window / DT), round(SPIN_UP / DT)
    forcing = jnp.asarray(truth, jnp.float32)[:, None]
    rng = np.random.default_rng(11)
    states = jnp.asarray(rng.normal(size=(PLACES, samples)), jnp.float32)
    found, states = statistics(forcing, states, round(TRANSIENT / DT), steps)
    noise_covariance = INFLATION * np.cov(np.asarray(found, np.float64))
    root = jnp.asarray(np.linalg.cholesky(SHARE * np.cov(np.asarray(states, np.float64))), jnp.float32)
    x = states[:, :1]
    data = np.asarray(statistics(forcing, x, spin_up, steps)[0][:, 0], np.float64)

    @jax.jit
    def simulate(key: jax.Array, ensemble: jax.Array) -> jax.Array:
        start = x + root @ jax.random.normal(key, (PLACES, len(ensemble)), x.dtype)
        return statistics(ensemble.astype(x.dtype).T, start, spin_up, steps)[0].T.astype(ensemble.dtype)

    distance = np.abs(np.subtract.outer(places, places))
    settings = {
        "model": "lorenz96",
        "start": np.asarray(x[:, 0], np.float64).tolist(),
        "start_root": np.asarray(root, np.float64).tolist(),
        "dt": DT,
        "spin_up": spin_up,
        "window": steps,
    }
    return InverseProblem(
        "lorenz96",
        simulate,
        data,
        noise_covariance,
        np.full(PLACES, PRIOR_MEAN),
        PRIOR_DEVIATION**2 * np.exp(-distance / PRIOR_LENGTH),
        truth,
        places.astype(float),
        np.tile(places.astype(float), 2),
        PLACES,
        settings,
    )
