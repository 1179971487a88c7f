"""Figure 13: parties of the House of Representatives from five labels.

What the paper leaves open, and what is taken here:

* The Laplacian is the symmetric normalized one: its Fiedler vector has the paper's accuracy exactly.
* The five labels, two Republicans and three Democrats, are not named. Results vary a lot with them, so that all methods
  run over the same random draws and the table shows their distribution.
* The prior is restricted to the 50 lowest eigenvectors beyond the null space, as is usual for graph priors, whose
  remaining modes are noise. The whole spectrum is run too and reported beside it.
* The forward map is the sign of u at the labelled nodes (example 2.2). The particles stop by themselves once all of
  them agree with the labels.
* The chain's likelihood is probit with standard deviation 0.1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import eki_jax
from benchmarks.harness.figures import legend, panels, save
from benchmarks.paper.common import Found, row, skipped, timed
from benchmarks.paper.pcn import pcn
from benchmarks.problems import tables
from benchmarks.problems.files import MissingFile
from eki_jax import semi_supervised as graphs

TITLE = "Voting Records, five labels: Fiedler vector, MCMC and EKI (Figure 13)"
PAPER = {"fiedler": 0.8828, "mcmc": 0.9252, "eki": 0.8920}
WIDTH, NOISE = 1.25, 0.1
LABELLED = {-1: 2, 1: 3}  # party -> how many labels are seen


class Settings(NamedTuple):
    """The size of a run."""

    draws: int
    particles: int
    steps: int
    modes: int | None
    samples: int
    burn_in: int


PRESETS = {
    "smoke": Settings(4, 100, 5, 20, 400, 100),
    "cpu": Settings(50, 1000, 20, 50, 40_000, 10_000),
    "full": Settings(50, 1000, 20, 50, 100_000, 20_000),
}


def measure(preset: str, data: Path | None, seed: int) -> Found:
    """All methods over the same draws of labels."""
    settings = PRESETS[preset]
    try:
        votes = tables.votes(data)
    except MissingFile as error:
        rows = [skipped(name, "accuracy", PAPER[name], error.reason) for name in PAPER]
        return Found({"rows": rows})
    laplacian = graphs.graph_laplacian(graphs.gaussian_affinity(votes.records, WIDTH))
    basis, whole = graphs.eigenbasis(laplacian, settings.modes), graphs.eigenbasis(laplacian)
    cut = np.sign(graphs.fiedler_vector(whole))
    fiedler = float(max(np.mean(cut == votes.labels), np.mean(cut == -votes.labels)))
    observed = draw_labels(votes.labels, settings.draws, seed)
    key = jax.random.key(seed)
    eki, seconds = timed(run_eki, key, basis, votes.labels, observed, settings)
    all_modes, _ = timed(run_eki, key, whole, votes.labels, observed, settings)
    mcmc, mcmc_seconds = timed(run_mcmc, key, basis, votes.labels, observed, settings)
    summary = {
        "fiedler_final": fiedler,
        "eki_final": float(np.median(eki["final"])),
        "eki_first": float(np.median(eki["curve"][:, 1])),
        "eki_90th_percentile": float(np.quantile(eki["final"], 0.9)),
        "eki_best_particle": float(np.median(eki["best_particle"])),
        "eki_ensemble_vote": float(np.median(eki["ensemble"])),
        "eki_all_modes": float(np.median(all_modes["final"])),
        "eki_all_modes_90th_percentile": float(np.quantile(all_modes["final"], 0.9)),
        "mcmc_final": float(np.median(mcmc["final"])),
        "mcmc_90th_percentile": float(np.quantile(mcmc["final"], 0.9)),
        "mcmc_above_eki": float(np.mean(mcmc["final"] > eki["final"])),
        "mcmc_acceptance": float(np.mean(mcmc["acceptance"])),
        "eki_forward_passes": settings.particles * settings.steps,
        "mcmc_forward_passes": settings.samples + settings.burn_in,
        "eki_seconds_a_draw": seconds / settings.draws,
        "mcmc_seconds_a_draw": mcmc_seconds / settings.draws,
    }
    per_draw, of = f"{settings.draws} draws of the five labels", "draws"
    samples, particles = f"{per_draw}; {settings.samples} samples each", f"{per_draw}; J = {settings.particles}"
    rows = [
        row("Fiedler vector", "accuracy", PAPER["fiedler"], fiedler),
        row("MCMC (pCN)", "accuracy", PAPER["mcmc"], mcmc["final"], samples, of),
        row("EKI", "accuracy", PAPER["eki"], eki["final"], particles, of),
        row("EKI", "90th percentile", PAPER["eki"], summary["eki_90th_percentile"], per_draw),
        row("EKI, all 434 modes", "accuracy", PAPER["eki"], all_modes["final"], per_draw, of),
        row("EKI, all 434 modes", "90th percentile", PAPER["eki"], summary["eki_all_modes_90th_percentile"], per_draw),
    ]
    details = {
        "settings": settings._asdict(),
        "accuracy": {"eki": eki["final"], "eki_all_modes": all_modes["final"], "mcmc": mcmc["final"]},
        "curve": eki["curve"],
        "observed": observed,
        "eigenvalues": whole.eigenvalues,
    }
    return Found(summary | {"rows": rows}, details)


def draw_labels(labels: np.ndarray, draws: int, seed: int) -> np.ndarray:
    """The nodes whose label is seen, shape (draws, 5): two Republicans, then three Democrats."""
    rng = np.random.default_rng(seed)
    pick = lambda party, count: rng.choice(np.flatnonzero(labels == party), count, replace=False)
    return np.array([np.concatenate([pick(*item) for item in LABELLED.items()]) for _ in range(draws)])


def run_eki(
    key: jax.Array, basis: graphs.GraphBasis, labels: np.ndarray, observed: np.ndarray, settings: Settings
) -> dict[str, np.ndarray]:
    """EKI for every draw: accuracies after every step, and of the last step's mean, best particle and majority."""
    prior = graphs.graph_prior(basis)
    solver = eki_jax.euler(graphs.observed_sign, graphs.mean_squared_error, eki_jax.paper_step_size())
    truth = jnp.asarray(labels, jnp.float32)
    accuracy = lambda u: jnp.mean(jnp.sign(u) == truth)

    def one(inputs: tuple[jax.Array, jax.Array]) -> dict[str, jax.Array]:
        nodes, key = inputs
        state = solver.init(eki_jax.sample_ensemble(key, prior, settings.particles))

        def step(state: Any, _: None) -> tuple[Any, jax.Array]:
            reached = accuracy(eki_jax.mean_particle(state.ensemble))
            return solver.step(state, (nodes, truth[nodes]))[0], reached

        state, curve = jax.lax.scan(step, state, None, length=settings.steps)
        final = accuracy(eki_jax.mean_particle(state.ensemble))
        return {
            "final": final,
            "curve": jnp.append(curve, final),
            "best_particle": jax.vmap(accuracy)(state.ensemble).max(),
            "ensemble": accuracy(jnp.sign(state.ensemble).mean(0)),
        }

    keys = jax.random.split(key, len(observed))
    return jax.tree.map(np.asarray, jax.jit(lambda *inputs: jax.lax.map(one, inputs))(jnp.asarray(observed), keys))


