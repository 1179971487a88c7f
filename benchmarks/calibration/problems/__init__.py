"""Problems whose answer, or whose target, is known."""

from benchmarks.calibration.problems.base import InverseProblem as InverseProblem
from benchmarks.calibration.problems.linear import linear as linear
from benchmarks.calibration.problems.lorenz63 import lorenz63 as lorenz63
from benchmarks.calibration.problems.lorenz96 import lorenz96 as lorenz96
