"""Every experiment of the paper in its smallest form, on random images of the true shapes where images are needed."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from benchmarks.harness import store
from benchmarks.paper import classification, cli, common, table
from benchmarks.problems import data, files, registry, tables

pytestmark = pytest.mark.benchmarks

IMAGES = {"mnist": (28, 28, 1), "fashion": (28, 28, 1), "cnn": (28, 28, 1), "cifar10": (32, 32, 3)}
QUICK = ("online-sunspots", "noise-ratio")
NUMBERS = {
    "voting": ("eki_final", "fiedler_final", "mcmc_final"),
    "online-temperatures": ("eki_final", "eki_first", "ogd_final", "ogd_first"),
    "online-sunspots": ("eki_final", "eki_first", "ogd_final", "ogd_first"),
}


@pytest.fixture
def random_data(monkeypatch):
    """Random data sets instead of the files, so that the tests need none; SVHN stays missing."""
    rng = np.random.default_rng(0)

    def images(shape):
        x, y = rng.integers(0, 256, (120, *shape)), np.arange(120) % 10
        return data.standardised(x, y, x[:40], y[:40])

    for name, (_, network) in list(registry.PROBLEMS.items()):
        shape = IMAGES.get(name.split("-")[0])
        if shape is not None:
            kept = shape[:2] if name.endswith("rnn") else shape
            load = lambda folder, shape=shape, kept=kept: _reshaped(images(shape), kept)
            monkeypatch.setitem(registry.PROBLEMS, name, (load, network))
    records, labels = rng.choice([-1.0, 0.0, 1.0], (60, 16)), np.repeat([-1, 1], 30)
    monkeypatch.setattr(tables, "votes", lambda folder: tables.Votes(records + 2 * labels[:, None], labels))
    wave = 10 + 3 * np.sin(np.arange(400) / 5)
    for name in ("temperatures", "sunspots"):
        monkeypatch.setattr(tables, name, lambda folder: tables.one_step_ahead(wave, 300))


def _reshaped(dataset, shape):
    return dataset._replace(train_x=dataset.train_x.reshape(-1, *shape), test_x=dataset.test_x.reshape(-1, *shape))


def run(name, out, capsys, *flags):
    assert cli.main([name, "--preset", "smoke", "--out", str(out), *flags]) == 0
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def check(name, out, summary):
    saved = store.read(out / f"{name}.jsonl")
    assert {"environment", "preset", "seed"} <= set(saved)
    assert summary["preset"] == "smoke"
    assert (out / f"{name}.png").stat().st_size > 5_000
    for key in NUMBERS.get(name, ()):
        assert math.isfinite(summary[key])
    lines = [line for line in saved.get("rows", []) if line["ours"] is not None]
    assert name == "linear" or lines
    assert all(math.isfinite(line["ours"]) for line in lines)
    assert saved.get("title", "")[:20] in (out / "paper.md").read_text()


@pytest.mark.parametrize("name", QUICK)
def test_smoke(name, tmp_path, capsys, random_data):
    check(name, tmp_path, run(name, tmp_path, capsys, "--data", str(tmp_path / "nothing")))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in cli.EXPERIMENTS if name not in QUICK])
def test_smoke_of_the_others(name, tmp_path, capsys, random_data):
    check(name, tmp_path, run(name, tmp_path, capsys, "--data", str(tmp_path / "nothing")))


@pytest.mark.parametrize("name", [name for name in cli.EXPERIMENTS if name not in ("linear", "long-memory")])
def test_missing_data_skips_the_experiment(name, tmp_path, capsys):
    """Missing data is named and the experiment skipped."""
    summary = run(name, tmp_path, capsys, "--data", str(tmp_path))
    assert "is missing; it is published at http" in json.dumps(summary["rows"])
    assert summary["skipped"]
    assert all(line["ours"] is None for line in summary["rows"])
    assert "not run: " in (tmp_path / "paper.md").read_text()


def test_list_names_every_experiment(capsys):
    assert cli.main(["list"]) == 0
    printed = capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines()] == list(cli.EXPERIMENTS)
    assert len(cli.EXPERIMENTS) == 14


def test_unknown_experiment_is_refused(capsys):
    with pytest.raises(SystemExit):
        cli.main(["everything"])
    assert "everything" in capsys.readouterr().err


def test_full_presets_have_the_paper_s_settings():
    from benchmarks.paper import cnn_mnist, cnn_svhn, dense, large_ensemble, rnn

    ours, papers = (
        [cell for cell in dense.cells("full") if (cell.method == "natural-eki-per-sample") == is_ours]
        for is_ours in (True, False)
    )
    assert (len(ours), len(papers)) == (4, 24)
    assert all((cell.particles, cell.batch) == (2000, 600) and not cell.reason for cell in papers)
    assert all((cell.forward_passes, cell.final) == (30 * 5 * 60_000, None) for cell in ours)
    assert {cell.particles for cell in large_ensemble.cells("full") if cell.is_ensemble} == {6000}
    assert [cell.rate for cell in cnn_mnist.cells("full")][:2] == [0.05, 0.01]
    svhn = next(cell for cell in cnn_svhn.cells("full") if cell.is_ensemble)
    assert [svhn.ensemble_size(epoch) for epoch in (0, 1, 24, 30)] == [200, 400, 5000, 5000]
    growing, *_ = [cell for cell in rnn.cells("full") if cell.is_ensemble]
    assert [growing.ensemble_size(epoch) for epoch in range(5)] == [1000, 2000, 3000, 4000, 4000]


@pytest.fixture
def trained(monkeypatch):
    """Training that ends at once, with an accuracy that depends on the seed; the list has what was asked for."""
    asked = []

    def train(method, train, test, **options):
        asked.append((options["epochs"], options["directory"], options["settings"]))
        mean = 0.5 + 0.1 * options["settings"]["seed"]
        line = {"test_accuracy_mean": mean, "test_accuracy_best": 0.6, "test_accuracy_ensemble": 0.7}
        history = [line | {"forward_passes": 1, "seconds": 2.0}] * options["epochs"]
        return type("Result", (), {"history": history, "interrupted": False})

    nothing = dict.fromkeys(registry.Problem._fields)
    problem = registry.Problem(**nothing | {"name": "p", "train": (np.zeros(1),) * 2, "test": (np.zeros(1),) * 2})
    monkeypatch.setattr(classification, "fit", train)
    monkeypatch.setattr(classification.registry, "get", lambda name, data: problem)
    monkeypatch.setattr(classification.methods, "get", lambda *arguments, **settings: None)
    return asked


def test_several_seeds_make_one_row(tmp_path, trained):
    cell = classification.Cell("p", "eki", "A", epochs=1, images=10, seeds=3)
    result = lambda seeds, only="": classification.run_table(
        "t", lambda preset: [cell._replace(seeds=seeds)], "full", tmp_path, None, 1, only
    )
    assert (result(1)["rows"][0]["ours"], result(1)["accuracies"]["A, EKI"]["seeds"]) == (0.6, 1)
    assert "of" not in result(3, only="B")["rows"][0]  # seeds that were not run are not shown
    assert [settings["seed"] for *_, settings in trained] == [1]
    line = result(3)["rows"][0]
    assert [settings["seed"] for *_, settings in trained] == [1, 2, 3]
    expected = {"ours": 0.7, "least": 0.6, "most": 0.8, "mean": 0.7, "deviation": 0.1}
    assert {name: line[name] for name in expected} == pytest.approx(expected)
    assert line["of"] == "3 seeds"
    numbers = result(3)["accuracies"]["A, EKI"]
    assert (numbers["seeds"], numbers["test_accuracy_mean"], numbers["seconds"]) == (3, pytest.approx(0.7), 6.0)
    saved = classification.shown_runs(store.read(tmp_path / "t.jsonl"))["A, EKI"]
    assert [run["settings"]["seed"] for run in saved] == [1, 2, 3]


def test_one_run_replaces_shorter_ones(tmp_path, trained):
    """One run at the paper's settings takes the place of several seeds of a smaller preset, and stays."""
    full = classification.Cell("p", "eki", "A", epochs=2, images=20, seeds=3)
    cells = lambda preset: [full._replace(epochs=1) if preset == "cpu" else full]
    run = lambda preset: classification.run_table("t", cells, preset, tmp_path, None, 0)
    assert run("cpu")["accuracies"]["A, EKI"]["seeds"] == 3
    kept = store.Runs(tmp_path / "t.jsonl")
    classification.run_cell(full, kept, None, 0)  # the first of three, after which the run was interrupted
    for _ in range(2):
        found = run("cpu")
        assert (found["accuracies"]["A, EKI"]["seeds"], found["rows"][0]["preset"]) == (1, "full")
    assert [(epochs, settings["seed"]) for epochs, _, settings in trained] == [(1, 0), (1, 1), (1, 2), (2, 0)]


