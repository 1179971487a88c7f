"""Step sizes and momentum schedules; see :mod:`eki_jax.solvers.step_sizes`."""

from eki_jax.solvers.step_sizes import constant_step_size as constant_step_size
from eki_jax.solvers.step_sizes import frobenius_step_size as frobenius_step_size
from eki_jax.solvers.step_sizes import momentum_schedule as momentum_schedule
from eki_jax.solvers.step_sizes import paper_step_size as paper_step_size
from eki_jax.solvers.step_sizes import su_boyd_candes as su_boyd_candes
