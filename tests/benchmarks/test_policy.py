"""The policy command: it runs, keeps what is finished, chooses by the tuning seed, and says what it found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from benchmarks.__main__ import main
from benchmarks.harness import store
from benchmarks.harness.peers import Unavailable
from benchmarks.policy import cli, curve, jobs, methods, networks, optimum, settings, summary

pytestmark = pytest.mark.benchmarks
SMOKE = settings.PRESETS["smoke"]


def curves(returns: list[float], seeds: int = 2) -> dict[str, Any]:
    """What a task's process finds: a point more a seed."""
    rows = []
    for seed in range(seeds):
        found = [value + seed for value in returns]
        count = len(found)
        rows.append(
            {
                "seed": seed,
                "episodes": list(range(count)),
                "steps": [10 * i for i in range(count)],
                "seconds": [0.1] * count,
                "returns": found,
                "quartiles": [[0.0, 1.0]] * count,
            }
        )
    return {"rows": rows}


def pretend(task: dict[str, Any], peers: Path) -> dict[str, Any]:
    """Runs that are better at larger settings, but for PGPE, which cannot be had."""
    if task["method"] == "pgpe":
        return {"skipped": "no network"}
    value = task[settings.GRIDS[task["method"]][0]]
    return curves([0.0, value, 10 * value], len(task["seeds"]))


def run(folder: Path, *words: str) -> int:
    return main(["policy", "--preset", "smoke", "--out", str(folder), *words])


def test_the_best_of_the_grid_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """The setting is chosen by a seed of its own; table, picture and last line are made of the reported seeds."""
    monkeypatch.setattr(cli, "perform", pretend)
    assert run(tmp_path) == 0
    out = capsys.readouterr()
    last = json.loads(out.out.splitlines()[-1])
    assert last["returns"]["CartPole-v1"]["ppo"] == pytest.approx(10 * 3e-3 + 0.5)  # the median of two seeds
    assert "pgpe" not in last["returns"]["CartPole-v1"]
    assert "CartPole-v1, pgpe: not run (no network)" in out.err
    text = (tmp_path / "policy_smoke.md").read_text()
    assert "| PPO (differentiates the policy) |" in text
    assert "learning rate 0.003" in text
    cells = store.read(tmp_path / "policy_smoke.jsonl")["cells"]
    assert cells["CartPole-v1, ppo"]["settings"]["seeds"] == [0, 1]
    assert cells["CartPole-v1, ppo, learning_rate 0.001"]["settings"]["seeds"] == [settings.TUNING_SEED]
    assert (tmp_path / "policy_smoke.png").stat().st_size > 10_000


def test_what_is_finished_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of the methods is merged into the result; the same command performs nothing again."""
    asked: list[str] = []

    def counted(task: dict[str, Any], peers: Path) -> dict[str, Any]:
        asked.append(task["method"])
        return pretend(task, peers)

    monkeypatch.setattr(cli, "perform", counted)
    assert run(tmp_path, "--method", "ppo") == 0
    assert run(tmp_path, "--method", "eki") == 0
    assert asked == ["ppo"] * 4 + ["eki"] * 3
    assert run(tmp_path, "--method", "eki", "ppo") == 0
    assert len(asked) == 7
    cells = store.read(tmp_path / "policy_smoke.jsonl")["cells"]
    assert {"CartPole-v1, ppo", "CartPole-v1, eki"} <= set(cells)
    assert run(tmp_path, "--draw") == 0


def test_a_rival_that_fails_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """What evosax's environment cannot do is a cell without numbers."""

    def unavailable(*arguments: Any) -> Any:
        raise Unavailable("cannot be installed: no network")

    monkeypatch.setattr(jobs, "python_of", unavailable)
    task = settings.task(SMOKE, "CartPole-v1", "open-es", 0.1, (0,))
    assert jobs.perform(task, Path()) == {"skipped": "cannot be installed: no network"}


def test_games_have_settings_of_their_own() -> None:
    """All methods have ReLU units on MinAtar, and clipped policy gradients more copies and larger rates there."""
    for method in settings.NAMES:
        name, values = settings.grid("Breakout-MinAtar", method)
        usual = settings.grid("CartPole-v1", method)
        assert name == usual[0]
        is_clipped = method in ("per-sample", "ppo")
        assert (values != usual[1]) == is_clipped
        task = settings.task(SMOKE, "Breakout-MinAtar", method, values[0], (0,))
        assert task[name] == values[0]
        assert task.get("copies") == (256 if is_clipped else settings.SETTINGS[method].get("copies"))
        assert task["units"] == "relu"
        assert "units" not in settings.task(SMOKE, "CartPole-v1", method, usual[1][0], (0,))


