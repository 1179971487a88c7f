"""Calibrating a simulator that is run elsewhere: priors in physical units, ask and tell, and a posterior. Needs the
extra `calibrate`; clusters come with `cluster`.

:class:`Calibration` asks for members and is told their outputs; :func:`map_particles` runs a simulator for them. See
``docs/calibration.md``.
"""

from eki_jax.calibrate.calibration import Calibration as Calibration
from eki_jax.calibrate.groups import Group as Group
from eki_jax.calibrate.groups import correlated as correlated
from eki_jax.calibrate.groups import from_distribution as from_distribution
from eki_jax.calibrate.groups import from_samples as from_samples
from eki_jax.calibrate.history import Iteration as Iteration
from eki_jax.calibrate.joint import JointPrior as JointPrior
from eki_jax.calibrate.joint import joint as joint
from eki_jax.calibrate.observations import Observations as Observations
from eki_jax.calibrate.posterior import Posterior as Posterior
from eki_jax.calibrate.priors import Marginal as Marginal
from eki_jax.calibrate.priors import bounded as bounded
from eki_jax.calibrate.priors import lognormal as lognormal
from eki_jax.calibrate.priors import normal as normal
from eki_jax.calibrate.priors import positive as positive
from eki_jax.calibrate.processes import process_pool as process_pool
from eki_jax.calibrate.report import Report as Report
from eki_jax.calibrate.results import MemberFailed as MemberFailed
from eki_jax.calibrate.workers import map_particles as map_particles
