"""Train a flax network on scikit-learn's digits with a chain of optax, without a derivative of the network.

python examples/optax_digits.py
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from eki_jax import cross_entropy, mean_particle, sample_ensemble, xavier
from eki_jax.optax import ensemble_gradient, scale_by_drift_norm, value_and_extra_args


class Network(nn.Module):
    """One hidden layer of 32 units and class probabilities."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Probabilities (batch, 10) of images (batch, 64)."""
        return nn.softmax(nn.Dense(10)(nn.tanh(nn.Dense(32)(x))))


class Digits(NamedTuple):
    """Images (n, 64), standardised with the training set's mean and deviation, and labels (n,)."""

    images: np.ndarray
    labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray

    def batches(self, size: int, rng: np.random.Generator) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """One epoch of shuffled batches; what is left over waits for the next."""
        order = rng.permutation(len(self.labels))
        for start in range(0, len(order) - size + 1, size):
            rows = order[start : start + size]
            yield self.images[rows], self.labels[rows]


def load() -> Digits:
    images, labels = load_digits(return_X_y=True)
    train, test, train_labels, test_labels = train_test_split(images, labels, test_size=400, random_state=0)
    standard = lambda x: ((x - train.mean()) / train.std()).astype(np.float32)
    return Digits(standard(train), train_labels, standard(test), test_labels)


def main(particles: int = 1000, epochs: int = 15, batch_size: int = 400) -> float:
    """Train; print the mean particle's test accuracy after every epoch and return the last."""
    digits, network, rng = load(), Network(), np.random.default_rng(2)
    forward = lambda params, x: network.apply({"params": params}, x)
    extra_args = value_and_extra_args(forward, cross_entropy())

    tx = optax.chain(ensemble_gradient(), scale_by_drift_norm(2.0, 0.5), optax.trace(0.9), optax.scale(-1.0))
    template = jax.eval_shape(network.init, jax.random.key(0), digits.images[:1])["params"]
    ensemble = sample_ensemble(jax.random.key(1), xavier(template), particles)
    state = tx.init(ensemble)

    @jax.jit
    def step(ensemble, state, batch):
        losses, extra = extra_args(ensemble, batch)
        zeros = jax.tree.map(jnp.zeros_like, ensemble)
        updates, state = tx.update(zeros, state, ensemble, **extra)
        return optax.apply_updates(ensemble, updates), state, losses.mean()

    for epoch in range(epochs):
        for batch in digits.batches(batch_size, rng):
            ensemble, state, loss = step(ensemble, state, batch)
        predicted = forward(mean_particle(ensemble), digits.test_images).argmax(axis=-1)
        accuracy = float((predicted == digits.test_labels).mean())
        print(f"epoch {epoch + 1:2d}  mean loss {float(loss):.4f}  test accuracy {accuracy:.4f}")
    return accuracy


if __name__ == "__main__":
    main()
