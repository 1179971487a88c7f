"""Accuracy for a number of forward passes: EKI(R) and three natural-gradient ensembles on scikit-learn's digits.

python examples/natural_digits.py [--picture FILE]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import eki_jax
from eki_jax.flax import dense_network, linen_forward, low_rank_forward
from eki_jax.natural import full_rank, low_rank, natural_gradient, softmax_cross_entropy

BATCH = 400


class Digits(NamedTuple):
    """Images (n, 64), standardised with the training set's mean and deviation, and labels (n,)."""

    images: np.ndarray
    labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray

    def batches(self, epoch: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """One epoch of shuffled batches; what is left over waits for the next."""
        order = np.random.default_rng(epoch).permutation(len(self.labels))
        for start in range(0, len(order) - BATCH + 1, BATCH):
            rows = order[start : start + BATCH]
            yield self.images[rows], self.labels[rows]


class Curve(NamedTuple):
    """Test accuracies after so many forward passes of one sample."""

    passes: list[int]
    accuracies: list[float]


def load() -> Digits:
    images, labels = load_digits(return_X_y=True)
    train, test, train_labels, test_labels = train_test_split(images, labels, test_size=400, random_state=0)
    standard = lambda x: ((x - train.mean()) / train.std()).astype(np.float32)
    return Digits(standard(train), train_labels, standard(test), test_labels)


def curve(
    digits: Digits, epochs: int, passes: int, state: Any, step: Any, redraw: Any, predict: Callable[[Any], Any]
) -> Curve:
    """Train, and measure after every epoch."""
    found, spent, step = Curve([], []), 0, jax.jit(step)
    for epoch in range(epochs):
        if epoch:
            state = redraw(state, jax.random.key(epoch))
        for batch in digits.batches(epoch):
            state, _ = step(state, batch)
            spent += passes * BATCH
        found.passes.append(spent)
        found.accuracies.append(float((predict(state).argmax(axis=-1) == digits.test_labels).mean()))
    return found


def natural(digits: Digits, epochs: int, particles: int, **options: Any) -> Curve:
    """One of the natural-gradient ensembles, predicting with the average of its iterates."""
    forward, template = low_rank_forward(dense_network((32, 10)), digits.images[:1], method="logits")
    solver = natural_gradient(
        forward, softmax_cross_entropy(), particles, averaging=lambda n: jnp.minimum(0.9, n / (n + 5)), **options
    )
    state = solver.init(eki_jax.xavier(template).sample(jax.random.key(1)), jax.random.key(2))
    predict = jax.jit(lambda state: forward(state.average, digits.test_images))
    return curve(digits, epochs, solver.passes(particles), state, solver.step, lambda state, key: state, predict)


def eki(digits: Digits, epochs: int, particles: int) -> Curve:
    """EKI(R): every particle moves; they are redrawn around their mean before an epoch."""
    forward, template = linen_forward(dense_network((32, 10)), digits.images[:1])
    prior = eki_jax.xavier(template)
    solver = eki_jax.euler(forward, eki_jax.cross_entropy(), eki_jax.paper_step_size())
    state = solver.init(eki_jax.sample_ensemble(jax.random.key(1), prior, particles))
    redraw = jax.jit(lambda state, key: solver.init(eki_jax.resample_around_mean(key, state.position, prior)))
    predict = jax.jit(lambda state: forward(eki_jax.mean_particle(state.position), digits.test_images))
    return curve(digits, epochs, particles, state, solver.step, redraw, predict)


def main(epochs: int = 40, picture: str | None = None) -> dict[str, Curve]:
    """Train all of them; print and return their curves."""
    digits = load()
    curves = {
        "EKI(R), 400 particles": eki(digits, epochs // 2, 400),
        "natural, full rank, 200 particles": natural(digits, epochs, 200, deviations=full_rank()),
        "natural, rank 1, 200 particles": natural(digits, epochs, 200, deviations=low_rank(1)),
        "natural, rank 1, localized, 50 particles": natural(
            digits, epochs, 50, deviations=low_rank(1), localized=True, damping=1e-5, learning_rate=0.5
        ),
    }
    for name, found in curves.items():
        print(f"{name}: {found.accuracies[-1]:.4f} after {found.passes[-1] / 1e6:.1f} million forward passes")
    if picture:
        draw(curves, picture)
    return curves


def draw(curves: dict[str, Curve], picture: str) -> None:
    """Accuracy against forward passes, into a file."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4))
    for name, found in curves.items():
        axes.plot(np.array(found.passes) / 1e6, found.accuracies, marker=".", label=name)
    axes.set(xscale="log", ylim=(0.5, 1), xlabel="forward passes of a sample (millions)", ylabel="test accuracy")
    axes.set_title("The digits, 64-32-10 network, batches of 400")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left", fontsize=8)
    figure.tight_layout()
    figure.savefig(picture, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", metavar="FILE", help="draw the curves into this file")
    main(picture=parser.parse_args().picture)
