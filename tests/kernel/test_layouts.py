"""How devices share their particles: every layout over a mapped axis, quickly, and on one device."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eki_jax
from eki_jax import sharding
from eki_jax.kernel.axes import Axis
from eki_jax.kernel.layouts import multiplier


@pytest.mark.parametrize("outputs", [2, 11])  # all_to_all gathers R and Z where they are fewer numbers than R Z^T
def test_layouts_over_a_mapped_axis(outputs: int) -> None:
    """Four parts of twelve particles with seven columns, which four does not divide."""
    keys = jax.random.split(jax.random.key(0), 3)
    ensemble, g, r = (
        jax.random.normal(key, (12, width)) for key, width in zip(keys, (7, outputs, outputs), strict=True)
    )
    apart = lambda rows: rows.reshape(4, 3, -1)

    @jax.jit
    def directions(*parts: Any) -> Any:
        bodies = (partial(eki_jax.direction, axis_name="p", communication=c) for c in sharding.COMMUNICATIONS)
        return [jax.vmap(body, axis_name="p")(*parts) for body in bodies]

    z = np.asarray(g, np.float64) - np.asarray(g, np.float64).mean(axis=0)
    wanted = np.asarray(r, np.float64) @ z.T @ np.asarray(ensemble, np.float64) / 12
    for communication, found in zip(sharding.COMMUNICATIONS, directions(*map(apart, (ensemble, g, r))), strict=True):
        error = np.linalg.norm(found.reshape(12, 7) - wanted) / np.linalg.norm(wanted)
        rounding = 2.0**-8 if communication == "bf16_sums" else 1e-6
        assert rounding / 1000 < error < rounding, communication


@pytest.mark.parametrize("communication", sharding.COMMUNICATIONS)
def test_one_device_needs_no_layout(communication: Any) -> None:
    rows = jnp.ones((3, 2))
    found = jax.vmap(
        lambda z: jnp.asarray(multiplier(communication, z, z, Axis("p"), None) is None), axis_name="p", axis_size=1
    )(rows[None])
    assert bool(found[0])
