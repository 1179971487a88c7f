"""kalman-inversion-lib's ensemble and unscented inversion with the misfit scheduler.

Once to time 1, or five times as long with the outputs extended by the parameters, which its guide has for ill-posed
problems. Its steps evaluate the ensemble twice, once for the scheduler and once for the analysis; both are counted.
"""

from __future__ import annotations

import numpy as np
from kalman_inversion_lib.kalman_base_classes import KalmanInversionDataContainer
from kalman_inversion_lib.kalman_inversion_optimizers import EnsembleKalmanInversion, UnscentedKalmanInversion
from kalman_inversion_lib.timestep_schedulers import DataMisfitTimeStepScheduler
from racing import Race, serve


def batched(base: type) -> type:
    """The class with an ensemble that is evaluated at once; the library evaluates one particle after another."""

    class Batched(base):
        """The same, but for who runs the simulator."""

        def compute_forward_model(self, y_forward: np.ndarray, ensemble: np.ndarray) -> np.ndarray:
            self.calls = getattr(self, "calls", 0) + 1
            first = self.calls % 2 == 1  # for the scheduler; the analysis comes second
            mean = np.array(self.get_posterior_mean())
            outputs = self.race.forecast(ensemble, mean) if first else self.race.again(ensemble)
            return np.hstack([outputs, ensemble]) if self.if_extend_space else outputs

    return Batched


def run(race: Race) -> None:
    """One inversion, to its end."""
    extended = race.task["extended"]
    data = KalmanInversionDataContainer(race.data, race.noise, race.prior_mean, race.prior_covariance)
    if race.task["unscented"]:
        solver = batched(UnscentedKalmanInversion)(
            data, DataMisfitTimeStepScheduler, seed=race.seed, if_extend_space=extended
        )
    else:
        solver = batched(EnsembleKalmanInversion)(
            kalman_data_container=data,
            initial_ensemble=race.start.copy(),
            time_step_scheduler=DataMisfitTimeStepScheduler,
            seed=race.seed,
            if_extend_space=extended,
        )
    solver.race = race
    solver.run_inversion(lambda particle: particle, num_iterations=5 if extended else 1)
    mean, covariance = solver.get_posterior_mean(), solver.get_posterior_covariance()
    if race.task["unscented"]:  # particles with the mean and the covariance of the result
        root = np.linalg.cholesky(covariance) * np.sqrt(len(mean) - 0.5)
        race.end(np.vstack([mean + root.T, mean - root.T]))
    race.end(solver.ensemble)


if __name__ == "__main__":
    serve(run, "kalman-inversion-lib")