def test_a_cell_says_its_precision(tmp_path, monkeypatch, trained, capsys):
    """Ensembles on all images run in the faster precision, and what ran in both shows float32's beside the other's."""
    faster = classification.precision.Choice("bf16", "units")
    monkeypatch.setattr(classification.precision, "choose", lambda *arguments: faster)
    monkeypatch.setattr(classification.shutil, "rmtree", lambda path: None)  # there are no checkpoints
    cells = [classification.Cell("p", method, "A", epochs=1) for method in ("eki", "meki", "sgd")]
    cells.append(classification.Cell("p", "eki", "B", epochs=1, images=10))
    run = lambda asked, only="": classification.run_table(
        "t", lambda preset: cells, "full", tmp_path, None, 0, only, asked
    )
    notes = lambda result: [line["note"] for line in result["rows"] if line["quantity"] == "test accuracy"]
    run("float32", "A, EKI")
    mixed = notes(run("auto"))
    assert [note.endswith("bf16") for note in mixed] == [False, True, False, False]
    assert capsys.readouterr().err.count("p: precision bf16 (units)") == 1
    assert [settings.get("precision") for *_, settings in trained] == [None, "bf16", None, None]
    cells[0] = cells[0]._replace(seeds=2)  # of which none more is run in float32
    both = notes(run("bf16", "A, EKI"))
    assert (both[0], both[1:]) == (f"{mixed[0]}; in bf16 0.5000", mixed[1:])
    assert [settings.get("precision") for *_, settings in trained[4:]] == ["bf16", "bf16"]
    monkeypatch.setattr(table, "module", lambda name: type("Module", (), {"cells": lambda preset: cells}))
    monkeypatch.setattr(table, "EXPERIMENTS", ("t",))
    result = store.read(tmp_path / "t.jsonl")
    assert set(table._differences(result).values()) == {"the paper's"}


