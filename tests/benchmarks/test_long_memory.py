"""Long memory: the problems, the networks, how runs are counted, and what the experiment keeps and says."""

from __future__ import annotations

import doctest
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.harness import store
from benchmarks.paper import long_memory
from benchmarks.paper.memory import networks, tasks
from benchmarks.paper.memory.learners import METHODS, Learner, TunedMethod, compiled, follow
from benchmarks.problems import data as datasets

pytestmark = pytest.mark.benchmarks


@pytest.mark.parametrize("module", [tasks, networks], ids=lambda module: module.__name__.split(".")[-1])
def test_examples(module: Any) -> None:
    found = doctest.testmod(module)
    assert found.attempted > 0
    assert found.failed == 0


def test_the_adding_problem() -> None:
    """One mark a half, the target their values' sum, and 1/6 the error of who answers one."""
    x, y = tasks.adding(30).draw(jax.random.key(0), 4000)
    marks = np.asarray(x[..., 1])
    assert (marks[:, :15].sum(axis=1) == 1).all()
    assert (marks[:, 15:].sum(axis=1) == 1).all()
    assert set(np.unique(marks)) == {0.0, 1.0}
    task = tasks.adding(30)
    assert float(task.error(jnp.ones_like(y), y)) == pytest.approx(task.trivial, rel=0.05)


def test_the_copying_problem() -> None:
    """The letters come first, the last places show none of them, and guesses are wrong in three of four cases."""
    task = tasks.copying(20)
    x, letters = task.draw(jax.random.key(0), 4000)
    np.testing.assert_array_equal(np.argmax(x[:, : tasks.SYMBOLS], axis=-1), letters)
    assert (np.argmax(x[:, tasks.SYMBOLS :], axis=-1) >= tasks.LETTERS).all()
    assert x.shape[1] == 20 + 2 * tasks.SYMBOLS
    nothing = jnp.zeros((*letters.shape, tasks.LETTERS)).at[..., 1].set(1.0)
    assert float(task.error(nothing, letters)) == pytest.approx(task.trivial, abs=0.02)
    right = jax.nn.one_hot(letters, tasks.LETTERS)
    assert float(task.error(right, letters)) == 0
    assert task.mean_loss(9 * right, letters) < task.mean_loss(right, letters)


def test_permuted_digits() -> None:
    """One order for all images; what chooses settings is neither learned from nor reported."""
    task = tasks.permuted(64)
    found = datasets.digits()
    reported, y = task.tests(tasks.REPORTED)
    np.testing.assert_array_equal(y, found.test_y)
    order = np.random.default_rng(tasks.PERMUTATION).permutation(64)
    np.testing.assert_array_equal(reported[..., 0], found.test_x.reshape(-1, 64)[:, order])
    assert not (order == np.arange(64)).all()
    chosen_by, few = task.tests(tasks.TUNING)
    learned, of_learned = task.draw(jax.random.key(0), len(found.train_y) - len(few))
    assert len(few) == pytest.approx(len(found.train_y) / 6, abs=1)
    images = lambda x: {image.tobytes() for image in np.asarray(x)}
    assert not images(learned) & images(chosen_by)
    assert images(learned) | images(chosen_by) == images(found.train_x.reshape(-1, 64)[:, order, None])
    np.testing.assert_array_equal(np.sort([*of_learned, *few]), np.sort(found.train_y))
    with pytest.raises(ValueError, match="count: 1438; wanted at most"):
        task.draw(jax.random.key(0), 1438)
    with pytest.raises(ValueError, match="length: 100; wanted 64, 196 or 784 pixels"):
        tasks.permuted(100)


