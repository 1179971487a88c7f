"""Deviations of a sample of its own: noise that is added to what layers return."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, NoReturn

import jax
import jax.numpy as jnp

from eki_jax._checks import (
    AT_LEAST_ONE,
    FROM_0_TO_1,
    NOT_NEGATIVE,
    SHARE,
    flag,
    is_known,
    one_of,
    real,
    traceable,
    whole,
)
from eki_jax._types import Array, Params

Solve = Literal["least squares", "covariance"]


class Feedback(NamedTuple):
    """See :func:`learned_feedback`."""

    example: Any
    decay: Any = 0.99
    bins: int = 8
    unbiased: bool = False
    averaged: Any = 1.0
    answers: bool = True
    balanced: bool = True


class PerSample(NamedTuple):
    """See :func:`per_sample`."""

    solve: Solve = "least squares"
    ridge: Any = 0.01
    relative: bool = True
    causal: bool = False
    feedback: Feedback | None = None
    discount: Any = 1.0
    mixing: bool = True

    def draw(self, key: Array, mean: Params) -> Array:
        """The data of the particle's key; the layers' noise of all particles is a function of the first one's."""
        del mean
        return jax.random.key_data(key)

    def particle(self, mean: Params, factors: Any, sigma: Array) -> Params:
        """The mean: a particle differs in what its layers return, and not in its parameters."""
        del factors, sigma
        return mean

    def dense(self, mean: Params, factors: Any) -> Params:
        """No deviation of the parameters."""
        del factors
        return jax.tree.map(jnp.zeros_like, mean)

    def combine(self, mean: Params, factors: Any, weights: Array) -> NoReturn:
        """Refused: no sum of deviations of the parameters is a direction."""
        raise TypeError("deviations: per_sample(...) with an estimate in the span; wanted estimate=gradient()")


def per_sample(
    solve: Solve = "least squares",
    *,
    ridge: Any = 0.01,
    relative: bool = True,
    causal: bool = False,
    feedback: Feedback | None = None,
    discount: Any = 1.0,
    mixing: bool = True,
) -> PerSample:
    r"""Noise drawn for every sample by itself and added to what each layer returns; no weight is disturbed.

    Particle j's layer returns ``y + sigma s e_j`` for the sample's own ``e_j`` of independent numbers 1 and -1.
    With g the loss's gradient in the sample's outputs z, the change ``r_j = g (z_j - z)`` is, to first order, a sum
    over all of these numbers, each times its slope delta, the loss's gradient in what the layer returns:

    .. math:: r_j = \sum_l \delta_l \cdot \sigma s_l e_{lj}

    a regression with J equations for each sample, that all layers share. A weight's gradient is the sum over samples of
    its inputs times the slopes, which is exact; so the errors of different samples average out. What is linear in the
    last layer needs no estimate at all. A layer is whatever is linear in one leaf, or in several side by side:
    products, convolutions, lookups of rows, scales and biases, wherever they are in the model; layers that are added
    count as one. In a loop over time each turn has noise of its own. A leaf may go through a function of its own
    first, number by number, such as one that rounds it: the function's slopes are found by differences, as wide as its
    steps are. A scale that it computes from all of the leaf counts as a constant; :func:`describe` names such leaves.
    Leaves that a model uses otherwise, or in a loop within a loop, are disturbed as wholes and have the plain estimate
    ``sum_j r_j e_j``.

    The layers multiply J copies of the batch by one matrix. Samples must not meet in the model (no batch norm in
    training mode): a sample's outputs are taken to depend on its own noise. ``ensemble(state)`` has the mean's
    parameters, J times.

    Args:
        solve: way to solve: "least squares", by the J x J matrix of the particles' noise; or "covariance", the sum
            ``sum_j r_j e_j / J``, with which layers' noise hides other layers' slopes.
        ridge: number >= 0 that is added to the diagonal of that matrix, as a share of its mean, or of J / 2 where this
            is more, for "least squares".
        relative: flag; True makes s the root mean square of what the layer returns, False 1.
        causal: flag for sequences, whose outputs (B, T, ...) depend on what layers return (B, T, ...) at the same and
            earlier places alone: the noise at a place then explains only what comes there and later.
        feedback: prediction of the slopes, :func:`learned_feedback`, of which the noise then explains what is left;
            None for none. For :func:`natural_gradient`, whose state keeps what is learned.
        discount: number in [0, 1], with ``causal=True``: a change of the loss d places later counts ``discount**d`` for
            the noise at a place. 1 leaves the gradient without bias. Below that the other places' noise hides less of
            it, for a bias in what acts over a distance otherwise than by ``mixing``.
        mixing: flag, with ``causal=True``; True looks for products that mix places and are linear in what a layer
            returns, such as those of attention with keys and values. The noise is then added behind them, where it acts
            on its own place, and what lies before is credited with what it changes of what other places ask of its own.
            So a transformer's gradient has no bias with ``discount=0`` either. Only outside of loops.

    Raises:
        TypeError, ValueError: a ``solve`` that there is none, a ``ridge`` that is no number >= 0, flags that are none,
            a ``feedback`` that is none, a ``discount`` out of range, or of places without ``causal=True``.

    >>> per_sample("covariance").solve
    'covariance'
    """
    one_of("solve", solve, ("least squares", "covariance"))
    real("ridge", ridge, NOT_NEGATIVE)
    flag("relative", relative)
    flag("causal", causal)
    flag("mixing", mixing)
    if feedback is not None and not isinstance(feedback, Feedback):
        raise TypeError(f"feedback: {feedback!r}; wanted learned_feedback(example), or None for none")
    real("discount", discount, FROM_0_TO_1)
    if not causal and not (is_known(discount) and discount == 1):
        raise ValueError(f"discount: {discount} with causal=False, where no output is later; wanted 1, or causal=True")
    return PerSample(solve, ridge, relative, causal, feedback, discount, mixing)


