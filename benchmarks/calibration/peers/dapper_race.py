"""DAPPER's square-root analysis and its LETKF's local analyses: in steps of 1 until the limit, or of 1/4 to time 1."""

from __future__ import annotations

import numpy as np
from dapper.da_methods.ensemble import EnKF_analysis, local_analyses
from dapper.tools.randvars import GaussRV
from racing import Race, gaspari_cohn, serve


def run(race: Race) -> None:
    """Analyses of the whole state; with a radius, one for each parameter, whose outputs are those with a weight."""
    step = race.task["step"]
    noise = GaussRV(C=race.noise / step, M=len(race.data))
    tapers = race.task["radius"] is not None
    weights = gaspari_cohn(race.task, "parameter_coordinates", "output_coordinates") if tapers else np.empty(0)

    def near(batch: list[int]) -> tuple[np.ndarray, np.ndarray]:
        own = weights[batch[0]]
        return np.flatnonzero(own > 1e-3), own[own > 1e-3]

    particles, time = race.start.copy(), 0.0
    while time < 1 or not race.task["ends"]:
        outputs = race.forecast(particles)
        if not tapers:
            particles = EnKF_analysis(particles, outputs, noise, race.data, "Sqrt")
        else:
            batches = [[place] for place in range(particles.shape[1])]
            particles, _ = local_analyses(particles.copy(), outputs, noise.C, race.data, batches, near)
        time += step
    race.end(particles)


if __name__ == "__main__":
    serve(run, "dapper")
