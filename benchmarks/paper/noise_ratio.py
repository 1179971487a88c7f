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
from benchmarks import methods
from benchmarks.harness.figures import band, legend, panels, save, whole_numbers
from benchmarks.paper.common import check_preset, finish, row, skipped
from benchmarks.paper.epochs import observe_epochs
from benchmarks.problems import registry
from benchmarks.problems.files import MissingFile

TITLE = "EKI(R) on DNN 1 and 2: the parameters' norm against the noise's (Figure 8)"
# preset -> network -> (J, batch, epochs, images)
PRESETS: dict[str, dict[str, tuple[int, int, int, int | None]]] = {
    "smoke": {"dnn1": (8, 50, 2, 100)},
    "cpu": {"dnn1": (2000, 600, 5, None), "dnn2": (300, 600, 5, 20_000)},
    "full": {"dnn1": (2000, 600, 20, None), "dnn2": (2000, 600, 20, None)},
}


def run(preset: str, out: Path, data: Path | None, seed: int) -> dict[str, Any]:
    """Writes ``noise-ratio.jsonl`` and ``noise-ratio.png``."""
    check_preset(preset)
    started, rows, bounds = time.perf_counter(), [], {}
    for network, (size, batch, epochs, images) in PRESETS[preset].items():
        label = network.upper().replace("DNN", "DNN ")
        try:
            problem = registry.get(f"mnist-{network}", data)
        except MissingFile as error:
            rows.append(skipped(label, "noise ratio", None, error.reason))
            continue
        problem = problem._replace(train=tuple(array[:images] for array in problem.train))
        prior = problem.prior
        look = lambda state, key, prior=prior, size=size: noise_bounds(state.position, prior, key, size)
        method = methods.get("eki-r", problem, size)
        seen = observe_epochs(method, problem, look, batch_size=batch, epochs=epochs, key=jax.random.key(seed))
        bounds[label] = np.array(seen)
        note = f"J = {size}, {epochs} epochs, batch {batch}" + ("" if images is None else f", {images} images")
        for moment, index in (("first", 0), ("last", -1)):
            for bound, value in zip(("lower", "upper"), bounds[label][index], strict=True):
                rows.append(row(label, f"noise ratio, {moment} epoch, {bound} bound over particles", None, value, note))
    last = {label: {"lower": b[-1, 0], "upper": b[-1, 1], "first_lower": b[0, 0]} for label, b in bounds.items()}
    result: dict[str, Any] = {"noise_ratio": last, "rows": rows, "seconds": time.perf_counter() - started}
    return finish("noise-ratio", TITLE, preset, seed, out, result, {"curves": bounds}, draw)


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
