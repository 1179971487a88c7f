"""The step that all discretizations of the flow share.

A discretization is what it does with a block of columns; everything else stands here: evaluating the model, losses and
cotangents, particles that failed, the step size, the walk in place, and what is reported.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Unpack

import jax
import jax.numpy as jnp

from eki_jax._checks import NOT_NEGATIVE, function, pair, real
from eki_jax._types import Array, Batch, Ensemble, ForwardFn, LossFn, Params, StepSizeFn
from eki_jax.kernel.axes import Axis
from eki_jax.kernel.health import particle_mean
from eki_jax.kernel.particles import ensemble_size, local_size
from eki_jax.kernel.products import Products
from eki_jax.losses.shortcut import in_place_by_shortcut
from eki_jax.losses.support import evaluate_support, supported_outputs, value_and_cotangents
from eki_jax.solvers.protocol import (
    Info,
    Options,
    Settings,
    Solver,
    bad_targets,
    check_rows,
    check_state,
    compiled,
    given,
    health,
    never_done,
    one_pass_a_particle,
    take_step,
)
from eki_jax.solvers.reasons import Reason


def discretization(
    forward: ForwardFn | None,
    loss: LossFn,
    step_size: StepSizeFn,
    start: Callable[[Ensemble], Any],
    move: Callable[[Array, Array], Callable[..., tuple[Array, ...]]],
    **settings: Unpack[Settings],
) -> Solver:
    r"""A discretization of the flow ``du_j/dt = -C_uG grad L(G(u_j), y)`` from what it does with a block of columns.

    A state is ``(*trees, count)``: the ensemble where outputs are wanted, pytrees of its structure that the method
    remembers, and the number of steps taken, int32. In each step the kernel hands blocks of columns, (J, w), to

    .. math:: (u, \dots) \leftarrow \mathrm{move}(dt, n)(C_{uG} \nabla L, u, \dots)

    which works element by element; that is what keeps a step in place. Blocks come and go in the dtype in which the
    kernel sums, and are stored in the trees' own.

    A state that is a NamedTuple may have members that say more: ``position``, the particles to predict with where these
    are not the first tree; ``with_ensemble(ensemble)``, the state with other particles where more than the first tree
    changes with them; ``particle(row)``, the particle that a row of the first tree stands for, affine in it.

    Args:
        forward: function ``forward(params, x) -> outputs`` of one particle; None where only ``update`` is used.
        loss: function ``loss(outputs, targets) -> scalar`` of one particle.
        step_size: function ``step_size(drift_norm, J, count) -> dt``, such as :func:`eki_jax.frobenius_step_size`.
        start: function ``start(ensemble) -> state``.
        move: function ``move(dt, count) -> blocks``, where ``blocks(direction, *blocks) -> new blocks``, one for each
            tree of the state and in its shape.
        **settings: keywords that all discretizations share, see :class:`Settings`.

    Returns:
        A :class:`Solver`. A step works in place if its state is donated.

    Raises:
        TypeError: ``loss``, ``step_size``, ``start`` or ``move`` is not a function; an unknown setting; from ``init``,
            leaves that are not floating-point.
        ValueError: from ``step`` and ``update``, outputs or targets that do not fit.

    >>> from typing import NamedTuple
    >>> import jax, jax.numpy as jnp
    >>> import eki_jax
    >>> class State(NamedTuple):
    ...     ensemble: jax.Array
    ...     count: jax.Array
    >>> solver = discretization(
    ...     lambda u, x: x * u,
    ...     eki_jax.squared_error(),
    ...     eki_jax.constant_step_size(0.1),
    ...     start=lambda ensemble: State(ensemble, jnp.zeros((), jnp.int32)),
    ...     move=lambda dt, count: lambda d, u: (u - dt * d,),
    ... )
    >>> state, info = solver.step(solver.init(jnp.array([[1.0], [3.0]])), (2.0, jnp.array([8.0])))
    >>> state.ensemble.ravel()  # variance 1, times 2 (2 u - 8)
    Array([2.2, 3.4], dtype=float32)

    Kovachki and Stuart, arXiv:1808.03620, section 4.3.3.
    """
    options = Options.of(settings)
    if forward is not None:
        function("forward", forward, "a model, forward(params, x) -> outputs", arguments=2)
    function("loss", loss, "a function of outputs and targets", arguments=2)
    function("step_size", step_size, "a function; constant_step_size(dt) makes one", arguments=3)
    function("start", start, arguments=1)
    function("move", move, arguments=2)
    targets_spread = Axis() if options.targets_axis is None else options.axis

    def check_kind(state: Any) -> None:
        if not isinstance(state, tuple) or not state:
            raise TypeError(f"state: a {type(state).__name__}; wanted what init makes")
        check_state(state, jax.eval_shape(start, state[0]), getattr(start, "__qualname__", "this").split(".")[0])

    def init(ensemble: Ensemble) -> Any:
        ensemble_size(ensemble, axis_name=options.axis_name)
        return start(ensemble)

    def step(state: Any, batch: Batch) -> tuple[Any, Info]:
        check_kind(state)
        x, targets = pair("batch", batch)

        def taken(loss: LossFn, targets: Any, state: Any) -> tuple[Any, Info]:
            entries, reduced = evaluate_support(
                given(forward),
                loss,
                state[0],
                x,
                targets,
                targets_axis=options.targets_axis,
                chunk_size=options.chunk_size,
                axis=options.axis,
                particle=getattr(state, "particle", None),
                precision=options.precision,
            )
            return advance(state, entries, reduced, targets)

        return in_place_by_shortcut(taken, loss, targets, state, axis=targets_spread)

    def update(state: Any, outputs: Any, targets: Any) -> tuple[Any, Info]:
        check_kind(state)
        check_rows(outputs, local_size(state[0], name="ensemble"))

        def taken(loss: LossFn, targets: Any, state: Any) -> tuple[Any, Info]:
            entries, reduced = supported_outputs(loss, outputs, targets, targets_axis=options.targets_axis)
            return advance(state, entries, reduced, targets)

        return in_place_by_shortcut(taken, loss, targets, state, axis=targets_spread)

    def advance(state: Any, entries: Any, reduced: LossFn, targets: Any) -> tuple[Any, Info]:
        *trees, count = state
        losses, cotangents = value_and_cotangents(reduced, entries, targets, targets_axis=options.targets_axis)
        healthy = health(entries, cotangents, losses, tuple(trees), options)
        products = Products.of(
            trees[0],
            entries,
            cotangents,
            healthy=healthy,
            axis=options.axis,
            contraction=options.contraction,
            communication=options.communication,
            precision=options.precision,
        )
        # From the products that the move uses: the step size costs no pass over the ensemble of its own.
        norm = products.norm()
        dt = jnp.asarray(
            real("step_size", step_size(norm, jnp.asarray(products.size, norm.dtype), count), NOT_NEGATIVE), norm.dtype
        )
        refused = (Reason.TARGETS, bad_targets(targets, options.targets_axis))
        moved, info = take_step(
            products, tuple(trees), move(dt, count), losses, dt, norm, healthy, count, options, refused
        )
        return _like(state, (*moved, count + info.moved.astype(count.dtype))), info

    def ensemble(state: Any) -> Ensemble:
        return jax.vmap(state.particle)(state[0]) if hasattr(state, "particle") else state[0]

    def estimate(state: Any) -> Params:
        if hasattr(state, "particle"):
            return state.particle(particle_mean(state[0], axis_name=options.axis_name))
        return particle_mean(getattr(state, "position", state[0]), axis_name=options.axis_name)

    def with_ensemble(state: Any, ensemble: Ensemble) -> Any:
        own = getattr(state, "with_ensemble", None)
        return _like(state, (ensemble, *state[1:])) if own is None else own(ensemble)

    return compiled(Solver(init, step, update, ensemble, estimate, with_ensemble, never_done, one_pass_a_particle))


def _like(state: Any, values: tuple[Any, ...]) -> Any:
    """``values`` as a state of the same kind: a NamedTuple or a plain tuple."""
    return state._make(values) if hasattr(state, "_make") else tuple(values)
