"""The zoo's models in equinox: stock layers, which take one sample each, put together as people do."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax

from benchmarks.models.entry import CLASSES, SQUARES, Instance, taught
from benchmarks.models.inputs import LENGTH, VOCABULARY, images, sequences, tokens, vectors
from eki_jax.equinox import equinox_forward

WIDTH = 8
Make = Callable[[jax.Array], Any]


def fit(make: Make, x: Any, loss: Any = SQUARES, **options: Any) -> Instance:
    """A module as it is."""
    forward, _ = equinox_forward(make(jax.random.key(0)), **options)
    return taught(forward, partial(parameters, make), x, loss, is_keyed=bool(options.get("keyed")))


def parameters(make: Make, key: jax.Array) -> Any:
    """The arrays of a fresh module."""
    return eqx.filter(make(key), eqx.is_inexact_array)


def sequential(*layers: Any) -> Make:
    """A function from a key to ``eqx.nn.Sequential``: layers are waiting for theirs, functions are wrapped."""

    def make(key: jax.Array) -> Any:
        keys = jax.random.split(key, len(layers))
        made = [f(key=k) if isinstance(f, partial) else f for f, k in zip(layers, keys, strict=True)]
        return eqx.nn.Sequential([f if isinstance(f, eqx.Module) else eqx.nn.Lambda(f) for f in made])

    return make


def linears(key: jax.Array, *sizes: tuple[int, int]) -> list[eqx.nn.Linear]:
    """Dense layers from so many numbers to so many."""
    return [eqx.nn.Linear(n, m, key=k) for (n, m), k in zip(sizes, jax.random.split(key, len(sizes)), strict=True)]


def channels_first(**options: Any) -> jax.Array:
    """Images of shape (B, c, h, h)."""
    return jnp.moveaxis(images(**options), -1, 1)


def dense() -> Instance:
    """``eqx.nn.MLP``."""
    return fit(lambda key: eqx.nn.MLP(4, 3, 6, 1, key=key), vectors(), CLASSES)


def convolutional() -> Instance:
    """Two convolutions, each pooled, and a dense layer."""
    first, second = partial(eqx.nn.Conv2d, 2, 4, 3, padding=1), partial(eqx.nn.Conv2d, 4, 6, 3, padding=1)
    pool, last = eqx.nn.MaxPool2d(2, 2), partial(eqx.nn.Linear, 6, 3)
    return fit(
        sequential(first, jax.nn.relu, pool, second, jax.nn.relu, pool, jnp.ravel, last), channels_first(), CLASSES
    )


class Residual(eqx.Module):
    """A block of a residual network, with GroupNorm in the place of batch statistics."""

    convolutions: list[eqx.nn.Conv2d]
    norms: list[eqx.nn.GroupNorm]
    readout: eqx.nn.Linear

    def __init__(self, key: jax.Array) -> None:
        keys = jax.random.split(key, 4)
        widths = ((2, 4), (4, 4), (4, 4))
        self.convolutions = [
            eqx.nn.Conv2d(n, m, 3, padding=1, use_bias=False, key=k) for (n, m), k in zip(widths, keys[:3], strict=True)
        ]
        self.norms = [eqx.nn.GroupNorm(2, 4) for _ in range(2)]
        self.readout = eqx.nn.Linear(4, 3, key=keys[3])

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits (3,) of one image."""
        x = self.convolutions[0](x)
        y = self.convolutions[1](jax.nn.relu(self.norms[0](x)))
        y = self.convolutions[2](jax.nn.relu(self.norms[1](y)))
        return self.readout(jax.nn.relu(x + y).mean(axis=(1, 2)))


class BatchNormed(eqx.Module):
    """A hidden layer normalised over the batch."""

    first: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    last: eqx.nn.Linear

    def __init__(self, key: jax.Array) -> None:
        self.first, self.last = linears(key, (4, 6), (6, 3))
        self.norm = eqx.nn.BatchNorm(6, axis_name="batch", mode="batch")

    def __call__(self, x: jax.Array, state: eqx.nn.State) -> tuple[jax.Array, eqx.nn.State]:
        """Outputs (3,) of one sample, and the next statistics."""
        x, state = self.norm(self.first(x), state)
        return self.last(jax.nn.relu(x)), state


def batch_norm_training() -> Instance:
    """Statistics of the batch, and running ones that each call gives back."""
    module, state = eqx.nn.make_with_state(BatchNormed)(jax.random.key(0))
    forward, template, state = equinox_forward(module, state=state)
    # JAX 0.10 takes no mean over an axis of `jax.vmap`, such as this layer's, inside of `jax.shard_map`.
    return taught(forward, partial(redrawn, template), vectors(), state=state)._replace(driver="jit")


