"""Figures of what the particles of an ensemble do from epoch to epoch."""

import numpy as np
import pytest

from benchmarks.harness import store
from benchmarks.harness.command import Refused
from benchmarks.paper import epochs, noise_ratio, particles, table
from benchmarks.paper.epochs import Size
from benchmarks.problems import data, registry
from benchmarks.problems.files import MissingFile
from eki_jax.training import Checkpoints

pytestmark = pytest.mark.benchmarks

OWN, SMALL = Size(6, 50, 3), Size(4, 50, 2, 100)


@pytest.fixture(autouse=True)
def random_images(monkeypatch, tmp_path):
    """Random images in the place of the files, and a folder for what unfinished runs leave."""
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (120, 28, 28, 1)), np.arange(120) % 10
    for name in ("mnist-dnn1", "mnist-dnn2"):
        _, network = registry.PROBLEMS[name]
        monkeypatch.setitem(registry.PROBLEMS, name, (lambda folder: data.standardised(x, y, x[:40], y[:40]), network))
    monkeypatch.setattr(epochs, "RUNS", tmp_path / "unfinished")


def figure(of):
    small = {"DNN 1": OWN, "DNN 2": SMALL}
    return of.FIGURE._replace(sizes={"cpu": small, "full": {"DNN 1": OWN, "DNN 2": OWN}})


def run(of, out, preset="cpu", asked="float32", name="particles", seed=0):
    epochs.run(name, figure(of), preset, out, None, seed, asked)
    return store.read(out / f"{name}.jsonl")


class Stopping(Checkpoints):
    """Checkpoints of a run that is stopped after the second."""

    def save(self, number, state, notes=None):
        super().save(number, state, notes)
        if number == 2:
            raise KeyboardInterrupt


@pytest.mark.parametrize(("of", "name"), [(particles, "particles"), (noise_ratio, "noise-ratio")])
def test_every_network_s_run_is_kept(of, name, tmp_path, monkeypatch):
    """A second command trains nothing, and says the same."""
    first = run(of, tmp_path, name=name)
    monkeypatch.setattr(epochs, "_epochs", lambda *arguments: pytest.fail("trained again"))
    second = run(of, tmp_path, name=name)
    assert first["rows"] == second["rows"]
    assert [line["preset"] for line in first["rows"]] == [
        "full" if line["name"] == "DNN 1" else "cpu" for line in first["rows"]
    ]
    of.draw(second, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 5_000


def test_the_paper_s_settings_come_first(tmp_path):
    """Where a run at the paper's settings is kept, the smaller preset shows it."""
    small = run(particles, tmp_path)
    run(particles, tmp_path, "full")
    found = run(particles, tmp_path)
    assert {line["preset"] for line in found["rows"]} == {"full"}
    assert found["rows"] != small["rows"]
    assert set(small["runs"]) < set(found["runs"])
    assert "| preset cpu |" in table.section(small | {"experiment": "particles"})
    assert "| preset cpu |" not in table.section(found | {"experiment": "particles"})


def test_a_figure_in_bfloat16_says_so(tmp_path):
    """In its note; and of runs in both precisions float32's is shown."""
    rounded = run(particles, tmp_path, asked="bf16")
    assert all(line["note"].endswith(", bf16") for line in rounded["rows"][::2])
    assert run(particles, tmp_path, "full", asked="auto")["shown"]["DNN 1"] == rounded["shown"]["DNN 1"]
    exact = run(particles, tmp_path)
    assert not any("bf16" in line["note"] for line in exact["rows"])
    assert run(particles, tmp_path, asked="auto")["shown"] == exact["shown"]


def test_another_seed_is_another_run(tmp_path):
    first, second = run(particles, tmp_path), run(particles, tmp_path, seed=1)
    assert first["rows"] != second["rows"]
    assert len(second["runs"]) == 4


def test_a_figure_goes_on_from_its_checkpoint(tmp_path, capsys, monkeypatch):
    """What was stopped after an epoch ends as what was not."""
    whole = run(noise_ratio, tmp_path, name="noise-ratio")
    (tmp_path / "noise-ratio.jsonl").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(epochs, "Checkpoints", Stopping)
        with pytest.raises(KeyboardInterrupt):
            run(noise_ratio, tmp_path, name="noise-ratio")
    again = run(noise_ratio, tmp_path, name="noise-ratio")
    assert "DNN 1: going on after epoch 2" in capsys.readouterr().err
    assert again["rows"] == whole["rows"]
    assert list((tmp_path / "unfinished").iterdir()) == []


def test_a_cut_figure_is_made_again(tmp_path):
    """A record without all its epochs is not taken for a run."""
    whole = run(noise_ratio, tmp_path, name="noise-ratio")
    found = store.read(tmp_path / "noise-ratio.jsonl")
    (name,) = found["shown"]["DNN 1"]
    found["runs"][name]["seen"]["upper"].pop()
    store.write(tmp_path / "noise-ratio.jsonl", found)
    assert run(noise_ratio, tmp_path, name="noise-ratio")["rows"] == whole["rows"]


def test_a_figure_does_not_lose_its_numbers(tmp_path, monkeypatch):
    """Where the images are missing, what is there stays."""
    run(particles, tmp_path)

    def missing(name, folder):
        raise MissingFile("the images are missing", "")

    monkeypatch.setattr(epochs.registry, "get", missing)
    with pytest.raises(Refused, match="left as it is"):
        run(particles, tmp_path, seed=1)
