"""The training methods by name, each as the training loop wants it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

import eki_jax
from benchmarks.problems.registry import Problem
from eki_jax import kalman, natural
from eki_jax.compact import compact_euler
from eki_jax.metrics import particle_accuracy
from eki_jax.training import Method, ensemble_method

Particles = int | Callable[[int], int]


def ensemble(
    problem: Problem, J: Particles, solver: eki_jax.Solver, *, resample: bool = False, step_noise: bool = False
) -> Method:
    """A solver on particles from the problem's prior."""
    return ensemble_method(solver, problem.forward, problem.prior, J, resample=resample, step_noise=step_noise)


# Of the Kalman step on probabilities: the variance of a label's noise, and the step size.
KALMAN_NOISE = 0.1
KALMAN_STEP = 0.1


def kalman_step(problem: Problem, **settings: Any) -> eki_jax.Solver:
    """The Kalman step, whose data are the labels' distributions."""
    solver = kalman.enkf(problem.forward, KALMAN_NOISE, KALMAN_STEP, **settings)

    def step(state: Any, batch: Any) -> tuple[Any, eki_jax.Info]:
        x, labels = batch
        outputs = jax.eval_shape(problem.forward, problem.template, x)
        return solver.step(state, (x, jax.nn.one_hot(labels, outputs.shape[-1])))

    return solver._replace(step=step)


class Steps(NamedTuple):
    """A method that moves one particle.

    Attributes:
        init: Function ``init(params, key) -> state``; without a key where nothing is drawn.
        step: Function ``step(state, batch) -> (state, loss)``.
        estimate: Function ``estimate(state) -> params``.
        passes: Forward passes that a step counts for, of each sample.
    """

    init: Callable[..., Any]
    step: Callable[[Any, Any], tuple[Any, Any]]
    estimate: Callable[[Any], Any]
    passes: int


def descent(loss: Callable[[Any, Any], jax.Array], transformation: optax.GradientTransformation) -> Steps:
    """An optimizer's steps down ``loss(params, batch)`` by backpropagation, beside which the others are shown."""

    def step(state: Any, batch: Any) -> tuple[Any, jax.Array]:
        params, inner = state
        value, gradients = jax.value_and_grad(loss)(params, batch)
        updates, inner = transformation.update(gradients, inner, params)
        return (optax.apply_updates(params, updates), inner), value

    init = lambda params, key=None: (params, transformation.init(params))
    return Steps(init, step, lambda state: state[0], passes=3)  # a backward pass counts for two


def gradient(
    problem: Problem, transformation: optax.GradientTransformation, *, straight_through: bool = False
) -> Method:
    """A gradient method from the problem's start, by backpropagation through the logits.

    Where these have no derivatives, ``straight_through`` takes those of the straight-through estimator.
    """
    logits = problem.straight_through if straight_through else problem.logits

    def loss(params: Any, batch: Any) -> jax.Array:
        x, labels = batch
        return optax.softmax_cross_entropy_with_integer_labels(logits(params, x), labels).mean()

    by = descent(loss, transformation)

    def step(state: Any, key: jax.Array, batch: Any) -> tuple[Any, dict[str, jax.Array]]:
        state, value = by.step(state, batch)
        return state, {"train_loss": value}

    return Method(
        lambda key: by.init(problem.start.sample(key)),
        step,
        lambda state, x, labels: particle_accuracy(problem.logits, by.estimate(state), x, labels),
        passes=lambda size: by.passes,
        compiled_loop=jax.default_backend() != "cpu",  # on processors, gradients of convolutions are slow in one
        estimate=by.estimate,
    )