def test_parts_leave_each_other_alone(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an interrupted part has measured is there after another part."""
    cell = long_memory.Cell("adding", 5, "tanh", "adam", None, 600, points=1, seeds=1)
    monkeypatch.setattr(long_memory, "cells", lambda preset: [cell, cell._replace(length=6)])
    measured: list[int] = []

    def follow(followed: Any, task: Any, run: dict[str, Any], value: float) -> list[dict[str, Any]]:
        measured.append(run["length"])
        if measured == [6, 6]:
            raise KeyboardInterrupt
        return [{"seed": seed, "passes": [0, 1], "examples": [0, 1], "errors": [1, 0.5]} for seed in run["seeds"]]

    monkeypatch.setattr(long_memory, "follow", follow)
    with pytest.raises(KeyboardInterrupt):
        long_memory.run("cpu", tmp_path, None, 0, "T = 6")
    long_memory.run("cpu", tmp_path, None, 0, "T = 5")
    assert measured[2:] == [5] * 5
    long_memory.run("cpu", tmp_path, None, 0, "T = 6")
    assert measured[7:] == [6] * 4


def test_images_that_are_missing_are_a_line(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without MNIST's files the rest is measured, and the line says why its own is empty."""
    few = {"passes": 1000, "points": 1, "seeds": 1}
    digits = long_memory.Cell("permuted digits", 196, "lstm", "adam", 10, **few)
    monkeypatch.setattr(long_memory, "cells", lambda preset: [digits, digits._replace(task="adding", length=5)])
    rows = long_memory.run("cpu", tmp_path, tmp_path / "nowhere", 0)["rows"]
    assert [line["ours"] is None for line in rows if line["quantity"] == "test error"] == [False, True]
    assert "train-images-idx3-ubyte.gz" in rows[-1]["note"]


@pytest.mark.parametrize("kind", list(networks.KINDS))
def test_networks_step_by_step(kind: str) -> None:
    """The outputs at the last places are those of a loop in NumPy."""
    task = tasks.copying(4)
    network = networks.build(kind, task, 4)
    params = jax.tree.map(np.asarray, network.start(jax.random.key(1)))
    x = np.asarray(task.draw(jax.random.key(2), 5)[0])
    sigmoid = lambda z: 1 / (1 + np.exp(-z))
    hidden = kept = np.zeros((5, networks.KINDS[kind].units))
    outputs = []
    for place in range(x.shape[1]):
        z = hidden @ params["recurrent"] + x[:, place] @ params["inputs"] + params["bias"]
        if kind == "lstm":
            let_in, keep, new, show = np.split(z, 4, axis=1)
            kept = sigmoid(keep) * kept + sigmoid(let_in) * np.tanh(new)
            hidden = sigmoid(show) * np.tanh(kept)
        else:
            hidden = np.maximum(z, 0) if kind == "identity" else np.tanh(z)
        outputs.append(hidden @ params["outputs"] + params["shift"])
    np.testing.assert_allclose(
        network.forward(params, x), np.stack(outputs[-task.read :], axis=1), rtol=1e-4, atol=1e-5
    )


def test_starts_made_for_memory() -> None:
    """The orthogonal start keeps lengths, the identity is one, and the LSTM's gates keep for 1 to T places."""
    task = tasks.adding(100)
    start = lambda kind: networks.build(kind, task, 100).start(jax.random.key(3))
    orthogonal = start("orthogonal")["recurrent"]
    np.testing.assert_allclose(orthogonal @ orthogonal.T, np.eye(16), atol=1e-5)
    np.testing.assert_array_equal(start("identity")["recurrent"], np.eye(16))
    let_in, keep, _, _ = np.split(np.asarray(start("lstm")["bias"]), 4)
    np.testing.assert_array_equal(let_in, -keep)
    assert (keep >= 0).all()
    assert (keep <= np.log(99)).all()
    assert keep.max() > np.log(10)


def _counter(batch: int | None) -> TunedMethod:
    """A method that counts its steps and remembers the examples it has seen in its state."""

    def build(network: Any, task: Any, value: Any) -> Learner:
        def step(state: Any, examples: Any, key: jax.Array) -> Any:
            return {"steps": state["steps"] + value, "seen": examples[0].sum()}

        init = lambda params, key: {"steps": jnp.zeros(()), "seen": jnp.zeros(())}
        return Learner(init, step, lambda state: state["steps"], 7, batch)

    return TunedMethod("counter", build, "value", (1.0,))


def _task(error: Any) -> Any:
    return tasks.adding(10)._replace(error=error)


@pytest.mark.parametrize(("batch", "examples", "size"), [(5, 20, 5), (None, 20, 20), (5, 3, 3), (5, None, 5)])
def test_what_a_run_counts(batch: int | None, examples: int | None, size: int) -> None:
    """Passes are steps times examples times the method's; known examples count once, new ones each."""
    task = _task(lambda outputs, targets: outputs)
    network = networks.Network(lambda key: jnp.zeros(()), lambda params, x: params)
    followed = compiled(network, task, _counter(batch), examples)
    run = {"examples": examples, "passes": 7 * size * 12, "points": 3, "seeds": [4, 9], "test": 1}
    rows = follow(followed, task, run, 2.0)
    assert [row["seed"] for row in rows] == [4, 9]
    for row in rows:
        np.testing.assert_array_equal(row["errors"], [0, 8, 16, 24])  # the steps times the setting's value
        np.testing.assert_array_equal(row["passes"], [0, 28 * size, 56 * size, 84 * size])
        wanted = [0, 4 * size, 8 * size, 12 * size] if examples is None else 4 * [examples]
        np.testing.assert_array_equal(row["examples"], wanted)


def test_a_method_that_takes_all_wants_a_number() -> None:
    task = tasks.adding(10)
    with pytest.raises(ValueError, match=r"examples: None; wanted a number of them for EKI, which takes all"):
        compiled(networks.build("tanh", task, 10), task, METHODS["eki"], None)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(METHODS))
