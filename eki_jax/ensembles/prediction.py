"""Predicting with an ensemble: by its mean particle, by its best particle, by all of them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from eki_jax._types import Array, Ensemble, ForwardFn, Params
from eki_jax.kernel.axes import Axis
from eki_jax.kernel.evaluate import evaluate
from eki_jax.kernel.particles import ensemble_size, particle_mean, wide_dtype


def mean_particle(ensemble: Ensemble, *, axis_name: str | None = None) -> Params:
    """The mean of the particles, the paper's choice of trained parameters (arXiv:1808.03620, heuristic III).

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


def best_particle(ensemble: Ensemble, losses: Array, *, axis_name: str | None = None) -> Params:
    """The particle of least loss.

    Args:
        ensemble: pytree of arrays of shape (J, ...).
        losses: losses of the particles, shape (J,); those that are not finite are passed over. For the best accuracy
            hand in minus the accuracies.
        axis_name: mapped axis over which the particles are spread; what is sent is one particle a device.

    Returns:
        One particle's parameters, without the particle axis. The first of several equals.

    Raises:
        ValueError: ``losses`` of another shape.

    >>> import jax.numpy as jnp
    >>> best_particle(jnp.array([[1.0], [2.0], [3.0]]), jnp.array([0.5, 0.1, jnp.nan]))
    Array([2.], dtype=float32)
    """
    ensemble_size(ensemble, axis_name=axis_name)
    local = jax.tree.leaves(ensemble)[0].shape[0]
    if jnp.shape(losses) != (local,):
        raise ValueError(f"losses: shape {jnp.shape(losses)}; wanted one for each of the {local} particles, ({local},)")
    values = jnp.where(jnp.isfinite(losses), losses, jnp.inf)
    best = jnp.argmin(values)
    particle = jax.tree.map(lambda leaf: leaf[best], ensemble)
    axis = Axis(axis_name)
    if not axis.is_mapped:
        return particle
    mine = jnp.argmin(axis.gathered(values[best][None])) == axis.index
    return axis.sum(jax.tree.map(lambda leaf: jnp.where(mine, leaf, 0), particle))


def ensemble_outputs(
    forward: ForwardFn,
    ensemble: Ensemble,
    x: Any,
    *,
    axis_name: str | None = None,
    chunk_size: int | None = None,
) -> Any:
    """The average of all particles' outputs, ``mean_j G(u_j | x)``.

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
    outputs = evaluate(forward, ensemble, x, chunk_size=chunk_size)

    def average(leaf: Array) -> Array:
        mean = jnp.mean(leaf, axis=0, dtype=wide_dtype(leaf.dtype))
        return Axis(axis_name).mean(mean).astype(leaf.dtype)

    return jax.tree.map(average, outputs)
