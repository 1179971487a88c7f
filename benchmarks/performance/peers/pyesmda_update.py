"""One assimilation by pyesmda's ESMDA with its default inversion and batches."""

from __future__ import annotations

import covmats
import numpy as np
from linear import problem
from pyesmda import ESMDA
from timing import measure, resident, serve


def main(task: dict) -> dict:
    """Time it."""
    baseline = resident()
    ensemble, index, weights, data = problem(task, "float64")
    parameters = np.ascontiguousarray(ensemble.T)
    del ensemble
    last = []

    def update() -> None:
        solver = ESMDA(
            obs=data,
            m_init=parameters,
            cov_obs=covmats.CovViaDiagonal(np.ones(len(data))),
            forward_model=lambda m: weights[:, None] * m[index],
            n_assimilations=1,
            is_forecast_for_last_assimilation=False,
            random_state=0,
            is_parallel_analyse_step=task["P"] > 5000,
        )
        solver.solve()
        last[:] = [float(solver.m_posterior[index[0]].mean())]

    return {**measure(update, task["repeats"], baseline), "mean": last[0]}


if __name__ == "__main__":
    serve(main)
