"""Which particles take part: those whose numbers are finite and not far beyond all others'; and means of those."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from eki_jax._types import Array, Ensemble
from eki_jax.kernel.axes import Axes, Axis
from eki_jax.kernel.evaluate import map_particles
from eki_jax.kernel.particles import flatten_outputs, wide_dtype

if TYPE_CHECKING:
    from jaxtyping import Bool

#: The largest squared misfit of a particle that takes part, in medians: residuals a thousand times as long.
OUTLIER_CUT = 1e6

# Flags of single numbers that exist at a time: those of a whole ensemble would take a quarter of its memory.
_FLAGS = 2**18
# Particles whose ranks are counted, J x J comparisons of each two; for more a sort costs less than these.
_COUNTED = 256


def finite_particles(tree: Any) -> Bool[Array, " J"]:
    """Which particles' rows are finite in every array, shape (J,).

    >>> import jax.numpy as jnp
    >>> finite_particles([jnp.array([[1.0, 2.0], [jnp.nan, 0.0]]), jnp.array([3.0, 4.0])])
    Array([ True, False], dtype=bool)
    """
    return jnp.stack([_finite_leaf(leaf) for leaf in map(jnp.asarray, jax.tree.leaves(tree))]).all(axis=0)


def _finite_leaf(leaf: Array) -> Array:
    one = lambda row: jnp.isfinite(row).all()
    if leaf.size <= _FLAGS:
        return jax.vmap(one)(leaf)
    return map_particles(one, leaf, max(1, _FLAGS * len(leaf) // leaf.size))


def particle_mean(ensemble: Ensemble, *, axis_name: str | None = None) -> Any:
    """The mean of the particles that are finite: a pytree without the particle axis, in the leaves' own dtypes.

    NaN where no particle is finite.

    >>> particle_mean(jnp.array([[1.0, 2.0], [3.0, 4.0], [jnp.nan, 5.0]]))
    Array([2., 3.], dtype=float32)
    """
    return masked_mean(ensemble, finite_particles(ensemble), Axis(axis_name))


def masked_mean(tree: Any, healthy: Array, axis: Axis) -> Any:
    """The mean over the healthy particles of all devices, leaf by leaf in the leaves' own dtypes."""
    number = axis.sum(jnp.sum(healthy, dtype=jnp.int32))

    def mean(leaf: Array) -> Array:
        wide = wide_dtype(leaf.dtype)
        rows = jnp.where(healthy.reshape(-1, *[1] * (leaf.ndim - 1)), leaf, jnp.zeros((), leaf.dtype))
        total = axis.sum(jnp.sum(rows, axis=0, dtype=wide))
        return (total / number.astype(wide)).astype(leaf.dtype)

    return jax.tree.map(mean, tree)


def near_particles(outputs: Any, cotangents: Any, finite: Array, cut: Any, axes: Axes) -> Array:
    """Which of this device's finite particles are not far beyond all others, shape (J,).

    A particle is far where both of two squares are beyond ``cut`` times their scale: the length of its cotangents
    (for squared error its misfit), whose scale is the median; and the distance of its outputs from those of the
    particle with outputs of median length. The scale of that is the median distance, or, if it is larger, a
    ten-thousandth of the median squared length. So an offset that all outputs share hides no outlier; and where most
    particles agree to all digits, as classifiers do that are sure, one that does not agree is none: bounded outputs
    can spoil no sum. A scale of zero cuts nothing.

    Args:
        outputs: particles' outputs, shape (J, ...) on this device; with ``axes.batch`` the second axis is of samples.
        cotangents: gradients of the loss with respect to them, or None to ask for the outputs alone.
        finite: flags of the particles that are finite, shape (J,).
        cut: multiple of the scale, > 1; None for no cut.
        axes: devices over which particles and samples are spread.

    >>> z, finite = jnp.array([[7.0], [8.0], [9.0], [1e6]]), jnp.ones(4, bool)
    >>> near_particles(z, None, finite, 1e6, Axes())
    Array([ True,  True,  True, False], dtype=bool)
    >>> near_particles(z, jnp.array([[1.0], [0.0], [2.0], [3.0]]), finite, 1e6, Axes())  # its loss is as others'
    Array([ True,  True,  True,  True], dtype=bool)
    """
    if cut is None:
        return jnp.ones_like(finite)
    one, sample_axis = axes.particles, axes.batch
    rows = _finite_rows(outputs, finite, "outputs")
    lengths = [rows] if cotangents is None else [rows, _finite_rows(cotangents, finite, "cotangents")]
    squares = sample_axis.sum(jnp.stack([jnp.sum(part * part, axis=1) for part in lengths]))
    squares = jnp.where(finite, squares, jnp.inf)
    index, medians = _middle(squares, finite, one)
    is_middle = one.own_indices(len(finite)) == index[0]
    reference = one.sum(jnp.sum(jnp.where(is_middle[:, None], rows, 0), axis=0))
    away = rows - reference[None]
    distances = sample_axis.sum(jnp.sum(away * away, axis=1))
    _, (typical,) = _middle(jnp.where(finite, distances, jnp.inf)[None], finite, one)
    cut = jnp.asarray(cut, rows.dtype)
    scales = [jnp.maximum(typical, 1e-4 * medians[0]), *medians[1:]]
    measured = [distances, *squares[1:]]
    beyond = [(value > cut * scale) & (scale > 0) for value, scale in zip(measured, scales, strict=True)]
    return ~(finite & jnp.stack(beyond).all(axis=0))


def _finite_rows(tree: Any, finite: Array, name: str) -> Array:
    flat = flatten_outputs(tree, len(finite), name=name)
    return jnp.where(finite[:, None], flat.astype(wide_dtype(flat.dtype)), 0)


def _middle(values: Array, finite: Array, axis: Axis) -> tuple[Array, Array]:
    """The particles of lower median value among the finite ones of all devices, and these values, one for each row.

    Of two in the middle the lower one: an outlier is above.

    Args:
        values: rows of values of this device's particles, shape (n, J); infinite for those that do not count.
        finite: flags of those that count, shape (J,).
        axis: devices over which the particles are spread.
    """
    every = axis.gathered(values, axis=1)
    number = axis.sum(jnp.sum(finite, dtype=jnp.int32))
    wanted = jnp.maximum(number - 1, 0) // 2
    count = every.shape[1]
    if count > _COUNTED or axis.is_mapped:
        index = jnp.argsort(every, axis=1)[:, wanted]
    else:  # by counting, since a sort takes the compiler longer than all the rest of a small step
        order = jnp.arange(count)
        below = every[:, None, :] < every[:, :, None]
        before = (every[:, None, :] == every[:, :, None]) & (order[None, None, :] < order[None, :, None])
        index = jnp.argmax(jnp.sum(below | before, axis=2, dtype=jnp.int32) == wanted, axis=1)
    index = axis.largest(index)  # the same everywhere, which shard_map cannot know of gathered values
    own = axis.own_indices(len(finite))[None, :] == index[:, None]
    return index, axis.sum(jnp.sum(jnp.where(own, values, 0), axis=1))


def unmoved_particles(before: Ensemble, after: Ensemble) -> Array:
    """Which particles are where they were, in every number, shape (J,).

    >>> unmoved_particles(jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([[1.0, 2.0], [3.0, 5.0]]))
    Array([ True, False], dtype=bool)
    """
    same = jax.tree.map(lambda a, b: jnp.all((a == b).reshape(len(a), -1), axis=1), before, after)
    return jnp.stack(jax.tree.leaves(same)).all(axis=0)
