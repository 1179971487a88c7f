"""Meshes of devices, and arrays placed on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from eki_jax._checks import traceable, whole

PARTICLES = "particles"
BATCH = "batch"


def make_mesh(particles: int | None = None, batch: int = 1, *, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh whose axis ``particles`` holds shares of the ensemble, and ``batch`` shares of the samples.

    Args:
        particles: number of devices along the particle axis; by default all that there are, over ``batch``.
        batch: number of devices along the batch axis; the mesh has that axis only if it is more than 1.
        devices: devices of the mesh; by default those of all processes.

    Returns:
        A mesh with the axis ``"particles"``, or with ``"particles"`` and ``"batch"``.

    Raises:
        TypeError: numbers that are not whole, or ``devices`` that are none.
        ValueError: a number below 1, or more devices wanted than there are.

    >>> mesh = make_mesh(particles=1)
    >>> mesh.axis_names, mesh.size
    (('particles',), 1)
    """
    if devices is not None and not (isinstance(devices, list | tuple) and all(map(_is_device, devices))):
        raise TypeError(f"devices: {devices!r}; wanted a sequence of devices, such as jax.devices()")
    available = list(jax.devices() if devices is None else devices)
    batch = whole("batch", batch)
    particles = None if particles is None else whole("particles", particles)
    particles = len(available) // batch if particles is None else particles
    if not 1 <= particles * batch <= len(available):
        found = f"{len(available)} for particles x batch = {particles} x {batch}"
        raise ValueError(f"devices: {found}; wanted no fewer")
    shape, names = ((particles,), (PARTICLES,)) if batch == 1 else ((particles, batch), (PARTICLES, BATCH))
    chosen = available[: particles * batch]
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(shape), devices=chosen)


def place(tree: Any, mesh: Mesh, spec: PartitionSpec = PartitionSpec()) -> Any:  # noqa: B008
    """Arrays of this host on the devices of a mesh, in one process or many.

    Args:
        tree: pytree of arrays that every process has alike: data, or an ensemble that was made somewhere else.
        mesh: mesh of devices, from :func:`make_mesh`.
        spec: layout of each of them: ``PartitionSpec()`` for a copy on every device, ``PartitionSpec("particles")`` to
            spread the leading axis. Each process sends only the parts its own devices hold.

    Returns:
        The same pytree of global arrays.

    Raises:
        TypeError: ``tree`` has leaves that are no arrays; ``mesh`` is no mesh, ``spec`` no :class:`PartitionSpec`.
        ValueError: a leading axis that the number of devices does not divide; an axis that the mesh does not have.

    >>> place(np.arange(3.0), make_mesh(particles=1)).shape
    (3,)
    """
    check_spec("spec", spec, mesh)
    traceable("tree", tree)

    def one(leaf: Any) -> jax.Array:
        check_divisible(np.shape(leaf), spec, mesh)
        if jax.dtypes.issubdtype(getattr(leaf, "dtype", None), jax.dtypes.extended):
            data = place(jax.random.key_data(leaf), mesh, spec)
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, NamedSharding(mesh, spec), lambda index: host[index])

    return jax.tree.map(one, tree)


def nearest_sizes(size: int, devices: int) -> tuple[int, ...]:
    """The numbers of particles nearest to ``size`` that ``devices`` divides, the smaller first.

    >>> nearest_sizes(10, 4), nearest_sizes(12, 4), nearest_sizes(3, 4)
    ((8, 12), (12,), (4,))
    """
    size, devices = whole("size", size), whole("devices", devices)
    below = size - size % devices
    return tuple(count for count in dict.fromkeys((below, below + devices * (size > below))) if count > 0)


def check_mesh(mesh: Any) -> Mesh:
    """Raise unless it is a mesh with an axis of particles.

    Raises:
        TypeError: no mesh.
        ValueError: one without that axis.
    """
    _check_kind(mesh)
    if PARTICLES not in mesh.axis_names:
        raise ValueError(f"mesh: axes {mesh.axis_names}; wanted {PARTICLES!r} among them, as make_mesh makes it")
    return mesh


def check_spec(name: str, spec: Any, mesh: Any) -> None:
    """Raise unless it is a spec of axes that the mesh has.

    Raises:
        TypeError: no spec, or no mesh.
        ValueError: another axis.
    """
    _check_kind(mesh)
    if not isinstance(spec, PartitionSpec):
        raise TypeError(f"{name}: {spec!r}; wanted a jax.sharding.PartitionSpec, such as PartitionSpec({PARTICLES!r})")
    unknown = [axis for axis in spec if axis is not None and axis not in mesh.axis_names]
    if unknown:
        raise ValueError(f"{name}: {spec} of a mesh with axes {mesh.axis_names}; wanted axes of the mesh")


def _check_kind(mesh: Any) -> None:
    if not isinstance(mesh, Mesh):
        raise TypeError(f"mesh: {mesh!r}; wanted a mesh of devices, from eki_jax.sharding.make_mesh")


def _is_device(value: Any) -> bool:
    return isinstance(value, jax.Device)


def check_divisible(shape: tuple[int, ...], spec: PartitionSpec, mesh: Mesh) -> None:
    """Raise ValueError, naming the nearest sizes, unless the mesh divides the axes that ``spec`` spreads."""
    if len(spec) > len(shape):
        raise ValueError(
            f"spec: {spec} for an array of shape {shape}, which has too few axes; wanted no more than it has"
        )
    for size, axis in zip(shape, spec, strict=False):
        if axis is None:
            continue
        devices = mesh.shape[axis]
        if size % devices:
            what = "J = {} particles" if axis == PARTICLES else "{} samples"
            wanted = " or ".join(map(str, nearest_sizes(size, devices)))
            raise ValueError(f"{what.format(size)} on {devices} devices; wanted a multiple of {devices}: {wanted}")
