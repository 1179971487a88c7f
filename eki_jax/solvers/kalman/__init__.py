"""Kalman steps of an ensemble, from prior to posterior.

The steps are implicit in the outputs, where those of the flow's discretizations are explicit.
"""

from eki_jax.solvers.kalman.analysis import KalmanState as KalmanState
from eki_jax.solvers.kalman.enkf import cheaper_space as cheaper_space
from eki_jax.solvers.kalman.enkf import enkf as enkf
from eki_jax.solvers.kalman.noise_covariance import LowRankNoise as LowRankNoise
from eki_jax.solvers.kalman.tempering import data_misfit_controller as data_misfit_controller
from eki_jax.solvers.kalman.tempering import tempered as tempered
