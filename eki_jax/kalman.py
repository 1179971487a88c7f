"""Kalman steps of an ensemble, from prior to posterior; see :mod:`eki_jax.solvers.kalman`."""

from eki_jax.solvers.kalman import KalmanState as KalmanState
from eki_jax.solvers.kalman import LowRankNoise as LowRankNoise
from eki_jax.solvers.kalman import cheaper_space as cheaper_space
from eki_jax.solvers.kalman import data_misfit_controller as data_misfit_controller
from eki_jax.solvers.kalman import enkf as enkf
from eki_jax.solvers.kalman import tempered as tempered
