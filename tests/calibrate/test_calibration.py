"""The front door: ask, tell, and the posterior, beside what is exact."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import eki_jax
from eki_jax import calibrate, kalman

MAP = np.random.default_rng(0).normal(size=(6, 2))


def line(member: dict[str, Any]) -> dict[str, np.ndarray]:
    """A linear simulator of two outputs."""
    values = MAP @ np.array([member["a"], member["b"]])
    return {"first": values[:4].reshape(2, 2), "second": values[4:]}


DATA = line({"a": 1.0, "b": -2.0})
PRIOR = {"a": calibrate.normal(0.5, 2.0), "b": calibrate.normal(0.0, 3.0)}


def run(calibration: calibrate.Calibration, simulate: Any = line) -> list[calibrate.Report]:
    reports = []
    while not calibration.done:
        reports.append(calibration.tell([simulate(member) for member in calibration.ask()]))
    return reports


def exact(variances: np.ndarray, data: np.ndarray, observed: Any = slice(None)) -> tuple[np.ndarray, np.ndarray]:
    """The posterior's mean and covariance for the linear simulator."""
    matrix, mean, precision = MAP[observed], np.array([0.5, 0.0]), np.diag([1 / 4, 1 / 9])
    covariance = np.linalg.inv(precision + matrix.T @ (matrix / variances[observed, None]))
    right = precision @ mean + matrix.T @ (data[observed] / variances[observed])
    return covariance @ right, covariance


def flat(outputs: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([np.ravel(value) for value in outputs.values()])


def test_the_posterior_is_the_exact_one() -> None:
    """Linear simulator, normal priors, noise of two sizes."""
    noise = {"first": 0.3**2, "second": 0.5**2}
    calibration = calibrate.Calibration(PRIOR, DATA, noise, particles=2000)
    reports = run(calibration)
    posterior = calibration.posterior()
    mean, covariance = exact(np.repeat([0.3**2, 0.5**2], [4, 2]), flat(DATA))
    sd = np.sqrt(np.diag(covariance))
    found = np.array([posterior.mean["a"], posterior.mean["b"]])
    assert np.abs(found - mean).max() < 0.1 * sd.min()
    np.testing.assert_allclose([posterior.sd["a"], posterior.sd["b"]], sd, rtol=0.06)
    assert posterior.correlations[0, 1] == pytest.approx(covariance[0, 1] / sd.prod(), abs=0.05)
    assert reports[-1].time == 1.0
    assert len(calibration.history) == len(reports) == calibration.iteration
