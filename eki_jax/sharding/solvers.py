"""Solvers, training methods and ensembles on a mesh."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from eki_jax._checks import NOT_NEGATIVE, a_prior, a_solver, function, offers, pair, random_key, real, traceable, whole
from eki_jax._types import Array, Batch, Ensemble, ForwardFn, Prior
from eki_jax.ensembles import drawing
from eki_jax.kernel.axes import UnmappedAxis
from eki_jax.kernel.evaluate import IndexedForward
from eki_jax.kernel.particles import local_size
from eki_jax.sharding.drivers import Driver, check_driver, over_devices
from eki_jax.sharding.mesh import BATCH, PARTICLES, check_mesh, nearest_sizes
from eki_jax.sharding.specs import result_specs
from eki_jax.solvers.protocol import Solver, makes_its_particles

if TYPE_CHECKING:
    from eki_jax.training import Method

_SPREAD, _SAME = PartitionSpec(PARTICLES), PartitionSpec()


def shard_solver(solver: Solver, mesh: Mesh, *, driver: Driver = "shard_map", spread_targets: bool = False) -> Solver:
    """A solver whose particles are spread over the devices of a mesh, with the states and the calls of one device.

    Args:
        solver: any solver made with ``axis_name="particles"``, such as
            ``eki_jax.euler(forward, loss, axis_name="particles")``. On a mesh with a batch axis, ``forward`` is wrapped
            by :func:`shard_samples`, or the solver made with ``batch_axis_name="batch"``.
        mesh: devices, from :func:`make_mesh`.
        driver: name of what runs the devices, ``"shard_map"``, ``"pmap"`` or ``"jit"``; see :func:`over_devices`.
        spread_targets: flag; True spreads the targets over the batch axis as the inputs are, which a solver made with
            ``batch_axis_name`` wants; False gives all of them to every device.

    Returns:
        A :class:`eki_jax.Solver` of global arrays. Compile its ``step`` with :func:`jax.jit`; donate the state to step
        in place.

    Raises:
        TypeError: ``solver`` is no solver; as :func:`over_devices`.
        ValueError: as :func:`over_devices`; from ``init`` a J that the devices do not divide, and a solver made without
            ``axis_name``, whose devices would step each by itself.

    >>> import jax.numpy as jnp
    >>> import eki_jax
    >>> from eki_jax.sharding import make_mesh
    >>> solver = eki_jax.euler(lambda u, x: x * u, eki_jax.squared_error(), axis_name="particles")
    >>> solver = shard_solver(solver, make_mesh(1), driver="jit")
    >>> state, info = jax.jit(solver.step)(solver.init(jnp.array([[1.0], [3.0]])), (2.0, jnp.array([8.0])))
    >>> info.losses
    Array([18.,  2.], dtype=float32)
    """
    a_solver("solver", solver)
    check_driver(driver, mesh)
    x_spec, _ = batch_specs(mesh)
    targets_spec = x_spec if spread_targets else _SAME
    run = partial(over_devices, mesh=mesh, driver=driver)

    def state_specs(state: Any) -> Any:
        if makes_its_particles(solver):
            return _SAME
        # Where an axis has one device, a share is the whole: the particles' shapes, whatever the state is made of.
        particles = _on_one_device(solver.ensemble, mesh, state)
        return result_specs(solver.init, mesh, (_SPREAD,), particles)

    def init(*start: Any) -> Any:
        if not makes_its_particles(solver):
            local_size(*start, name="ensemble", floating=True)
        specs = (_SAME,) * len(start) if makes_its_particles(solver) else (_SPREAD,)
        state = run(solver.init, in_specs=specs)(*start)
        _check_axis("solver", (solver.estimate, solver.ensemble), state)
        return state

    def of_state(fn: Callable[..., Any], *specs: Any) -> Callable[..., Any]:
        return lambda state, *args: run(fn, in_specs=(state_specs(state), *specs))(state, *args)

    def step(state: Any, batch: Batch) -> Any:
        batch = traceable("batch", pair("batch", batch))
        return of_state(solver.step, (x_spec, targets_spec))(state, batch)

    def update(state: Any, outputs: Any, targets: Any) -> Any:
        return of_state(solver.update, _SPREAD, _SAME)(state, outputs, targets)

    # `done` reads scalars, which are the same on all devices, and `passes` reads nothing.
    return Solver(
        _with_arguments_of(solver.init, init),
        step,
        update,
        of_state(solver.ensemble),
        of_state(solver.estimate),
        of_state(solver.with_ensemble, _SPREAD),
        solver.done,
        solver.passes,
    )


def _check_axis(name: str, functions: Sequence[Callable[..., Any]], *args: Any) -> None:
    """Raise ValueError unless one of the functions asks for an axis, which there is none of outside of a map."""
    for fn in functions:
        try:
            jax.eval_shape(fn, *args)
        except (NameError, UnmappedAxis):  # JAX's own and the kernel's
            return
    raise ValueError(
        f"{name}: made without axis_name, so that the devices' particles would not come together; wanted one made with "
        f"axis_name={PARTICLES!r}"
    )


def _on_one_device(fn: Callable[..., Any], mesh: Mesh, *args: Any) -> Any:
    """Shapes of what ``fn`` returns where each axis of the mesh has one device."""
    for axis in mesh.axis_names:
        fn = jax.vmap(fn, in_axes=None, axis_name=axis, axis_size=1)
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape[len(mesh.axis_names) :], leaf.dtype), jax.eval_shape(fn, *args)
    )


def _with_arguments_of(init: Callable[..., Any], run: Callable[..., Any]) -> Callable[..., Any]:
    """``run`` with the signature of ``init``, by which :func:`makes_its_particles` tells the kinds of solvers."""
    return functools.wraps(init)(run)


def shard_method(method: Method, mesh: Mesh, *, driver: Driver = "shard_map") -> Method:
    """A training method whose particles are spread over the devices of a mesh, for :func:`eki_jax.training.fit`.

    Args:
        method: training method made with ``axis_name="particles"``, its solver too; see
            :func:`eki_jax.training.ensemble_method`.
        mesh: mesh of devices, from :func:`make_mesh`.
        driver: name of what runs the devices, see :func:`over_devices`.

    Returns:
        A method of global arrays; accuracies are the same on all devices, those of the single particles included.

    Raises:
        TypeError: ``method`` is no training method; as :func:`over_devices`.
        ValueError: as :func:`over_devices`; a method made without ``axis_name``; from ``step``, one whose solver was.
    """
    offers("method", method, ("init", "step", "accuracy", "estimate"), "a training method, as ensemble_method makes it")
    check_driver(driver, mesh)
    key = jax.eval_shape(lambda: jax.random.key(0))
    _check_axis("method", (method.init,), key)
    state_specs = result_specs(method.init, mesh, (_SAME,), key)

    def step(state: Any, key: Array, batch: Batch) -> Any:
        _check_axis("method: its solver", (method.step,), state, key, batch)
        return over_devices(method.step, mesh, (state_specs, _SAME, batch_specs(mesh)), driver=driver)(
            state, key, batch
        )

    def accuracy(state: Any, x: Array, labels: Array) -> Any:
        found = over_devices(method.accuracy, mesh, (state_specs, _SAME, _SAME), driver=driver)(state, x, labels)
        everywhere = NamedSharding(mesh, _SAME)
        return jax.tree.map(lambda leaf: lax.with_sharding_constraint(leaf, everywhere), found)

    def redraw(state: Any, key: Array, particles: int) -> Any:
        def body(state: Any, key: Array) -> Any:
            assert method.redraw is not None
            return method.redraw(state, key, particles)

        return over_devices(body, mesh, (state_specs, _SAME), driver=driver)(state, key)

    def init(key: Array) -> Any:
        return over_devices(method.init, mesh, (_SAME,), driver=driver)(random_key("key", key))

    return method._replace(
        init=init,
        step=step,
        accuracy=accuracy,
        estimate=lambda state: over_devices(method.estimate, mesh, (state_specs,), driver=driver)(state),
        redraw=None if method.redraw is None else redraw,
    )


def shard_samples(forward: ForwardFn) -> ForwardFn:
    """A model that evaluates its device's share of the samples and collects those of the others.

    For a mesh with a batch axis: the inputs are spread over it, the outputs and the targets are whole, so that any loss
    is what it is on one device.

    Args:
        forward: function ``forward(params, x) -> outputs`` of one particle; outputs and x with a leading axis of
            samples.

    Returns:
        The same, of ``x`` on one device of the axis ``"batch"``; the outputs are those of all samples.

    Raises:
        TypeError: ``forward`` is no function of two arguments.
    """
    function("forward", forward, "a model, forward(params, x) -> outputs", arguments=2)

    def every_sample(model: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: jax.tree.map(_from_every_device, model(*args))

    if isinstance(forward, IndexedForward):
        return IndexedForward(every_sample(forward.plain), every_sample(forward.indexed))
    return every_sample(forward)


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
    return (PartitionSpec(BATCH) if BATCH in check_mesh(mesh).axis_names else _SAME), _SAME


def sample_ensemble(key: Array, prior: Prior, particles: int, mesh: Mesh, *, driver: Driver = "shard_map") -> Ensemble:
    """:func:`eki_jax.sample_ensemble` with each device drawing its own particles.

    The numbers are those of one device: a particle's key is that of its index.

    Args:
        key: JAX random key.
        prior: distribution to draw from.
        particles: number of particles J on all devices together.
        mesh: mesh of devices, from :func:`make_mesh`.
        driver: name of what runs the devices, see :func:`over_devices`.

    Returns:
        A pytree of global arrays of shape (J, ...), spread along the first axis.

    Raises:
        ValueError: J < 2, or J that the devices do not divide; the message names the nearest.
    """
    random_key("key", key)
    a_prior("prior", prior, ("sample",))
    _check_size(particles, mesh)
    body = partial(drawing.sample_ensemble, prior=prior, particles=particles, axis_name=PARTICLES)
    return over_devices(body, mesh, (_SAME,), driver=driver)(key)


def resample_around_mean(
    key: Array,
    ensemble: Ensemble,
    prior: Prior,
    mesh: Mesh,
    particles: int | None = None,
    *,
    scale: Any = 1.0,
    driver: Driver = "shard_map",
) -> Ensemble:
    """:func:`eki_jax.resample_around_mean` on a mesh; with a larger J, a growing ensemble.

    Args:
        key: JAX random key.
        ensemble: pytree of global arrays of shape (J, ...).
        prior: distribution whose centred noise is added.
        mesh: mesh of devices, from :func:`make_mesh`.
        particles: number of particles J from now on; by default the old one.
        scale: factor on the noise's standard deviations.
        driver: name of what runs the devices, see :func:`over_devices`.

    Returns:
        A pytree like ``ensemble`` with the new J.

    Raises:
        ValueError: J < 2, or one that the devices do not divide; the message names the nearest.
    """
    random_key("key", key)
    local_size(ensemble, name="ensemble", floating=True)
    a_prior("prior", prior, ("noise",))
    real("scale", scale, NOT_NEGATIVE)
    if particles is not None:
        _check_size(particles, mesh)

    def body(key: Array, ensemble: Ensemble, scale: Any) -> Ensemble:
        return drawing.resample_around_mean(key, ensemble, prior, particles, scale=scale, axis_name=PARTICLES)

    return over_devices(body, mesh, (_SAME, _SPREAD, _SAME), driver=driver)(key, ensemble, scale)


def _check_size(size: int, mesh: Mesh) -> None:
    size, devices = whole("particles", size, 2), check_mesh(mesh).shape[PARTICLES]
    if size % devices:
        wanted = " or ".join(map(str, nearest_sizes(size, devices)))
        raise ValueError(f"J = {size} particles on {devices} devices; wanted a multiple of {devices}: {wanted}")
