"""Predictions of weighted particles: how good, how sure, and how easily fooled they are."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

CHUNK = 1000  # samples at a time
BINS = 15  # of confidence, for the calibration error
Forward = Callable[[Any, Any], jax.Array]


class Predictor(NamedTuple):
    """The weighted average of particles' probabilities.

    Attributes:
        particles: parameters of K particles, a leading axis.
        weights: weights of them, shape (K,), with sum 1.
    """

    particles: Any
    weights: jax.Array


def alone(params: Any) -> Predictor:
    """One particle."""
    return Predictor(jax.tree.map(lambda leaf: leaf[None], params), jnp.ones(1))


def average(particles: Any) -> Predictor:
    """All particles alike."""
    count = len(jax.tree.leaves(particles)[0])
    return Predictor(particles, jnp.full(count, 1 / count))


def weighted(particles: Any, weights: np.ndarray) -> Predictor:
    """Those particles whose weight is not zero in float32."""
    kept = np.flatnonzero(weights.astype(np.float32) > 0)
    return Predictor(jax.tree.map(lambda leaf: leaf[kept], particles), jnp.asarray(weights[kept] / weights[kept].sum()))


def probabilities(forward: Forward, predictor: Predictor, x: jax.Array) -> jax.Array:
    """The classes' probabilities, shape (B, classes), of a batch that fits in memory."""

    def add(total: jax.Array, one: Any) -> tuple[jax.Array, None]:
        params, weight = one
        return total + weight * forward(params, x), None

    shape = jax.eval_shape(forward, jax.tree.map(lambda leaf: leaf[0], predictor.particles), x)
    return jax.lax.scan(add, jnp.zeros(shape.shape, shape.dtype), tuple(predictor))[0]


def predicted(forward: Forward, predictor: Predictor, x: np.ndarray) -> np.ndarray:
    """The classes' probabilities of any number of samples."""
    return np.concatenate([_compiled(forward, predictor, x[i : i + CHUNK]) for i in _starts(x)])


_compiled = jax.jit(probabilities, static_argnums=0)


def losses(forward: Forward, particles: Any, x: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The mean negative log-likelihood of each particle, shape (J,)."""
    each = jax.jit(lambda u, x, y: jax.lax.map(lambda params: _surprise(forward(params, x), y), u))
    parts = [(each(particles, x[i : i + CHUNK], labels[i : i + CHUNK]), len(x[i : i + CHUNK])) for i in _starts(x)]
    return np.average([part for part, _ in parts], axis=0, weights=[count for _, count in parts])


def by_loss(losses: np.ndarray, beta: float) -> np.ndarray:
    """Weights in proportion to ``exp(-beta loss)``.

    >>> by_loss(np.array([0.0, 0.0, np.log(2)]), 1.0)
    array([0.4, 0.4, 0.2])
    """
    weights = np.exp(-beta * (losses - losses.min()))
    return weights / weights.sum()


def best_beta(
    forward: Forward,
    particles: Any,
    losses: np.ndarray,
    held_out: tuple[np.ndarray, np.ndarray],
    grid: tuple[float, ...],
) -> float:
    """The sharpness of weights whose average has the least loss on held-out samples."""
    x, labels = held_out
    found = {beta: surprise(predicted(forward, weighted(particles, by_loss(losses, beta)), x), labels) for beta in grid}
    return min(found, key=lambda beta: found[beta])


def accuracy(p: np.ndarray, labels: np.ndarray) -> float:
    """The share of samples whose likeliest class is right."""
    return float(np.mean(np.argmax(p, axis=1) == labels))


def surprise(p: np.ndarray, labels: np.ndarray) -> float:
    """The mean negative log-likelihood in nats."""
    return float(_surprise(jnp.asarray(p), jnp.asarray(labels)))


def reliability(p: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """By bins of confidence: how sure, how often right, which share of the samples; and the expected calibration error.

    Source: Guo et al., *On calibration of modern neural networks* (2017), equation 3.
    """
    sure, right = p.max(axis=1), np.argmax(p, axis=1) == labels
    index = np.minimum((sure * BINS).astype(int), BINS - 1)
    rows = [(sure[index == b].mean(), right[index == b].mean(), np.mean(index == b)) for b in np.unique(index)]
    error = sum(share * abs(confidence - hits) for confidence, hits, share in rows)
    return {"confidence": [r[0] for r in rows], "accuracy": [r[1] for r in rows], "share": [r[2] for r in rows]} | {
        "error": float(error)
    }


def attacked(
    forward: Forward,
    predictor: Predictor,
    x: np.ndarray,
    labels: np.ndarray,
    strength: float,
    limits: tuple[float, float],
    steps: int = 1,
) -> np.ndarray:
    """Adversarial examples in a ball of the largest norm: the fast gradient sign, or with steps projected gradients.

    Args:
        forward: function ``forward(params, x)`` to probabilities.
        predictor: predictor that is to be fooled, whose outputs are differentiated in the inputs.
        x: samples.
        labels: labels of them.
        strength: largest change of a number.
        limits: least and largest number that an image can have.
        steps: number of steps, each of two and a half times the strength over their number (1: of the strength).

    Foolbox, the one library of attacks that works with JAX, has had no release since March 2024; a test finds that it
    moves the same samples to the same places.

    Source: Goodfellow et al. (2015); Madry et al., *Towards deep learning models resistant to adversarial attacks*
    (2018), equation 3, without a random start.
    """
    size = strength if steps == 1 else 2.5 * strength / steps
    fooled = lambda x, labels: _fooled(forward, predictor, x, labels, (strength, size, *limits), steps)
    return np.concatenate([fooled(x[i : i + CHUNK], labels[i : i + CHUNK]) for i in _starts(x)])


@partial(jax.jit, static_argnums=(0, 5))
def _fooled(forward: Forward, predictor: Predictor, x: Any, labels: Any, sizes: Any, steps: int) -> jax.Array:
    strength, size, low, high = sizes
    slope = jax.grad(lambda moved: _surprise(probabilities(forward, predictor, moved), labels))

    def step(moved: jax.Array, _: None) -> tuple[jax.Array, None]:
        moved = moved + size * jnp.sign(slope(moved))
        return jnp.clip(jnp.clip(moved, x - strength, x + strength), low, high), None

    return jax.lax.scan(step, x, length=steps)[0]


def turned(x: np.ndarray, degrees: float, background: float) -> np.ndarray:
    """Images (B, H W) or (B, H, W[, C]) turned about their middle."""
    from scipy.ndimage import rotate

    side = round(x[0].size ** 0.5) if x[0].ndim == 1 else x.shape[1]
    images = x.reshape(len(x), side, side, -1)
    return rotate(images, degrees, axes=(2, 1), reshape=False, order=1, cval=background).reshape(x.shape)


def _surprise(p: jax.Array, labels: Any) -> jax.Array:
    return -jnp.mean(jnp.log(jnp.maximum(jnp.take_along_axis(p, labels[:, None], axis=1), 1e-12)))


def _starts(x: np.ndarray) -> range:
    return range(0, len(x), CHUNK)
