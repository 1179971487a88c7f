"""A language model's training: the methods, and the loop with its checkpoints."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from benchmarks.harness.command import Refused
from benchmarks.language.decoder import Decoder
from benchmarks.language.text import Text, windows
from benchmarks.methods import Steps, descent
from eki_jax import natural
from eki_jax.checkpoints import Checkpoints
from eki_jax.flax import linen_forward

# Windows of held-out text that are measured.
TEST_WINDOWS = 512
# Steps between two checkpoints, each of which is a measurement.
EVERY = 50


class Diverged(Refused):
    """A loss that is not finite any more, or a step that was refused."""


class Model(NamedTuple):
    """What is trained.

    Attributes:
        forward: function of parameters and characters (B, T), logits (B, T, V).
        start: function of a key, the first parameters.
        loss: nats a character of logits and of what follows, (B, T).
    """

    forward: Callable[[Any, Any], Any]
    start: Callable[[jax.Array], Any]
    loss: Any


class Progress(NamedTuple):
    """How far a run has come.

    Attributes:
        params: parameters.
        history: rows with ``step``, ``seconds`` (compilation included), ``forward_passes`` (of one character),
            ``train_nats`` and ``test_nats``.
    """

    params: Any
    history: list[dict[str, Any]]


def model(text: Text, settings: dict[str, Any]) -> Model:
    """The transformer for a text: its start is flax's own."""
    shape = {name: settings[name] for name in ("context", "layers", "width", "heads")}
    module = Decoder(len(text.characters), **shape)
    example = jnp.zeros((1, settings["context"]), jnp.int32)
    forward, _ = linen_forward(module, example)
    return Model(forward, lambda key: module.init(key, example)["params"], natural.mean_over_samples(_nats))


def _nats(logits: jax.Array, following: jax.Array) -> jax.Array:
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, following))


def by_noise(
    found: Model, settings: dict[str, Any], optimizer: optax.GradientTransformation, *, answers: bool = True
) -> Steps:
    """Noise of every character's own, slopes by least squares, and predictions of them."""
    example = jnp.zeros((1, settings["context"]), jnp.int32)
    # Where the layers behind answer, little is left for the noise to find, and that share of it is mostly noise.
    averaged = settings["averaged"] or (1 if answers else 10)
    feedback = natural.learned_feedback(example, settings["decay"], averaged=averaged, answers=answers)
    deviations = natural.per_sample(causal=True, feedback=feedback, discount=settings["discount"])
    return _of_solver(found, settings, optimizer, deviations)


def node_noise(found: Model, settings: dict[str, Any], optimizer: optax.GradientTransformation) -> Steps:
    """Node perturbation with credit for each character: noise times its own, and the later, changes of the loss.

    As it was published, keys and values are nodes like all others.
    """
    deviations = natural.per_sample("covariance", causal=True, discount=settings["discount"], mixing=False)
    return _of_solver(found, settings, optimizer, deviations)


def _of_solver(
    found: Model, settings: dict[str, Any], optimizer: optax.GradientTransformation, deviations: natural.Deviations
) -> Steps:
    solver = natural.natural_gradient(
        found.forward,
        found.loss,
        settings["passes"],
        settings["sigma"],
        deviations=deviations,
        optimizer=optimizer,
    )

    def step(state: Any, batch: Any) -> tuple[Any, jax.Array]:
        state, info = solver.step(state, batch)
        return state, jnp.where(info.moved, info.loss, jnp.nan)

    return Steps(solver.init, step, solver.estimate, solver.passes(settings["passes"]))


def backpropagation(found: Model, settings: dict[str, Any], optimizer: optax.GradientTransformation) -> Steps:
    """The gradient itself."""
    del settings
    loss = lambda params, batch: jnp.asarray(found.loss(found.forward(params, batch[0]), batch[1]))
    return descent(loss, optimizer)


METHODS: dict[str, Callable[..., Steps]] = {
    "natural-eki-per-sample": by_noise,
    "natural-eki-outputs": partial(by_noise, answers=False),
    "node-noise": node_noise,
    "msgd": backpropagation,
}


def train(text: Text, settings: dict[str, Any], out: Path) -> Iterator[Progress]:
    """Train, and yield what there is every few steps; from the last checkpoint on where there is one.

    Args:
        text: text to learn.
        settings: settings of the run.
        out: folder of its checkpoints.

    Yields:
        The parameters and the history.

    Raises:
        Diverged: the loss is not finite any more.
    """
    found = model(text, settings)
    steps = settings["steps"]
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.sgd(optax.cosine_decay_schedule(settings["learning_rate"], steps), settings["momentum"]),
    )
    method = METHODS[settings["method"]](found, settings, optimizer)
    context, size = settings["context"], settings["batch"] // settings["context"]
    key, start_key, own_key = jax.random.split(jax.random.key(settings["seed"]), 3)
    numbers = jnp.asarray(text.train)
    test = tuple(map(jnp.asarray, windows(text.test, context, TEST_WINDOWS)))

    def one(state: Any, index: jax.Array) -> tuple[Any, jax.Array]:
        starts = jax.random.randint(jax.random.fold_in(key, index), (size, 1), 0, len(numbers) - context)
        rows = starts + jnp.arange(context)
        return method.step(state, (numbers[rows], numbers[rows + 1]))

    several = jax.jit(lambda state, indices: jax.lax.scan(one, state, indices))

    @jax.jit
    def measured(params: Any) -> jax.Array:
        some = jax.tree.map(lambda leaf: leaf.reshape(-1, min(16, len(leaf)), context), _whole(test))
        return jnp.mean(jax.lax.map(lambda rows: found.loss(found.forward(params, rows[0]), rows[1]), some))

    state = method.init(found.start(start_key), own_key)
    checkpoints = Checkpoints(out / "checkpoints", settings)
    history: list[dict[str, Any]] = []
    with contextlib.closing(checkpoints):
        if checkpoints.latest is not None:
            state, history = checkpoints.restore(lambda notes: state)
        else:
            history.append({"step": 0, "seconds": 0.0, "forward_passes": 0, "train_nats": None})
            history[0]["test_nats"] = float(measured(method.estimate(state)))
        yield Progress(method.estimate(state), history)
        while (step := history[-1]["step"]) < steps:
            begun = time.perf_counter()
            state, losses = jax.block_until_ready(several(state, step + jnp.arange(min(EVERY, steps - step))))
            if not bool(jnp.isfinite(losses[-1])):
                rate = settings["learning_rate"]
                raise Diverged(
                    f"--learning-rate: {rate}; the loss at step {step + len(losses)} is not finite, or the step was "
                    "refused; wanted a smaller one, in another folder"
                )
            row = {"step": step + len(losses), "seconds": history[-1]["seconds"] + time.perf_counter() - begun}
            row["forward_passes"] = row["step"] * size * context * method.passes
            row |= {"train_nats": float(jnp.mean(losses)), "test_nats": float(measured(method.estimate(state)))}
            history.append(row)
            checkpoints.save(row["step"], state, history)
            yield Progress(method.estimate(state), history)


def _whole(test: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """As many windows as fill groups of 16."""
    number = len(test[0])
    return tuple(leaf[: number - number % 16 if number > 16 else number] for leaf in test)


def bits(nats: float) -> float:
    """Bits of so many nats.

    >>> bits(math.log(2))
    1.0
    """
    return nats / math.log(2)
