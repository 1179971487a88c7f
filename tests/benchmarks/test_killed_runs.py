"""Commands that are killed at any time go on, and end with the bits of one that was not."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import killing
import numpy as np
import pytest

pytest.importorskip("sklearn")

from benchmarks import methods
from benchmarks.harness import store
from benchmarks.problems import registry
from eki_jax.checkpoints import Checkpoints

pytestmark = pytest.mark.benchmarks

TRAIN = [
    "train",
    "--problem",
    "digits-dnn",
    "--method",
    "eki-r",
    "--particles",
    "6",
    "--batch",
    "300",
    "--epochs",
    "3",
    "--precision",
    "float32",  # auto may choose another one after a kill than before it: it measures, and others use the processor
    "--quiet",
]
BUDGET = ["forward-budget", "--preset", "smoke", "--method", "msgd", "--out", "out"]


def same_command(folder: Path) -> tuple[Any, ...]:
    return killing.command, folder, *BUDGET


def train(folder: Path) -> tuple[Any, ...]:
    """The same command where nothing is lost by it, else the one that goes on."""
    begun = any(child.name.isdigit() for child in (folder / "run/checkpoints").glob("*"))
    flags = ["train", "--resume", "run", "--quiet"] if begun else [*TRAIN, "--out", "run"]
    return killing.command, folder, *flags


def cell(folder: Path) -> tuple[Any, ...]:
    return killing.table, folder


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        left_out = ("seconds", "compile_seconds", "environment")
        return {key: without_times(item) for key, item in value.items() if key not in left_out}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def of_train(folder: Path) -> Any:
    """The last state's bits, the metrics and the result."""
    result = json.loads((folder / "run/result.json").read_text())
    settings = {k: result[k] for k in ("problem", "particles", "batch", "seed", "learning_rate", "momentum", "method")}
    method = methods.get("eki-r", registry.get("digits-dnn"), 6)
    checkpoints = Checkpoints(folder / "run/checkpoints", settings)
    state, _ = checkpoints.restore(lambda notes: jax.eval_shape(method.init, jax.random.key(0)))
    checkpoints.close()
    lines = (folder / "run/metrics.jsonl").read_text().splitlines()
    bits = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]
    return bits, without_times(result), without_times([json.loads(line) for line in lines])


def of_cell(folder: Path) -> Any:
    found = without_times(store.read(folder / "out/t.jsonl"))
    assert len(found["runs"]) == 1
    return found


def of_budget(folder: Path) -> Any:
    """The curves; seconds stand in the table too."""
    return without_times(store.read(folder / "out/forward_budget_smoke.jsonl"))


KINDS: dict[str, tuple[Callable[[Path], tuple[Any, ...]], Callable[[Path], Any]]] = {
    "train": (train, of_train),
    "cell": (cell, of_cell),
    "budget": (same_command, of_budget),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kills", [2, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_runs_go_on(kind: str, kills: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL at random times, before the first checkpoint too, changes no bit of what comes out."""
    for name, value in (("DIR", tmp_path), ("MIN_COMPILE_TIME_SECS", 0), ("MIN_ENTRY_SIZE_BYTES", -1)):
        name = "JAX_COMPILATION_CACHE_DIR" if name == "DIR" else f"JAX_PERSISTENT_CACHE_{name}"
        monkeypatch.setenv(name, str(value))
    command, outcome = KINDS[kind]
    span = killing.seconds(*command(tmp_path / "whole"))
    if kills > 2:  # without what was compiled
        span = killing.seconds(*command(tmp_path / "timed"))
    wanted = outcome(tmp_path / "whole")
    times, killed, number = random.Random(kills), 0, 0
    while killed < kills:
        folder, number = tmp_path / f"killed-{number}", number + 1
        for _ in range(min(5, kills - killed)):
            code = killing.run(*command(folder), until=times.uniform(0, span))
            killed += code is None
            assert code in (None, 0), (folder / "log.txt").read_text()
        assert killing.run(*command(folder)) == 0, (folder / "log.txt").read_text()
        assert outcome(folder) == wanted
        assert not [path for words in ("damaged", "other") for path in folder.rglob(f"*.{words}*")]


@pytest.mark.slow
def test_of_two_runs_at_once_one_is_refused(tmp_path: Path) -> None:
    """On a new folder, and on one to resume: the other leaves nothing there."""
    for index in range(5):
        folder = tmp_path / str(index)
        new = [(killing.command, folder, *TRAIN, "--seed", str(seed), "--out", "run") for seed in (1, 2)]
        codes = killing.together(*new)
        assert sorted(codes) == [0, 2], (folder / "log.txt").read_text()
        seed = 1 + codes.index(0)
        result = json.loads((folder / "run/result.json").read_text())
        assert (result["seed"], json.loads((folder / "run/settings.json").read_text())["seed"]) == (seed, seed)
        again = killing.command, folder, "train", "--resume", "run", "--epochs", "6", "--quiet"
        assert sorted(killing.together(again, again)) == [0, 2]
        assert "in use by process" in (folder / "log.txt").read_text()
