"""Mini-batch training: EDF-G of order 1 and 2 with both accelerations against momentum SGD and Adam (section 6.2)."""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.edf.networks import TwoConvolutions, resnet56, resnet110
from benchmarks.edf.training import MiniBatches, Model, Optimizer, adam, build, edf_method, mini_batch, momentum_sgd
from benchmarks.harness.store import Job
from benchmarks.problems import data as datasets
from eki_jax import edf


class Preset(NamedTuple):
    """Size of the experiment; ``images`` None takes all that are there."""

    images: int | None
    test_images: int | None
    epochs: int
    batch_size: int
    channels: tuple[int, int]
    hidden: int
    edf_rates: tuple[float, ...]
    momentum_rates: tuple[float, ...]
    adam_rates: tuple[float, ...]
    drop_after: int | None


PRESETS = {
    "smoke": Preset(8, 8, 1, 4, (2, 3), 8, (0.5,), (0.1,), (0.001,), None),
    "cpu": Preset(1000, 1000, 4, 100, (8, 16), 32, (0.25, 0.5, 1.0), (0.01, 0.03, 0.1), (0.001, 0.003, 0.01), None),
    "full": Preset(
        None,
        None,
        150,
        250,
        (32, 64),
        256,
        (0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0),
        (0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0, 10.0),
        (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1),
        20,
    ),
}
DAMPING = (1.0, 1.0)
# name -> (data, takes a preset to a network, has batch normalisation)
PROBLEMS: dict[str, Any] = {
    "mnist": (datasets.mnist, lambda preset: TwoConvolutions(preset.channels, preset.hidden), False),
    "cifar10": (datasets.cifar10, lambda preset: TwoConvolutions(preset.channels, preset.hidden), False),
    "cifar10-resnet56": (datasets.cifar10, lambda preset: resnet56(), True),
    "cifar10-resnet110": (datasets.cifar10, lambda preset: resnet110(), True),
}


def methods(preset: Preset) -> list[Optimizer]:
    """The paper's: damping a = b = 1, W1 with momentum 0.9, W2 with alpha = 3."""
    accelerations = {"W1": edf.heavy_ball(0.9), "W2": edf.nesterov(3.0)}
    flows = [
        edf_method(f"EDF-G, k = {order}, {name}", order, preset.edf_rates, DAMPING, acceleration)
        for order in (1, 2)
        for name, acceleration in accelerations.items()
    ]
    return [*flows, momentum_sgd(preset.momentum_rates, name="momentum SGD"), adam(preset.adam_rates)]


def plan(arguments: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Job]]:
    """Every method with every rate on every problem; the best rate is the one with the lowest final training loss."""
    preset, jobs = PRESETS[arguments.preset], {}
    for problem in arguments.problem:
        model, batches = _load(problem, preset, arguments.data, arguments.seed)
        sizes = {"images": len(batches.train[0]), "test_images": len(batches.test[0])}
        for method in methods(preset):
            # The paper lets only W2's rate drop.
            drop = preset.drop_after if method.name.endswith("W2") else None
            train = functools.partial(every_rate, method, model, batches._replace(drop_after=drop))
            jobs[f"{problem}: {method.name}"] = Job(sizes, train)
    return {**preset._asdict(), "damping": DAMPING}, jobs


def _load(problem: str, preset: Preset, data: Path | None, seed: int) -> tuple[Model, MiniBatches]:
    load, network, batch_norm = PROBLEMS[problem]
    dataset = load(data)
    train = dataset.train_x[: preset.images], dataset.train_y[: preset.images]
    test = dataset.test_x[: preset.test_images], dataset.test_y[: preset.test_images]
    model = build(network(preset), train[0], seed, batch_norm=batch_norm)
    return model, MiniBatches(train, test, preset.batch_size, preset.epochs, seed)


def every_rate(method: Optimizer, model: Model, batches: MiniBatches) -> dict[str, Any]:
    """The runs with each rate, and the best of them."""
    runs = mini_batch(method, model, batches)
    return {"runs": runs, "best": best(runs), "gradients_per_step": method.gradients}


def best(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The run with the lowest final training loss; one that ended early, at a loss that is not finite, is the worst."""
    longest = max(len(run["train_loss"]) for run in runs)
    whole = [run for run in runs if len(run["train_loss"]) == longest and run["train_loss"][-1] < float("inf")]
    return min(whole or runs, key=lambda run: run["train_loss"][-1])
