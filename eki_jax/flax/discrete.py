"""Networks without useful derivatives: sign activations, weights that are 8-bit integers, experts, and spikes.

Backpropagation through them finds zeros. Each has a straight-through twin, the same values with made-up derivatives
(Bengio, Leonard & Courville, arXiv:1308.3432; Hubara et al., arXiv:1602.02830), for the gradient method that is used
in their place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from eki_jax._checks import FROM_0_TO_1, array, arrays, is_known, real, sizes, whole
from eki_jax.kernel.particles import floating_dtype

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Int8

#: A weight is an integer from -128 to 127 times this: from -2 to 2 in steps of 1/64.
INT8_STEP = 2.0**-6


def sign(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """1 where ``x >= 0``, else -1: the two values of a neuron with a threshold. Its derivative is zero; NaN stays NaN.

    Raises:
        TypeError: ``x`` is no floating-point array.

    >>> sign(jnp.array([-0.5, 0.0, 2.0]))
    Array([-1.,  1.,  1.], dtype=float32)
    """
    x = _numbers("x", x)
    return jnp.where(jnp.isnan(x), x, jnp.where(x >= 0, 1, -1).astype(x.dtype))


def straight_through_sign(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """``sign`` forwards; backwards the derivative of ``x`` clipped to [-1, 1].

    Raises:
        TypeError: ``x`` is no floating-point array.

    >>> jax.vmap(jax.grad(straight_through_sign))(jnp.array([-3.0, 0.5]))
    Array([0., 1.], dtype=float32)
    """
    return _straight_through_sign(_numbers("x", x))


_straight_through_sign = jax.custom_vjp(sign)
_straight_through_sign.defvjp(
    lambda x: (sign(x), x), lambda x, cotangent: (jnp.where(jnp.abs(x) <= 1, cotangent, 0).astype(x.dtype),)
)


def to_int8(weights: Float[Array, "*shape"]) -> Int8[Array, "*shape"]:
    """The nearest integers of ``weights / INT8_STEP``, in 8 bits.

    Raises:
        TypeError: ``weights`` are no floating-point array.
        ValueError: one of them is NaN, for which there is no integer (where that is known; else it becomes 0).

    >>> to_int8(jnp.array([0.1, -0.01, 50.0]))
    Array([  6,  -1, 127], dtype=int8)
    """
    weights = _numbers("weights", weights)
    if is_known(weights) and bool(jnp.isnan(weights).any()):
        raise ValueError("weights: has NaN, for which there is no integer; wanted numbers")
    return _rounded(weights)


def _rounded(weights: Array) -> Array:
    return jnp.clip(jnp.round(weights / INT8_STEP), -128, 127).astype(jnp.int8)


def from_int8(integers: Int[Array, "*shape"], dtype: jnp.dtype = jnp.float32) -> Float[Array, "*shape"]:
    """The weights that ``integers`` stand for.

    Raises:
        TypeError: ``integers`` are no whole numbers, or ``dtype`` is no floating-point one.

    >>> from_int8(jnp.array([64, -1]))
    Array([ 1.      , -0.015625], dtype=float32)
    """
    integers = jnp.asarray(array("integers", integers))
    if not jnp.issubdtype(integers.dtype, jnp.integer):
        raise TypeError(f"integers: dtype {integers.dtype}; wanted whole numbers")
    return integers.astype(floating_dtype("dtype", dtype)) * INT8_STEP


def quantized(weights: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The weights as the 8-bit network has them; their derivative is zero. NaN stays, so that a failure shows.

    Raises:
        TypeError: ``weights`` are no floating-point array.

    >>> quantized(jnp.array([1.01, -9.0]))
    Array([ 1.015625, -2.      ], dtype=float32)
    """
    weights = _numbers("weights", weights)
    return jnp.where(jnp.isnan(weights), jax.lax.stop_gradient(weights), from_int8(_rounded(weights), weights.dtype))


def _numbers(name: str, value: Any) -> Array:
    return jnp.asarray(arrays(name, array(name, value), floating=True))


