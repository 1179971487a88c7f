"""What the settings of natural-gradient ensembles do, on scikit-learn's digits: one line for each.

python examples/natural_settings.py
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from natural_digits import BATCH, Digits, load

import eki_jax
from eki_jax.flax import dense_network, low_rank_forward
from eki_jax.natural import adaptive_damping, full_rank, low_rank, natural_gradient, softmax_cross_entropy

SPAN: dict[str, dict[str, Any]] = {
    "as they are: sigma 0.1, lambda 1e-4, rank 1": {},
    "lambda 1e-3": {"damping": 1e-3},
    "lambda 1e-5": {"damping": 1e-5},
    "sigma 0.3": {"sigma": 0.3},
    "sigma 0.03": {"sigma": 0.03},
    "sigma 0.03, lambda 1e-5": {"sigma": 0.03, "damping": 1e-5},
    "learning rate 0.5": {"learning_rate": 0.5},
    "lambda adapts": {"damping": adaptive_damping(1e-4)},
    "antithetic": {"antithetic": True},
    "the same deviations for an epoch": {"redraw_every": 3},
    "rank 4": {"deviations": low_rank(4)},
    "full rank": {"deviations": full_rank()},
}
LOCALIZED: dict[str, dict[str, Any]] = {
    "localized, lambda 1e-5, learning rate 0.5": {},
    "localized, lambda 1e-4": {"damping": 1e-4},
    "localized, lambda 1e-6": {"damping": 1e-6},
    "localized, learning rate 1": {"learning_rate": 1.0},
    "localized, norm at most 3, lambda 1e-6": {"norm_constraint": 3.0, "damping": 1e-6},
    "localized, norm at most 3, learning rate 1": {"norm_constraint": 3.0, "learning_rate": 1.0},
}


def accuracies(digits: Digits, epochs: int, options: dict[str, Any]) -> tuple[float, float]:
    """Of the last iterate and of the average of the iterates, on the test set."""
    forward, template = low_rank_forward(dense_network((32, 10)), digits.images[:1], method="logits")
    solver = natural_gradient(
        forward, softmax_cross_entropy(), averaging=lambda n: jnp.minimum(0.9, n / (n + 5)), **options
    )
    state = solver.init(eki_jax.xavier(template).sample(jax.random.key(1)), jax.random.key(2))
    step = jax.jit(solver.step)
    for epoch in range(epochs):
        for batch in digits.batches(epoch):
            state, _ = step(state, batch)
    share = lambda params: float((forward(params, digits.test_images).argmax(axis=-1) == digits.test_labels).mean())
    return share(state.position), share(state.average)


def main(epochs: int = 10) -> dict[str, tuple[float, float]]:
    """Run all of them, 200 particles in their span and 50 localized; print and return."""
    digits, found = load(), {}
    cases = {name: (epochs, {"particles": 200} | options) for name, options in SPAN.items()}
    basis = {"particles": 50, "localized": True, "damping": 1e-5, "learning_rate": 0.5}
    cases |= {name: (epochs, basis | options) for name, options in LOCALIZED.items()}
    print(f"test accuracy after {epochs} epochs in batches of {BATCH}: last iterate, average")
    for name, (count, options) in cases.items():
        found[name] = accuracies(digits, count, options)
        print(f"{found[name][0]:.4f}  {found[name][1]:.4f}  {options['particles']:3d} particles, {name}", flush=True)
    return found


if __name__ == "__main__":
    main()
