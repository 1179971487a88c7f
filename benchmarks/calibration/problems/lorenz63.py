"""Two parameters of the Lorenz-63 model from statistics of a chaotic run, in EKIRace's settings."""

from __future__ import annotations

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.calibration.problems.base import InverseProblem
from benchmarks.calibration.problems.integrate import accumulate, after, runge_kutta

TRUTH = (28.0, 8.0 / 3.0)
PRIOR_MEAN, PRIOR_DEVIATION = (3.3, 1.2), (0.15, 0.5)
DT = 0.01
SPIN_UP, WINDOW = 30.0, 10.0
WINDOWS = 36  # of the run that estimates the noise
SHARE = 0.1  # of the attractor's covariance, by which initial conditions differ


def rate(parameters: jax.Array, x: jax.Array) -> jax.Array:
    """Lorenz's equations with sigma = 10; ``parameters`` (rho, beta) and ``x`` have shape (2, J) and (3, J)."""
    rho, beta = parameters
    return jnp.stack([10.0 * (x[1] - x[0]), x[0] * (rho - x[2]) - x[1], x[0] * x[1] - beta * x[2]])


def second_moments(x: jax.Array) -> jax.Array:
    """The products whose means are outputs: x², y², z², xy, xz, yz; shape (6, J)."""
    return jnp.stack([x[0] * x[0], x[1] * x[1], x[2] * x[2], x[0] * x[1], x[0] * x[2], x[1] * x[2]])


@partial(jax.jit, static_argnames=("spin_up", "window"))
def statistics(parameters: jax.Array, x: jax.Array, spin_up: int, window: int) -> tuple[jax.Array, jax.Array]:
    """The nine statistics of runs from states ``x``, shape (3, J), and their last states.

    Means, variances and covariances of x, y and z over ``window`` steps after ``spin_up`` steps; shape (9, J).
    """
    flow = partial(rate, parameters)
    x = after(flow, x, spin_up, DT)
    origin = x  # sums of differences from a state on the attractor keep their digits in float32
    moments = lambda x: jnp.concatenate([x - origin, second_moments(x - origin)])
    start = jnp.zeros((9, x.shape[1]), x.dtype)
    x, sums = accumulate(flow, x, window, DT, lambda sums, x: sums + moments(x), start)
    count = window + 1
    mean, second = sums[:3] / count, sums[3:] / count
    return jnp.concatenate([mean + origin, (second - second_moments(mean)) * (count / window)]), x


@cache
def lorenz63() -> InverseProblem:
    """Lorenz-63: the logarithms of rho and beta from nine statistics of the state.

    As in EKIRace (CliMA's EnsembleKalmanProcesses.jl, ``examples/EKIRace``; Gjini, Morzfeld, Dunbar and Schneider,
    arXiv:2511.15853): steps of 0.01, 30 units of time to forget the initial condition and 10 of statistics, one such
    run at (28, 8/3) as the data, the covariance of 36 windows as the noise's, the prior N((3.3, 1.2), diag(0.15²,
    0.5²)), and initial conditions that differ by a tenth of the attractor's covariance, anew in every run. The random
    numbers are NumPy's and JAX's, so that the data are another draw of the same distribution.

    The noise is that of one window, and the data and a simulation both have it: at the truth itself the misfit is
    about sqrt(2), and below 1 in less than one run of ten.
    """
    rng = np.random.default_rng(11)
    truth = jnp.asarray(TRUTH, jnp.float32)[:, None]
    # One long run from a normal initial condition: its windows estimate the noise, its states the attractor.
    x = jnp.asarray(rng.normal(size=(3, 1)), jnp.float32)
    x = jax.jit(lambda x: after(partial(rate, truth), x, round(1000 / DT), DT))(x)
    states = np.asarray(_trajectory(truth, x, round(2000 / DT)), np.float64)
    samples, ends = [], x
    for _ in range(WINDOWS):
        found, ends = statistics(truth, ends, 0, round(WINDOW / DT))
        samples.append(np.asarray(found[:, 0], np.float64))
    root = jnp.asarray(np.linalg.cholesky(SHARE * np.cov(states.T)), jnp.float32)
    data = np.asarray(statistics(truth, x, round(SPIN_UP / DT), round(WINDOW / DT))[0][:, 0], np.float64)

    @jax.jit
    def simulate(key: jax.Array, ensemble: jax.Array) -> jax.Array:
        start = x + root @ jax.random.normal(key, (3, len(ensemble)), x.dtype)
        parameters = jnp.exp(ensemble.astype(x.dtype)).T
        found, _ = statistics(parameters, start, round(SPIN_UP / DT), round(WINDOW / DT))
        return found.T.astype(ensemble.dtype)

    settings = {
        "model": "lorenz63",
        "start": np.asarray(x[:, 0], np.float64).tolist(),
        "start_root": np.asarray(root, np.float64).tolist(),
        "dt": DT,
        "spin_up": round(SPIN_UP / DT),
        "window": round(WINDOW / DT),
    }
    return InverseProblem(
        "lorenz63",
        simulate,
        data,
        np.cov(np.stack(samples), rowvar=False),
        np.asarray(PRIOR_MEAN),
        np.diag(np.square(PRIOR_DEVIATION)),
        np.log(TRUTH),
        settings=settings,
    )


@partial(jax.jit, static_argnames="steps")
def _trajectory(parameters: jax.Array, x: jax.Array, steps: int) -> jax.Array:
    """States at every tenth step, shape (steps / 10, 3)."""

    def ten(x: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        x = jax.lax.fori_loop(0, 10, lambda _, x: runge_kutta(partial(rate, parameters), x, DT), x)
        return x, x[:, 0]

    return jax.lax.scan(ten, x, None, length=steps // 10)[1]
