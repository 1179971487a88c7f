"""Figure 8: how large the parameters are against the noise that EKI(R) adds at the end of an epoch.

The bounds are ``|mean u| / max_j |eta_j|`` and ``|mean u| / min_j |eta_j|``.
"""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import eki_jax
from benchmarks.harness.figures import band, legend, panels, save, whole_numbers
from benchmarks.paper.common import Found, row
from benchmarks.paper.epochs import observed, sizes, with_presets

TITLE = "EKI(R) on DNN 1 and 2: the parameters' norm against the noise's (Figure 8)"
SIZES = sizes(epochs=5)


def measure(preset: str, data: Path | None, seed: int) -> Found:
    """The bounds after every epoch."""
    started = time.perf_counter()
    look = lambda method, problem, size: (
        lambda state, key: noise_bounds(state.position, problem.prior, key, size.particles)
    )
    seen, rows = observed("eki-r", SIZES[preset], look, data, seed)
    bounds = {label: np.array(epochs) for label, epochs in seen.items()}
    for label, found in bounds.items():
        for moment, index in (("first", 0), ("last", -1)):
            for bound, value in zip(("lower", "upper"), found[index], strict=True):
                quantity = f"noise ratio, {moment} epoch, {bound} bound over particles"
                rows.append(row(label, quantity, None, value, SIZES[preset][label].note))
    last = {label: {"lower": b[-1, 0], "upper": b[-1, 1], "first_lower": b[0, 0]} for label, b in bounds.items()}
    return Found(
        {"noise_ratio": last, "rows": with_presets(rows, SIZES, preset), "seconds": time.perf_counter() - started},
        {"curves": bounds},
    )


def noise_bounds(ensemble: Any, prior: Any, key: jax.Array, size: int) -> jax.Array:
    """``|mean u|`` over the largest and over the smallest norm of ``size`` draws of the noise, shape (2,)."""
    norm = lambda tree: jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(tree)))
    keys = jax.vmap(lambda index: jax.random.fold_in(key, index))(jnp.arange(size))
    noise = jax.lax.map(lambda key: norm(prior.noise(key)), keys)
    return norm(eki_jax.mean_particle(ensemble)) / jnp.stack([noise.max(), noise.min()])


def draw(result: dict[str, Any], path: Path) -> None:
    """A band a network, between the largest and the smallest noise of a particle."""
    figure, ((axis,),) = panels(1, 1, (5.6, 4))
    for (label, found), style in zip(result["curves"].items(), itertools.cycle(("-", "--", ":", "-.")), strict=False):
        values = np.array(found)
        epochs = np.arange(1, len(values) + 1)
        band(axis, epochs, values[:, 0], values.mean(1), values[:, 1], alpha=0.35, marks=style, label=label)
    axis.set(xlabel="epoch", ylabel="norm of the mean / norm of the noise")
    whole_numbers(axis)
    title = "band: the particle with the largest noise\nto the one with the smallest; line: their middle"
    legend(axis, title, loc="upper left")
    save(figure, path)
