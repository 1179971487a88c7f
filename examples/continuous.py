"""Particles of EKI, of Nesterov EKI and of gradient flow on a problem of two parameters, as a picture.

The model is the textbook example of ensemble Kalman inversion: the solution p of ``-exp(u_0) p'' = 1`` on [0, 1] with
``p(0) = 0`` and ``p(1) = u_1``, observed at x = 1/4 and 3/4. The two ensembles are solved without a derivative of it;
gradient flow, for comparison, uses ``jax.grad``.

    python examples/continuous.py --out particles.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import diffrax
import jax
import jax.numpy as jnp
from matplotlib.figure import Figure

import eki_jax
from eki_jax.flows import nesterov_flow, nesterov_start
from eki_jax.momentum import gradient_flow

POINTS = jnp.array([0.25, 0.75])
DATA = jnp.array([27.5, 79.7])
NOISE = 1.0  # standard deviation of the observations
LOSS = eki_jax.squared_error(1 / NOISE**2)


def forward(u: jax.Array, x: jax.Array) -> jax.Array:
    return u[1] * x + jnp.exp(-u[0]) * (x - x**2) / 2


def misfit(u: jax.Array) -> jax.Array:
    return LOSS(forward(u, POINTS), DATA)


def solve(field, state, t0: float, t1: float, count: int = 200):
    """States at ``count`` times, evenly spaced in the logarithm of time."""
    times = jnp.concatenate([jnp.array([t0]), jnp.geomspace(max(t0, 1e-4), t1, count)[1:]])
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        diffrax.Tsit5(),
        t0,
        t1,
        None,
        state,
        (POINTS, DATA),
        saveat=diffrax.SaveAt(ts=times),
        stepsize_controller=diffrax.PIDController(rtol=1e-5, atol=1e-7),
        max_steps=200_000,
    )
    return solution.ys


def trajectories(ensemble: jax.Array) -> dict[str, jax.Array]:
    """Title -> paths of the particles, shape (times, J, 2)."""
    eki = solve(eki_jax.vector_field(forward, LOSS), ensemble, 0.0, 10.0)
    t0 = 1e-3
    start = nesterov_start(forward, LOSS, ensemble, (POINTS, DATA), t0)
    nesterov, _ = solve(nesterov_flow(forward, LOSS), start, t0, 10.0)
    each = jax.vmap(jax.grad(misfit))
    gradient = solve(lambda t, u, _: gradient_flow(each)(t, u), ensemble, 0.0, 10.0)
    return {"EKI": eki, "Nesterov EKI": nesterov, "Gradient flow": gradient}


def draw(paths: dict[str, jax.Array], out: Path) -> None:
    figure = Figure(figsize=(11, 3.9), layout="constrained")
    panels = figure.subplots(1, len(paths), sharex=True, sharey=True)
    first, second = jnp.meshgrid(jnp.linspace(-4, 2.5, 150), jnp.linspace(90, 112, 150))
    height = jax.vmap(jax.vmap(misfit))(jnp.stack([first, second], axis=-1))
    for axes, (title, path) in zip(panels, paths.items(), strict=True):
        axes.contourf(first, second, jnp.log10(height + 1), levels=20, cmap="Greys", alpha=0.6)
        axes.plot(path[:, :, 0], path[:, :, 1], color="tab:blue", lw=0.8, alpha=0.8)
        axes.plot(path[0, :, 0], path[0, :, 1], "o", color="white", mec="tab:blue", ms=4, label="start")
        axes.plot(path[-1, :, 0], path[-1, :, 1], "o", color="tab:red", ms=4, label="t = 10")
        axes.set(title=title, xlabel=r"$u_0$", xlim=(-4, 2.5), ylim=(90, 112))
    panels[0].set_ylabel(r"$u_1$")
    panels[0].legend(loc="lower left", fontsize=8)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=100)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("particles.png"))
    parser.add_argument("--particles", type=int, default=20)
    arguments = parser.parse_args(argv)
    prior = eki_jax.gaussian(jnp.array([0.0, 100.0]), jnp.array([1.0, 4.0]))
    ensemble = eki_jax.sample_ensemble(jax.random.key(1), prior, arguments.particles)
    with jax.enable_x64(True):
        paths = trajectories(ensemble.astype(float))
        for title, path in paths.items():
            print(f"{title}: mean misfit {float(jax.vmap(misfit)(path[-1]).mean()):.3g} at t = 10")
        draw(paths, arguments.out)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
