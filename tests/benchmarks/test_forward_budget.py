"""``python -m benchmarks forward-budget``: its runs, its arithmetic, and what it leaves behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("sklearn")

from benchmarks.__main__ import main
from benchmarks.forward_budget import cli, jobs, settings, summary
from benchmarks.forward_budget.curve import follow
from benchmarks.harness import store
from benchmarks.problems import registry
from eki_jax.training import Method

pytestmark = pytest.mark.benchmarks


@pytest.fixture(scope="module")
def digits() -> registry.Problem:
    return registry.get("digits-dnn")


def counting(passes: int) -> Method:
    """Counts its steps, and remembers the least and the largest key and the images it saw."""
    init = lambda key: (jnp.int32(0), jnp.zeros(10))
    step = lambda state, key, batch: ((state[0] + 1, state[1] + jnp.bincount(batch[1], length=10)), {})
    return Method(init, step, lambda *of: None, passes=lambda particles: passes)


def test_a_curve_keeps_to_its_budget(digits: registry.Problem) -> None:
    """A curve counts passes and stops within its budget."""
    problem = digits._replace(logits=lambda state, x: jax.nn.one_hot(jnp.full(len(x), state[0] % 10), 10))
    task = {"batch": 100, "seed": 0, "budget": 10_500, "every": 2_000}
    found = follow(problem, counting(passes=7), task)
    assert found["passes"] == [
        0,
        1400,
        2800,
        4200,
        5600,
        7000,
        8400,
        9800,
    ]  # two steps of 700 passes between measurements
    shares = [float(np.mean(problem.test[1] == steps % 10)) for steps in range(0, 16, 2)]
    assert found["test_accuracy"] == pytest.approx(shares, abs=1e-6)
    assert np.all(np.diff(found["seconds"]) > 0)
    with pytest.raises(ValueError, match="budget: 600 passes; wanted at least the 700"):
        follow(problem, counting(passes=7), {**task, "budget": 600})
    one_by_one = follow(problem, counting(passes=7)._replace(compiled_loop=False), task)
    assert one_by_one["test_accuracy"] == found["test_accuracy"]


def test_steps_one_by_one_are_the_loops(digits: registry.Problem) -> None:
    """Steps one by one are those of the compiled loop."""
    task = {"batch": 100, "seed": 0, "budget": 3_000, "every": 600}
    method = jobs.methods.get("msgd", digits, 1, 0.1, 0.9)
    loop, one_by_one = (follow(digits, method._replace(compiled_loop=loop), task) for loop in (True, False))
    assert loop["test_accuracy"] == one_by_one["test_accuracy"]
    assert loop["test_accuracy"][-1] > loop["test_accuracy"][0]


def test_convolutions_take_steps_one_by_one(digits: registry.Problem) -> None:
    """With noise per sample, on a processor."""
    loops = lambda problem: jobs.methods.get("natural-eki-per-sample", problem, 3, 0.1, 0.9).compiled_loop
    kernel = {"kernel": jax.ShapeDtypeStruct((3, 3, 1, 4), jnp.float32)}
    assert loops(digits)
    assert loops(digits._replace(template=kernel)) is (jax.default_backend() != "cpu")


def test_batches_without_replacement(digits: registry.Problem) -> None:
    """Batches are drawn without replacement within an epoch."""
    labels = digits.train[1]
    seen = []
    problem = digits._replace(logits=lambda state, x: jax.nn.one_hot(jnp.zeros(len(x), int), 10))
    run = counting(1)._replace(estimate=lambda state: jax.debug.callback(seen.append, state[1]) or state)
    follow(problem, run, {"batch": 479, "seed": 0, "budget": 1437, "every": 1437})
    jax.effects_barrier()
    assert np.array_equal(np.max(np.stack(seen), axis=0), np.bincount(labels, minlength=10))


def test_passes_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient counts three passes and a natural step its particles."""
    counted = {}
    monkeypatch.setattr(
        jobs,
        "follow",
        lambda problem, run, task: counted.update({task["method"]: run.passes(task.get("particles", 1))}) or {},
    )
    for method in ("msgd", "natural-eki-lowrank", "natural-eki", "eki-r"):
        jobs.ours(settings.task(settings.PRESETS["smoke"], "digits-dnn", method, 0))
    # A natural step evaluates the mean before and after it, and the localized estimate looks at it besides.
    assert counted == {"msgd": 3, "natural-eki-lowrank": 23, "natural-eki": 42, "eki-r": 40}


