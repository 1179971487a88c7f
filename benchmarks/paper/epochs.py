"""Training dense networks epoch by epoch with a look at the ensemble in between, for figures of what particles do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks import methods
from benchmarks.paper.common import skipped
from benchmarks.problems import registry
from benchmarks.problems.files import MissingFile
from benchmarks.problems.registry import Problem
from eki_jax.training import Method, epoch

Look = Callable[[Any, jax.Array], Any]


class Size(NamedTuple):
    """A run: number of particles, samples a step, passes over the images, and number of images, or None for all."""

    particles: int
    batch: int
    epochs: int
    images: int | None = None

    @property
    def note(self) -> str:
        """What the table says of it."""
        images = "" if self.images is None else f", {self.images} images"
        return f"J = {self.particles}, {self.epochs} epochs, batch {self.batch}{images}"


_OWN = Size(2000, 600, 20)  # the paper's


def sizes(epochs: int) -> dict[str, dict[str, Size]]:
    """Sizes by preset and network's label; ``cpu`` has DNN 2 smaller, with so many epochs."""
    return {
        "smoke": {"DNN 1": Size(8, 50, 2, 100)},
        "cpu": {"DNN 1": _OWN, "DNN 2": Size(300, 600, epochs, 20_000)},
        "full": {"DNN 1": _OWN, "DNN 2": _OWN},
    }


def with_presets(rows: list[dict[str, Any]], sizes: dict[str, dict[str, Size]], preset: str) -> list[dict[str, Any]]:
    """The table's rows, where those of a network at the paper's settings say that these are."""
    own = {label for label, size in sizes[preset].items() if size == sizes["full"].get(label)}
    return [line | {"preset": "full" if line["name"] in own else preset} for line in rows]


def observed(
    name: str, sizes: dict[str, Size], look: Callable[[Method, Problem, Size], Look], data: Path | None, seed: int
) -> tuple[dict[str, list[Any]], list[dict[str, Any]]]:
    """Train networks on MNIST, and look after every epoch, before a method that redraws does so.

    Args:
        name: The method.
        sizes: Sizes by the networks' labels.
        look: Function of a run that returns a function of a state and a key; what that says is a pytree of arrays.
        data: Folder of the images.
        seed: Of everything random.

    Returns:
        By the networks' labels what was seen, a pytree of NumPy arrays an epoch; and rows for those that did not run.
    """
    seen: dict[str, list[Any]] = {}
    missing = []
    for label, size in sizes.items():
        try:
            problem = registry.get("mnist-" + label.lower().replace(" ", ""), data)
        except MissingFile as error:
            missing.append(skipped(label, "accuracy", None, error.reason))
            continue
        problem = problem._replace(train=tuple(array[: size.images] for array in problem.train))
        seen[label] = _epochs(methods.get(name, problem, size.particles), problem, size, look, jax.random.key(seed))
    return seen, missing


def _epochs(method: Method, problem: Problem, size: Size, look: Any, key: jax.Array) -> list[Any]:
    x, labels = jax.device_put(problem.train)
    run, see = jax.jit(epoch(method, size.batch), donate_argnums=0), jax.jit(look(method, problem, size))
    state, seen = jax.jit(method.init)(jax.random.fold_in(key, 0)), []
    for index in range(size.epochs):
        epoch_key, look_key, redraw_key = jax.random.split(jax.random.fold_in(key, index + 1), 3)
        state, _ = run(state, epoch_key, x, labels)
        seen.append(jax.tree.map(np.asarray, see(state, look_key)))
        if method.redraw is not None:
            state = method.redraw(state, redraw_key, method.ensemble_size(index))
    return seen
