"""Solvers: one protocol, and a file for each method.

The discretizations of the flow stand on :func:`discretization`, the Kalman steps on
:func:`eki_jax.solvers.kalman.analysis.analysis`; :mod:`eki_jax.natural` returns the same protocol.
"""

from eki_jax.solvers.compact import compact_euler as compact_euler
from eki_jax.solvers.discretization import discretization as discretization
from eki_jax.solvers.euler import EulerState as EulerState
from eki_jax.solvers.euler import euler as euler
from eki_jax.solvers.heavy_ball import HeavyBallState as HeavyBallState
from eki_jax.solvers.heavy_ball import heavy_ball as heavy_ball
from eki_jax.solvers.nesterov import NesterovState as NesterovState
from eki_jax.solvers.nesterov import nesterov as nesterov
from eki_jax.solvers.protocol import Info as Info
from eki_jax.solvers.protocol import Settings as Settings
from eki_jax.solvers.protocol import SharedSettings as SharedSettings
from eki_jax.solvers.protocol import Solver as Solver
from eki_jax.solvers.reasons import Reason as Reason
from eki_jax.solvers.reasons import StepRefused as StepRefused
from eki_jax.solvers.stateful import StatefulState as StatefulState
from eki_jax.solvers.stateful import stateful as stateful
