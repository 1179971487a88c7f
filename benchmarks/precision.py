"""In which precision a run multiplies: as asked, or as this machine is faster."""

from __future__ import annotations

import time
from typing import NamedTuple

import jax

from eki_jax.kernel.precision import product

#: The precisions of a run, and what ``--precision`` may be.
NAMES = ("float32", "bf16")
CHOICES = ("auto", *NAMES)
#: How much faster bfloat16 products have to be: a step does more than multiply, and pays for the rounding.
WORTH = 1.5
# Rows of the matrices that are multiplied: some milliseconds' work.
_ROWS, _ROWS_OF_DEVICES = 1024, 8192


class Rates(NamedTuple):
    """Operations a second in products of matrices that are stored in float32.

    Attributes:
        float32: As JAX multiplies by itself.
        bf16: Rounded to bfloat16 first, and summed in float32.
    """

    float32: float
    bf16: float


def measured(repeats: int = 5) -> Rates:
    """The rates of this machine: the best of some products each, in turns, so that both meet the same neighbours."""
    rows = _ROWS if jax.default_backend() == "cpu" else _ROWS_OF_DEVICES
    factor = jax.random.normal(jax.random.key(0), (rows, rows))
    products = [jax.jit(lambda a, name=name: product(a, a, name)).lower(factor).compile() for name in (None, "bf16")]
    seconds: list[list[float]] = [[], []]
    for _ in range(repeats + 1):
        for run, times in zip(products, seconds, strict=True):
            started = time.perf_counter()
            jax.block_until_ready(run(factor))
            times.append(time.perf_counter() - started)
    return Rates(*(2 * rows**3 / min(times[1:]) for times in seconds))


class Choice(NamedTuple):
    """A precision.

    Attributes:
        name: ``"float32"`` or ``"bf16"``.
        why: The reason, for a line to the user.
    """

    name: str
    why: str


def choose(asked: str) -> Choice:
    """The precision of a run.

    Args:
        asked: One of ``CHOICES``; ``"auto"`` is bfloat16 where its products are worth it.
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
    return Choice("bf16" if ratio >= WORTH else "float32", f"{found}; bf16 is taken from {WORTH} on")
