r"""What a policy's outputs say about its actions: a probability for each, or a normal distribution.

The Fisher matrix of the actions in the *outputs*, ``F = E[s s^T]`` with the score ``s = grad_z log p(a | z)``, is known
in closed form. It takes the place of the loss's Hessian in a natural step, so that the policy's own derivative, which
TRPO and natural policy gradients take, is not needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from eki_jax._checks import arrays, offers
from eki_jax._types import Array


class FisherFactor(NamedTuple):
    """A factor S of the Fisher matrix ``F = S S^T`` of B independent samples, M output numbers in all.

    Attributes:
        times: function of rows (n, M) that returns ``rows S``, shape (n, R).
        solve: function of a gradient g (M,) in the range of S that returns gamma (R,) with ``S gamma = g``.
    """

    times: Callable[[Array], Array]
    solve: Callable[[Array], Array]


class Distribution(Protocol):
    """A distribution of actions with the policy's outputs for its parameters; each sample's is its own."""

    def sample(self, key: Array, outputs: Any) -> Array:
        """Actions drawn from it, one for each sample."""

    def mode(self, outputs: Any) -> Array:
        """The likeliest actions."""

    def log_prob(self, outputs: Any, actions: Any) -> Array:
        """The logarithm of the probability (or density) of the actions, shape (B,)."""

    def entropy(self, outputs: Any) -> Array:
        """The entropy in nats, shape (B,)."""

    def divergence(self, outputs: Any, others: Any) -> Array:
        """The Kullback-Leibler divergence from ``outputs`` to ``others`` in nats, shape (B,)."""

    def fisher(self, outputs: Any) -> FisherFactor:
        """The factor of the Fisher matrix in the outputs, those of all samples in the order of their flat leaves."""


def a_distribution(value: Any) -> Distribution:
    """``value``, if it is a distribution of actions.

    Raises:
        TypeError: it offers less.
    """
    wanted = "a distribution, such as eki_jax.policy.categorical()"
    return offers("distribution", value, ("sample", "mode", "log_prob", "entropy", "divergence", "fisher"), wanted)


@dataclass(frozen=True)
class Categorical:
    """See :func:`categorical`."""

    def sample(self, key: Array, outputs: Array) -> Array:
        """Actions, int32."""
        return jax.random.categorical(key, _logits(outputs), axis=-1).astype(jnp.int32)

    def mode(self, outputs: Array) -> Array:
        """The likeliest actions, int32."""
        return jnp.argmax(_logits(outputs), axis=-1).astype(jnp.int32)

    def log_prob(self, outputs: Array, actions: Array) -> Array:
        """The logarithm of the actions' probability; NaN for an action that there is not."""
        logs = jax.nn.log_softmax(_logits(outputs))
        wanted = logs.shape[:-1]
        if jnp.shape(actions) != wanted or not jnp.issubdtype(jnp.result_type(actions), jnp.integer):
            raise ValueError(
                f"actions: shape {jnp.shape(actions)} of dtype {jnp.result_type(actions)}; wanted integers of shape "
                f"{wanted}, for logits of shape {logs.shape}"
            )
        known = (actions >= 0) & (actions < logs.shape[-1])
        taken = jnp.take_along_axis(logs, jnp.where(known, actions, 0)[..., None], axis=-1)[..., 0]
        return _by_sample(jnp.where(known, taken, jnp.nan))

    def entropy(self, outputs: Array) -> Array:
        """The entropy; each action counts with its probability."""
        logs = jax.nn.log_softmax(_logits(outputs))
        return _by_sample(-jnp.sum(_times_log(jnp.exp(logs), logs), axis=-1))

    def divergence(self, outputs: Array, others: Array) -> Array:
        """The divergence of one set of logits from another."""
        logs, other = jax.nn.log_softmax(_logits(outputs)), jax.nn.log_softmax(_logits(others))
        return _by_sample(jnp.sum(_times_log(jnp.exp(logs), logs - other), axis=-1))

    def fisher(self, outputs: Array) -> FisherFactor:
        """``diag p - p p^T = S S^T`` with ``S = (I - p 1^T) diag sqrt p`` for each sample."""
        logits = _logits(outputs)
        p = jax.nn.softmax(logits).reshape(-1, logits.shape[-1])
        root = jnp.sqrt(p)

        def times(rows: Array) -> Array:
            z = rows.reshape(len(rows), *p.shape)
            return ((z - jnp.sum(z * p, axis=-1, keepdims=True)) * root).reshape(len(rows), -1)

        def solve(gradient: Array) -> Array:
            # A gradient in logits sums to zero over a sample's actions, so that S gamma = g for gamma = g / sqrt p.
            return (gradient.reshape(p.shape) / jnp.maximum(root, 1e-6)).ravel()

        return FisherFactor(times, solve)


