"""The first ensemble of a calibration."""

from __future__ import annotations

import numpy as np


def matched(draws: np.ndarray) -> np.ndarray:
    r"""Standard normal draws, moved as little as possible so that their mean is 0 and their covariance I.

    A method that is exact for the mean and the covariance of its ensemble, as :func:`eki_jax.kalman.etki` is for a
    linear simulator, is then exact for those of the prior, whatever the draws are. The nearest such ensemble is
    :math:`\sqrt J\, U V^T` with the centred draws' singular vectors (second-order exact sampling; Pham, Monthly Weather
    Review 129, 2001). J <= P draws cannot have that covariance, and stay as they are.

    Args:
        draws: standard normal draws, shape (J, P).

    >>> first = matched(np.random.default_rng(0).normal(size=(6, 2)))
    >>> bool(np.abs(first.mean(axis=0)).max() < 1e-12), bool(np.abs(first.T @ first / 6 - np.eye(2)).max() < 1e-12)
    (True, True)
    """
    if len(draws) <= draws.shape[1]:
        return draws
    left, _, right = np.linalg.svd(draws - draws.mean(axis=0), full_matrices=False)
    return np.sqrt(len(draws)) * left @ right
