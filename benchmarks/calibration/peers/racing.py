"""The race as other libraries run it: they ask for outputs, and what they ask for is counted."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from simulators import simulator


class Over(Exception):
    """The race is over; the message says why."""


class Race:
    """One run of a library on a problem.

    Args:
        task: problem, particles and settings, see ``benchmarks/calibration/others.py``.
        ensemble: first particles, shape (J, P).
        seed: seed of the simulator and of the library.
    """

    def __init__(self, task: dict, ensemble: list, seed: int) -> None:
        self.task, self.seed = task, seed
        self.start = np.array(ensemble)
        self.data, self.noise = np.array(task["data"]), np.array(task["noise_covariance"])
        self.prior_mean, self.prior_covariance = np.array(task["prior_mean"]), np.array(task["prior_covariance"])
        self.rng = np.random.default_rng(seed)
        self.simulate = simulator(task["settings"])
        self.misfits: list[float] = []
        self.iterations = self.runs = 0
        self.last = self.start

    def forecast(self, ensemble: np.ndarray, mean: np.ndarray | None = None) -> np.ndarray:
        """Outputs (J, M) of particles (J, P), after the run at their mean, which ends the race or not.

        Raises:
            Over: the target is reached, or the limit of iterations.
        """
        ensemble = np.array(ensemble, float)
        mean = ensemble.mean(axis=0) if mean is None else mean
        outputs = self.simulate(self.rng, np.vstack([ensemble, mean]))
        self._check(ensemble, outputs[-1])
        if self.iterations == self.task["limit"]:
            raise Over("limit")
        self.runs += len(ensemble)
        self.iterations += 1
        return outputs[:-1]

    def again(self, ensemble: np.ndarray) -> np.ndarray:
        """Outputs of further runs in the same iteration."""
        self.runs += len(ensemble)
        return self.simulate(self.rng, np.array(ensemble, float))

    def end(self, ensemble: np.ndarray, mean: np.ndarray | None = None) -> None:
        """The library's own end, at these particles.

        Raises:
            Over: always.
        """
        ensemble = np.array(ensemble, float)
        mean = ensemble.mean(axis=0) if mean is None else mean
        self._check(ensemble, self.simulate(self.rng, mean[None])[0])
        raise Over("time 1")

    def _check(self, ensemble: np.ndarray, output: np.ndarray) -> None:
        residual = output - self.data
        self.misfits.append(float(np.sqrt(residual @ np.linalg.solve(self.noise, residual) / len(residual))))
        self.last = ensemble
        if self.misfits[-1] < self.task["target"]:
            raise Over("reached")


def serve(run: Callable[[Race], None], package: str) -> None:
    """Read the task from the file that the command line names, race once an ensemble, and print what happened."""
    task = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    rows = []
    for seed, ensemble in zip(task["seeds"], task["ensembles"], strict=True):
        race = Race(task, ensemble, seed)
        try:
            run(race)
            raise RuntimeError("the race has no end")
        except Over as over:
            ended = str(over)
        except (np.linalg.LinAlgError, ValueError, FloatingPointError) as error:
            ended = f"error: {error}"[:120]
        rows.append(
            {
                "seed": seed,
                "reached": ended == "reached",
                "iterations": race.iterations,
                "runs": race.runs,
                "ended": ended,
                "misfits": race.misfits,
                "spread": float(np.sqrt(np.mean(race.last.var(axis=0, ddof=1)))),
                "error": float(np.sqrt(np.mean((race.last.mean(axis=0) - np.array(task["truth"])) ** 2))),
                "failed": 0,
            }
        )
        if not task["target"]:  # what a result without a target is compared by
            covariance = np.atleast_2d(np.cov(race.last, rowvar=False))
            rows[-1] |= {"mean": race.last.mean(axis=0).tolist(), "covariance": covariance.tolist()}
    print(json.dumps({"rows": rows, "version": importlib.metadata.version(package)}), flush=True)


def gaspari_cohn(task: dict, own: str, other: str) -> np.ndarray:
    """The weights of all pairs of places, zero from the radius on (Gaspari and Cohn, 1999, eq. 4.10)."""
    away = np.abs(np.subtract.outer(np.array(task[own]), np.array(task[other])))
    period = task["period"]
    away = np.minimum(away % period, period - away % period)
    z = 2 * away / task["radius"]
    far = np.maximum(z, 1)
    inner = 1 - 5 / 3 * z**2 + 5 / 8 * z**3 + z**4 / 2 - z**5 / 4
    outer = 4 - 5 * far + 5 / 3 * far**2 + 5 / 8 * far**3 - far**4 / 2 + far**5 / 12 - 2 / (3 * far)
    return np.where(z <= 1, inner, np.where(z < 2, outer, 0))
