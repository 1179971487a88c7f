"""What the benchmarks solve: data, model and loss under one name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn

from benchmarks.problems import data as datasets
from eki_jax import flax as models
from eki_jax.losses import cross_entropy


class Problem(NamedTuple):
    """A classification problem.

    Attributes:
        name: As in ``names()``.
        forward: ``forward(params, x)`` to class probabilities ``(batch, classes)``, for one particle.
        logits: The same before the softmax (for gradient methods).
        template: Shapes of one particle's parameters, a pytree of ``jax.ShapeDtypeStruct``.
        loss: The loss of probabilities and integer labels.
        train: ``(x, labels)``, NumPy arrays, float32 and int32.
        test: The same for testing.
    """

    name: str
    forward: Callable[..., Any]
    logits: Callable[..., Any]
    template: Any
    loss: Any
    train: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]


Loader = Callable[[Path | str | None], datasets.Dataset]
_DENSE = {"dnn1": models.dnn1, "dnn2": models.dnn2, "dnn3": models.dnn3, "dnn4": models.dnn4}
_DEEP = {"cnn1": models.cnn1, "cnn2": models.cnn2, "cnn3": models.cnn3}


def _rows(dataset: datasets.Dataset) -> datasets.Dataset:
    """Images of one channel as sequences of their rows, from the top down."""
    return dataset._replace(train_x=dataset.train_x[..., 0], test_x=dataset.test_x[..., 0])


# name -> (data, network)
_PROBLEMS: dict[str, tuple[Loader, Callable[[], nn.Module]]] = {
    "digits-dnn": (lambda data: datasets.digits(), lambda: models.dense_network((64, 10))),
    **{f"mnist-{name}": (datasets.mnist, network) for name, network in _DENSE.items()},
    "cnn-mnist": (datasets.mnist, models.cnn_mnist),
    "mnist-rnn": (lambda data: _rows(datasets.mnist(data)), models.TanhRNN),
    **{f"fashion-{name}": (datasets.fashion_mnist, network) for name, network in _DENSE.items()},
    **{f"cifar10-{name}": (datasets.cifar10, network) for name, network in _DEEP.items()},
    **{f"svhn-{name}": (datasets.svhn, network) for name, network in _DEEP.items()},
}


def names() -> list[str]:
    """The names that ``get`` knows."""
    return list(_PROBLEMS)


def get(name: str, data: Path | str | None = None) -> Problem:
    """Load a problem's data and build its model.

    Args:
        name: One of ``names()``.
        data: The folder with the data files; else ``EKI_JAX_DATA``; else they are downloaded.

    Raises:
        ValueError: There is no such problem.
        MissingFile: A data file is missing; it is named.
        DamagedFile: A data file is not what was published.

    Example:
        >>> get("digits-dnn").train[0].shape
        (1437, 8, 8, 1)
    """
    if name not in _PROBLEMS:
        raise ValueError(f"name: {name!r}; wanted one of {', '.join(_PROBLEMS)}")
    load, network = _PROBLEMS[name]
    dataset, module = load(data), network()
    example = dataset.train_x[:1]
    forward, template = models.linen_forward(module, example)
    logits, _ = models.linen_forward(module, example, method="logits")
    if isinstance(module, models.ConvolutionalNetwork) and jax.default_backend() == "cpu":
        # Convolutions with a kernel for every particle become grouped ones, which processors do six times slower.
        forward = jax.custom_batching.sequential_vmap(forward)
    train, test = (dataset.train_x, dataset.train_y), (dataset.test_x, dataset.test_y)
    return Problem(name, forward, logits, template, cross_entropy(), train, test)