def run_mcmc(
    key: jax.Array, basis: graphs.GraphBasis, labels: np.ndarray, observed: np.ndarray, settings: Settings
) -> dict[str, np.ndarray]:
    """One chain for every draw; the class is the sign that a node has most often."""
    factor = graphs.graph_prior(basis).factor
    truth = jnp.asarray(labels, jnp.float32)

    def one(nodes: jax.Array, key: jax.Array) -> dict[str, jax.Array]:
        seen = factor[nodes]
        misfit = lambda z: -jax.scipy.stats.norm.logcdf(truth[nodes] * (seen @ z) / NOISE).sum()
        classes = lambda z: jnp.sign(factor @ z)
        chain = pcn(key, factor.shape[1], misfit, classes, samples=settings.samples, burn_in=settings.burn_in)
        return {"final": jnp.mean(jnp.sign(chain.mean) == truth), "acceptance": chain.acceptance}

    keys = jax.random.split(jax.random.fold_in(key, 1), len(observed))
    return jax.tree.map(np.asarray, jax.jit(jax.vmap(one))(jnp.asarray(observed), keys))


def draw(result: dict[str, Any], path: Path) -> None:
    """The spectrum; the accuracy after each step; and over the draws of labels."""
    fiedler, eigenvalues, accuracy = result["fiedler_final"], result["eigenvalues"], result["accuracy"]
    figure, ((left, middle, right),) = panels(1, 3, (12, 3.6))
    left.plot(np.arange(1, len(eigenvalues) + 1), eigenvalues, ".", markersize=3)
    left.set(title="Spectrum of the graph Laplacian", xlabel="index", ylabel="eigenvalue")
    low, middle_line, high = np.quantile(result["curve"], [0.1, 0.5, 0.9], axis=0)
    steps = np.arange(len(middle_line))
    middle.fill_between(steps, low, high, alpha=0.25, label="10 % to 90 % of the draws")
    middle.plot(steps, middle_line, label="EKI, median")
    middle.axhline(fiedler, color="k", linestyle=":", label="Fiedler vector")
    middle.set(title="Accuracy of the mean particle", xlabel="step", ylabel="accuracy")
    legend(middle)
    for name, values in (("EKI", accuracy["eki"]), ("MCMC (pCN)", accuracy["mcmc"])):
        right.plot(np.sort(values), np.linspace(0, 1, len(values)), drawstyle="steps-post", label=name)
    right.axvline(fiedler, color="k", linestyle=":", label="Fiedler vector")
    right.set(title="Over draws of the five labels", xlabel="accuracy", ylabel="share of the draws below")
    legend(right)
    save(figure, path, dpi=110)
