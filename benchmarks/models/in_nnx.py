"""The zoo's models in flax nnx: stock layers, put together as people do."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.models.entry import CLASSES, SQUARES, Instance, spiking, taught
from benchmarks.models.inputs import LENGTH, VOCABULARY, images, sequences, tokens, vectors
from eki_jax.flax import nnx_forward, quantized

WIDTH = 8


def parameters(make: Callable[[nnx.Rngs], nnx.Module], key: jax.Array) -> Any:
    """The parameters of a fresh module, as a nested dictionary."""
    return nnx.to_pure_dict(nnx.state(make(nnx.Rngs(key)), nnx.Param))


def fit(make: Callable[[nnx.Rngs], nnx.Module], x: Any, loss: Any = SQUARES) -> Instance:
    """A module as it is."""
    forward, _ = nnx_forward(make(nnx.Rngs(0)))
    return taught(forward, partial(parameters, make), x, loss)


def flat(x: jax.Array) -> jax.Array:
    """One vector a sample."""
    return x.reshape(len(x), -1)


def sequential(*layers: Callable[[nnx.Rngs], Any] | Any) -> Callable[[nnx.Rngs], nnx.Module]:
    """A function from streams of random numbers to ``nnx.Sequential``: layers are waiting for theirs."""
    return lambda rngs: nnx.Sequential(*(f(rngs=rngs) if isinstance(f, partial) else f for f in layers))


def dense() -> Instance:
    """Two dense layers, and logits."""
    return fit(sequential(partial(nnx.Linear, 4, 6), nnx.relu, partial(nnx.Linear, 6, 3)), vectors(), CLASSES)


def pooled(x: jax.Array) -> jax.Array:
    """Images of half the size."""
    return nnx.max_pool(x, (2, 2), (2, 2))


def convolutional() -> Instance:
    """Two convolutions, each pooled, and a dense layer."""
    first, second = partial(nnx.Conv, 2, 4, (3, 3)), partial(nnx.Conv, 4, 6, (3, 3))
    layers = [first, nnx.relu, pooled, second, nnx.relu, flat, partial(nnx.Linear, 54, 3)]
    return fit(sequential(*layers), images(), CLASSES)


class Residual(nnx.Module):
    """A block of a residual network, with GroupNorm in the place of batch statistics."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        convolution = partial(nnx.Conv, kernel_size=(3, 3), use_bias=False, rngs=rngs)
        self.first, self.second, self.third = convolution(2, 4), convolution(4, 4), convolution(4, 4)
        self.norm_1, self.norm_2 = (nnx.GroupNorm(4, num_groups=2, rngs=rngs) for _ in range(2))
        self.readout = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits of images."""
        x = self.first(x)
        y = self.second(nnx.relu(self.norm_1(x)))
        y = self.third(nnx.relu(self.norm_2(y)))
        return self.readout(nnx.relu(x + y).mean(axis=(1, 2)))


def batch_normed(rngs: nnx.Rngs) -> nnx.Module:
    """A hidden layer normalised over the batch."""
    layers = [partial(nnx.Linear, 4, 6), partial(nnx.BatchNorm, 6), nnx.relu, partial(nnx.Linear, 6, 3)]
    return sequential(*layers)(rngs)


def batch_norm_eval() -> Instance:
    """Statistics as a training run left them."""
    module = batch_normed(nnx.Rngs(0))
    module(vectors())
    module.eval()
    forward, _ = nnx_forward(module)
    return taught(forward, partial(parameters, batch_normed), vectors())


def batch_norm_training() -> Instance:
    """Statistics of the batch, and running ones that each call gives back."""
    forward, _, state = nnx_forward(batch_normed(nnx.Rngs(0)), mutable=True)
    return taught(forward, partial(parameters, batch_normed), vectors(), state=state)


def dropout() -> Instance:
    """A hidden layer of which a tenth is dropped, with a mask for each call."""
    make = sequential(partial(nnx.Linear, 4, 6), nnx.tanh, partial(nnx.Dropout, 0.1), partial(nnx.Linear, 6, 3))
    forward, _ = nnx_forward(make(nnx.Rngs(0)), rngs=True)
    return taught(forward, partial(parameters, make), vectors(), is_keyed=True)


def layer_norm() -> Instance:
    """LayerNorm between dense layers."""
    layers = [partial(nnx.Linear, 4, 6), partial(nnx.LayerNorm, 6), nnx.tanh, partial(nnx.Linear, 6, 3)]
    return fit(sequential(*layers), vectors())


class WeightNormed(nnx.Module):
    """Dense layers whose weights are a direction and a length."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.hidden = nnx.WeightNorm(nnx.Linear(4, 6, rngs=rngs), rngs=rngs)
        self.readout = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Outputs (B, 3)."""
        return self.readout(nnx.tanh(self.hidden(x)))


class Recurrent(nnx.Module):
    """A recurrent cell over time, read out at the end."""

    def __init__(self, cell: Any, rngs: nnx.Rngs, is_bidirectional: bool = False) -> None:
        layer = lambda: nnx.RNN(cell(3, 4, rngs=rngs))
        self.layer = nnx.Bidirectional(layer(), layer(), rngs=rngs) if is_bidirectional else layer()
        self.readout = nnx.Linear(8 if is_bidirectional else 4, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Outputs (B, 2) of sequences (B, T, n)."""
        return self.readout(self.layer(x)[:, -1])


