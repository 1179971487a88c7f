"""A learned prediction of the slopes, of which the noise then explains only what it leaves.

The loss's gradient delta in what a layer returns is predicted from the loss's gradient g in the sample's outputs and
from what the layer returned, y:

    delta_k  =  c_k(y_k)  sum_m g_m A_mk

A is a linear map back from the outputs, one for each layer, and c a factor for each unit, constant over each of a few
ranges of y: an estimate of a slope of the activation. Both are regressions on the slopes that earlier steps found, with
sums that forget. Nothing of the model is differentiated; what is learned is what backpropagation would multiply by.

Other predictions join it, each as far as the noise found it right: those of layers that return equal shapes, or what
lies behind a layer, see :mod:`eki_jax.natural.estimates.answers`.
"""

from __future__ import annotations

import math
from functools import reduce
from operator import add
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from eki_jax._types import Array
from eki_jax.kernel.axes import Axis
from eki_jax.kernel.interpreter.binding import varying, varying_over
from eki_jax.natural.estimates.answers import Answer

# Features of a prediction: a square matrix of them is solved for each layer.
LARGEST = 4096
_RIDGE = 1e-3  # of the features' mean square, whatever the noise
# Variances, from layer to layer, of the weights of three predictions: by the outputs, the answer, and that by range.
_SPREADS = (0.03, 0.1, 0.03)
# Squares of gradients below this share of their mean are no longer balanced.
_SMALLEST = 1e-4
# So many times as large as is typical, beside the gradient in the outputs, slopes may be for their sample to count in
# full.
_IN_PROPORTION = 10.0
# Predictions that are summed one by one: written to memory side by side, a convolution's would take longer.
_FEW = 3
_ROUNDING = 1e-5  # of predictions' products, which may be of layers that predict the same
_TINY = 1e-30


class Learned(NamedTuple):
    """What was learned of one layer's slopes: sums over samples, which forget.

    n is the number of the layer's units for each place, and C that of the outputs.

    Attributes:
        samples: number of samples in the sums.
        outer: products of pairs of the outputs' gradients, shape (C, C).
        cross: products of the outputs' gradients with the slopes over the factors, shape (C, n).
        along: products of the slopes with ``g A``, for each range of what the unit returned, shape (n, bins).
        squares: squares of ``g A``, for each range, shape (n, bins).
        aligned: products of the slopes with their predictions, by what was known before.
        predicted: squares of the predictions.
        found: squares of the slopes.
        missed: squares of what the predictions left of the slopes.
    """

    samples: Array
    outer: Array
    cross: Array
    along: Array
    squares: Array
    aligned: Array
    predicted: Array
    found: Array
    missed: Array

    @classmethod
    def nothing(cls, features: int, units: int, bins: int) -> Learned:
        """Before the first step."""
        zero = jnp.zeros(())
        by_range = jnp.zeros((units, bins))
        outer, cross = jnp.zeros((features, features)), jnp.zeros((features, units))
        return cls(zero, outer, cross, by_range, by_range, zero, zero, zero, zero)


class Ways(NamedTuple):
    """How right each of several predictions of one layer's slopes was: sums over samples, which forget.

    Attributes:
        gram: products of the C predictions with each other, shape (C, C).
        cross: products of the slopes with them, shape (C,).
        by_range: products of the slopes with the gradient in what the layers behind read, and squares of this, for each
            range of what the unit returned, shapes (n, bins); None where nothing answers.
    """

    gram: Array
    cross: Array
    by_range: tuple[Array, Array] | None = None

    @classmethod
    def nothing(cls, alike: int, answering: tuple[int, int] | None) -> Ways:
        """Before the first step, by so many layers' predictions, and answers to a layer of (units, bins)."""
        by_range = None if answering is None else (jnp.zeros(answering), jnp.zeros(answering))
        number = alike if answering is None else alike + 2
        return cls(jnp.zeros((number, number)), jnp.zeros(number), by_range)


class Memory(NamedTuple):
    """What was learned of all layers.

    Attributes:
        layers: sums of each layer's slopes, by its number.
        ways: sums of the predictions of each layer's slopes of which there are several, by its number.
    """

    layers: dict[str, Learned]
    ways: dict[str, Ways]


