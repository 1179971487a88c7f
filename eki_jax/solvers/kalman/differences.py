"""Whitened differences from the data, and those whose deviations are the outputs' own."""

from __future__ import annotations

from typing import Any

from eki_jax._types import Array
from eki_jax.kernel.health import finite_particles, masked_mean
from eki_jax.solvers.kalman.analysis import flat_residuals
from eki_jax.solvers.kalman.noise_covariance import NoiseCovariance
from eki_jax.solvers.protocol import Options


def whitened_differences(gamma: NoiseCovariance, outputs: Any, targets: Any, options: Options) -> tuple[Array, Array]:
    """The whitened ``G(u_j) - y_j``, and ``G(u_j) - y`` with one y for all particles, shape (J, M) each.

    They are the same where the data are common. Where every particle has its own, the first's deviations have those of
    the data too, which are no part of the outputs' covariance.

    Args:
        gamma: covariance of the noise, fitted to the outputs.
        outputs: outputs of this device's particles, arrays of shape (J, ...).
        targets: data, common or of each particle's own.
        options: settings of the solver.
    """
    residuals = gamma.whiten(flat_residuals(outputs, targets, options.targets_axis))
    if options.targets_axis is None:
        return residuals, residuals
    # Any y would do but one that a particle's failed data have spoilt; near them the differences keep their digits.
    common = masked_mean(targets, finite_particles(targets), options.axis)
    return residuals, gamma.whiten(flat_residuals(outputs, common, None))
