"""How near to the exact gradient noise comes in attention, whose keys and values act on other places than their own.

A character transformer of two stock blocks, trained by backpropagation on the text that ``import this`` prints, so that
its attention has something to do. Then the mean of many estimates, of 32 particles each, beside the gradient.

python examples/per_sample_attention.py
"""

from __future__ import annotations

import codecs
import contextlib
import io
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from eki_jax import natural
from eki_jax.flax import linen_forward

LENGTH, WIDTH, HEADS, BLOCKS = 16, 32, 2, 2
LOSS = natural.mean_over_samples(
    lambda logits, following: jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, following))
)
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
    rows = jnp.arange(0, len(numbers) - LENGTH - 1, LENGTH)[:, None] + jnp.arange(LENGTH)
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
    kinds: dict[str, list[tuple[Any, Any]]] = {}
    pairs = zip(jax.tree_util.tree_leaves_with_path(estimate), jax.tree.leaves(found.gradient), strict=True)
    for (path, mine), true in pairs:
        name = jax.tree_util.keystr(path)
        for kind in ("key", "query", "value", "out", "Embed", "LayerNorm", "Dense"):
            if f"'{kind}" in name:
                kinds.setdefault({"out": "attention's output", "Dense": "dense"}.get(kind, kind.lower()), []).append(
                    (mine, true)
                )
                break
    kinds["all"] = [pair for pairs in kinds.values() for pair in pairs]
    flat = lambda leaves: np.concatenate([np.ravel(leaf) for leaf in leaves])
    both = {kind: [flat(side) for side in zip(*pairs, strict=True)] for kind, pairs in kinds.items()}
    return {kind: float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b))) for kind, (a, b) in both.items()}


def main(number: int = 64, particles: int = 32) -> dict[str, dict[str, float]]:
    """Print a table, and return it: by the way of credit, cosines by kind of leaf."""
    found = task()
    table = {}
    for name, options in WAYS.items():
        table[name] = cosines(found, mean_estimate(found, number, particles, **options))
        if len(table) == 1:
            print("cosine of the mean of", number, "estimates to the gradient:", ", ".join(table[name]))
        print("  ".join(f"{value:6.3f}" for value in table[name].values()), f" {name}", flush=True)
    return table


if __name__ == "__main__":
    main()
