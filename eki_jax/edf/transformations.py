"""EDF-G and EDF-H as optax transformations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from eki_jax._checks import NOT_NEGATIVE, POSITIVE, arrays, pair, real, schedule, whole
from eki_jax._types import Array, Batch, Params, Schedule
from eki_jax.edf import _vectors as vectors
from eki_jax.edf.acceleration import Acceleration
from eki_jax.edf.minres import minres, one_step
from eki_jax.edf.objective import Objective, Operator
from eki_jax.kernel.particles import check_like

Damping = tuple[float, float]
Curvature = Callable[[Objective, Params, Batch], Operator]


class EdfState(NamedTuple):
    """State of :func:`edf_g` and :func:`edf_h`.

    Attributes:
        count: number of steps taken, int32.
        velocity: velocity of the acceleration, a pytree like the parameters; None without acceleration.
    """

    count: Array  # type: ignore[assignment]  # hides tuple.count, as in optax
    velocity: Any


def edf_g(
    learning_rate: Schedule,
    krylov_order: int = 1,
    damping: Damping | None = (1.0, 1.0),
    acceleration: Acceleration | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Exponentially decaying flow of type G: Euler steps of ``(G + lambda I) dw/dt = -grad L``.

    ``G = J^T H_L J`` is the Gauss-Newton matrix. The linear system is projected onto the Krylov space of order
    ``krylov_order`` by :func:`minres`: order 1 is a gradient step whose length the curvature sets, a higher order
    comes nearer to Gauss-Newton. ``lambda = a ||grad L||^b`` vanishes with the gradient, so that convergence stays
    exponential. ("Exponentially Decaying Flows for Optimization in Deep Learning", 2018, equations 21-25 and
    Algorithms 1 and 2.)

    ``update`` takes two more keyword arguments: ``objective``, an :class:`Objective`, and ``batch``, the ``(x,
    targets)`` at which the curvature is taken (that of the gradient, as a rule). Further ones are ignored.

    Args:
        learning_rate: factor eta > 0 of a step, or a schedule of the step count; 1 is the full Newton-like step.
        krylov_order: order k >= 1 of the Krylov space, the number of products with the matrix. A step costs about 1 + k
            gradients.
        damping: pair ``(a, b)`` of ``lambda = a ||grad L||^b``, both >= 0; None for no damping. The paper takes (1, 1)
            for mini-batches and None for the full batch.
        acceleration: way to carry the velocity, :func:`heavy_ball` (W1) or :func:`nesterov` (W2); None for none.

    Returns:
        An ``optax.GradientTransformationExtraArgs``. Updates have the parameters' types.

    Raises:
        ValueError: ``krylov_order`` < 1, a ``damping`` that is not two numbers >= 0; in ``update``: no ``params``.
        TypeError: arguments of another type; in ``update``: no ``objective`` or no ``batch``.

    >>> import jax.numpy as jnp
    >>> import optax
    >>> from eki_jax import edf
    >>> objective = edf.Objective(lambda w, x: x @ w, lambda outputs, y: 0.5 * jnp.mean((outputs - y) ** 2))
    >>> batch = (jnp.array([[1.0, 0.0], [0.0, 2.0]]), jnp.array([1.0, 2.0]))
    >>> optimizer = edf.edf_g(learning_rate=1.0, krylov_order=2, damping=None)
    >>> params = jnp.zeros(2)
    >>> state = optimizer.init(params)
    >>> value, gradient = objective.value_and_grad(params, batch)
    >>> updates, state = optimizer.update(gradient, state, params, objective=objective, batch=batch)
    >>> [round(float(entry), 4) for entry in optax.apply_updates(params, updates)]
    [1.0, 1.0]
    """
    return _edf(Objective.gauss_newton, learning_rate, krylov_order, damping, acceleration)


