"""Recurrent networks: the tanh networks of Kovachki & Stuart (2019), sections 3.2, 5.4.3 and 5.6."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from eki_jax._checks import whole


class _Layer(nn.Module):
    """``tanh(W_h z + b_h + W_x q + b_x)``: one two-input layer with a bias for each input."""

    units: int

    @nn.compact
    def __call__(self, z: Array, q: Array) -> Array:
        return jnp.tanh(nn.Dense(self.units, name="recurrent")(z) + nn.Dense(self.units, name="input")(q))


class _Cell(nn.RNNCellBase):
    """The layers composed along the hidden state; every layer sees the input (section 3.2)."""

    units: int
    layers: int

    @nn.compact
    def __call__(self, hidden: Array, x: Array) -> tuple[Array, Array]:
        for index in range(self.layers):
            hidden = _Layer(self.units, name=f"layer_{index}")(hidden, x)
        return hidden, hidden

    def initialize_carry(self, rng: Array | None, input_shape: tuple[int, ...]) -> Array:
        return jnp.zeros((*input_shape[:-1], self.units))

    @property
    def num_feature_axes(self) -> int:
        return 1


class TanhRNN(nn.Module):
    """A tanh recurrent network whose last hidden state feeds one affine map.

    With two layers the hidden state obeys
    ``h <- tanh(W_h2 tanh(W_h1 h + b_h1 + W_x1 q + b_x1) + b_h2 + W_x2 q + b_x2)``; it starts at zero.

    Attributes:
        units: length of the hidden state.
        layers: number of layers composed in one time step.
        outputs: length of the output.

    Calling it on sequences ``(batch, time, features)`` returns class probabilities after the last step,
    ``(batch, outputs)``; ``logits`` stops before the softmax; ``step`` advances by one sample, for online learning.

    Raises:
        TypeError: sizes that are no whole numbers.
        ValueError: sizes below one.
    """

    units: int = 32
    layers: int = 2
    outputs: int = 10

    def __post_init__(self) -> None:
        for name in ("units", "layers", "outputs"):
            whole(name, getattr(self, name))
        super().__post_init__()

    def setup(self) -> None:
        """The cell, its scan over time and the last affine map."""
        self.cell = _Cell(self.units, self.layers)
        self.over_time = nn.RNN(self.cell, return_carry=True)
        self.output = nn.Dense(self.outputs)

    def logits(self, x: Array) -> Array:
        """The affine output after the last time step, shape ``(batch, outputs)``."""
        hidden, _ = self.over_time(x)
        return self.output(hidden)

    def __call__(self, x: Array) -> Array:
        """Class probabilities, shape ``(batch, outputs)``."""
        return jax.nn.softmax(self.logits(x))

    def step(self, hidden: Array, x: Array) -> tuple[Array, Array]:
        """One sample: hidden state ``(..., units)`` and input ``(..., features)`` to the next state and the output."""
        hidden, _ = self.cell(hidden, x)
        return hidden, self.output(hidden)
