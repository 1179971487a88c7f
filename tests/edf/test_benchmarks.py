"""The EDF experiments: what they conclude, what they write, and that each runs to its end."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.edf import cli, convergence, harness, stochastic
from benchmarks.edf.training import Stops, build, full_batch, momentum_sgd
from benchmarks.harness import store
from benchmarks.harness.store import Job
from benchmarks.problems import data as datasets
from benchmarks.problems.data import Dataset

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.benchmarks


def images(size: int, channels: int) -> Dataset:
    rng = np.random.default_rng(0)
    draw = lambda count: rng.normal(size=(count, size, size, channels)).astype(np.float32)
    labels = lambda count: rng.integers(0, 10, count).astype(np.int32)
    return Dataset(draw(40), labels(40), draw(20), labels(20), 10)


def curve(*losses: float, ended: str = "all steps") -> dict[str, Any]:
    return {"losses": list(losses), "ended": ended}


CURVES = {
    "EDF-G, k = 1": curve(2, 1, 0.5, 0.2),
    "EDF-G, k = 3": curve(2, 0.6, 0.1),
    "momentum": curve(2, 1.5, 1, 0.3),
    "NAG": curve(2, 1.9, 1.8, 1.7),
    "Adam": curve(2, 1, 0.6, 0.4),
}


def test_claims_are_read_from_the_curves() -> None:
    found = convergence.claims(CURVES, (1, 3))
    assert found == {
        "k = 1 ends below momentum, NAG and Adam": True,
        "steps to the final loss of k = 1": {1: 3, 3: 2},
        "a larger k needs fewer steps": True,
        "a larger k is lower after as many steps": True,
    }


@pytest.mark.parametrize(
    ("name", "replacement", "claim"),
    [
        ("Adam", curve(2, 1, 0.3, 0.1), "k = 1 ends below momentum, NAG and Adam"),
        ("EDF-G, k = 1", curve(2, 1, 0.5, 0.4), "k = 1 ends below momentum, NAG and Adam"),
        ("EDF-G, k = 1", curve(2, 0.1, 5e3, ended="diverged"), "k = 1 ends below momentum, NAG and Adam"),
        ("EDF-G, k = 3", curve(2, 1, 0.9, 0.2), "a larger k needs fewer steps"),
        ("EDF-G, k = 3", curve(2, 1, 0.9, 0.8), "a larger k needs fewer steps"),
        ("EDF-G, k = 3", curve(2, 0.1, 0.6), "a larger k is lower after as many steps"),
        ("EDF-G, k = 3", curve(2, 0.1, None, ended="diverged"), "a larger k is lower after as many steps"),
    ],
)
def test_claims_can_fail(name: str, replacement: dict[str, Any], claim: str) -> None:
    assert convergence.claims({**CURVES, name: replacement}, (1, 3))[claim] is False


def test_the_best_rate_lasted() -> None:
    """The best rate has the lowest final loss of the runs that lasted."""
    runs = [
        {"rate": 1.0, "train_loss": [2.0, float("nan")]},
        {"rate": 0.1, "train_loss": [1.0, 0.5]},
        {"rate": 0.3, "train_loss": [1.5, 0.4]},
        {"rate": 9.0, "train_loss": [float("inf")]},
    ]
    assert stochastic.best(runs)["rate"] == 0.3


def test_costs_are_counted_in_passes() -> None:
    """Gradients and products are counted in forward passes."""
    assert [harness.gradient_passes(products) for products in (0, 1, 2)] == [3, 7, 10]


def test_a_run_ends_where_it_should() -> None:
    import flax.linen as nn

    dataset = images(2, 1)
    model = build(nn.Sequential([lambda x: x.reshape(len(x), -1), nn.Dense(10)]), dataset.train_x, 0)
    train = dataset.train_x, dataset.train_y
    run = lambda rate, stops: full_batch(momentum_sgd((rate,)), model, train, 5, chunk_size=None, stops=stops)
    whole = run(0.1, Stops())
    assert whole["ended"] == "all steps"
    assert len(whole["losses"]) == len(whole["gradient_norms"]) == 6
    assert np.all(np.diff(whole["losses"]) < 0)
    assert run(1e6, Stops())["ended"] == "diverged"
    assert run(0.1, Stops(loss=10.0))["ended"] == "loss at rounding"
    assert run(0.1, Stops(gradient_norm=10.0))["ended"] == "stationary"


@pytest.fixture
def small_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "cifar10", lambda data: images(8, 3))
    monkeypatch.setattr(datasets, "mnist", lambda data: images(8, 1))
    for name in ("mnist", "cifar10"):
        _, network, batch_norm = stochastic.PROBLEMS[name]
        dataset = images(8, 1 if name == "mnist" else 3)
        monkeypatch.setitem(stochastic.PROBLEMS, name, (lambda data, dataset=dataset: dataset, network, batch_norm))


def run_and_read(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    out = tmp_path / "result.jsonl"
    assert cli.main([*arguments, "--preset", "smoke", "--out", str(out)]) == 0
    assert out.with_suffix(".png").stat().st_size > 5000
    return cli.summarized(store.read(out))


@pytest.mark.slow
def test_every_method_has_the_same_budget(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The harness gives every method the same budget."""
    result = run_and_read(tmp_path, "harness")
    assert set(result["curves"]) >= {"EKI", "EKI(R)", "EDF-G, k = 1", "EDF-G, k = 2", "SGD, rate 0.1"}
    for found in result["curves"].values():
        cost = found["passes"][1] - found["passes"][0]
        assert result["budget"] - cost < found["passes"][-1] <= result["budget"]
        assert cost % (found["passes_per_sample"] * result["batch"]) == 0
        assert len(found["test_accuracy"]) == len(found["passes"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["experiment"] == "edf harness"


def test_an_interrupted_experiment_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes on where it stopped; a finished one begins again, unless what it has is to be kept."""
    out, calls = tmp_path / "result.jsonl", []
    monkeypatch.setattr(cli, "table", lambda result: "")
    monkeypatch.setattr(cli, "draw", lambda result, path: None)

    def job(name: str) -> dict[str, Any]:
        calls.append(name)
        if name == "c" and calls.count("c") == 1:
            raise KeyboardInterrupt
        return {"name": name}

    jobs = {name: Job({"images": 5}, functools.partial(job, name)) for name in "abcd"}
    monkeypatch.setattr(harness, "plan", lambda arguments: ({"pair": (1, 2)}, jobs))
    run = lambda *flags: cli.main(["harness", "--preset", "smoke", "--out", str(out), *flags])
    assert run() == 130
    for flags, made in (((), "cd"), (("--keep",), ""), (("--seed", "1", "--keep"), "abcd"), (("--seed", "1"), "abcd")):
        before = len(calls)
        assert run(*flags) == 0
        assert calls[before:] == list(made)
        assert cli.summarized(store.read(out))["curves"] == {name: {"name": name} for name in "abcd"}


def test_fewer_images_take_the_place_of_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Where a data set is there in part only, the curves of more of it stay."""
    monkeypatch.setattr(cli, "table", lambda result: "")
    monkeypatch.setattr(cli, "draw", lambda result, path: None)
    out, trained = tmp_path / "result.jsonl", []

    def run(images: int) -> int:
        train = lambda: trained.append(images) or {"losses": [1.0]}
        plan = ({}, {"Adam": Job({"images": images}, train)})
        monkeypatch.setattr(harness, "plan", lambda arguments: plan)
        return cli.main(["harness", "--preset", "smoke", "--out", str(out)])

    assert [run(50), run(20)] == [0, 2]
    assert "Adam has 50 images, and here are 20; name another by --out" in capsys.readouterr().err
    assert run(60) == 0
    assert trained == [50, 60]


@pytest.mark.slow
def test_convergence_runs(small_data: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run_and_read(tmp_path, "convergence")
    assert result["images"] == 20
    assert all(len(found["losses"]) == 4 for found in result["curves"].values())
    assert "| EDF-G, k = 1 |" in capsys.readouterr().out


@pytest.mark.slow
def test_stochastic_runs_every_rate(small_data: None, tmp_path: Path) -> None:
    result = run_and_read(tmp_path, "stochastic", "--problem", "mnist")
    methods = result["problems"]["mnist"]
    assert len(methods) == 6
    for found in methods.values():
        assert len(found["runs"]) == 1
        assert found["best"] in found["runs"]


@pytest.mark.slow
def test_residual_networks_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.edf.networks import ResNet

    entry = (lambda data: images(8, 3), lambda preset: ResNet(14), True)
    monkeypatch.setitem(stochastic.PROBLEMS, "cifar10-resnet56", entry)
    result = run_and_read(tmp_path, "stochastic", "--problem", "cifar10-resnet56")
    assert all(
        np.isfinite(found["best"]["train_loss"][-1]) for found in result["problems"]["cifar10-resnet56"].values()
    )


@pytest.mark.slow
def test_full_batch_and_mini_batches_are_compared(small_data: None, tmp_path: Path) -> None:
    result = run_and_read(tmp_path, "full-vs-stochastic")
    assert set(result["curves"]) == {f"{kind}, k = {k}" for kind in ("full batch", "mini-batch") for k in (1, 2)}


def test_missing_data_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["convergence", "--preset", "smoke", "--data", str(tmp_path), "--out", str(tmp_path / "o.jsonl")]
    assert cli.main(command) == 2
    assert "data_batch_1.bin" in capsys.readouterr().err
