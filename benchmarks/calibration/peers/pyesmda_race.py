"""pyesmda's ESMDA with its default of four steps, and with both covariances tapered."""

from __future__ import annotations

import covmats
import numpy as np
from pyesmda import ESMDA, FixedLocalization
from racing import Race, gaspari_cohn, serve
from scipy.sparse import csr_array


def run(race: Race) -> None:
    """All assimilations, until the race is over."""
    options = {}
    if race.task["radius"] is not None:
        for name, own in (("C_MD_localization", "parameter_coordinates"), ("C_DD_localization", "output_coordinates")):
            options[name] = FixedLocalization(csr_array(gaspari_cohn(race.task, own, "output_coordinates")))
    solver = ESMDA(
        obs=race.data,
        m_init=np.ascontiguousarray(race.start.T),
        cov_obs=covmats.CovViaCholesky(np.linalg.cholesky(race.noise)),
        forward_model=lambda particles: race.forecast(particles.T).T,
        is_forecast_for_last_assimilation=False,
        random_state=race.seed,
        is_parallel_analyse_step=False,
        **options,
    )
    solver.solve()
    race.end(solver.m_posterior.T)


if __name__ == "__main__":
    serve(run, "pyesmda")
