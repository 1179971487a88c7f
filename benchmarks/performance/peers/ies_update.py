"""One assimilation by iterative_ensemble_smoother's ESMDA: float32 parameters, updated in place, one batch."""

from __future__ import annotations

import iterative_ensemble_smoother as ies
import numpy as np
from linear import problem
from timing import measure, resident, serve


def main(task: dict) -> dict:
    """Time it."""
    baseline = resident()
    ensemble, index, weights, data = problem(task)
    parameters = np.ascontiguousarray(ensemble.T)
    del ensemble

    def update() -> None:
        smoother = ies.ESMDA(covariance=np.ones(len(data), np.float32), observations=data, alpha=1, seed=0)
        smoother.prepare_assimilation(Y=weights[:, None] * parameters[index])
        smoother.assimilate_batch(X=parameters, overwrite=True)

    return {**measure(update, task["repeats"], baseline), "mean": float(parameters[index[0]].mean())}


if __name__ == "__main__":
    serve(main)
