"""Exponentially decaying flows: the derivative-using counterpart of ensemble Kalman inversion.

Second-order methods after "Exponentially Decaying Flows for Optimization in Deep Learning" (2018): EDF-G (Gauss-Newton)
and EDF-H (Hessian) as optax transformations, the MINRES iteration that they stand on, and the continuous flows as
vector fields. Needs the extra ``optax``. The guide is ``docs/edf.md``.
"""

from eki_jax.edf.acceleration import Acceleration, heavy_ball, nesterov
from eki_jax.edf.flows import (
    edf_g_flow,
    edf_h_flow,
    equation_flow,
    exponential_decay,
    geodesic_flow,
    geodesic_momentum,
    linear_decay,
)
from eki_jax.edf.minres import MinresInfo, minres
from eki_jax.edf.objective import Objective
from eki_jax.edf.transformations import EdfState, edf_g, edf_h

__all__ = [
    "Acceleration",
    "EdfState",
    "MinresInfo",
    "Objective",
    "edf_g",
    "edf_g_flow",
    "edf_h",
    "edf_h_flow",
    "equation_flow",
    "exponential_decay",
    "geodesic_flow",
    "geodesic_momentum",
    "heavy_ball",
    "linear_decay",
    "minres",
    "nesterov",
]