def categorical() -> Categorical:
    """Choices among A actions, whose logits are the policy's outputs, shape (B, A).

    With further axes, (B, ..., A), each sample makes as many independent choices.

    >>> import jax.numpy as jnp
    >>> choices = categorical()
    >>> jnp.round(choices.log_prob(jnp.zeros((1, 4)), jnp.array([2])), 3)  # log 1/4
    Array([-1.386], dtype=float32)
    """
    return Categorical()


@dataclass(frozen=True)
class Normal:
    """See :func:`normal`."""

    def sample(self, key: Array, outputs: Any) -> Array:
        """Actions of the means' shape."""
        mean, log_scale = _moments(outputs)
        return mean + jnp.exp(log_scale) * jax.random.normal(key, mean.shape, mean.dtype)

    def mode(self, outputs: Any) -> Array:
        """The means."""
        return _moments(outputs)[0]

    def log_prob(self, outputs: Any, actions: Any) -> Array:
        """The logarithm of the actions' density."""
        mean, log_scale = _moments(outputs)
        if jnp.shape(actions) != mean.shape:
            raise ValueError(f"actions: shape {jnp.shape(actions)}; wanted that of the means, {mean.shape}")
        z = (actions - mean) * jnp.exp(-log_scale)
        return _by_sample(-0.5 * z**2 - log_scale - 0.5 * math.log(2 * math.pi))

    def entropy(self, outputs: Any) -> Array:
        """The entropy, of the scales alone."""
        return _by_sample(_moments(outputs)[1] + 0.5 * (1 + math.log(2 * math.pi)))

    def divergence(self, outputs: Any, others: Any) -> Array:
        """The divergence of one set of moments from another."""
        (mean, log_scale), (other, other_scale) = _moments(outputs), _moments(others)
        ratio = jnp.exp(2 * (log_scale - other_scale))
        distance = ((mean - other) * jnp.exp(-other_scale)) ** 2
        return _by_sample(other_scale - log_scale + 0.5 * (ratio + distance - 1))

    def fisher(self, outputs: Any) -> FisherFactor:
        """A diagonal: the inverse variance for a mean, 2 for the logarithm of a scale."""
        mean, log_scale = _moments(outputs)
        root = jnp.concatenate([jnp.exp(-log_scale).ravel(), jnp.full(mean.size, math.sqrt(2), mean.dtype)])
        return FisherFactor(lambda rows: rows * root, lambda gradient: gradient / root)


def normal() -> Normal:
    """Actions (B, ..., d) with a mean and the logarithm of a standard deviation each, in the actions' units.

    The policy's outputs are the pair ``(means, log_scales)`` of arrays of one shape; a scale that no observation
    changes is a parameter, broadcast to the means' shape.

    >>> import jax.numpy as jnp
    >>> moments = jnp.zeros((1, 2)), jnp.zeros((1, 2))
    >>> jnp.round(normal().entropy(moments), 3)  # of two standard normal numbers: 1 + log 2 pi
    Array([2.838], dtype=float32)
    """
    return Normal()


def _logits(outputs: Any) -> Array:
    arrays("outputs", outputs, floating=True, some=True)
    if not hasattr(outputs, "ndim") or outputs.ndim < 2:
        raise ValueError(f"outputs: {_shapes(outputs)}; wanted logits of shape (B, ..., actions)")
    return outputs


def _moments(outputs: Any) -> tuple[Array, Array]:
    is_pair = isinstance(outputs, tuple | list) and len(outputs) == 2
    if not is_pair or jnp.shape(outputs[0]) != jnp.shape(outputs[1]) or not jnp.ndim(outputs[0]):
        raise ValueError(f"outputs: {_shapes(outputs)}; wanted a pair (means, log_scales) of one shape (B, ..., d)")
    arrays("outputs", outputs, floating=True)
    return outputs[0], outputs[1]


def _shapes(outputs: Any) -> str:
    return f"shapes {jax.tree.map(jnp.shape, outputs)}"


def _by_sample(values: Array) -> Array:
    """The sum of each sample's values, shape (B, ...) to (B,)."""
    return jnp.sum(values.reshape(values.shape[0], -1), axis=1)


def _times_log(p: Array, log: Array) -> Array:
    """``p log``, zero where p is."""
    return jnp.where(p > 0, p * jnp.where(p > 0, log, 0), 0)
