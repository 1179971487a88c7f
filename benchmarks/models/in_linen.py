"""The zoo's models in flax linen: stock layers, put together as people do."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from benchmarks.models.entry import CLASSES, SQUARES, Instance, spiking, taught
from benchmarks.models.inputs import LENGTH, VOCABULARY, images, sequences, tokens, vectors
from eki_jax.flax import Int8Network, linen_forward

WIDTH = 8


def fit(module: nn.Module, x: Any, loss: Any = SQUARES, **options: Any) -> Instance:
    """A module as it is."""
    forward, _ = linen_forward(module, x, **options)
    return taught(forward, lambda key: module.init(key, x, **options)["params"], x, loss)


def flat(x: jax.Array) -> jax.Array:
    """One vector a sample."""
    return x.reshape(len(x), -1)


def dense() -> Instance:
    """Two dense layers, and logits."""
    return fit(nn.Sequential([nn.Dense(6), nn.relu, nn.Dense(3)]), vectors(), CLASSES)


def convolutional() -> Instance:
    """Two convolutions, each pooled, and a dense layer."""
    pool = partial(nn.max_pool, window_shape=(2, 2), strides=(2, 2))
    layers = [nn.Conv(4, (3, 3)), nn.relu, pool, nn.Conv(6, (3, 3)), nn.relu, flat, nn.Dense(3)]
    return fit(nn.Sequential(layers), images(), CLASSES)


class Residual(nn.Module):
    """A block of a residual network, with GroupNorm in the place of batch statistics."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits of images."""
        x = nn.Conv(4, (3, 3), use_bias=False)(x)
        y = nn.Conv(4, (3, 3), use_bias=False)(nn.relu(nn.GroupNorm(2)(x)))
        y = nn.Conv(4, (3, 3), use_bias=False)(nn.relu(nn.GroupNorm(2)(y)))
        return nn.Dense(3)(nn.relu(x + y).mean(axis=(1, 2)))


class BatchNormed(nn.Module):
    """A hidden layer normalised over the batch."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Outputs (B, 3)."""
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Dense(6)(x)))
        return nn.Dense(3)(x)


def batch_norm_eval() -> Instance:
    """Statistics as they were found, given as constants."""
    x = vectors()
    statistics = {"BatchNorm_0": {"mean": jnp.linspace(-0.5, 0.5, 6), "var": jnp.linspace(0.5, 2.0, 6)}}
    forward, _ = linen_forward(BatchNormed(), x, train=False, constants={"batch_stats": statistics})
    return taught(forward, lambda key: BatchNormed().init(key, x, train=False)["params"], x)


def batch_norm_training() -> Instance:
    """Statistics of the batch, and running ones that each call gives back."""
    x = vectors()
    forward, _, state = linen_forward(BatchNormed(), x, train=True, mutable=("batch_stats",))
    return taught(forward, lambda key: BatchNormed().init(key, x, train=True)["params"], x, state=state)


class Dropped(nn.Module):
    """A hidden layer of which a tenth is dropped."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Outputs (B, 3)."""
        x = nn.Dropout(0.1, deterministic=not train)(nn.tanh(nn.Dense(6)(x)))
        return nn.Dense(3)(x)


def dropout() -> Instance:
    """A mask for each call."""
    x = vectors()
    forward, _ = linen_forward(Dropped(), x, train=True, rngs=("dropout",))
    return taught(forward, lambda key: Dropped().init(key, x, train=False)["params"], x, is_keyed=True)


def layer_norm() -> Instance:
    """LayerNorm between dense layers."""
    return fit(nn.Sequential([nn.Dense(6), nn.LayerNorm(), nn.tanh, nn.Dense(3)]), vectors())


class WeightNormed(nn.Module):
    """Dense layers whose weights are a direction and a length."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Outputs (B, 3)."""
        return nn.Dense(3)(nn.tanh(nn.WeightNorm(nn.Dense(6))(x)))


