r"""Ensembles stored in half the memory: a float32 mean and bfloat16 deviations from it.

A particle is ``u_j = m + e_j``. The mean, which predicts, keeps all its digits however long the training; only the
spread around it is rounded, to 8 bits. A direct bfloat16 ensemble instead stops moving where a step is below 1/256 of
a parameter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp

from eki_jax._types import Array, Ensemble, ForwardFn, LossFn, Params, StepSizeFn
from eki_jax.kernel.axes import Axis
from eki_jax.kernel.once import compiled_once
from eki_jax.kernel.particles import ensemble_size, floating_dtype, local_size, wide_dtype
from eki_jax.solvers.discretization import discretization
from eki_jax.solvers.protocol import Settings, Solver
from eki_jax.solvers.step_sizes import frobenius_step_size


class CompactEnsemble(NamedTuple):
    """An ensemble as a mean and deviations.

    Attributes:
        mean: mean particle, a pytree of arrays of shape (1, ...), float32 or wider.
        deviations: distances from it, a pytree of arrays of shape (J, ...), of the narrow dtype.
    """

    mean: Params
    deviations: Ensemble


class CompactState(NamedTuple):
    """State of :func:`compact_euler`.

    Attributes:
        deviations: distances of the particles from their mean, shape (J, ...), of the narrow dtype.
        mean: mean particle, shape (1, ...), float32 or wider.
        count: number of steps taken, int32.
    """

    deviations: Ensemble
    mean: Params
    count: Array  # type: ignore[assignment]  # hides tuple.count, as in optax

    @property
    def ensemble(self) -> CompactEnsemble:
        """The particles, stored compactly."""
        return CompactEnsemble(self.mean, self.deviations)

    @property
    def position(self) -> Ensemble:
        """The particles to predict with, expanded."""
        return expand(self.ensemble)

    def particle(self, deviation: Params) -> Params:
        """The particle with this deviation from the mean."""
        return jax.tree.map(lambda m, e: m[0] + e.astype(m.dtype), self.mean, deviation)


def compact(ensemble: Ensemble, dtype: Any = jnp.bfloat16, *, axis_name: str | None = None) -> CompactEnsemble:
    """Store an ensemble as its mean and its deviations.

    Args:
        ensemble: pytree of floating-point arrays of shape (J, ...).
        dtype: dtype of the deviations.
        axis_name: mapped axis over which the particles are spread.

    Returns:
        The compact ensemble, half the size of a float32 one.

    Raises:
        TypeError, ValueError: as :func:`eki_jax.ensemble_size`.

    >>> import jax.numpy as jnp
    >>> stored = compact(jnp.array([[1000.5], [1001.5]]))
    >>> stored.mean, stored.deviations
    (Array([[1001.]], dtype=float32), Array([[-0.5],
           [0.5]], dtype=bfloat16))
    """
    ensemble_size(ensemble, axis_name=axis_name)
    floating_dtype("dtype", dtype)
    mean = jax.tree.map(lambda u: _mean(u.astype(wide_dtype(u.dtype)), Axis(axis_name)), ensemble)
    return CompactEnsemble(mean, jax.tree.map(lambda u, m: (u.astype(m.dtype) - m).astype(dtype), ensemble, mean))


def expand(stored: CompactEnsemble) -> Ensemble:
    """The particles of a compact ensemble, in the dtype of its mean.

    Raises:
        TypeError: no :class:`CompactEnsemble`.

    >>> import jax.numpy as jnp
    >>> expand(compact(jnp.array([[1000.5], [1001.5]])))
    Array([[1000.5],
           [1001.5]], dtype=float32)
    """
    if not isinstance(stored, CompactEnsemble):
        raise TypeError(f"stored: a {type(stored).__name__}; wanted a CompactEnsemble, as compact(ensemble) makes it")
    local_size(stored.mean, name="stored.mean", floating=True)
    local_size(stored.deviations, name="stored.deviations", floating=True)
    return jax.tree.map(lambda m, e: m + e.astype(m.dtype), stored.mean, stored.deviations)


def compact_euler(
    forward: ForwardFn | None,
    loss: LossFn,
    step_size: StepSizeFn = frobenius_step_size(h0=1.0, eps=0.5),  # noqa: B008
    **settings: Unpack[Settings],
) -> Solver:
    r"""The steps of :func:`eki_jax.euler` on a compact ensemble; particles are expanded a chunk at a time.

    What a step moves all particles by goes to the mean in full; what it moves a particle away from the others by is
    rounded to the deviations' dtype.

    Args:
        forward: function ``forward(params, x) -> outputs`` of one particle; None where only ``update`` is used.
        loss: function ``loss(outputs, targets) -> scalar`` of one particle.
        step_size: function ``step_size(drift_norm, J, count) -> dt``.
        **settings: keywords that all discretizations share, see :class:`eki_jax.Settings`; ``precision="bf16"`` loses
            nothing of the stored digits.

    Returns:
        A :class:`eki_jax.Solver` with :class:`CompactState`; ``init`` and ``with_ensemble`` take ordinary ensembles and
        store them compactly.

    Raises:
        TypeError: ``forward`` is None and ``step`` is called.
        ValueError: outputs or targets that do not fit.

    >>> import jax.numpy as jnp
    >>> from eki_jax import losses
    >>> solver = compact_euler(lambda u, x: x * u, losses.squared_error())
    >>> state = solver.init(jnp.array([[1.0], [3.0]]))
    >>> for _ in range(10):
    ...     state, info = solver.step(state, (2.0, jnp.array([8.0])))
    >>> bool(jnp.allclose(state.ensemble.mean, 4.0, atol=0.2))
    True
    """
    axis_name = settings.get("axis_name")

    def start(ensemble: Ensemble) -> CompactState:
        mean, deviations = compact(ensemble, axis_name=axis_name)
        return CompactState(deviations, mean, jnp.zeros((), jnp.int32))

    def move(dt: Array, count: Array) -> Callable[..., tuple[Array, ...]]:
        del count

        def blocks(d: Array, deviation: Array, mean: Array) -> tuple[Array, ...]:
            moved = deviation - dt.astype(d.dtype) * d
            common = _mean(moved, Axis(axis_name))
            return moved - common, mean + common

        return blocks

    def with_ensemble(state: CompactState, ensemble: Ensemble) -> CompactState:
        return start(ensemble)._replace(count=state.count)

    solver = discretization(forward, loss, step_size, start, move, **settings)
    return solver._replace(with_ensemble=compiled_once(with_ensemble))


def _mean(rows: Array, axis: Axis) -> Array:
    """The mean of the finite numbers over the particles of all devices, shape (1, ...).

    What the deviations are measured from may be any point near them: one that a failed particle cannot spoil.
    """
    finite = jnp.isfinite(rows)
    total, number = axis.sum(
        tuple(jnp.sum(part, axis=0, keepdims=True, dtype=rows.dtype) for part in (jnp.where(finite, rows, 0), finite))
    )
    return total / jnp.maximum(number, 1)
