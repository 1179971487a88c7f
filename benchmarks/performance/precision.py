"""What lower precision costs: the error of the direction against float64, and the accuracy after training."""

from __future__ import annotations

import functools
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.problems import registry
from eki_jax import direction, euler, losses, priors
from eki_jax.compact import compact, compact_euler
from eki_jax.ensembles import resample_around_mean, sample_ensemble
from eki_jax.losses.support import evaluate_support


class Variant(NamedTuple):
    """A precision.

    Attributes:
        precision: of the products, as a solver takes it; "bf16" is that of the model's too.
        stored: whether the ensemble is stored as a float32 mean and bfloat16 deviations.
    """

    precision: Any
    stored: bool


VARIANTS = {
    "float32 highest": Variant("highest", False),
    "tf32 products": Variant("tensorfloat32", False),
    "bf16 products": Variant("bf16", False),
    "bf16 storage, float32 mean": Variant("highest", True),
    "bf16 products and storage": Variant("bf16", True),
}
# problem -> (particles, batch, epochs) by preset
_TRAINING = {
    "quick": {"digits-dnn": (100, 60, 2)},
    "default": {"digits-dnn": (500, 60, 10), "mnist-dnn1": (500, 600, 2)},
    "full": {"digits-dnn": (1000, 60, 20), "mnist-dnn1": (2000, 600, 5)},
}


def trainings(preset: str) -> dict[str, list[int]]:
    """Particles, batch and epochs of the problems of a preset; those that need a file want the data's folder."""
    return {
        name: [*job] for name, job in _TRAINING[preset].items() if name == "digits-dnn" or "EKI_JAX_DATA" in os.environ
    }


def measure_precision(label: str, training: dict[str, list[int]]) -> dict[str, Any]:
    """The row of a variant."""
    row: dict[str, Any] = {"what": label, "direction_error": {}, "test_accuracy": {}}
    for name, (size, batch, epochs) in training.items():
        problem = _problem(name)
        row["direction_error"][name] = direction_error(problem, VARIANTS[label], size, batch)
        row["test_accuracy"][name] = accuracy(problem, VARIANTS[label], size, batch, epochs)
    return row


_problem = functools.cache(registry.get)


def direction_error(problem: registry.Problem, variant: Variant, size: int, batch: int) -> float:
    """Relative distance of the direction from its float64 value, on the first batch with the prior's ensemble.

    The model of that value is in float32, so that the distance is that of its outputs too.
    """
    x, labels = (jnp.asarray(array[:batch]) for array in problem.train)
    ensemble = jax.jit(lambda key: sample_ensemble(key, priors.xavier(problem.template), size))(jax.random.key(0))
    entries, reduced = evaluate_support(problem.forward, problem.loss, ensemble, x, labels, precision=variant.precision)
    _, cotangents = losses.value_and_cotangents(reduced, entries, labels)
    stored = compact(ensemble).deviations if variant.stored else ensemble
    found = direction(stored, entries, cotangents, precision=variant.precision)
    exact, reduced = evaluate_support(problem.forward, problem.loss, ensemble, x, labels)
    u, z, r = map(_rows, (ensemble, exact, losses.value_and_cotangents(reduced, exact, labels)[1]))
    wanted = r @ ((z - z.mean(0)).T @ (u - u.mean(0))) / size
    return float(np.linalg.norm(_rows(found) - wanted) / np.linalg.norm(wanted))


def _rows(tree: Any) -> np.ndarray:
    return np.concatenate([np.asarray(a, np.float64).reshape(len(a), -1) for a in jax.tree.leaves(tree)], axis=1)


def accuracy(problem: registry.Problem, variant: Variant, size: int, batch: int, epochs: int) -> float:
    """Test accuracy of the mean particle by EKI(R): the particles are redrawn around it after every epoch."""
    make = compact_euler if variant.stored else euler
    solver = make(problem.forward, problem.loss, precision=variant.precision)
    prior, count = priors.xavier(problem.template), len(problem.train[1]) // batch
    x, labels = map(jnp.asarray, problem.train)

    @jax.jit
    def epoch(state: Any, key: jax.Array) -> Any:
        rows = jax.random.permutation(key, len(labels))[: count * batch].reshape(count, batch)
        state, _ = jax.lax.scan(lambda s, i: solver.step(s, (x[i], labels[i])), state, rows)
        particles = resample_around_mean(key, solver.ensemble(state), prior)
        return solver.with_ensemble(state, particles), solver.estimate(state)

    state = solver.init(jax.jit(lambda key: sample_ensemble(key, prior, size))(jax.random.key(0)))
    for number in range(epochs):
        state, mean = epoch(state, jax.random.key(number + 1))
    outputs = problem.forward(mean, jnp.asarray(problem.test[0]))
    return float((outputs.argmax(-1) == jnp.asarray(problem.test[1])).mean())
