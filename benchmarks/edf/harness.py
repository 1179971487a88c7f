"""EKI, EDF and SGD on one problem with one budget, counted in forward passes of a sample."""

from __future__ import annotations

import argparse
import functools
from typing import Any, NamedTuple

import jax
import optax

from benchmarks import methods
from benchmarks.edf.training import cross_entropy
from benchmarks.forward_budget.curve import follow
from benchmarks.harness.store import Job
from benchmarks.problems import registry
from eki_jax import edf
from eki_jax.training import Method


class Preset(NamedTuple):
    """Size of the experiment; the budget is what ``eki_steps`` steps with ``particles`` particles cost."""

    problem: str
    batch_size: int
    particles: int
    eki_steps: int


PRESETS = {
    "smoke": Preset("digits-dnn", 64, 10, 4),
    "cpu": Preset("digits-dnn", 200, 100, 200),
    "full": Preset("mnist-dnn2", 600, 2000, 300),
}


def gradient_passes(products: int = 0) -> int:
    """Forward passes that a gradient (1 forward, 2 backward) and ``products`` Gauss-Newton products cost.

    The products share one linearisation (1); each is a pushforward (1) and a pullback (2).
    """
    return 3 + (1 + 3 * products if products else 0)


def plan(arguments: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Job]]:
    """Test accuracy of every method along the budget."""
    preset = PRESETS[arguments.preset]
    problem = registry.get(preset.problem, arguments.data)
    step = preset.particles * preset.batch_size  # of EKI, in passes
    task = {"particles": preset.particles, "batch": preset.batch_size, "seed": arguments.seed}
    task |= {"budget": step * preset.eki_steps, "every": step}

    def along(method: Method) -> dict[str, Any]:
        curve = follow(problem, method, task)
        shown = {key: curve[key] for key in ("passes", "seconds", "test_accuracy")}
        return {"passes_per_sample": method.passes(preset.particles), **shown}

    sizes = {"images": len(problem.train[1]), "test_images": len(problem.test[1])}
    trained = compared(problem, preset).items()
    return (
        {**preset._asdict(), **task},
        {name: Job(sizes, functools.partial(along, method)) for name, method in trained},
    )


def compared(problem: registry.Problem, preset: Preset) -> dict[str, Method]:
    """EKI without and with resampling; EDF-G of order 1 and 2 (W1); SGD, momentum SGD and Adam."""
    return {
        "EKI": methods.get("eki", problem, preset.particles),
        "EKI(R)": methods.get("eki-r", problem, preset.particles),
        **{f"EDF-G, k = {order}": flow(problem, order) for order in (1, 2)},
        "SGD, rate 0.1": methods.get("sgd", problem, rate=0.1),
        "momentum SGD, rate 0.1": methods.get("msgd", problem, rate=0.1),
        "Adam, rate 0.001": methods.gradient(problem, optax.adam(0.001)),
    }


def flow(problem: registry.Problem, order: int) -> Method:
    """EDF-G from one draw of the prior, as the other gradient methods."""
    objective = edf.Objective(problem.logits, cross_entropy)
    optimizer = edf.edf_g(0.5, order, (1.0, 1.0), edf.heavy_ball(0.9))

    def step(state: Any, key: jax.Array, batch: Any) -> tuple[Any, dict[str, jax.Array]]:
        params, inner = state
        value, gradient = objective.value_and_grad(params, batch)
        updates, inner = optimizer.update(gradient, inner, params, objective=objective, batch=batch)
        return (optax.apply_updates(params, updates), inner), {"train_loss": value}

    passes = gradient_passes(order)
    return methods.gradient(problem, optimizer)._replace(step=step, passes=lambda size: passes)
