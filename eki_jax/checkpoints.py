"""Saving a run and going on with it; see :mod:`eki_jax.training.checkpoints`."""

from eki_jax.training.checkpoints import Checkpoints as Checkpoints
