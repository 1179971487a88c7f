"""Six labels are enough for a thousand points: semi-supervised learning on a graph, and the picture of its page.

Run from the repository's root: ``python examples/two_moons.py [PICTURE.png]``.
"""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import make_moons

import eki_jax
from eki_jax import semi_supervised as graphs


def main(path: str) -> None:
    """Learn the classes, print the accuracy and draw the picture."""
    points, classes = make_moons(1000, noise=0.08, random_state=0)
    labels = 2.0 * classes - 1
    observed = np.concatenate([np.flatnonzero(labels == sign)[:3] for sign in (-1, 1)])

    laplacian = graphs.graph_laplacian(graphs.gaussian_affinity(points, width=0.1, neighbours=12))
    basis = graphs.eigenbasis(laplacian, modes=20)
    prior = graphs.graph_prior(basis)

    solver = eki_jax.euler(graphs.observed_sign, graphs.mean_squared_error, eki_jax.paper_step_size())
    state = solver.init(eki_jax.sample_ensemble(jax.random.key(0), prior, 500))
    before = eki_jax.mean_particle(state.ensemble)
    step = jax.jit(solver.step)
    for _ in range(10):
        state, _ = step(state, (observed, jnp.asarray(labels[observed])))
    u = eki_jax.mean_particle(state.ensemble)
    print(f"accuracy with {len(observed)} labels: {np.mean(np.sign(u) == labels):.3f}")

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), constrained_layout=True)
    for axis, values, title in zip(
        axes,
        (prior.sample(jax.random.key(1)), before, u),
        ("one draw of the prior", "mean particle before the labels", "mean particle after 10 steps"),
        strict=True,
    ):
        limit = float(jnp.abs(values).max())
        drawn = axis.scatter(*points.T, c=values, cmap="coolwarm", vmin=-limit, vmax=limit, s=6)
        figure.colorbar(drawn, ax=axis)
        axis.set(title=title, xticks=[], yticks=[])
    for sign, marker in ((-1, "v"), (1, "^")):
        seen = observed[labels[observed] == sign]
        axes[2].scatter(*points[seen].T, c="k", marker=marker, s=60)
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "two_moons.png")