def straight_through_quantized(weights: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """``quantized`` forwards; backwards as if nothing were rounded, and zero beyond the range.

    Raises:
        TypeError: ``weights`` are no floating-point array.

    >>> jax.vmap(jax.grad(straight_through_quantized))(jnp.array([0.1, 9.0]))
    Array([1., 0.], dtype=float32)
    """
    return _straight_through_quantized(_numbers("weights", weights))


def _quantized_backward(weights: Array, cotangent: Array) -> tuple[Array]:
    inside = (weights >= -128.5 * INT8_STEP) & (weights <= 127.5 * INT8_STEP)
    return (jnp.where(inside, cotangent, 0).astype(weights.dtype),)


_straight_through_quantized = jax.custom_vjp(quantized)
_straight_through_quantized.defvjp(lambda weights: (quantized(weights), weights), _quantized_backward)


class Int8Network(nn.Module):
    """A dense network whose kernels and biases are 8-bit integers times one step, with ReLU and a softmax.

    The parameters are latent real numbers, rounded in every forward pass: an ensemble moves them, and only integers
    reach the data.

    Attributes:
        widths: outputs of every layer, the last being the number of classes.
        straight_through: flag; True takes derivatives as if nothing were rounded, for the gradient method.

    Raises:
        TypeError: ``widths`` that are no whole numbers.
        ValueError: no widths, or widths below one.
    """

    widths: Sequence[int]
    straight_through: bool = False

    def __post_init__(self) -> None:
        sizes("widths", self.widths)
        super().__post_init__()

    @nn.compact
    def logits(self, x: Array) -> Array:
        """Values before the softmax, shape ``(batch, classes)``."""
        rounded = straight_through_quantized if self.straight_through else quantized
        x = x.reshape((x.shape[0], -1))
        for index, width in enumerate(self.widths):
            kernel = self.param(f"kernel_{index}", nn.initializers.xavier_normal(), (x.shape[-1], width))
            bias = self.param(f"bias_{index}", nn.initializers.zeros, (width,))
            x = x @ rounded(kernel) + rounded(bias)
            x = jax.nn.relu(x) if index + 1 < len(self.widths) else x
        return x

    def __call__(self, x: Array) -> Array:
        """Class probabilities, shape ``(batch, classes)``."""
        return jax.nn.softmax(self.logits(x))


class ExpertsNetwork(nn.Module):
    """A hidden layer of experts, of which each sample has one: the one that a router gives the largest number.

    A choice has no derivative: backpropagation trains the experts and never the router.

    Attributes:
        experts: number of experts.
        width: hidden units of an expert, with ReLU.
        classes: number of classes.
        straight_through: flag; True takes derivatives as if the router's softmax were the choice, for the gradient
            method.

    Raises:
        TypeError: sizes that are no whole numbers.
        ValueError: sizes below one.

    Source: Shazeer et al., *Outrageously large neural networks* (2017); Fedus et al., *Switch transformers* (2022).
    """

    experts: int
    width: int
    classes: int
    straight_through: bool = False

    def __post_init__(self) -> None:
        for name in ("experts", "width", "classes"):
            whole(name, getattr(self, name))
        super().__post_init__()

    @nn.compact
    def logits(self, x: Array) -> Array:
        """Values before the softmax, shape ``(batch, classes)``."""
        x = x.reshape((x.shape[0], -1))
        routed = nn.Dense(self.experts, use_bias=False, name="router")(x)
        chosen = jax.nn.one_hot(jnp.argmax(routed, axis=-1), self.experts, dtype=routed.dtype)
        if self.straight_through:
            soft = jax.nn.softmax(routed)
            chosen = chosen + soft - jax.lax.stop_gradient(soft)
        # Side by side with zeros for the others, so that what is computed is the chosen expert's alone.
        of_chosen = lambda rows: (chosen[..., None] * rows[:, None]).reshape((rows.shape[0], -1))
        layer = lambda width, name: nn.Dense(width, use_bias=False, name=name)
        hidden = layer(self.width, "hidden")(of_chosen(x)) + layer(self.width, "hidden_biases")(chosen)
        last = layer(self.classes, "last")(of_chosen(jax.nn.relu(hidden)))
        return last + layer(self.classes, "last_biases")(chosen)

    def __call__(self, x: Array) -> Array:
        """Class probabilities, shape ``(batch, classes)``."""
        return jax.nn.softmax(self.logits(x))


# How fast the derivative that is made up for a spike falls on both sides of the threshold.
_SURROGATE_SLOPE = 10.0


@jax.custom_jvp
def _spike(potential: Array) -> Array:
    return spike(potential)


@_spike.defjvp
def _spike_derivative(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (potential,), (tangent,) = primals, tangents
    return spike(potential), tangent / (1 + _SURROGATE_SLOPE * jnp.abs(potential - 1)) ** 2


def spike(potential: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """1 where a potential has reached the threshold 1, else 0. Its derivative is zero; NaN stays NaN.

    Raises:
        TypeError: ``potential`` is no floating-point array.

    >>> spike(jnp.array([0.5, 1.0]))
    Array([0., 1.], dtype=float32)
    """
    potential = _numbers("potential", potential)
    return jnp.where(jnp.isnan(potential), potential, (potential >= 1).astype(potential.dtype))


def surrogate_spike(potential: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    r"""``spike`` forwards; backwards the derivative of a fast sigmoid, :math:`1 / (1 + 10 |v - 1|)^2`.

    Raises:
        TypeError: ``potential`` is no floating-point array.

    Source: Zenke and Ganguli, *SuperSpike* (2018).

    >>> jax.vmap(jax.grad(surrogate_spike))(jnp.array([0.75, 1.0])).round(3)
    Array([0.082, 1.   ], dtype=float32)
    """
    return _spike(_numbers("potential", potential))


class SpikingNetwork(nn.Module):
    r"""A network of leaky neurons that integrate, and fire when they reach 1, over a number of steps of time.

    .. math:: v \leftarrow \beta v + W s + b, \qquad s' = [v \ge 1], \qquad v \leftarrow v - s'

    The images are a constant current into the first layer, each layer's spikes go into the next, and the last layer
    reads the mean of what the one before it fired. Heaviside's step has no useful derivative.

    Attributes:
        widths: outputs of every layer, the last being the number of classes.
        steps: number of steps.
        leak: factor beta in [0, 1] of what is left of a potential a step later.
        straight_through: flag; True takes derivatives as :func:`surrogate_spike` has them, for the gradient method.

    Raises:
        TypeError: widths or steps that are no whole numbers, a leak that is no number.
        ValueError: fewer than two widths, sizes below one, a leak out of range.

    Source: Neftci, Mostafa and Zenke, *Surrogate gradient learning in spiking neural networks* (2019).
    """

    widths: Sequence[int]
    steps: int = 8
    leak: float = 0.9
    straight_through: bool = False

    def __post_init__(self) -> None:
        sizes("widths", self.widths)
        if len(self.widths) < 2:
            raise ValueError(f"widths: {tuple(self.widths)}; wanted a hidden layer at least, and the classes")
        whole("steps", self.steps)
        real("leak", self.leak, FROM_0_TO_1)
        super().__post_init__()

    @nn.compact
    def logits(self, x: Array) -> Array:
        """Values before the softmax, shape ``(batch, classes)``."""
        fires = surrogate_spike if self.straight_through else spike
        current = nn.Dense(self.widths[0], name="layer_0")(x.reshape((x.shape[0], -1)))
        between = list(enumerate(self.widths))[1:-1]
        layers = [nn.Dense(width, name=f"layer_{index}") for index, width in between]
        potentials = [jnp.zeros((x.shape[0], width), current.dtype) for width in self.widths[:-1]]
        fired = jnp.zeros_like(potentials[-1])
        for _ in range(self.steps):
            drive = current
            for index, potential in enumerate(potentials):
                potential = self.leak * potential + drive
                spikes = fires(potential)
                potentials[index] = potential - spikes
                drive = layers[index](spikes) if index < len(layers) else spikes
            fired = fired + drive / self.steps
        return nn.Dense(self.widths[-1], name=f"layer_{len(self.widths) - 1}")(fired)

    def __call__(self, x: Array) -> Array:
        """Class probabilities, shape ``(batch, classes)``."""
        return jax.nn.softmax(self.logits(x))
