"""The guide's examples learn; orbax takes the state."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest

from eki_jax import gaussian
from eki_jax.optax import meki

ROOT = Path(__file__).parents[2]


@pytest.fixture
def examples(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "examples")
    return importlib.import_module


def test_the_digits_example_learns(examples: Any) -> None:
    assert examples("optax_digits").main(particles=200, epochs=3, batch_size=400) > 0.4


def test_the_partition_example_learns(examples: Any) -> None:
    trained, as_drawn = examples("optax_partition").main(particles=50, epochs=3, batch_size=400)
    assert trained > as_drawn


def test_orbax_saves_and_restores_the_state(tmp_path: Path) -> None:
    params = {"w": jnp.arange(6.0).reshape(2, 3)}
    tx = meki(prior=gaussian({"w": jnp.zeros(3)}, 1.0), key=jax.random.key(0))
    rows = jnp.array([[1.0], [3.0]])
    _, state = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params, outputs=rows, cotangents=-rows)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", jax.tree.map(ocp.utils.to_shape_dtype_struct, state))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    pairs = zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True)
    assert all(bool((a == b).all()) and a.dtype == b.dtype for a, b in pairs)
    assert jnp.abs(restored[2].momentum["w"]).max() > 0