def learned_feedback(
    example: Any,
    decay: Any = 0.99,
    *,
    bins: int = 8,
    unbiased: bool = False,
    averaged: Any = 1.0,
    answers: bool = True,
    balanced: bool = True,
) -> Feedback:
    r"""A prediction of each layer's slopes that is learned from the slopes that the noise finds.

    .. math:: \delta_k \approx c_k(y_k) \sum_m g_m A_{mk}

    with g the loss's gradient in the sample's outputs (those at the same place, where layer and outputs have the same
    places), y what the layer returned, A a matrix for each layer, and c constant over a few ranges of y. Slopes of the
    layers behind predict more, by ``answers``. Where nothing answers, layers that return equal shapes share what they
    learned: each takes the sum of their predictions that is right for its slopes. The noise then explains what the
    prediction leaves, a control variate; and what few particles cannot tell of that stays with the prediction. How much
    of a prediction is used goes by how right it has been with slopes that it had not seen. A step needs far fewer
    particles so: see ``docs/per_sample.md`` for the numbers.

    To learn a map back from node perturbation is the idea of Lansdell, Prakash and Kording (2020, arXiv:1906.00889); of
    theirs the map is the gradient, here it is what noise corrects.

    Args:
        example: inputs x of a batch, arrays or ``jax.ShapeDtypeStruct``: only their shapes are used, to make room for
            what is learned, and the number of samples does not matter.
        decay: share in [0, 1) of what was learned that is kept from one step to the next.
        bins: number of ranges of y, those of the same probability for normal numbers of its size; 1 for none.
        unbiased: flag; True adds what the noise finds in full, so that estimates have no bias and more noise.
        averaged: number >= 1 of samples, or places of sequences, whose errors are taken to cancel in a step: with k
            particles, N numbers a sample and n for this one, the share ``n k / (n k + N)`` of what the noise finds is
            added. 1 has the smallest error sample by sample, and leaves layers alone of which nothing is predicted;
            large ones come near ``unbiased=True``.
        answers: flag; True predicts slopes from those of the layers behind too, through their matrices and through what
            lies between, which is asked: the model is evaluated with what a layer returns moved along the gradient,
            both ways, and all other layers' outputs held; a loop over time turn by turn, the last one first. Right
            where a change of number k does to i what a change of i does to k, as of activations, gates, softmax and
            normalisation, and of windows that pool, which are asked one number of each at a time; how right, the noise
            says. Where the model fails at one of the sides, nothing is answered. Not in models whose loops have loops
            or branches in them, nor where a layer returns another number of numbers than are read, otherwise than by
            windows, by parts that are cut out, by sums, or by a choice that rows are multiplied by. :func:`describe`
            says which layers have answers.
        balanced: flag; True gives all samples of a batch the same weight in what is learned, however large their
            gradients in the outputs are, and less where slopes are far out of proportion to these. False lets the few
            of large gradients decide; at losses near zero, nearly all of which few samples have, what is learned in
            batches without one of them is then wrong by far for the next of them, and steps can grow beyond all bounds.

    Raises:
        TypeError, ValueError: an ``example`` without arrays, a ``decay`` out of range, ``bins`` below 1, ``averaged``
            below 1.

    >>> learned_feedback(jax.ShapeDtypeStruct((1, 784), "float32"), 0.998).decay
    0.998
    """
    traceable("example", example)
    if not jax.tree.leaves(example):
        raise ValueError("example: has no arrays; wanted inputs x of a batch")
    real("decay", decay, SHARE)
    whole("bins", bins)
    flag("unbiased", unbiased)
    flag("answers", answers)
    flag("balanced", balanced)
    real("averaged", averaged, AT_LEAST_ONE)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), example)
    return Feedback(shapes, decay, bins, unbiased, averaged, answers, balanced)
