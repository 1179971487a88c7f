"""The zoo's models as functions of a pytree, with no library of layers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks.models.entry import CLASSES, Instance, taught
from benchmarks.models.inputs import LENGTH, VOCABULARY, images, sequences, tokens, vectors
from eki_jax.flax import quantized

Params = dict[str, Any]


def layers(*sizes: int, name: str = "") -> dict[str, tuple[int, ...]]:
    """Shapes of the matrices and biases of dense layers."""
    pairs = list(itertools.pairwise(sizes))
    return {f"{name}w{i}": (n, m) for i, (n, m) in enumerate(pairs)} | {
        f"{name}b{i}": (m,) for i, (_, m) in enumerate(pairs)
    }


def drawn(shapes: dict[str, tuple[int, ...]], key: jax.Array) -> Params:
    """Parameters whose products have outputs of order one."""
    keys = dict(zip(shapes, jax.random.split(key, len(shapes)), strict=True))
    fan_in = {name: math.prod(shape[:-1]) for name, shape in shapes.items()}
    return {name: jax.random.normal(keys[name], shape) / fan_in[name] ** 0.5 for name, shape in shapes.items()}


def fit(forward: Any, shapes: dict[str, tuple[int, ...]], x: Any, *loss: Any) -> Instance:
    """A function as it is."""
    return taught(forward, lambda key: drawn(shapes, key), x, *loss)


def dense(p: Params, x: jax.Array) -> jax.Array:
    """Two dense layers."""
    return jnp.tanh(x @ p["w0"] + p["b0"]) @ p["w1"] + p["b1"]


def compiled(p: Params, x: jax.Array) -> jax.Array:
    """The first layer under ``jax.jit``."""
    return jax.jit(lambda w, b, x: jnp.tanh(x @ w + b))(p["w0"], p["b0"], x) @ p["w1"] + p["b1"]


def rematerialised(p: Params, x: jax.Array) -> jax.Array:
    """The first layer under ``jax.checkpoint``."""
    return jax.checkpoint(lambda w, b, x: jnp.tanh(x @ w + b))(p["w0"], p["b0"], x) @ p["w1"] + p["b1"]


def mapped(p: Params, x: jax.Array) -> jax.Array:
    """A function of one sample under ``jax.vmap``."""
    return jax.vmap(lambda row: p["w1"].T @ jnp.tanh(p["w0"].T @ row + p["b0"]) + p["b1"])(x)


def columns(p: Params, x: jax.Array) -> jax.Array:
    """Matrices on the left, as books have them: ``W x`` with samples in columns."""
    return (p["v"] @ jnp.tanh(p["u"] @ x.T + p["b"][:, None])).T


def twice(p: Params, x: jax.Array) -> jax.Array:
    """The same layers for two parts of a sample."""
    return dense(p, x[:, :2]) - dense(p, x[:, 2:])


def experts(p: Params, x: jax.Array) -> jax.Array:
    """Each sample by the expert that its largest gate names: the expert's matrix is looked up."""
    shares = jax.nn.softmax(x @ p["gate"])
    chosen = jnp.argmax(shares, axis=-1)
    share = jnp.take_along_axis(shares, chosen[:, None], axis=-1)
    return share * jnp.tanh(jnp.einsum("bi,bij->bj", x, p["experts"][chosen]))


def scanned(p: Params, x: jax.Array) -> jax.Array:
    """Three layers stacked in one leaf, under ``lax.scan``."""
    x, _ = lax.scan(lambda x, w: (x + jnp.tanh(x @ w), None), x, p["stack"])
    return x @ p["w"]


def attention(p: Params, tokens: jax.Array) -> jax.Array:
    """Causal attention by ``jnp.einsum``, with the embedding as the last matrix."""
    x = p["embedding"][tokens] + p["positions"]
    q, k, v = (jnp.einsum("btn,nhd->bthd", x, p[name]) for name in "qkv")
    scores = jnp.einsum("bthd,bshd->bhts", q, k) / 2
    scores = jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -1e9)
    x = x + jnp.einsum("bhts,bshd,hdn->btn", jax.nn.softmax(scores), v, p["out"])
    return x @ p["embedding"].T


