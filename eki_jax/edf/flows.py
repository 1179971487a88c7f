"""The continuous flows as vector fields ``field(t, y, args)``, the signature that diffrax wants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from eki_jax._checks import arrays, function, pair
from eki_jax._types import Array, Batch, Params, PyTree
from eki_jax.edf import _vectors as vectors
from eki_jax.edf.objective import Objective
from eki_jax.edf.transformations import Curvature, Damping, check_objective, checked_damping, checked_order, project

Field = Callable[[Any, PyTree, Any], PyTree]


def exponential_decay(t: Array) -> Array:
    """``rho(t) = e^-t``: the residual decays exponentially and vanishes as t goes to infinity.

    >>> import jax.numpy as jnp
    >>> round(float(exponential_decay(jnp.array(1.0))), 3)
    0.368
    """
    return jnp.exp(-arrays("t", t, some=True))


def linear_decay(t: Array) -> Array:
    """``rho(t) = 1 - t``: the motion along the geodesic at constant speed; the residual vanishes at t = 1.

    >>> import jax.numpy as jnp
    >>> linear_decay(jnp.array([0.0, 0.25]))
    Array([1.  , 0.75], dtype=float32)
    """
    return 1 - arrays("t", t, some=True)


def equation_flow(residual: Callable[[Params], PyTree], decay: Callable[[Array], Array] = exponential_decay) -> Field:
    r"""The flow of ``F(w) = 0`` along which ``F(w(t)) = rho(t) F(w(0))``.

    The field solves ``J dw/dt = chi(t) F`` with ``J`` the Jacobian of ``F`` and ``chi = d ln(rho) / dt``; its Euler
    step is a damped Newton step. ``J`` is formed and solved densely: this flow is for studying small systems.
    ("Exponentially Decaying Flows for Optimization in Deep Learning", 2018, Theorem 2.2 and Definition 2.3.)

    Args:
        residual: function ``residual(params) -> F``, a pytree with as many numbers as ``params``.
        decay: function ``decay(t) -> rho``, differentiable, with ``rho(0) = 1``; :func:`exponential_decay` gives the
            exponentially decaying flow, :func:`linear_decay` the geodesic.

    Returns:
        ``field(t, w, args)``; ``args`` is ignored.

    Raises:
        TypeError: ``residual`` or ``decay`` is no function; when called, ``w`` is not floating-point.
        ValueError: when called, ``F`` and ``w`` do not have as many numbers.

    >>> import jax.numpy as jnp
    >>> field = equation_flow(lambda w: 2.0 * w)
    >>> field(0.0, jnp.array([3.0, 5.0]), None)
    Array([-3., -5.], dtype=float32)
    """
    _check_residual(residual)
    function("decay", decay, "a function decay(t)", arguments=1)

    def field(t: Any, params: Params, args: Any = None) -> Params:
        del args
        flat, unravel = ravel_pytree(_numbers("params", params))
        flat_residual = lambda vector: ravel_pytree(residual(unravel(vector)))[0]
        value, jacobian = flat_residual(flat), jax.jacfwd(flat_residual)(flat)
        _check_sizes(value, flat)
        rate = jax.grad(lambda time: jnp.log(decay(time)))(jnp.asarray(t, flat.dtype))
        return unravel(rate * jnp.linalg.solve(jacobian, value))

    return field


def geodesic_flow(residual: Callable[[Params], PyTree]) -> Field:
    r"""Free motion under the metric ``G = J^T J`` that ``F`` induces: Hamilton's equations of position and momentum.

    ``dw/dt = G^-1 p`` and ``dp/dt = grad_w (|J(w) v|^2 / 2)`` at the velocity ``v = dw/dt`` held fixed. Started with
    the momentum of :func:`geodesic_momentum` it runs along the geodesic to the root: ``F(w(t)) = (1 - t) F(w(0))``.
    (The paper's equations 1-4 and Theorem 2.1.)

    Args:
        residual: function ``residual(params) -> F``, a pytree with as many numbers as ``params``.

    Returns:
        ``field(t, (w, p), args)``; ``args`` is ignored.

    Raises:
        TypeError: ``residual`` is no function; when called, ``w`` or ``p`` is not floating-point.
        ValueError: when called, ``F``, ``w`` and ``p`` do not have as many numbers.

    >>> import jax.numpy as jnp
    >>> residual = lambda w: 2.0 * w
    >>> w = jnp.array([3.0])
    >>> geodesic_flow(residual)(0.0, (w, geodesic_momentum(residual, w)), None)
    (Array([-3.], dtype=float32), Array([0.], dtype=float32))
    """
    _check_residual(residual)

    def field(t: Any, position_and_momentum: tuple[Params, Params], args: Any = None) -> tuple[Params, Params]:
        del t, args
        position, momentum = pair("position_and_momentum", position_and_momentum, "(w, p)")
        flat, unravel = ravel_pytree(_numbers("position", position))
        flat_momentum, _ = ravel_pytree(_numbers("momentum", momentum))
        flat_residual = lambda vector: ravel_pytree(residual(unravel(vector)))[0]
        _check_sizes(flat_momentum, flat, name="momentum")
        _check_sizes(jax.eval_shape(flat_residual, flat), flat)
        jacobian = jax.jacfwd(flat_residual)(flat)
        velocity = jnp.linalg.solve(jacobian, jnp.linalg.solve(jacobian.T, flat_momentum))

        def kinetic_energy(point: Array) -> Array:
            image = jax.jvp(flat_residual, (point,), (velocity,))[1]
            return 0.5 * jnp.vdot(image, image)

        return unravel(velocity), unravel(jax.grad(kinetic_energy)(flat))

    return field


def geodesic_momentum(residual: Callable[[Params], PyTree], params: Params) -> Params:
    """``p = -J^T F``, with which :func:`geodesic_flow` reaches the root at t = 1. (The paper's equation 3.)

    Args:
        residual: function ``residual(params) -> F``, a pytree with as many numbers as ``params``.
        params: start of the flow.

    Returns:
        The momentum, a pytree like ``params``.

    Raises:
        TypeError: ``residual`` is no function, or ``params`` are not floating-point.

    >>> import jax.numpy as jnp
    >>> geodesic_momentum(lambda w: 2.0 * w, jnp.array([3.0]))
    Array([-12.], dtype=float32)
    """
    value, pullback = jax.vjp(_check_residual(residual), _numbers("params", params))
    return jax.tree.map(jnp.negative, pullback(value)[0])


def edf_g_flow(objective: Objective, krylov_order: int, damping: Damping | None = None) -> Field:
    r"""EDF-G in continuous time: ``(G + lambda I) dw/dt = -grad L``, projected onto a Krylov space.

    With ``krylov_order`` at least the number of parameters and no damping it is the paper's flow itself. Where the
    model has as many outputs as parameters and a squared error, its residuals decay as ``e^-t``. (The paper's
    Definition 3.1 and equations 21, 22 and 24.)

    Args:
        objective: model and loss whose matrix and gradient are taken.
        krylov_order: order of the Krylov space, at least 1.
        damping: pair ``(a, b)`` of ``lambda = a ||grad L||^b``; None for no damping.

    Returns:
        ``field(t, params, batch)``.

    Raises:
        TypeError: ``objective`` is no :class:`Objective`, ``krylov_order`` no whole number, ``damping`` no pair.
        ValueError: ``krylov_order`` < 1, a ``damping`` that is not two numbers >= 0.

    >>> import jax.numpy as jnp
    >>> from eki_jax import edf
    >>> objective = edf.Objective(lambda w, x: x * w, lambda outputs, y: 0.5 * jnp.sum((outputs - y) ** 2))
    >>> batch = (jnp.array([1.0, 4.0]), jnp.array([1.0, 4.0]))
    >>> field = edf_g_flow(objective, krylov_order=2)
    >>> [round(float(entry), 4) for entry in field(0.0, jnp.zeros(2), batch)]
    [1.0, 1.0]
    """
    return _objective_flow(Objective.gauss_newton, objective, krylov_order, damping)


def edf_h_flow(objective: Objective, krylov_order: int, damping: Damping | None = None) -> Field:
    r"""EDF-H in continuous time: ``(H + lambda I) dw/dt = -grad L``; the gradient decays as ``e^-t``.

    (The paper's Definition 3.1 and equation 20.)

    Args:
        objective: model and loss whose matrix and gradient are taken.
        krylov_order: order of the Krylov space, at least 1; the number of parameters for the paper's flow itself.
        damping: pair ``(a, b)`` of ``lambda = a ||grad L||^b``; None for no damping.

    Returns:
        ``field(t, params, batch)``.

    Raises:
        TypeError: ``objective`` is no :class:`Objective`, ``krylov_order`` no whole number, ``damping`` no pair.
        ValueError: ``krylov_order`` < 1, a ``damping`` that is not two numbers >= 0.

    >>> import jax.numpy as jnp
    >>> from eki_jax import edf
    >>> objective = edf.Objective(lambda w, x: w, lambda w, y: jnp.sum(w**2 * jnp.array([1.0, 2.0])))
    >>> field = edf_h_flow(objective, krylov_order=2)
    >>> [round(float(entry), 4) for entry in field(0.0, jnp.array([3.0, -1.0]), (jnp.zeros(1), jnp.zeros(1)))]
    [-3.0, 1.0]
    """
    return _objective_flow(Objective.hessian, objective, krylov_order, damping)


def _objective_flow(matrix: Curvature, objective: Objective, krylov_order: int, damping: Damping | None) -> Field:
    order, damping = checked_order(krylov_order), checked_damping(damping)
    check_objective(objective)

    def field(t: Any, params: Params, batch: Batch) -> Params:
        del t
        _, gradient = objective.value_and_grad(params, batch)
        return vectors.combine((-1, project(matrix(objective, params, batch), gradient, order, damping)))

    return field


def _check_residual(residual: Any) -> Callable[[Params], PyTree]:
    return function("residual", residual, "a function residual(params) -> F", arguments=1)


def _numbers(name: str, tree: PyTree) -> PyTree:
    return arrays(name, tree, floating=True, some=True)


def _check_sizes(found: Any, unknowns: Array, *, name: str = "residual") -> None:
    if found.size != unknowns.size:
        raise ValueError(f"{name}: {found.size} numbers for {unknowns.size} unknowns; wanted as many")
