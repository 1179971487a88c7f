"""Policies for particles whose model failed; see :mod:`eki_jax.solvers.failures`."""

from eki_jax.solvers.failures import FailurePolicy as FailurePolicy
from eki_jax.solvers.failures import checked as checked
from eki_jax.solvers.failures import keep_failed as keep_failed
from eki_jax.solvers.failures import raise_failed as raise_failed
from eki_jax.solvers.failures import redraw_failed as redraw_failed
