"""The tracked benchmark: the kernel's seconds over those of one plain product of as many operations.

``pytest -m slow tests/kernel/test_speed.py --benchmark-autosave`` keeps the figures; the ratio is in their extra info,
and can be compared between machines, as seconds cannot.
"""

from __future__ import annotations

import time
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from eki_jax import direction
from eki_jax.kernel.products import cheaper_contraction

# (J, M, P), the order of the products that they call for, and the ratio that must not be passed
SHAPES = [(1000, 200, 40_000, "outputs", 1.7), (300, 2000, 40_000, "particles", 1.7)]


def operations(J: int, M: int, P: int) -> int:
    return min(4 * J * M * P, 2 * J * J * (M + P))


def seconds(run: Any) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@pytest.mark.slow
@pytest.mark.parametrize(("J", "M", "P", "contraction", "bound"), SHAPES)
def test_kernel_over_a_plain_product(benchmark: Any, J: int, M: int, P: int, contraction: str, bound: float) -> None:
    assert cheaper_contraction(J, M, P) == contraction
    keys = jax.random.split(jax.random.key(0), 3)
    u, z, r = (jax.random.normal(key, (J, size)) for key, size in zip(keys, (P, M, M), strict=True))
    kernel = jax.jit(lambda u, z, r: u - 1e-6 * direction(u, z, r), donate_argnums=0)
    inner = operations(J, M, P) // (2 * J * P)  # (J, inner) @ (inner, P) takes as many operations
    left, right = jax.random.normal(keys[0], (J, inner)), jax.random.normal(keys[1], (inner, P))
    product = jax.jit(jnp.matmul)
    state = [u]

    def step() -> None:
        state[0] = kernel(state[0], z, r).block_until_ready()

    def plain() -> None:
        product(left, right).block_until_ready()

    step(), plain()  # compile
    benchmark.pedantic(step, rounds=5)
    pairs = [(seconds(step), seconds(plain)) for _ in range(15)]  # in turn: the machine's speed drifts
    ratio = min(a for a, _ in pairs) / min(b for _, b in pairs)
    benchmark.extra_info.update(ratio=ratio, contraction=contraction, operations=operations(J, M, P))
    assert ratio < bound, f"{ratio:.2f} times as long as a plain product of as many operations"
