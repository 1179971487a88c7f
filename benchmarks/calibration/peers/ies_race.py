"""iterative_ensemble_smoother's ESMDA with its default of five steps, and with a gain that is tapered.

Given the noise's whole covariance, or outputs and data in units of their noise, with variances of one.
"""

from __future__ import annotations

import numpy as np
from iterative_ensemble_smoother import ESMDA, LocalizedESMDA
from racing import Race, gaspari_cohn, serve


def run(race: Race) -> None:
    """All assimilations, until the race is over."""
    tapered = race.task["radius"] is not None
    covariance, units = race.noise, np.eye(len(race.data))
    if race.task["whitened"]:
        covariance, units = np.ones(len(race.data)), np.linalg.inv(np.linalg.cholesky(race.noise))
    smoother = (LocalizedESMDA if tapered else ESMDA)(covariance, units @ race.data, seed=race.seed)
    weights = gaspari_cohn(race.task, "parameter_coordinates", "output_coordinates") if tapered else None
    options = {"localization_callback": lambda gain: gain * weights} if tapered else {}
    particles = race.start.T.copy()
    for _ in range(smoother.num_assimilations()):
        smoother.prepare_assimilation(Y=units @ race.forecast(particles.T).T)
        particles = smoother.assimilate_batch(X=particles, **options)
    race.end(particles.T)


if __name__ == "__main__":
    serve(run, "iterative_ensemble_smoother")
