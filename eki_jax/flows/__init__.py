"""Continuous time: the vector field of the method, flows with momentum, and what a fixed momentum factor does."""

from eki_jax.flows.first_order import value_and_direction as value_and_direction
from eki_jax.flows.first_order import vector_field as vector_field
from eki_jax.flows.second_order import guarded as guarded
from eki_jax.flows.second_order import heavy_ball_flow as heavy_ball_flow
from eki_jax.flows.second_order import nesterov_flow as nesterov_flow
from eki_jax.flows.second_order import nesterov_start as nesterov_start
from eki_jax.flows.second_order import square_root_flow as square_root_flow
