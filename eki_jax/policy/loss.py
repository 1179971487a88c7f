"""The loss of a policy's outputs: its gradient is advantages times scores, its curvature Fisher's matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp

from eki_jax._checks import NOT_NEGATIVE, POSITIVE, SHARE, real
from eki_jax._types import Array
from eki_jax.losses.protocol import Curvature, Reduction
from eki_jax.policy.distributions import Distribution, a_distribution


class Visited(NamedTuple):
    """What is known of the states that a policy visited, the targets of :func:`policy_loss`.

    Attributes:
        actions: actions that were taken, a leading axis of B states.
        advantages: gain of each action over what is usual there, shape (B,), in units of reward (or standardized).
        log_probs: logarithm of the actions' probability when they were taken, shape (B,).
        outputs: outputs of the policy that took them; None where no limit asks for them.
    """

    actions: Array
    advantages: Array
    log_probs: Array
    outputs: Any = None


@dataclass(frozen=True)
class PolicyLoss:
    """See :func:`policy_loss`."""

    distribution: Distribution
    clip: Any = None
    entropy: Any = 0.0
    divergence: Any = None

    @property
    def reduction(self) -> Reduction:
        """The mean over the states."""
        return "mean"

    def __call__(self, outputs: Any, targets: Any) -> Array:
        """The mean of the states' losses; infinite beyond the largest divergence."""
        value = jnp.mean(self.per_sample(outputs, targets))
        if self.divergence is None:
            return value
        if targets.outputs is None:
            raise ValueError("targets.outputs: None; wanted the outputs of the policy that acted, for the divergence")
        apart = jnp.mean(self.distribution.divergence(targets.outputs, outputs))
        return jnp.where(apart <= self.divergence, value, jnp.inf)

    def per_sample(self, outputs: Any, targets: Any) -> Array:
        """The states' losses, shape (B,)."""
        actions, advantages, log_probs, _ = targets
        log_prob = self.distribution.log_prob(outputs, actions)
        for name, found in (("advantages", advantages), ("log_probs", log_probs)):
            if jnp.shape(found) != log_prob.shape:
                raise ValueError(f"targets.{name}: shape {jnp.shape(found)}; wanted {log_prob.shape}, one for a state")
        ratio = jnp.exp(log_prob - log_probs)
        gain = ratio * advantages
        if self.clip is not None:
            gain = jnp.minimum(gain, jnp.clip(ratio, 1 - self.clip, 1 + self.clip) * advantages)
        return -gain - self.entropy * self.distribution.entropy(outputs)

    def curvature(self, outputs: Any, targets: Any) -> Curvature:
        """The gradient of this loss, and Fisher's matrix in the place of its Hessian, both of the mean over states."""
        surrogate = lambda outputs: jnp.mean(self.per_sample(outputs, targets))
        value, gradient = jax.value_and_grad(surrogate)(outputs)
        gradient = jax.flatten_util.ravel_pytree(gradient)[0]
        factor = self.distribution.fisher(outputs)
        share = 1 / jnp.sqrt(jnp.asarray(jax.tree.leaves(outputs)[0].shape[0], gradient.dtype))

        def times_factor(rows: Array) -> Array:
            return share * factor.times(rows)

        gamma = factor.solve(gradient) / share
        # What gamma cannot carry in floats (an action that has no probability) remains, as S gamma says.
        carried = jax.linear_transpose(times_factor, jax.ShapeDtypeStruct((1, gradient.size), gradient.dtype))
        return Curvature(value, gradient, times_factor, gamma, gradient - carried(gamma[None])[0][0])


def policy_loss(
    distribution: Distribution, *, clip: Any = None, entropy: Any = 0.0, divergence: Any = None
) -> PolicyLoss:
    r"""The loss whose natural step is a trust-region policy step: the advantages' surrogate, with Fisher's curvature.

    For states s with actions a, advantages A and the policy's outputs z(s),

    .. math:: L(z) = -\frac1B \sum_b \frac{p(a_b | z_b)}{p_{old}(a_b)} A_b - c\, H[p(\cdot | z_b)] .

    Where the policy is the one that acted, its gradient in the outputs is minus the advantage times the score; the
    second derivative is replaced by the Fisher matrix of the actions in the outputs, which is never negative. So
    :func:`eki_jax.natural.natural_gradient` takes natural policy gradient steps, and its ``norm_constraint`` is twice
    the trust region's size in nats.

    Args:
        distribution: distribution of the actions, given the outputs: :func:`categorical`, :func:`normal` or your own.
        clip: largest change of a probability's ratio that is rewarded, in (0, 1), as in PPO; None for no limit.
        entropy: factor c >= 0 of the entropy, in units of the advantages for a nat.
        divergence: largest mean Kullback-Leibler divergence, in nats, of the policy that acted from the outputs: beyond
            it the loss is infinite, so that a solver with a ``loss_limit`` makes its step shorter until it holds. None
            for no limit.

    Returns:
        ``loss(outputs, targets)`` with targets :class:`Visited`.

    Raises:
        TypeError: ``distribution`` that offers less than :class:`Distribution`.
        ValueError: ``clip``, ``entropy`` or ``divergence`` out of range; when called, targets whose shapes do not fit.

    Source: the natural policy gradient (Kakade, 2001), trust regions (Schulman et al., 2015, equation 14), the clipped
    surrogate (Schulman et al., 2017, equation 7).

    >>> import jax, jax.numpy as jnp
    >>> from eki_jax.policy import Visited, categorical
    >>> visited = Visited(jnp.array([0]), jnp.array([2.0]), jnp.log(jnp.array([0.5])))
    >>> jax.grad(policy_loss(categorical()))(jnp.zeros((1, 2)), visited)  # -A (e_a - p)
    Array([[-1.,  1.]], dtype=float32)
    """
    a_distribution(distribution)
    if clip is not None:
        real("clip", clip, SHARE._replace(words="a number in (0, 1)", low_counts=False), or_="None for no limit")
    if divergence is not None:
        real("divergence", divergence, POSITIVE, or_="None for no limit")
    return PolicyLoss(distribution, clip, real("entropy", entropy, NOT_NEGATIVE), divergence)