def recurrent(cell: Any, is_bidirectional: bool = False) -> Instance:
    """A recurrent network of such cells."""
    return fit(lambda rngs: Recurrent(cell, rngs, is_bidirectional), sequences())


class Decoder(nnx.Module):
    """A decoder transformer of one layer whose last matrix is the embedding."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.positions = nnx.Param(0.1 * jax.random.normal(rngs.params(), (LENGTH, WIDTH)))
        self.attention = nnx.MultiHeadAttention(2, WIDTH, decode=False, rngs=rngs)
        self.norms = nnx.List(nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(3))
        self.wide, self.narrow = nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs), nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits (B, T, V) of tokens (B, T)."""
        x = self.embed(tokens) + self.positions[...]
        x = x + self.attention(self.norms[0](x), mask=nnx.make_causal_mask(tokens))
        x = x + self.narrow(nnx.gelu(self.wide(self.norms[1](x))))
        return self.embed.attend(self.norms[2](x))


class CrossAttention(nnx.Module):
    """Queries of a sequence that look at another one."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.attention = nnx.MultiHeadAttention(2, 3, 4, out_features=3, decode=False, rngs=rngs)
        self.readout = nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x: tuple[jax.Array, jax.Array]) -> jax.Array:
        """Outputs (B, 2) of two sequences."""
        queries, memory = x
        return self.readout(nnx.tanh(self.attention(queries, memory))[:, -1])


def cross_attention() -> Instance:
    """Two sequences of different lengths."""
    memory = jax.random.normal(jax.random.key(7), (8, 4, 3))
    return fit(CrossAttention, (sequences(), memory))


def general() -> Instance:
    """A dense layer from two axes to two."""
    first = partial(nnx.LinearGeneral, (LENGTH, 3), (2, 3), axis=(-2, -1))
    return fit(sequential(first, nnx.tanh, partial(nnx.LinearGeneral, (2, 3), 2, axis=(-2, -1))), sequences())


class ScaledLinear(nnx.Linear):
    """A dense layer of one's own, by inheritance."""

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """The layer's outputs, halved."""
        return 0.5 * super().__call__(inputs)


class Experts(nnx.Module):
    """A mixture of experts whose layers are stacked by ``nnx.vmap``."""

    def __init__(self, rngs: nnx.Rngs, is_top_1: bool = False) -> None:
        self.gate = nnx.Linear(4, 3, rngs=rngs)
        self.experts = nnx.vmap(lambda key: nnx.Linear(4, 3, rngs=nnx.Rngs(key)))(jax.random.split(rngs.params(), 3))
        self.is_top_1 = is_top_1

    def __call__(self, x: jax.Array) -> jax.Array:
        """Outputs (B, 3)."""
        shares = nnx.softmax(self.gate(x))
        if self.is_top_1:
            shares = shares * jax.nn.one_hot(jnp.argmax(shares, axis=-1), 3)
        found = nnx.vmap(lambda expert, x: expert(x), in_axes=(0, None), out_axes=1)(self.experts, x)
        return jnp.einsum("be,bek->bk", shares, jnp.tanh(found))


