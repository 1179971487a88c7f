"""The recipes of CONTRIBUTING.md, copied as a reader would, do what they say."""

from __future__ import annotations

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
    np.testing.assert_allclose(solver.estimate(state), wanted, atol=5e-2)
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
    """Its numbers are written, from which the table and the picture are made."""
    from benchmarks.harness import store
    from benchmarks.paper.common import finish
    from benchmarks.paper.table import write_table

    module = recipe("an experiment")
    found = module["measure"]("smoke", None, 0)
    summary = finish("forgetting", "smoke", 0, tmp_path, found)
    saved = store.read(tmp_path / "forgetting.jsonl")
    module["draw"](saved, tmp_path / "forgetting.png")
    assert saved["rows"] == summary["rows"]
    assert [row["name"] for row in saved["rows"]] == ["J = 4", "J = 8"]
    assert "forgetting" in write_table(tmp_path, tmp_path / "table.md").read_text()
    assert (tmp_path / "forgetting.png").is_file()


def test_a_loss(capsys: Any) -> None:
    """A loss of samples takes natural steps above the outputs at which a whole Hessian is formed, and any other."""
    module = recipe("a loss")
    assert capsys.readouterr().out == "True True\n"
    loss, forward, batch = module["loss"], module["forward"], (module["x"], module["counts"])
    assert loss(forward(module["state"].position, batch[0]), batch[1]) < loss(
        forward(module["params"], batch[0]), batch[1]
    )
    solver = eki_jax.euler(forward, loss)
    prior = eki_jax.gaussian(module["params"], 0.3)
    state = solver.init(eki_jax.sample_ensemble(jax.random.key(2), prior, 10))
    _, info = jax.jit(solver.step)(state, batch)
    assert bool(info.moved)