def per_sample(
    problem: Problem, J: Particles, transformation: optax.GradientTransformation, settings: Natural
) -> Method:
    """The gradient from noise that every sample has of its own, from the problem's start."""
    if callable(J):
        raise ValueError("particles: a function of the epoch; wanted a number for natural-eki-per-sample")
    example = problem.train[0][:1]
    feedback = natural.learned_feedback(example)
    solver = natural.natural_gradient(
        problem.logits,
        natural.softmax_cross_entropy(),
        J,
        settings.sigma,
        deviations=natural.per_sample(feedback=feedback),
        optimizer=transformation,
        averaging=_averaging if settings.averaging else None,
    )
    method = ensemble_method(solver, problem.logits, problem.start, J)
    has_convolutions = any(leaf.ndim > 3 for leaf in jax.tree.leaves(problem.template))
    # On processors convolutions take up to twice as long in a compiled loop, and calls of small steps a tenth longer.
    return method._replace(compiled_loop=not has_convolutions or jax.default_backend() != "cpu")


# lambda of the natural gradient: of the span of the deviations, and of the localized estimate.
DAMPING = 1e-3
LOCAL_DAMPING = 1e-5
# The longest step of the localized estimate, which is not held in a span.
LOCAL_NORM = 3.0


def _averaging(count: jax.Array) -> jax.Array:
    """Factor of the average over the iterates: of all of the first, then of the last hundred or so."""
    return jnp.minimum(0.97, count / (count + 10))


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


def natural_gradient(
    problem: Problem, J: Particles, settings: Natural, *, low_rank: bool, precision: str | None = None
) -> Method:
    """The natural gradient with deviations around the problem's start; with low rank localized where they can be."""
    if callable(J):
        raise ValueError("particles: a function of the epoch; wanted a number for a natural-gradient method")
    local = low_rank and problem.is_local
    solver = natural.natural_gradient(
        problem.logits if low_rank else problem.particle_logits,
        natural.softmax_cross_entropy(),
        particles=J,
        sigma=settings.sigma,
        damping=(LOCAL_DAMPING if local else DAMPING) if settings.damping is None else settings.damping,
        deviations=_low_rank(problem, settings) if low_rank else natural.full_rank(problem.prior),
        learning_rate=(0.5 if local else 1.0) if settings.rate is None else settings.rate,
        averaging=_averaging if settings.averaging else None,
        localized=local,
        norm_constraint=LOCAL_NORM if local and settings.norm_constraint is None else settings.norm_constraint,
        precision=precision,
    )
    return ensemble_method(solver, problem.logits, problem.start, J)


def _low_rank(problem: Problem, settings: Natural) -> natural.Deviations:
    return natural.low_rank(settings.rank, problem.prior)


class Entry(NamedTuple):
    """A method of the command line.

    Attributes:
        kind: What it moves: an "ensemble"; one mean by "natural" gradients; or one particle by "gradient"s, which may
            come from noise "per_sample".
        make: Function of a problem, J, a learning rate, a momentum factor and the natural gradient's settings; and of a
            precision by name, where that is among the settings.
        deviations: Function of a problem and those settings, where the leaves are treated each in its own way.
        more: Names of settings that the method has beside those of its kind.
    """

    kind: Literal["ensemble", "natural", "per_sample", "gradient"]
    make: Callable[..., Method]
    deviations: Callable[[Problem, Natural], natural.Deviations] | None = None
    more: tuple[str, ...] = ()

    @property
    def settings(self) -> tuple[str, ...]:
        """Names of the settings that the method has; others mean nothing to it."""
        return *_OF_KIND[self.kind], *self.more


_OF_KIND = {
    "ensemble": ("particles", "precision"),
    "natural": ("particles", "sigma", "damping", "rate", "norm_constraint"),
    "per_sample": ("particles", "learning_rate", "momentum", "sigma"),
    "gradient": ("learning_rate",),
}

# The paper's step: twice as long as the solvers' default, and right for the losses of classifiers.
STEP = eki_jax.paper_step_size()

