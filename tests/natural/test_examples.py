"""The numbers on the page on natural-gradient ensembles are those of the runs; the examples run."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import pytest

from benchmarks.harness import store

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results"


def test_the_pages_numbers_are_those_of_the_run() -> None:
    result = store.read(RESULTS / "train.jsonl")["runs"]["mnist-dnn2-natural-eki-lowrank-1000-particles"]
    after = [row["test_accuracy_mean"] for row in result["history"]]
    page = " ".join((ROOT / "docs" / "natural_settings.md").read_text().split())
    assert f"{after[0]:.4f} after one epoch, {after[1]:.4f} after two and {after[4]:.4f} after five" in page
    assert (result["particles"], result["batch"]) == (1000, 1000)


def test_the_pages_time_is_that_of_the_run() -> None:
    """The page's time of a step is that of the run."""
    pytest.importorskip("matplotlib")
    from benchmarks.performance.cli import parts

    rows = parts(RESULTS)["natural"]["rows"]
    full, rank_1 = (next(r for r in rows if (r["network"], r["what"]) == ("dnn4", w)) for w in ("full rank", "rank 1"))
    share, gib = rank_1["median"] / full["median"], [row["peak_bytes"] / 2**30 for row in (rank_1, full)]
    page = " ".join((ROOT / "docs" / "deviations.md").read_text().split())
    assert f"takes {share:.2f} of the time with rank-1 deviations" in page
    assert f"and {gib[0]:.2f} GiB in the place of {gib[1]:.1f}" in page


@pytest.mark.slow
def test_the_digits_example_learns(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples")
    curves = importlib.import_module("natural_digits").main(epochs=4, picture=str(tmp_path / "digits.png"))
    eki, full, low, localized = curves.values()
    assert min(full.accuracies[-1], low.accuracies[-1], localized.accuracies[-1]) > 0.85
    assert max(eki.accuracies) < localized.accuracies[0]
    assert localized.passes[-1] < 0.3 * low.passes[-1]
    assert (tmp_path / "digits.png").stat().st_size > 10_000


@pytest.mark.slow
def test_the_settings_example_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples")
    module = importlib.import_module("natural_settings")
    digits = importlib.import_module("natural_digits").load()
    for options in (module.SPAN["lambda adapts"] | {"particles": 100}, module.SPAN["rank 4"] | {"particles": 100}):
        last, average = module.accuracies(digits, 4, options)
        assert min(last, average) > 0.8
    page = (ROOT / "docs" / "natural_settings.md").read_text()
    assert all(f"particles, {name}" in page for name in [*module.SPAN, *module.LOCALIZED])


@pytest.mark.slow
def test_the_gradients_example_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradients example shows what localizing gives."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    module = importlib.import_module("natural_gradients")
    shapes = jax.eval_shape(lambda: module.Convolutional().init(jax.random.key(0), jnp.zeros((1, 64))))
    assert f"{sum(leaf.size for leaf in jax.tree.leaves(shapes)):,} parameters" in module.Convolutional.__doc__
    found = module.main()
    span, localized = found[400, False], found[400, True]
    assert localized["Dense_0"] > 0.85 > 0.4 > span["Dense_0"]
    assert localized["Conv_1"] > 0.5 > 0.4 > span["Conv_1"]
    page = (ROOT / "docs" / "deviations.md").read_text().splitlines()
    for (size, is_localized), row in found.items():
        name = f" {size} particles, {'localized' if is_localized else 'in the span'}"
        (line,) = (line for line in page if line.endswith(name) and line.startswith("    0."))
        assert [float(value) for value in line.split()[:3]] == pytest.approx(list(row.values()), abs=0.03)


def natural_mnist() -> ModuleType:
    spec = importlib.util.spec_from_file_location("natural_mnist", ROOT / "examples/natural_mnist.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pages_best_is_that_of_the_run() -> None:
    runs = store.read(RESULTS / "train.jsonl")["runs"]
    results = [runs[f"mnist-dnn2-natural-best-{seed}"] for seed in range(3)]
    ends = [result["history"][-1] for result in results]
    accuracies = " and ".join(", ".join(f"{end['test_accuracy']:.4f}" for end in ends).rsplit(", ", 1))
    page = " ".join((ROOT / "docs" / "natural_settings.md").read_text().split())
    assert f"ends at {accuracies} after {ends[0]['epoch']} epochs" in page
    for seed, result in enumerate(results):
        assert result["settings"] == natural_mnist().SETTINGS | {"seed": seed}


@pytest.mark.slow
def test_the_mnist_example_learns_the_digits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples")
    main = importlib.import_module("natural_mnist").main
    history = main(tmp_path / "result.json", problem="digits-dnn", particles=60, batch=100, epochs=4)
    assert history[-1]["test_accuracy"] > 0.9
    assert json.loads((tmp_path / "result.json").read_text())["history"] == history


def test_the_pages_table_is_that_of_the_runs() -> None:
    """The page's networks without derivatives are those of the runs."""
    page = (ROOT / "docs" / "forward_budget.md").read_text()
    for problem in ("mnist-sign", "mnist-int8"):
        found = store.read(RESULTS / "train.jsonl")["runs"]
        runs = [found[f"{problem}-{method}"] for method in ("natural-eki-lowrank", "ste", "sgd")]
        accuracies = " | ".join(f"{run['test_accuracy_mean']:.4f}" for run in runs)
        assert f"| `{problem}` | {accuracies} |" in page
        assert [run["forward_passes"] for run in runs[1:]] == [540_000, 540_000]
        assert (runs[0]["particles"], runs[0]["batch"]) == (200, 1000)


@pytest.mark.slow
def test_attention_is_credited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys' and all weights' cosines are larger with credit of what others ask, and there is a picture."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    main = importlib.import_module("per_sample_attention").main
    table = main(["--particles", "400", "--estimates", "4", "--out", str(tmp_path / "bars.png")])
    *others, own = table.values()
    for kind in ("keys", "all weights"):
        assert own[kind] > max(row[kind] for row in others)
    assert (tmp_path / "bars.png").stat().st_size > 5000


@pytest.mark.slow
def test_the_optimizers_are_those_of_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """The losses that each way to follow the slopes ends at."""
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(ROOT / "examples")
    found = importlib.import_module("per_sample_optimizers").main()
    page = (ROOT / "docs" / "natural_settings.md").read_text().splitlines()
    for name, losses in found.items():
        (line,) = (line for line in page if f"  {name} (" in line)
        assert [float(word) for word in line.split()[:2]] == pytest.approx(losses, abs=0.003)
