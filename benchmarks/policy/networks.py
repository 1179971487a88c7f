"""The policy and the critic that all methods have: layers of tanh or ReLU units; and policies without derivatives."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from eki_jax import flax as models
from eki_jax import policy


class Network(NamedTuple):
    """Policy and critic for one environment.

    Attributes:
        environment: the environment.
        distribution: what the policy's outputs say about the actions.
        init: function of a key that returns the policy's parameters.
        forward: function ``forward(params, observations) -> outputs`` of the policy.
        init_critic: function of a key that returns the critic's parameters.
        value: function ``value(params, observations) -> values``.
    """

    environment: policy.Environment
    distribution: policy.Distribution
    init: Callable[[jax.Array], Any]
    forward: Callable[[Any, Any], Any]
    init_critic: Callable[[jax.Array], Any]
    value: Callable[[Any, Any], Any]


# Of a list of rules.
RULES = 8


def build(name: str, widths: tuple[int, ...], kind: str = "tanh") -> Network:
    """The network of an environment of gymnax.

    Args:
        name: name of the environment.
        widths: hidden units.
        kind: policy: of "tanh" or "relu" units, which the critic has too, and any environment; or where actions are
            choices of "sign" units, of "int8" weights, or a list of "rules", beside a critic of tanh units.
    """
    environment = policy.from_gymnax(name)
    inputs = math.prod(environment.observation_shape)
    units, start = (jax.nn.relu, _orthogonal) if kind == "relu" else (jnp.tanh, _start)
    layers = lambda params, x: _layers(params, x, units)
    if environment.choices is not None:
        sizes = (inputs, *widths, environment.choices)
        kinds: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
            **dict.fromkeys(("tanh", "relu"), (lambda key: start(key, sizes, 0.01), layers)),
            "sign": (lambda key: _start(key, sizes, 0.01), lambda params, x: _layers(params, x, models.sign)),
            "int8": (
                lambda key: _start(key, sizes, 0.01),
                lambda params, x: layers(jax.tree.map(models.quantized, params), x),
            ),
            "rules": (lambda key: _start_rules(key, inputs, environment.choices), _rules),
        }
        init, forward = kinds[kind]
        return Network(
            environment,
            policy.categorical(),
            init,
            forward,
            lambda key: start(key, (inputs, *widths, 1), 1.0),
            lambda params, x: layers(params, x)[:, 0],
        )
    sizes = (inputs, *widths, math.prod(environment.action_shape))

    def forward(params: Any, x: Any) -> Any:
        mean = layers(params["mean"], x)
        return mean, jnp.broadcast_to(params["log_scale"], mean.shape)

    return Network(
        environment,
        policy.normal(),
        lambda key: {"mean": start(key, sizes, 0.01), "log_scale": jnp.zeros(sizes[-1])},
        forward,
        lambda key: start(key, (inputs, *widths, 1), 1.0),
        lambda params, x: layers(params, x)[:, 0],
    )


def _start(key: jax.Array, sizes: tuple[int, ...], last: float) -> list[Any]:
    """Matrices of variance one over their inputs, the last one smaller, and no biases."""
    params = []
    for index, (rows, columns) in enumerate(itertools.pairwise(sizes)):
        scale = (last if index == len(sizes) - 2 else 1.0) / math.sqrt(rows)
        w = scale * jax.random.normal(jax.random.fold_in(key, index), (rows, columns))
        params.append({"w": w, "b": jnp.zeros(columns)})
    return params


def _orthogonal(key: jax.Array, sizes: tuple[int, ...], last: float) -> list[Any]:
    """Orthogonal matrices that keep the variance behind rectified units, the last one of another scale; no biases."""
    params = []
    for index, (rows, columns) in enumerate(itertools.pairwise(sizes)):
        scale = last if index == len(sizes) - 2 else math.sqrt(2)
        w = jax.nn.initializers.orthogonal(scale)(jax.random.fold_in(key, index), (rows, columns))
        params.append({"w": w, "b": jnp.zeros(columns)})
    return params


def _start_rules(key: jax.Array, inputs: int, choices: int) -> dict[str, jax.Array]:
    """Planes through the middle; after each of them, and after the last, all actions are as likely."""
    planes = jax.random.normal(key, (inputs, RULES)) / math.sqrt(inputs)
    return {"planes": planes, "offsets": jnp.zeros(RULES), "logits": jnp.zeros((RULES + 1, choices))}


def _rules(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """The logits of the first rule that holds, or of none: *if x is beyond this plane, then ..., else if*."""
    holds = x.reshape(len(x), -1) @ params["planes"] + params["offsets"] > 0
    always = jnp.ones((len(x), 1), bool)
    return params["logits"][jnp.argmax(jnp.concatenate([holds, always], axis=1), axis=1)]


def _layers(params: list[Any], x: Any, activation: Callable[[Any], Any]) -> Any:
    x = x.reshape(len(x), -1)
    for layer in params[:-1]:
        x = activation(x @ layer["w"] + layer["b"])
    return x @ params[-1]["w"] + params[-1]["b"]