METHODS: dict[str, Entry] = {
    "eki": Entry("ensemble", lambda p, J, rate, m, n, **s: ensemble(p, J, eki_jax.euler(p.forward, p.loss, STEP, **s))),
    "meki": Entry(
        "ensemble",
        lambda p, J, rate, m, n, **s: ensemble(p, J, eki_jax.nesterov(p.forward, p.loss, STEP, m, **s)),
        more=("momentum",),
    ),
    "eki-r": Entry(
        "ensemble",
        lambda p, J, rate, m, n, **s: ensemble(p, J, eki_jax.euler(p.forward, p.loss, STEP, **s), resample=True),
    ),
    "meki-r": Entry(
        "ensemble",
        lambda p, J, rate, m, n, **s: ensemble(
            p, J, eki_jax.nesterov(p.forward, p.loss, STEP, m, **s), step_noise=True
        ),
        more=("momentum",),
    ),
    "heavy-ball": Entry(
        "ensemble",
        lambda p, J, rate, m, n, **s: ensemble(
            p, J, eki_jax.heavy_ball(p.forward, p.loss, eki_jax.frobenius_step_size(0.2), m, **s)
        ),
        more=("momentum",),
    ),
    "eki-compact": Entry(
        "ensemble", lambda p, J, rate, m, n, **s: ensemble(p, J, compact_euler(p.forward, p.loss, STEP, **s))
    ),
    "enkf-r": Entry("ensemble", lambda p, J, rate, m, n, **s: ensemble(p, J, kalman_step(p, **s), resample=True)),
    "natural-eki": Entry(
        "natural", lambda p, J, rate, m, n, **s: natural_gradient(p, J, n, low_rank=False, **s), more=("precision",)
    ),
    "natural-eki-lowrank": Entry(
        "natural", lambda p, J, rate, m, n: natural_gradient(p, J, n, low_rank=True), _low_rank, ("rank",)
    ),
    "natural-eki-per-sample": Entry(
        "per_sample", lambda p, J, rate, m, n: per_sample(p, J, optax.sgd(rate, momentum=m), n)
    ),
    "sgd": Entry("gradient", lambda p, J, rate, m, n: gradient(p, optax.sgd(rate))),
    "msgd": Entry("gradient", lambda p, J, rate, m, n: gradient(p, optax.sgd(rate, momentum=m)), more=("momentum",)),
    "ste": Entry(
        "gradient",
        lambda p, J, rate, m, n: gradient(p, optax.sgd(rate, momentum=m), straight_through=True),
        more=("momentum",),
    ),
}


def get(
    name: str,
    problem: Problem,
    J: Particles = 2000,
    rate: float = 0.1,
    momentum: float = 0.9,
    settings: Natural = Natural(),  # noqa: B008
    precision: str | None = None,
) -> Method:
    """The method called ``name`` for ``problem``.

    Args:
        name: One of ``METHODS``.
        problem: What it solves.
        J: Number of particles, or a function of the epoch.
        rate: Learning rate of a gradient method.
        momentum: Factor of the methods with momentum.
        settings: Of the natural-gradient methods.
        precision: ``"bf16"`` for products in bfloat16, the model's included, of methods that have this setting; None or
            ``"float32"`` as JAX multiplies by itself.

    Raises:
        ValueError: There is no such method, or it has no precision.
    """
    if name not in METHODS:
        raise ValueError(f"method: {name!r}; wanted one of {', '.join(METHODS)}")
    entry = METHODS[name]
    given = {} if precision in (None, "float32") else {"precision": precision}
    if given and "precision" not in entry.settings:
        able = ", ".join(name for name, other in METHODS.items() if "precision" in other.settings)
        raise ValueError(f"precision: {precision!r} for {name}, which has none; wanted None, or one of {able}")
    return entry.make(problem, J, rate, momentum, settings, **given)


def describe(
    name: str,
    problem: Problem,
    batch: int,
    settings: Natural = Natural(),  # noqa: B008
) -> natural.Description | None:
    """What the method does with each leaf of the parameters; None for one that does the same with all."""
    deviations = METHODS[name].deviations
    if deviations is None:
        return None
    x = jax.tree.map(lambda rows: jax.ShapeDtypeStruct((batch, *rows.shape[1:]), rows.dtype), problem.train[0])
    return natural.describe(problem.logits, problem.template, x, deviations(problem, settings))
