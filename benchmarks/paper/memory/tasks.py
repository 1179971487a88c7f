"""Sequences whose answer depends on what was seen long before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import eki_jax
from eki_jax import natural

SYMBOLS, LETTERS = 3, 4  # of the copying problem: what is to be kept, and of how many kinds


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
    """

    inputs: int
    outputs: int
    read: int
    draw: Callable[[jax.Array, int], tuple[jax.Array, jax.Array]]
    loss: Any
    mean_loss: Callable[[jax.Array, jax.Array], jax.Array]
    error: Callable[[jax.Array, jax.Array], jax.Array]
    trivial: float


def adding(length: int) -> Task:
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
    return Task(2, 1, 1, draw, eki_jax.squared_error(), error, error, 1 / 6)


def copying(length: int) -> Task:
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

    def mean_loss(outputs: jax.Array, targets: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(outputs, targets).mean()

    error = lambda outputs, targets: jnp.mean(jnp.argmax(outputs, axis=-1) != targets)
    loss = natural.softmax_cross_entropy()
    return Task(LETTERS + 2, LETTERS, SYMBOLS, draw, loss, mean_loss, error, 1 - 1 / LETTERS)


TASKS = {"adding": adding, "copying": copying}
