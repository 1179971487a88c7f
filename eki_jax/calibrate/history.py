"""The iterations of a calibration, and what is needed to write them down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from eki_jax.calibrate.report import Report
from eki_jax.solvers import Reason
from eki_jax.solvers.kalman import LowRankNoise


class Iteration(NamedTuple):
    """One step of a calibration that was taken.

    Attributes:
        report: numbers of the step.
        parameters: physical values of each parameter before the step, shape (J, ...).
        outputs: outputs by their names, shape (J, ...), float64; NaN for members without usable ones.
        misfits: misfits ``1/2 ||y - G(u_j)||^2_Gamma``, shape (J,); NaN for members that failed.
        healthy: flags of the members that took part, shape (J,).
    """

    report: Report
    parameters: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]
    misfits: np.ndarray
    healthy: np.ndarray

    @property
    def step_size(self) -> float:
        """The step size."""
        return self.report.step_size

    @property
    def failed(self) -> int:
        """The number of members that took no part."""
        return self.report.failed

    @property
    def spread(self) -> float:
        """The spread of the latent parameters after the step, that of the prior being 1."""
        return self.report.spread


def state_of_history(history: Sequence[Iteration]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A history as a header for JSON and arrays by their names.

    Args:
        history: iterations.
    """
    arrays: dict[str, np.ndarray] = {}
    for i, iteration in enumerate(history):
        for kind in ("parameters", "outputs"):
            arrays |= {f"history/{i}/{kind}/{name}": value for name, value in getattr(iteration, kind).items()}
        arrays |= {f"history/{i}/misfits": iteration.misfits, f"history/{i}/healthy": iteration.healthy}
    reports = [
        iteration.report._asdict() | {"failures": [[j, text] for j, text in iteration.report.failures.items()]}
        for iteration in history
    ]
    return {"history": reports}, arrays


def history_of_state(header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> list[Iteration]:
    """The history that :func:`state_of_history` took apart.

    Args:
        header: header that JSON gave back.
        arrays: arrays by their names.
    """
    history = []
    for i, saved in enumerate(header["history"]):
        values = saved | {
            "failures": dict(saved["failures"]),
            "constant": tuple(saved["constant"]),
            "reason": Reason(saved["reason"]),
        }
        trees = []
        for kind in ("parameters", "outputs"):
            start = f"history/{i}/{kind}/"
            trees.append({name[len(start) :]: array for name, array in arrays.items() if name.startswith(start)})
        misfits, healthy = arrays[f"history/{i}/misfits"], arrays[f"history/{i}/healthy"]
        history.append(Iteration(Report(**values), trees[0], trees[1], misfits, healthy))
    return history


def encoded(name: str, value: Any) -> tuple[Any, dict[str, np.ndarray]]:
    """Data or noise as a description for JSON and copies of the arrays by their names.

    Args:
        name: name of the whole.
        value: array, low-rank covariance, or a dict of these.
    """
    if isinstance(value, Mapping):
        parts = {key: encoded(f"{name}/{key}", part) for key, part in value.items()}
        arrays = {key: array for _, found in parts.values() for key, array in found.items()}
        return {"dict": {key: description for key, (description, _) in parts.items()}}, arrays
    if isinstance(value, LowRankNoise):
        found = {f"{name}/diagonal": np.array(value.diagonal), f"{name}/factor": np.array(value.factor)}
        return {"low_rank": list(found)}, found
    if isinstance(value, np.ma.MaskedArray):
        value = np.ma.filled(value.astype(np.float64), np.nan)
    return {"array": name}, {name: np.array(value)}


def decoded(description: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Any:
    """The data or noise that :func:`encoded` took apart.

    Args:
        description: description that JSON gave back.
        arrays: arrays by their names.

    >>> description, arrays = encoded("noise", {"flow": 0.5, "level": LowRankNoise(1.0, np.ones((3, 1)))})
    >>> noise = decoded(description, arrays)
    >>> noise["flow"], noise["level"].factor.shape
    (array(0.5), (3, 1))
    """
    if "dict" in description:
        return {key: decoded(part, arrays) for key, part in description["dict"].items()}
    if "low_rank" in description:
        return LowRankNoise(*(arrays[name] for name in description["low_rank"]))
    return arrays[description["array"]]
