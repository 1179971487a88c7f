"""Inputs of the zoo's models: few, small, and the same for all APIs."""

from __future__ import annotations

import jax

#: Number of tokens of the small vocabulary.
VOCABULARY = 7
#: Length of the sequences of tokens.
LENGTH = 5


def vectors(samples: int = 16, size: int = 4) -> jax.Array:
    """Inputs of shape (B, n)."""
    return jax.random.normal(jax.random.key(3), (samples, size))


def images(samples: int = 8, size: int = 6, channels: int = 2) -> jax.Array:
    """Inputs of shape (B, h, h, c), channels last."""
    return jax.random.normal(jax.random.key(4), (samples, size, size, channels))


def sequences(samples: int = 8, length: int = 5, size: int = 3) -> jax.Array:
    """Inputs of shape (B, T, n)."""
    return jax.random.normal(jax.random.key(5), (samples, length, size))


def tokens(samples: int = 8) -> jax.Array:
    """Inputs of shape (B, T), integers."""
    return jax.random.randint(jax.random.key(6), (samples, LENGTH), 0, VOCABULARY)
