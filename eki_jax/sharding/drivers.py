"""Three ways to run one function on the devices of a mesh."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from eki_jax._checks import function, one_of
from eki_jax._types import Array
from eki_jax.sharding.mesh import PARTICLES, check_mesh
from eki_jax.sharding.specs import broadcast, check_specs, flatten, is_key, is_spec, result_specs

#: Name of what runs a function on the devices of a mesh, see :func:`over_devices`.
Driver = Literal["shard_map", "pmap", "jit"]
#: All drivers; the first is the default.
DRIVERS: tuple[Driver, ...] = get_args(Driver)


def over_devices(
    body: Callable[..., Any], mesh: Mesh, in_specs: Any, *, driver: Driver = "shard_map"
) -> Callable[..., Any]:
    """``body``, which works on one device's share of its arguments, as a function of whole arrays.

    ``body`` names the mesh's axes in its collectives, as the functions of this library do with
    ``axis_name="particles"``. The three drivers give the same numbers for the same call:

    * ``"shard_map"``: :func:`jax.shard_map`, on one axis or two, in one process or many.
    * ``"pmap"``: :func:`jax.pmap`, on one axis, in one process.
    * ``"jit"``: the compiler's partitioner. The arrays get an axis of devices, ``body`` is mapped over it by
      :func:`jax.vmap`, and the compiler turns what crosses that axis into communication.

    How the results are spread is found by tracing ``body`` for one device and for all of them: an axis that is n times
    as long for one is a particle axis, and what has no such axis must be the same on all devices (``"shard_map"``
    checks that, but on TPUs, where the check would refuse JAX's own factorizations).

    Args:
        body: function of local arrays.
        mesh: mesh of devices, from :func:`make_mesh`.
        in_specs: tuple with one :class:`jax.sharding.PartitionSpec` for each argument, or with pytrees of them that
            are prefixes of the arguments: ``PartitionSpec("particles")`` spreads the leading axis,
            ``PartitionSpec()`` nothing.
        driver: name of what runs the devices, one of the three above.

    Returns:
        A pure function of global arrays. Compile it with :func:`jax.jit`; it may be scanned.

    Raises:
        TypeError: ``body`` is no function, ``mesh`` no mesh, ``in_specs`` no tuple of specs.
        ValueError: an unknown driver; ``"pmap"`` on two axes or in many processes; when called, a number of
            particles that the devices do not divide (the message names the nearest).

    >>> from functools import partial
    >>> from eki_jax import mean_particle
    >>> from eki_jax.sharding import make_mesh
    >>> mean = partial(mean_particle, axis_name="particles")
    >>> over_devices(mean, make_mesh(1), (PartitionSpec("particles"),))(jnp.array([[1.0, 2.0], [3.0, 6.0]]))
    Array([2., 4.], dtype=float32)
    """
    function("body", body, "a function of one device's share")
    check_driver(driver, mesh)
    check_specs(in_specs, mesh)

    def run(*args: Any) -> Any:
        _check_context(driver)
        out_specs = result_specs(body, mesh, in_specs, *args)
        # Leaves alone go through the drivers: pmap and vmap take one axis a leaf, and no two of them agree on what a
        # prefix of a tree of specs means.
        leaves, structure = flatten(args)
        flat_specs = broadcast(in_specs, args)
        out_leaves, out_structure = flatten(out_specs, is_leaf=is_spec)

        def flat(*local: Any) -> tuple[Any, ...]:
            return tuple(jax.tree.leaves(body(*structure.unflatten(local))))

        return out_structure.unflatten(_RUN[driver](flat, mesh, flat_specs, tuple(out_leaves))(*leaves))

    return run


def _check_context(driver: Driver) -> None:
    """Raise ValueError where a mesh that :func:`jax.set_mesh` set is in the driver's way."""
    context = jax.sharding.get_abstract_mesh()
    if not context.empty and (driver == "pmap" or AxisType.Explicit in context.axis_types):
        found = f"{driver!r} under jax.set_mesh of a mesh with axes {context.axis_names} of types {context.axis_types}"
        raise ValueError(f"driver: {found}; wanted 'shard_map' or 'jit' with Auto axes, or no mesh set")


def _by_shard_map(
    flat: Callable[..., Any], mesh: Mesh, in_specs: list[PartitionSpec], out_specs: tuple[PartitionSpec, ...]
) -> Callable[..., Any]:
    # On one device there is nothing to spread, so no result is said to vary and there is nothing to check. On TPUs JAX
    # makes loops of factorizations, and begins them with constants: in a loop over what varies the check refuses these.
    check = mesh.shape[PARTICLES] > 1 and jax.default_backend() != "tpu"
    return jax.shard_map(flat, mesh=mesh, in_specs=tuple(in_specs), out_specs=out_specs, check_vma=check)


def _by_pmap(
    flat: Callable[..., Any], mesh: Mesh, in_specs: list[PartitionSpec], out_specs: tuple[PartitionSpec, ...]
) -> Callable[..., Any]:
    def mapped(fn: Any, axis: str, in_axes: Any, out_axes: Any) -> Any:
        return jax.pmap(fn, axis, in_axes=in_axes, out_axes=out_axes, devices=list(mesh.devices.flat))

    return _along(PARTICLES, flat, mesh, in_specs, out_specs, mapped)


def _by_partitioner(
    flat: Callable[..., Any], mesh: Mesh, in_specs: list[PartitionSpec], out_specs: tuple[PartitionSpec, ...]
) -> Callable[..., Any]:
    def mapped(fn: Any, axis: str, in_axes: Any, out_axes: Any) -> Any:
        return jax.vmap(fn, in_axes, out_axes, axis_name=axis, axis_size=mesh.shape[axis], spmd_axis_name=axis)

    # From the inside out, so that the first axis of the mesh is the outermost map and the slowest in memory.
    for axis in reversed(mesh.axis_names):
        flat = _along(axis, flat, mesh, in_specs, out_specs, mapped)

    def run(*leaves: Any) -> Any:
        return _constrained(flat(*_constrained(leaves, mesh, in_specs)), mesh, out_specs)

    return run


_RUN = {"shard_map": _by_shard_map, "pmap": _by_pmap, "jit": _by_partitioner}


def _along(
    axis: str,
    flat: Callable[..., Any],
    mesh: Mesh,
    in_specs: list[PartitionSpec],
    out_specs: tuple[PartitionSpec, ...],
    mapped: Callable[..., Any],
) -> Callable[..., Any]:
    """``flat`` mapped over one axis of devices: whole arrays are cut along it, and their shares joined again."""
    in_axes, out_axes = ([_dimension(spec, axis) for spec in specs] for specs in (in_specs, out_specs))
    alone = mesh.shape[axis] == 1  # then what is the same everywhere cannot be told from what is spread
    if all(dimension is None for dimension in in_axes):  # a map wants something to map over
        flat, in_axes = _ignoring_first(flat), [0, *in_axes]
    run = mapped(flat, axis, tuple(in_axes), 0 if alone else tuple(out_axes))

    def whole(*leaves: Any) -> tuple[Any, ...]:
        if len(in_axes) > len(leaves):
            leaves = (jnp.zeros(mesh.shape[axis]), *leaves)
        cut = [
            leaf if at is None else jnp.reshape(leaf, (*leaf.shape[:at], mesh.shape[axis], -1, *leaf.shape[at + 1 :]))
            for leaf, at in zip(leaves, in_axes, strict=True)
        ]
        results = run(*cut)
        if alone:
            return tuple(leaf[0] for leaf in results)
        return tuple(
            leaf if at is None else lax.collapse(leaf, at, at + 2) for leaf, at in zip(results, out_axes, strict=True)
        )

    return whole


def _ignoring_first(fn: Callable[..., Any]) -> Callable[..., Any]:
    return lambda first, *rest: fn(*rest)


def _constrained(leaves: tuple[Any, ...], mesh: Mesh, specs: Any) -> list[Array]:
    return [
        # The partitioner knows no layout of typed keys; they are the same everywhere anyway.
        leaf if is_key(leaf) else lax.with_sharding_constraint(leaf, NamedSharding(mesh, spec))
        for leaf, spec in zip(leaves, specs, strict=True)
    ]


def _dimension(spec: PartitionSpec, axis: str) -> int | None:
    return list(spec).index(axis) if axis in spec else None


def check_driver(driver: str, mesh: Mesh) -> None:
    """Raise unless the driver runs on the mesh.

    Raises:
        TypeError: ``mesh`` is no mesh.
        ValueError: an unknown driver, or one that the mesh's axes or devices do not suit.
    """
    check_mesh(mesh)
    if AxisType.Explicit in mesh.axis_types:
        raise ValueError(
            f"mesh: axes {mesh.axis_names} of types {mesh.axis_types}, those of jax.make_mesh; wanted Auto ones, as "
            "eki_jax.sharding.make_mesh makes them"
        )
    one_of("driver", driver, DRIVERS)
    if driver == "pmap" and len(mesh.axis_names) > 1:
        raise ValueError(f"driver: 'pmap' on a mesh with the axes {mesh.axis_names}; wanted 'shard_map' or 'jit'")
    if driver == "pmap" and len({device.process_index for device in mesh.devices.flat}) > 1:
        raise ValueError("driver: 'pmap' on the devices of several processes; wanted 'shard_map' or 'jit'")
