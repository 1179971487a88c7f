"""A decoder transformer of stock flax layers learns to spell, without a derivative.

The model is written as for back-propagation: embeddings, ``nn.MultiHeadDotProductAttention``, dense layers and
LayerNorm. ``linen_forward`` makes a function of it, and natural-gradient steps of low rank take that as it is.

The text is the licence of this library: the task is to predict each next letter.

python examples/transformer_flax.py
"""

from __future__ import annotations

import math
import string
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from eki_jax import natural
from eki_jax.flax import linen_forward

TEXT = Path(__file__).parents[1] / "LICENSE"
LETTERS = " " + string.ascii_lowercase
LENGTH = 16


class Block(nn.Module):
    """Attention to what came before, and two dense layers."""

    heads: int = 2

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Shape (B, T, n) to the same."""
        x = x + nn.MultiHeadDotProductAttention(self.heads)(nn.LayerNorm()(x), mask=mask)
        return x + nn.Dense(x.shape[-1])(nn.gelu(nn.Dense(2 * x.shape[-1])(nn.LayerNorm()(x))))


class Decoder(nn.Module):
    """A decoder transformer whose last matrix is the embedding."""

    width: int = 32
    blocks: int = 1

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits (B, T, V) of tokens (B, T)."""
        embed = nn.Embed(len(LETTERS), self.width)
        x = embed(tokens) + nn.Embed(LENGTH, self.width)(jnp.arange(tokens.shape[1]))
        for _ in range(self.blocks):
            x = Block()(x, nn.make_causal_mask(tokens))
        return embed.attend(nn.LayerNorm()(x))


class Result(NamedTuple):
    """What the run ends with, in nats for a letter.

    Attributes:
        uniform: loss of a guess that all letters are equally likely.
        frequencies: loss of a guess by the letters' frequencies.
        first: loss on the held-out text at the start.
        last: loss on the held-out text at the end.
    """

    uniform: float
    frequencies: float
    first: float
    last: float


def load() -> np.ndarray:
    """The text as numbers of letters: everything else counts as a space, several as one."""
    kept = "".join(c if c in LETTERS else " " for c in TEXT.read_text(encoding="utf-8").lower())
    return np.array([LETTERS.index(c) for c in " ".join(kept.split())], np.int32)


def windows(text: np.ndarray, starts: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Letters (B, T) and the letters that follow each of them."""
    rows = text[starts[:, None] + np.arange(LENGTH + 1)]
    return jnp.asarray(rows[:, :-1]), jnp.asarray(rows[:, 1:])


def main(steps: int = 70, particles: int = 200, samples: int = 64) -> Result:
    """Train, and print the loss on the last tenth of the text."""
    text = load()
    train, test = np.split(text, [len(text) * 9 // 10])
    held_out = windows(test, np.arange(0, len(test) - LENGTH, LENGTH))
    rng = np.random.default_rng(0)
    batches = [windows(train, rng.integers(0, len(train) - LENGTH, samples)) for _ in range(steps)]

    module = Decoder()
    forward, _ = linen_forward(module, held_out[0])
    loss = natural.softmax_cross_entropy()
    solver = natural.natural_gradient(forward, loss, particles)
    state = solver.init(module.init(jax.random.key(0), held_out[0])["params"], jax.random.key(1))
    held_out_loss = jax.jit(lambda params: loss(forward(params, held_out[0]), held_out[1]))
    first = float(held_out_loss(state.position))
    state, infos = jax.jit(lambda state, batches: lax.scan(solver.step, state, batches))(
        state, jax.tree.map(lambda *rows: jnp.stack(rows), *batches)
    )
    shares = np.bincount(train, minlength=len(LETTERS)) / len(train)
    frequencies = float(-np.mean(np.log(shares[test])))
    result = Result(math.log(len(LETTERS)), frequencies, first, float(held_out_loss(state.position)))
    print(f"nats for a letter: a uniform guess {result.uniform:.3f}, by the letters' frequencies {frequencies:.3f}")
    print(f"the transformer on held-out text: {result.first:.3f} at the start, {result.last:.3f} after {steps} steps")
    print(f"refused steps: {int((~infos.moved).sum())}")
    return result


if __name__ == "__main__":
    main()
