"""Calibrate, emulate, sample: a Gaussian process on the runs of a calibration, and a Markov chain on the process.

An ensemble finds where the posterior is, and how wide, in some hundred runs; where the simulator is not linear there,
its shape is only roughly right. The runs are then a design for an emulator that is good where it has to be, and a long
chain on the emulator costs no more runs (Cleary, Garbuno-Inigo, Lan, Schneider and Stuart, Journal of Computational
Physics 424, 2021). Beside it stands a long chain on the simulator itself, which only a cheap one allows.

    pip install 'eki_jax[calibrate]' scikit-learn blackjax
    python examples/calibrate_emulate_sample.py --out runs/emulator.png
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel

from eki_jax import calibrate

HOURS = np.array([0.5, 1.0, 2.0, 4.0, 8.0])
SD = 0.25  # of a measured concentration
PRIOR = {
    "absorption": calibrate.positive(mean=2.0, sd=1.5),  # per hour
    "elimination": calibrate.positive(mean=0.4, sd=0.3),  # per hour
}


def simulate(member: dict[str, float]) -> dict[str, np.ndarray]:
    """The concentration of a drug that is absorbed and eliminated."""
    a, e = member["absorption"], member["elimination"]
    return {"concentration": 3 * a / (a - e) * (np.exp(-e * HOURS) - np.exp(-a * HOURS))}


def data() -> dict[str, np.ndarray]:
    clean = simulate({"absorption": 1.0, "elimination": 0.25})["concentration"]
    return {"concentration": clean + SD * np.random.default_rng(3).normal(size=len(HOURS))}


def calibrated(particles: int) -> calibrate.Calibration:
    calibration = calibrate.Calibration(PRIOR, data(), SD**2, particles=particles)
    while not calibration.done:
        print(calibration.tell([simulate(member) for member in calibration.ask()]))
    return calibration


def design(calibration: calibrate.Calibration, most: int) -> tuple[np.ndarray, np.ndarray]:
    """The last runs that did not fail: latent parameters, shape (N, P), and residuals in units of the noise, (N, M)."""
    latent, residuals = [], []
    for iteration in calibration.history:
        rows = calibration.prior.to_latent(iteration.parameters)
        latent.append(np.concatenate(list(rows.values()), axis=1)[iteration.healthy])
        outputs = iteration.outputs["concentration"][iteration.healthy]
        residuals.append((outputs - data()["concentration"]) / SD)
    return np.concatenate(latent)[-most:], np.concatenate(residuals)[-most:]


def emulated(latent: np.ndarray, residuals: np.ndarray) -> Callable[[jax.Array], jax.Array]:
    """The logarithm of the posterior's density in the latent space, where the prior is N(0, I).

    There is a process for each output. Its own variance is added to the noise's, so that the chain does not trust it
    where there are no runs.
    """
    parts = []
    for column in residuals.T:
        kernel = ConstantKernel(10.0, (1e-2, 1e6)) * RBF(np.ones(latent.shape[1]), (0.05, 50.0))
        process = GaussianProcessRegressor(kernel, alpha=1e-5, normalize_y=True).fit(latent, column)
        signal, shape = process.kernel_.k1.constant_value, process.kernel_.k2.length_scale
        parts.append((signal, shape, process.alpha_, np.linalg.inv(process.L_), column.mean(), column.std()))
    stacked = (jnp.asarray(np.stack(part), jnp.float32) for part in zip(*parts, strict=True))
    signal, shape, alpha, root, mean, scale = stacked
    known = jnp.asarray(latent, jnp.float32)

    def log_density(z: jax.Array) -> jax.Array:
        distances = jnp.sum(((known - z) / shape[:, None, :]) ** 2, axis=-1)
        near = signal[:, None] * jnp.exp(-0.5 * distances)
        residual = mean + scale * jnp.sum(near * alpha, axis=1)
        explained = jnp.sum(jnp.einsum("mij,mj->mi", root, near) ** 2, axis=1)
        variance = 1 + scale**2 * jnp.maximum(signal - explained, 0)
        return -0.5 * jnp.sum(residual**2 / variance + jnp.log(variance)) - 0.5 * jnp.sum(z**2)

    return log_density


def chain(log_density: Callable[[jax.Array], jax.Array], start: np.ndarray, draws: int) -> np.ndarray:
    """Draws by the No-U-turn sampler, whose step size is adapted first."""
    warmup = blackjax.window_adaptation(blackjax.nuts, log_density)
    (state, settings), _ = warmup.run(jax.random.key(0), jnp.asarray(start, jnp.float32), num_steps=500)
    kernel = blackjax.nuts(log_density, **settings)

    def step(state, key):
        state, _ = kernel.step(key, state)
        return state, state.position

    _, positions = jax.jit(lambda state, keys: jax.lax.scan(step, state, keys))(
        state, jax.random.split(jax.random.key(1), draws)
    )
    return np.asarray(positions, np.float64)


def exact_chain(prior: calibrate.JointPrior, start: np.ndarray, covariance: np.ndarray, draws: int) -> np.ndarray:
    """A random walk on the simulator itself (Metropolis), one run a draw."""
    numbers, wanted = np.random.default_rng(0), data()["concentration"]

    def log_density(z: np.ndarray) -> float:
        values = prior.to_physical({name: part[None] for name, part in zip(prior.sizes, z[:, None], strict=True)})
        outputs = simulate({name: float(part[0]) for name, part in values.items()})["concentration"]
        return float(-0.5 * np.sum(((outputs - wanted) / SD) ** 2) - 0.5 * z @ z)

    proposals = numbers.normal(size=(draws, len(start))) @ np.linalg.cholesky(covariance).T * 1.7
    here, density, found = start, log_density(start), []
    for proposal, chance in zip(proposals, np.log(numbers.uniform(size=draws)), strict=True):
        there = here + proposal
        new = log_density(there)
        if chance < new - density:
            here, density = there, new
        found.append(here)
    return np.stack(found[draws // 10 :])


def main(out: Path | None = None, particles: int = 60, draws: int = 40_000) -> dict[str, dict[str, np.ndarray]]:
    """Physical draws by the three methods."""
    calibration = calibrated(particles)
    latent, residuals = design(calibration, 4 * particles)
    members = calibration.posterior().samples
    now = np.concatenate(list(calibration.prior.to_latent(members).values()), axis=1)
    by_emulator = chain(emulated(latent, residuals), now.mean(axis=0), draws // 10)
    by_simulator = exact_chain(calibration.prior, now.mean(axis=0), np.cov(now, rowvar=False), draws)
    physical = lambda rows: calibration.prior.to_physical(calibration.prior.split(rows))
    found = {"ensemble": members, "emulator": physical(by_emulator), "simulator": physical(by_simulator)}
    runs = {"ensemble": particles * calibration.iteration, "emulator": particles * calibration.iteration}
    for method, samples in found.items():
        words = [f"{name} {values.mean():.4f} +- {values.std():.4f}" for name, values in samples.items()]
        print(f"{method:10}{', '.join(words)}, {runs.get(method, draws):,} runs")
    if out is not None:
        draw(found, latent, calibration.prior, out)
    return found


def draw(found: dict[str, dict[str, np.ndarray]], latent: np.ndarray, prior: calibrate.JointPrior, out: Path) -> None:
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    runs = prior.to_physical(prior.split(latent))
    everywhere = {name: np.concatenate([samples[name][-4000:] for samples in found.values()]) for name in PRIOR}
    limits = {name: np.quantile(values, [0.001, 0.999]) for name, values in everywhere.items()}
    for axes, (method, samples) in zip(figure.subplots(1, 3, sharex=True, sharey=True), found.items(), strict=True):
        axes.plot(runs["absorption"], runs["elimination"], ".", color="#8c8c8c", ms=2, label="runs of the calibration")
        thin = max(1, len(samples["absorption"]) // 3000)
        values = [samples[name][::thin] for name in PRIOR]
        size = 5 if len(values[0]) < 500 else 2
        axes.plot(*values, ".", color="#1f6f8b", ms=size, alpha=0.5, label="posterior")
        axes.set(title=f"by the {method}", xlabel="absorption per hour", xlim=limits["absorption"])
    figure.axes[0].set(ylabel="elimination per hour", ylim=limits["elimination"])
    figure.axes[0].legend(fontsize=8, markerscale=3, loc="upper right")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--particles", type=int, default=60)
    parser.add_argument("--draws", type=int, default=40_000)
    main(**vars(parser.parse_args()))
