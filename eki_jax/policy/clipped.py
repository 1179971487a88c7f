"""Proximal policy optimization whose derivative of the policy is never taken."""

from __future__ import annotations

from typing import Any, Unpack

import jax.numpy as jnp

from eki_jax._checks import function, offers
from eki_jax._types import ForwardFn, Schedule
from eki_jax.losses.logits import mean_over_samples
from eki_jax.natural import learned_feedback, natural_gradient, per_sample
from eki_jax.policy.distributions import Distribution
from eki_jax.policy.environments import Environment, check_environment
from eki_jax.policy.learner import Learner, LearnerSettings, Part, learner
from eki_jax.policy.loss import policy_loss


def clipped_policy_gradient(
    environment: Environment,
    forward: ForwardFn,
    distribution: Distribution,
    value: ForwardFn,
    optimizer: Any,
    *,
    particles: int = 8,
    sigma: Schedule = 0.05,
    clip: Any = 0.2,
    entropy: Any = 0.0,
    epochs: int = 4,
    batches: int = 8,
    **settings: Unpack[LearnerSettings],
) -> Learner:
    r"""Proximal policy optimization without derivatives: clipped ratios, and gradients from noise inside of the model.

    Every state that was visited has noise of its own in every layer (:func:`eki_jax.natural.per_sample`, with feedback
    that is learned), so that few particles find nearly the gradient that backpropagation would. It goes to an
    optimizer, for the policy and for the critic.

    Args:
        environment: the environment, :func:`from_gymnax` or one of your own.
        forward: function ``forward(params, observations (B, ...)) -> outputs`` of the policy, whose layers act on each
            observation alone.
        distribution: distribution of the actions, given the outputs, :func:`categorical` or :func:`normal`.
        value: function ``value(params, observations) -> values (B,)`` of the critic.
        optimizer: transformation of the gradient, such as ``optax.adam(1e-3)``: anything with ``init(params)`` and
            ``update(gradient, state, params)``. Policy and critic have a state each.
        particles: number J >= 2 of forward passes of each state with noise.
        sigma: scale of the noise, relative to what a layer returns, > 0, or a schedule of the step count.
        clip: largest change of a probability's ratio that is rewarded, in (0, 1).
        entropy: factor of the entropy in the loss.
        epochs: number of times that an iteration's states are used.
        batches: number of mini-batches of an epoch.
        **settings: keywords of :func:`learner`, see :class:`LearnerSettings`.

    Returns:
        A :class:`Learner`.

    Raises:
        TypeError, ValueError: arguments of another kind, or out of range.

    Source: Schulman et al., *Proximal policy optimization algorithms* (2017); the estimate of the gradient is described
    in :mod:`eki_jax.natural.estimates.gradient`.

    >>> import jax, jax.numpy as jnp, optax
    >>> from eki_jax.policy import categorical, from_gymnax
    >>> value = lambda params, x: (x @ params)[:, 0]
    >>> agent = clipped_policy_gradient(
    ...     from_gymnax("CartPole-v1"), lambda params, x: x @ params, categorical(), value, optax.adam(1e-2),
    ...     steps=32, copies=8, epochs=1, batches=2,
    ... )
    >>> state = agent.init(jnp.zeros((4, 2)), jnp.zeros((4, 1)), jax.random.key(0))
    >>> state, info = jax.jit(agent.step)(state)
    >>> bool(info.moved)
    True
    """
    offers("optimizer", optimizer, ("init", "update"), "an optimizer, such as optax.adam(1e-3)")
    function("value", value, "a critic, value(params, observations)", arguments=2)
    example = jnp.zeros((1, *check_environment(environment).observation_shape))

    def part(model: ForwardFn, loss: Any) -> Part:
        noise = per_sample(feedback=learned_feedback(example))
        solver = natural_gradient(model, loss, particles, sigma, deviations=noise, optimizer=optimizer)
        return Part(model, solver, epochs, batches)

    squares = mean_over_samples(lambda z, y: 0.5 * (z - y) ** 2)
    actor = part(forward, policy_loss(distribution, clip=clip, entropy=entropy))
    return learner(environment, distribution, actor, part(value, squares), **settings)
