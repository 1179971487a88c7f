"""A linear model with Gaussian noise and prior, whose posterior is known."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.calibration.problems.base import InverseProblem


class Posterior(NamedTuple):
    """A Gaussian.

    Attributes:
        mean: mean, shape (P,).
        covariance: covariance, shape (P, P).
    """

    mean: np.ndarray
    covariance: np.ndarray


def linear(parameters: int = 10, outputs: int = 20, seed: int = 0) -> InverseProblem:
    """``G(u) = A u`` with correlated noise and a correlated prior; neighbouring directions are badly determined.

    The singular values of A fall from 3 to 0.03, so that the data determine some directions to a tenth of the prior's
    spread and say nothing of others. Noise and prior have covariances ``exp(-|i - j| / 2)``, with standard deviations
    from 0.5 to 2.

    Args:
        parameters: number of parameters P.
        outputs: number of outputs M, at least P.
        seed: seed of the matrix, the truth and the noise.
    """
    rng = np.random.default_rng(seed)
    left = np.linalg.qr(rng.normal(size=(outputs, parameters)))[0]
    right = np.linalg.qr(rng.normal(size=(parameters, parameters)))[0]
    matrix = left * np.geomspace(3.0, 0.03, parameters) @ right
    noise_covariance, prior_covariance = (_correlated(size, rng) for size in (outputs, parameters))
    prior_mean = rng.normal(size=parameters)
    truth = rng.multivariate_normal(prior_mean, prior_covariance)
    data = rng.multivariate_normal(matrix @ truth, noise_covariance)

    @jax.jit
    def simulate(key: jax.Array, ensemble: jax.Array) -> jax.Array:
        del key
        return jnp.matmul(ensemble, jnp.asarray(matrix, ensemble.dtype).T, precision=jax.lax.Precision.HIGHEST)

    settings = {"model": "linear", "matrix": matrix.tolist()}
    return InverseProblem(
        "linear", simulate, data, noise_covariance, prior_mean, prior_covariance, truth, settings=settings
    )


def posterior(
    problem: InverseProblem, mean: np.ndarray | None = None, covariance: np.ndarray | None = None
) -> Posterior:
    """The exact posterior of a linear problem, of its prior or of another one.

    Args:
        problem: problem that :func:`linear` made.
        mean: mean of the prior, shape (P,); by default the problem's.
        covariance: covariance of the prior, shape (P, P); by default the problem's.

    >>> problem = linear(2, 3)
    >>> exact = posterior(problem)
    >>> bool(np.all(np.diag(exact.covariance) < np.diag(problem.prior_covariance)))
    True
    """
    mean = problem.prior_mean if mean is None else np.asarray(mean, np.float64)
    covariance = problem.prior_covariance if covariance is None else np.asarray(covariance, np.float64)
    matrix = np.asarray(problem.settings["matrix"])
    gain = covariance @ matrix.T @ np.linalg.inv(matrix @ covariance @ matrix.T + problem.noise_covariance)
    return Posterior(mean + gain @ (problem.data - matrix @ mean), covariance - gain @ matrix @ covariance)


def _correlated(size: int, rng: np.random.Generator) -> np.ndarray:
    distance = np.abs(np.subtract.outer(np.arange(size), np.arange(size)))
    deviations = rng.uniform(0.5, 2.0, size)
    return deviations[:, None] * np.exp(-distance / 2) * deviations
