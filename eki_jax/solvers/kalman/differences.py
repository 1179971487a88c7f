"""Differences from the data, and those whose deviations are the outputs' own."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from eki_jax._types import Array
from eki_jax.kernel.health import finite_particles, masked_mean
from eki_jax.kernel.particles import flatten_outputs, local_size, wide_dtype
from eki_jax.solvers.kalman.noise_covariance import NoiseCovariance
from eki_jax.solvers.protocol import Options


def raw_differences(outputs: Any, targets: Any, options: Options) -> tuple[Array, Array]:
    """The ``G(u_j) - y_j``, and ``G(u_j) - y`` with one y for all particles, shape (J, M) each.

    They are the same array where the data are common. Where every particle has its own, the first's deviations have
    those of the data too, which are no part of the outputs' covariance.

    Args:
        outputs: outputs of this device's particles, arrays of shape (J, ...).
        targets: data, common or of each particle's own.
        options: settings of the solver.
    """
    own = flat_residuals(outputs, targets, options.targets_axis)
    if options.targets_axis is None:
        return own, own
    # Any y would do but one that a particle's failed data have spoilt; near them the differences keep their digits.
    wide = jax.tree.map(lambda leaf: jnp.asarray(leaf, own.dtype), targets)
    common = masked_mean(wide, finite_particles(wide), options.axis)
    return own, flat_residuals(outputs, common, None)


def whitened_differences(gamma: NoiseCovariance, outputs: Any, targets: Any, options: Options) -> tuple[Array, Array]:
    """Both of :func:`raw_differences`, whitened.

    Args:
        gamma: covariance of the noise, fitted to the outputs.
        outputs: outputs of this device's particles, arrays of shape (J, ...).
        targets: data, common or of each particle's own.
        options: settings of the solver.
    """
    own, common = raw_differences(outputs, targets, options)
    residuals = gamma.whiten(own)
    return residuals, residuals if common is own else gamma.whiten(common)


def flat_residuals(outputs: Any, targets: Any, targets_axis: int | None) -> Array:
    """``G(u_j) - y``, or ``G(u_j) - y_j`` for targets of each particle's own, as one array of shape (J, M)."""
    size = local_size(outputs, name="outputs")
    flat = flatten_outputs(outputs, size, name="outputs")
    own = targets_axis == 0
    wanted = jax.tree.map(lambda leaf: jnp.shape(leaf)[0 if own else 1 :], outputs)
    found = jax.tree.map(jnp.shape, targets)
    if wanted != found:
        what = "the outputs', a row for every particle" if own else "one particle's outputs"
        raise ValueError(f"targets: shape {found}; wanted that of {what}, {wanted}")
    rows = targets if own else jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], targets)
    return flat.astype(wide_dtype(flat.dtype)) - flatten_outputs(rows, size if own else 1, name="targets")
