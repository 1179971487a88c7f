"""A network whose hidden units are +1 or -1 learns handwritten digits, and the picture of its page.

The derivative of a sign is zero wherever it exists, so that back-propagation teaches the last layer alone; with a
straight-through derivative, the one of a clipped identity in its place, it teaches all of them. Noise of a sample of
its own asks for no derivative. All three begin with the same weights and take the same steps of momentum SGD.

    python examples/sign_units.py --out sign_units.png
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
from natural_digits import Digits, load

import eki_jax
from eki_jax.flax import dense_network, linen_forward, sign, straight_through_sign
from eki_jax.natural import learned_feedback, natural_gradient, per_sample, softmax_cross_entropy

WIDTHS, BATCH, EPOCHS, RATE = (64, 64, 10), 100, 20, 0.1
LOSS = softmax_cross_entropy()


def train(
    digits: Digits, state: Any, step: Callable[..., Any], accuracy: Callable[[Any], Any], epochs: int
) -> list[float]:
    """Test accuracies after every epoch of shuffled batches."""
    step, accuracy = jax.jit(step), jax.jit(accuracy)
    found, rng = [float(accuracy(state))], np.random.default_rng(0)
    for _ in range(epochs):
        order = rng.permutation(len(digits.labels))
        for rows in np.split(order[: len(order) // BATCH * BATCH], len(order) // BATCH):
            state = step(state, (digits.images[rows], digits.labels[rows]))
        found.append(float(accuracy(state)))
    return found


def curves(epochs: int = EPOCHS) -> dict[str, list[float]]:
    """Test accuracies of the three ways, from the same weights."""
    digits, optimizer = load(), optax.sgd(RATE, momentum=0.9)
    forward, template = linen_forward(dense_network(WIDTHS, sign), digits.images[:1], method="logits")
    through, _ = linen_forward(dense_network(WIDTHS, straight_through_sign), digits.images[:1], method="logits")
    params = eki_jax.xavier(template).sample(jax.random.key(0))
    right = lambda params: (forward(params, digits.test_images).argmax(axis=-1) == digits.test_labels).mean()

    def by_gradients(model: Any) -> list[float]:
        def step(state: Any, batch: Any) -> Any:
            params, memory = state
            gradient = jax.grad(lambda params: LOSS(model(params, batch[0]), batch[1]))(params)
            updates, memory = optimizer.update(gradient, memory, params)
            return optax.apply_updates(params, updates), memory

        return train(digits, (params, optimizer.init(params)), step, lambda state: right(state[0]), epochs)

    solver = natural_gradient(
        forward,
        LOSS,
        particles=8,
        sigma=0.05,
        deviations=per_sample(feedback=learned_feedback(digits.images[:1])),
        optimizer=optimizer,
    )
    found = train(
        digits,
        solver.init(params, jax.random.key(1)),
        lambda state, batch: solver.step(state, batch)[0],
        lambda state: right(state.position),
        epochs,
    )
    return {
        "noise of a sample of its own, no derivative": found,
        "straight-through derivative": by_gradients(through),
        "derivative as it is: the last layer alone learns": by_gradients(forward),
    }


def main(out: Path, epochs: int = EPOCHS) -> dict[str, list[float]]:
    """Draws and returns the curves."""
    found = curves(epochs)
    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    for (name, accuracies), style in zip(found.items(), ("-", "--", ":"), strict=True):
        axes.plot(accuracies, style, label=f"{name} ({accuracies[-1]:.3f})")
    axes.set(xlabel="epochs", ylabel="test accuracy", ylim=(0, 1), xticks=range(0, epochs + 1, max(1, epochs // 5)))
    axes.legend(loc="lower right", frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(out, dpi=110)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("sign_units.png"))
    print({name: round(values[-1], 4) for name, values in main(parser.parse_args().out).items()})
