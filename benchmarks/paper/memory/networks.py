"""Recurrent networks: a plain one, and three whose start or gates are made for memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.paper.memory.tasks import Task


class Network(NamedTuple):
    """A network of one layer.

    Attributes:
        start: function ``start(key) -> params`` that draws where training begins.
        forward: function ``forward(params, x) -> outputs`` at the last places that count, shape (N, outputs), or
            (N, places, outputs) where several do.
    """

    start: Callable[[jax.Array], Any]
    forward: Callable[[Any, jax.Array], jax.Array]


class Kind(NamedTuple):
    """A kind of network.

    Attributes:
        label: its name in the table.
        units: number of its units, so that all have about 350 parameters; a task may want some times as many.
    """

    label: str
    units: int


KINDS = {
    "tanh": Kind("tanh", 16),
    "orthogonal": Kind("tanh, orthogonal start", 16),
    "identity": Kind("ReLU, identity start", 16),
    "lstm": Kind("LSTM", 8),
}


def build(kind: str, task: Task, length: int) -> Network:
    """A network for a task.

    The recurrent matrix of a plain network begins as Gaussian numbers of variance 1/units, as an orthogonal matrix, or
    as the identity with rectifiers (Le, Jaitly and Hinton, arXiv:1504.00941). The gates of the LSTM keep what they hold
    for times between 1 and the length (Tallec and Ollivier, arXiv:1804.11188).

    >>> from benchmarks.paper.memory.tasks import adding
    >>> network = build("lstm", adding(10), 10)
    >>> params = network.start(jax.random.key(0))
    >>> sum(leaf.size for leaf in jax.tree.leaves(params)), network.forward(params, jnp.zeros((3, 10, 2))).shape
    (361, (3, 1))
    """
    units = KINDS[kind].units * task.scale
    cell = _lstm if kind == "lstm" else _plain(jax.nn.relu if kind == "identity" else jnp.tanh)
    size = 2 if kind == "lstm" else 1  # arrays of a state

    def start(key: jax.Array) -> Any:
        of_inputs, of_state, of_outputs, of_gates = jax.random.split(key, 4)
        gaussian = lambda key, *shape: jax.random.normal(key, shape) / math.sqrt(units)
        columns = 4 * units if kind == "lstm" else units
        if kind == "identity":
            recurrent = jnp.eye(units)
        elif kind == "orthogonal":
            recurrent = jax.random.orthogonal(of_state, units)
        else:
            recurrent = gaussian(of_state, units, columns)
        bias = jnp.zeros(columns)
        if kind == "lstm":
            times = jnp.log(jax.random.uniform(of_gates, (units,), minval=1.0, maxval=length - 1.0))
            bias = jnp.concatenate([-times, times, jnp.zeros(2 * units)])
        return {
            "inputs": gaussian(of_inputs, task.inputs, columns),
            "recurrent": recurrent,
            "bias": bias,
            "outputs": gaussian(of_outputs, units, task.outputs),
            "shift": jnp.zeros(task.outputs),
        }

    def forward(params: Any, x: jax.Array) -> jax.Array:
        move = lambda state, entry: (cell(params, state, entry), None)
        show = lambda state, entry: 2 * (cell(params, state, entry),)
        places = jnp.swapaxes(x, 0, 1)
        state, _ = jax.lax.scan(move, size * (jnp.zeros((len(x), units)),), places[: -task.read])
        _, seen = jax.lax.scan(show, state, places[-task.read :])
        outputs = jnp.swapaxes(seen[0] @ params["outputs"] + params["shift"], 0, 1)
        return outputs[:, 0] if task.read == 1 else outputs

    return Network(start, forward)


def _plain(activation: Callable[[jax.Array], jax.Array]) -> Any:
    def cell(params: Any, state: Any, x: jax.Array) -> Any:
        return (activation(state[0] @ params["recurrent"] + x @ params["inputs"] + params["bias"]),)

    return cell


def _lstm(params: Any, state: Any, x: jax.Array) -> Any:
    hidden, kept = state
    let_in, keep, new, show = jnp.split(
        hidden @ params["recurrent"] + x @ params["inputs"] + params["bias"], 4, axis=-1
    )
    kept = jax.nn.sigmoid(keep) * kept + jax.nn.sigmoid(let_in) * jnp.tanh(new)
    return jax.nn.sigmoid(show) * jnp.tanh(kept), kept
