"""Ensemble Kalman inversion in JAX: train and calibrate models without their derivatives.

The kernel is :func:`direction`; :func:`euler`, :func:`nesterov` and :func:`heavy_ball` step it, each a
:func:`discretization`; a model is any function of one particle's parameters. ``eki_jax.optax`` and ``eki_jax.flax`` are
adapters and need those packages; nothing here does.
"""

from eki_jax import ensembles as ensembles
from eki_jax import failures as failures
from eki_jax import losses as losses
from eki_jax import prediction as prediction
from eki_jax import priors as priors
from eki_jax import step_sizes as step_sizes
from eki_jax.ensembles import best_particle as best_particle
from eki_jax.ensembles import ensemble_outputs as ensemble_outputs
from eki_jax.ensembles import gaussian as gaussian
from eki_jax.ensembles import mean_particle as mean_particle
from eki_jax.ensembles import perturb as perturb
from eki_jax.ensembles import perturb_data as perturb_data
from eki_jax.ensembles import resample_around_mean as resample_around_mean
from eki_jax.ensembles import sample_ensemble as sample_ensemble
from eki_jax.ensembles import xavier as xavier
from eki_jax.failures import checked as checked
from eki_jax.failures import keep_failed as keep_failed
from eki_jax.failures import raise_failed as raise_failed
from eki_jax.failures import redraw_failed as redraw_failed
from eki_jax.flows.first_order import value_and_direction as value_and_direction
from eki_jax.flows.first_order import vector_field as vector_field
from eki_jax.kernel.evaluate import evaluate as evaluate
from eki_jax.kernel.particles import ensemble_size as ensemble_size
from eki_jax.kernel.products import direction as direction
from eki_jax.kernel.products import drift_norm as drift_norm
from eki_jax.losses import cross_entropy as cross_entropy
from eki_jax.losses import squared_error as squared_error
from eki_jax.solvers import EulerState as EulerState
from eki_jax.solvers import HeavyBallState as HeavyBallState
from eki_jax.solvers import Info as Info
from eki_jax.solvers import NesterovState as NesterovState
from eki_jax.solvers import Reason as Reason
from eki_jax.solvers import Settings as Settings
from eki_jax.solvers import SharedSettings as SharedSettings
from eki_jax.solvers import Solver as Solver
from eki_jax.solvers import StatefulState as StatefulState
from eki_jax.solvers import StepRefused as StepRefused
from eki_jax.solvers import discretization as discretization
from eki_jax.solvers import euler as euler
from eki_jax.solvers import heavy_ball as heavy_ball
from eki_jax.solvers import nesterov as nesterov
from eki_jax.solvers import stateful as stateful
from eki_jax.step_sizes import constant_step_size as constant_step_size
from eki_jax.step_sizes import frobenius_step_size as frobenius_step_size
from eki_jax.step_sizes import paper_step_size as paper_step_size
from eki_jax.step_sizes import su_boyd_candes as su_boyd_candes

__version__ = "0.2.0"
