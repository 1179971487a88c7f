"""Sequences whose answer depends on what was seen long before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import eki_jax
from benchmarks.problems import data as datasets
from eki_jax import natural

SYMBOLS, LETTERS = 3, 4  # of the copying problem: what is to be kept, and of how many kinds
REPORTED, TUNING = 2000, 2001  # seeds of the examples that measure a run
COUNT = 1000  # of them, where a problem makes its own
HELD_OUT = 1 / 6  # share of the training images that choose settings
PERMUTATION = 0  # seed of the order in which pixels are seen, one for all


class Task(NamedTuple):
    """A problem of one length.

    Attributes:
        inputs: number of inputs a place.
        outputs: number of outputs a place.
        read: number of places at the end whose outputs count.
        draw: function ``draw(key, count) -> (x, targets)`` of so many different examples, x of shape
            (count, places, inputs).
        loss: convex loss of the outputs, for methods without derivatives.
        mean_loss: function ``mean_loss(outputs, targets)``, the same as a mean over examples, for methods with them.
        error: function ``error(outputs, targets)``, what the table shows.
        trivial: error of the best answer that looks at no input.
        tests: function ``tests(seed) -> (x, targets)``, the examples that measure: :data:`REPORTED` ones for what is
            reported, others for what chooses settings.
        scale: factor of the networks' units.
        batch: examples a step of the methods that take all of them elsewhere; None for all here too.
    """

    inputs: int
    outputs: int
    read: int
    draw: Callable[[jax.Array, int], tuple[jax.Array, jax.Array]]
    loss: Any
    mean_loss: Callable[[jax.Array, jax.Array], jax.Array]
    error: Callable[[jax.Array, jax.Array], jax.Array]
    trivial: float
    tests: Callable[[int], tuple[jax.Array, jax.Array]]
    scale: int = 1
    batch: int | None = None


def _drawn(draw: Callable[[jax.Array, int], Any]) -> Callable[[int], Any]:
    """The tests of a problem that makes its examples."""
    return lambda seed: draw(jax.random.key(seed), COUNT)


def _wrong(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Share of the answers that are not the targets."""
    return jnp.mean(jnp.argmax(outputs, axis=-1) != targets)


def _surprise(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(outputs, targets).mean()


def adding(length: int, data: Path | None = None) -> Task:
    """The adding problem (Hochreiter and Schmidhuber 1997): the sum of the two values that are marked.

    One mark is in the first half, one in the second; values are uniform in [0, 1]. The answer 1 has the error 1/6.

    >>> x, y = adding(10).draw(jax.random.key(0), 3)
    >>> x.shape, y.shape, bool(jnp.allclose(jnp.sum(x[..., 0] * x[..., 1], axis=1, keepdims=True), y))
    ((3, 10, 2), (3, 1), True)
    """

    def draw(key: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
        of_values, of_first, of_second = jax.random.split(key, 3)
        values = jax.random.uniform(of_values, (count, length))
        first = jax.random.randint(of_first, (count,), 0, length // 2)
        second = jax.random.randint(of_second, (count,), length // 2, length)
        marks = jax.nn.one_hot(first, length) + jax.nn.one_hot(second, length)
        return jnp.stack([values, marks], axis=-1), jnp.sum(values * marks, axis=1, keepdims=True)

    error = lambda outputs, targets: jnp.mean(jnp.square(outputs - targets))
    return Task(2, 1, 1, draw, eki_jax.squared_error(), error, error, 1 / 6, _drawn(draw))


def copying(length: int, data: Path | None = None) -> Task:
    """The copying problem: letters, a wait of ``length`` places, a mark, and then the letters again.

    The error is the share of letters that are wrong, which is 3/4 for four kinds of letters and no memory.

    >>> x, y = copying(10).draw(jax.random.key(0), 2)
    >>> x.shape, y.shape
    ((2, 16, 6), (2, 3))
    """

    def draw(key: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
        letters = jax.random.randint(key, (count, SYMBOLS), 0, LETTERS)
        wait = jnp.full((count, length), LETTERS)
        mark = jnp.full((count, 1), LETTERS + 1)
        after = jnp.full((count, SYMBOLS - 1), LETTERS)
        return jax.nn.one_hot(jnp.concatenate([letters, wait, mark, after], axis=1), LETTERS + 2), letters

    loss = natural.softmax_cross_entropy()
    return Task(LETTERS + 2, LETTERS, SYMBOLS, draw, loss, _surprise, _wrong, 1 - 1 / LETTERS, _drawn(draw))


def permuted(length: int, data: Path | None = None) -> Task:
    """Digits whose pixels are seen one at a time, in an order that is drawn once (Le, Jaitly and Hinton 2015).

    A length of 784 has MNIST's images as they are, 196 the means of 2 x 2 pixels, 64 the digits of scikit-learn. The
    error is the share of images that are taken for another digit. Settings are chosen by a sixth of the training
    images, which no run learns from.

    Args:
        length: number of pixels.
        data: folder of the data files.

    Raises:
        MissingFile: a file of MNIST is missing.

    >>> x, y = permuted(64).draw(jax.random.key(0), 2)
    >>> x.shape, y.shape
    ((2, 64, 1), (2,))
    """
    if length not in (64, 196, 784):
        raise ValueError(f"length: {length}; wanted 64, 196 or 784 pixels")
    found = datasets.digits() if length == 64 else datasets.mnist(data)
    order = np.random.default_rng(PERMUTATION).permutation(length)

    def seen(images: np.ndarray) -> np.ndarray:
        if length == 196:
            images = images.reshape(-1, 14, 2, 14, 2).mean((2, 4))
        return images.reshape(len(images), length, 1)[:, order]

    images, labels = seen(found.train_x), found.train_y
    cut = round(len(images) * (1 - HELD_OUT))
    train = images[:cut], labels[:cut]

    def draw(key: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
        if count > cut:
            raise ValueError(f"count: {count}; wanted at most {cut} different images")
        chosen = jax.random.choice(key, cut, (count,), replace=False)
        return jnp.asarray(train[0])[chosen], jnp.asarray(train[1])[chosen]

    def tests(seed: int) -> tuple[jax.Array, jax.Array]:
        x, y = (seen(found.test_x), found.test_y) if seed == REPORTED else (images[cut:], labels[cut:])
        return jnp.asarray(x), jnp.asarray(y)

    loss = natural.softmax_cross_entropy()
    return Task(1, 10, 1, draw, loss, _surprise, _wrong, 0.9, tests, scale=4, batch=200)


TASKS = {"adding": adding, "copying": copying, "permuted digits": permuted}