def test_a_natural_run_learns_and_repeats() -> None:
    """A natural run learns and is the same again."""
    task = settings.task(settings.PRESETS["smoke"], "digits-dnn", "natural-eki-lowrank", 0)
    found, again = jobs.ours(task), jobs.ours(task)
    assert found["test_accuracy"] == again["test_accuracy"]
    assert found["test_accuracy"][-1] > max(0.8, found["test_accuracy"][0] + 0.5)


def test_redraws_are_between_epochs() -> None:
    """A method that redraws does so after the last step of an epoch, and at no other."""
    labels = np.repeat(np.arange(4), np.arange(1, 5))  # accuracy says of a network that knows one class which it is
    nothing = dict.fromkeys(registry.Problem._fields)
    known = lambda redraws, x: jnp.tile(jax.nn.one_hot(redraws, 4), (len(x), 1))
    data = {"train": (np.zeros(5), np.zeros(5)), "test": (labels, labels)}  # two steps of two an epoch
    method = Method(
        init=lambda key: jnp.zeros((), int),
        step=lambda state, key, batch: (state, {}),
        accuracy=lambda *of: None,
        redraw=lambda state, key, size: state + 1,
        passes=lambda size: 1,
        estimate=lambda state: state,
    )
    task = {"batch": 2, "particles": 3, "seed": 0, "budget": 12, "every": 2}
    found = follow(registry.Problem(**nothing | data | {"logits": known}), method, task)
    assert found["test_accuracy"] == pytest.approx([0.1, 0.1, 0.2, 0.2, 0.3, 0.3, 0.4])


def run(passes: list[int], accuracies: list[float]) -> dict[str, Any]:
    return {"passes": passes, "test_accuracy": accuracies, "seconds": [0.1 * n for n in range(len(passes))]}


def test_accuracy_at_a_budget() -> None:
    """The accuracy at a budget is the last that it pays for."""
    curve = run([0, 40, 80, 120], [0.1, 0.5, 0.7, 0.9])
    assert [summary.at_budget(curve, budget) for budget in (39, 40, 119, 500)] == [
        None,
        (0.5, 0.1),
        (0.7, pytest.approx(0.2)),
        (0.9, pytest.approx(0.3)),
    ]
    found = summary.statistics([curve, run([0, 40, 80, 120], [0.1, 0.7, 0.7, 0.8])], (39, 40, 120))
    assert list(found) == ["40", "120"]
    assert found["40"]["mean"] == pytest.approx(0.6)
    assert found["40"]["spread"] == pytest.approx(np.std([0.5, 0.7], ddof=1))


def test_a_claim_needs_a_lead_beyond_the_spread() -> None:
    def point(mean: float, spread: float, reach: float) -> dict[str, float]:
        return {"mean": mean, "spread": spread, "least": mean - reach, "most": mean + reach}

    def held(ours: tuple[float, ...], rival: tuple[float, ...]) -> list[bool]:
        results = {"p": {"natural-eki": {"10": point(*ours), "1": point(0, 0, 0)}, "pgpe": {"10": point(*rival)}}}
        return [claim["holds"] for claim in summary.claims(results, start=5)]

    assert held((0.9, 0.01, 0.02), (0.8, 0.01, 0.02)) == [True]
    assert held((0.9, 0.06, 0.01), (0.8, 0.05, 0.01)) == [False]  # a lead within the spreads
    assert held((0.9, 0.01, 0.06), (0.8, 0.01, 0.05)) == [False]  # some seed is beaten
    assert held((0.7, 0.01, 0.02), (0.8, 0.01, 0.02)) == [False]


