"""The whole ensemble: what averages of particles are worth, how well they know what they do not know, and attacks."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import eki_jax
from benchmarks import methods
from benchmarks.harness.figures import legend, panels, save
from benchmarks.harness.store import UNFINISHED, Cells
from benchmarks.paper import predictors
from benchmarks.paper.common import Found, finish, row, skipped
from benchmarks.paper.predictors import Predictor
from benchmarks.problems import registry
from benchmarks.problems.files import MissingFile
from benchmarks.problems.registry import Problem
from eki_jax.training import epoch

TITLE = "EKI's whole ensemble on DNN 2: accuracy, calibration, adversarial examples, beside a deep ensemble by SGD"


class Settings(NamedTuple):
    """A size of the experiment.

    Attributes:
        particles: J of the ensembles.
        batch: samples a step.
        epochs: passes over the training images.
        images: number of training images, or None for all but those held out.
        held_out: number of training images that choose particles and weights.
        members: number of networks of the deep ensemble.
        attacked: number of test images that are attacked, turned and spoiled.
        tests: number of test images, or None for all.
    """

    particles: int
    batch: int
    epochs: int
    images: int | None
    held_out: int = 5000
    members: int = 5
    attacked: int = 1000
    tests: int | None = None


PRESETS = {
    "smoke": Settings(8, 50, 2, 200, 50, 2, 50, 100),
    "cpu": Settings(1000, 600, 10, 20_000, attacked=300),
    "full": Settings(2000, 600, 30, None),
}
ENSEMBLES = {"eki": "EKI", "eki-r": "EKI(R)"}
BETAS = (0.0, 10.0, 30.0, 100.0, 300.0, 1000.0)  # of weights by held-out loss
STRENGTHS = (0.05, 0.1, 0.2)  # of attacks, in units of the range of a pixel
PGD_STEPS = 10
NOISES, DEGREES = (0.2, 0.4), (15.0, 30.0)
SHOWN = ("SGD", "deep ensemble", "EKI(R), mean particle", "EKI(R), average", "EKI, average")  # in the picture


class Cell(NamedTuple):
    """All predictors on a problem.

    Attributes:
        name: its name in the table.
        problem: as ``benchmarks.problems.registry.names()`` has it.
    """

    name: str
    problem: str


def cells(preset: str) -> list[Cell]:
    """The same problems in every preset."""
    return [Cell("MNIST", "mnist-dnn2"), Cell("Fashion-MNIST", "fashion-dnn2")]


def run(preset: str, out: Path, data: Path | None, seed: int, only: str = "") -> dict[str, Any]:
    """Writes ``ensemble.jsonl``."""
    settings = PRESETS[preset]
    command = f"python -m benchmarks paper ensemble --preset {preset} --seed {seed}"
    head = {"experiment": "ensemble", "preset": preset, "seed": seed, "command": command}
    store = Cells(out / "ensemble.jsonl", head, keep=True, part=bool(only))

    def measure(cell: Cell) -> dict[str, Any]:
        try:
            problem = registry.get(cell.problem, data)
        except MissingFile as error:
            return {"skipped": error.reason}
        return of_predictors(problem, settings, seed)

    for cell in cells(preset):
        if only in cell.name:
            store.get(cell.name, {"problem": cell.problem, **settings._asdict()}, functools.partial(measure, cell))
    details = {key: value for key, value in store.finish().items() if key in ("cells", UNFINISHED)}
    rows = [line for name, cell in details["cells"].items() for line in _rows(name, cell["found"], settings)]
    return finish("ensemble", preset, seed, out, Found({"rows": rows}, details))


def of_predictors(problem: Problem, settings: Settings, seed: int) -> dict[str, dict[str, Any]]:
    """By predictor its numbers: accuracy, loss, calibration; accuracy under attacks, noise and rotation."""
    x, labels = problem.train
    cut = len(x) - settings.held_out
    held_out = x[cut:], labels[cut:]
    count = cut if settings.images is None else min(settings.images, cut)
    train = x[:count], labels[:count]
    test = tuple(array[: settings.tests] for array in problem.test)
    few = tuple(array[: settings.attacked] for array in test)
    made = all_predictors(problem, settings, train, held_out, seed)
    limits = float(x.min()), float(x.max())
    spoiled = _spoiled(few[0], limits, seed)
    transferred = _attacks(problem, made["SGD"], few, limits)
    numbers = {}
    for name, predictor in made.items():
        p = predictors.predicted(problem.forward, predictor, test[0])
        reliability = predictors.reliability(p, test[1])
        hit = lambda x, predictor=predictor: predictors.accuracy(
            predictors.predicted(problem.forward, predictor, x), few[1]
        )
        own = _attacks(problem, predictor, few, limits)
        numbers[name] = {
            "accuracy": predictors.accuracy(p, test[1]),
            "nats": predictors.surprise(p, test[1]),
            "calibration_error": reliability["error"],
            "particles": float(1 / np.sum(np.square(predictor.weights))),
            "clean": hit(few[0]),
            "attacked": {key: hit(x) for key, x in own.items()},
            "transferred": {key: hit(x) for key, x in transferred.items()},
            "spoiled": {key: hit(x) for key, x in spoiled.items()},
            "reliability": reliability,
        }
    return numbers


def all_predictors(problem: Problem, settings: Settings, train: Any, held_out: Any, seed: int) -> dict[str, Predictor]:
    """Every way to predict: one network by SGD and several, and what can be made of each ensemble."""
    key = jax.random.key(seed)
    passes = settings.particles * settings.epochs
    epochs = max(1, passes // (3 * settings.members))
    sgd = methods.get("sgd", problem, 1, 0.1)
    networks = [
        sgd.estimate(_trained(sgd, train, settings, epochs, jax.random.fold_in(key, index)))
        for index in range(settings.members)
    ]
    made = {"SGD": predictors.alone(networks[0])}
    made["deep ensemble"] = predictors.average(jax.tree.map(lambda *leaves: np.stack(leaves), *networks))
    for name, label in ENSEMBLES.items():
        method = methods.get(name, problem, settings.particles)
        particles = _trained(method, train, settings, settings.epochs, jax.random.fold_in(key, 100)).position
        losses = predictors.losses(problem.forward, particles, *held_out)
        evidence = predictors.losses(problem.forward, particles, *train)
        best = predictors.weighted(particles, (np.arange(len(losses)) == np.argmin(losses)).astype(float))
        beta = predictors.best_beta(problem.forward, particles, losses, held_out, BETAS)
        made |= {
            f"{label}, mean particle": predictors.alone(eki_jax.mean_particle(particles)),
            f"{label}, best particle": best,
            f"{label}, average": predictors.average(particles),
            f"{label}, weights by evidence": predictors.weighted(
                particles, predictors.by_loss(evidence, float(len(train[0])))
            ),
            f"{label}, weights by held-out loss": predictors.weighted(particles, predictors.by_loss(losses, beta)),
        }
    return made


def _trained(method: Any, train: Any, settings: Settings, epochs: int, key: jax.Array) -> Any:
    """The state after the epochs; a method that redraws does so between them, not after the last."""
    x, labels = jax.device_put(train)
    one = jax.jit(epoch(method, settings.batch), donate_argnums=0)
    state = jax.jit(method.init)(jax.random.fold_in(key, 0))
    for index in range(epochs):
        training, redrawing = jax.random.split(jax.random.fold_in(key, index + 1))
        if index and method.redraw is not None:
            state = method.redraw(state, redrawing, settings.particles)
        state, _ = one(state, training, x, labels)
    return state


def _attacks(problem: Problem, predictor: Predictor, few: Any, limits: tuple[float, float]) -> dict[str, np.ndarray]:
    unit = limits[1] - limits[0]
    found = {}
    for kind, steps in (("FGSM", 1), ("PGD", PGD_STEPS)):
        for strength in STRENGTHS:
            moved = predictors.attacked(problem.forward, predictor, *few, strength * unit, limits, steps)
            found[f"{kind} {strength:g}"] = moved
    return found


def _spoiled(x: np.ndarray, limits: tuple[float, float], seed: int) -> dict[str, np.ndarray]:
    rng, unit = np.random.default_rng(seed), limits[1] - limits[0]
    noisy = {
        f"noise {size:g}": np.clip(x + size * unit * rng.normal(size=x.shape), *limits).astype(x.dtype)
        for size in NOISES
    }
    return noisy | {f"turned {angle:g}°": predictors.turned(x, angle, limits[0]) for angle in DEGREES}


def _rows(label: str, found: dict[str, Any], settings: Settings) -> list[dict[str, Any]]:
    if "skipped" in found:
        return [skipped(label, "test accuracy", None, found["skipped"])]
    passes = settings.particles * settings.epochs
    rows = []
    for name, numbers in found.items():
        ours = f"J = {settings.particles}, {settings.epochs} epochs, {numbers['particles']:.1f} particles count"
        theirs = f"{settings.members if 'deep' in name else 1} networks, {passes // (3 * settings.members)} epochs each"
        note = ours if name.startswith("EKI") else theirs
        shown = [
            ("test accuracy", numbers["accuracy"]),
            ("negative log-likelihood", numbers["nats"]),
            ("expected calibration error", numbers["calibration_error"]),
            ("accuracy, FGSM 0.1 on itself", numbers["attacked"]["FGSM 0.1"]),
            ("accuracy, PGD 0.1 on itself", numbers["attacked"]["PGD 0.1"]),
            ("accuracy, PGD 0.1 on SGD", numbers["transferred"]["PGD 0.1"]),
        ]
        rows += [row(f"{label}, {name}", quantity, None, value, note) for quantity, value in shown]
    return rows


def draw(result: dict[str, Any], path: Path) -> None:
    """Reliability, and accuracy against the attack's strength, a row a problem."""
    found = {name: cell["found"] for name, cell in result["cells"].items() if "skipped" not in cell["found"]}
    figure, axes = panels(len(found), 3, (13, 3.9 * len(found)))
    for (label, by), (left, middle, right) in zip(found.items(), axes, strict=True):
        left.plot([0, 1], [0, 1], color="0.6", linewidth=1, label="as sure as right")
        for index, name in enumerate(name for name in SHOWN if name in by):
            numbers, color = by[name], f"C{index}"
            of = numbers["reliability"]
            left.plot(of["confidence"], of["accuracy"], ".-", color=color, label=name)
            for axis, key in ((middle, "attacked"), (right, "transferred")):
                for kind, style in (("FGSM", "--"), ("PGD", "-")):
                    values = [numbers["clean"], *(numbers[key][f"{kind} {s:g}"] for s in STRENGTHS)]
                    axis.plot(
                        [0, *STRENGTHS],
                        values,
                        style,
                        marker=".",
                        color=color,
                        label=f"{name}" if kind == "PGD" else None,
                    )
        left.set(xlabel="confidence", ylabel="share that is right", title=f"{label}: reliability")
        middle.set(title="attacks on each predictor", ylabel="accuracy")
        right.set(title="attacks on SGD, shown to all", ylabel="accuracy")
        for axis in (middle, right):
            axis.set(xlabel="largest change of a pixel, as a share of its range", ylim=(0, 1))
        legend(left)
        legend(middle, "dashed: FGSM, full: PGD")
    save(figure, path)
