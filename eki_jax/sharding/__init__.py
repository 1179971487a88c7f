"""Particles spread over devices: meshes, three drivers of one body, and a model of what communication costs.

The same solver runs on one device, on the devices of a host, and on many hosts after
:func:`jax.distributed.initialize`.
"""

from eki_jax.kernel.costs import COMMUNICATIONS as COMMUNICATIONS
from eki_jax.kernel.costs import HOPPER as HOPPER
from eki_jax.kernel.costs import Communication as Communication
from eki_jax.kernel.costs import Cost as Cost
from eki_jax.kernel.costs import Link as Link
from eki_jax.kernel.costs import Machine as Machine
from eki_jax.kernel.costs import choose_communication as choose_communication
from eki_jax.kernel.costs import natural_step_cost as natural_step_cost
from eki_jax.kernel.costs import step_cost as step_cost
from eki_jax.sharding.drivers import DRIVERS as DRIVERS
from eki_jax.sharding.drivers import Driver as Driver
from eki_jax.sharding.drivers import over_devices as over_devices
from eki_jax.sharding.mesh import make_mesh as make_mesh
from eki_jax.sharding.mesh import nearest_sizes as nearest_sizes
from eki_jax.sharding.mesh import place as place
from eki_jax.sharding.solvers import batch_specs as batch_specs
from eki_jax.sharding.solvers import resample_around_mean as resample_around_mean
from eki_jax.sharding.solvers import sample_ensemble as sample_ensemble
from eki_jax.sharding.solvers import shard_method as shard_method
from eki_jax.sharding.solvers import shard_samples as shard_samples
from eki_jax.sharding.solvers import shard_solver as shard_solver
from eki_jax.sharding.specs import result_specs as result_specs
from eki_jax.training.checkpoints import abstract as abstract

spread = over_devices
