"""The mapped axes over which particles and samples may be spread."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
from jax import lax

from eki_jax._types import Array


class Axes(NamedTuple):
    """Names of mapped axes, or None on one device.

    Attributes:
        particles: along which each device has some of the particles.
        batch: along which each device has some of the samples.
    """

    particles: str | None = None
    batch: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Those that there are."""
        return tuple(name for name in self if name is not None)

    @property
    def devices(self) -> int:
        """The number of devices on all axes together."""
        return size(self.particles) * size(self.batch)

    def sum(self, value: Any) -> Any:
        """The sum over all devices."""
        return lax.psum(value, self.names) if self.names else value


def size(name: str | None) -> int:
    """The number of devices along an axis; 1 for None."""
    return 1 if name is None else lax.axis_size(name)


def index(name: str | None) -> Any:
    """The place of this device along an axis; 0 for None."""
    return 0 if name is None else lax.axis_index(name)


def summed(value: Any, name: str | None) -> Any:
    """The sum over the devices along an axis."""
    return value if name is None else lax.psum(value, name)


def gathered(tree: Any, name: str | None, axis: int = 0) -> Any:
    """The parts of all devices joined along ``axis``."""
    if name is None:
        return tree
    return jax.tree.map(lambda leaf: lax.all_gather(leaf, name, axis=axis, tiled=True), tree)


def own_part(value: Array, name: str | None) -> Array:
    """The share of this device of the leading axis."""
    count = value.shape[0] // size(name)
    return value if name is None else lax.dynamic_slice_in_dim(value, index(name) * count, count)