def test_methods_learn(name: str) -> None:
    """Every method lowers the error of the adding problem of length six far below that of who answers one."""
    task = tasks.adding(6)
    network = networks.build("lstm", task, 6)
    followed = compiled(network, task, METHODS[name], 60)
    run = {"examples": 60, "passes": 6e5, "points": 1, "seeds": [0], "test": 1}
    errors = [follow(followed, task, run, value)[0]["errors"][-1] for value in METHODS[name].values]
    assert min(errors) < task.trivial / 3


def _cell(errors: Any, examples: Any) -> dict[str, Any]:
    return {"found": {"rows": [{"errors": one, "examples": examples} for one in errors]}}


def test_the_examples_that_are_needed() -> None:
    """The first measurement at which the seeds' median is below the bound; an error that is not finite is none."""
    assert long_memory.needed(_cell([[1, 0.1, 0.001], [1, 0.001, 0.001], [1, 0.002, 0.1]], [0, 50, 100])) == 50
    assert long_memory.needed(_cell([[1, 0.1, 0.001]], [0, 50, 100])) == 100
    assert long_memory.needed(_cell([[1, 0.1, None], [1, 0.1, None], [1, 0.1, 0.001]], [30, 30, 30])) is None


def test_an_interrupted_run_goes_on(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finished cells are not repeated, and the setting is chosen by a seed and by examples that are not reported."""
    cell = long_memory.Cell("adding", 5, "tanh", "adam", None, 600, points=2, seeds=2)
    monkeypatch.setattr(long_memory, "cells", lambda preset: [cell, cell._replace(kind="lstm")])
    runs: list[dict[str, Any]] = []

    def measured(followed: Any, task: Any, run: dict[str, Any], value: float) -> list[dict[str, Any]]:
        if len(runs) == 7 and run["kind"] == "lstm":
            runs.append({})
            raise KeyboardInterrupt
        runs.append(run)
        error = 0.5 if len(run["seeds"]) > 1 else abs(value - 0.01)
        points = run["points"] + 1
        numbers = {"passes": points * [100], "examples": points * [50], "errors": points * [error], "seconds": 0.0}
        return [{"seed": seed, **numbers} for seed in run["seeds"]]

    monkeypatch.setattr(long_memory, "follow", measured)
    with pytest.raises(KeyboardInterrupt):
        long_memory.run("cpu", tmp_path, None, 3)
    path = tmp_path / "long-memory.jsonl"
    assert store.is_begun(store.read(path))
    long_memory.run("cpu", tmp_path, None, 3)
    assert len(runs) == 8 + 3  # two cells of five runs, of which one was interrupted
    found = store.read(path)
    reported = found["cells"][cell.name]["settings"]
    assert reported["rate"] == 0.01
    assert reported["seeds"] == [3, 4]
    tuned = found["cells"][f"{cell.name}, rate 0.01"]["settings"]
    assert tuned["seeds"] == [long_memory.TUNING_SEED]
    assert tuned["test"] != reported["test"]
    line = next(line for line in found["rows"] if line["name"] == cell.name and line["quantity"] == "test error")
    assert line["note"] == "1e+02 forward passes, rate 0.01"  # that were made, whatever the budget
    long_memory.draw(found, tmp_path / "long-memory.png")
    assert (tmp_path / "long-memory.png").stat().st_size > 5000