class Recurrent(nn.Module):
    """A recurrent cell over time, read out at the end."""

    cell: Callable[[], nn.Module]
    is_bidirectional: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Outputs (B, 2) of sequences (B, T, n)."""
        layer: Any = nn.RNN(self.cell())
        if self.is_bidirectional:
            layer = nn.Bidirectional(layer, nn.RNN(self.cell()))
        return nn.Dense(2)(layer(x)[:, -1])


def recurrent(cell: Any, is_bidirectional: bool = False) -> Instance:
    """A recurrent network of such cells."""
    return fit(Recurrent(lambda: cell(4), is_bidirectional), sequences())


class Decoder(nn.Module):
    """A decoder transformer of one layer whose last matrix is the embedding."""

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits (B, T, V) of tokens (B, T)."""
        embed = nn.Embed(VOCABULARY, WIDTH)
        x = embed(tokens) + self.param("positions", nn.initializers.normal(0.1), (LENGTH, WIDTH))
        mask = nn.make_causal_mask(tokens)
        x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x), mask=mask)
        x = x + nn.Dense(WIDTH)(nn.gelu(nn.Dense(2 * WIDTH)(nn.LayerNorm()(x))))
        return embed.attend(nn.LayerNorm()(x))


class CrossAttention(nn.Module):
    """Queries of a sequence that look at another one."""

    @nn.compact
    def __call__(self, x: tuple[jax.Array, jax.Array]) -> jax.Array:
        """Outputs (B, 2) of two sequences."""
        queries, memory = x
        found = nn.MultiHeadDotProductAttention(2, qkv_features=4)(queries, memory)
        return nn.Dense(2)(nn.tanh(found)[:, -1])


def cross_attention() -> Instance:
    """Two sequences of different lengths."""
    memory = jax.random.normal(jax.random.key(7), (8, 4, 3))
    return fit(CrossAttention(), (sequences(), memory))


class General(nn.Module):
    """A dense layer from two axes to two."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Outputs (B, 2)."""
        return nn.DenseGeneral(2, axis=(-2, -1))(nn.tanh(nn.DenseGeneral((2, 3), axis=(-2, -1))(x)))


class ScaledDense(nn.Dense):
    """A dense layer of one's own, by inheritance."""

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """The layer's outputs, halved."""
        return 0.5 * super().__call__(inputs)


