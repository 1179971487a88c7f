"""The paper's appendix B: full-batch EDF per step against stochastic EDF per epoch, on MNIST."""

from __future__ import annotations

import argparse
import functools
from typing import Any, NamedTuple

from benchmarks.edf.networks import TwoConvolutions
from benchmarks.edf.stochastic import every_rate
from benchmarks.edf.training import MiniBatches, build, edf_method
from benchmarks.harness.store import Job
from benchmarks.problems import data as datasets
from eki_jax import edf


class Preset(NamedTuple):
    """Size of the experiment; ``images`` None takes all. A full-batch step costs what a stochastic epoch does."""

    images: int | None
    test_images: int | None
    epochs: int
    batch_size: int
    orders: tuple[int, ...]
    channels: tuple[int, int]
    hidden: int
    rates: tuple[float, ...]


PRESETS = {
    "smoke": Preset(40, 20, 2, 10, (1, 2), (2, 3), 8, (0.5,)),
    "cpu": Preset(1500, 1000, 6, 250, (1, 5), (8, 16), 32, (0.5, 1.0)),
    "full": Preset(None, None, 100, 500, (1, 10, 30), (32, 64), 256, (0.25, 0.5, 0.75, 1.0)),
}
DAMPING = (1.0, 1.0)


def plan(arguments: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Job]]:
    """EDF-G with W2: "full batch" and "mini-batch" for every order, each with the better of the preset's rates."""
    preset = PRESETS[arguments.preset]
    dataset = datasets.mnist(arguments.data)
    train = dataset.train_x[: preset.images], dataset.train_y[: preset.images]
    test = dataset.test_x[: preset.test_images], dataset.test_y[: preset.test_images]
    model = build(TwoConvolutions(preset.channels, preset.hidden), train[0], arguments.seed)
    sizes, jobs = {"images": len(train[0]), "test_images": len(test[0])}, {}
    for order in preset.orders:
        for label, size in (("full batch", len(train[0])), ("mini-batch", preset.batch_size)):
            method = edf_method(f"{label}, k = {order}", order, preset.rates, DAMPING, edf.nesterov(3.0))
            # The paper's equation (31): the full batch in slices of the mini-batch's size.
            batches = MiniBatches(train, test, size, preset.epochs, arguments.seed, chunk_size=preset.batch_size)
            jobs[method.name] = Job(sizes, functools.partial(every_rate, method, model, batches))
    return {"data": "MNIST", **preset._asdict(), **sizes, "damping": DAMPING}, jobs
