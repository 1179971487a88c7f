"""Policies without derivatives: the natural policy gradient from an ensemble, and episodes as a black box.

Environments are pure functions; gymnax's are taken by name, with the extra ``rl``.
"""

from eki_jax.policy.advantages import generalized_advantages as generalized_advantages
from eki_jax.policy.advantages import returns_to_go as returns_to_go
from eki_jax.policy.clipped import clipped_policy_gradient as clipped_policy_gradient
from eki_jax.policy.distributions import Distribution as Distribution
from eki_jax.policy.distributions import FisherFactor as FisherFactor
from eki_jax.policy.distributions import categorical as categorical
from eki_jax.policy.distributions import normal as normal
from eki_jax.policy.environments import Environment as Environment
from eki_jax.policy.environments import Step as Step
from eki_jax.policy.environments import from_gymnax as from_gymnax
from eki_jax.policy.episodes import episodes as episodes
from eki_jax.policy.learner import Learner as Learner
from eki_jax.policy.learner import LearnerInfo as LearnerInfo
from eki_jax.policy.learner import LearnerSettings as LearnerSettings
from eki_jax.policy.learner import LearnerState as LearnerState
from eki_jax.policy.learner import Part as Part
from eki_jax.policy.learner import learner as learner
from eki_jax.policy.loss import Visited as Visited
from eki_jax.policy.loss import policy_loss as policy_loss
from eki_jax.policy.natural import natural_policy_gradient as natural_policy_gradient
from eki_jax.policy.rollouts import Episodes as Episodes
from eki_jax.policy.rollouts import Running as Running
from eki_jax.policy.rollouts import Trajectory as Trajectory
from eki_jax.policy.rollouts import collect as collect
from eki_jax.policy.rollouts import evaluate as evaluate
from eki_jax.policy.rollouts import play as play
from eki_jax.policy.rollouts import start as start
