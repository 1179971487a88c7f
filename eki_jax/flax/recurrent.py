"""Recurrent networks: the tanh networks of Kovachki & Stuart (2019), sections 3.2, 5.4.3 and 5.6."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from eki_jax._checks import flag, whole


class _Layer(nn.Module):
    """``tanh(W_h z + b_h + W_x q + b_x)``: one two-input layer with a bias for each input."""

    units: int

    @nn.compact
    def __call__(self, z: Array, q: Array) -> Array:
        return jnp.tanh(nn.Dense(self.units, name="recurrent")(z) + nn.Dense(self.units, name="input")(q))


#: What goes from one time step to the next: a state, or one for each layer.
_Hidden = Array | tuple[Array, ...]


class _Cell(nn.RNNCellBase):
    """The layers composed along the hidden state, each seeing the input (section 3.2), or each with its own state."""

    units: int
    layers: int
    stacked: bool

    @nn.compact
    def __call__(self, hidden: _Hidden, x: Array) -> tuple[_Hidden, Array]:
        layers = [_Layer(self.units, name=f"layer_{index}") for index in range(self.layers)]
        if isinstance(hidden, Array):
            for layer in layers:
                hidden = layer(hidden, x)
            return hidden, hidden
        states: tuple[Array, ...] = ()
        for layer, state in zip(layers, hidden, strict=True):
            x = layer(state, x)
            states += (x,)
        return states, x

    def initialize_carry(self, rng: Array | None, input_shape: tuple[int, ...]) -> _Hidden:
        start = jnp.zeros((*input_shape[:-1], self.units))
        return (start,) * self.layers if self.stacked else start

    @property
    def num_feature_axes(self) -> int:
        return 1


class TanhRNN(nn.Module):
    """A tanh recurrent network whose last hidden state feeds one affine map.

    With two layers the hidden state obeys
    ``h <- tanh(W_h2 tanh(W_h1 h + b_h1 + W_x1 q + b_x1) + b_h2 + W_x2 q + b_x2)``; it starts at zero. Stacked, each
    layer has a state of its own, and the second reads the first's: ``h_1 <- tanh(W_h1 h_1 + b_h1 + W_x1 q + b_x1)``,
    ``h_2 <- tanh(W_h2 h_2 + b_h2 + W_x2 h_1 + b_x2)``, of which the last is the output's.

    Attributes:
        units: length of the hidden state.
        layers: number of layers in one time step.
        outputs: length of the output.
        stacked: flag, True for layers with states of their own, as frameworks have them, in the place of layers that
            are composed along one state, as the paper writes them.

    Calling it on sequences ``(batch, time, features)`` returns class probabilities after the last step,
    ``(batch, outputs)``; ``logits`` stops before the softmax; ``step`` advances by one sample, for online learning.

    Raises:
        TypeError: sizes that are no whole numbers.
        ValueError: sizes below one.
    """

    units: int = 32
    layers: int = 2
    outputs: int = 10
    stacked: bool = False

    def __post_init__(self) -> None:
        for name in ("units", "layers", "outputs"):
            whole(name, getattr(self, name))
        flag("stacked", self.stacked)
        super().__post_init__()

    def setup(self) -> None:
        """The cell, its scan over time and the last affine map."""
        self.cell = _Cell(self.units, self.layers, self.stacked)
        self.over_time = nn.RNN(self.cell, return_carry=True)
        self.output = nn.Dense(self.outputs)

    def logits(self, x: Array) -> Array:
        """The affine output after the last time step, shape ``(batch, outputs)``."""
        hidden, _ = self.over_time(x)
        return self.output(hidden[-1] if self.stacked else hidden)

    def __call__(self, x: Array) -> Array:
        """Class probabilities, shape ``(batch, outputs)``."""
        return jax.nn.softmax(self.logits(x))

    def step(self, hidden: _Hidden, x: Array) -> tuple[_Hidden, Array]:
        """One sample: hidden state ``(..., units)`` and input ``(..., features)`` to the next state and the output.

        Stacked, the state is a tuple of one for each layer.
        """
        hidden, top = self.cell(hidden, x)
        return hidden, self.output(top)
