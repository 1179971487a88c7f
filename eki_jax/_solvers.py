"""Discretizations of the flow: Euler, and Nesterov's accelerated steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from eki_jax._costs import Communication
from eki_jax._covariance import Contraction, Products, descended
from eki_jax._forward import evaluate_support
from eki_jax._tree import ensemble_size, finite_particles, local_size
from eki_jax._types import Array, Batch, Ensemble, ForwardFn, LossFn, StepSizeFn
from eki_jax.failures import FailurePolicy, keep_failed
from eki_jax.losses import supported_outputs, value_and_cotangents
from eki_jax.step_sizes import frobenius_step_size, momentum_schedule


class EulerState(NamedTuple):
    """State of :func:`euler`.

    Attributes:
        ensemble: the particles; where the outputs of the next step are wanted.
        count: the number of steps taken, int32.
    """

    ensemble: Ensemble
    count: Array  # type: ignore[assignment]  # hides tuple.count, as in optax

    @property
    def position(self) -> Ensemble:
        """The particles to predict with."""
        return self.ensemble

    def with_ensemble(self, ensemble: Ensemble) -> EulerState:
        """The state with other particles, after noise for example."""
        return self._replace(ensemble=ensemble)


class NesterovState(NamedTuple):
    """State of :func:`nesterov`.

    The momentum is kept as such: as the difference of two stored positions it would lose most of its digits.

    Attributes:
        ensemble: v, the extrapolated particles; where the outputs of the next step are wanted.
        lookahead: v - u, how far they are ahead of the positions.
        count: the number of steps taken, int32.
    """

    ensemble: Ensemble
    lookahead: Ensemble
    count: Array  # type: ignore[assignment]  # hides tuple.count, as in optax

    @property
    def position(self) -> Ensemble:
        """u, the particles to predict with."""
        return jax.tree.map(lambda v, m: v - m, self.ensemble, self.lookahead)

    def with_ensemble(self, ensemble: Ensemble) -> NesterovState:
        """The state with other extrapolated particles and the same positions: for noise on the momenta."""
        lookahead = jax.tree.map(lambda m, new, v: m + (new - v), self.lookahead, ensemble, self.ensemble)
        return self._replace(ensemble=ensemble, lookahead=lookahead)


State = EulerState | NesterovState


class Info(NamedTuple):
    """What a person wants to see of a step; all of it before the step moved anything.

    Attributes:
        losses: every particle's loss, shape (J,).
        step_size: dt, in units of the vector field's time; the paper's h is dt / J.
        drift_norm: the paper's ||D||_F.
        spread: sqrt(tr C(u)), the root mean square distance of a particle from the mean, in parameter units.
        is_finite: whether every loss, the drift norm and the step size were finite.
        failed: the number of particles whose outputs or loss were not finite.
    """

    losses: Array
    step_size: Array
    drift_norm: Array
    spread: Array
    is_finite: Array
    failed: Array


class Solver(NamedTuple):
    """A discretization, as three pure functions.

    Attributes:
        init: ``init(ensemble) -> state``.
        step: ``step(state, (x, targets)) -> (state, info)``; evaluates the model and updates.
        update: ``update(state, outputs, targets) -> (state, info)``, for models that run somewhere else: evaluate
            ``state.ensemble`` there and hand in the outputs, shape (J, ...).
    """

    init: Callable[[Ensemble], Any]
    step: Callable[[Any, Batch], tuple[Any, Info]]
    update: Callable[[Any, Any, Any], tuple[Any, Info]]


def euler(
    forward: ForwardFn | None,
    loss: LossFn,
    step_size: StepSizeFn = frobenius_step_size(h0=2.0, eps=0.5),  # noqa: B008
    *,
    axis_name: str | None = None,
    failures: FailurePolicy = keep_failed(),  # noqa: B008
    targets_axis: int | None = None,
    chunk_size: int | None = None,
    contraction: Contraction | None = None,
    communication: Communication | None = None,
    precision: Any = None,
) -> Solver:
    r"""Forward Euler, ``u <- u - dt C_uG grad L(G(u), y)``: the paper's EKI (arXiv:1808.03620, section 4.3.3).

    Args:
        forward: ``forward(params, x) -> outputs`` for one particle; None where only ``update`` is used.
        loss: ``loss(outputs, targets) -> scalar`` for one particle.
        step_size: ``step_size(drift_norm, J, count) -> dt``, such as :func:`frobenius_step_size`.
        axis_name: mapped axis over which the particles are spread (vmap, pmap, shard_map).
        failures: what to do about particles that turn non-finite; see :mod:`eki_jax.failures`.
        targets_axis: 0 where every particle has its own targets (perturbed data), shape (J, ...); else None.
        chunk_size: particles evaluated at a time; from a memory budget by default.
        contraction: order of the kernel's products, see :func:`direction`; the cheaper one by default.
        communication: how devices share their particles, see :func:`direction`; the cheapest by default.
        precision: of the kernel's matrix products.

    Returns:
        A :class:`Solver` with :class:`EulerState`. A step works in place if its state is donated.

    Raises:
        TypeError: ``step_size`` is not a function; an ensemble with leaves that are not floating-point.
        ValueError: outputs or targets that do not fit, from ``step`` and ``update``.

    >>> import jax.numpy as jnp
    >>> from eki_jax import losses
    >>> solver = euler(lambda u, x: x * u, losses.squared_error())
    >>> state = solver.init(jnp.array([[1.0], [3.0]]))
    >>> for _ in range(10):
    ...     state, info = solver.step(state, (2.0, jnp.array([8.0])))
    >>> bool(jnp.allclose(state.ensemble, 4.0, atol=0.2))
    True
    """
    options = _Options(loss, step_size, axis_name, failures, targets_axis, contraction, communication, precision)

    def init(ensemble: Ensemble) -> EulerState:
        ensemble_size(ensemble, axis_name=axis_name)
        return EulerState(ensemble, jnp.zeros((), jnp.int32))

    def advance(state: EulerState, entries: Any, loss: LossFn, targets: Any) -> tuple[EulerState, Info]:
        def move(dt: Array) -> Callable[..., tuple[Array, ...]]:
            return lambda d, u: (descended(u, dt, d),)

        (ensemble,), info = _advance(options, move, (state.ensemble,), entries, loss, targets, state.count)
        return EulerState(ensemble, state.count + 1), info

    return Solver(init, _step(forward, options, advance, chunk_size), _update(options, advance))


def nesterov(
    forward: ForwardFn | None,
    loss: LossFn,
    step_size: StepSizeFn = frobenius_step_size(h0=2.0, eps=0.5),  # noqa: B008
    momentum: float | Callable[[Array], Any] = 0.9,
    *,
    axis_name: str | None = None,
    failures: FailurePolicy = keep_failed(),  # noqa: B008
    targets_axis: int | None = None,
    chunk_size: int | None = None,
    contraction: Contraction | None = None,
    communication: Communication | None = None,
    precision: Any = None,
) -> Solver:
    r"""Nesterov's steps, the paper's MEKI (arXiv:1808.03620, section 4.3.3).

    .. math:: u_{n+1} = v_n - dt\, C_{uG}(v_n) \nabla L(G(v_n), y), \qquad
              v_{n+1} = u_{n+1} + \lambda_n (u_{n+1} - u_n)

    Args:
        forward: ``forward(params, x) -> outputs`` for one particle; None where only ``update`` is used.
        loss: ``loss(outputs, targets) -> scalar`` for one particle.
        step_size: ``step_size(drift_norm, J, count) -> dt``.
        momentum: lambda in [0, 1), or a schedule of the step count n = 0, 1, ..., such as :func:`su_boyd_candes`.
        axis_name: mapped axis over which the particles are spread.
        failures: what to do about particles that turn non-finite.
        targets_axis: 0 where every particle has its own targets; else None.
        chunk_size: particles evaluated at a time; from a memory budget by default.
        contraction: order of the kernel's products; the cheaper one by default.
        communication: how devices share their particles; the cheapest by default.
        precision: of the kernel's matrix products.

    Returns:
        A :class:`Solver` with :class:`NesterovState`: twice the memory of :func:`euler`, and no more if donated.

    Raises:
        TypeError: ``step_size`` is not a function; an ensemble with leaves that are not floating-point.
        ValueError: ``momentum`` outside [0, 1); outputs or targets that do not fit.

    >>> import jax.numpy as jnp
    >>> from eki_jax import losses
    >>> solver = nesterov(lambda u, x: x * u, losses.squared_error(), momentum=0.5)
    >>> state = solver.init(jnp.array([[1.0], [3.0]]))
    >>> for _ in range(10):
    ...     state, info = solver.step(state, (2.0, jnp.array([8.0])))
    >>> bool(jnp.allclose(state.position, 4.0, atol=0.2))
    True
    """
    options = _Options(loss, step_size, axis_name, failures, targets_axis, contraction, communication, precision)
    schedule = momentum_schedule(momentum)

    def init(ensemble: Ensemble) -> NesterovState:
        ensemble_size(ensemble, axis_name=axis_name)
        return NesterovState(ensemble, jax.tree.map(jnp.zeros_like, ensemble), jnp.zeros((), jnp.int32))

    def advance(state: NesterovState, entries: Any, loss: LossFn, targets: Any) -> tuple[NesterovState, Info]:
        factor = schedule(state.count)

        def move(dt: Array) -> Callable[..., tuple[Array, ...]]:
            def blocks(d: Array, v: Array, m: Array) -> tuple[Array, Array]:
                g = dt.astype(d.dtype) * d
                ahead = jnp.asarray(factor, d.dtype) * (m.astype(d.dtype) - g)  # lambda (u_{n+1} - u_n)
                return (v.astype(d.dtype) + (ahead - g)).astype(v.dtype), ahead.astype(m.dtype)

            return blocks

        trees = (state.ensemble, state.lookahead)
        (ensemble, lookahead), info = _advance(options, move, trees, entries, loss, targets, state.count)
        return NesterovState(ensemble, lookahead, state.count + 1), info

    return Solver(init, _step(forward, options, advance, chunk_size), _update(options, advance))


class _Options(NamedTuple):
    """What the discretizations share."""

    loss: LossFn
    step_size: StepSizeFn
    axis_name: str | None
    failures: FailurePolicy
    targets_axis: int | None
    contraction: Contraction | None
    communication: Communication | None
    precision: Any


def _step(
    forward: ForwardFn | None, options: _Options, advance: Callable[..., Any], chunk_size: int | None
) -> Callable[..., Any]:
    def step(state: Any, batch: Batch) -> tuple[Any, Info]:
        if forward is None:
            raise TypeError("forward: None; wanted a model for step(), or call update() with the outputs")
        x, targets = batch
        entries, loss = evaluate_support(
            forward, options.loss, state.ensemble, x, targets, targets_axis=options.targets_axis, chunk_size=chunk_size
        )
        return advance(state, entries, loss, targets)

    return step


def _update(options: _Options, advance: Callable[..., Any]) -> Callable[..., Any]:
    def update(state: Any, outputs: Any, targets: Any) -> tuple[Any, Info]:
        found, size = local_size(outputs, name="outputs"), local_size(state.ensemble, name="ensemble")
        if found != size:
            raise ValueError(
                f"outputs: leading axis {found}, but the ensemble has {size} particles; wanted ({size}, ...)"
            )
        entries, loss = supported_outputs(options.loss, outputs, targets, targets_axis=options.targets_axis)
        return advance(state, entries, loss, targets)

    return update


def _advance(
    options: _Options,
    move: Callable[[Array], Callable[..., tuple[Array, ...]]],
    trees: tuple[Ensemble, ...],
    entries: Any,
    loss: LossFn,
    targets: Any,
    count: Array,
) -> tuple[tuple[Ensemble, ...], Info]:
    """The part of a step that all discretizations share; ``move(dt)`` is what each does with a block.

    ``entries`` are the outputs on which ``loss`` depends.
    """
    if not callable(options.step_size):
        raise TypeError(f"step_size: {options.step_size!r}; wanted a function; constant_step_size(dt) makes one")
    losses, cotangents = value_and_cotangents(loss, entries, targets, targets_axis=options.targets_axis)
    healthy = finite_particles((losses, entries, cotangents))
    products = Products.of(
        trees[0],
        entries,
        cotangents,
        healthy=healthy,
        axis_name=options.axis_name,
        contraction=options.contraction,
        communication=options.communication,
        precision=options.precision,
    )
    norm = products.norm()
    dt = jnp.asarray(options.step_size(norm, products.size, count), norm.dtype)
    ok = jnp.isfinite(norm) & jnp.isfinite(dt)
    moved, variance = products.map_blocks(move(dt), *trees, when=ok)
    moved = tuple(options.failures.apply(tree, healthy, count, options.axis_name) for tree in moved)
    failed = jnp.sum(~healthy, dtype=jnp.int32)
    if options.axis_name is not None:
        failed = jax.lax.psum(failed, options.axis_name)
    return moved, Info(losses, dt, norm, jnp.sqrt(variance), ok & (failed == 0), failed)