def batch_norm_eval() -> Instance:
    """Statistics as a call in training mode left them."""
    module, state = eqx.nn.make_with_state(BatchNormed)(jax.random.key(0))
    train, _, state = equinox_forward(module, state=state)
    _, state = train(eqx.filter(module, eqx.is_inexact_array), vectors(), state=state)
    forward, template, _ = equinox_forward(eqx.nn.inference_mode(module), state=state)
    return taught(lambda params, x: forward(params, x, state=state)[0], partial(redrawn, template), vectors())


def redrawn(template: Any, key: jax.Array) -> Any:
    """The arrays of a fresh module in the structure of another one, whose places for a state are its own."""
    fresh, _ = eqx.nn.make_with_state(BatchNormed)(key)
    return jax.tree.unflatten(jax.tree.structure(template), jax.tree.leaves(eqx.filter(fresh, eqx.is_inexact_array)))


def dropout() -> Instance:
    """A hidden layer of which a tenth is dropped, with a mask for each call and sample."""
    layers = [partial(eqx.nn.Linear, 4, 6), jnp.tanh, eqx.nn.Dropout(0.1), partial(eqx.nn.Linear, 6, 3)]
    return fit(sequential(*layers), vectors(), keyed=True)


def layer_norm() -> Instance:
    """LayerNorm between dense layers."""
    return fit(
        sequential(partial(eqx.nn.Linear, 4, 6), eqx.nn.LayerNorm(6), jnp.tanh, partial(eqx.nn.Linear, 6, 3)), vectors()
    )


def weight_norm() -> Instance:
    """A dense layer whose weights are a direction and a length."""

    def make(key: jax.Array) -> Any:
        first, last = linears(key, (4, 6), (6, 3))
        return eqx.nn.Sequential([eqx.nn.WeightNorm(first), eqx.nn.Lambda(jnp.tanh), last])

    return fit(make, vectors())


class Recurrent(eqx.Module):
    """A recurrent cell over time, read out at the end."""

    cell: Any
    readout: eqx.nn.Linear

    def __init__(self, cell: Any, key: jax.Array) -> None:
        first, last = jax.random.split(key)
        self.cell, self.readout = cell(3, 4, key=first), eqx.nn.Linear(4, 2, key=last)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Outputs (2,) of one sequence (T, n)."""
        start = jnp.zeros(4)
        start = (start, start) if isinstance(self.cell, eqx.nn.LSTMCell) else start
        end, _ = lax.scan(lambda carry, row: (self.cell(row, carry), None), start, x)
        return self.readout(end[0] if isinstance(end, tuple) else end)


class Decoder(eqx.Module):
    """A decoder transformer of one layer whose last matrix is the embedding."""

    embedding: eqx.nn.Embedding
    positions: jax.Array
    attention: eqx.nn.MultiheadAttention
    norms: list[eqx.nn.LayerNorm]
    hidden: eqx.nn.MLP

    def __init__(self, key: jax.Array) -> None:
        keys = jax.random.split(key, 4)
        self.embedding = eqx.nn.Embedding(VOCABULARY, WIDTH, key=keys[0])
        self.positions = 0.1 * jax.random.normal(keys[1], (LENGTH, WIDTH))
        self.attention = eqx.nn.MultiheadAttention(2, WIDTH, key=keys[2])
        self.norms = [eqx.nn.LayerNorm(WIDTH) for _ in range(3)]
        self.hidden = eqx.nn.MLP(WIDTH, WIDTH, 2 * WIDTH, 1, jax.nn.gelu, key=keys[3])

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits (T, V) of tokens (T,)."""
        x = jax.vmap(self.embedding)(tokens) + self.positions
        y = jax.vmap(self.norms[0])(x)
        x = x + self.attention(y, y, y, mask=jnp.tril(jnp.ones((LENGTH, LENGTH), bool)))
        x = x + jax.vmap(self.hidden)(jax.vmap(self.norms[1])(x))
        return jax.vmap(self.norms[2])(x) @ self.embedding.weight.T


class CrossAttention(eqx.Module):
    """Queries of a sequence that look at another one."""

    attention: eqx.nn.MultiheadAttention
    readout: eqx.nn.Linear

    def __init__(self, key: jax.Array) -> None:
        first, last = jax.random.split(key)
        sizes = {"query_size": 3, "key_size": 3, "value_size": 3, "output_size": 3, "qk_size": 2, "vo_size": 2}
        self.attention = eqx.nn.MultiheadAttention(2, **sizes, key=first)
        self.readout = eqx.nn.Linear(3, 2, key=last)

    def __call__(self, x: tuple[jax.Array, jax.Array]) -> jax.Array:
        """Outputs (2,) of two sequences."""
        queries, memory = x
        return self.readout(jnp.tanh(self.attention(queries, memory, memory))[-1])


