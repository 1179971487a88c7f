"""Natural-gradient steps over devices beside those of one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec

from eki_jax import sharding


def check_both_axes(
    make: Callable[..., Any], params: Any, batch: tuple[Any, Any], steps: int, parts: tuple[str, ...], rtol: float
) -> Any:
    """In ``jax.shard_map``, over particles and samples: parts of the state are those of one device; returns this one's.

    Args:
        make: function of names of axes that makes a solver of eight particles.
        params: where it begins.
        batch: one batch for all steps.
        steps: number of them.
        parts: names of what is compared.
        rtol: relative tolerance.
    """
    alone, over = make(), make(axis_name="particles", batch_axis_name="batch")
    same, samples = PartitionSpec(), PartitionSpec("batch")
    spread = jax.jit(sharding.over_devices(over.step, sharding.make_mesh(2, 4), (same, (samples, samples))))
    one = many = alone.init(params, jax.random.key(0))
    step = jax.jit(alone.step)
    for _ in range(steps):
        one, many = step(one, batch)[0], spread(many, batch)[0]
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-5)
    for part in parts:
        jax.tree.map(close, getattr(many, part), getattr(one, part))
    return one
