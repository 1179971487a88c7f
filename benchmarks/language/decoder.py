"""A decoder transformer of stock flax layers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn


class Decoder(nn.Module):
    """Logits (B, T, V) of the next character after each of (B, T).

    Attributes:
        characters: size V of the vocabulary.
        context: largest T.
        layers: number of blocks.
        width: numbers of a character between the blocks.
        heads: number of heads of attention.
    """

    characters: int
    context: int = 64
    layers: int = 2
    width: int = 128
    heads: int = 4

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """The logits."""
        x = nn.Embed(self.characters, self.width)(tokens)
        # For every sample by itself, so that noise of a sample's own reaches the places' vectors too.
        places = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        x = x + nn.Embed(self.context, self.width)(places)
        mask = nn.make_causal_mask(tokens)
        for _ in range(self.layers):
            x = x + nn.MultiHeadDotProductAttention(self.heads)(nn.LayerNorm()(x), mask=mask)
            x = x + nn.Dense(self.width)(nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x))))
        return nn.Dense(self.characters)(nn.LayerNorm()(x))
