"""Deviations of a sample of its own: noise that is added to what layers return."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, NoReturn

import jax

from eki_jax._checks import NOT_NEGATIVE, one_of, real
from eki_jax._types import Array, Params

Solve = Literal["least squares", "covariance"]


class PerSample(NamedTuple):
    """See :func:`per_sample`."""

    solve: Solve = "least squares"
    ridge: Any = 0.01
    relative: bool = True
    causal: bool = False

    def draw(self, key: Array, mean: Params) -> Array:
        """The data of the particle's key, of which all of its noise is a function."""
        del mean
        return jax.random.key_data(key)

    def particle(self, mean: Params, factors: Any, sigma: Array) -> NoReturn:
        """Refused: a particle has the mean's parameters."""
        raise TypeError(
            "deviations: per_sample(...), whose particles differ in what their layers return and not in their "
            "parameters; wanted low_rank(...) or full_rank(...) where particles are asked for"
        )

    def dense(self, mean: Params, factors: Any) -> NoReturn:
        """Refused, for the same reason."""
        self.particle(mean, factors, jax.numpy.zeros(()))

    def combine(self, mean: Params, factors: Any, weights: Array) -> NoReturn:
        """Refused, for the same reason."""
        self.particle(mean, factors, weights)


def per_sample(
    solve: Solve = "least squares", *, ridge: Any = 0.01, relative: bool = True, causal: bool = False
) -> PerSample:
    r"""Noise drawn for every sample by itself and added to what each layer returns; no weight is disturbed.

    Particle j's layer returns ``y + sigma s e_j`` for the sample's own ``e_j`` of independent standard normal numbers.
    With g the loss's gradient in the sample's outputs z, the change ``r_j = g (z_j - z)`` is, to first order, a sum
    over all of these numbers, each times its slope delta, the loss's gradient in what the layer returns:

    .. math:: r_j = \sum_l \delta_l \cdot \sigma s_l e_{lj}

    a regression with J equations for each sample, that all layers share. A weight's gradient is the sum over samples of
    its inputs times the slopes, which is exact; so the errors of different samples average out. What is linear in the
    last layer needs no estimate at all. A layer is whatever is linear in one leaf: products, convolutions, lookups of
    rows, scales and biases, wherever they are in the model. Leaves that a model uses otherwise, or in a loop, are
    disturbed as wholes and have the plain estimate ``sum_j r_j e_j``.

    The layers multiply J copies of the batch by one matrix. Samples must not meet in the model (no batch norm in
    training mode): a sample's outputs are taken to depend on its own noise.

    Args:
        solve: way to solve: "least squares", by the J x J matrix of the particles' noise; or "covariance", the sum
            ``sum_j r_j e_j / J``, with which layers' noise hides other layers' slopes.
        ridge: number >= 0 that is added to the diagonal of that matrix, as a share of its mean, for "least squares".
        relative: flag; True makes s the root mean square of what the layer returns, False 1.
        causal: flag for sequences, whose outputs (B, T, ...) depend on what layers return (B, T, ...) at the same and
            earlier places alone: the noise at a place then explains only what comes there and later.

    Raises:
        TypeError, ValueError: a ``solve`` that there is none, a ``ridge`` that is no number >= 0, flags that are none.

    >>> per_sample("covariance").solve
    'covariance'
    """
    one_of("solve", solve, ("least squares", "covariance"))
    real("ridge", ridge, NOT_NEGATIVE)
    for name, value in (("relative", relative), ("causal", causal)):
        if not isinstance(value, bool):
            raise TypeError(f"{name}: {value!r}; wanted True or False")
    return PerSample(solve, ridge, relative, causal)
