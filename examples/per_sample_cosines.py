"""How near to the exact gradient estimates from noise come, on a character model at its start and after 30 steps.

Three characters of the text that ``import this`` prints predict the next: 853 predictions in one batch, 5,728
parameters.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import eki_jax
from eki_jax import natural

WIDTHS = {"e": (32, 16), "w": (48, 64), "b": (64,), "v": (64, 32), "c": (32,)}


def batch() -> tuple[jax.Array, jax.Array]:
    """The characters before each, and each, as numbers."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        import this  # noqa: F401
    text = printed.getvalue().strip().lower()
    numbers = np.searchsorted(sorted(set(text)), list(text))
    return jnp.asarray(np.stack([numbers[i : i - 3] for i in range(3)], axis=1)), jnp.asarray(numbers[3:])


def forward(params: Any, x: jax.Array) -> jax.Array:
    """Logits of the next character."""
    hidden = jnp.tanh(params["e"][x].reshape(len(x), -1) @ params["w"] + params["b"])
    return hidden @ params["v"] + params["c"]


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table; arguments are other numbers of particles."""
    sizes = [int(text) for text in (sys.argv[1:] if argv is None else argv)] or [12, 48, 192]
    data, loss = batch(), natural.softmax_cross_entropy()
    template = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in WIDTHS.items()}
    start = eki_jax.xavier(template).sample(jax.random.key(0))
    start = {name: leaf if leaf.ndim > 1 else 0 * leaf for name, leaf in start.items()}
    exact = jax.jit(jax.grad(lambda p: loss(forward(p, data[0]), data[1])))
    trained = start
    for _ in range(30):
        trained = jax.tree.map(lambda p, g: p - g, trained, exact(trained))
    ways = {
        "covariance": natural.per_sample("covariance"),
        "least squares": natural.per_sample(),
    }
    print("cosine to the exact gradient: at the start, after 30 steps")
    for particles in sizes:
        for name, deviations in ways.items():
            estimate = jax.jit(
                natural.value_and_natural_direction(forward, loss, particles, 0.05, deviations=deviations)
            )
            cosines = [_cosine(estimate(p, data, jax.random.key(1))[1], exact(p)) for p in (start, trained)]
            print(f"{cosines[0]:.3f}  {cosines[1]:.3f}  {particles:4d} particles, {name}", flush=True)


def _cosine(a: Any, b: Any) -> float:
    a, b = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in (a, b))
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


if __name__ == "__main__":
    main()
