"""The networks of the papers, as shapes: what a step costs does not depend on the images."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from eki_jax import flax as models

WIDTHS = {
    "dnn1": (784, 10),
    "dnn2": (784, 100, 10),
    "dnn3": (784, 300, 100, 10),
    "dnn4": (784, 500, 300, 100, 10),
}
_MODULES = {"cnn-mnist": models.cnn_mnist, "rnn": models.TanhRNN}
_INPUTS = {"cnn-mnist": (28, 28, 1), "rnn": (28, 28)}
BATCH = 600


def build(name: str, batch: int = BATCH) -> tuple[Any, Any, tuple[jax.Array, jax.Array]]:
    """``(forward, template, (x, labels))`` with inputs and labels drawn at random; the outputs are probabilities."""
    module, (x, labels) = _drawn(name, batch)
    return *models.linen_forward(module, x), (x, labels)


def build_logits(name: str, batch: int = BATCH) -> tuple[Any, Any, tuple[jax.Array, jax.Array]]:
    """The same with logits as outputs, and for deviations of low rank."""
    module, (x, labels) = _drawn(name, batch)
    return *models.low_rank_forward(module, x, method="logits"), (x, labels)


def _drawn(name: str, batch: int) -> tuple[Any, tuple[jax.Array, jax.Array]]:
    module = models.dense_network(WIDTHS[name][1:]) if name in WIDTHS else _MODULES[name]()
    shape = WIDTHS[name][:1] if name in WIDTHS else _INPUTS[name]
    x = jax.random.normal(jax.random.key(1), (batch, *shape))
    return module, (x, jax.random.randint(jax.random.key(2), (batch,), 0, 10))


def parameters(template: Any) -> int:
    """The number of parameters of one particle."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(template))


def forward_operations(name: str, batch: int = BATCH) -> int:
    """Operations of one particle's forward pass: its products with the weights, two for each multiplication."""
    forward, template, (x, _) = build(name, batch)
    jaxpr = jax.make_jaxpr(forward)(template, jax.ShapeDtypeStruct(x.shape, jnp.float32))
    return _operations(jaxpr.jaxpr)


def _operations(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            total += times * _operations(inner) if hasattr(inner, "eqns") else 0
        out = math.prod(equation.outvars[0].aval.shape)
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            total += 2 * out * math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
        elif equation.primitive.name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            channels = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
            total += 2 * out * math.prod(kernel) // channels
    return total
