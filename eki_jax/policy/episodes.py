"""Episodes as a black box: parameters in, the rewards of whole episodes out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from eki_jax._checks import flag, function, whole
from eki_jax._types import Array, ForwardFn, Params
from eki_jax.policy.distributions import Distribution, a_distribution
from eki_jax.policy.environments import Environment, check_environment
from eki_jax.policy.rollouts import play


def episodes(
    environment: Environment,
    forward: ForwardFn,
    distribution: Distribution,
    parts: int = 1,
    *,
    most_steps: int | None = None,
    greedy: bool = True,
    violations: Callable[[Any], Array] | None = None,
) -> Callable[[Params, Array], Array]:
    """A model whose outputs are an episode's rewards by time, for any solver: no more need be known of it.

    An episode is cut into ``parts`` of equal length, and the rewards of each are summed. With
    :func:`eki_jax.squared_error` and targets that are the most a part can give, ensemble Kalman inversion and natural
    steps go towards the best return. What a part of time tells is much less than what each action tells
    (:func:`eki_jax.policy.natural_policy_gradient`); it is for those who see no more.

    Args:
        environment: the environment.
        forward: function ``forward(params, observations) -> outputs`` of the policy.
        distribution: distribution of the actions, given the outputs.
        parts: number of parts of an episode, and of outputs.
        most_steps: number of steps to look at; by default those that the environment allows.
        greedy: flag; True takes the likeliest actions, False draws them.
        violations: function ``violations(observations (B, ...)) -> (B, C)`` of how far limits are exceeded, such as
            ``jnp.maximum(jnp.abs(x) - limit, 0)``, whose sums over the episode are outputs too; their targets are zero.

    Returns:
        ``model(params, keys) -> rewards``: for keys (B,) of B episodes the rewards, shape (B, parts), in units of
        reward, and behind them the C sums of violations. All particles should be given the same keys, as all steps of
        a solver do: then they differ by what they do, not by luck.

    Raises:
        TypeError, ValueError: arguments of another kind, or out of range.

    >>> import jax, jax.numpy as jnp
    >>> from eki_jax.policy import categorical, from_gymnax
    >>> model = episodes(from_gymnax("CartPole-v1"), lambda params, x: x @ params, categorical(), 5)
    >>> model(jnp.zeros((4, 2)), jax.random.split(jax.random.key(0), 2)).shape
    (2, 5)
    """
    check_environment(environment), a_distribution(distribution)
    function("forward", forward, "a policy, forward(params, observations) -> outputs", arguments=2)
    whole("parts", parts), flag("greedy", greedy)
    pick = (lambda key, outputs: distribution.mode(outputs)) if greedy else distribution.sample

    def model(params: Params, keys: Any) -> Array:
        choose = lambda observations, key: pick(key, forward(params, observations))
        return play(environment, choose, keys, most_steps, parts, violations)[1]

    return model
