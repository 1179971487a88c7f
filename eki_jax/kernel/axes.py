"""Mapped axes over which particles and samples are spread: the one place that asks whether there are several devices.

On one device an axis has no name; every method then returns what it was given, and the compiled program is that of code
without devices.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from eki_jax._types import Array


class UnmappedAxis(ValueError):
    """A named axis that no map around the call has."""


class Axis(NamedTuple):
    """The devices along a mapped axis, or one device alone.

    Attributes:
        name: name of the axis in ``vmap``, ``pmap`` or ``shard_map``, or several names; None on one device.

    >>> import jax
    >>> jax.vmap(lambda x: Axis("particles").sum(x), axis_name="particles")(jnp.array([1.0, 2.0]))
    Array([3., 3.], dtype=float32)
    >>> Axis().size, Axis().sum(2.0)
    (1, 2.0)
    """

    name: str | tuple[str, ...] | None = None

    @property
    def is_mapped(self) -> bool:
        """Whether there is an axis, of one device or of many."""
        return self.name is not None

    @property
    def size(self) -> int:
        """The number of devices n."""
        if not self.is_mapped:
            return 1
        try:
            return lax.axis_size(self.name)
        except NameError:
            raise UnmappedAxis(
                f"axis_name: {self.name!r} is no mapped axis here; wanted a call inside of vmap or shard_map with "
                "that axis, as sharding.shard_solver makes it, or None on one device"
            ) from None

    @property
    def index(self) -> Any:
        """The place of this device, 0 to n - 1."""
        return lax.axis_index(self.name) if self.is_mapped else 0

    def sum(self, value: Any) -> Any:
        """The sum over the devices of each array of a pytree."""
        return lax.psum(value, self.name) if self.is_mapped else value

    def mean(self, value: Any) -> Any:
        """The mean over the devices of each array of a pytree."""
        return lax.pmean(value, self.name) if self.is_mapped else value

    def largest(self, value: Any) -> Any:
        """The largest over the devices."""
        return lax.pmax(value, self.name) if self.is_mapped else value

    def all(self, flag: Array) -> Array:
        """Whether a flag is up on all devices."""
        return self.sum(jnp.asarray(~flag, jnp.int32)) == 0 if self.is_mapped else flag

    def gathered(self, tree: Any, axis: int = 0) -> Any:
        """The parts of all devices joined along ``axis``, leaf by leaf."""
        if not self.is_mapped:
            return tree
        return jax.tree.map(lambda leaf: lax.all_gather(leaf, self.name, axis=axis, tiled=True), tree)

    def own_part(self, rows: Array) -> Array:
        """The share of this device of rows that all devices have."""
        share = rows.shape[0] // self.size
        return lax.dynamic_slice_in_dim(rows, self.index * share, share) if self.is_mapped else rows

    def own_indices(self, share: int) -> Array:
        """The numbers among all rows of this device's ``share`` rows, shape (share,)."""
        return jnp.arange(share) + self.index * share


class Axes(NamedTuple):
    """The two axes of a natural-gradient step.

    Attributes:
        particles: devices that each have some of the particles.
        batch: devices that each have some of the samples.
    """

    particles: Axis = Axis()
    batch: Axis = Axis()

    @property
    def both(self) -> Axis:
        """All devices of the mesh as one axis."""
        names = tuple(axis.name for axis in self if isinstance(axis.name, str))
        return Axis(names or None)
