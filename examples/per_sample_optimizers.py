"""What follows the slopes best: momentum, Adam, or a damped Gauss-Newton step made of the same slopes.

PYTHONPATH=. python examples/per_sample_optimizers.py

With answers estimates have a cosine of 0.9999 to the gradient, so that exact slopes stand for them here. The slopes of
every sample, those of labels that the model draws itself, are a factor of its Fisher matrix: a Gauss-Newton step is one
solution with their products, a number a pair of samples. That wants slopes twice in a step, so that for the same passes
it has half as many. A memory begins each step where the last one led (the idea of SPRING: Goldshlager, Abrahamsen and
Lin, 2024, arXiv:2401.10190).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from benchmarks.deviations import LOSS, batch, exact, forward, start

X, LABELS = batch()
ALL = len(LABELS)
# Samples a step, and gradients of so many.
REGIMES = ((ALL, 150), (64, 1000))
RATES = {"momentum": (0.03, 0.1, 0.3, 1.0, 3.0), "Adam": (0.001, 0.003, 0.01, 0.03, 0.1)}
# Of Gauss-Newton steps: lambda, with rates.
DAMPINGS, STEP_SIZES = (0.01, 0.03, 0.1, 0.3), (0.1, 0.3)

Step = Callable[[Any, Any, Any], Any]


def by(optimizer: optax.GradientTransformation) -> tuple[Step, Any]:
    """Steps of one of optax's optimizers, and their first state."""

    def step(state: Any, rows: Any, key: Any) -> Any:
        del key
        params, inner = state
        updates, inner = optimizer.update(exact(params, rows), inner, params)
        return optax.apply_updates(params, updates), inner

    params = start(0)
    return step, (params, optimizer.init(params))


def gauss_newton(step_size: float, damping: float, memory: float) -> tuple[Step, Any]:
    """Damped steps ``(F + lambda)^-1 (g + lambda memory d)`` after d, and their first state."""
    flat, unravel = ravel_pytree(start(0))

    def of_one(p: Any, x: Any, label: Any) -> Any:
        return LOSS(forward(unravel(p), x[None]), label[None])

    def step(state: Any, rows: Any, key: Any) -> Any:
        p, last = state
        drawn = jax.random.categorical(key, forward(unravel(p), rows[0]))
        slopes = jax.vmap(jax.grad(of_one), (None, 0, 0))(p, rows[0], drawn)
        right = ravel_pytree(exact(unravel(p), rows))[0] + damping * memory * last
        matrix = slopes @ slopes.T + len(drawn) * damping * jnp.eye(len(drawn))
        direction = (right - slopes.T @ jax.scipy.linalg.solve(matrix, slopes @ right, assume_a="pos")) / damping
        return p - step_size * direction, direction

    return step, (flat, jnp.zeros_like(flat))


def loss_after(step: Step, state: Any, samples: int, steps: int) -> float:
    """The loss of all predictions after training."""

    def one(state: Any, key: Any) -> tuple[Any, None]:
        rows = jnp.arange(ALL) if samples == ALL else jax.random.choice(key, ALL, (samples,), replace=False)
        return step(state, (X[rows], LABELS[rows]), key), None

    keys = jax.random.split(jax.random.key(1), steps)
    params = jax.jit(lambda state: jax.lax.scan(one, state, keys)[0])(state)[0]
    if not isinstance(params, dict):
        params = ravel_pytree(start(0))[1](params)
    return float(LOSS(forward(params, X), LABELS))


def main(regimes: tuple[tuple[int, int], ...] = REGIMES) -> dict[str, list[float]]:
    """Print a line for each way to follow, with the best of its settings in each regime."""
    makers = {"momentum": lambda rate: by(optax.sgd(rate, momentum=0.9)), "Adam": lambda rate: by(optax.adam(rate))}
    ways = {name: (1, [(f"rate {r:g}", makers[name](r)) for r in rates]) for name, rates in RATES.items()}
    for name, memory in (("Gauss-Newton", 0.0), ("Gauss-Newton with a memory", 0.9)):
        each = [(size, damping) for size in STEP_SIZES for damping in DAMPINGS]
        ways[name] = 2, [(f"rate {s:g}, lambda {d:g}", gauss_newton(s, d, memory)) for s, d in each]
    print("loss after slopes of " + "; ".join(f"{count} times {samples} samples" for samples, count in regimes))
    found: dict[str, list[float]] = {}
    for name, (slopes, settings) in ways.items():
        best = [
            min((loss_after(*way, samples, count // slopes), words) for words, way in settings)
            for samples, count in regimes
        ]
        found[name] = [loss for loss, _ in best]
        losses, words = "  ".join(f"{loss:.4f}" for loss in found[name]), "; ".join(words for _, words in best)
        print(f"{losses}  {name} ({words})", flush=True)
    return found


if __name__ == "__main__":
    main()
