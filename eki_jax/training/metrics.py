"""How good a classifier an ensemble is: by its mean particle, its best particle, and all of them together."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from eki_jax._checks import arrays, function, is_known, traceable
from eki_jax._types import Array, Ensemble, ForwardFn, Params
from eki_jax.ensembles.prediction import mean_particle
from eki_jax.kernel.axes import Axis
from eki_jax.kernel.evaluate import evaluate
from eki_jax.kernel.health import finite_particles, masked_mean
from eki_jax.kernel.particles import local_size

# Outputs of all particles on one piece of the data are kept below this many bytes.
_OUTPUT_BYTES = 64 * 2**20


class Accuracy(NamedTuple):
    """Shares of correctly classified samples.

    Attributes:
        mean: share of the mean particle, the paper's prediction.
        best: share of the particle that does best on these very samples, as the paper reports it beside the mean.
        ensemble: share of the average of all particles' outputs.
        particles: share of every particle, shape (J,).
    """

    mean: Array
    best: Array
    ensemble: Array
    particles: Array


def classification_accuracy(
    forward: ForwardFn, ensemble: Ensemble, x: Array, labels: Array, *, axis_name: str | None = None
) -> Accuracy:
    """Accuracies of an ensemble of classifiers.

    Args:
        forward: function ``forward(params, x) -> (batch, classes)`` of one particle: probabilities, or anything that
            grows with them.
        ensemble: pytree of arrays of shape (J, ...).
        x: inputs, shape (N, ...), or a pytree of such arrays.
        labels: integer labels, shape (N,).
        axis_name: mapped axis over which the particles are spread; the samples are not.

    Returns:
        An :class:`Accuracy`; ``particles`` holds this device's particles.

    Raises:
        TypeError: labels that are not integers.
        ValueError: no samples, labels of another length, or negative ones (where they are known).

    >>> import jax.numpy as jnp
    >>> forward = lambda u, x: jnp.stack([x * 0, x * u], axis=-1)  # says class 1 where u x > 0
    >>> u, x, labels = jnp.array([1.0, -0.5, 2.0]), jnp.array([1.0, -1.0, 2.0, 3.0]), jnp.array([1, 0, 1, 0])
    >>> accuracy = classification_accuracy(forward, u, x, labels)
    >>> float(accuracy.mean), accuracy.particles
    (0.75, Array([0.75, 0.25, 0.75], dtype=float32))
    """
    samples = local_size(traceable("x", x), name="x")
    _check(labels, samples)
    axis = Axis(axis_name)
    mean = mean_particle(ensemble, axis_name=axis_name)
    finite = finite_particles(ensemble)

    def counts(x: Array, labels: Array) -> tuple[Array, Array, Array]:
        def right(outputs: Array) -> Array:
            return jnp.sum(_is_right(outputs, labels), axis=-1)

        outputs = evaluate(forward, ensemble, x)
        average = masked_mean(outputs, finite & finite_particles(outputs), axis)
        return right(forward(mean, x)), right(average), right(outputs)

    one = jax.eval_shape(lambda e, x: evaluate(forward, e, x), ensemble, x)
    _check_classes(labels, one.shape[-1])
    per_sample = math.prod(one.shape) * one.dtype.itemsize // samples
    size = min(samples, max(1, _OUTPUT_BYTES // per_sample))
    total = _sum_over_pieces(counts, x, labels, size)
    mean_share, ensemble_share, shares = (count / samples for count in total)
    best = axis.largest(jnp.max(shares))
    return Accuracy(mean_share, best, ensemble_share, shares)


def particle_accuracy(forward: ForwardFn, params: Params, x: Array, labels: Array) -> Accuracy:
    """The accuracy of one particle, which is its own mean, best and ensemble.

    Args:
        forward: function ``forward(params, x) -> (batch, classes)``.
        params: parameters of the particle.
        x: inputs, shape (N, ...), or a pytree of such arrays.
        labels: integer labels, shape (N,).

    Returns:
        An :class:`Accuracy` whose four entries are one share.

    Raises:
        TypeError: ``forward`` is no function, ``params`` are no arrays, or labels that are not integers.
        ValueError: no samples, labels of another length, or (where they are known) labels that are no classes.

    >>> import jax.numpy as jnp
    >>> forward = lambda u, x: jnp.stack([x * 0, x * u], axis=-1)
    >>> float(particle_accuracy(forward, 1.0, jnp.array([1.0, -1.0]), jnp.array([1, 1])).mean)
    0.5
    """
    function("forward", forward, "a model, forward(params, x) -> outputs", arguments=2)
    arrays("params", params, some=True)
    _check(labels, local_size(traceable("x", x), name="x"))
    outputs = forward(params, x)
    _check_classes(labels, outputs.shape[-1])
    share = jnp.mean(_is_right(outputs, labels))
    return Accuracy(share, share, share, share[None])


def _is_right(outputs: Array, labels: Array) -> Array:
    """Where the largest output is the labelled class's; outputs that are not numbers are never right."""
    found = jnp.argmax(outputs, axis=-1)
    wanted = jnp.broadcast_to(jnp.asarray(labels).astype(found.dtype), found.shape)
    return (found == wanted) & ~jnp.isnan(outputs).any(axis=-1)


def _check(labels: Any, samples: int) -> None:
    arrays("labels", labels)
    if samples == 0 or jnp.shape(labels) != (samples,):
        raise ValueError(
            f"labels: shape {jnp.shape(labels)} for {samples} samples; wanted one label a sample, and some"
        )
    if not jnp.issubdtype(jnp.result_type(labels), jnp.integer):
        raise TypeError(f"labels: dtype {jnp.result_type(labels)}; wanted integers")
    if is_known(labels) and np.asarray(labels).min() < 0:
        raise ValueError(f"labels: least {np.asarray(labels).min()}; wanted classes from 0 on")


def _check_classes(labels: Any, classes: int) -> None:
    if is_known(labels) and np.asarray(labels).max() >= classes:
        raise ValueError(f"labels: largest {np.asarray(labels).max()}; wanted below {classes} classes")


def _sum_over_pieces(fn: Any, x: Any, labels: Array, size: int) -> Any:
    """The sum of ``fn`` over pieces of ``size`` samples and the rest."""
    samples = len(labels)
    pieces = samples // size
    whole = pieces * size
    stacked = lax.map(
        lambda piece: fn(*piece),
        jax.tree.map(lambda leaf: leaf[:whole].reshape(pieces, size, *leaf.shape[1:]), (x, labels)),
    )
    total = jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), stacked)
    if whole == samples:
        return total
    return jax.tree.map(jnp.add, total, fn(*jax.tree.map(lambda leaf: leaf[whole:], (x, labels))))
