"""One analysis by DAPPER's EnKF: perturbed observations where M < J, else the square root in the ensemble's space."""

from __future__ import annotations

from dapper.da_methods.ensemble import EnKF_analysis
from dapper.tools.randvars import GaussRV
from linear import problem
from timing import measure, resident, serve


def main(task: dict) -> dict:
    """Time it."""
    baseline = resident()
    ensemble, index, weights, data = problem(task, "float64")
    state, noise = [ensemble], GaussRV(C=1.0, M=len(data))
    del ensemble

    def update() -> None:
        outputs = weights * state[0][:, index]
        state[0] = EnKF_analysis(state[0], outputs, noise, data, "PertObs" if task["M"] < task["J"] else "Sqrt")

    return {**measure(update, task["repeats"], baseline), "mean": float(state[0][:, index[0]].mean())}


if __name__ == "__main__":
    serve(main)
