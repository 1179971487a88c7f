"""Kalman steps of an ensemble, from prior to posterior.

The steps are implicit in the outputs, where those of the flow's discretizations are explicit.
"""

from eki_jax.solvers.kalman.accelerated import AcceleratedInfo as AcceleratedInfo
from eki_jax.solvers.kalman.accelerated import AcceleratedState as AcceleratedState
from eki_jax.solvers.kalman.accelerated import accelerated as accelerated
from eki_jax.solvers.kalman.aldi import LangevinState as LangevinState
from eki_jax.solvers.kalman.aldi import aldi as aldi
from eki_jax.solvers.kalman.analysis import KalmanState as KalmanState
from eki_jax.solvers.kalman.enkf import cheaper_space as cheaper_space
from eki_jax.solvers.kalman.enkf import enkf as enkf
from eki_jax.solvers.kalman.etki import etki as etki
from eki_jax.solvers.kalman.inflation import InflatedState as InflatedState
from eki_jax.solvers.kalman.inflation import Inflation as Inflation
from eki_jax.solvers.kalman.inflation import additive_inflation as additive_inflation
from eki_jax.solvers.kalman.inflation import multiplicative_inflation as multiplicative_inflation
from eki_jax.solvers.kalman.localization import Localization as Localization
from eki_jax.solvers.kalman.localization import correlation_taper as correlation_taper
from eki_jax.solvers.kalman.localization import gaspari_cohn as gaspari_cohn
from eki_jax.solvers.kalman.localization import sampling_error_correction as sampling_error_correction
from eki_jax.solvers.kalman.localization import taper as taper
from eki_jax.solvers.kalman.localization import update_groups as update_groups
from eki_jax.solvers.kalman.noise_covariance import Data as Data
from eki_jax.solvers.kalman.noise_covariance import LowRankNoise as LowRankNoise
from eki_jax.solvers.kalman.noise_covariance import shrinkage_covariance as shrinkage_covariance
from eki_jax.solvers.kalman.settings import KalmanSettings as KalmanSettings
from eki_jax.solvers.kalman.sparse import SparseInfo as SparseInfo
from eki_jax.solvers.kalman.sparse import SparseState as SparseState
from eki_jax.solvers.kalman.sparse import sparse as sparse
from eki_jax.solvers.kalman.tempering import data_misfit_controller as data_misfit_controller
from eki_jax.solvers.kalman.tempering import tempered as tempered
from eki_jax.solvers.kalman.tikhonov import tikhonov as tikhonov
from eki_jax.solvers.kalman.uki import UnscentedSettings as UnscentedSettings
from eki_jax.solvers.kalman.uki import UnscentedState as UnscentedState
from eki_jax.solvers.kalman.uki import uki as uki
