"""How close the ensemble's gradients come to the exact ones, layer by layer, in the span and localized.

python examples/natural_gradients.py
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from natural_digits import load

import eki_jax
from eki_jax import natural
from eki_jax.flax import low_rank_forward

LAYERS = {"Conv_0": "first convolution", "Conv_1": "second convolution", "Dense_0": "dense layer"}


class Convolutional(nn.Module):
    """Two convolutions of 8 and 16 filters with pooling, and a dense layer: 1,898 parameters."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits (B, 10) of images (B, 64)."""
        x = x.reshape(-1, 8, 8, 1)
        for filters in (8, 16):
            x = nn.max_pool(nn.relu(nn.Conv(filters, (3, 3))(x)), (2, 2), (2, 2))
        return nn.Dense(10)(x.reshape(len(x), -1))


def cosines(particles: int, localized: bool, trained: int = 40, draws: int = 3) -> dict[str, float]:
    """Between the estimated and the exact gradient of each layer's matrix, the mean over draws of the deviations."""
    digits = load()
    batch = digits.images[:400], digits.labels[:400]
    forward, template = low_rank_forward(Convolutional(), digits.images[:1])
    loss = natural.softmax_cross_entropy()
    gradient = jax.jit(jax.grad(lambda params: loss(forward(params, batch[0]), batch[1])))
    params = eki_jax.xavier(template, window=True).sample(jax.random.key(0))
    tx = optax.adam(1e-2)
    state = tx.init(params)
    for _ in range(trained):
        updates, state = tx.update(gradient(params), state)
        params = optax.apply_updates(params, updates)
    exact = gradient(params)
    # So much damping that the matrix does not count: what is left is the gradient, each leaf times its variance.
    kind = natural.localized(1) if localized else natural.span()
    estimate = natural.value_and_natural_direction(forward, loss, particles, damping=1e6, estimate=kind)
    direction_of = jax.jit(estimate)
    total = dict.fromkeys(LAYERS, 0.0)
    for key in jax.random.split(jax.random.key(1), draws):
        _, direction = direction_of(params, batch, key)
        for layer in LAYERS:
            a, b = (tree[layer]["kernel"].ravel() for tree in (direction, exact))
            total[layer] += float(a @ b / jnp.linalg.norm(a) / jnp.linalg.norm(b))
    return {layer: value / draws for layer, value in total.items()}


def main(sizes: tuple[int, ...] = (100, 400, 1600)) -> dict[tuple[int, bool], dict[str, float]]:
    """Print a line for each number of particles and each estimate."""
    print("cosine to the exact gradient: " + ", ".join(LAYERS.values()))
    found = {(size, localized): cosines(size, localized) for size in sizes for localized in (False, True)}
    for (size, localized), row in found.items():
        values = "  ".join(f"{value:.2f}" for value in row.values())
        print(f"{values}  {size:4d} particles, {'localized' if localized else 'in the span'}")
    return found


if __name__ == "__main__":
    main()
