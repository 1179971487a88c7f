"""Ensembles stored in half the memory; see :mod:`eki_jax.solvers.compact`."""

from eki_jax.solvers.compact import CompactEnsemble as CompactEnsemble
from eki_jax.solvers.compact import CompactState as CompactState
from eki_jax.solvers.compact import compact as compact
from eki_jax.solvers.compact import compact_euler as compact_euler
from eki_jax.solvers.compact import expand as expand
