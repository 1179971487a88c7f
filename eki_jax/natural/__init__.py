"""Natural-gradient steps from ensembles: a mean, deviations that are drawn anew, and the loss's output Hessian.

Full-rank deviations, or deviations of low rank with which the ensemble never exists.
"""

from __future__ import annotations

from eki_jax.natural._curvature import Curvature as Curvature
from eki_jax.natural._curvature import curvature as curvature
from eki_jax.natural._damping import AdaptiveDamping as AdaptiveDamping
from eki_jax.natural._damping import adaptive_damping as adaptive_damping
from eki_jax.natural._deviations import Deviations as Deviations
from eki_jax.natural._deviations import full_rank as full_rank
from eki_jax.natural._deviations import low_rank as low_rank
from eki_jax.natural._direction import value_and_natural_direction as value_and_natural_direction
from eki_jax.natural._losses import mean_over_samples as mean_over_samples
from eki_jax.natural._losses import softmax_cross_entropy as softmax_cross_entropy
from eki_jax.natural._low_rank import LowRankMatrix as LowRankMatrix
from eki_jax.natural._low_rank import affine as affine
from eki_jax.natural._solver import NaturalInfo as NaturalInfo
from eki_jax.natural._solver import NaturalSolver as NaturalSolver
from eki_jax.natural._solver import NaturalState as NaturalState
from eki_jax.natural._solver import natural_gradient as natural_gradient
