"""How the arguments and the results of a function are spread over a mesh."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from eki_jax._checks import function, traceable
from eki_jax.sharding.mesh import PARTICLES, check_divisible, check_mesh, check_spec


def result_specs(body: Callable[..., Any], mesh: Mesh, in_specs: Any, *args: Any) -> Any:
    """How :func:`over_devices` spreads what ``body`` returns; nothing is computed.

    Args:
        body: function of local arrays.
        mesh: mesh of devices, from :func:`make_mesh`.
        in_specs: specs of the arguments, in the form that :func:`over_devices` takes.
        *args: whole arrays, or :class:`jax.ShapeDtypeStruct` of their shapes.

    Returns:
        A pytree of :class:`jax.sharding.PartitionSpec` like the result.

    Raises:
        TypeError: ``body`` is no function, ``mesh`` no mesh, ``in_specs`` no tuple of specs, one for each argument.
        ValueError: an axis that the devices do not divide; a result whose shape depends on their number in another
            way.
    """
    function("body", body, "a function of one device's share", arguments=len(args))
    check_mesh(mesh)
    check_specs(in_specs, mesh, len(args))
    traceable("args", args)
    specs = broadcast(in_specs, args)
    for leaf, spec in zip(jax.tree.leaves(args), specs, strict=True):
        check_divisible(jnp.shape(leaf), spec, mesh)
    # Traced twice: what is n times as long for one device as for n of them is spread over the particles, whatever
    # the function is made of. A table of specs would have to follow the code.
    whole = _local_results(body, args, specs, dict.fromkeys(mesh.axis_names, 1))
    share = _local_results(body, args, specs, dict(mesh.shape))
    devices = mesh.shape[PARTICLES]

    def found(one: Any, part: Any) -> PartitionSpec:
        if devices == 1 or one.shape == part.shape:
            return PartitionSpec()
        axes = [_axis_of(length, its_share, devices) for length, its_share in zip(one.shape, part.shape, strict=True)]
        return PartitionSpec(*axes)

    return jax.tree.map(found, whole, share)


def _axis_of(length: int, share: int, devices: int) -> str | None:
    if length == share:
        return None
    if length == devices * share:
        return PARTICLES
    raise ValueError(f"body: returned an axis of {length} on one device and of {share} on {devices}; wanted a share")


def _local_results(body: Callable[..., Any], args: Any, specs: list[PartitionSpec], sizes: dict[str, int]) -> Any:
    """Shapes of what one device's ``body`` returns, with so many devices along each axis."""
    leaves, structure = flatten(args)
    mapped = body
    for axis in reversed(sizes):
        in_axes = structure.unflatten([0 if axis in spec else None for spec in specs])
        mapped = jax.vmap(mapped, in_axes=in_axes, axis_name=axis, axis_size=sizes[axis])

    def stacked(leaf: Any, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        shape = list(jnp.shape(leaf))
        for dimension, axis in enumerate(spec):
            shape[dimension] //= sizes.get(axis, 1)
        shape = [sizes[axis] for axis in sizes if axis in spec] + shape
        return jax.ShapeDtypeStruct(shape, jnp.result_type(leaf) if not is_key(leaf) else leaf.dtype)

    structs = [stacked(leaf, spec) for leaf, spec in zip(leaves, specs, strict=True)]
    # Mapped, so that the names that the body uses in its collectives are bound.
    results = jax.eval_shape(mapped, *structure.unflatten(structs))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[len(sizes) :], leaf.dtype), results)


def check_specs(in_specs: Any, mesh: Mesh, arguments: int | None = None) -> None:
    """Raise unless they are a tuple of specs, or of pytrees of them, with as many entries as there are arguments.

    Raises:
        TypeError: no tuple, another number of entries, or leaves that are no specs.
        ValueError: an axis that the mesh does not have.
    """
    if not isinstance(in_specs, tuple | list) or is_spec(in_specs) or arguments not in (None, len(in_specs)):
        count = "" if arguments is None else f" ({arguments})"
        raise TypeError(f"in_specs: {in_specs!r}; wanted a tuple with a PartitionSpec for each argument{count}")
    for spec in jax.tree.leaves(tuple(in_specs), is_leaf=is_spec):
        check_spec("in_specs", spec, mesh)


def flatten(tree: Any, **options: Any) -> tuple[list[Any], Any]:
    """Leaves and structure."""
    return jax.tree.flatten(tree, **options)


def broadcast(in_specs: Any, args: tuple[Any, ...]) -> list[PartitionSpec]:
    """One spec for each leaf of the arguments."""
    specs = jax.tree.map(
        lambda spec, argument: [spec] * len(jax.tree.leaves(argument)), tuple(in_specs), args, is_leaf=is_spec
    )
    return jax.tree.leaves(specs, is_leaf=is_spec)


def is_spec(value: Any) -> bool:
    """Whether it is a partition spec, a leaf in a tree of them."""
    return isinstance(value, PartitionSpec)


def is_key(leaf: Any) -> bool:
    """Whether it is an array of typed random keys."""
    return bool(jax.dtypes.issubdtype(getattr(leaf, "dtype", None), jax.dtypes.extended))
