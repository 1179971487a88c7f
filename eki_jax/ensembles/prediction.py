"""Predicting with an ensemble: by its mean particle, by its best particle, by all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from eki_jax._checks import arrays, is_known
from eki_jax._types import Array, Ensemble, ForwardFn, Params
from eki_jax.kernel.axes import Axis
from eki_jax.kernel.evaluate import evaluate
from eki_jax.kernel.health import finite_particles, masked_mean, particle_mean
from eki_jax.kernel.particles import ensemble_size, local_size

if TYPE_CHECKING:
    from jaxtyping import Real


def mean_particle(ensemble: Ensemble, *, axis_name: str | None = None) -> Params:
    """The mean of the particles, the paper's choice of trained parameters (arXiv:1808.03620, heuristic III).

    Particles that are not finite are left out; it is NaN where none is finite.

    Args:
        ensemble: pytree of arrays of shape (J, ...).
        axis_name: mapped axis over which the particles are spread.

    Returns:
        One particle's parameters, without the particle axis, in the leaves' dtypes.

    Raises:
        TypeError, ValueError: leaves that are not floating-point, that disagree on J, or J < 2.

    >>> import jax.numpy as jnp
    >>> mean_particle({"w": jnp.array([[1.0, 2.0], [3.0, 6.0]])})
    {'w': Array([2., 4.], dtype=float32)}
    """
    ensemble_size(ensemble, axis_name=axis_name)
    return particle_mean(ensemble, axis_name=axis_name)


def best_particle(ensemble: Ensemble, losses: Real[Array, " J"], *, axis_name: str | None = None) -> Params:
    """The particle of least loss.

    Args:
        ensemble: pytree of arrays of shape (J, ...).
        losses: losses of the particles, shape (J,); those that are not finite are passed over. For the best accuracy
            hand in minus the accuracies.
        axis_name: mapped axis over which the particles are spread; what is sent is one particle a device.

    Returns:
        One particle's parameters, without the particle axis. The first of several equals. NaN where no loss is finite
        and that is known too late to raise.

    Raises:
        ValueError: ``losses`` of another shape, or (where they are known) none that is finite.

    >>> import jax.numpy as jnp
    >>> best_particle(jnp.array([[1.0], [2.0], [3.0]]), jnp.array([0.5, 0.1, jnp.nan]))
    Array([2.], dtype=float32)
    """
    ensemble_size(ensemble, axis_name=axis_name)
    local = jax.tree.leaves(ensemble)[0].shape[0]
    if jnp.shape(losses) != (local,):
        raise ValueError(f"losses: shape {jnp.shape(losses)}; wanted one for each of the {local} particles, ({local},)")
    arrays("losses", losses)
    if is_known(losses) and not axis_name and not np.isfinite(np.asarray(losses)).any():
        raise ValueError("losses: none is finite; wanted the losses of an ensemble with a particle that did not fail")
    values = jnp.where(jnp.isfinite(losses), losses, jnp.inf)
    best = jnp.argmin(values)
    least, axis = values[best], Axis(axis_name)
    particle = jax.tree.map(lambda leaf: leaf[best], ensemble)
    if axis.is_mapped:
        every = axis.gathered(least[None])
        mine = jnp.argmin(every) == axis.index
        particle = axis.sum(jax.tree.map(lambda leaf: jnp.where(mine, leaf, jnp.zeros((), leaf.dtype)), particle))
        least = -axis.largest(-least)
    known = jnp.isfinite(least)
    return jax.tree.map(lambda leaf: jnp.where(known, leaf, jnp.asarray(jnp.nan, leaf.dtype)), particle)


def ensemble_outputs(
    forward: ForwardFn,
    ensemble: Ensemble,
    x: Any,
    *,
    axis_name: str | None = None,
    chunk_size: int | None = None,
) -> Any:
    """The average of all particles' outputs, ``mean_j G(u_j | x)``, without those that are not finite.

    Args:
        forward: function ``forward(params, x) -> outputs`` of one particle.
        ensemble: pytree of arrays of shape (J, ...).
        x: inputs that ``forward`` takes.
        axis_name: mapped axis over which the particles are spread.
        chunk_size: number of particles evaluated at a time; by default from a memory budget.

    Returns:
        Outputs without a particle axis, as ``forward`` returns them.

    Raises:
        ValueError: leaves that disagree on J, or ``chunk_size`` < 1.

    >>> import jax.numpy as jnp
    >>> ensemble_outputs(lambda u, x: u * x, jnp.array([1.0, 3.0]), 10.0)
    Array(20., dtype=float32)
    """
    if not local_size(ensemble, name="ensemble"):
        raise ValueError("ensemble: no particles; wanted at least 1")
    outputs = arrays("outputs", evaluate(forward, ensemble, x, chunk_size=chunk_size))
    return masked_mean(outputs, finite_particles((ensemble, outputs)), Axis(axis_name))