def fake(calls: list[dict[str, Any]]) -> Any:
    def perform(task: dict[str, Any], data: Path | None, peers: Path) -> dict[str, Any]:
        if len(calls) == 4:
            raise KeyboardInterrupt
        calls.append(task)
        good = task.get("learning_rate") in (None, 0.01, 0.1)
        accuracies = [0.1, 0.5, 0.6 + 0.2 * good + 0.01 * task["seed"]]
        return {"passes": [0, 50_000, 200_000], "seconds": [0, 1.0, 2.0], "test_accuracy": accuracies}

    return perform


def test_an_interrupted_command_goes_on(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupted command goes on and the best step size is taken."""
    command = ["forward-budget", "--preset", "smoke", "--out", str(tmp_path), "--method", "open-es", "natural-eki"]
    done = []
    for _ in range(2):
        calls: list[dict[str, Any]] = []
        monkeypatch.setattr(cli, "perform", fake(calls))
        code = main(command)
        done.append((code, len(calls)))
    assert done == [(130, 4), (0, 3)]  # three tuning runs and two seeds for each method: seven in all
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["results"]["digits-dnn"]["open-es"]["200000"]["mean"] == pytest.approx(0.805)
    path = tmp_path / "forward_budget_smoke.jsonl"
    saved = summary.summarized(path, store.read(path))
    assert saved["chosen"] == {"digits-dnn OpenES": 0.01}
    assert len(saved["cells"]) == 7
    assert "| OpenES | 0.5000 ± 0.0000 | 0.8050 ± 0.0071 | 2.0 |" in (tmp_path / "forward_budget_smoke.md").read_text()
    assert (tmp_path / "forward_budget_smoke.png").stat().st_size > 10_000


def test_other_settings_are_another_run(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run is made again where its settings are others, and said to be."""
    command = ["forward-budget", "--preset", "smoke", "--out", str(tmp_path), "--method", "eki-r"]
    asked = []
    for particles in (40, 40, 7):
        calls: list[dict[str, Any]] = []
        monkeypatch.setattr(cli, "perform", fake(calls))
        monkeypatch.setitem(settings.ON_PROBLEM, ("digits-dnn", "eki-r"), {"particles": particles})
        capsys.readouterr()
        assert main(command) == 0
        asked.append(len(calls))
    assert asked == [2, 0, 2]
    assert "digits-dnn-eki-r-0: the one of the earlier result is of other settings" in capsys.readouterr().err
    cells = store.read(tmp_path / "forward_budget_smoke.jsonl")["cells"]
    assert [cell["settings"]["particles"] for cell in cells.values()] == [7, 7]


def test_runs_of_several_settings_are_refused() -> None:
    """Seeds of other settings do not become one line of the table, nor vanish from it."""
    wish = settings.task(settings.PRESETS["smoke"], "digits-dnn", "eki-r", 0)
    curve = fake([])(wish, None, Path())
    cells = {str(seed): {"settings": {**wish, "seed": seed, "particles": 7 + seed}, "found": curve} for seed in (0, 1)}
    head = {"seeds": (0, 1), "budgets": settings.PRESETS["smoke"].budgets, "command": "c"}
    with pytest.raises(cli.Refused, match="x: digits-dnn, eki-r: runs of several settings; run `c` again"):
        summary.summarized(Path("x"), {**head, "cells": cells})
    cells["1"]["settings"]["particles"] = 7
    assert list(summary.summarized(Path("x"), {**head, "cells": cells})["curves"]["digits-dnn"]) == ["eki-r"]


def test_rivals_that_cannot_be_had_are_named(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def unavailable(*args: Any) -> Any:
        raise cli.Unavailable("no network")

    monkeypatch.setattr(cli, "perform", unavailable)
    assert main(["forward-budget", "--preset", "smoke", "--out", str(tmp_path), "--method", "pgpe"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["skipped"] == {"digits-dnn, pgpe": "no network"}


@pytest.mark.slow
@pytest.mark.peers
def test_evosax_learns_the_digits(tmp_path: Path) -> None:
    from benchmarks.harness.peers import default_folder

    task = settings.task(settings.PRESETS["smoke"], "digits-dnn", "open-es", 0, learning_rate=0.03)
    found = jobs.rival({**task, "budget": 2_000_000}, None, default_folder())
    assert found["passes"][1] % 25_000 == 0
    assert found["test_accuracy"][-1] > 0.7
