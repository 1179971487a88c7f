"""Accuracies of ensembles of classifiers; see :mod:`eki_jax.training.metrics`."""

from eki_jax.training.metrics import Accuracy as Accuracy
from eki_jax.training.metrics import classification_accuracy as classification_accuracy
from eki_jax.training.metrics import particle_accuracy as particle_accuracy