def test_finished_cells_are_kept(tmp_path, monkeypatch, trained):
    """A table is run in parts and finished cells are kept."""
    cells = [classification.Cell("p", "sgd", label, epochs=n, images=60_000) for n, label in enumerate(("A", "B"), 1)]
    run_table = classification.run_table
    run = lambda cells, preset, only="": run_table("t", cells, preset, tmp_path, None, 0, only)["rows"]
    table_ = lambda only: run(lambda preset: cells, "cpu", only)
    first = table_("A")
    assert [line["preset"] for line in first] == ["full", "full"]  # as the paper's settings are the cpu preset's too
    assert [line["ours"] for line in first] == [0.5, None]
    assert first[1]["note"] == "not run: left out by --only; 3.6e+05 forward passes"
    assert [line["ours"] for line in table_("B")] == [0.5, 0.5]
    assert [epochs for epochs, *_ in trained] == [1, 2]

    # A run at the paper's settings takes the place of the smaller one, in the cpu preset alone.
    small = [cell._replace(images=10) for cell in cells]
    both = lambda preset: {"full": cells, "cpu": small, "smoke": small}[preset]
    path = tmp_path / "t.jsonl"
    assert [line["preset"] for line in run(both, "cpu")] == ["full", "full"]
    runs = {name: run for name, run in store.read(path)["runs"].items() if "-1-" in name}
    store.write(path, {"runs": runs})
    assert [line["preset"] for line in run(both, "cpu")] == ["full", "cpu"]
    assert len(store.read(path)["runs"]) == 2
    store.write(path, {"runs": store.read(path)["runs"]})
    assert [line["preset"] for line in run(both, "smoke")] == ["smoke", "smoke"]
    assert [epochs for epochs, *_ in trained] == [1, 2, 2, 1]
    text = table.write_table(tmp_path, tmp_path / "table.md").read_text()
    assert "| preset smoke | rate 0.1, 2 epochs" in text

    # Unfinished runs on all images go on for any number of epochs.
    for epochs in (2, 3):
        monkeypatch.setattr(classification, "RUNS", tmp_path / "runs")
        (tmp_path / "runs" / "p-sgd-600-0-0.1").mkdir(parents=True)
        cell = classification.Cell("p", "sgd", "A", epochs=epochs)
        record = classification.run_cell(cell, store.Runs(tmp_path / "all.jsonl"), None, 0)
        assert (len(record["history"]), record["seconds"]) == (epochs, 2.0 * epochs)
    (_, folder, settings), (_, other, same) = trained[-2:]
    assert (folder, settings) == (other, same)
    assert "epochs" not in settings


def test_the_same_training_run_is_taken(tmp_path, monkeypatch):
    """A run of the training command is taken if it is the same."""
    monkeypatch.setattr(classification, "RESULTS", tmp_path)
    cell = classification.Cell("p", "eki", "A", epochs=2, particles=7)
    history = [{"test_accuracy_mean": 0.5}]
    result = {"particles": 7, "batch": 600, "epochs": 2, "seed": 3, "learning_rate": 0.1, "history": history}
    store.write(tmp_path / "train.jsonl", {"runs": {"p-eki": result | {"seconds": 1.0}}})
    assert classification._trained(cell, 3)["history"] == history
    for other in (cell._replace(epochs=3), cell._replace(images=10), cell._replace(particles=8)):
        assert classification._trained(other, 3) is None
    assert classification._trained(cell, 4) is None


