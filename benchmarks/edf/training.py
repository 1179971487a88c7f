"""Optimizers under one name, and the two loops that run them: full batch and mini-batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from eki_jax import edf

Images = tuple[np.ndarray, np.ndarray]


class Optimizer(NamedTuple):
    """One of optax's transformations, what it costs, and the rates to try.

    Attributes:
        name: As the pictures' legends have it.
        make: ``make(learning_rate)`` to an optax transformation.
        gradients: Gradient-equivalents a step: one for the gradient and one for every product with a matrix.
        rates: Learning rates to try.
    """

    name: str
    make: Callable[[Any], optax.GradientTransformation]
    gradients: int
    rates: tuple[float, ...]


def edf_method(
    name: str,
    order: int,
    rates: tuple[float, ...],
    damping: tuple[float, float] | None,
    acceleration: edf.Acceleration | None,
    kind: str = "g",
) -> Optimizer:
    """EDF-G or EDF-H as an :class:`Optimizer`."""
    flow = {"g": edf.edf_g, "h": edf.edf_h}[kind]
    return Optimizer(name, lambda rate: flow(rate, order, damping, acceleration), 1 + order, rates)


def momentum_sgd(rates: tuple[float, ...], *, nesterov: bool = False, name: str = "momentum") -> Optimizer:
    """Gradient descent with momentum 0.9, of Polyak or Nesterov."""
    return Optimizer(name, lambda rate: optax.sgd(rate, momentum=0.9, nesterov=nesterov), 1, rates)


def adam(rates: tuple[float, ...]) -> Optimizer:
    """Adam with optax's defaults."""
    return Optimizer("Adam", optax.adam, 1, rates)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The paper's loss (equation 27): the mean over the samples."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


class Model(NamedTuple):
    """A network as functions of its parameters and its batch statistics (empty where it keeps none).

    Attributes:
        params: Initial parameters.
        statistics: Initial batch statistics.
        train: ``train(params, statistics, x)`` to ``(logits, new statistics)``.
        logits: ``logits(params, statistics, x)`` for predictions.
    """

    params: Any
    statistics: Any
    train: Callable[..., Any]
    logits: Callable[..., Any]


def build(module: nn.Module, example: np.ndarray, seed: int, *, batch_norm: bool = False) -> Model:
    """``module`` with parameters drawn from ``seed``."""
    options = {"train": False} if batch_norm else {}
    variables = jax.jit(lambda key: module.init(key, example[:1], **options))(jax.random.key(seed))
    logits = lambda params, statistics, x: module.apply({"params": params, **statistics}, x, **options)

    def train(params: Any, statistics: Any, x: Any) -> tuple[Any, Any]:
        if not batch_norm:
            return logits(params, statistics, x), statistics
        return module.apply({"params": params, **statistics}, x, train=True, mutable=["batch_stats"])

    return Model(variables["params"], {k: v for k, v in variables.items() if k != "params"}, train, logits)


class Stops(NamedTuple):
    """Where a full-batch run ends before its last step."""

    loss: float = 1e-6
    gradient_norm: float = 1e-5
    diverged: float = 100.0


STOPS = Stops()


def full_batch(
    method: Optimizer, model: Model, images: Images, steps: int, *, chunk_size: int | None, stops: Stops = STOPS
) -> dict[str, Any]:
    """Train on the whole batch with the method's first rate.

    Returns:
        Training loss and gradient norm before every step and after the last, at the parameters that the optimizer
        holds; and why the run ended.
    """
    optimizer = optax.with_extra_args_support(method.make(method.rates[0]))
    objective = edf.Objective(lambda params, x: model.logits(params, model.statistics, x), cross_entropy, chunk_size)

    @jax.jit
    def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any, jax.Array, jax.Array]:
        value, gradient = objective.value_and_grad(params, batch)
        updates, state = optimizer.update(gradient, state, params, objective=objective, batch=batch)
        return optax.apply_updates(params, updates), state, value, optax.tree.norm(gradient)

    batch = jax.tree.map(jnp.asarray, images)
    params, state = model.params, optimizer.init(model.params)
    losses, norms, ended = [], [], None
    while ended is None:
        params, state, value, norm = step(params, state, batch)
        losses.append(float(value))
        norms.append(float(norm))
        ended = _reason(losses, norms[-1], steps, stops)
    return {
        "losses": losses,
        "gradient_norms": norms,
        "ended": ended,
        "gradients_per_step": method.gradients,
        "rate": method.rates[0],
    }


