"""Calls of what learns policies, in an environment of a line."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from fuzz.calls import KEYED, Call, made
from policy.lines import LINE, forward, value

from eki_jax import natural, policy

CHOICES = policy.categorical()
ENVIRONMENT, DISTRIBUTION = ("objects", LINE), ("objects", CHOICES)
POLICY, VALUE, ACT = ("function", forward), ("function", value), ("params", np.zeros((2, 2), np.float32))
COPIES, FEW = ("whole", 2), ("whole", 3)
OUTPUTS = np.array([[0.3, -0.2], [0.1, 0.4]], np.float32)
VISITED = policy.Visited(
    np.array([0, 1]), np.array([1.0, -0.5], np.float32), np.log(np.array([0.5, 0.5], np.float32)), np.zeros((2, 2))
)
REWARDS = np.array([1.0, -0.5, 2.0], np.float32)
ENDED = np.array([False, True, False])
LOSS = policy.policy_loss(CHOICES)
PART = policy.Part(forward, natural.natural_gradient(forward, LOSS, 4))


def loss(**settings: Any) -> Any:
    return jax.value_and_grad(policy.policy_loss(**settings))(jnp.asarray(OUTPUTS), VISITED)


def learned(make: Any) -> Any:
    """The steps of an iteration of a learner that a function makes."""
    return lambda **settings: made(make, **settings).steps


def collected(params: Any, key: Any, steps: Any, environment: Any, forward: Any, distribution: Any) -> Any:
    running = policy.start(LINE, jax.random.key(0), 2)
    return policy.collect(environment, forward, distribution, params, running, key, steps)[0].rewards


def modelled(environment: Any, forward: Any, distribution: Any, parts: Any, most_steps: Any, greedy: Any) -> Any:
    settings = {"most_steps": most_steps, "greedy": greedy}
    keys = jax.random.split(jax.random.key(0), 2)
    return policy.episodes(environment, forward, distribution, parts, **settings)(jnp.zeros((2, 2)), keys)


made_of = {"environment": ENVIRONMENT, "distribution": DISTRIBUTION, "copies": COPIES, "steps": FEW}
factors = {"discount": ("share", 0.5), "decay": ("share", 0.5)}
fine = dict.fromkeys(factors, ("1", "1 of JAX"))
POLICIES: dict[str, Call] = {
    "policy.policy_loss": Call(
        loss,
        {
            "distribution": DISTRIBUTION,
            "clip": ("share", 0.2),
            "entropy": ("not negative", 0.1),
            "divergence": ("positive", 1.0),
        },
        fine={"clip": ("None",), "divergence": ("None",)},
    ),
    "policy.generalized_advantages": Call(
        lambda rewards, values, discount, decay: policy.generalized_advantages(
            rewards, values, values, np.zeros(3, bool), ENDED, discount, decay
        ),
        {"rewards": ("vector", REWARDS), "values": ("vector", 2 * REWARDS), **factors},
        fine=fine,
    ),
    "policy.returns_to_go": Call(
        lambda rewards, discount: policy.returns_to_go(rewards, ENDED, discount),
        {"rewards": ("vector", REWARDS), "discount": ("share", 0.5)},
        fine={"discount": fine["discount"]},
    ),
    "policy.learner": Call(learned(policy.learner), {**made_of, "actor": ("objects", PART), **factors}, fine=fine),
    "policy.natural_policy_gradient": Call(
        learned(policy.natural_policy_gradient),
        {
            **made_of,
            "forward": POLICY,
            "value": VALUE,
            "particles": ("whole", 4),
            "sigma": ("positive", 0.1),
            "damping": ("positive", 0.1),
            "divergence": ("positive", 0.1),
            "entropy": ("not negative", 0.1),
            "critic_damping": ("positive", 0.1),
            "critic_epochs": ("whole", 2),
        },
    ),
    "policy.clipped_policy_gradient": Call(
        learned(policy.clipped_policy_gradient),
        {
            **made_of,
            "forward": POLICY,
            "value": VALUE,
            "optimizer": ("objects", optax.sgd(0.1)),
            "particles": ("whole", 4),
            "sigma": ("positive", 0.1),
            "clip": ("share", 0.2),
            "entropy": ("not negative", 0.1),
            "epochs": ("whole", 2),
            "batches": ("whole", 2),
        },
        fine={"clip": ("None",)},
    ),
    "policy.start": Call(
        lambda environment, key, copies: policy.start(environment, key, copies).observations,
        {"environment": ENVIRONMENT, "key": KEYED, "copies": COPIES},
    ),
    "policy.collect": Call(
        collected,
        {
            "environment": ENVIRONMENT,
            "forward": POLICY,
            "distribution": DISTRIBUTION,
            "params": ACT,
            "key": KEYED,
            "steps": FEW,
        },
        fine={"params": ("complex", "integers", "NaN", "infinity")},
    ),
    "policy.play": Call(
        lambda environment, choose, most_steps, parts: policy.play(
            environment, choose, jax.random.split(jax.random.key(0), 2), most_steps, parts
        )[1],
        {
            "environment": ENVIRONMENT,
            "choose": ("function", lambda x, key: jnp.ones(len(x), int)),
            "most_steps": FEW,
            "parts": ("whole", 2),
        },
        is_random=True,
        fine={"most_steps": ("None",)},
    ),
    "policy.evaluate": Call(
        lambda greedy, **arguments: policy.evaluate(**arguments, params=jnp.zeros((2, 2)), greedy=greedy).returns,
        {
            "environment": ENVIRONMENT,
            "forward": POLICY,
            "distribution": DISTRIBUTION,
            "key": KEYED,
            "episodes": COPIES,
            "greedy": ("flag", False),
        },
        is_random=True,
    ),
    "policy.episodes": Call(
        modelled,
        {
            "environment": ENVIRONMENT,
            "forward": POLICY,
            "distribution": DISTRIBUTION,
            "parts": ("whole", 2),
            "most_steps": FEW,
            "greedy": ("flag", True),
        },
        is_random=True,
        fine={"most_steps": ("None",)},
    ),
    "policy.from_gymnax": Call(lambda name: policy.from_gymnax(name).most_steps, {"name": ("choice", "CartPole-v1")}),
}
