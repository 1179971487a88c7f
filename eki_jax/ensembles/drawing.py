"""Drawing, redrawing and disturbing ensembles.

The random numbers of a particle come from ``fold_in(key, its index)``, so that they do not depend on how many devices
the particles are spread over.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from eki_jax._checks import NOT_NEGATIVE, a_prior, arrays, real, whole
from eki_jax._types import Array, Ensemble, Params, Prior
from eki_jax.ensembles.priors import gaussian
from eki_jax.kernel.axes import Axis
from eki_jax.kernel.evaluate import map_particles
from eki_jax.kernel.health import particle_mean
from eki_jax.kernel.keys import particle_key
from eki_jax.kernel.particles import check_like, ensemble_size, local_size

# Random bits are made for a few particles at a time: they would otherwise take several times the ensemble's memory.
_DRAW_BYTES = 16 * 2**20


def sample_ensemble(key: Array, prior: Prior, particles: int, *, axis_name: str | None = None) -> Ensemble:
    """J independent draws of the prior (the paper's heuristic I, arXiv:1808.03620, section 4.3.3).

    Args:
        key: JAX random key.
        prior: distribution to draw from, such as :func:`eki_jax.priors.xavier`.
        particles: number of particles J, at least 2, on all devices together.
        axis_name: mapped axis over which the particles are spread; each device then draws its own.

    Returns:
        A pytree like one draw of the prior, with a leading axis J (J over the number of devices under ``axis_name``).

    Raises:
        TypeError: ``key`` is no random key, ``prior`` no prior, ``particles`` no whole number.
        ValueError: J < 2, or J that the number of devices does not divide.

    >>> import jax, jax.numpy as jnp
    >>> from eki_jax.priors import gaussian
    >>> sample_ensemble(jax.random.key(0), gaussian(jnp.zeros(3), 1.0), 5).shape
    (5, 3)
    """
    return _draws(
        a_prior("prior", prior, ("sample",)).sample, key, _local_count(particles, "particles", axis_name), axis_name
    )


def resample_around_mean(
    key: Array,
    ensemble: Ensemble,
    prior: Prior,
    particles: int | None = None,
    *,
    scale: Any = 1.0,
    axis_name: str | None = None,
) -> Ensemble:
    """Particles drawn anew around their mean, ``u_j <- mean u + eta_j`` with eta_j of the prior's covariance.

    At the end of every epoch this is the paper's EKI(R); with a larger J it is its expanding ensemble (heuristics IV.ii
    and V of arXiv:1808.03620, section 4.3.3).

    Args:
        key: JAX random key.
        ensemble: pytree of arrays of shape (J, ...).
        prior: distribution whose centred noise is added.
        particles: number of particles J from now on, on all devices together; by default the old one.
        scale: factor on the noise's standard deviations.
        axis_name: mapped axis over which the particles are spread.

    Returns:
        A pytree like ``ensemble`` with the new J.

    Raises:
        TypeError: ``key`` is no random key, ``prior`` no prior, ``particles`` no whole number.
        ValueError: J < 2, or J that the number of devices does not divide.

    >>> import jax, jax.numpy as jnp
    >>> from eki_jax.priors import gaussian
    >>> u = jnp.array([[0.0, 10.0], [2.0, 10.0]])
    >>> grown = resample_around_mean(jax.random.key(0), u, gaussian(jnp.zeros(2), 0.01), 1000)
    >>> grown.shape, jnp.round(grown.mean(axis=0), 1)
    ((1000, 2), Array([ 1., 10.], dtype=float32))
    """
    total = ensemble_size(ensemble, axis_name=axis_name)
    mean = particle_mean(ensemble, axis_name=axis_name)
    return sample_around(key, mean, prior, total if particles is None else particles, scale=scale, axis_name=axis_name)


def sample_around(
    key: Array, mean: Params, prior: Prior, particles: int, *, scale: Any = 1.0, axis_name: str | None = None
) -> Ensemble:
    """Particles drawn around a mean, ``u_j = mean + eta_j`` with eta_j of the prior's covariance.

    Args:
        key: JAX random key.
        mean: parameters of one particle.
        prior: distribution whose centred noise is added.
        particles: number of particles J on all devices together.
        scale: factor on the noise's standard deviations.
        axis_name: mapped axis over which the particles are spread.

    Returns:
        A pytree like ``mean`` with a leading axis J.

    Raises:
        TypeError: ``key`` is no random key, ``prior`` no prior, ``particles`` no whole number.
        ValueError: J < 2, or J that the number of devices does not divide.

    >>> import jax, jax.numpy as jnp
    >>> from eki_jax.priors import gaussian
    >>> sample_around(jax.random.key(0), jnp.array([5.0, 7.0]), gaussian(jnp.zeros(2), 1e-6), 3).round(2)
    Array([[5., 7.],
           [5., 7.],
           [5., 7.]], dtype=float32)
    """
    count = _local_count(particles, "particles", axis_name)
    a_prior("prior", prior, ("noise",))
    real("scale", scale, NOT_NEGATIVE)
    return _draws(lambda k: _add(mean, prior.noise(k), scale), key, count, axis_name)


def perturb(
    key: Array, ensemble: Ensemble, prior: Prior, scale: Any = 1.0, *, axis_name: str | None = None
) -> Ensemble:
    """Every particle plus noise, ``u_j + scale eta_j`` with eta_j of the prior's covariance C_0.

    MEKI(R) adds noise of covariance ``sqrt(h_k) C_0`` to the momenta at every step: ``scale = h_k ** 0.25`` (heuristic
    IV.i of arXiv:1808.03620, section 4.3.3).

    Args:
        key: JAX random key.
        ensemble: pytree of arrays of shape (J, ...).
        prior: distribution whose centred noise is added.
        scale: factor on the noise's standard deviations.
        axis_name: mapped axis over which the particles are spread.

    Returns:
        A pytree like ``ensemble``.

    Raises:
        TypeError: ``key`` is no random key, ``prior`` no prior.
        ValueError: leaves that disagree on J, or a prior of another shape.

    >>> import jax, jax.numpy as jnp
    >>> from eki_jax.priors import gaussian
    >>> u = jnp.ones((4, 2))
    >>> bool((perturb(jax.random.key(0), u, gaussian(jnp.zeros(2), 1.0), scale=0.0) == u).all())
    True
    """
    size = whole("ensemble", local_size(ensemble, name="ensemble", floating=True), or_="particles")
    a_prior("prior", prior, ("noise",))
    real("scale", scale, NOT_NEGATIVE)
    keys = particle_keys(key, size, axis_name)
    return _mapped(lambda pair: _add(pair[1], prior.noise(pair[0]), scale), (keys, ensemble), size)


def perturb_data(key: Array, targets: Any, factor: Any, particles: int, *, axis_name: str | None = None) -> Any:
    """The data with noise of its own for every particle, ``y + xi_j`` with xi_j ~ N(0, F F^T).

    For noisy data, as is the practice in inverse problems; hand the result to a solver made with ``targets_axis=0``
    (arXiv:1808.03620, end of section 4.3.3).

    Args:
        key: JAX random key.
        targets: array (or pytree of arrays) of the data y.
        factor: covariance factor of the noise, as in :func:`eki_jax.priors.gaussian`.
        particles: number of particles J on all devices together.
        axis_name: mapped axis over which the particles are spread.

    Returns:
        Arrays of shape (J, ...).

    Raises:
        TypeError: integer targets, such as labels.
        ValueError: a factor that does not fit, or J that the number of devices does not divide.

    >>> import jax, jax.numpy as jnp
    >>> perturb_data(jax.random.key(0), jnp.array([1.0, 2.0]), 0.1, 4).shape
    (4, 2)
    """
    prior = gaussian(arrays("targets", targets, floating=True), factor=factor)
    return sample_ensemble(key, prior, particles, axis_name=axis_name)


def _draws(draw: Callable[[Array], Any], key: Array, count: int, axis_name: str | None) -> Ensemble:
    return _mapped(draw, particle_keys(key, count, axis_name), count)


def _mapped(fn: Callable[[Any], Any], rows: Any, count: int) -> Any:
    one = jax.eval_shape(fn, jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), rows))
    particle_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(one))
    return map_particles(fn, rows, min(count, max(1, _DRAW_BYTES // max(1, particle_bytes))))


def particle_keys(key: Array, count: int, axis_name: str | None) -> Array:
    """A key for each of this device's ``count`` particles, from its index among the particles of all devices."""
    key = particle_key("key", key)
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(Axis(axis_name).own_indices(count))


def _add(params: Any, noise: Any, scale: Any) -> Any:
    check_like(noise, params, name="prior", other="particles", hint="a prior of the particles' shapes")
    return jax.tree.map(lambda u, eta: (u + jnp.asarray(scale, eta.dtype) * eta).astype(u.dtype), params, noise)


def _local_count(size: int, name: str, axis_name: str | None) -> int:
    """Particles on this device; ``name`` is what the caller calls their total number."""
    size = whole(name, size, 2)
    devices = Axis(axis_name).size
    if size % devices:
        nearest = max(1, round(size / devices)) * devices
        raise ValueError(f"{name}: {size} on {devices} devices; wanted a multiple of {devices}, such as {nearest}")
    return size // devices
