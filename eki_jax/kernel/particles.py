"""The particle axis of a pytree: its length, and the checks that it is there."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eki_jax._checks import arrays
from eki_jax._types import Array, Ensemble
from eki_jax.kernel.axes import Axis


def ensemble_size(ensemble: Ensemble, *, name: str = "ensemble", axis_name: str | tuple[str, ...] | None = None) -> int:
    """The number of particles J, from the leading axis that all leaves share.

    Args:
        ensemble: pytree of floating-point arrays, each of shape (J, ...).
        name: word for the tree in an error.
        axis_name: mapped axis over which the particles are spread, if any.

    Returns:
        The number of particles on all devices together; on one device, J.

    Raises:
        TypeError: a leaf is not of a floating-point dtype.
        ValueError: no leaves, a leaf without axes, leaves that disagree on J, or J < 2.

    >>> import jax.numpy as jnp
    >>> ensemble_size({"w": jnp.zeros((5, 3, 2)), "b": jnp.zeros((5, 2))})
    5
    """
    size = local_size(ensemble, name=name, floating=True)
    size *= Axis(axis_name).size
    if size < 2:
        raise ValueError(f"{name}: J = {size} particle; wanted at least 2, to have a covariance")
    return size


def local_size(tree: Any, *, name: str, floating: bool = False) -> int:
    """The length of the leading axis that all leaves of ``tree`` share; names the leaf that disagrees."""
    leaves = jax.tree_util.tree_leaves_with_path(arrays(name, tree))
    if not leaves:
        raise ValueError(f"{name}: has no arrays; wanted a pytree of arrays with a leading particle axis")
    first = None
    for path, leaf in leaves:
        where = name + jax.tree_util.keystr(path)
        if np.ndim(leaf) == 0:
            raise ValueError(f"{where}: is a scalar; wanted a leading particle axis, shape (J, ...)")
        dtype = jnp.result_type(leaf)
        if floating and not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(f"{where}: has dtype {dtype}; an ensemble moves, so wanted a floating-point dtype")
        size = jnp.shape(leaf)[0]
        if first is None:
            first = (where, size)
        elif size != first[1]:
            raise ValueError(
                f"{where}: leading axis {size}, but {first[0]} has {first[1]} particles; wanted the same J"
            )
    assert first is not None
    return first[1]


def flatten_outputs(tree: Any, size: int, *, name: str) -> Array:
    """All leaves of ``tree`` as one (J, M) array; checks that its leading axis is ``size``."""
    found = local_size(tree, name=name)
    if found != size:
        raise ValueError(
            f"{name}: leading axis {found}, but the ensemble has {size} particles; wanted shape ({size}, ...)"
        )
    flat = [jnp.reshape(leaf, (size, math.prod(jnp.shape(leaf)[1:]))) for leaf in jax.tree.leaves(tree)]
    return flat[0] if len(flat) == 1 else jnp.concatenate(flat, axis=1)


def check_like(
    tree: Any,
    like: Any,
    *,
    name: str = "cotangents",
    other: str = "outputs",
    hint: str = "one number for every output (the loss's gradient with respect to the outputs, not to the parameters)",
) -> None:
    """Raise unless ``tree`` has the structure and shapes of ``like``.

    Args:
        tree: pytree of arrays.
        like: pytree of arrays that it is to be like.
        name: name of ``tree`` in an error.
        other: name of ``like``.
        hint: words for what is wanted.
    """
    wanted: Any = jax.tree.structure(like)
    found: Any = jax.tree.structure(tree)
    if wanted != found:
        raise ValueError(f"{name}: structure {found}, but the {other} have {wanted}; wanted the same")
    for (path, one), another in zip(jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(like), strict=True):
        if jnp.shape(one) != jnp.shape(another):
            where = name + jax.tree_util.keystr(path)
            raise ValueError(
                f"{where}: shape {jnp.shape(one)}, but the {other} have {jnp.shape(another)}; wanted {hint}"
            )


def floating_dtype(name: str, value: Any) -> Any:
    """``value``, a floating-point dtype or its name.

    Raises:
        TypeError: anything else.

    >>> floating_dtype("dtype", np.int8)
    Traceback (most recent call last):
        ...
    TypeError: dtype: <class 'numpy.int8'>; wanted a floating-point dtype
    """
    try:
        if value is not None and jnp.issubdtype(jnp.dtype(value), jnp.floating):
            return value
    except TypeError:
        pass
    raise TypeError(f"{name}: {value!r}; wanted a floating-point dtype")


def wide_dtype(*dtypes: Any) -> Any:
    """The dtype in which products of these are summed: float64 where one is, else float32.

    >>> wide_dtype(jnp.bfloat16, jnp.float32) == jnp.float32
    True
    """
    # By hand: with strict promotion JAX has no common dtype of bfloat16 and float32.
    return jnp.dtype(jnp.float64 if jnp.dtype(jnp.float64) in map(jnp.dtype, dtypes) else jnp.float32)
