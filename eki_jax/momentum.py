"""What a fixed momentum factor does; see :mod:`eki_jax.flows.fixed_momentum`."""

from eki_jax.flows.fixed_momentum import gradient_flow as gradient_flow
from eki_jax.flows.fixed_momentum import inertia as inertia
from eki_jax.flows.fixed_momentum import initial_velocity as initial_velocity
from eki_jax.flows.fixed_momentum import iterate as iterate
from eki_jax.flows.fixed_momentum import manifold_flow as manifold_flow
from eki_jax.flows.fixed_momentum import manifold_velocity as manifold_velocity
from eki_jax.flows.fixed_momentum import modified_equation as modified_equation
from eki_jax.flows.fixed_momentum import modified_loss as modified_loss
