"""Predictions of an ensemble; see :mod:`eki_jax.ensembles.prediction`."""

from eki_jax.ensembles.prediction import best_particle as best_particle
from eki_jax.ensembles.prediction import ensemble_outputs as ensemble_outputs
from eki_jax.ensembles.prediction import mean_particle as mean_particle
