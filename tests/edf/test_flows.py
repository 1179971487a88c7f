"""The paper's statements about the continuous flows, integrated with diffrax in double precision."""

from __future__ import annotations

from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from jax.flatten_util import ravel_pytree

from eki_jax import edf


def residual(w: dict[str, jax.Array]) -> jax.Array:
    """A non-linear equation in three unknowns whose Jacobian is regular where the flow goes."""
    a, (b, c) = w["a"], w["b"]
    return jnp.stack([a + 0.3 * b**2, 2 * b + jnp.sin(c), c + 0.5 * jnp.tanh(a * b) - 1.0])


START = {"a": 0.8, "b": (0.5, -0.4)}


def start() -> dict[str, Any]:
    return {"a": jnp.asarray(START["a"]), "b": jnp.asarray(START["b"])}


def integrate(field: Any, y: Any, times: np.ndarray, args: Any = None) -> Any:
    """``y`` at ``times``, the first of which is the start."""
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        diffrax.Tsit5(),
        times[0],
        times[-1],
        None,
        y,
        args,
        saveat=diffrax.SaveAt(ts=jnp.asarray(times)),
        stepsize_controller=diffrax.PIDController(rtol=1e-8, atol=1e-10),
    )
    return solution.ys


@pytest.mark.parametrize(
    ("decay", "share", "end"),
    [
        (edf.exponential_decay, lambda t: np.exp(-t), 4.0),
        (edf.linear_decay, lambda t: 1 - t, 0.95),
        (lambda t: 1 / (1 + t) ** 2, lambda t: (1 + t) ** -2.0, 4.0),
    ],
)
def test_the_residual_decays_as_prescribed(x64: None, decay: Any, share: Any, end: float) -> None:
    """Theorem 2.2: F(w(t)) = rho(t) F(w(0)), for any rho; e^-t is the exponentially decaying flow."""
    times = np.linspace(0, end, 5)
    path = integrate(edf.equation_flow(residual, decay), start(), times)
    expected = share(times)[:, None] * np.asarray(residual(start()))
    np.testing.assert_allclose(jax.vmap(residual)(path), expected, atol=1e-7)


def test_free_motion_follows_the_geodesic(x64: None) -> None:
    """Free motion reaches the root along the geodesic.

    Theorem 2.1, from the Euler-Lagrange equations and the initial momentum alone: F(w(t)) = (1 - t) F(w(0)).
    """
    times = np.linspace(0, 1, 5)
    momentum = edf.geodesic_momentum(residual, start())
    path, _ = integrate(edf.geodesic_flow(residual), (start(), momentum), times)
    expected = (1 - times)[:, None] * np.asarray(residual(start()))
    np.testing.assert_allclose(jax.vmap(residual)(path), expected, atol=1e-7)


def test_both_motions_run_along_the_same_orbit(x64: None) -> None:
    """Theorem 2.2: e^-t = 1 - s puts the two flows at the same point."""
    times = np.linspace(0, 2, 4)
    exponential = integrate(edf.equation_flow(residual), start(), times)
    momentum = edf.geodesic_momentum(residual, start())
    geodesic, _ = integrate(edf.geodesic_flow(residual), (start(), momentum), 1 - np.exp(-times))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), exponential, geodesic)


def test_an_euler_step_is_newtons_method(x64: None) -> None:
    term, every_step = diffrax.ODETerm(edf.equation_flow(residual)), diffrax.SaveAt(steps=True)
    solution = diffrax.diffeqsolve(term, diffrax.Euler(), 0.0, 4.0, 1.0, start(), saveat=every_step)
    w = np.array([START["a"], *START["b"]])
    as_tree = lambda w: {"a": w[0], "b": w[1:]}
    for step in range(4):
        jacobian = jax.jacobian(lambda w: residual(as_tree(w)))(jnp.asarray(w))
        w = w - np.linalg.solve(np.asarray(jacobian), np.asarray(residual(as_tree(jnp.asarray(w)))))
        found = np.concatenate([[solution.ys["a"][step]], solution.ys["b"][step]])
        np.testing.assert_allclose(found, w, rtol=1e-10)
    np.testing.assert_allclose(residual(as_tree(jnp.asarray(w))), 0, atol=1e-8)  # and it has converged