class Features(NamedTuple):
    """What one layer's slopes are predicted from.

    Attributes:
        g: gradients in the outputs, shape (B, C), B counting the samples, or their places.
        ranges: number of the range in which each unit's y is, shape (B, n), int32.
        shape: sizes (B, ...) of what the layer returns, samples first.
        factors: factors (B, 1) of all that is summed up of a sample; None for 1.
    """

    g: Array
    ranges: Array
    shape: tuple[int, ...]
    factors: Array | None = None

    @classmethod
    def of(cls, in_outputs: Any, returned: Array, bins: int, batch: Axis, *, balanced: bool = False) -> Features:
        """The features, of what a layer returned, samples first.

        Where layer and outputs have the same places, the second axis of all, a place's slopes are predicted from the
        gradient at that place, by a map that all places share.
        """
        outputs = jax.tree.leaves(in_outputs)
        places = _places(returned.shape, [leaf.shape for leaf in outputs])
        rows = returned.shape[0] * places
        g = jnp.concatenate([leaf.reshape(rows, -1) for leaf in outputs], axis=1).astype(jnp.float32)
        y = returned.reshape(rows, -1).astype(jnp.float32)
        size = jnp.maximum(jnp.sqrt(batch.mean(jnp.mean(jnp.square(y)))), _TINY)
        limits = size * jax.scipy.special.ndtri(jnp.arange(1, bins) / bins)
        ranges = reduce(add, [(y >= limit).astype(jnp.int32) for limit in limits], jnp.zeros(y.shape, jnp.int32))
        # Else they are made again wherever they are used.
        factors = None
        if balanced:
            squares = jnp.sum(jnp.square(g), axis=1, keepdims=True)
            factors = lax.rsqrt(squares + _SMALLEST * batch.mean(jnp.mean(squares)) + _TINY)
        return cls(g, lax.optimization_barrier(ranges), returned.shape, factors)

    def in_proportion(self, slopes: Array, batch: Axis) -> Features:
        """The same with less weight for samples whose slopes (B, n) are out of proportion to the gradients g.

        A loop's slopes may be a million times as large as those of all other samples, where turns drive them apart.
        Balanced they would be all that is learned of, and what so large a slope leaves of the noise's is not linear.
        """
        if self.factors is None:
            return self
        squares = jnp.square(self.factors) * jnp.sum(jnp.square(slopes), axis=1, keepdims=True)
        # A mean of roots, for which it hardly matters how large the largest are.
        typical = batch.mean(jnp.mean(squares**0.125)) ** 8
        largest = jnp.square(_IN_PROPORTION) * typical + _TINY
        return self._replace(factors=self.factors * jnp.sqrt(jnp.minimum(largest / (squares + _TINY), 1)))

    def counted(self, rows: Array) -> Array:
        """Numbers (B, n) of the samples, as they are summed up."""
        return rows if self.factors is None else rows * self.factors


def sizes(returned: tuple[int, ...], outputs: list[tuple[int, ...]]) -> tuple[int, int]:
    """The numbers of features and of units of a layer, from shapes with the samples first.

    Raises:
        ValueError: too many features.

    >>> sizes((8, 64, 128), [(8, 64, 65)]), sizes((8, 5, 5, 16), [(8, 10)])
    ((65, 128), (10, 400))
    """
    places = _places(returned, outputs)
    features = sum(math.prod(shape[1:]) for shape in outputs) // places
    if features > LARGEST:
        raise ValueError(
            f"feedback: learned from {features} outputs of a sample; wanted at most {LARGEST}, or feedback=None"
        )
    return features, math.prod(returned[1:]) // places


def _places(returned: tuple[int, ...], outputs: list[tuple[int, ...]]) -> int:
    seconds = {shape[1:2] if len(shape) > 2 else () for shape in [returned, *outputs]}
    return seconds.pop()[0] if len(seconds) == 1 and () not in seconds else 1


class Prediction(NamedTuple):
    """The slopes of one layer as they are predicted, and the parts of that.

    Attributes:
        slopes: predicted slopes, shape (B, n).
        linear: product ``g A``, shape (B, n).
        factors: values of c at each unit, shape (B, n).
        whole: prediction before it is made smaller, as far as it was wrong in the past, shape (B, n).
    """

    slopes: Array
    linear: Array
    factors: Array
    whole: Array


