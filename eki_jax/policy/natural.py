"""Trust-region policy optimization whose derivative of the policy is never taken."""

from __future__ import annotations

from typing import Any, Unpack

from eki_jax._checks import POSITIVE, function, real, schedule, whole
from eki_jax._types import ForwardFn, Schedule
from eki_jax.losses.logits import mean_over_samples
from eki_jax.natural import AdaptiveDamping, Deviations, low_rank, natural_gradient
from eki_jax.natural.direction import Estimate
from eki_jax.policy.distributions import Distribution
from eki_jax.policy.environments import Environment
from eki_jax.policy.learner import Learner, LearnerSettings, Part, learner
from eki_jax.policy.loss import policy_loss

_SLACK = 1.5  # of the divergence of a step: what its second-order model may be wrong by


def natural_policy_gradient(
    environment: Environment,
    forward: ForwardFn,
    distribution: Distribution,
    value: ForwardFn | None = None,
    *,
    particles: int = 200,
    sigma: Schedule = 0.1,
    damping: Schedule = 1e-6,
    deviations: Deviations = low_rank(1),  # noqa: B008
    estimate: Estimate | None = None,
    divergence: Any = 0.01,
    entropy: Any = 0.0,
    critic_damping: Schedule = 1e-5,
    critic_epochs: int = 5,
    **settings: Unpack[LearnerSettings],
) -> Learner:
    r"""The natural policy gradient from an ensemble: policies without derivatives, with a trust region.

    Particles around the policy's parameters are evaluated on the states that were visited. The step is the natural one
    in the span of their deviations, with the advantages' cotangents and the actions' Fisher matrix in the policy's
    outputs (:func:`policy_loss`), and no longer than a divergence of the policies before and after. Sign networks and
    rounded weights learn as other networks do, lists of rules more slowly. The critic takes Gauss-Newton steps of the
    same kind towards the returns.

    Args:
        environment: the environment, :func:`from_gymnax` or one of your own.
        forward: function ``forward(params, observations (B, ...)) -> outputs`` of the policy.
        distribution: distribution of the actions, given the outputs, :func:`categorical` or :func:`normal`.
        value: function ``value(params, observations) -> values (B,)`` of the critic; None for returns to go.
        particles: number J >= 2 of particles of either ensemble.
        sigma: scale of the deviations, > 0, or a schedule of the step count.
        damping: lambda > 0 of the policy's steps, or a schedule; small, since the trust region limits steps.
        deviations: kind of deviations, :func:`eki_jax.natural.low_rank` or :func:`eki_jax.natural.full_rank`.
        estimate: way to estimate the direction, see :func:`eki_jax.natural.natural_gradient`.
        divergence: largest mean Kullback-Leibler divergence of an iteration's step, to second order, in nats.
        entropy: factor of the entropy in the loss.
        critic_damping: lambda > 0 of the critic's steps, or a schedule.
        critic_epochs: number of the critic's steps in an iteration.
        **settings: keywords of :func:`learner`, see :class:`LearnerSettings`.

    Returns:
        A :class:`Learner`.

    Raises:
        TypeError, ValueError: arguments of another kind, or out of range.

    Source: the natural policy gradient (Kakade, 2001) and trust regions (Schulman et al., *Trust region policy
    optimization*, 2015), with the particles' covariance of parameters and outputs in the place of derivatives.

    >>> import jax, jax.numpy as jnp
    >>> from eki_jax.policy import categorical, from_gymnax
    >>> agent = natural_policy_gradient(
    ...     from_gymnax("CartPole-v1"), lambda params, x: x @ params, categorical(), particles=20, steps=64, copies=8
    ... )
    >>> state = agent.init(jnp.zeros((4, 2)), None, jax.random.key(0))
    >>> state, info = jax.jit(agent.step)(state)
    >>> bool(info.moved), int(state.episodes) > 0
    (True, True)
    """
    real("divergence", divergence, POSITIVE)
    # The constraint holds to second order, by what the particles say; that loss asks the policy itself.
    loss = policy_loss(distribution, entropy=entropy, divergence=_SLACK * divergence)
    solver = natural_gradient(
        forward, loss, particles, sigma, damping, deviations, estimate=estimate, norm_constraint=2 * divergence
    )
    critic = None
    if value is not None:
        function("value", value, "a critic, value(params, observations)", arguments=2)
        if not isinstance(critic_damping, AdaptiveDamping):
            schedule("critic_damping", critic_damping, POSITIVE)
        squares = mean_over_samples(lambda z, y: 0.5 * (z - y) ** 2)
        towards = natural_gradient(value, squares, particles, sigma, critic_damping, deviations, estimate=estimate)
        critic = Part(value, towards, whole("critic_epochs", critic_epochs))
    return learner(environment, distribution, Part(forward, solver), critic, **settings)
