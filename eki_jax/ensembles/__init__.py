"""Ensembles: where they start, how they are redrawn and disturbed, and what they predict."""

from eki_jax.ensembles.drawing import perturb as perturb
from eki_jax.ensembles.drawing import perturb_data as perturb_data
from eki_jax.ensembles.drawing import resample_around_mean as resample_around_mean
from eki_jax.ensembles.drawing import sample_ensemble as sample_ensemble
from eki_jax.ensembles.prediction import best_particle as best_particle
from eki_jax.ensembles.prediction import ensemble_outputs as ensemble_outputs
from eki_jax.ensembles.prediction import mean_particle as mean_particle
from eki_jax.ensembles.priors import Gaussian as Gaussian
from eki_jax.ensembles.priors import gaussian as gaussian
from eki_jax.ensembles.priors import xavier as xavier