def _reason(losses: list[float], gradient_norm: float, steps: int, stops: Stops) -> str | None:
    """Why to end here, if at all; ``losses`` holds that of the start too."""
    if not losses[-1] < stops.diverged:
        return "diverged"
    if losses[-1] < stops.loss:
        return "loss at rounding"
    if gradient_norm < stops.gradient_norm:
        return "stationary"
    return "all steps" if len(losses) > steps else None


class MiniBatches(NamedTuple):
    """A mini-batch experiment.

    Attributes:
        train: Images and labels.
        test: The same for testing.
        batch_size: Samples to a step, drawn without replacement; a rest smaller than that waits for the next epoch.
        epochs: Passes over the training set.
        seed: Of the order of the samples.
        drop_after: Epoch after which the rate is a fifth; None for never.
        chunk_size: Samples that a step takes at once; None for the whole batch.
    """

    train: Images
    test: Images
    batch_size: int
    epochs: int
    seed: int
    drop_after: int | None = None
    chunk_size: int | None = None


def mini_batch(method: Optimizer, model: Model, run: MiniBatches) -> list[dict[str, Any]]:
    """Train once with each of the method's rates (compiled once); losses and errors at the end of every epoch.

    The training loss is over the whole training set, with the moving batch statistics where the model has them.
    """

    @jax.jit
    def step(rate: Any, params: Any, state: Any, statistics: Any, batch: Any) -> tuple[Any, Any, Any]:
        forward = lambda p, x: model.train(p, statistics, x)[0]
        objective = edf.Objective(forward, cross_entropy, run.chunk_size)
        _, gradient = objective.value_and_grad(params, batch)
        _, new_statistics = model.train(params, statistics, batch[0])  # the same pass, once compiled
        optimizer = optax.with_extra_args_support(method.make(rate))
        updates, state = optimizer.update(gradient, state, params, objective=objective, batch=batch)
        return optax.apply_updates(params, updates), state, new_statistics

    evaluate = evaluator(model)
    return [{"rate": rate, **_epochs(step, evaluate, method, rate, model, run)} for rate in method.rates]


def _epochs(step: Any, evaluate: Any, method: Optimizer, rate: float, model: Model, run: MiniBatches) -> dict[str, Any]:
    params, statistics, state = model.params, model.statistics, method.make(rate).init(model.params)
    rng, (x, y) = np.random.default_rng(run.seed), run.train
    history: dict[str, Any] = {"train_loss": [], "test_error": []}
    for epoch in range(run.epochs):
        current = rate * (0.2 if run.drop_after is not None and epoch >= run.drop_after else 1)
        order = rng.permutation(len(x))
        for first in range(0, len(x) - run.batch_size + 1, run.batch_size):
            take = order[first : first + run.batch_size]
            params, state, statistics = step(current, params, state, statistics, (x[take], y[take]))
        train_loss, _ = evaluate(params, statistics, run.train)
        history["train_loss"].append(train_loss)
        history["test_error"].append(evaluate(params, statistics, run.test)[1])
        if not np.isfinite(train_loss):
            break
    return history


def evaluator(model: Model, slice_size: int = 500) -> Callable[[Any, Any, Images], tuple[float, float]]:
    """``evaluate(params, statistics, images)`` to the mean loss and the share of errors, in slices."""

    @jax.jit
    def of_slice(params: Any, statistics: Any, x: Any, y: Any) -> tuple[jax.Array, jax.Array]:
        logits = model.logits(params, statistics, x)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return losses.sum(), (logits.argmax(-1) != y).sum()

    def evaluate(params: Any, statistics: Any, images: Images) -> tuple[float, float]:
        x, y = images
        slices = [slice(first, first + slice_size) for first in range(0, len(x), slice_size)]
        sums = [of_slice(params, statistics, x[part], y[part]) for part in slices]
        return tuple(float(sum(column)) / len(x) for column in zip(*sums, strict=True))  # type: ignore[return-value]

    return evaluate
