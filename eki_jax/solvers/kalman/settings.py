"""Keywords that all Kalman steps share."""

from __future__ import annotations

from typing import Any

from eki_jax.ensembles.priors import Gaussian
from eki_jax.solvers.kalman.inflation import Inflation
from eki_jax.solvers.protocol import SharedSettings


class KalmanSettings(SharedSettings, total=False):
    """Keywords of every Kalman step: those of :class:`eki_jax.SharedSettings` and what a calibration adds.

    Attributes:
        prior: Gaussian prior that every step imposes (Tikhonov-regularized EKI; Chada, Stuart and Tong, SIAM Journal on
            Numerical Analysis 58, 2020): the outputs are joined by the parameters, Gamma by the prior's covariance, the
            data by its mean. For runs beyond time 1, which lead to the posterior's mode; an ensemble drawn from the
            prior counts it already, so that up to time 1 none is wanted. The misfits then have the prior's part.
        localization: weights in [0, 1] of every output for every parameter: :func:`taper`, :func:`update_groups`,
            :func:`correlation_taper`, or an array of shape (P, M); None for ones. A parameter is moved by an analysis
            of its own, in which an output's noise covariance is divided by its weight.
        inflation: growth of the deviations after a step: :func:`multiplicative_inflation` or
            :func:`additive_inflation`; None for none.
    """

    prior: Gaussian | None
    localization: Any
    inflation: Inflation | None