def predicted(learned: Learned, features: Features, unknowns: float) -> Prediction:
    """The slopes of one layer, by what was learned.

    Args:
        learned: sums of the steps before.
        features: numbers from which the slopes are predicted.
        unknowns: numbers that the noise of all layers has, over the number of particles: how much more noise than
            signal the slopes have where nothing is predicted.
    """
    count = jnp.maximum(learned.samples, 1)
    noise = learned.missed / count  # of one sample's slopes, all units together
    signal = jnp.maximum(learned.aligned, learned.found / (1 + unknowns)) / count
    # The regressions' penalties are those that Bayes' rule gives for slopes of this noise: predictions begin at zero.
    penalty = _RIDGE / len(learned.outer) + noise / jnp.maximum(signal, _TINY) / count
    penalty = penalty * jnp.trace(learned.outer) + _TINY
    # By the inverse: a processor solves for many right sides far more slowly than it multiplies.
    one = jnp.eye(len(learned.outer))
    back = jax.scipy.linalg.solve(learned.outer + penalty * one, one, assume_a="pos") @ learned.cross
    linear = features.g @ back
    factors = _factors(learned.along, learned.squares, _noise(learned), features.ranges)
    # How right it has been, of slopes that it had not seen.
    trust = jnp.clip(learned.aligned / (learned.predicted + _TINY), 0, 1)
    whole = factors * linear
    return Prediction(trust * whole, linear, factors, whole)


def _factors(along: Array, squares: Array, penalty: Array, ranges: Array) -> Array:
    """The values (B, n) of c: of a layer's the prior is 1, of a unit's it is its layer's."""
    penalty = penalty + _TINY
    shared = (jnp.sum(along, axis=0) + penalty) / (jnp.sum(squares, axis=0) + penalty)
    own = (along + penalty * shared[None]) / (squares + penalty)
    # Chosen of all: a processor gathers number by number.
    return reduce(add, (jnp.where(ranges == at, values, 0) for at, values in enumerate(own.T)))


def several(
    ways: Ways, learned: Learned, features: Features, alike: list[Prediction], answer: Answer | None
) -> list[Array]:
    """All C that predicts the slopes of one layer, each of shape (B, n).

    Args:
        ways: sums of the steps before.
        learned: sums of the layer.
        features: numbers from which the slopes are predicted.
        alike: predictions by the outputs, of this layer and all that return equal shapes. Layers that are added to one
            stream, as the blocks of a residual network, have nearly the same slopes, and one of them may have learned
            its way back with less noise.
        answer: answer of what lies behind, shapes (B, n); or None.
    """
    found = [prediction.whole for prediction in alike]
    if answer is not None:
        found += [answer.slopes, asked_by_range(ways, learned, features) * answer.asked]
    return found


def weighted(factors: Array, each: list[Array]) -> Array:
    """The sum of arrays with these factors."""
    if len(each) > _FEW:
        return jnp.tensordot(factors, jnp.stack(each), axes=1)
    return reduce(add, (factor * one for factor, one in zip(factors, each, strict=True)))


def asked_by_range(ways: Ways, learned: Learned, features: Features) -> Array:
    """Factors (B, n) of the gradient in what the layers behind read, by which it predicts the slopes."""
    assert ways.by_range is not None
    return _factors(*ways.by_range, _noise(learned), features.ranges)


def weights(ways: Ways, learned: Learned, right: Array) -> Array:
    """The factors (C,) of several predictions whose sum is right for one layer's slopes, by those of the steps before.

    Args:
        ways: sums of the steps before.
        learned: sums of the layer.
        right: factor of the answers that is right for all layers, :func:`rightness`.
    """
    noise = _noise(learned) + _ROUNDING * jnp.trace(ways.gram) / len(ways.gram) + _TINY
    # What a layer's own sums cannot tell: other predictions add nothing, and answers are as right as everywhere.
    expected, spread = jnp.zeros(len(ways.gram)), jnp.ones(len(ways.gram))
    if ways.by_range is not None:
        expected, spread = jnp.array([0, right, 0]), jnp.array(_SPREADS)
    matrix = ways.gram + jnp.diag(noise / spread)
    factors = expected + jax.scipy.linalg.solve(matrix, ways.cross - ways.gram @ expected, assume_a="pos")
    if ways.by_range is not None:  # else errors would grow from layer to layer, the first ones' most
        factors = factors.at[1].set(jnp.clip(factors[1], 0, 1))
    return factors


