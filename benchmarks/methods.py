"""The training methods by name, each as the training loop wants it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import eki_jax
from benchmarks.problems.registry import Problem
from eki_jax import natural
from eki_jax.metrics import Accuracy
from eki_jax.prediction import mean_particle
from eki_jax.training import Method, ensemble_method

Particles = int | Callable[[int], int]


def ensemble(problem: Problem, J: Particles, *, momentum: float | None, resample: bool, step_noise: bool) -> Method:
    """The paper's four: EKI, MEKI, EKI(R), MEKI(R), with its step size and Xavier prior."""
    solver = (
        eki_jax.euler(problem.forward, problem.loss)
        if momentum is None
        else eki_jax.nesterov(problem.forward, problem.loss, momentum=momentum)
    )
    prior = problem.prior
    return ensemble_method(solver, problem.forward, prior, J, resample=resample, step_noise=step_noise)


def gradient(
    problem: Problem, transformation: optax.GradientTransformation, *, straight_through: bool = False
) -> Method:
    """A gradient method on one draw of the same prior, by backpropagation through the logits.

    Where these have no derivatives, ``straight_through`` takes those of the straight-through estimator.
    """
    prior = problem.prior
    logits = problem.straight_through if straight_through else problem.logits

    def init(key: jax.Array) -> Any:
        params = prior.sample(key)
        return params, transformation.init(params)

    def loss(params: Any, batch: Any) -> jax.Array:
        x, labels = batch
        return optax.softmax_cross_entropy_with_integer_labels(logits(params, x), labels).mean()

    def step(state: Any, key: jax.Array, batch: Any) -> tuple[Any, dict[str, jax.Array]]:
        del key
        params, inner = state
        value, gradients = jax.value_and_grad(loss)(params, batch)
        updates, inner = transformation.update(gradients, inner, params)
        return (optax.apply_updates(params, updates), inner), {"train_loss": value}

    def accuracy(state: Any, x: jax.Array, labels: jax.Array) -> Accuracy:
        share = jnp.mean(jnp.argmax(problem.logits(state[0], x), axis=-1) == labels)
        return Accuracy(share, share, share, share[None])

    # A backward pass counts for two; on processors, gradients of convolutions are slow in a compiled loop.
    return Method(init, step, accuracy, passes=lambda size: 3, compiled_loop=jax.default_backend() != "cpu")


# lambda of the natural gradient: of the span of the deviations, and of the localized estimate.
DAMPING = 1e-3
LOCAL_DAMPING = 1e-5
# The longest step of the localized estimate, which is not held in a span.
LOCAL_NORM = 3.0


class Natural(NamedTuple):
    """Settings of the natural-gradient methods; None is a default that depends on the method.

    Attributes:
        sigma: Scale of the deviations, a number or a schedule of the step count.
        damping: lambda, a number, a schedule, or an adaptive one.
        rank: Of the low-rank deviations.
        rate: eta, a number or a schedule.
        averaging: Whether predictions are made with an average over the iterates.
        norm_constraint: The largest squared norm of a step in the outputs' curvature.
    """

    sigma: Any = 0.1
    damping: Any = None
    rank: int = 1
    rate: Any = None
    averaging: bool = True
    norm_constraint: float | None = None


def natural_gradient(problem: Problem, J: Particles, settings: Natural, *, low_rank: bool) -> Method:
    """The natural gradient with deviations around one draw of the prior; with low rank localized where they can be."""
    if callable(J):
        raise ValueError("particles: a function of the epoch; wanted a number for a natural-gradient method")
    local = low_rank and problem.is_local
    solver = natural.natural_gradient(
        problem.low_rank_logits if low_rank else problem.particle_logits,
        natural.softmax_cross_entropy(),
        particles=J,
        sigma=settings.sigma,
        damping=(LOCAL_DAMPING if local else DAMPING) if settings.damping is None else settings.damping,
        deviations=natural.low_rank(settings.rank, problem.prior) if low_rank else natural.full_rank(problem.prior),
        learning_rate=(0.5 if local else 1.0) if settings.rate is None else settings.rate,
        averaging=(lambda count: jnp.minimum(0.97, count / (count + 10))) if settings.averaging else None,
        localized=local,
        norm_constraint=LOCAL_NORM if local and settings.norm_constraint is None else settings.norm_constraint,
    )
    prior = problem.prior

    def init(key: jax.Array) -> Any:
        mean, deviations = jax.random.split(key)
        return solver.init(prior.sample(mean), deviations)

    def step(state: Any, key: jax.Array, batch: Any) -> tuple[Any, dict[str, jax.Array]]:
        del key  # the state's own key and count make the deviations
        state, info = solver.step(state, batch)
        return state, {
            "train_loss": info.loss,
            "sigma": info.sigma,
            "damping": info.damping,
            "predicted": info.predicted,
            "failed": info.failed,
        }

    def accuracy(state: Any, x: jax.Array, labels: jax.Array) -> Accuracy:
        share = jnp.mean(jnp.argmax(problem.logits(position("natural-eki", state), x), axis=-1) == labels)
        return Accuracy(share, share, share, share[None])

    return Method(init, step, accuracy, ensemble_size=lambda epoch: J, passes=lambda size: solver.passes)


# name -> (problem, J, learning rate, momentum factor, settings of the natural gradient) -> Method
METHODS: dict[str, Callable[[Problem, Particles, float, float, Natural], Method]] = {
    "eki": lambda p, J, rate, m, n: ensemble(p, J, momentum=None, resample=False, step_noise=False),
    "meki": lambda p, J, rate, m, n: ensemble(p, J, momentum=m, resample=False, step_noise=False),
    "eki-r": lambda p, J, rate, m, n: ensemble(p, J, momentum=None, resample=True, step_noise=False),
    "meki-r": lambda p, J, rate, m, n: ensemble(p, J, momentum=m, resample=False, step_noise=True),
    "natural-eki": lambda p, J, rate, m, n: natural_gradient(p, J, n, low_rank=False),
    "natural-eki-lowrank": lambda p, J, rate, m, n: natural_gradient(p, J, n, low_rank=True),
    "sgd": lambda p, J, rate, m, n: gradient(p, optax.sgd(rate)),
    "msgd": lambda p, J, rate, m, n: gradient(p, optax.sgd(rate, momentum=m)),
    "ste": lambda p, J, rate, m, n: gradient(p, optax.sgd(rate, momentum=m), straight_through=True),
}


def is_ensemble(method: str) -> bool:
    """Whether the method moves an ensemble (and spends no gradient)."""
    return method not in ("sgd", "msgd", "ste")


def is_natural(method: str) -> bool:
    """Whether the method is a natural gradient."""
    return method.startswith("natural-eki")


def position(method: str, state: Any) -> Any:
    """One particle's parameters, which a state of the method predicts with."""
    if is_natural(method):
        return state.position if state.average is None else state.average
    return mean_particle(state.position) if is_ensemble(method) else state[0]


def get(
    name: str,
    problem: Problem,
    J: Particles = 2000,
    rate: float = 0.1,
    momentum: float = 0.9,
    settings: Natural = Natural(),  # noqa: B008
) -> Method:
    """The method called ``name`` for ``problem``.

    Raises:
        ValueError: there is no such method.
    """
    if name not in METHODS:
        raise ValueError(f"method: {name!r}; wanted one of {', '.join(METHODS)}")
    return METHODS[name](problem, J, rate, momentum, settings)
