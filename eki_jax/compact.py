r"""Ensembles stored in half the memory: a float32 mean and bfloat16 deviations from it.

A particle is ``u_j = m + e_j``. The mean, which predicts, keeps all its digits however long the training; only the
spread around it is rounded, to 8 bits. A direct bfloat16 ensemble instead stops moving where a step is below 1/256 of
a parameter.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from eki_jax._covariance import Products
from eki_jax._forward import evaluate_support
from eki_jax._solvers import Info, Solver
from eki_jax._tree import ensemble_size, finite_particles, wide_dtype
from eki_jax._types import Array, Batch, Ensemble, ForwardFn, LossFn, Params, StepSizeFn
from eki_jax.losses import supported_outputs, value_and_cotangents
from eki_jax.step_sizes import frobenius_step_size


class CompactEnsemble(NamedTuple):
    """An ensemble as a mean and deviations.

    Attributes:
        mean: pytree of arrays of shape (1, ...), float32 or wider.
        deviations: pytree of arrays of shape (J, ...), of the narrow dtype.
    """

    mean: Params
    deviations: Ensemble


class CompactState(NamedTuple):
    """State of :func:`compact_euler`.

    Attributes:
        ensemble: the particles, stored compactly.
        count: the number of steps taken, int32.
    """

    ensemble: CompactEnsemble
    count: Array  # type: ignore[assignment]  # hides tuple.count, as in optax


def compact(ensemble: Ensemble, dtype: Any = jnp.bfloat16) -> CompactEnsemble:
    """Store an ensemble as its mean and its deviations.

    Args:
        ensemble: pytree of floating-point arrays of shape (J, ...).
        dtype: of the deviations.

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
    ensemble_size(ensemble)
    mean = jax.tree.map(lambda u: jnp.mean(u.astype(wide_dtype(u.dtype)), axis=0, keepdims=True), ensemble)
    return CompactEnsemble(mean, jax.tree.map(lambda u, m: (u - m).astype(dtype), ensemble, mean))


def expand(stored: CompactEnsemble) -> Ensemble:
    """The particles of a compact ensemble, in the dtype of its mean.

    >>> import jax.numpy as jnp
    >>> expand(compact(jnp.array([[1000.5], [1001.5]])))
    Array([[1000.5],
           [1001.5]], dtype=float32)
    """
    return jax.tree.map(lambda m, e: m + e.astype(m.dtype), stored.mean, stored.deviations)


def compact_euler(
    forward: ForwardFn | None,
    loss: LossFn,
    step_size: StepSizeFn = frobenius_step_size(h0=2.0, eps=0.5),  # noqa: B008
    *,
    chunk_size: int | None = None,
    precision: Any = None,
) -> Solver:
    r"""The steps of :func:`eki_jax.euler` on a compact ensemble; particles are expanded a chunk at a time.

    What a step moves all particles by goes to the mean in full; what it moves a particle away from the others by is
    rounded to the deviations' dtype. On one device; failed particles are kept.

    Args:
        forward: ``forward(params, x) -> outputs`` for one particle; None where only ``update`` is used.
        loss: ``loss(outputs, targets) -> scalar`` for one particle.
        step_size: ``step_size(drift_norm, J, count) -> dt``.
        chunk_size: particles expanded and evaluated at a time; from a memory budget by default.
        precision: of the kernel's matrix products; ``"bf16"`` loses nothing of the stored digits.

    Returns:
        A :class:`eki_jax.Solver`; ``init`` takes an ordinary ensemble and stores it compactly.

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

    def init(ensemble: Ensemble) -> CompactState:
        return CompactState(compact(ensemble), jnp.zeros((), jnp.int32))

    def step(state: CompactState, batch: Batch) -> tuple[CompactState, Info]:
        if forward is None:
            raise TypeError("forward: None; wanted a model for step(), or call update() with the outputs")
        mean, deviations = state.ensemble

        def of_deviation(deviation: Params, x: Any) -> Any:
            return forward(jax.tree.map(lambda m, e: m[0] + e.astype(m.dtype), mean, deviation), x)

        entries, reduced = evaluate_support(of_deviation, loss, deviations, *batch, chunk_size=chunk_size)
        return advance(state, entries, reduced, batch[1])

    def update(state: CompactState, outputs: Any, targets: Any) -> tuple[CompactState, Info]:
        return advance(state, *supported_outputs(loss, outputs, targets), targets)

    def advance(state: CompactState, entries: Any, reduced: LossFn, targets: Any) -> tuple[CompactState, Info]:
        mean, deviations = state.ensemble
        losses, cotangents = value_and_cotangents(reduced, entries, targets)
        healthy = finite_particles((losses, entries, cotangents))
        products = Products.of(deviations, entries, cotangents, healthy=healthy, precision=precision)
        norm = products.norm()
        dt = jnp.asarray(step_size(norm, products.size, state.count), norm.dtype)
        ok = jnp.isfinite(norm) & jnp.isfinite(dt)

        def move(d: Array, e: Array, m: Array) -> tuple[Array, Array]:
            moved = e.astype(d.dtype) - dt * d
            common = jnp.mean(moved, axis=0, keepdims=True)
            return (moved - common).astype(e.dtype), (m + common).astype(m.dtype)

        (deviations, mean), variance = products.map_blocks(move, deviations, mean, when=ok)
        failed = jnp.sum(~healthy, dtype=jnp.int32)
        info = Info(losses, dt, norm, jnp.sqrt(variance), ok & (failed == 0), failed)
        return CompactState(CompactEnsemble(mean, deviations), state.count + 1), info

    return Solver(init, step, update)
