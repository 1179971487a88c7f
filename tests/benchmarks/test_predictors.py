"""The whole ensemble: weighted averages, calibration, attacks, and that the experiment says what it found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.harness import store
from benchmarks.paper import cli, ensemble, predictors

pytestmark = pytest.mark.benchmarks


def forward(params: Any, x: Any) -> Any:
    return jax.nn.softmax(x @ params)


PARTICLES = jax.random.normal(jax.random.key(0), (4, 6, 3))
X = np.asarray(jax.random.normal(jax.random.key(1), (20, 6)))
LABELS = np.arange(20) % 3


def test_an_average_is_of_probabilities() -> None:
    """Weights count probabilities, not logits; particles without weight are left out."""
    weights = np.array([0.5, 0.0, 0.25, 0.25])
    each = np.stack([forward(one, X) for one in PARTICLES])
    wanted = np.tensordot(weights, each, axes=1)
    found = predictors.weighted(PARTICLES, weights)
    assert len(found.weights) == 3
    np.testing.assert_allclose(predictors.predicted(forward, found, X), wanted, rtol=1e-5)
    np.testing.assert_allclose(
        predictors.predicted(forward, predictors.average(PARTICLES), X), each.mean(axis=0), rtol=1e-5
    )


def test_chunks_of_samples_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Predictions and losses of many samples are those of their parts."""
    whole = predictors.predicted(forward, predictors.average(PARTICLES), X)
    losses = predictors.losses(forward, PARTICLES, X, LABELS)
    monkeypatch.setattr(predictors, "CHUNK", 7)
    np.testing.assert_allclose(predictors.predicted(forward, predictors.average(PARTICLES), X), whole, rtol=1e-6)
    np.testing.assert_allclose(predictors.losses(forward, PARTICLES, X, LABELS), losses, rtol=1e-5)
    by_hand = [-np.mean(np.log(np.asarray(forward(one, X))[np.arange(20), LABELS])) for one in PARTICLES]
    np.testing.assert_allclose(losses, by_hand, rtol=1e-5)


def test_weights_are_chosen_by_held_out_loss() -> None:
    """Where one particle is right and the others are not, the sharpest weights are best; where all are alike, none."""
    right = 5 * jnp.asarray(np.eye(6, 3, dtype=np.float32))
    x = np.eye(3, 6, dtype=np.float32)
    held_out = x, np.arange(3)
    some = jnp.stack([right, -right, -right])
    losses = predictors.losses(forward, some, *held_out)
    assert predictors.best_beta(forward, some, losses, held_out, (0.0, 1.0, 100.0)) == 100.0


def test_a_calibrated_predictor_has_no_error() -> None:
    """Right as often as it is sure has no error; always sure and half as often right has a half."""
    p = np.tile([0.75, 0.25], (400, 1))
    labels = (np.arange(400) % 4 == 0).astype(int)
    assert predictors.reliability(p, labels)["error"] == pytest.approx(0, abs=1e-12)
    sure = np.tile([1.0, 0.0], (400, 1))
    assert predictors.reliability(sure, np.arange(400) % 2)["error"] == pytest.approx(0.5)


def test_attacks_stay_in_their_ball_and_hurt() -> None:
    """No number moves further than the strength or out of the range; the loss grows, with more steps no less."""
    one = predictors.average(PARTICLES)
    limits, strength = (float(X.min()), float(X.max())), 0.3
    before = predictors.surprise(predictors.predicted(forward, one, X), LABELS)
    lost = []
    for steps in (1, 10):
        moved = predictors.attacked(forward, one, X, LABELS, strength, limits, steps)
        assert np.abs(moved - X).max() <= strength + 1e-6
        assert limits[0] - 1e-6 <= moved.min()
        assert moved.max() <= limits[1] + 1e-6
        lost.append(predictors.surprise(predictors.predicted(forward, one, moved), LABELS))
    assert before < lost[0] <= lost[1] + 1e-3
    slope = jax.grad(lambda x: -jnp.mean(jnp.log(forward(PARTICLES[0], x)[np.arange(20), LABELS])))
    fast = predictors.attacked(forward, predictors.alone(PARTICLES[0]), X, LABELS, 1e-2, (-99.0, 99.0))
    np.testing.assert_allclose(fast, X + 1e-2 * np.sign(slope(X)), atol=1e-6)


# What Foolbox finds for the same logits, bounds and strengths, with the steps of the experiment.
_FOOLBOX = """
import json, sys
import foolbox, jax.numpy as jnp, numpy as np
case = np.load(sys.argv[1])
low, high, strength = case["sizes"].tolist()
model = foolbox.JAXModel(lambda x: x @ case["w"], bounds=(low, high))
attacks = {1: foolbox.attacks.FGSM(), 10: foolbox.attacks.LinfPGD(rel_stepsize=0.25, steps=10, random_start=False)}
run = lambda attack: attack(model, jnp.asarray(case["x"]), jnp.asarray(case["labels"]), epsilons=[strength])[1][0]
print(json.dumps({steps: np.asarray(run(attack)).tolist() for steps, attack in attacks.items()}))
"""


@pytest.mark.slow
@pytest.mark.peers
def test_attacks_are_those_of_foolbox(tmp_path: Path) -> None:
    """The last library of attacks that works with JAX, whose last release is of 2024, moves the samples as we do."""
    from benchmarks.harness.peers import ask, default_folder, python_of

    limits, strength = (float(X.min()), float(X.max())), 0.3
    case = {"w": PARTICLES[0], "x": X, "labels": LABELS, "sizes": [*limits, strength]}
    np.savez(tmp_path / "case.npz", **case)
    found = ask([str(python_of("foolbox", default_folder())), "-c", _FOOLBOX, str(tmp_path / "case.npz")], tmp_path)
    for steps in (1, 10):
        ours = predictors.attacked(forward, predictors.alone(PARTICLES[0]), X, LABELS, strength, limits, steps)
        np.testing.assert_allclose(ours, found[str(steps)], atol=1e-5)


def test_images_are_turned_about_their_middle() -> None:
    """A quarter of a turn, of flat images and of images with channels."""
    image = np.arange(9.0).reshape(1, 3, 3)
    np.testing.assert_allclose(predictors.turned(image, 90, 0.0)[0], np.rot90(image[0], 1), atol=1e-9)
    np.testing.assert_allclose(
        predictors.turned(image.reshape(1, 9), 90, 0.0), np.rot90(image[0], 1).reshape(1, 9), atol=1e-9
    )


@pytest.mark.slow
def test_the_experiment_says_what_it_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the digits: every predictor has its numbers, rows and a picture, and SGD's attack is its own."""
    monkeypatch.setattr(ensemble, "PROBLEMS", {"digits-dnn": "digits"})
    found = cli.run("ensemble", "smoke", tmp_path, None, 0)["ensemble"]["digits"]
    assert len(found) == 2 + 5 * 2
    assert found["SGD"]["attacked"] == found["SGD"]["transferred"]
    assert found["EKI, average"]["particles"] == pytest.approx(8)
    assert found["SGD"]["accuracy"] > 0.5
    assert found["SGD"]["attacked"]["PGD 0.2"] < found["SGD"]["clean"]
    rows = store.read(tmp_path / "ensemble.jsonl")["rows"]
    assert len(rows) == 6 * len(found)
    assert (tmp_path / "ensemble.png").stat().st_size > 10_000