def edf_h(
    learning_rate: Schedule,
    krylov_order: int = 1,
    damping: Damping | None = (1.0, 1.0),
    acceleration: Acceleration | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Exponentially decaying flow of type H: :func:`edf_g` with the true Hessian in place of ``G``.

    The Hessian may be indefinite: the flow lets the *gradient* decay, so that it also converges to saddle points and
    maxima, and a single step may go uphill. Products are by forward-over-reverse differentiation. (The paper's
    equation 20.)

    Args:
        learning_rate: factor eta > 0 of a step, or a schedule of the step count; 1 is the full Newton step.
        krylov_order: order k >= 1 of the Krylov space, the number of products with the Hessian.
        damping: pair ``(a, b)`` of ``lambda = a ||grad L||^b``, both >= 0; None for no damping. It shifts an indefinite
            spectrum, it does not make it positive.
        acceleration: way to carry the velocity, :func:`heavy_ball` (W1) or :func:`nesterov` (W2); None for none.

    Returns:
        An ``optax.GradientTransformationExtraArgs`` whose ``update`` takes ``objective`` and ``batch``.

    Raises:
        ValueError: ``krylov_order`` < 1, a ``damping`` that is not two numbers >= 0; in ``update``: no ``params``.
        TypeError: arguments of another type; in ``update``: no ``objective`` or no ``batch``.

    >>> import jax.numpy as jnp
    >>> from eki_jax import edf
    >>> objective = edf.Objective(lambda w, x: w, lambda w, y: jnp.sum(w**2 * jnp.array([1.0, 2.0])))
    >>> optimizer = edf.edf_h(learning_rate=1.0, krylov_order=2, damping=None)
    >>> params, batch = jnp.array([3.0, -1.0]), (jnp.zeros(1), jnp.zeros(1))
    >>> gradient = objective.value_and_grad(params, batch)[1]
    >>> updates, _ = optimizer.update(
    ...     gradient, optimizer.init(params), params, objective=objective, batch=batch)
    >>> [round(float(entry), 4) for entry in updates]  # one Newton step, to the minimum
    [-3.0, 1.0]
    """
    return _edf(Objective.hessian, learning_rate, krylov_order, damping, acceleration)


def _edf(
    matrix: Curvature,
    learning_rate: Schedule,
    krylov_order: int,
    damping: Damping | None,
    acceleration: Acceleration | None,
) -> optax.GradientTransformationExtraArgs:
    order, damping = checked_order(krylov_order), checked_damping(damping)
    rate_of = schedule("learning_rate", learning_rate, POSITIVE)
    if acceleration is not None and not isinstance(acceleration, Acceleration):
        raise TypeError(f"acceleration: {acceleration!r}; wanted None, heavy_ball(...) or nesterov(...)")

    def init(params: Params) -> EdfState:
        return EdfState(jnp.zeros((), jnp.int32), None if acceleration is None else acceleration.init(params))

    def update(
        updates: Params,
        state: EdfState,
        params: Params | None = None,
        *,
        objective: Objective | None = None,
        batch: Batch | None = None,
        **extra_args: Any,
    ) -> tuple[Params, EdfState]:
        del extra_args
        if params is None:
            raise ValueError("params: None; wanted the point at which the gradient was taken, as update(..., params)")
        if objective is None or batch is None:
            missing = "objective" if objective is None else "batch"
            raise TypeError(
                f"{missing}: None; wanted it as a keyword of update(), because the curvature is taken of it"
            )
        check_objective(objective)
        arrays("params", params, floating=True, some=True)
        check_like(
            arrays("updates", updates, floating=True),
            params,
            name="updates",
            other="params",
            hint="the gradient's shapes",
        )
        direction = project(matrix(objective, params, batch), updates, order, damping)
        rate = rate_of(state.count)
        step = vectors.combine((-rate, direction))
        velocity = state.velocity
        if acceleration is not None:
            step, velocity = acceleration.update(step, velocity, state.count)
        # A batch that gives no finite step moves nothing, and is not counted.
        ok = jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((step, velocity))]).all()
        step = jax.tree.map(lambda leaf: jnp.where(ok, leaf, jnp.zeros((), leaf.dtype)), step)
        velocity = jax.tree.map(lambda new, old: jnp.where(ok, new, old), velocity, state.velocity)
        return step, EdfState(jnp.where(ok, optax.safe_increment(state.count), state.count), velocity)

    return optax.GradientTransformationExtraArgs(init, update)


def project(matrix: Operator, gradient: Params, order: int, damping: Damping | None) -> Params:
    """``P_k(A + lambda I, gradient)``: the minimum-residual solution in the Krylov space of that order."""
    operator = matrix
    if damping is not None:
        factor, exponent = damping
        shift = factor * vectors.norm(gradient) ** exponent
        operator = lambda vector: vectors.combine((1, matrix(vector)), (shift, vector))
    return one_step(operator, gradient) if order == 1 else minres(operator, gradient, order)[0]


def checked_order(krylov_order: int) -> int:
    """``krylov_order`` as an integer of at least 1."""
    return whole("krylov_order", krylov_order)


def checked_damping(damping: Damping | None) -> Damping | None:
    """``damping`` as a pair of numbers that are not negative, or None."""
    if damping is None:
        return None
    factor, exponent = pair("damping", damping, "(a, b), or None")
    return real("damping[0]", factor, NOT_NEGATIVE), real("damping[1]", exponent, NOT_NEGATIVE)


def check_objective(objective: Any) -> None:
    """Raise TypeError unless it is an :class:`Objective`."""
    if not isinstance(objective, Objective):
        raise TypeError(f"objective: {objective!r}; wanted an edf.Objective of the model and its loss")
