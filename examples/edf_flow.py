"""The exponentially decaying flow of an equation, the geodesic and Newton's method, in one picture.

Run: python examples/edf_flow.py [PICTURE]
"""

from __future__ import annotations

import sys
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from eki_jax import edf

START = jnp.array([1.6, -1.2])


def residual(w: jax.Array) -> jax.Array:
    """Two equations in two unknowns."""
    return jnp.array([w[0] + 0.5 * w[1] ** 2 - 0.2, w[1] + 0.8 * jnp.sin(w[0]) - 0.3])


def solve(field: Any, y: Any, times: np.ndarray, solver: Any) -> Any:
    """``y`` at ``times``; with Euler's method one step from each to the next."""
    euler = isinstance(solver, diffrax.Euler)
    return diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        solver,
        times[0],
        times[-1],
        times[1] - times[0] if euler else None,
        y,
        saveat=diffrax.SaveAt(ts=jnp.asarray(times)),
        stepsize_controller=diffrax.ConstantStepSize() if euler else diffrax.PIDController(rtol=1e-6, atol=1e-8),
    ).ys


def main(path: str = "docs/images/edf_flow.png") -> dict[str, np.ndarray]:
    """Draw the orbits and the residuals; returns the norms of F along both flows and the Newton iterates."""
    decay, straight = np.linspace(0, 4, 41), np.linspace(0, 1, 21)
    flow = solve(edf.equation_flow(residual), START, decay, diffrax.Tsit5())
    momentum = edf.geodesic_momentum(residual, START)
    geodesic, _ = solve(edf.geodesic_flow(residual), (START, momentum), straight, diffrax.Tsit5())
    newton = solve(edf.equation_flow(residual), START, np.arange(5.0), diffrax.Euler())
    norm = lambda path: np.asarray(jnp.linalg.norm(jax.vmap(residual)(path), axis=-1))

    figure, (orbit, size) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    grid = np.meshgrid(np.linspace(-0.6, 2, 80), np.linspace(-1.5, 0.8, 80))
    values = jax.vmap(jax.vmap(lambda a, b: jnp.linalg.norm(residual(jnp.array([a, b])))))(*map(jnp.asarray, grid))
    orbit.contour(*grid, np.asarray(values), 14, colors="0.8", linewidths=0.7)
    orbit.plot(*flow.T, color="#08519c", linewidth=5, alpha=0.35, label="exponentially decaying flow")
    orbit.plot(*geodesic.T, color="black", linewidth=1, label="geodesic of the metric JᵀJ")
    orbit.plot(*newton.T, "o--", color="#e6550d", markersize=5, label="Newton: its Euler steps of length 1")
    orbit.set(xlabel="w₁", ylabel="w₂", title="the same orbit; contours of ‖F(w)‖")
    orbit.legend(fontsize=8, loc="upper right")
    size.plot(decay, norm(flow) / norm(flow)[0], color="#08519c", label="flow: e⁻ᵗ")
    size.plot(straight, norm(geodesic) / norm(flow)[0], color="black", label="geodesic: 1 - t")
    size.plot(range(5), norm(newton) / norm(flow)[0], "o--", color="#e6550d", label="Newton")
    size.set(xlabel="t", title="‖F(w(t))‖ / ‖F(w(0))‖", yscale="log", ylim=(1e-3, 3))
    size.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return {"flow": norm(flow), "geodesic": norm(geodesic), "newton": norm(newton)}


if __name__ == "__main__":
    main(*sys.argv[1:])
