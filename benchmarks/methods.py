"""The training methods by name: the paper's six, each as the training loop wants it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import eki_jax
from benchmarks.problems.registry import Problem
from eki_jax.metrics import Accuracy
from eki_jax.training import Method, ensemble_method

Particles = int | Callable[[int], int]


def ensemble(problem: Problem, J: Particles, *, momentum: float | None, resample: bool, step_noise: bool) -> Method:
    """The paper's four: EKI, MEKI, EKI(R), MEKI(R), with its step size and Xavier prior."""
    solver = (
        eki_jax.euler(problem.forward, problem.loss)
        if momentum is None
        else eki_jax.nesterov(problem.forward, problem.loss, momentum=momentum)
    )
    prior = eki_jax.xavier(problem.template)
    return ensemble_method(solver, problem.forward, prior, J, resample=resample, step_noise=step_noise)


def gradient(problem: Problem, transformation: optax.GradientTransformation) -> Method:
    """A gradient method on one draw of the same prior, by backpropagation through the logits."""
    prior = eki_jax.xavier(problem.template)

    def init(key: jax.Array) -> Any:
        params = prior.sample(key)
        return params, transformation.init(params)

    def loss(params: Any, batch: Any) -> jax.Array:
        x, labels = batch
        return optax.softmax_cross_entropy_with_integer_labels(problem.logits(params, x), labels).mean()

    def step(state: Any, key: jax.Array, batch: Any) -> tuple[Any, dict[str, jax.Array]]:
        del key
        params, inner = state
        value, gradients = jax.value_and_grad(loss)(params, batch)
        updates, inner = transformation.update(gradients, inner, params)
        return (optax.apply_updates(params, updates), inner), {"train_loss": value}

    def accuracy(state: Any, x: jax.Array, labels: jax.Array) -> Accuracy:
        share = jnp.mean(jnp.argmax(problem.logits(state[0], x), axis=-1) == labels)
        return Accuracy(share, share, share, share[None])

    return Method(init, step, accuracy, passes=lambda size: 3)  # a backward pass counts for two


# name -> (problem, J, learning rate, momentum factor) -> Method
METHODS: dict[str, Callable[[Problem, Particles, float, float], Method]] = {
    "eki": lambda p, J, rate, m: ensemble(p, J, momentum=None, resample=False, step_noise=False),
    "meki": lambda p, J, rate, m: ensemble(p, J, momentum=m, resample=False, step_noise=False),
    "eki-r": lambda p, J, rate, m: ensemble(p, J, momentum=None, resample=True, step_noise=False),
    "meki-r": lambda p, J, rate, m: ensemble(p, J, momentum=m, resample=False, step_noise=True),
    "sgd": lambda p, J, rate, m: gradient(p, optax.sgd(rate)),
    "msgd": lambda p, J, rate, m: gradient(p, optax.sgd(rate, momentum=m)),
}


def is_ensemble(method: str) -> bool:
    """Whether the method moves an ensemble (and spends no gradient)."""
    return method not in ("sgd", "msgd")


def get(name: str, problem: Problem, J: Particles = 2000, rate: float = 0.1, momentum: float = 0.9) -> Method:
    """The method called ``name`` for ``problem``.

    Raises:
        ValueError: there is no such method.
    """
    if name not in METHODS:
        raise ValueError(f"method: {name!r}; wanted one of {', '.join(METHODS)}")
    return METHODS[name](problem, J, rate, momentum)
