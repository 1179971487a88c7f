"""Meshes of devices, and arrays placed on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from eki_jax._checks import whole

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
        ValueError: a number below 1, or more devices wanted than there are.

    >>> mesh = make_mesh(particles=1)
    >>> mesh.axis_names, mesh.size
    (('particles',), 1)
    """
    available = list(jax.devices() if devices is None else devices)
    if batch < 1 or (particles is not None and particles < 1):
        raise ValueError(f"particles, batch: {particles}, {batch}; wanted numbers of devices >= 1")
    particles = len(available) // batch if particles is None else particles
    if not 1 <= particles * batch <= len(available):
        raise ValueError(f"particles x batch: {particles} x {batch} of {len(available)} devices; wanted no more")
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
        ValueError: a leading axis that the number of devices does not divide.

    >>> place(np.arange(3.0), make_mesh(particles=1)).shape
    (3,)
    """

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


def check_divisible(shape: tuple[int, ...], spec: PartitionSpec, mesh: Mesh) -> None:
    """Raise ValueError, naming the nearest sizes, unless the mesh divides the axes that ``spec`` spreads."""
    if len(spec) > len(shape):
        raise ValueError(f"shape {shape}: has too few axes to be spread as {spec}")
    for size, axis in zip(shape, spec, strict=False):
        if axis is None:
            continue
        devices = mesh.shape[axis]
        if size % devices:
            what = "J = {} particles" if axis == PARTICLES else "{} samples"
            wanted = " or ".join(map(str, nearest_sizes(size, devices)))
            raise ValueError(f"{what.format(size)} on {devices} devices; wanted a multiple of {devices}: {wanted}")
