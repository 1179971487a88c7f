"""The paper's Figure 1: full-batch training of a small convolutional network on CIFAR-10."""

from __future__ import annotations

import argparse
import functools
import itertools
from typing import Any, NamedTuple

from benchmarks.edf.networks import TwoConvolutions
from benchmarks.edf.training import STOPS, Optimizer, adam, build, edf_method, full_batch, momentum_sgd
from benchmarks.harness.store import Job
from benchmarks.problems import data as datasets
from eki_jax import edf


class Preset(NamedTuple):
    """Size of the experiment.

    Attributes:
        images: None takes all that are there.
        steps: The most of any curve.
        gradients: The most gradient-equivalents of any curve: a high order gets fewer steps. None is no limit.
        orders: k of EDF-G.
        hessian_orders: k of EDF-H.
        undamped_orders: k of EDF-G without damping.
        channels: Filters of the convolutions.
        hidden: Units between them and the last layer.
        chunk_size: Images at a time; as many as the processor's cache holds are the fastest.
    """

    images: int | None
    steps: int
    gradients: int | None
    orders: tuple[int, ...]
    hessian_orders: tuple[int, ...]
    undamped_orders: tuple[int, ...]
    channels: tuple[int, int]
    hidden: int
    chunk_size: int | None


PRESETS = {
    "smoke": Preset(20, 3, None, (1, 2), (2,), (2,), (2, 3), 8, None),
    "cpu": Preset(200, 200, None, (1, 3, 10, 30), (10,), (10,), (8, 16), 32, None),
    "full": Preset(None, 200, 400, (1, 3, 10), (10,), (), (8, 16), 32, 100),
}
DAMPING = (1.0, 1.0)


def methods(preset: Preset) -> list[Optimizer]:
    """As in section 6.1: EDF with step size 1 and W2, the others at the paper's rates.

    The paper takes no damping. On few images that diverges for a high Krylov order, so that here the paper's damping
    for mini-batches is the rule, and its absence a curve of its own.
    """
    flow = lambda name, order, damping, kind: edf_method(name, order, (1.0,), damping, edf.nesterov(3.0), kind)
    return [
        *(flow(f"EDF-G, k = {order}", order, DAMPING, "g") for order in preset.orders),
        momentum_sgd((0.01,)),
        momentum_sgd((0.001,), nesterov=True, name="NAG"),
        adam((0.001,)),
        *(flow(f"EDF-H, k = {order}", order, DAMPING, "h") for order in preset.hessian_orders),
        *(flow(f"EDF-G, k = {order}, undamped", order, None, "g") for order in preset.undamped_orders),
    ]


def plan(arguments: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Job]]:
    """All methods from the same start on the same images."""
    preset = PRESETS[arguments.preset]
    dataset = datasets.cifar10(arguments.data)
    images = dataset.train_x[: preset.images], dataset.train_y[: preset.images]
    model = build(TwoConvolutions(preset.channels, preset.hidden), images[0], arguments.seed)
    settings = {**preset._asdict(), "images": len(images[0]), "damping": DAMPING, "stops": STOPS._asdict()}

    def train(method: Optimizer) -> dict[str, Any]:
        limit = preset.steps if preset.gradients is None else preset.gradients // method.gradients
        return full_batch(method, model, images, min(preset.steps, limit), chunk_size=preset.chunk_size)

    sizes = {"images": len(images[0])}
    jobs = {method.name: Job(sizes, functools.partial(train, method)) for method in methods(preset)}
    return {"data": "CIFAR-10", **settings}, jobs


def final(curve: dict[str, Any]) -> float:
    """The loss at the end; infinite where the run diverged."""
    return float("inf") if curve["ended"] == "diverged" else curve["losses"][-1]


def claims(curves: dict[str, Any], orders: tuple[int, ...]) -> dict[str, Any]:
    """The paper's statements, answered from the curves."""
    first = final(curves["EDF-G, k = 1"])
    others = [final(curves[name]) for name in ("momentum", "NAG", "Adam")]
    level = max(first, STOPS.loss)  # where a run stops, whatever is left below it
    reach = {order: first_below(curves[f"EDF-G, k = {order}"], level) for order in orders}
    counts = list(reach.values())
    flows = [curves[f"EDF-G, k = {order}"] for order in orders]
    return {
        "k = 1 ends below momentum, NAG and Adam": all(first < other for other in others),
        "steps to the final loss of k = 1": reach,
        "a larger k needs fewer steps": None not in counts and all(a > b for a, b in itertools.pairwise(counts)),
        "a larger k is lower after as many steps": all(is_above(a, b) for a, b in itertools.pairwise(flows)),
    }


def first_below(curve: dict[str, Any], level: float) -> int | None:
    """The first step at which the loss is at or below ``level``."""
    return next((step for step, loss in enumerate(curve["losses"]) if loss is not None and loss <= level), None)


def is_above(curve: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether ``other`` has the lower loss at the last step that both have."""
    both = min(len(curve["losses"]), len(other["losses"])) - 1
    loss, lower = curve["losses"][both], other["losses"][both]
    return None not in (loss, lower) and loss > lower
