r"""Ensemble Kalman inversion as optax gradient transformations; needs the extra ``optax``.

The parameters that optax sees are the whole ensemble: a pytree whose leaves have shape (J, ...). There are two ways in:

* :func:`eki_jax.value_and_direction` returns what stands in for the gradient; hand it to any optimizer of optax.
* A chain that begins with :func:`ensemble_gradient`. Its ``update`` takes zeros for the gradient and the model's
  ``outputs`` and ``cotangents`` as extra arguments; :func:`value_and_extra_args` makes both.

Signs are those of gradients: everything returns ``+C_uG r``, and ``optax.scale(-1.0)`` at the end of a chain descends.
``docs/optax.md`` is the guide.
"""

from __future__ import annotations

try:
    import optax  # noqa: F401
except ImportError as error:
    raise ImportError("optax is not installed: pip install 'eki_jax[optax]'") from error

from eki_jax.optax.chains import eki as eki
from eki_jax.optax.chains import meki as meki
from eki_jax.optax.gradient import ensemble_gradient as ensemble_gradient
from eki_jax.optax.gradient import scale_by_drift_norm as scale_by_drift_norm
from eki_jax.optax.gradient import value_and_extra_args as value_and_extra_args
from eki_jax.optax.momentum import ScaleByNesterovState as ScaleByNesterovState
from eki_jax.optax.momentum import scale_by_nesterov as scale_by_nesterov
from eki_jax.optax.particles import per_particle as per_particle
from eki_jax.optax.prior import AddPriorNoiseState as AddPriorNoiseState
from eki_jax.optax.prior import add_prior_noise as add_prior_noise
from eki_jax.optax.prior import add_tikhonov as add_tikhonov
from eki_jax.optax.solvers import from_solver as from_solver
