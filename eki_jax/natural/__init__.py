"""Natural-gradient steps from ensembles: a mean, deviations that are drawn anew, and the loss's output Hessian.

Full-rank deviations, or deviations of low rank with which the ensemble never exists.
"""

from __future__ import annotations

from eki_jax.losses.curvature import Curvature as Curvature
from eki_jax.losses.curvature import curvature as curvature
from eki_jax.losses.logits import mean_over_samples as mean_over_samples
from eki_jax.losses.logits import softmax_cross_entropy as softmax_cross_entropy
from eki_jax.natural.damping import AdaptiveDamping as AdaptiveDamping
from eki_jax.natural.damping import adaptive_damping as adaptive_damping
from eki_jax.natural.describe import Description as Description
from eki_jax.natural.describe import describe as describe
from eki_jax.natural.deviations import Deviations as Deviations
from eki_jax.natural.deviations import LowRankMatrix as LowRankMatrix
from eki_jax.natural.deviations import affine as affine
from eki_jax.natural.deviations import full_rank as full_rank
from eki_jax.natural.deviations import learned_feedback as learned_feedback
from eki_jax.natural.deviations import low_rank as low_rank
from eki_jax.natural.deviations import low_rank_call as low_rank_call
from eki_jax.natural.deviations import per_sample as per_sample
from eki_jax.natural.deviations.treatment import LeafTreatment as LeafTreatment
from eki_jax.natural.deviations.treatment import LocalityWarning as LocalityWarning
from eki_jax.natural.estimates import gradient as gradient
from eki_jax.natural.estimates import localized as localized
from eki_jax.natural.estimates import span as span
from eki_jax.natural.estimator import EstimatorSettings as EstimatorSettings
from eki_jax.natural.estimator import value_and_natural_direction as value_and_natural_direction
from eki_jax.natural.solver import NaturalInfo as NaturalInfo
from eki_jax.natural.solver import NaturalSettings as NaturalSettings
from eki_jax.natural.solver import NaturalState as NaturalState
from eki_jax.natural.solver import natural_gradient as natural_gradient
from eki_jax.solvers.protocol import Solver as Solver

NaturalSolver = Solver
