"""Half of a network by EKI, half by Adam: a hidden layer that has no derivative, and a head that has one.

The hidden layer's units are +1 or -1, so that no gradient passes through them: its weights are an ensemble and move by
ensemble Kalman inversion. The head is one set of weights for all particles, trained by back-propagation and Adam.
``optax.partition`` gives each half its own optimizer.

python examples/optax_partition.py
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from optax_digits import Digits, load

from eki_jax import cross_entropy, sample_ensemble, xavier
from eki_jax.optax import eki, value_and_extra_args

WIDTH = 32
HIDDEN, HEAD, LOSS = nn.Dense(WIDTH), nn.Dense(10), cross_entropy()


def forward(params: Any, x: jax.Array) -> jax.Array:
    """Probabilities (batch, 10) of images (batch, 64), for one particle's hidden layer."""
    signs = jnp.sign(HIDDEN.apply({"params": params["hidden"]}, x))
    return nn.softmax(HEAD.apply({"params": params["head"]}, signs))


def with_head(head: Any) -> Any:
    """The model of one particle: the hidden layer is what varies."""
    return lambda hidden, x: forward({"hidden": hidden, "head": head}, x)


def start(particles: int) -> Any:
    """Parameters of which only those that EKI moves have a particle axis."""
    template = jax.eval_shape(HIDDEN.init, jax.random.key(0), jnp.zeros((1, 64)))["params"]
    hidden = sample_ensemble(jax.random.key(1), xavier(template), particles)
    return {"hidden": hidden, "head": HEAD.init(jax.random.key(2), jnp.zeros((1, WIDTH)))["params"]}


def train(params: Any, hidden_optimizer: optax.GradientTransformation, digits: Digits, epochs: int, size: int) -> float:
    """The test accuracy of the particles' averaged probabilities."""
    tx = optax.partition({"eki": hidden_optimizer, "adam": optax.adam(1e-2)}, {"hidden": "eki", "head": "adam"})
    state, rng = tx.init(params), np.random.default_rng(3)

    @jax.jit
    def step(params, state, batch):
        _, extra = value_and_extra_args(with_head(params["head"]), LOSS)(params["hidden"], batch)

        def mean_loss(head):
            outputs = jax.vmap(with_head(head), in_axes=(0, None))(params["hidden"], batch[0])
            return jax.vmap(LOSS, in_axes=(0, None))(outputs, batch[1]).mean()

        zeros = jax.tree.map(jnp.zeros_like, params["hidden"])
        grads = {"hidden": zeros, "head": jax.grad(mean_loss)(params["head"])}
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    for _ in range(epochs):
        for batch in digits.batches(size, rng):
            params, state = step(params, state, batch)
    outputs = jax.vmap(with_head(params["head"]), in_axes=(0, None))(params["hidden"], digits.test_images)
    return float((outputs.mean(axis=0).argmax(axis=-1) == digits.test_labels).mean())


def main(particles: int = 200, epochs: int = 20, batch_size: int = 200) -> tuple[float, float]:
    """Print and return the test accuracies with the hidden layer trained, and with one hidden layer left as drawn."""
    digits, params = load(), start(particles)
    trained = train(params, eki(0.5, 0.5), digits, epochs, batch_size)
    one = {**params, "hidden": jax.tree.map(lambda leaf: leaf[:1], params["hidden"])}
    as_drawn = train(one, optax.set_to_zero(), digits, epochs, batch_size)
    print(f"test accuracy: hidden layer by EKI {trained:.4f}, hidden layer as drawn {as_drawn:.4f}")
    return trained, as_drawn


if __name__ == "__main__":
    main()
