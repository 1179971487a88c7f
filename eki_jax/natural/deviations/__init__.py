"""Kinds of deviations: how the particles' distances from their mean are drawn, shown to the model and summed up."""

from eki_jax.natural.deviations.base import Deviations as Deviations
from eki_jax.natural.deviations.full_rank import FullRank as FullRank
from eki_jax.natural.deviations.full_rank import full_rank as full_rank
from eki_jax.natural.deviations.low_rank import LowRankDeviations as LowRankDeviations
from eki_jax.natural.deviations.low_rank import low_rank as low_rank
from eki_jax.natural.deviations.matrix import LowRankMatrix as LowRankMatrix
from eki_jax.natural.deviations.matrix import affine as affine
from eki_jax.natural.deviations.matrix import low_rank_call as low_rank_call
from eki_jax.natural.deviations.per_sample import PerSample as PerSample
from eki_jax.natural.deviations.per_sample import learned_feedback as learned_feedback
from eki_jax.natural.deviations.per_sample import per_sample as per_sample
