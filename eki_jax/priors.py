"""Priors: where an ensemble starts; see :mod:`eki_jax.ensembles.priors`."""

from eki_jax.ensembles.priors import Gaussian as Gaussian
from eki_jax.ensembles.priors import gaussian as gaussian
from eki_jax.ensembles.priors import xavier as xavier
