"""The first ensemble of a calibration."""

from __future__ import annotations

import numpy as np


def matched(draws: np.ndarray) -> np.ndarray:
    r"""Standard normal draws, moved as little as possible so that their mean is 0 and their covariance I.

    A method that is exact for the mean and the covariance of its ensemble, as :func:`eki_jax.kalman.etki` is for a
    linear simulator, is then exact for those of the prior, whatever the draws are. The nearest such ensemble is
    :math:`\sqrt J\, U V^T` with the centred draws' singular vectors (second-order exact sampling; Pham, Monthly Weather
    Review 129, 2001). J draws have deviations of rank J - 1: with fewer than there are parameters, the directions that
    they have get variance 1.

    Args:
        draws: standard normal draws, shape (J, P).

    >>> first = matched(np.random.default_rng(0).normal(size=(6, 2)))
    >>> bool(np.abs(first.mean(axis=0)).max() < 1e-12), np.round(first.T @ first / 6, 12).tolist()
    (True, [[1.0, 0.0], [0.0, 1.0]])
    """
    centred = draws - draws.mean(axis=0)
    left, values, right = np.linalg.svd(centred, full_matrices=False)
    # Of J <= P draws the last direction is rounding alone, since they sum to zero.
    rank = min(len(draws) - 1, draws.shape[1])
    spread = np.sqrt(len(draws)) * np.where(np.arange(len(values)) < rank, 1.0, 0.0)
    return (left * spread) @ right