class Experts(nn.Module):
    """A mixture of experts whose layers are stacked by ``nn.vmap``."""

    is_top_1: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Outputs (B, 3)."""
        stacked = nn.vmap(
            nn.Dense, in_axes=None, out_axes=1, axis_size=3, variable_axes={"params": 0}, split_rngs={"params": True}
        )
        shares = nn.softmax(nn.Dense(3, name="gate")(x))
        if self.is_top_1:
            shares = shares * jax.nn.one_hot(jnp.argmax(shares, axis=-1), 3)
        return jnp.einsum("be,bek->bk", shares, jnp.tanh(stacked(3, name="experts")(x)))


class Scanned(nn.Module):
    """Three layers stacked by ``nn.scan``."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Outputs (B, 2)."""
        x = nn.Dense(5)(x)
        stacked = nn.scan(Step, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = stacked()(x, None)
        return nn.Dense(2)(x)


class Step(nn.Module):
    """One of the stacked layers."""

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        """The next layer's inputs."""
        return x + nn.tanh(nn.Dense(5)(x)), None


class Lifted(nn.Module):
    """Layers inside of a transformation of flax."""

    lift: Callable[[Any], Any]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Outputs (B, 3)."""
        return self.lift(nn.Dense)(3)(nn.tanh(self.lift(nn.Dense)(6)(x)))


def over_samples() -> Instance:
    """A module of one sample, mapped over the samples by ``jax.vmap``."""
    module, x = nn.Sequential([nn.Dense(6), nn.tanh, nn.Dense(3)]), vectors()
    forward = lambda params, x: jax.vmap(lambda row: module.apply({"params": params}, row))(x)
    return taught(forward, lambda key: module.init(key, x[0])["params"], x)


class Twice(nn.Module):
    """The same layers for two parts of a sample."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Outputs (B, 2)."""
        tower = nn.Sequential([nn.Dense(6), nn.tanh, nn.Dense(2)])
        return tower(x[:, :2]) - tower(x[:, 2:])


def depthwise() -> Instance:
    """A filter for each channel, then a mixture of channels."""
    layers = [nn.Conv(4, (3, 3), feature_group_count=2), nn.relu, nn.Conv(3, (1, 1)), flat, nn.Dense(2)]
    return fit(nn.Sequential(layers), images(size=4))


def grouped() -> Instance:
    """A convolution of two groups of two channels each."""
    layers = [nn.Conv(4, (3, 3), feature_group_count=2), nn.tanh, flat, nn.Dense(2)]
    return fit(nn.Sequential(layers), images(size=4, channels=4))


def transposed() -> Instance:
    """An image twice as wide as what it is made of."""
    layers = [nn.Conv(3, (3, 3), strides=2), nn.tanh, nn.ConvTranspose(2, (2, 2), strides=(2, 2))]
    return fit(nn.Sequential(layers), images(size=4))


def dilated() -> Instance:
    """A window with holes."""
    layers = [nn.Conv(3, (3, 3), kernel_dilation=2), nn.tanh, flat, nn.Dense(2)]
    return fit(nn.Sequential(layers), images(size=5))


class TiedWords(nn.Module):
    """A model of the next token whose last matrix is the embedding."""

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits (B, T, V)."""
        embed = nn.Embed(VOCABULARY, 6)
        return embed.attend(nn.tanh(nn.Dense(6)(embed(tokens))))


class Spiking(nn.Module):
    """Units that leak, and spike above one."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Outputs (B, 2) of sequences (B, T, n): a readout of the rates."""
        return nn.Dense(2)(spiking(nn.Dense(8)(x)))


class Heads(nn.Module):
    """Two outputs under names."""

    @nn.compact
    def __call__(self, x: jax.Array) -> dict[str, jax.Array]:
        """Outputs (B, 2) and (B, 3)."""
        x = nn.tanh(nn.Dense(6)(x))
        return {"place": nn.Dense(2)(x), "shape": nn.Dense(3)(x)}


class TwoInputs(nn.Module):
    """Two inputs in a tuple."""

    @nn.compact
    def __call__(self, x: tuple[jax.Array, jax.Array]) -> jax.Array:
        """Outputs (B, 2)."""
        left, right = x
        return nn.Dense(2)(nn.tanh(nn.Dense(5)(left) + nn.Dense(5)(right)))


def half_precision() -> Instance:
    """Parameters and products in bfloat16."""
    layer = partial(nn.Dense, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    return fit(nn.Sequential([layer(6), nn.tanh, layer(3)]), vectors())


MODELS: dict[str, Callable[[], Instance]] = {
    "dense network": dense,
    "convolutional network": convolutional,
    "residual block, GroupNorm": lambda: fit(Residual(), images(), CLASSES),
    "batch norm, eval mode": batch_norm_eval,
    "batch norm, training mode": batch_norm_training,
    "dropout, training mode": dropout,
    "LayerNorm": layer_norm,
    "WeightNorm": lambda: fit(WeightNormed(), vectors()),
    "LSTM": lambda: recurrent(nn.LSTMCell),
    "GRU": lambda: recurrent(nn.GRUCell),
    "OptimizedLSTMCell": lambda: recurrent(nn.OptimizedLSTMCell),
    "bidirectional RNN": lambda: recurrent(nn.SimpleCell, is_bidirectional=True),
    "decoder transformer, tied": lambda: fit(Decoder(), tokens(), CLASSES),
    "cross-attention": cross_attention,
    "layer over several axes": lambda: fit(General(), sequences()),
    "subclass of a layer": lambda: fit(nn.Sequential([ScaledDense(6), nn.tanh, nn.Dense(3)]), vectors()),
    "stacked experts": lambda: fit(Experts(), vectors()),
    "experts, top-1 routing": lambda: fit(Experts(is_top_1=True), vectors()),
    "stacked layers, scanned": lambda: fit(Scanned(), vectors()),
    "rematerialised layers": lambda: fit(Lifted(nn.remat), vectors()),
    "compiled layers": lambda: fit(Lifted(nn.jit), vectors()),
    "mapped over samples": over_samples,
    "called twice": lambda: fit(Twice(), vectors()),
    "depthwise convolution": depthwise,
    "grouped convolution": grouped,
    "transposed convolution": transposed,
    "dilated convolution": dilated,
    "tied embedding": lambda: fit(TiedWords(), tokens(), CLASSES),
    "spiking units": lambda: fit(Spiking(), sequences()),
    "8-bit weights": lambda: fit(Int8Network((6, 3)), vectors(), method="logits"),
    "dictionary of outputs": lambda: fit(Heads(), vectors()),
    "tuple of inputs": lambda: fit(TwoInputs(), (vectors(), vectors()[:, :3])),
    "bfloat16 parameters": half_precision,
}
NOTES = {
    "layer over several axes": "DenseGeneral",
    "stacked experts": "nn.vmap",
    "experts, top-1 routing": "nn.vmap",
    "stacked layers, scanned": "nn.scan",
    "rematerialised layers": "nn.remat",
    "compiled layers": "nn.jit",
    "mapped over samples": "jax.vmap",
}
