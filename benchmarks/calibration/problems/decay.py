"""A simulator of two physical parameters, for the front door; its posterior is known by quadrature."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from eki_jax import calibrate

TIMES = np.linspace(0.5, 6.0, 12)
TRUTH = {"rate": 0.8, "share": 0.93}
NOISE = 0.04  # standard deviation
RATE, SHARE = (1.0, 0.5), (0.0, 1.0)  # mean and deviation; bounds


class Moments(NamedTuple):
    """Means and standard deviations by the parameters' names."""

    mean: dict[str, float]
    deviation: dict[str, float]


def simulate(member: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """What is left of a quantity of which a share decays at a rate, and the rest at a tenth of it."""
    rate, share = float(member["rate"]), float(member["share"])
    return {"left": share * np.exp(-rate * TIMES) + (1 - share) * np.exp(-0.1 * rate * TIMES)}


def prior() -> dict[str, Any]:
    """A positive rate, and a share between nothing and all."""
    return {"rate": calibrate.positive(*RATE), "share": calibrate.bounded(*SHARE)}


@cache
def data() -> np.ndarray:
    """The data y, shape (12,)."""
    return simulate(TRUTH)["left"] + NOISE * np.random.default_rng(5).normal(size=len(TIMES))


@cache
def exact(points: int = 400) -> Moments:
    """The posterior's moments in physical units, by the trapezoidal rule on the latent plane.

    >>> coarse, fine = exact(200), exact(400)
    >>> all(abs(coarse.mean[name] - fine.mean[name]) < 1e-6 for name in TRUTH)
    True
    """
    axis = np.linspace(-6, 6, points)
    names = list(TRUTH)
    plane = np.stack([part.ravel() for part in np.meshgrid(axis, axis, indexing="ij")], axis=1)
    joint = calibrate.joint(prior())
    physical = joint.to_physical(joint.split(plane))
    values = {name: np.asarray(physical[name], np.float64).ravel()[:, None] for name in names}
    outputs = values["share"] * np.exp(-values["rate"] * TIMES)
    outputs = outputs + (1 - values["share"]) * np.exp(-0.1 * values["rate"] * TIMES)
    log = -0.5 * np.sum(((outputs - data()) / NOISE) ** 2, axis=1) - 0.5 * np.sum(plane**2, axis=1)
    weights = np.exp(log - log.max())
    weights /= weights.sum()
    mean = {name: float(weights @ values[name][:, 0]) for name in names}
    deviation = {name: float(np.sqrt(weights @ (values[name][:, 0] - mean[name]) ** 2)) for name in names}
    return Moments(mean, deviation)
