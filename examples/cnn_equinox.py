"""A convolutional network of stock equinox layers learns handwritten digits, without a derivative.

The module takes one image, as equinox's do; ``equinox_forward`` maps it over the samples, and natural-gradient steps of
low rank take it as it is.

python examples/cnn_equinox.py
"""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from natural_digits import load

from eki_jax import natural
from eki_jax.equinox import equinox_forward, xavier


def network(key: jax.Array) -> eqx.nn.Sequential:
    """Logits (10,) of one image (1, 8, 8): two convolutions, each pooled, and a dense layer; 1,898 parameters."""
    keys = jax.random.split(key, 3)
    return eqx.nn.Sequential(
        [
            eqx.nn.Conv2d(1, 8, 3, padding=1, key=keys[0]),
            eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.MaxPool2d(2, 2),
            eqx.nn.Conv2d(8, 16, 3, padding=1, key=keys[1]),
            eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.MaxPool2d(2, 2),
            eqx.nn.Lambda(jnp.ravel),
            eqx.nn.Linear(64, 10, key=keys[2]),
        ]
    )


def main(epochs: int = 5, particles: int = 300) -> float:
    """Train, and print the accuracy on digits that were held out."""
    digits = load()
    module = network(jax.random.key(0))
    forward, template = equinox_forward(module)
    deviations = natural.low_rank(scale=xavier(template))  # equinox's weights have their outputs first
    solver = natural.natural_gradient(forward, natural.softmax_cross_entropy(), particles, deviations=deviations)
    state = solver.init(eqx.filter(module, eqx.is_inexact_array), jax.random.key(1))
    train = jax.jit(lambda state, batches: lax.scan(solver.step, state, batches))
    predict = jax.jit(lambda params: forward(params, digits.test_images.reshape(-1, 1, 8, 8)).argmax(axis=-1))
    for epoch in range(epochs):
        batches = [(x.reshape(-1, 1, 8, 8), labels) for x, labels in digits.batches(epoch)]
        state, infos = train(state, jax.tree.map(lambda *rows: jnp.stack(rows), *batches))
        accuracy = float((predict(state.position) == digits.test_labels).mean())
        refused = int((~infos.moved).sum())
        print(f"epoch {epoch + 1}: loss {float(infos.loss[-1]):.3f}, test accuracy {accuracy:.4f}, {refused} refused")
    return accuracy


if __name__ == "__main__":
    main()
