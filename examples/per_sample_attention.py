"""How near to the exact gradient noise comes in attention, whose keys and values act on other places than their own.

A character transformer of two stock blocks, trained by backpropagation on the text that ``import this`` prints, so that
its attention has something to do. Then the mean of four estimates, of 800 particles each, beside the gradient.

    python examples/per_sample_attention.py --out attention.png
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from matplotlib.figure import Figure

from eki_jax import natural
from eki_jax.flax import linen_forward

LENGTH, WIDTH, HEADS, BLOCKS = 12, 16, 2, 2
LOSS = natural.mean_over_samples(
    lambda logits, following: jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, following))
)
# What a leaf is for, by a part of its name.
KINDS = {
    "'key'": "keys",
    "'value'": "values",
    "'query'": "queries",
    "'out'": "attention's output",
    "'Embed": "embeddings",
    "'LayerNorm": "layer norms",
    "'Dense": "dense layers",
}
WAYS = {
    "credit for all that comes later": {"discount": 1, "mixing": False},
    "a place's own loss alone": {"discount": 0, "mixing": False},
    "its own, and what others ask of it": {"discount": 0},
}


class Decoder(nn.Module):
    """Logits (B, T, V) of the next character after each of (B, T)."""

    characters: int

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """The logits."""
        places = jnp.broadcast_to(jnp.arange(LENGTH), tokens.shape)
        x = nn.Embed(self.characters, WIDTH)(tokens) + nn.Embed(LENGTH, WIDTH)(places)
        for _ in range(BLOCKS):
            x = x + nn.MultiHeadDotProductAttention(HEADS)(nn.LayerNorm()(x), mask=nn.make_causal_mask(tokens))
            x = x + nn.Dense(WIDTH)(nn.gelu(nn.Dense(2 * WIDTH)(nn.LayerNorm()(x))))
        return nn.Dense(self.characters)(nn.LayerNorm()(x))


class Task(NamedTuple):
    """A trained model, its batch, and the loss's gradient there."""

    forward: Any
    params: Any
    batch: tuple[jax.Array, jax.Array]
    gradient: Any


def task(steps: int = 300) -> Task:
    """Windows of the text, and a model that knows some of it."""
    with contextlib.redirect_stdout(io.StringIO()):
        import this
    text = codecs.decode(this.s, "rot13").lower()
    numbers = jnp.asarray(np.searchsorted(sorted(set(text)), list(text)))
    rows = jnp.arange(0, len(numbers) - LENGTH - 1, 3 * LENGTH)[:, None] + jnp.arange(LENGTH)
    batch = numbers[rows], numbers[rows + 1]
    module = Decoder(len(set(text)))
    forward, _ = linen_forward(module, batch[0])
    gradient = jax.grad(lambda p: jnp.asarray(LOSS(forward(p, batch[0]), batch[1])))
    optimizer = optax.adam(3e-3)

    def step(carry: Any, _: None) -> tuple[Any, None]:
        params, state = carry
        updates, state = optimizer.update(gradient(params), state)
        return (optax.apply_updates(params, updates), state), None

    params = module.init(jax.random.key(0), batch[0])["params"]
    (params, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, None, steps))((params, optimizer.init(params)))
    return Task(forward, params, batch, jax.jit(gradient)(params))


def mean_estimate(found: Task, number: int, particles: int, **options: Any) -> Any:
    """The mean of so many estimates."""
    deviations = natural.per_sample(causal=True, **options)
    estimate = natural.value_and_natural_direction(found.forward, LOSS, particles, 0.01, deviations=deviations)

    def add(total: Any, key: jax.Array) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, estimate(found.params, found.batch, key)[1]), None

    zero = jax.tree.map(jnp.zeros_like, found.params)
    return jax.jit(lambda keys: jax.lax.scan(add, zero, keys)[0])(jax.random.split(jax.random.key(1), number))


def cosines(found: Task, estimate: Any) -> dict[str, float]:
    """Cosines to the gradient, by what leaves are for, and of all."""
    kinds: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {kind: [] for kind in KINDS.values()}
    leaves = zip(jax.tree_util.tree_leaves_with_path(estimate), jax.tree.leaves(found.gradient), strict=True)
    for (path, mine), true in leaves:
        name = jax.tree_util.keystr(path)
        kind = next(kind for part, kind in KINDS.items() if part in name)
        kinds[kind].append((np.ravel(mine), np.ravel(true)))
    kinds["all weights"] = [pair for pairs in kinds.values() for pair in pairs]
    both = {kind: [np.concatenate(side) for side in zip(*pairs, strict=True)] for kind, pairs in kinds.items()}
    return {kind: float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b))) for kind, (a, b) in both.items()}


def draw(table: dict[str, dict[str, float]], out: Path) -> None:
    """Bars by kind of leaf, one colour a way of credit."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots()
    kinds = list(next(iter(table.values())))
    places = np.arange(len(kinds))
    for index, (name, row) in enumerate(table.items()):
        axes.bar(places + 0.27 * (index - 1), list(row.values()), 0.25, label=name)
    axes.set(
        xticks=places,
        xticklabels=[kind.replace(" ", "\n") for kind in kinds],
        ylabel="cosine to the gradient",
        ylim=(0, 1),
    )
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Print and draw a table, and return it: by the way of credit, cosines by kind of leaf."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("attention.png"))
    parser.add_argument("--particles", type=int, default=800)
    parser.add_argument("--estimates", type=int, default=4)
    arguments = parser.parse_args(argv)
    found = task()
    table = {}
    print("cosine to the gradient of", ", ".join([*KINDS.values(), "all weights"]))
    for name, options in WAYS.items():
        estimate = mean_estimate(found, arguments.estimates, arguments.particles, **options)
        table[name] = cosines(found, estimate)
        print("  ".join(f"{value:6.3f}" for value in table[name].values()), f" {name}", flush=True)
    draw(table, arguments.out)
    print(f"wrote {arguments.out}")
    return table


if __name__ == "__main__":
    main()
