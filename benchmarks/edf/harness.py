"""EKI, EDF and SGD on one problem with one budget, counted in forward passes of a mini-batch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.edf.progress import collect
from benchmarks.edf.training import adam, cross_entropy, edf_method, momentum_sgd
from benchmarks.problems import registry
from eki_jax import edf, ensembles, euler, mean_particle, paper_step_size, priors, resample_around_mean


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


class Contender(NamedTuple):
    """A method as pure functions, and its price.

    Attributes:
        passes: Forward passes of the mini-batch a step; see :func:`gradient_passes`.
        state: Where it starts.
        step: ``step(state, batch) -> state``.
        params: ``params(state)`` to predict with.
        epoch: ``epoch(state, key) -> state``, after every epoch.
    """

    passes: int
    state: Any
    step: Callable[[Any, Any], Any]
    params: Callable[[Any], Any]
    epoch: Callable[[Any, Any], Any] = lambda state, key: state


def gradient_passes(products: int = 0) -> int:
    """Forward passes that a gradient (1 forward, 2 backward) and ``products`` Gauss-Newton products cost.

    The products share one linearisation (1); each is a pushforward (1) and a pullback (2).
    """
    return 3 + (1 + 3 * products if products else 0)


def run(name: str, data: Path | None, out: Path, seed: int = 0) -> dict[str, Any]:
    """Test accuracy of every contender along the budget; an interrupted run goes on from what it left in ``out``."""
    preset = PRESETS[name]
    problem = registry.get(preset.problem, data)
    budget = preset.particles * preset.eki_steps
    marks = np.unique(np.geomspace(preset.particles, budget, 12).astype(int))
    settings = {"experiment": "edf harness", "preset": name, **preset._asdict(), "budget": budget, "seed": seed}
    follow = lambda contender: {"passes_per_step": contender.passes, **_follow(contender, problem, preset, marks, seed)}
    found = contenders(problem, preset, seed)
    jobs = {label: functools.partial(follow, contender) for label, contender in found.items()}
    return {**settings, "curves": collect(out, settings, jobs)}


def contenders(problem: registry.Problem, preset: Preset, seed: int) -> dict[str, Contender]:
    """EKI without and with resampling; EDF-G of order 1 and 2 (W1); SGD, momentum SGD and Adam."""
    prior = priors.xavier(problem.template)
    start_key, ensemble_key = jax.random.split(jax.random.key(seed))
    ensemble = ensembles.sample_ensemble(ensemble_key, prior, preset.particles)
    solver = euler(problem.forward, problem.loss, paper_step_size())
    eki = Contender(
        preset.particles,
        solver.init(ensemble),
        lambda state, batch: solver.step(state, batch)[0],
        lambda state: mean_particle(state.position),
    )
    redraw = lambda state, key: state._replace(ensemble=resample_around_mean(key, state.ensemble, prior))
    start = prior.sample(start_key)
    objective = edf.Objective(problem.logits, cross_entropy)
    by_gradient = lambda method, rate: _by_gradient(method.make(rate), objective, start, method.gradients - 1)
    flows = {
        f"EDF-G, k = {order}": by_gradient(edf_method("", order, (), (1.0, 1.0), edf.heavy_ball(0.9)), 0.5)
        for order in (1, 2)
    }
    return {
        "EKI": eki,
        "EKI(R)": eki._replace(epoch=redraw),
        **flows,
        "SGD, rate 0.1": _by_gradient(optax.sgd(0.1), objective, start, 0),
        "momentum SGD, rate 0.1": by_gradient(momentum_sgd(()), 0.1),
        "Adam, rate 0.001": by_gradient(adam(()), 0.001),
    }


def _by_gradient(
    transformation: optax.GradientTransformation, objective: edf.Objective, start: Any, products: int
) -> Contender:
    optimizer = optax.with_extra_args_support(transformation)

    def step(state: Any, batch: Any) -> Any:
        params, inner = state
        gradient = objective.value_and_grad(params, batch)[1]
        updates, inner = optimizer.update(gradient, inner, params, objective=objective, batch=batch)
        return optax.apply_updates(params, updates), inner

    return Contender(gradient_passes(products), (start, optimizer.init(start)), step, lambda state: state[0])


def _follow(
    contender: Contender, problem: registry.Problem, preset: Preset, marks: np.ndarray, seed: int
) -> dict[str, Any]:
    """Run until the last mark; accuracy at the last step before every mark."""
    step, params, epoch = jax.jit(contender.step), jax.jit(contender.params), jax.jit(contender.epoch)
    accuracy = jax.jit(lambda p, x, y: jnp.mean(problem.logits(p, x).argmax(-1) == y))
    batches, state, spent = _batches(problem.train, preset.batch_size, seed), contender.state, 0
    history: dict[str, Any] = {"passes": [], "test_accuracy": []}
    for mark in marks:
        while spent + contender.passes <= mark:
            number, batch = next(batches)
            if number and number % (len(problem.train[0]) // preset.batch_size) == 0:
                state = epoch(state, jax.random.fold_in(jax.random.key(seed + 1), number))
            state, spent = step(state, batch), spent + contender.passes
        history["passes"].append(spent)
        history["test_accuracy"].append(float(accuracy(params(state), *problem.test)))
    return history


def _batches(train: tuple[np.ndarray, np.ndarray], size: int, seed: int) -> Iterator[tuple[int, Any]]:
    """Endless mini-batches without replacement within an epoch, with their number."""
    rng, number, (x, y) = np.random.default_rng(seed), 0, train
    while True:
        order = rng.permutation(len(x))
        for first in range(0, len(x) - size + 1, size):
            take = order[first : first + size]
            yield number, (x[take], y[take])
            number += 1
