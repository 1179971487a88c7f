"""Solvers, training methods and ensembles on a mesh."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from eki_jax import ensembles
from eki_jax._solvers import Solver
from eki_jax._types import Array, Batch, Ensemble, ForwardFn, Prior
from eki_jax.sharding._drivers import Driver, spread
from eki_jax.sharding._mesh import BATCH, PARTICLES, nearest_sizes
from eki_jax.sharding._specs import result_specs

if TYPE_CHECKING:
    from eki_jax.training import Method

_SPREAD, _SAME = PartitionSpec(PARTICLES), PartitionSpec()


def shard_solver(solver: Solver, mesh: Mesh, *, driver: Driver = "shard_map") -> Solver:
    """A solver whose particles are spread over the devices of a mesh, with the states and the calls of one device.

    Args:
        solver: made with ``axis_name="particles"``, such as ``eki_jax.euler(forward, loss, axis_name="particles")``.
            On a mesh with a batch axis, ``forward`` is wrapped by :func:`shard_samples`.
        mesh: from :func:`make_mesh`.
        driver: ``"shard_map"``, ``"pmap"`` or ``"jit"``; see :func:`spread`.

    Returns:
        A :class:`eki_jax.Solver` of global arrays. Compile its ``step`` with :func:`jax.jit`; donate the state to step
        in place.

    Raises:
        ValueError: as :func:`spread`; from ``init`` a J that the devices do not divide.

    >>> import jax.numpy as jnp
    >>> import eki_jax
    >>> from eki_jax.sharding import make_mesh
    >>> solver = eki_jax.euler(lambda u, x: x * u, eki_jax.squared_error(), axis_name="particles")
    >>> solver = shard_solver(solver, make_mesh(1), driver="jit")
    >>> state, info = jax.jit(solver.step)(solver.init(jnp.array([[1.0], [3.0]])), (2.0, jnp.array([8.0])))
    >>> info.losses
    Array([18.,  2.], dtype=float32)
    """
    init = spread(solver.init, mesh, (_SPREAD,), driver=driver)

    def state_specs(state: Any) -> Any:
        return result_specs(solver.init, mesh, (_SPREAD,), state.ensemble)

    def step(state: Any, batch: Batch) -> Any:
        specs = (state_specs(state), batch_specs(mesh))
        return spread(solver.step, mesh, specs, driver=driver)(state, batch)

    def update(state: Any, outputs: Any, targets: Any) -> Any:
        specs = (state_specs(state), _SPREAD, _SAME)
        return spread(solver.update, mesh, specs, driver=driver)(state, outputs, targets)

    return Solver(init, step, update)


def shard_method(method: Method, mesh: Mesh, *, driver: Driver = "shard_map") -> Method:
    """A training method whose particles are spread over the devices of a mesh, for :func:`eki_jax.training.fit`.

    Args:
        method: made with ``axis_name="particles"``, its solver too; see :func:`eki_jax.training.ensemble_method`.
        mesh: from :func:`make_mesh`.
        driver: see :func:`spread`.

    Returns:
        A method of global arrays; accuracies are the same on all devices, those of the single particles included.

    Raises:
        ValueError: as :func:`spread`.
    """
    state_specs = result_specs(method.init, mesh, (_SAME,), jax.eval_shape(lambda: jax.random.key(0)))

    def accuracy(state: Any, x: Array, labels: Array) -> Any:
        found = spread(method.accuracy, mesh, (state_specs, _SAME, _SAME), driver=driver)(state, x, labels)
        everywhere = NamedSharding(mesh, _SAME)
        return jax.tree.map(lambda leaf: lax.with_sharding_constraint(leaf, everywhere), found)

    def redraw(state: Any, key: Array, J_new: int) -> Any:
        def body(state: Any, key: Array) -> Any:
            assert method.redraw is not None
            return method.redraw(state, key, J_new)

        return spread(body, mesh, (state_specs, _SAME), driver=driver)(state, key)

    return method._replace(
        init=spread(method.init, mesh, (_SAME,), driver=driver),
        step=spread(method.step, mesh, (state_specs, _SAME, batch_specs(mesh)), driver=driver),
        accuracy=accuracy,
        redraw=None if method.redraw is None else redraw,
    )


def shard_samples(forward: ForwardFn) -> ForwardFn:
    """A model that evaluates its device's share of the samples and collects those of the others.

    For a mesh with a batch axis: the inputs are spread over it, the outputs and the targets are whole, so that any loss
    is what it is on one device.

    Args:
        forward: ``forward(params, x) -> outputs`` for one particle; outputs and x with a leading axis of samples.

    Returns:
        The same, of ``x`` on one device of the axis ``"batch"``; the outputs are those of all samples.
    """

    def every_sample(params: Any, x: Any) -> Any:
        return jax.tree.map(_from_every_device, forward(params, x))

    return every_sample


def _from_every_device(rows: Array) -> Array:
    # An all-gather whose result JAX knows to be the same on all devices, under every driver.
    devices, share = lax.axis_size(BATCH), rows.shape[0]
    place = lax.axis_index(BATCH) * share
    padded = jnp.zeros((devices * share, *rows.shape[1:]), rows.dtype)
    return lax.psum(lax.dynamic_update_slice_in_dim(padded, rows, place, axis=0), BATCH)


def batch_specs(mesh: Mesh) -> tuple[PartitionSpec, PartitionSpec]:
    """Specs of ``(x, targets)``: the inputs along the batch axis if there is one, the targets everywhere.

    >>> from eki_jax.sharding import make_mesh
    >>> [tuple(spec) for spec in batch_specs(make_mesh(1))]
    [(), ()]
    """
    return (PartitionSpec(BATCH) if BATCH in mesh.axis_names else _SAME), _SAME


def sample_ensemble(key: Array, prior: Prior, J: int, mesh: Mesh, *, driver: Driver = "shard_map") -> Ensemble:
    """:func:`eki_jax.sample_ensemble` with each device drawing its own particles.

    The numbers are those of one device: a particle's key is that of its index.

    Args:
        key: a JAX random key.
        prior: what to draw from.
        J: number of particles on all devices together.
        mesh: from :func:`make_mesh`.
        driver: see :func:`spread`.

    Returns:
        A pytree of global arrays of shape (J, ...), spread along the first axis.

    Raises:
        ValueError: J < 2, or J that the devices do not divide; the message names the nearest.
    """
    _check_size(J, mesh)
    body = partial(ensembles.sample_ensemble, prior=prior, J=J, axis_name=PARTICLES)
    return spread(body, mesh, (_SAME,), driver=driver)(key)


def resample_around_mean(
    key: Array,
    ensemble: Ensemble,
    prior: Prior,
    mesh: Mesh,
    J_new: int | None = None,
    *,
    scale: Any = 1.0,
    driver: Driver = "shard_map",
) -> Ensemble:
    """:func:`eki_jax.resample_around_mean` on a mesh; with a larger J, a growing ensemble.

    Args:
        key: a JAX random key.
        ensemble: pytree of global arrays of shape (J, ...).
        prior: whose centred noise is added.
        mesh: from :func:`make_mesh`.
        J_new: the new number of particles; the old one by default.
        scale: standard deviations of the noise, as a multiple of the prior's.
        driver: see :func:`spread`.

    Returns:
        A pytree like ``ensemble`` with the new J.

    Raises:
        ValueError: J_new < 2, or one that the devices do not divide; the message names the nearest.
    """
    if J_new is not None:
        _check_size(J_new, mesh)

    def body(key: Array, ensemble: Ensemble, scale: Any) -> Ensemble:
        return ensembles.resample_around_mean(key, ensemble, prior, J_new, scale=scale, axis_name=PARTICLES)

    return spread(body, mesh, (_SAME, _SPREAD, _SAME), driver=driver)(key, ensemble, scale)


def _check_size(size: int, mesh: Mesh) -> None:
    devices = mesh.shape[PARTICLES]
    if size % devices:
        wanted = " or ".join(map(str, nearest_sizes(size, devices)))
        raise ValueError(f"J = {size} particles on {devices} devices; wanted a multiple of {devices}: {wanted}")
