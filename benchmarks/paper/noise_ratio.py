"""Figure 8: how large the parameters are against the noise that EKI(R) adds at the end of an epoch.

The bounds are ``|mean u| / max_j |eta_j|`` and ``|mean u| / min_j |eta_j|``.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import eki_jax
from benchmarks.harness.figures import band, legend, panels, save, whole_numbers
from benchmarks.paper.classification import shown_runs
from benchmarks.paper.common import row
from benchmarks.paper.epochs import Figure, Look, Seen, shown_seen, sizes
from benchmarks.problems.registry import Problem
from eki_jax.training import Method

TITLE = "EKI(R) on DNN 1 and 2: the parameters' norm against the noise's (Figure 8)"


def noise_bounds(ensemble: Any, prior: Any, key: jax.Array, size: int) -> jax.Array:
    """``|mean u|`` over the largest and over the smallest norm of ``size`` draws of the noise, shape (2,)."""
    norm = lambda tree: jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(tree)))
    keys = jax.vmap(lambda index: jax.random.fold_in(key, index))(jnp.arange(size))
    noise = jax.lax.map(lambda key: norm(prior.noise(key)), keys)
    return norm(eki_jax.mean_particle(ensemble)) / jnp.stack([noise.max(), noise.min()])


def _look(method: Method, problem: Problem) -> Look:
    """The bounds, from as many draws as there are particles."""

    def look(state: Any, key: jax.Array) -> dict[str, jax.Array]:
        size = len(jax.tree.leaves(state.position)[0])
        return dict(zip(("lower", "upper"), noise_bounds(state.position, problem.prior, key, size), strict=True))

    return look


def _rows(label: str, seen: Seen, note: str) -> list[dict[str, Any]]:
    name = "noise ratio, {} epoch, {} bound over particles"
    moments = (("first", 0), ("last", -1))
    return [
        row(label, name.format(moment, bound), None, values[index], note)
        for moment, index in moments
        for bound, values in seen.items()
    ]


def _says(seen: Seen) -> dict[str, float]:
    ends = {bound: float(values[-1]) for bound, values in seen.items()}
    return {**ends, "first_lower": float(seen["lower"][0])}


FIGURE = Figure("eki-r", sizes(epochs=5), _look, _rows, "noise_ratio", _says)


def draw(result: dict[str, Any], path: Path) -> None:
    """A band a network, between the largest and the smallest noise of a particle."""
    figure, ((axis,),) = panels(1, 1, (5.6, 4))
    styles = itertools.cycle(("-", "--", ":", "-."))
    for (label, (record,)), style in zip(shown_runs(result).items(), styles, strict=False):
        lower, upper = (shown_seen(record)[bound] for bound in ("lower", "upper"))
        epochs = np.arange(1, len(lower) + 1)
        band(axis, epochs, lower, (lower + upper) / 2, upper, alpha=0.35, marks=style, label=label)
    axis.set(xlabel="epoch", ylabel="norm of the mean / norm of the noise")
    whole_numbers(axis)
    title = "band: the particle with the largest noise\nto the one with the smallest; line: their middle"
    legend(axis, title, loc="upper left")
    save(figure, path)