def test_rectified_units_keep_the_variance() -> None:
    """Of the observations, at the start, where actions are about as likely; the critic has them too."""
    network, key = networks.build("CartPole-v1", (64, 64), "relu"), jax.random.key(0)
    x = jax.random.normal(jax.random.key(1), (200, 4))
    params = network.init(key)
    hidden = x
    for layer in params[:-1]:
        hidden = np.maximum(hidden @ layer["w"] + layer["b"], 0)
        assert np.mean(hidden**2) == pytest.approx(4 / 64, rel=0.3)  # the norm is kept, in more units
    np.testing.assert_allclose(network.forward(params, x), hidden @ params[-1]["w"], atol=1e-6)
    assert float(np.abs(network.forward(params, x)).max()) < 0.1
    critic = network.init_critic(key)
    hidden = np.maximum(np.maximum(x @ critic[0]["w"], 0) @ critic[1]["w"], 0)
    np.testing.assert_allclose(network.value(critic, x), (hidden @ critic[2]["w"])[:, 0], rtol=1e-4, atol=1e-5)


SLOW = ("natural", "natural-sign", "natural-int8", "per-sample", "eki", "ppo")


@pytest.mark.parametrize("name", ["natural-episodes", *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)])
def test_a_method_learns(name: str) -> None:
    """After ten thousand steps the pole stands longer than at the start, and what was used is counted."""
    task = settings.task(SMOKE, "CartPole-v1", name, settings.GRIDS[name][1][-1], (0,))
    network = networks.build("CartPole-v1", (16,), settings.DISCRETE.get(name, "tanh"))
    (row,) = curve.follow(network, methods.build(network, task | {"particles": 32}), task)
    assert row["returns"][-1] > row["returns"][0] + 20
    assert row["steps"][0] == row["episodes"][0] == 0
    for point, steps in enumerate(row["steps"][1:], 1):
        assert steps >= task["budget"] * point / task["points"]
    assert row["episodes"][-1] > row["episodes"][1] > 0


def test_used_is_what_was_played() -> None:
    """Whole episodes count until their ends: steps are the sum of their lengths."""
    task = settings.task(SMOKE, "CartPole-v1", "natural-episodes", 0.1, (0,)) | {"particles": 4}
    network = networks.build("CartPole-v1", (4,))
    found = methods.build(network, task)
    state = found.init(jax.random.key(0))
    _, used = jax.jit(found.step)(state, jax.random.key(1))
    assert float(used.episodes) == 4 * task["episodes"]
    assert 8 * 4 * task["episodes"] <= float(used.steps) <= 500 * 4 * task["episodes"]


def test_medians_and_quartiles_are_of_seeds() -> None:
    """The table's numbers at a share of the budget."""
    cell = {"settings": {"points": 2}, "found": curves([0.0, 4.0, 8.0], 5)}
    np.testing.assert_array_equal(summary.at_share(cell, 0.5), [4, 5, 6, 7, 8])
    assert summary.middle(summary.at_share(cell, 1.0)) == (10.0, 9.0, 11.0)


def test_a_list_of_rules_has_the_first_that_holds() -> None:
    """And the last logits where none does."""
    forward = networks.build("CartPole-v1", (4,), "rules").forward
    planes = np.zeros((4, networks.RULES), np.float32)
    planes[0, 2], planes[1, 5] = 1, 1
    params = {"planes": planes, "offsets": np.zeros(8, np.float32), "logits": np.arange(18.0).reshape(9, 2)}
    x = np.array([[1, 1, 0, 0], [-1, 1, 0, 0], [-1, -1, 0, 0]], np.float32)
    np.testing.assert_array_equal(forward(params, x), params["logits"][[2, 5, 8]])


def test_the_most_there_is_on_a_coarse_grid() -> None:
    """About what a fine one gives, -137.8."""
    found = optimum.pendulum(optimum.Grid(61, 61, 9, 1000))
    assert found["mean"] == pytest.approx(-138, abs=4)
    assert found["deviation"] == pytest.approx(74, abs=6)