def test_rows_show_median_range_and_difference(tmp_path):
    line = common.row("EKI", "accuracy", 0.89, [0.8, 0.9, 0.91], "a note", of="draws")
    assert (line["ours"], line["least"], line["most"], line["of"]) == (0.9, 0.8, 0.91, "3 draws")
    numbers = {"rows": [line, common.skipped("SGD", "accuracy", 0.5, "no data"), common.row("x", "y", None, 1e-3)]}
    common.finish("votes", "cpu", 3, tmp_path, common.Found(numbers, {"curve": [1]}))
    text = table.write_table(tmp_path, tmp_path / "table.md").read_text()
    ours = "0.9000 [0.8000, 0.9100], mean 0.8700 ± 0.0608, 3 draws"
    assert f"| EKI | accuracy | 0.8900 | {ours} | +1.000e-02 | preset cpu | a note |" in text
    assert "| SGD | accuracy | 0.5000 | n/a |  | – | not run: no data |" in text
    assert "| x | y | n/a | 1.000e-03 |  | preset cpu |  |" in text
    assert "**0 of 2 cells beside which the paper has a number are at its own settings.**" in text
    assert "`python -m benchmarks paper votes --preset cpu --seed 3`" in text


def test_rows_say_how_far_they_are(tmp_path, monkeypatch, trained):
    """From the paper's settings, by what their runs had; the first line counts those at them."""
    from benchmarks.paper import dense

    full = [
        classification.Cell("p", "eki", "A", 3, final=0.9),
        classification.Cell("p", "sgd", "A", 2, images=60_000, final=0.9),
    ]
    small = [full[0]._replace(epochs=1, particles=20, images=10), full[1]]
    cells = lambda preset: small if preset == "cpu" else full
    monkeypatch.setattr(dense, "cells", cells)
    classification.run_table("dense", cells, "cpu", tmp_path, None, 0)
    text = table.write_table(tmp_path, tmp_path / "table.md").read_text()
    assert "| epochs 1 of 3, images 10 of all, particles 20 of 2000 | J = 20, 1 epoch, batch 600" in text
    assert "| the paper's | rate 0.1, 2 epochs, batch 600" in text
    assert "**1 of 2 cells" in text


def test_pcn_samples_a_known_posterior():
    """pCN samples the posterior of a known problem."""
    import jax
    import jax.numpy as jnp

    from benchmarks.paper.pcn import pcn

    # Prior N(0, 1), one datum 1.5 with variance 0.5: the posterior is N(1, 1/3).
    misfit = lambda z: (z[0] - 1.5) ** 2
    moments = lambda z: jnp.array([z[0], z[0] ** 2])
    chains = jax.vmap(lambda key: pcn(key, 1, misfit, moments, samples=4000, burn_in=400, thin=2))
    chain = chains(jax.random.split(jax.random.key(0), 8))
    first, second = chain.mean.mean(0)
    assert float(first) == pytest.approx(1.0, abs=0.05)
    assert float(second - first**2) == pytest.approx(1 / 3, abs=0.05)
    assert 0.3 < float(chain.acceptance.mean()) < 0.95


@pytest.mark.skipif(files.data_folder(None) is None, reason="EKI_JAX_DATA names no folder with the voting records")
def test_fiedler_vector_is_as_accurate(tmp_path, capsys):
    """The Fiedler vector has the paper's accuracy."""
    summary = run("voting", tmp_path, capsys)
    assert round(summary["fiedler_final"], 4) == 0.8828


@pytest.mark.slow
def test_a_long_run_goes_on_from_its_checkpoint(tmp_path, monkeypatch):
    import jax

    monkeypatch.setattr(classification, "RUNS", tmp_path / "runs")
    cell = classification.Cell("digits-dnn", "eki-r", "digits", epochs=2, batch=300, particles=4)
    endless = {name: value for name, value in cell.settings(0).items() if name != "epochs"}
    folder = tmp_path / "runs" / classification._name(endless)
    problem = registry.get("digits-dnn")
    first = classification.fit(
        classification.methods.get("eki-r", problem, 4, 0.1),
        problem.train,
        problem.test,
        batch_size=300,
        epochs=1,
        key=jax.random.key(0),
        directory=folder,
        settings=endless,
        progress=False,
    )
    record = classification.run_cell(cell, store.Runs(tmp_path / "t.jsonl"), None, 0)
    assert record["history"][0] == first.history[0]
    assert len(record["history"]) == 2
    (kept,) = store.read(tmp_path / "t.jsonl")["runs"].values()
    assert kept["history"] == record["history"]
    assert not folder.exists()
