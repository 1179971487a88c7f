"""EDF-G on the handwritten digits of scikit-learn: one optax chain, three Krylov orders, next to Adam.

Run: python examples/edf_digits.py
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

from eki_jax import edf


def data() -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """Training and test images, scaled to [0, 1], with labels."""
    images, labels = load_digits(return_X_y=True)
    x, y = jnp.asarray(images / 16.0, jnp.float32), jnp.asarray(labels)
    return (x[:1500], y[:1500]), (x[1500:], y[1500:])


def train(
    optimizer: optax.GradientTransformation, objective: edf.Objective, params: Any, batch: Any, steps: int
) -> Any:
    """Full-batch training in one compiled scan; returns the parameters and the loss before every step."""
    optimizer = optax.with_extra_args_support(optimizer)

    def step(carry: Any, _: None) -> tuple[Any, jax.Array]:
        params, state = carry
        value, gradient = objective.value_and_grad(params, batch)
        updates, state = optimizer.update(gradient, state, params, objective=objective, batch=batch)
        return (optax.apply_updates(params, updates), state), value

    scan = jax.jit(lambda carry: jax.lax.scan(step, carry, None, length=steps))
    (params, _), losses = scan((params, optimizer.init(params)))
    return params, losses


def main(steps: int = 40) -> dict[str, float]:
    """Print training loss and test accuracy of every optimizer; returns the final losses."""
    (x, y), (test_x, test_y) = data()
    model = nn.Sequential([nn.Dense(32), nn.tanh, nn.Dense(10)])
    start = model.init(jax.random.key(0), x[:1])["params"]
    forward = lambda params, x: model.apply({"params": params}, x)
    loss = lambda logits, labels: optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    # Gradient and curvature in slices of 500 images: the same numbers, a third of the memory for activations.
    objective = edf.Objective(forward, loss, chunk_size=500)
    optimizers = {
        "Adam, rate 0.01": optax.adam(0.01),
        **{
            f"EDF-G, k = {k}": edf.edf_g(1.0, krylov_order=k, damping=(0.1, 1.0), acceleration=edf.nesterov())
            for k in (1, 5, 20)
        },
    }
    final = {}
    for name, optimizer in optimizers.items():
        params, losses = train(optimizer, objective, start, (x, y), steps)
        accuracy = jnp.mean(forward(params, test_x).argmax(-1) == test_y)
        final[name] = float(objective.value(params, (x, y)))
        curve = "  ".join(f"{float(value):.4f}" for value in losses[:: steps // 4])
        print(f"{name:16}  loss {curve}  {final[name]:.4f}  test accuracy {float(accuracy):.4f}")
    return final


if __name__ == "__main__":
    main()
