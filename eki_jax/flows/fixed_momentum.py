"""What a fixed momentum factor does: gradient flow in faster time, and the corrections of first order in the step.

Heavy ball and Nesterov's method with a fixed factor ``lambda`` and a small step ``h`` are one family,

    u_{n+1} = u_n + lambda (u_n - u_{n-1}) - h g(u_n + a (u_n - u_{n-1})),

with ``a = 0`` for heavy ball and ``a = lambda`` for Nesterov. Each function below is one statement about it
(N. Kovachki and A. Stuart, *Continuous time analysis of momentum methods*, arXiv:1906.04285); ``docs/momentum.md``
derives the constants:

* `gradient_flow`: the limit ``u' = -(1 - lambda)^-1 g(u)``, wrong by O(h);
* `modified_equation`: ``h alpha u'' + (1 - lambda) u' = -g(u)``, wrong by O(h^2);
* `manifold_flow`, `modified_loss`: the flow on the attracting invariant manifold, that of the loss plus
  ``h alpha (1 - lambda)^-2 |g|^2 / 2``, wrong by O(h^2);
* `manifold_velocity`: the manifold itself, ``(u_n - u_{n-1}) / h`` as a function of ``u_n``.

A gradient ``g`` is any function from a pytree of parameters to a pytree like it, as optax takes: ``jax.grad`` of a
loss, or the ensemble's `direction`. It is called ``g(params)``, or ``g(params, args)`` where the field is given
``args``. Fields have the signature of an ODE solver, ``field(t, state, args=None)``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from eki_jax._checks import POSITIVE, SHARE, arrays, function, pair, real, whole
from eki_jax.kernel.particles import check_like

Params = Any
Gradient = Callable[..., Params]
Scalar = float | jax.Array

__all__ = [
    "gradient_flow",
    "inertia",
    "initial_velocity",
    "iterate",
    "manifold_flow",
    "manifold_velocity",
    "modified_equation",
    "modified_loss",
]


def inertia(momentum: Scalar, *, nesterov: bool = False) -> Scalar:
    """The coefficient ``alpha`` of the modified equation: ``(1 + lambda - 2 a (1 - lambda)) / 2``.

    Args:
        momentum: factor ``lambda``, at least 0 and below 1.
        nesterov: flag, True where the gradient is taken at the extrapolated point (``a = lambda``), False where it is
            not (``a = 0``).

    Returns:
        ``alpha``: ``(1 + lambda) / 2`` for heavy ball, ``(1 - lambda + 2 lambda^2) / 2`` for Nesterov.

    Raises:
        ValueError: ``momentum`` outside [0, 1).

    >>> inertia(0.0), round(inertia(0.9), 6), round(inertia(0.9, nesterov=True), 6)
    (0.5, 0.95, 0.86)
    """
    real("momentum", momentum, SHARE)
    lookahead = momentum if nesterov else 0.0
    return 0.5 * (1 + momentum - 2 * lookahead * (1 - momentum))


def iterate(
    gradient: Gradient,
    params: Params,
    step_size: Scalar,
    momentum: Scalar,
    steps: int,
    *,
    nesterov: bool = False,
    previous: Params | None = None,
    args: Any = None,
) -> Params:
    """The iterates ``u_0, ..., u_steps`` of heavy ball or Nesterov's method with a fixed momentum factor.

    For heavy ball these are the parameters of ``optax.sgd(step_size, momentum)``. For Nesterov's method
    ``optax.sgd(..., nesterov=True)`` holds the extrapolated points ``u_n + lambda (u_n - u_{n-1})``, ahead of the
    iterates by ``lambda`` steps of the same flow.

    Args:
        gradient: function ``g(params)`` or ``g(params, args)``.
        params: start ``u_0``, a pytree.
        step_size: step size ``h``, positive.
        momentum: factor ``lambda`` in [0, 1).
        steps: number of steps; the length of the result less one.
        nesterov: flag, True for Nesterov's method, False for heavy ball.
        previous: point ``u_{-1}`` before the start; by default ``u_0``, a start from rest.
        args: arguments passed on to the gradient.

    Returns:
        The pytree with a leading axis of ``steps + 1`` iterates.

    Raises:
        TypeError: params that are not floating-point; a gradient that is no function of them; ``steps`` no whole
            number.
        ValueError: a hyper-parameter out of range, or ``steps`` negative; a gradient that is not like the params.

    >>> trajectory = iterate(lambda u: u, 1.0, 0.1, 0.5, 2)
    >>> [round(float(u), 4) for u in trajectory]
    [1.0, 0.9, 0.76]
    """
    _check_both(momentum, step_size)
    steps = whole("steps", steps, 0)
    lookahead = momentum if nesterov else 0.0

    def step(pair: tuple[Params, Params], _: None) -> tuple[tuple[Params, Params], Params]:
        now, before = pair
        change = _add(now, -1.0, before)
        grads = _call(gradient, _add(now, lookahead, change), args)
        after = _add(_add(now, momentum, change), -step_size, grads)
        return (after, now), after

    first = _arrays("params", params)
    before = first
    if previous is not None:
        check_like(_arrays("previous", previous), first, name="previous", other="params", hint="their shapes")
        before = jax.tree.map(lambda u, old: jnp.asarray(old, u.dtype), first, previous)
    _, tail = jax.lax.scan(step, (first, before), None, length=steps)
    return jax.tree.map(lambda u, rest: jnp.concatenate([u[None], rest]), first, tail)


def gradient_flow(gradient: Gradient, momentum: Scalar = 0.0) -> Callable[..., Params]:
    """Gradient flow in the time of a momentum method: ``u' = -(1 - lambda)^-1 g(u)``.

    ``u(n h)`` and the n-th iterate differ by O(h) on any bounded interval of time: to leading order a fixed
    momentum factor only multiplies the learning rate by ``1 / (1 - lambda)``.

    Args:
        gradient: function ``g(params)`` or ``g(params, args)``.
        momentum: factor ``lambda`` in [0, 1).

    Returns:
        ``field(t, params, args=None)``, the time derivative of ``params``.

    Raises:
        ValueError: ``momentum`` outside [0, 1).

    >>> round(float(gradient_flow(lambda u: 2.0 * u, 0.9)(0.0, 3.0)), 4)
    -60.0
    """
    real("momentum", momentum, SHARE)

    def field(t: Scalar, params: Params, args: Any = None) -> Params:
        del t
        return _scale(-1 / (1 - momentum), _call(gradient, params, args))

    return field


def modified_equation(
    gradient: Gradient, step_size: Scalar, momentum: Scalar, *, nesterov: bool = False
) -> Callable[..., tuple[Params, Params]]:
    """The equation ``h alpha u'' + (1 - lambda) u' = -g(u)`` as a first-order system in ``(u, u')``.

    Its solution differs from the iterates by O(h^2). Start it at `initial_velocity` to follow a method that starts
    from rest; then the order holds once the start has been forgotten, which takes O(h log(1/h)) of time.

    Args:
        gradient: function ``g(params)`` or ``g(params, args)``.
        step_size: step size ``h``, positive.
        momentum: factor ``lambda`` in [0, 1).
        nesterov: flag, True for Nesterov's method, False for heavy ball.

    Returns:
        ``field(t, (params, velocity), args=None)``, the time derivative of the pair.

    Raises:
        ValueError: a hyper-parameter out of range; from the field, a gradient that is not like the params.

    >>> field = modified_equation(lambda u: u, 0.1, 0.5)
    >>> [round(float(part), 4) for part in field(0.0, (1.0, 0.0))]  # u'' = -1 / (h alpha) = -1 / 0.075
    [0.0, -13.3333]
    """
    _check_both(momentum, step_size)
    mass = step_size * inertia(momentum, nesterov=nesterov)

    def field(t: Scalar, state: tuple[Params, Params], args: Any = None) -> tuple[Params, Params]:
        del t
        params, velocity = pair("state", state, "(params, velocity)")
        check_like(_arrays("velocity", velocity), params, name="velocity", other="params", hint="their shapes")
        force = _add(_scale(1 - momentum, velocity), 1.0, _call(gradient, params, args))
        return velocity, _scale(-1 / mass, force)

    return field


def initial_velocity(
    gradient: Gradient, params: Params, momentum: Scalar, *, nesterov: bool = False, args: Any = None
) -> Params:
    """The velocity with which `modified_equation` follows a method that starts from rest (``u_{-1} = u_0``).

    Both need a moment to reach the manifold and lag behind it for good by an amount of order h; this velocity,
    ``-(1 - lambda / alpha) (1 - lambda)^-1 g(u_0)``, makes the two lags equal.

    Args:
        gradient: function ``g(params)`` or ``g(params, args)``.
        params: start ``u_0``.
        momentum: factor ``lambda`` in [0, 1).
        nesterov: flag, True for Nesterov's method, False for heavy ball.
        args: arguments passed on to the gradient.

    Returns:
        ``u'(0)``, a pytree like ``params``.

    Raises:
        ValueError: ``momentum`` outside [0, 1).

    >>> round(float(initial_velocity(lambda u: u, 1.0, 0.9)), 4)  # heavy ball: -g / (1 + lambda)
    -0.5263
    """
    alpha = inertia(momentum, nesterov=nesterov)
    return _scale(-(1 - momentum / alpha) / (1 - momentum), _call(gradient, params, args))


def manifold_flow(
    gradient: Gradient,
    step_size: Scalar,
    momentum: Scalar,
    *,
    nesterov: bool = False,
    difference: Scalar | None = None,
) -> Callable[..., Params]:
    """The flow on the attracting invariant manifold, to first order in the step.

    ``u' = -(1 - lambda)^-1 (g + h alpha (1 - lambda)^-2 Dg g)``. If ``g`` is the gradient of a loss then
    ``Dg g = grad |g|^2 / 2`` and this is the gradient flow of `modified_loss`; for the ensemble's direction, which
    is no gradient in the joint space of its particles, it holds all the same.

    Args:
        gradient: function ``g(params)`` or ``g(params, args)``.
        step_size: step size ``h``, positive.
        momentum: factor ``lambda`` in [0, 1).
        nesterov: flag, True for Nesterov's method, False for heavy ball.
        difference: step ``e`` of a difference quotient, or ``None`` for the derivative of ``g`` along ``g`` by
            ``jax.jvp``. A number takes ``(g(u + e g) - g(u - e g)) / (2 e)`` instead, for a ``g`` that JAX cannot
            differentiate (a model behind ``jax.pure_callback``); a fraction of the step size is a good choice.

    Returns:
        ``field(t, params, args=None)``, the time derivative of ``params``.

    Raises:
        ValueError: a hyper-parameter out of range; from the field, a gradient that is not like the params.

    >>> round(float(manifold_flow(lambda u: u, 0.1, 0.5)(0.0, 1.0)), 4)  # -2 (1 + 0.1 * 0.75 * 4)
    -2.6
    """
    _check_both(momentum, step_size)
    _check_difference(difference)
    coefficient = step_size * inertia(momentum, nesterov=nesterov) / (1 - momentum) ** 2

    def field(t: Scalar, params: Params, args: Any = None) -> Params:
        del t
        grads, change = _along_itself(gradient, params, args, difference)
        return _scale(-1 / (1 - momentum), _add(grads, coefficient, change))

    return field


def modified_loss(
    loss: Callable[..., jax.Array], step_size: Scalar, momentum: Scalar, *, nesterov: bool = False
) -> Callable[..., jax.Array]:
    """The loss whose gradient flow, rescaled in time, the method follows: ``Phi + h Phi_1``.

    ``Phi_1 = alpha (1 - lambda)^-2 |grad Phi|^2 / 2``: a penalty on steep places, and a stronger one the more
    momentum there is. For ``lambda = 0`` it is the implicit penalty of gradient descent, ``h |grad Phi|^2 / 4``.

    Args:
        loss: function ``Phi``, a differentiable scalar ``loss(params)`` or ``loss(params, args)``.
        step_size: step size ``h``, positive.
        momentum: factor ``lambda`` in [0, 1).
        nesterov: flag, True for Nesterov's method, False for heavy ball.

    Returns:
        A function with the signature of ``loss``.

    Raises:
        TypeError: from the function, params that are not floating-point.
        ValueError: a hyper-parameter out of range.

    >>> round(float(modified_loss(lambda u: u**2, 0.1, 0.0)(1.0)), 4)  # 1 + 0.1 * 4 / 4
    1.1
    """
    _check_both(momentum, step_size)
    coefficient = 0.5 * step_size * inertia(momentum, nesterov=nesterov) / (1 - momentum) ** 2

    def modified(params: Params, *args: Any) -> jax.Array:
        function("loss", loss, "a differentiable function of the params", arguments=1 + len(args))
        value, grads = jax.value_and_grad(loss)(_arrays("params", params), *args)
        return value + coefficient * sum(jnp.vdot(leaf, leaf).real for leaf in jax.tree.leaves(grads))

    return modified


def manifold_velocity(
    gradient: Gradient,
    step_size: Scalar,
    momentum: Scalar,
    *,
    nesterov: bool = False,
    difference: Scalar | None = None,
) -> Callable[..., Params]:
    """The invariant manifold: what ``(u_n - u_{n-1}) / h`` becomes as a function of ``u_n``, to O(h^2).

    ``v = -(1 - lambda)^-1 g - h (alpha + (1 - lambda) / 2) (1 - lambda)^-3 Dg g``. The distance of the iterates from
    it shrinks by a factor of about ``lambda`` a step. With ``previous = u_0 - h v(u_0)``, `iterate` starts on it.

    Args:
        gradient: function ``g(params)`` or ``g(params, args)``.
        step_size: step size ``h``, positive.
        momentum: factor ``lambda`` in [0, 1).
        nesterov: flag, True for Nesterov's method, False for heavy ball.
        difference: step of a difference quotient, or ``None`` for the derivative; see `manifold_flow`.

    Returns:
        ``velocity(params, args=None)``, a pytree like ``params``.

    Raises:
        ValueError: a hyper-parameter out of range; from the function, a gradient that is not like the params.

    >>> round(float(manifold_velocity(lambda u: u, 0.1, 0.5)(1.0)), 4)  # -2 - 0.1 * (0.75 + 0.25) * 8
    -2.8
    """
    _check_both(momentum, step_size)
    _check_difference(difference)
    rest = 1 - momentum
    coefficient = step_size * (inertia(momentum, nesterov=nesterov) + 0.5 * rest) / rest**2

    def velocity(params: Params, args: Any = None) -> Params:
        grads, change = _along_itself(gradient, params, args, difference)
        return _scale(-1 / rest, _add(grads, coefficient, change))

    return velocity


def _call(gradient: Gradient, params: Params, args: Any) -> Params:
    """The gradient, which need not know of ``args``."""
    given = (params,) if args is None else (params, args)
    _arrays("params", params)
    wanted = "a function g(params), or g(params, args) where a field is given args"
    grads = function("gradient", gradient, wanted, arguments=len(given))(*given)
    check_like(arrays("gradient", grads), params, name="gradient", other="params", hint="one number for each of theirs")
    return grads


def _along_itself(gradient: Gradient, params: Params, args: Any, difference: Scalar | None) -> tuple[Params, Params]:
    """``g`` and its derivative in its own direction, ``Dg g``."""
    at = lambda point: _call(gradient, point, args)
    grads = at(params)
    if difference is None:
        return jax.jvp(at, (_arrays("params", params),), (grads,))
    ahead, behind = at(_add(params, difference, grads)), at(_add(params, -difference, grads))
    return grads, _scale(0.5 / difference, _add(ahead, -1.0, behind))


def _add(x: Params, factor: Scalar, y: Params) -> Params:
    """``x + factor * y``, in the types of ``x``."""
    return jax.tree.map(lambda a, b: (a + factor * b).astype(a.dtype), _as_arrays(x), y)


def _scale(factor: Scalar, x: Params) -> Params:
    """``factor * x``, in the types of ``x``."""
    return jax.tree.map(lambda a: (factor * a).astype(a.dtype), _as_arrays(x))


def _arrays(name: str, tree: Params) -> Params:
    """``tree``, floating-point numbers, as arrays: whole numbers would round what is added to them."""
    return _as_arrays(arrays(name, tree, floating=True, some=True))


def _as_arrays(tree: Params) -> Params:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.result_type(leaf)), tree)


def _check_both(momentum: Scalar, step_size: Scalar) -> None:
    real("momentum", momentum, SHARE)
    real("step_size", step_size, POSITIVE)


def _check_difference(difference: Scalar | None) -> None:
    if difference is not None:
        real("difference", difference, POSITIVE, or_="None for the derivative")
