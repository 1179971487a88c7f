"""What a fixed momentum factor does, as a picture: paths, errors against the step size, and the invariant manifold.

python examples/momentum.py --out momentum.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from eki_jax import momentum

FACTOR = 0.6
START = np.array([-1.2, 1.6])
STEPS = 2 ** np.arange(5, 12)


def loss(u: jax.Array) -> jax.Array:
    """A curved valley with its lowest point at (1, 1)."""
    return 0.5 * (1 - u[0]) ** 2 + 0.5 * (u[1] - u[0] ** 2) ** 2


def solve(field, state, times):
    return diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        diffrax.Tsit5(),
        0.0,
        times[-1],
        1e-3,
        state,
        saveat=diffrax.SaveAt(ts=times),
        stepsize_controller=diffrax.PIDController(rtol=1e-9, atol=1e-10),
        max_steps=100_000,
    ).ys


@jax.jit
def flows(h: float, times: jax.Array) -> dict[str, jax.Array]:
    """Heavy ball's limit, and its two corrections of first order in h."""
    gradient = jax.grad(loss)
    velocity = momentum.initial_velocity(gradient, START, FACTOR)
    return {
        "gradient flow, rescaled": solve(momentum.gradient_flow(gradient, FACTOR), START, times),
        "modified equation": solve(momentum.modified_equation(gradient, h, FACTOR), (START, velocity), times)[0],
        "flow on the manifold": solve(momentum.manifold_flow(gradient, h, FACTOR), START, times),
    }


def draw_paths(axes) -> None:
    h, steps = 0.04, 60
    x, y = jnp.meshgrid(jnp.linspace(-1.9, 1.6, 150), jnp.linspace(-0.9, 2.2, 150))
    height = jax.vmap(jax.vmap(loss))(jnp.stack([x, y], axis=-1))
    axes.contour(x, y, height**0.5, levels=16, colors="grey", linewidths=0.4)
    path = momentum.iterate(jax.grad(loss), START, h, FACTOR, steps)
    axes.plot(*path.T, "o", ms=3.5, color="black", label=f"heavy ball, h = {h}")
    for name, curve in flows(h, jnp.linspace(0, h * steps, 400)).items():
        axes.plot(*curve.T, label=name)
    axes.set(title=rf"Paths, $\lambda$ = {FACTOR}", xlabel="$u_0$", ylabel="$u_1$")
    axes.legend(fontsize=7.5, loc="lower left")


def draw_errors(axes) -> None:
    gradient, names = jax.grad(loss), list(flows(0.1, jnp.array([0.5, 1.0])))
    errors: dict[str, list[float]] = {name: [] for name in names}
    for n in STEPS:
        h = 1 / n
        rested = momentum.iterate(gradient, START, h, FACTOR, int(n))[-1]
        on_it = START - h * momentum.manifold_velocity(gradient, h, FACTOR)(START)
        flowing = momentum.iterate(gradient, START, h, FACTOR, int(n), previous=on_it)[-1]
        for name, curve in flows(h, jnp.array([0.5, 1.0])).items():
            end = flowing if name == "flow on the manifold" else rested
            errors[name].append(float(jnp.linalg.norm(curve[-1] - end)))
    for name, error in errors.items():
        order = np.polyfit(-np.log(STEPS[-3:]), np.log(error[-3:]), 1)[0]
        axes.loglog(1 / STEPS, error, "o-", ms=3.5, label=f"{name}: order {order:.2f}")
        print(f"{name}: order {order:.2f}")
    axes.set(title="Distance of heavy ball at t = 1", xlabel="step size h")
    axes.legend(fontsize=7.5)


def draw_attraction(axes) -> None:
    h, steps, gradient = 1e-6, 80, jax.grad(loss)
    for factor in (0.5, 0.8, 0.9):
        path = momentum.iterate(gradient, START, h, factor, steps)
        velocity = (path[1:] - path[:-1]) / h
        distance = jnp.linalg.norm(
            velocity - jax.vmap(momentum.manifold_velocity(gradient, h, factor))(path[1:]), axis=-1
        )
        count = np.arange(1, steps + 1)
        line = axes.semilogy(count, distance, "o", ms=3, label=rf"$\lambda$ = {factor}")[0]
        axes.semilogy(count, distance[0] * factor ** (count - 1.0), color=line.get_color(), lw=1)
    axes.set(title=r"Distance from the manifold; lines $\lambda^n$", xlabel="steps", ylim=(1e-9, 50))
    axes.legend(fontsize=7.5)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("momentum.png"))
    arguments = parser.parse_args(argv)
    figure = Figure(figsize=(12, 3.9), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    with jax.enable_x64(True):
        draw_paths(left)
        draw_errors(middle)
        draw_attraction(right)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.out, dpi=100)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
