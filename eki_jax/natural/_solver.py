"""The solver: a mean, deviations drawn from a key, and one damped Gauss-Newton step in their span."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from eki_jax._forward import activation_bytes, map_particles
from eki_jax._tree import local_size
from eki_jax._types import Array, Batch, Ensemble, ForwardFn, LossFn, Params, Schedule
from eki_jax.natural._damping import AdaptiveDamping, as_schedule
from eki_jax.natural._deviations import Deviations, low_rank
from eki_jax.natural._span import span_step

# What the intermediate values of one chunk of particles may take.
_CHUNK_BYTES = {"cpu": 64 * 2**20}
_DEVICE_BYTES = 512 * 2**20


class NaturalState(NamedTuple):
    """State of :func:`natural_gradient`: a mean and a key, whatever the number of particles.

    Attributes:
        position: m, one particle's parameters.
        average: the average of the iterates, a pytree like ``position``, or None without averaging.
        key: of all deviations; those of a step are a function of it, of ``count`` and of the particle's index.
        damping: lambda, if it adapts itself, else None.
        count: the number of steps taken, int32.
    """

    position: Params
    average: Params | None
    key: Array
    damping: Array | None
    count: Array  # type: ignore[assignment]  # hides tuple.count, as in optax


class NaturalInfo(NamedTuple):
    """What a person wants to see of a step; all of it before the step moved anything, but for ``measured``.

    Attributes:
        loss: of the particles' mean output.
        predicted: by how much the second-order model of the loss falls.
        measured: by how much the loss of the mean particle fell on the same batch; None where lambda does not adapt.
        sigma: scale of the deviations.
        damping: lambda.
        fallback: whether Cholesky's factorization failed and eigenvalues were used.
        is_finite: whether the step was finite and the loss convex; if not, the mean stayed where it was.
        failed: the number of particles whose outputs were not finite; they took no part.
    """

    loss: Array
    predicted: Array
    measured: Array | None
    sigma: Array
    damping: Array
    fallback: Array
    is_finite: Array
    failed: Array


class NaturalSolver(NamedTuple):
    """The natural gradient as pure functions; the first three are those of :class:`eki_jax.Solver`.

    Attributes:
        init: ``init(params, key) -> state``, from ONE particle's parameters.
        step: ``step(state, (x, targets)) -> (state, info)``; evaluates the model and updates.
        update: ``update(state, outputs, targets) -> (state, info)``, for models that run somewhere else: evaluate
            ``ensemble(state)`` there and hand in the outputs, shape (J, ...).
        ensemble: ``ensemble(state) -> (J, ...)``, the particles of the next step, formed in full.
    """

    init: Callable[[Params, Array], NaturalState]
    step: Callable[[NaturalState, Batch], tuple[NaturalState, NaturalInfo]]
    update: Callable[[NaturalState, Any, Any], tuple[NaturalState, NaturalInfo]]
    ensemble: Callable[[NaturalState], Ensemble]


def natural_gradient(
    forward: ForwardFn | None,
    loss: LossFn,
    particles: int = 1000,
    sigma: Schedule = 0.1,
    damping: Schedule | AdaptiveDamping = 1e-4,
    deviations: Deviations = low_rank(1),  # noqa: B008
    *,
    learning_rate: Schedule = 1.0,
    antithetic: bool = False,
    redraw_every: int = 1,
    averaging: float | None = None,
    space: Any = None,
    chunk_size: int | None = None,
    precision: Any = None,
) -> NaturalSolver:
    if particles < 2:
        raise ValueError(f"particles: {particles}; wanted J >= 2")
    if antithetic and particles % 2:
        raise ValueError(f"particles: {particles} with antithetic=True; wanted an even number, for pairs")
    if redraw_every < 1:
        raise ValueError(f"redraw_every: {redraw_every}; wanted a number of steps >= 1")
    if averaging is not None and not 0 <= averaging < 1:
        raise ValueError(f"averaging: {averaging}; wanted a factor in [0, 1), or None")
    sigma_of, rate_of = as_schedule(sigma, "sigma"), as_schedule(learning_rate, "learning_rate")
    damping_of = None if isinstance(damping, AdaptiveDamping) else as_schedule(damping, "damping")

    def init(params: Params, key: Array) -> NaturalState:
        params = jax.tree.map(jnp.asarray, params)
        initial = None if damping_of is not None else jnp.asarray(damping.initial, jnp.float32)
        average = None if averaging is None else jax.tree.map(jnp.zeros_like, params)
        return NaturalState(params, average, key, initial, jnp.zeros((), jnp.int32))

    def factors_of(state: NaturalState) -> tuple[Any, Array]:
        key = jax.random.fold_in(state.key, state.count // redraw_every)
        index = jnp.arange(particles)
        seeds = index // 2 if antithetic else index
        signs = jnp.where(index % 2 == 1, -1.0, 1.0) if antithetic else jnp.ones(particles)
        draw = lambda i: deviations.draw(jax.random.fold_in(key, i), state.position)
        one = jax.eval_shape(draw, jax.ShapeDtypeStruct((), jnp.int32))
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(one))
        return map_particles(draw, seeds, min(particles, max(1, 16 * 2**20 // max(1, size)))), signs

    def scale_of(state: NaturalState) -> Array:
        return jnp.asarray(sigma_of(state.count), jnp.float32)

    def step(state: NaturalState, batch: Batch) -> tuple[NaturalState, NaturalInfo]:
        if forward is None:
            raise TypeError("forward: None; wanted a model for step(), or call update() with the outputs")
        x, targets = batch
        factors, signs = factors_of(state)
        scale = scale_of(state)

        def one(row: Any) -> Any:
            factor, sign = row
            return forward(deviations.particle(state.position, factor, sign * scale), x)

        size = chunk_size or _chunk(one, (factors, signs), x)
        outputs = map_particles(one, (factors, signs), size)
        measure = lambda params: loss(forward(params, x), targets)
        return advance(state, factors, signs, outputs, targets, measure)

    def update(state: NaturalState, outputs: Any, targets: Any) -> tuple[NaturalState, NaturalInfo]:
        if damping_of is None:
            raise TypeError("damping: adaptive, which needs the model: wanted a number or a schedule for update()")
        factors, signs = factors_of(state)
        found = local_size(outputs, name="outputs")
        if found != particles:
            raise ValueError(f"outputs: leading axis {found} for {particles} particles; wanted ({particles}, ...)")
        return advance(state, factors, signs, outputs, targets, None)

    def advance(
        state: NaturalState, factors: Any, signs: Array, outputs: Any, targets: Any, measure: Any
    ) -> tuple[NaturalState, NaturalInfo]:
        lam = jnp.asarray(damping_of(state.count) if damping_of is not None else state.damping)
        rate, scale = jnp.asarray(rate_of(state.count), jnp.float32), scale_of(state)
        found = span_step(loss, outputs, targets, lam, space=space, precision=precision)
        ok = jnp.isfinite(found.weights).all() & found.is_convex
        norm = -rate * scale * lax.rsqrt(jnp.maximum(found.healthy_count - 1, 1))
        weights = jnp.where(ok, norm * found.weights * signs, 0)
        move = deviations.combine(state.position, factors, weights)
        position = jax.tree.map(lambda m, d: (m + d).astype(m.dtype), state.position, move)
        predicted, measured, adapted = found.predicted(rate), None, state.damping
        if damping_of is None:
            measured = measure(state.position) - measure(position)
            ratio = jnp.where(jnp.isfinite(measured), measured, -jnp.inf) / jnp.maximum(predicted, 1e-30)
            adapted = damping.next(lam, ratio)
        average = _averaged(state, position, averaging)
        failed = jnp.asarray(particles - found.healthy_count, jnp.int32)
        info = NaturalInfo(found.loss, predicted, measured, scale, lam, found.fallback, ok & (failed == 0), failed)
        return NaturalState(position, average, state.key, adapted, state.count + 1), info

    def ensemble(state: NaturalState) -> Ensemble:
        factors, signs = factors_of(state)
        scale = scale_of(state)

        def one(row: Any) -> Params:
            e = deviations.dense(state.position, row[0])
            return jax.tree.map(lambda m, d: (m + row[1] * scale * d).astype(m.dtype), state.position, e)

        return jax.vmap(one)((factors, signs))

    return NaturalSolver(init, step, update, ensemble)


def _averaged(state: NaturalState, position: Params, averaging: float | None) -> Params | None:
    if averaging is None:
        return None
    return jax.tree.map(lambda a, m: (averaging * a + (1 - averaging) * m).astype(m.dtype), state.average, position)


def _chunk(one: Callable[[Any], Any], rows: Any, x: Any) -> int:
    per_particle = activation_bytes(lambda row, x: one(row), rows, x)
    budget = _CHUNK_BYTES.get(jax.default_backend(), _DEVICE_BYTES)
    return max(1, budget // max(1, per_particle))
