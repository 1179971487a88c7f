"""The training loop and its checkpoints, on a problem small enough for seconds."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eki_jax
from eki_jax.checkpoints import Checkpoints
from eki_jax.metrics import classification_accuracy
from eki_jax.training import Method, check_labels, ensemble_method, epoch, fit

RNG = np.random.default_rng(0)
X = RNG.normal(size=(90, 4)).astype(np.float32)
LABELS = (X @ RNG.normal(size=(4, 3))).argmax(axis=1).astype(np.int32)
TRAIN, TEST = (X[:70], LABELS[:70]), (X[70:], LABELS[70:])
KEY = jax.random.key(1)
PRIOR = eki_jax.xavier({"kernel": jnp.zeros((4, 3)), "bias": jnp.zeros(3)})


def forward(params: Any, x: Any) -> Any:
    return jax.nn.softmax(x @ params["kernel"] + params["bias"])


def method(kind: str = "eki-r", J: Any = 24) -> Method:
    # In 15 dimensions one direction has most of ||D||: with h0 = 2, accelerated steps would be unstable.
    make, h0 = (eki_jax.nesterov, 0.5) if kind.startswith("meki") else (eki_jax.euler, 2.0)
    solver = make(forward, eki_jax.cross_entropy(), eki_jax.frobenius_step_size(h0))
    return ensemble_method(solver, forward, PRIOR, J, resample=kind == "eki-r", step_noise=kind == "meki-r")


def train(kind: str = "eki-r", **options: Any) -> Any:
    settings = {"batch_size": 16, "epochs": 4, "key": KEY, "progress": False, **options}
    return fit(method(kind, settings.pop("J", 24)), TRAIN, TEST, **settings)


def same(a: Any, b: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_every_sample_is_seen_at_most_once() -> None:
    """Every sample is seen at most once in an epoch."""
    counting = Method(
        init=lambda key: jnp.zeros(70),
        step=lambda state, key, batch: (state.at[batch[0][:, 0].astype(int)].add(1), {}),
        accuracy=lambda state, x, labels: None,
    )
    x = jnp.arange(70.0)[:, None]
    run = jax.jit(epoch(counting, batch_size=16))
    first, _ = run(jnp.zeros(70), jax.random.key(0), x, jnp.arange(70))
    second, _ = run(jnp.zeros(70), jax.random.key(1), x, jnp.arange(70))
    assert sorted(np.asarray(first)) == [0] * 6 + [1] * 64
    assert np.any(np.asarray(first) != np.asarray(second))


@pytest.mark.parametrize("kind", ["eki", "meki", "eki-r", "meki-r"])
def test_every_method_learns(kind: str) -> None:
    result = train(kind, epochs=8)
    assert result.history[-1]["test_accuracy_mean"] >= 0.8
    assert result.history[-1]["train_loss"] < result.history[0]["train_loss"]
    assert [row["epoch"] for row in result.history] == list(range(1, 9))
    assert result.history[-1]["forward_passes"] == 8 * 4 * 16 * 24
    assert not result.interrupted


def test_steps_one_by_one_are_the_loops() -> None:
    """Steps one by one are those of the compiled loop."""
    runs = [
        fit(
            method("meki-r")._replace(compiled_loop=loop), TRAIN, TEST, batch_size=16, epochs=2, key=KEY, progress=False
        )
        for loop in (True, False)
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *(run.state for run in runs))
    one, other = ([{**row, "seconds": 0} for row in run.history] for run in runs)
    assert other == [pytest.approx(row, rel=1e-4) for row in one]


def test_epochs_of_eki_r_are_euler_steps() -> None:
    """Epochs of EKI(R) are Euler steps around a redrawn mean. Two epochs by hand, from the public pieces."""
    solver = eki_jax.euler(forward, eki_jax.cross_entropy())
    run = jax.jit(epoch(method("eki"), 16))
    state = solver.init(eki_jax.sample_ensemble(jax.random.fold_in(KEY, 0), PRIOR, 24))
    for index in range(2):
        epoch_key = jax.random.fold_in(KEY, index + 1)
        if index:
            redrawn = eki_jax.resample_around_mean(jax.random.fold_in(epoch_key, 2), state.ensemble, PRIOR)
            state = state._replace(ensemble=redrawn)
        state, _ = run(state, epoch_key, *TRAIN)
    found = train(epochs=2).state
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found.ensemble, state.ensemble)
    assert int(found.count) == 8


def test_step_noise_has_the_papers_covariance() -> None:
    """MEKI(R) adds N(0, sqrt(h) C_0) to the momenta: the difference of a step with and without it."""
    batch = (TRAIN[0][:16], TRAIN[1][:16])
    plain, noisy = method("meki", 3000), method("meki-r", 3000)
    state = plain.init(KEY)
    quiet, metrics = jax.jit(plain.step)(state, KEY, batch)
    loud, _ = jax.jit(noisy.step)(state, KEY, batch)
    h = float(metrics["step_size"]) / 3000
    noise = np.asarray(loud.ensemble["kernel"]) - np.asarray(quiet.ensemble["kernel"])
    np.testing.assert_allclose(noise.var(), np.sqrt(h) * 2 / 7, rtol=0.05)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), loud.position, quiet.position)


@pytest.mark.parametrize("kind", [pytest.param("eki-r", marks=pytest.mark.slow), "meki-r"])
def test_a_resumed_run_continues_bit_for_bit(kind: str, tmp_path: Path) -> None:
    straight = train(kind)
    train(kind, epochs=2, directory=tmp_path)
    resumed = train(kind, directory=tmp_path, resume=True)
    same(resumed.state, straight.state)
    for one, other in zip(resumed.history, straight.history, strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}


@pytest.mark.slow
def test_a_growing_ensemble_resumes(tmp_path: Path) -> None:
    """A growing ensemble resumes with the size it had."""
    sizes = lambda index: (10, 20, 20, 30)[index]
    straight = train(J=sizes)
    assert [row["particles"] for row in straight.history] == [10, 20, 20, 30]
    assert straight.history[-1]["forward_passes"] == 64 * (10 + 20 + 20 + 30)
    train(J=sizes, epochs=3, directory=tmp_path)
    same(train(J=sizes, directory=tmp_path, resume=True).state, straight.state)


def test_a_run_leaves_metrics_and_a_picture(tmp_path: Path) -> None:
    result = train(directory=tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == result.history
    assert (tmp_path / "accuracy.png").read_bytes()[:4] == b"\x89PNG"


def test_interrupting_saves_first(tmp_path: Path) -> None:
    plain = method()
    calls = 0

    def accuracy(state: Any, x: Any, labels: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1:  # while tracing, in the middle of the first epoch
            os.kill(os.getpid(), signal.SIGINT)
        return plain.accuracy(state, x, labels)

    result = fit(
        plain._replace(accuracy=accuracy),
        TRAIN,
        TEST,
        batch_size=16,
        epochs=4,
        key=KEY,
        directory=tmp_path,
        checkpoint_every=0,
        progress=False,
    )
    assert result.interrupted
    assert len(result.history) == 1
    same(train(directory=tmp_path, resume=True).state, train().state)


def test_metrics_of_a_classifier() -> None:
    ensemble = eki_jax.sample_ensemble(KEY, PRIOR, 6)
    found = jax.jit(lambda e: classification_accuracy(forward, e, X, LABELS))(ensemble)
    outputs = np.stack([forward(jax.tree.map(lambda leaf, j=j: leaf[j], ensemble), X) for j in range(6)])
    particles = (outputs.argmax(axis=-1) == LABELS).mean(axis=-1)
    np.testing.assert_allclose(found.particles, particles, rtol=1e-6)
    assert float(found.best) == pytest.approx(particles.max())
    assert float(found.ensemble) == pytest.approx((outputs.mean(axis=0).argmax(axis=-1) == LABELS).mean())
    mean = forward(eki_jax.mean_particle(ensemble), X)
    assert float(found.mean) == pytest.approx((np.asarray(mean).argmax(axis=-1) == LABELS).mean())


def test_metrics_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    ensemble = eki_jax.sample_ensemble(KEY, PRIOR, 6)
    whole = classification_accuracy(forward, ensemble, X, LABELS)
    monkeypatch.setattr("eki_jax.training.metrics._OUTPUT_BYTES", 6 * 3 * 4 * 40)  # pieces of 40, 40 and 10
    same(classification_accuracy(forward, ensemble, X, LABELS), whole)


@pytest.mark.parametrize(
    ("error", "words", "options"),
    [
        (ValueError, "epochs: 0", {"epochs": 0}),
        (ValueError, "batch_size: 71 for 70 samples", {"batch_size": 71}),
        (ValueError, "resample: False", {"kind": "eki", "J": lambda index: 10}),
        (ValueError, "directory: None with resume", {"resume": True}),
    ],
)
def test_bad_options_are_named(error: type[Exception], words: str, options: dict[str, Any]) -> None:
    with pytest.raises(error, match=words):
        train(**options)


def test_bad_data_is_named() -> None:
    options = {"batch_size": 1, "epochs": 1, "key": KEY, "progress": False}
    with pytest.raises(ValueError, match="train: an empty data set"):
        fit(method(), (X[:0], LABELS[:0]), TEST, **options)
    with pytest.raises(ValueError, match="test: an empty data set"):
        fit(method(), TRAIN, (X[:0], LABELS[:0]), **options)
    with pytest.raises(ValueError, match="train: 70 inputs but targets of shape"):
        fit(method(), (X[:70], LABELS[:60]), TEST, **options)
    with pytest.raises(ValueError, match="train: labels from 0 to 3; wanted 0 to 2"):
        check_labels(forward, PRIOR.mean, X[:4], np.array([0, 1, 2, 3]))


def test_folders_are_not_mixed_up(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoints there"):
        train(directory=tmp_path / "nothing", resume=True)
    train(epochs=1, directory=tmp_path, settings={"problem": "one"})
    with pytest.raises(ValueError, match="holds a run already"):
        train(directory=tmp_path)
    with pytest.raises(ValueError, match=r"another run.*problem: 'one', now 'two'"):
        train(directory=tmp_path, resume=True, settings={"problem": "two"})
    with pytest.raises(ValueError, match=r"not of this problem.*float32\[24, 3\]; wanted float32\[30, 3\]"):
        train(directory=tmp_path, resume=True, settings={"problem": "one"}, J=30)


def test_checkpoints_without_a_checkpoint(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, {})
    with pytest.raises(FileNotFoundError, match="no checkpoint there"):
        checkpoints.restore(lambda notes: jnp.zeros(2))
    checkpoints.close()