def rightness(ways: list[Ways], layers: list[Learned]) -> Array:
    """How right answers are, in [0, 1], by those to all layers: what they are to be multiplied by."""
    along, squares = jnp.zeros(()), jnp.ones(())  # before anything is known, zero
    for own, learned in zip(ways, layers, strict=True):
        noise = _noise(learned)
        known = jnp.where(noise > 0, 1 / jnp.where(noise > 0, noise, 1), 0)
        along, squares = along + known * own.cross[1], squares + known * own.gram[1, 1]
    return jnp.clip(along / squares, 0, 1)


def _noise(learned: Learned) -> Array:
    """What predictions leave of the slopes of one sample, a unit."""
    return learned.missed / jnp.maximum(learned.samples, 1) / learned.cross.shape[1]


def updated_ways(
    ways: Ways, features: Features, each: list[Array], answer: Answer | None, slopes: Array, decay: Any, batch: Axis
) -> Ways:
    """The sums with one step's slopes, shape (B, n), which have noise and no bias."""
    each, slopes = list(map(features.counted, each)), features.counted(slopes)
    if len(each) > _FEW:
        every = jnp.stack(each)
        new = Ways(jnp.einsum("gbn,hbn->gh", every, every), jnp.einsum("gbn,bn->g", every, slopes))
    else:
        gram = [[jnp.vdot(one, other) for other in each] for one in each]
        new = Ways(jnp.array(gram), jnp.array([jnp.vdot(one, slopes) for one in each]))
    if answer is not None:
        assert ways.by_range is not None
        asked, bins = features.counted(answer.asked), ways.by_range[0].shape[1]
        values = slopes * asked, jnp.square(asked)
        new = new._replace(by_range=_summed_by_range(features.ranges, values, bins))
    return jax.tree.map(lambda old, new: decay * old + new, ways, batch.sum(new))


def updated(
    learned: Learned,
    features: Features,
    prediction: Prediction,
    expected: Array,
    slopes: Array,
    decay: Any,
    batch: Axis,
) -> Learned:
    """The sums with one step's slopes, shape (B, n), which have noise and no bias."""
    g, slopes, expected = map(features.counted, (features.g, slopes, expected))
    linear, whole = map(features.counted, (prediction.linear, prediction.whole))
    root = jnp.sqrt(batch.mean(jnp.mean(jnp.square(prediction.factors), axis=0, keepdims=True)))
    scaled = slopes * prediction.factors / jnp.maximum(root, _TINY)
    by_unit = slopes * linear, jnp.square(linear)
    along, squares = _summed_by_range(features.ranges, by_unit, learned.along.shape[1])
    new = Learned(
        samples=jnp.asarray(float(len(slopes))),
        outer=g.T @ g,
        cross=g.T @ scaled,
        along=along,
        squares=squares,
        aligned=jnp.vdot(slopes, whole),
        predicted=jnp.vdot(whole, whole),
        found=jnp.vdot(slopes, slopes),
        missed=jnp.sum(jnp.square(slopes - expected)),
    )
    return jax.tree.map(lambda old, new: decay * old + new, learned, batch.sum(new))


def _summed_by_range(ranges: Array, values: tuple[Array, Array], bins: int) -> tuple[Array, Array]:
    """The sums over the rows of two values (B, n), for each range (B, n) apart: shapes (n, bins)."""

    def at_once(ranges: Array, *values: Array) -> tuple[Array, ...]:
        at = ranges[..., None] == jnp.arange(bins)
        return tuple(jnp.sum(jnp.where(at, value[..., None], 0), axis=0) for value in values)

    def a_row_at_a_time(ranges: Array, *values: Array) -> tuple[Array, ...]:
        def add(sums: tuple[Array, ...], row: tuple[Array, ...]) -> tuple[tuple[Array, ...], None]:
            at = row[0] == jnp.arange(bins)[:, None]
            return tuple(total + jnp.where(at, value, 0) for total, value in zip(sums, row[1:], strict=True)), None

        axes = varying((ranges, *values))
        nothing = tuple(varying_over(jnp.zeros((bins, value.shape[1])), axes) for value in values)
        sums, _ = lax.scan(add, nothing, (ranges, *values))
        return tuple(total.T for total in sums)

    # A processor would write all (B, n, bins) products to memory: 30 times as long for a convolution's 4,608 numbers.
    return lax.platform_dependent(ranges, *values, cpu=a_row_at_a_time, default=at_once)