def test_edf_g_decays_the_residuals(x64: None) -> None:
    """EDF-G lets the residuals of a square problem decay.

    Section 3: with M = N and a squared error, F = phi decays as e^-t, whatever the curvature of phi.
    """
    objective = edf.Objective(lambda w, x: residual(w), lambda outputs, y: 0.5 * jnp.sum(outputs**2))
    batch, times = (jnp.zeros(1), jnp.zeros(1)), np.linspace(0, 3, 4)
    path = integrate(edf.edf_g_flow(objective, krylov_order=3), start(), times, batch)
    expected = np.exp(-times)[:, None] * np.asarray(residual(start()))
    np.testing.assert_allclose(jax.vmap(residual)(path), expected, atol=1e-6)


@pytest.mark.slow
def test_edf_h_lets_the_gradient_decay(x64: None) -> None:
    """Equation (20): d/dt grad L = -grad L; and EDF-G does not do that on the same problem."""
    loss = lambda outputs, y: jnp.sum(outputs[:2] ** 2 / 2 + jnp.cosh(outputs[:2])) + 0.1 * outputs[2] ** 2
    objective = edf.Objective(lambda w, x: jnp.append(residual(w)[:2], w["b"][0]), loss)
    batch, times = (jnp.zeros(1), jnp.zeros(1)), np.linspace(0, 2, 4)
    gradient = lambda w: ravel_pytree(objective.value_and_grad(w, batch)[1])[0]
    expected = np.exp(-times)[:, None] * np.asarray(gradient(start()))
    path = integrate(edf.edf_h_flow(objective, krylov_order=3), start(), times, batch)
    np.testing.assert_allclose(jax.vmap(gradient)(path), expected, atol=1e-6)
    path = integrate(edf.edf_g_flow(objective, krylov_order=3), start(), times, batch)
    assert np.abs(np.asarray(jax.vmap(gradient)(path)) - expected).max() > 0.01


def linear_run(acceleration: edf.Acceleration, dt: float, steps: int) -> np.ndarray:
    """w after every step of accelerated EDF-G on F(w) = w, from w = 1, with learning rate dt^2."""
    objective = edf.Objective(lambda w, x: w, lambda outputs, y: 0.5 * jnp.sum(outputs**2))
    batch = (jnp.zeros(1), jnp.zeros(1))
    optimizer = edf.edf_g(dt**2, damping=None, acceleration=acceleration)

    def step(carry: tuple, _: None) -> tuple[tuple, jax.Array]:
        params, state = carry
        gradient = objective.value_and_grad(params, batch)[1]
        updates, state = optimizer.update(gradient, state, params, objective=objective, batch=batch)
        return (params + updates, state), params + updates

    carry = (jnp.ones(1), optimizer.init(jnp.ones(1)))
    return np.asarray(jax.jit(lambda carry: jax.lax.scan(step, carry, None, length=steps)[1])(carry))[:, 0]


def test_w1_discretises_constant_friction(x64: None) -> None:
    """Equation (26) with kappa = 0.9: a damped oscillation, at first order in dt."""
    times, friction = np.arange(1, 5) * 2.0, 0.9
    frequency = np.sqrt(1 - friction**2 / 4)
    exact = np.exp(-friction / 2 * times) * (
        np.cos(frequency * times) + friction / 2 / frequency * np.sin(frequency * times)
    )
    errors = []
    for dt in (0.02, 0.01):
        path = linear_run(edf.heavy_ball(1 - friction * dt), dt, round(8 / dt))
        errors.append(np.abs(path[np.round(times / dt).astype(int) - 1] - exact).max())
    assert errors[1] < 0.01
    assert 1.7 < errors[0] / errors[1] < 2.3


def test_w2_discretises_vanishing_friction(x64: None) -> None:
    """Equation (26) with kappa = 3 / t: F = 2 J_1(t) / t, at first order in dt (Su, Boyd and Candes)."""
    times = np.arange(1, 5) * 2.0
    exact = 2 * scipy.special.j1(times) / times
    errors = []
    for dt in (0.02, 0.01):
        path = linear_run(edf.nesterov(3.0), dt, round(8 / dt))
        errors.append(np.abs(path[np.round(times / dt).astype(int) - 1] - exact).max())
    assert errors[1] < 0.02
    assert 1.6 < errors[0] / errors[1] < 2.4


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="residual: 2 numbers for 3 unknowns"):
        edf.equation_flow(lambda w: w[:2])(0.0, jnp.ones(3), None)
    objective = edf.Objective(lambda w, x: w, lambda outputs, y: jnp.sum(outputs**2))
    for make in (edf.edf_g_flow, edf.edf_h_flow):
        with pytest.raises(ValueError, match="krylov_order: 0; wanted a whole number, at least 1"):
            make(objective, 0)