class Scanned(nnx.Module):
    """Three layers stacked in one, and scanned."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first, self.last = nnx.Linear(4, 5, rngs=rngs), nnx.Linear(5, 2, rngs=rngs)
        self.layers = nnx.vmap(lambda key: nnx.Linear(5, 5, rngs=nnx.Rngs(key)))(jax.random.split(rngs.params(), 3))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Outputs (B, 2)."""
        step = nnx.scan(lambda x, layer: x + nnx.tanh(layer(x)), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return self.last(step(self.first(x), self.layers))


class Lifted(nnx.Module):
    """Layers inside of a transformation of flax."""

    def __init__(self, rngs: nnx.Rngs, lift: Callable[[Any], Any]) -> None:
        self.first, self.last = nnx.Linear(4, 6, rngs=rngs), nnx.Linear(6, 3, rngs=rngs)
        self.lift = lift

    def __call__(self, x: jax.Array) -> jax.Array:
        """Outputs (B, 3)."""
        call = self.lift(lambda layer, x: layer(x))
        return call(self.last, nnx.tanh(call(self.first, x)))


def over_samples() -> Instance:
    """A module of one sample, mapped over the samples by ``jax.vmap``."""
    make = sequential(partial(nnx.Linear, 4, 6), nnx.tanh, partial(nnx.Linear, 6, 3))
    one, _ = nnx_forward(make(nnx.Rngs(0)))
    forward = lambda params, x: jax.vmap(lambda row: one(params, row))(x)
    return taught(forward, partial(parameters, make), vectors())


class Twice(nnx.Module):
    """The same layers for two parts of a sample."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.tower = sequential(partial(nnx.Linear, 2, 6), nnx.tanh, partial(nnx.Linear, 6, 2))(rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Outputs (B, 2)."""
        return self.tower(x[:, :2]) - self.tower(x[:, 2:])


def depthwise() -> Instance:
    """A filter for each channel, then a mixture of channels."""
    each, mixed = partial(nnx.Conv, 2, 4, (3, 3), feature_group_count=2), partial(nnx.Conv, 4, 3, (1, 1))
    return fit(sequential(each, nnx.relu, mixed, flat, partial(nnx.Linear, 48, 2)), images(size=4))


def grouped() -> Instance:
    """A convolution of two groups of two channels each."""
    first = partial(nnx.Conv, 4, 4, (3, 3), feature_group_count=2)
    return fit(sequential(first, nnx.tanh, flat, partial(nnx.Linear, 64, 2)), images(size=4, channels=4))


def transposed() -> Instance:
    """An image twice as wide as what it is made of."""
    first = partial(nnx.Conv, 2, 3, (3, 3), strides=2)
    return fit(sequential(first, nnx.tanh, partial(nnx.ConvTranspose, 3, 2, (2, 2), strides=(2, 2))), images(size=4))


def dilated() -> Instance:
    """A window with holes."""
    first = partial(nnx.Conv, 2, 3, (3, 3), kernel_dilation=2)
    return fit(sequential(first, nnx.tanh, flat, partial(nnx.Linear, 75, 2)), images(size=5))


class TiedWords(nnx.Module):
    """A model of the next token whose last matrix is the embedding."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed, self.hidden = nnx.Embed(VOCABULARY, 6, rngs=rngs), nnx.Linear(6, 6, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits (B, T, V)."""
        return self.embed.attend(nnx.tanh(self.hidden(self.embed(tokens))))


class Spiking(nnx.Module):
    """Units that leak, and spike above a half."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.inputs, self.readout = nnx.Linear(3, 8, rngs=rngs), nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Outputs (B, 2) of sequences (B, T, n): a readout of the rates."""
        return self.readout(spiking(self.inputs(x)))


class Quantized(nnx.Linear):
    """A dense layer whose weights are 8-bit integers times one step."""

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """The layer's outputs."""
        return inputs @ quantized(self.kernel[...]) + quantized(self.bias[...])


class Heads(nnx.Module):
    """Two outputs under names."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.trunk, self.place = nnx.Linear(4, 6, rngs=rngs), nnx.Linear(6, 2, rngs=rngs)
        self.shape = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> dict[str, jax.Array]:
        """Outputs (B, 2) and (B, 3)."""
        x = nnx.tanh(self.trunk(x))
        return {"place": self.place(x), "shape": self.shape(x)}


class TwoInputs(nnx.Module):
    """Two inputs in a tuple."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.left, self.right = nnx.Linear(4, 5, rngs=rngs), nnx.Linear(3, 5, rngs=rngs)
        self.readout = nnx.Linear(5, 2, rngs=rngs)

    def __call__(self, x: tuple[jax.Array, jax.Array]) -> jax.Array:
        """Outputs (B, 2)."""
        left, right = x
        return self.readout(nnx.tanh(self.left(left) + self.right(right)))


def half_precision() -> Instance:
    """Parameters and products in bfloat16."""
    layer = partial(nnx.Linear, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    return fit(sequential(partial(layer, 4, 6), nnx.tanh, partial(layer, 6, 3)), vectors())


MODELS: dict[str, Callable[[], Instance]] = {
    "dense network": dense,
    "convolutional network": convolutional,
    "residual block, GroupNorm": lambda: fit(Residual, images(), CLASSES),
    "batch norm, eval mode": batch_norm_eval,
    "batch norm, training mode": batch_norm_training,
    "dropout, training mode": dropout,
    "LayerNorm": layer_norm,
    "WeightNorm": lambda: fit(WeightNormed, vectors()),
    "LSTM": lambda: recurrent(nnx.LSTMCell),
    "GRU": lambda: recurrent(nnx.GRUCell),
    "OptimizedLSTMCell": lambda: recurrent(nnx.OptimizedLSTMCell),
    "bidirectional RNN": lambda: recurrent(nnx.SimpleCell, is_bidirectional=True),
    "decoder transformer, tied": lambda: fit(Decoder, tokens(), CLASSES),
    "cross-attention": cross_attention,
    "layer over several axes": general,
    "subclass of a layer": lambda: fit(
        sequential(partial(ScaledLinear, 4, 6), nnx.tanh, partial(nnx.Linear, 6, 3)), vectors()
    ),
    "stacked experts": lambda: fit(Experts, vectors()),
    "experts, top-1 routing": lambda: fit(partial(Experts, is_top_1=True), vectors()),
    "stacked layers, scanned": lambda: fit(Scanned, vectors()),
    "rematerialised layers": lambda: fit(partial(Lifted, lift=nnx.remat), vectors()),
    "compiled layers": lambda: fit(partial(Lifted, lift=nnx.jit), vectors()),
    "mapped over samples": over_samples,
    "called twice": lambda: fit(Twice, vectors()),
    "depthwise convolution": depthwise,
    "grouped convolution": grouped,
    "transposed convolution": transposed,
    "dilated convolution": dilated,
    "tied embedding": lambda: fit(TiedWords, tokens(), CLASSES),
    "spiking units": lambda: fit(Spiking, sequences()),
    "8-bit weights": lambda: fit(sequential(partial(Quantized, 4, 6), nnx.relu, partial(Quantized, 6, 3)), vectors()),
    "dictionary of outputs": lambda: fit(Heads, vectors()),
    "tuple of inputs": lambda: fit(TwoInputs, (vectors(), vectors()[:, :3])),
    "bfloat16 parameters": half_precision,
}
NOTES = {
    "layer over several axes": "LinearGeneral",
    "stacked experts": "nnx.vmap",
    "experts, top-1 routing": "nnx.vmap",
    "stacked layers, scanned": "nnx.scan",
    "rematerialised layers": "nnx.remat",
    "compiled layers": "nnx.jit",
    "mapped over samples": "jax.vmap",
}
