"""In which precision a run multiplies: as asked, or as this machine is faster."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks import methods
from benchmarks.problems.registry import Problem
from eki_jax.kernel.precision import product

#: The precisions of a run, and what ``--precision`` may be.
NAMES = ("float32", "bf16")
CHOICES = ("auto", *NAMES)
#: How much faster bfloat16 products have to be: a step does more than multiply, and pays for the rounding.
WORTH = 1.5
#: How much faster small steps have to be, which gain less than those of a run.
WORTH_IN_STEPS = 1.1
# Rows of the matrices that are multiplied: some milliseconds' work.
_ROWS, _ROWS_OF_DEVICES = 1024, 8192
# Of the steps that are tried: small ones, which take a second with the slowest networks.
_PARTICLES, _SAMPLES = 64, 128


class Rates(NamedTuple):
    """Operations a second in products of matrices that are stored in float32.

    Attributes:
        float32: As JAX multiplies by itself.
        bf16: Rounded to bfloat16 first, and summed in float32.
    """

    float32: float
    bf16: float


def measured(repeats: int = 5) -> Rates:
    """The rates of this machine: the best of some products each."""
    rows = _ROWS if jax.default_backend() == "cpu" else _ROWS_OF_DEVICES
    factor = jax.random.normal(jax.random.key(0), (rows, rows))
    products = [jax.jit(lambda a, name=name: product(a, a, name)).lower(factor).compile() for name in (None, "bf16")]
    return Rates(*(2 * rows**3 / best for best in best_seconds([partial(run, factor) for run in products], repeats)))


class Choice(NamedTuple):
    """A precision.

    Attributes:
        name: ``"float32"`` or ``"bf16"``.
        why: The reason, for a line to the user.
    """

    name: str
    why: str


def choose(asked: str, method: str, problem: Problem) -> Choice:
    """The precision of a run.

    Args:
        asked: One of ``CHOICES``; ``"auto"`` is bfloat16 where both its products and a step of a few particles are
            worth it: convolutions gain nothing on processors.
        method: The run's method.
        problem: What it solves.
    """
    if asked == "float32":
        return Choice(asked, "as asked")
    rates = measured()
    ratio = rates.bf16 / rates.float32
    found = (
        f"bfloat16 products run at {ratio:.2g} times float32's rate here, {rates.bf16 / 1e9:.3g} and "
        f"{rates.float32 / 1e9:.3g} GFLOP/s"
    )
    if asked == "bf16":
        return Choice(asked, f"as asked; {found}")
    if ratio < WORTH:
        return Choice("float32", f"{found}; bf16 is taken from {WORTH} on")
    steps = steps_ratio(method, problem)
    words = f"{found}, and steps of {_PARTICLES} particles {steps:.2g} times as fast"
    taken = "bf16" if steps >= WORTH_IN_STEPS else "float32"
    return Choice(taken, f"{words}; bf16 is taken from {WORTH} and {WORTH_IN_STEPS} on")


def steps_ratio(method: str, problem: Problem, repeats: int = 3) -> float:
    """How many times as fast a step of a few particles is in bfloat16, the best of some each, in turns."""
    batch = tuple(jnp.asarray(array[:_SAMPLES]) for array in problem.train)
    runs = []
    for name in NAMES:
        made, key = methods.get(method, problem, _PARTICLES, precision=name), jax.random.key(0)
        state = jax.jit(made.init)(key)
        runs.append(partial(jax.jit(made.step).lower(state, key, batch).compile(), state, key, batch))
    seconds = best_seconds(runs, repeats)
    return seconds[0] / seconds[1]


def best_seconds(runs: Sequence[Callable[[], Any]], repeats: int) -> list[float]:
    """The least that each takes after a first call, in turns, so that all meet the same neighbours."""
    seconds: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats + 1):
        for run, times in zip(runs, seconds, strict=True):
            started = time.perf_counter()
            jax.block_until_ready(run())
            times.append(time.perf_counter() - started)
    return [min(times[1:]) for times in seconds]