def spiking(p: Params, x: jax.Array) -> jax.Array:
    """Units that leak, and spike above a half, with a recurrent matrix, under ``lax.scan``."""

    def step(carry: Any, current: jax.Array) -> Any:
        voltage, spikes = carry
        voltage = 0.8 * voltage * (1 - spikes) + current @ p["w"] + spikes @ p["r"]
        spikes = jnp.heaviside(voltage - 0.5, 0.0)
        return (voltage, spikes), spikes

    start = jnp.zeros((len(x), p["w"].shape[1]))
    _, spikes = lax.scan(step, (start, start), jnp.moveaxis(x, 1, 0))
    return spikes.mean(axis=0) @ p["v"]


def rounded(p: Params, x: jax.Array) -> jax.Array:
    """Weights that are 8-bit integers times one step."""
    return dense({name: quantized(value) for name, value in p.items()}, x)


def convolution(p: Params, x: jax.Array) -> jax.Array:
    """A convolution by ``lax``, and a product with its flattened outputs."""
    y = lax.conv_general_dilated(x, p["kernel"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return jnp.tanh(y).reshape(len(x), -1) @ p["w"]


def heads(p: Params, x: jax.Array) -> dict[str, jax.Array]:
    """Two outputs under names."""
    x = jnp.tanh(x @ p["w"] + p["b"])
    return {"place": x @ p["place"], "shape": x @ p["shape"]}


def two_inputs(p: Params, x: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Two inputs in a tuple."""
    return jnp.tanh(x[0] @ p["left"] + x[1] @ p["right"]) @ p["w"]


def half_precision() -> Instance:
    """Parameters and products in bfloat16."""
    x = vectors().astype(jnp.bfloat16)
    init = lambda key: jax.tree.map(lambda w: w.astype(jnp.bfloat16), drawn(layers(4, 6, 3), key))
    return taught(dense, init, x)


_ATTENTION: dict[str, tuple[int, ...]] = {
    "embedding": (VOCABULARY, 8),
    "positions": (LENGTH, 8),
    **dict.fromkeys("qkv", (8, 2, 4)),
    "out": (2, 4, 8),
}
_DENSE = layers(4, 6, 3)

MODELS: dict[str, Callable[[], Instance]] = {
    "dense network": lambda: fit(dense, _DENSE, vectors(), CLASSES),
    "convolutional network": lambda: fit(convolution, {"kernel": (3, 3, 2, 4), "w": (16, 3)}, images(size=4)),
    "decoder transformer, tied": lambda: fit(attention, _ATTENTION, tokens(), CLASSES),
    "experts, top-1 routing": lambda: fit(experts, {"gate": (4, 3), "experts": (3, 4, 3)}, vectors()),
    "stacked layers, scanned": lambda: fit(scanned, {"stack": (3, 4, 4), "w": (4, 2)}, vectors()),
    "rematerialised layers": lambda: fit(rematerialised, _DENSE, vectors()),
    "compiled layers": lambda: fit(compiled, _DENSE, vectors()),
    "mapped over samples": lambda: fit(mapped, _DENSE, vectors()),
    "matrix on the left": lambda: fit(columns, {"u": (6, 4), "v": (3, 6), "b": (6,)}, vectors()),
    "called twice": lambda: fit(twice, layers(2, 6, 2), vectors()),
    "spiking units": lambda: fit(spiking, {"w": (3, 8), "r": (8, 8), "v": (8, 2)}, sequences()),
    "8-bit weights": lambda: fit(rounded, _DENSE, vectors()),
    "dictionary of outputs": lambda: fit(heads, {"w": (4, 6), "b": (6,), "place": (6, 2), "shape": (6, 3)}, vectors()),
    "tuple of inputs": lambda: fit(
        two_inputs, {"left": (4, 5), "right": (3, 5), "w": (5, 2)}, (vectors(), vectors()[:, :3])
    ),
    "bfloat16 parameters": half_precision,
}
NOTES = {
    "decoder transformer, tied": "jnp.einsum",
    "experts, top-1 routing": "looked up by sample",
    "stacked layers, scanned": "lax.scan",
    "rematerialised layers": "jax.checkpoint",
    "compiled layers": "jax.jit",
    "mapped over samples": "jax.vmap",
    "matrix on the left": "w @ x",
    "spiking units": "recurrent",
}
