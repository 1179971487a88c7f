"""What the benchmarks solve: data, model and loss under one name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn

from benchmarks.problems import data as datasets
from benchmarks.problems import small_cnn
from eki_jax import flax as models
from eki_jax.losses import cross_entropy
from eki_jax.priors import Gaussian, xavier


class Uniform(NamedTuple):
    """Numbers between ``-bound`` and ``bound``, each as likely as the others.

    Attributes:
        template: Shapes of one particle's parameters.
        bound: The largest number.
    """

    template: Any
    bound: float

    def sample(self, key: jax.Array) -> Any:
        """One draw."""
        leaves, structure = jax.tree.flatten(self.template)
        keys = jax.random.split(key, len(leaves))
        draw = lambda key, leaf: jax.random.uniform(key, leaf.shape, minval=-self.bound, maxval=self.bound)
        return structure.unflatten(map(draw, keys, leaves))

    noise = sample


class Problem(NamedTuple):
    """A classification problem.

    Attributes:
        name: As in ``names()``.
        forward: ``forward(params, x)`` to class probabilities ``(batch, classes)``, for one particle.
        logits: The same before the softmax (for gradient methods).
        particle_logits: The same, written for many particles and not for derivatives.
        is_local: Whether ``logits`` multiplies by its dense layers' matrices once a sample.
        straight_through: The logits with made-up derivatives, where ``logits`` has none that are of use; else
            ``logits``.
        template: Shapes of one particle's parameters, a pytree of ``jax.ShapeDtypeStruct``.
        prior: Where ensembles start, and what noise they have.
        start: Where methods with a single mean start, one draw; the prior, but for the network that stacks its layers.
        loss: The loss of probabilities and integer labels.
        train: ``(x, labels)``, NumPy arrays, float32 and int32.
        test: The same for testing.
    """

    name: str
    forward: Callable[..., Any]
    logits: Callable[..., Any]
    particle_logits: Callable[..., Any]
    is_local: bool
    straight_through: Callable[..., Any]
    template: Any
    prior: Gaussian
    start: Gaussian | Uniform
    loss: Any
    train: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]


Loader = Callable[[Path | str | None], datasets.Dataset]
_DENSE = {"dnn1": models.dnn1, "dnn2": models.dnn2, "dnn3": models.dnn3, "dnn4": models.dnn4}
_DEEP = {"cnn1": models.cnn1, "cnn2": models.cnn2, "cnn3": models.cnn3}
# Networks without derivatives, each with its twin that has made-up ones.
_DISCRETE = {
    "mnist-sign": (
        lambda: models.dense_network((100, 10), models.sign),
        lambda: models.dense_network((100, 10), models.straight_through_sign),
    ),
    "mnist-int8": (
        lambda: models.Int8Network((100, 10)),
        lambda: models.Int8Network((100, 10), straight_through=True),
    ),
    "mnist-experts": (
        lambda: models.ExpertsNetwork(4, 32, 10),
        lambda: models.ExpertsNetwork(4, 32, 10, straight_through=True),
    ),
    "mnist-spikes": (
        lambda: models.SpikingNetwork((100, 10)),
        lambda: models.SpikingNetwork((100, 10), straight_through=True),
    ),
}


def _rows(dataset: datasets.Dataset) -> datasets.Dataset:
    """Images of one channel as sequences of their rows, from the top down."""
    return dataset._replace(train_x=dataset.train_x[..., 0], test_x=dataset.test_x[..., 0])


def _from_0_to_1(dataset: datasets.Dataset) -> datasets.Dataset:
    """Pixels from 0, black, to 1, white, in the place of standardised ones."""
    black, white = dataset.train_x.min(), dataset.train_x.max()
    scaled = lambda images: (images - black) / (white - black)
    return dataset._replace(train_x=scaled(dataset.train_x), test_x=scaled(dataset.test_x))


# name -> (data, network)
PROBLEMS: dict[str, tuple[Loader, Callable[[], nn.Module]]] = {
    "digits-dnn": (lambda data: datasets.digits(), lambda: models.dense_network((64, 10))),
    **{f"mnist-{name}": (datasets.mnist, network) for name, network in _DENSE.items()},
    **{name: (datasets.mnist, network) for name, (network, _) in _DISCRETE.items()},
    "mnist-small-cnn": (datasets.mnist, models.small_cnn),
    "cnn-mnist": (datasets.mnist, models.cnn_mnist),
    "mnist-rnn": (lambda data: _rows(datasets.mnist(data)), models.TanhRNN),
    "mnist-stacked-rnn": (
        lambda data: _from_0_to_1(_rows(datasets.mnist(data))),
        partial(models.TanhRNN, stacked=True),
    ),
    **{f"fashion-{name}": (datasets.fashion_mnist, network) for name, network in _DENSE.items()},
    "cifar10-small-cnn": (datasets.cifar10, models.small_cnn),
    **{f"cifar10-{name}": (datasets.cifar10, network) for name, network in _DEEP.items()},
    **{f"svhn-{name}": (datasets.svhn, network) for name, network in _DEEP.items()},
}


def names() -> list[str]:
    """The names that ``get`` knows."""
    return list(PROBLEMS)


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
    if name not in PROBLEMS:
        raise ValueError(f"name: {name!r}; wanted one of {', '.join(PROBLEMS)}")
    return build(name, PROBLEMS[name][0](data))


def build(name: str, dataset: datasets.Dataset) -> Problem:
    """The problem called ``name`` with data that were loaded before."""
    module = PROBLEMS[name][1]()
    example = dataset.train_x[:1]
    forward, template = models.linen_forward(module, example)
    logits, _ = models.linen_forward(module, example, method="logits")
    straight_through = particle_logits = logits
    if name in _DISCRETE:
        straight_through, _ = models.linen_forward(_DISCRETE[name][1](), example, method="logits")
    if isinstance(module, models.ConvolutionalNetwork) and jax.default_backend() == "cpu":
        # Convolutions with a kernel for every particle become grouped ones, which processors do six times slower.
        forward = jax.custom_batching.sequential_vmap(forward)
        particle_logits = jax.custom_batching.sequential_vmap(logits)
    # Rounded weights are formed, and those of a recurrent network are in a loop.
    is_local = not isinstance(module, models.Int8Network | models.TanhRNN)
    # Without the window, the paper's words, CNN-MNIST's first outputs are of the order of 100, and SGD never recovers.
    prior = xavier(template, window=True)
    stacks = isinstance(module, models.TanhRNN) and module.stacked
    start = Uniform(template, module.units**-0.5) if stacks else prior  # as frameworks start what they stack
    if isinstance(module, models.SmallConvolutionalNetwork):
        particle_logits = small_cnn.particle_logits
        forward = lambda params, x: jax.nn.softmax(small_cnn.particle_logits(params, x))
    train, test = (dataset.train_x, dataset.train_y), (dataset.test_x, dataset.test_y)
    return Problem(
        name=name,
        forward=forward,
        logits=logits,
        particle_logits=particle_logits,
        is_local=is_local,
        straight_through=straight_through,
        template=template,
        prior=prior,
        start=start,
        loss=cross_entropy(),
        train=train,
        test=test,
    )
