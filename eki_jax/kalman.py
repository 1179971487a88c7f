"""Kalman steps of an ensemble, from prior to posterior; see :mod:`eki_jax.solvers.kalman`."""

from eki_jax.solvers.kalman import Data as Data
from eki_jax.solvers.kalman import InflatedState as InflatedState
from eki_jax.solvers.kalman import Inflation as Inflation
from eki_jax.solvers.kalman import KalmanSettings as KalmanSettings
from eki_jax.solvers.kalman import KalmanState as KalmanState
from eki_jax.solvers.kalman import LangevinState as LangevinState
from eki_jax.solvers.kalman import Localization as Localization
from eki_jax.solvers.kalman import LowRankNoise as LowRankNoise
from eki_jax.solvers.kalman import UnscentedSettings as UnscentedSettings
from eki_jax.solvers.kalman import UnscentedState as UnscentedState
from eki_jax.solvers.kalman import additive_inflation as additive_inflation
from eki_jax.solvers.kalman import aldi as aldi
from eki_jax.solvers.kalman import cheaper_space as cheaper_space
from eki_jax.solvers.kalman import correlation_taper as correlation_taper
from eki_jax.solvers.kalman import data_misfit_controller as data_misfit_controller
from eki_jax.solvers.kalman import enkf as enkf
from eki_jax.solvers.kalman import etki as etki
from eki_jax.solvers.kalman import gaspari_cohn as gaspari_cohn
from eki_jax.solvers.kalman import multiplicative_inflation as multiplicative_inflation
from eki_jax.solvers.kalman import sampling_error_correction as sampling_error_correction
from eki_jax.solvers.kalman import shrinkage_covariance as shrinkage_covariance
from eki_jax.solvers.kalman import taper as taper
from eki_jax.solvers.kalman import tempered as tempered
from eki_jax.solvers.kalman import tikhonov as tikhonov
from eki_jax.solvers.kalman import uki as uki
from eki_jax.solvers.kalman import update_groups as update_groups
