"""Exponentially decaying flows: the derivative-using counterpart of ensemble Kalman inversion.

Second-order methods after "Exponentially Decaying Flows for Optimization in Deep Learning" (2018): EDF-G (Gauss-Newton)
and EDF-H (Hessian) as optax transformations, the MINRES iteration that they stand on, and the continuous flows as
vector fields. Needs the extra ``optax``. The guide is ``docs/edf.md``.
"""

try:
    import optax  # noqa: F401
except ImportError as error:
    raise ImportError("optax is not installed: pip install 'eki_jax[optax]'") from error

from eki_jax.edf.acceleration import Acceleration as Acceleration
from eki_jax.edf.acceleration import heavy_ball as heavy_ball
from eki_jax.edf.acceleration import nesterov as nesterov
from eki_jax.edf.flows import edf_g_flow as edf_g_flow
from eki_jax.edf.flows import edf_h_flow as edf_h_flow
from eki_jax.edf.flows import equation_flow as equation_flow
from eki_jax.edf.flows import exponential_decay as exponential_decay
from eki_jax.edf.flows import geodesic_flow as geodesic_flow
from eki_jax.edf.flows import geodesic_momentum as geodesic_momentum
from eki_jax.edf.flows import linear_decay as linear_decay
from eki_jax.edf.minres import MinresInfo as MinresInfo
from eki_jax.edf.minres import minres as minres
from eki_jax.edf.objective import Objective as Objective
from eki_jax.edf.transformations import EdfState as EdfState
from eki_jax.edf.transformations import edf_g as edf_g
from eki_jax.edf.transformations import edf_h as edf_h