def cross_attention() -> Instance:
    """Two sequences of different lengths."""
    memory = jax.random.normal(jax.random.key(7), (8, 4, 3))
    return fit(CrossAttention, (sequences(), memory))


class ScaledLinear(eqx.nn.Linear):
    """A dense layer of one's own, by inheritance."""

    def __call__(self, x: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """The layer's outputs, halved."""
        return 0.5 * super().__call__(x)


class Experts(eqx.Module):
    """A mixture of experts whose layers are stacked by ``eqx.filter_vmap``."""

    gate: eqx.nn.Linear
    experts: eqx.nn.Linear
    is_top_1: bool = eqx.field(static=True)

    def __init__(self, key: jax.Array, is_top_1: bool = False) -> None:
        first, second = jax.random.split(key)
        self.gate = eqx.nn.Linear(4, 3, key=first)
        self.experts = eqx.filter_vmap(lambda k: eqx.nn.Linear(4, 3, key=k))(jax.random.split(second, 3))
        self.is_top_1 = is_top_1

    def __call__(self, x: jax.Array) -> jax.Array:
        """Outputs (3,) of one sample."""
        shares = jax.nn.softmax(self.gate(x))
        if self.is_top_1:
            shares = shares * jax.nn.one_hot(jnp.argmax(shares), 3)
        found = eqx.filter_vmap(lambda expert, x: expert(x), in_axes=(eqx.if_array(0), None))(self.experts, x)
        return shares @ jnp.tanh(found)


class Scanned(eqx.Module):
    """Three layers stacked in one, under ``lax.scan``."""

    first: eqx.nn.Linear
    layers: eqx.nn.Linear
    last: eqx.nn.Linear

    def __init__(self, key: jax.Array) -> None:
        one, two, three = jax.random.split(key, 3)
        self.first, self.last = eqx.nn.Linear(4, 5, key=one), eqx.nn.Linear(5, 2, key=three)
        self.layers = eqx.filter_vmap(lambda k: eqx.nn.Linear(5, 5, key=k))(jax.random.split(two, 3))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Outputs (2,) of one sample."""
        arrays, rest = eqx.partition(self.layers, eqx.is_array)
        step = lambda x, layer: (x + jnp.tanh(eqx.combine(layer, rest)(x)), None)
        x, _ = lax.scan(step, self.first(x), arrays)
        return self.last(x)


class Lifted(eqx.Module):
    """Layers inside of a transformation."""

    first: eqx.nn.Linear
    last: eqx.nn.Linear
    lift: Callable[[Any], Any] = eqx.field(static=True)

    def __init__(self, key: jax.Array, lift: Callable[[Any], Any]) -> None:
        self.first, self.last = linears(key, (4, 6), (6, 3))
        self.lift = lift

    def __call__(self, x: jax.Array) -> jax.Array:
        """Outputs (3,) of one sample."""
        call = self.lift(lambda layer, x: layer(x))
        return call(self.last, jnp.tanh(call(self.first, x)))


class Twice(eqx.Module):
    """The same layers for two parts of a sample."""

    tower: eqx.nn.MLP

    def __init__(self, key: jax.Array) -> None:
        self.tower = eqx.nn.MLP(2, 2, 6, 1, jnp.tanh, key=key)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Outputs (2,) of one sample."""
        return self.tower(x[:2]) - self.tower(x[2:])


def depthwise() -> Instance:
    """A filter for each channel, then a mixture of channels."""
    each, mixed = partial(eqx.nn.Conv2d, 2, 4, 3, padding=1, groups=2), partial(eqx.nn.Conv2d, 4, 3, 1)
    make = sequential(each, jax.nn.relu, mixed, jnp.ravel, partial(eqx.nn.Linear, 48, 2))
    return fit(make, channels_first(size=4))


def grouped() -> Instance:
    """A convolution of two groups of two channels each."""
    make = sequential(
        partial(eqx.nn.Conv2d, 4, 4, 3, padding=1, groups=2), jnp.tanh, jnp.ravel, partial(eqx.nn.Linear, 64, 2)
    )
    return fit(make, channels_first(size=4, channels=4))


def transposed() -> Instance:
    """An image twice as wide as what it is made of."""
    first, last = partial(eqx.nn.Conv2d, 2, 3, 3, 2, padding=1), partial(eqx.nn.ConvTranspose2d, 3, 2, 2, 2)
    return fit(sequential(first, jnp.tanh, last), channels_first(size=4))


def dilated() -> Instance:
    """A window with holes."""
    first = partial(eqx.nn.Conv2d, 2, 3, 3, padding=2, dilation=2)
    return fit(sequential(first, jnp.tanh, jnp.ravel, partial(eqx.nn.Linear, 75, 2)), channels_first(size=5))


class TiedWords(eqx.Module):
    """A model of the next token whose last matrix is the embedding."""

    embedding: eqx.nn.Embedding
    hidden: eqx.nn.Linear

    def __init__(self, key: jax.Array) -> None:
        one, two = jax.random.split(key)
        self.embedding, self.hidden = eqx.nn.Embedding(VOCABULARY, 6, key=one), eqx.nn.Linear(6, 6, key=two)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits (T, V) of tokens (T,)."""
        x = jax.vmap(self.hidden)(jax.vmap(self.embedding)(tokens))
        return jnp.tanh(x) @ self.embedding.weight.T


class Heads(eqx.Module):
    """Two outputs under names."""

    trunk: eqx.nn.Linear
    place: eqx.nn.Linear
    shape: eqx.nn.Linear

    def __init__(self, key: jax.Array) -> None:
        self.trunk, self.place, self.shape = linears(key, (4, 6), (6, 2), (6, 3))

    def __call__(self, x: jax.Array) -> dict[str, jax.Array]:
        """Outputs (2,) and (3,) of one sample."""
        x = jnp.tanh(self.trunk(x))
        return {"place": self.place(x), "shape": self.shape(x)}


class TwoInputs(eqx.Module):
    """Two inputs in a tuple."""

    left: eqx.nn.Linear
    right: eqx.nn.Linear
    readout: eqx.nn.Linear

    def __init__(self, key: jax.Array) -> None:
        self.left, self.right, self.readout = linears(key, (4, 5), (3, 5), (5, 2))

    def __call__(self, x: tuple[jax.Array, jax.Array]) -> jax.Array:
        """Outputs (2,) of one sample."""
        left, right = x
        return self.readout(jnp.tanh(self.left(left) + self.right(right)))


def half_precision() -> Instance:
    """Parameters and products in bfloat16."""
    make = lambda key: eqx.nn.MLP(4, 3, 6, 1, jnp.tanh, dtype=jnp.bfloat16, key=key)
    return fit(make, vectors().astype(jnp.bfloat16))


MODELS: dict[str, Callable[[], Instance]] = {
    "dense network": dense,
    "convolutional network": convolutional,
    "residual block, GroupNorm": lambda: fit(Residual, channels_first(), CLASSES),
    "batch norm, eval mode": batch_norm_eval,
    "batch norm, training mode": batch_norm_training,
    "dropout, training mode": dropout,
    "LayerNorm": layer_norm,
    "WeightNorm": weight_norm,
    "LSTM": lambda: fit(partial(Recurrent, eqx.nn.LSTMCell), sequences()),
    "GRU": lambda: fit(partial(Recurrent, eqx.nn.GRUCell), sequences()),
    "decoder transformer, tied": lambda: fit(Decoder, tokens(), CLASSES),
    "cross-attention": cross_attention,
    "subclass of a layer": lambda: fit(
        sequential(partial(ScaledLinear, 4, 6), jnp.tanh, partial(eqx.nn.Linear, 6, 3)), vectors()
    ),
    "stacked experts": lambda: fit(Experts, vectors()),
    "experts, top-1 routing": lambda: fit(partial(Experts, is_top_1=True), vectors()),
    "stacked layers, scanned": lambda: fit(Scanned, vectors()),
    "rematerialised layers": lambda: fit(partial(Lifted, lift=eqx.filter_checkpoint), vectors()),
    "compiled layers": lambda: fit(partial(Lifted, lift=eqx.filter_jit), vectors()),
    "called twice": lambda: fit(Twice, vectors()),
    "depthwise convolution": depthwise,
    "grouped convolution": grouped,
    "transposed convolution": transposed,
    "dilated convolution": dilated,
    "tied embedding": lambda: fit(TiedWords, tokens(), CLASSES),
    "dictionary of outputs": lambda: fit(Heads, vectors()),
    "tuple of inputs": lambda: fit(TwoInputs, (vectors(), vectors()[:, :3])),
    "bfloat16 parameters": half_precision,
}
NOTES = {
    "dense network": "eqx.nn.MLP",
    "batch norm, training mode": 'sharded by driver="jit"',
    "stacked experts": "eqx.filter_vmap",
    "experts, top-1 routing": "eqx.filter_vmap",
    "stacked layers, scanned": "lax.scan",
    "rematerialised layers": "eqx.filter_checkpoint",
    "compiled layers": "eqx.filter_jit",
}
