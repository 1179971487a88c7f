"""The recipes of CONTRIBUTING.md, copied as a reader would, do what they say."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eki_jax
from eki_jax import natural

ROOT = Path(__file__).parents[2]


def recipe(section: str) -> dict[str, Any]:
    """What the section's block defines, run in a namespace of its own."""
    text = (ROOT / "CONTRIBUTING.md").read_text().split(f"## How to add {section}\n")[1].split("\n## ")[0]
    (block,) = re.findall(r"```python\n(.*?)```", text, re.S)
    namespace: dict[str, Any] = {"__name__": "recipe"}
    exec(block, namespace)
    return namespace


def test_a_discretization_is_short() -> None:
    """A whole discretization takes no private name; the battery runs it as one of its rows."""
    text = (ROOT / "CONTRIBUTING.md").read_text().split("## How to add a discretization\n")[1].split("```")[1]
    assert not re.findall(r"\b_[a-z]\w*", text)
    assert len(text.splitlines()) <= 60


def test_a_kind_of_deviation() -> None:
    """Its steps solve a linear problem, and its sums are those of the deviations themselves."""
    sparse = recipe("a kind of deviation")["Sparse"]()
    x = jax.random.normal(jax.random.key(0), (8, 3))
    wanted = jnp.array([1.0, -2.0, 3.0])
    solver = natural.natural_gradient(lambda u, x: x @ u, eki_jax.squared_error(), 20, damping=1e-6, deviations=sparse)
    state, info = jax.jit(solver.step)(solver.init(jnp.zeros(3), jax.random.key(1)), (x, x @ wanted))
    np.testing.assert_allclose(solver.estimate(state), wanted, atol=1e-2)
    assert bool(info.moved)
    particles = solver.ensemble(solver.init(jnp.zeros(3), jax.random.key(1)))
    assert 0.5 < float(jnp.mean(particles == 0)) < 0.95


def test_a_problem(tmp_path: Path, capsys: Any) -> None:
    """The training command knows it by its name, and learns it."""
    pytest.importorskip("sklearn")
    from benchmarks.__main__ import main
    from benchmarks.problems import registry

    recipe("a problem")
    try:
        command = ["train", "--problem", "rings", "--particles", "100", "--batch", "100", "--epochs", "4", "--quiet"]
        assert main([*command, "--out", str(tmp_path / "run")]) == 0
    finally:
        del registry.PROBLEMS["rings"]
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["test_accuracy_mean"] > 0.8


def test_an_experiment(tmp_path: Path) -> None:
    """It writes its numbers, from which the table is made."""
    from benchmarks.paper.table import write_table

    module = recipe("an experiment")
    summary = module["run"]("smoke", tmp_path, None, 0)
    saved = json.loads((tmp_path / "forgetting.json").read_text())
    assert saved["rows"] == summary["rows"]
    assert [row["name"] for row in saved["rows"]] == ["J = 4", "J = 8"]
    assert "forgetting" in write_table(tmp_path, tmp_path / "table.md").read_text()
    with pytest.raises(ValueError, match="preset: 'fast'"):
        module["run"]("fast", tmp_path, None, 0)


def test_a_loss() -> None:
    """A loss with samples of its own takes natural steps above the outputs at which a Hessian is formed."""
    module = recipe("a loss")
    loss = next(
        value for name, value in module.items() if getattr(value, "reduction", None) and not isinstance(value, type)
    )
    x = jax.random.normal(jax.random.key(0), (5000, 2))
    targets = jnp.exp(x @ jnp.array([0.5, -0.3]))
    solver = natural.natural_gradient(lambda u, x: x @ u, loss, 20, damping=1e-6, deviations=natural.full_rank(1.0))
    step = jax.jit(solver.step)
    state = solver.init(jnp.zeros(2), jax.random.key(1))
    values = []
    for _ in range(4):
        state, info = step(state, (x, targets))
        values.append(float(info.loss))
    assert values[-1] < 0.9 * values[0]
    euler = functools.partial(eki_jax.euler(lambda u, x: x @ u, loss).step)
    ensemble = eki_jax.sample_ensemble(jax.random.key(2), eki_jax.gaussian(jnp.zeros(2), 1.0), 10)
    _, info = jax.jit(euler)(eki_jax.euler(None, loss).init(ensemble), (x, targets))
    assert bool(info.moved)
