"""An entry of the zoo: a model, one set of its parameters and a mini-batch to fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import eki_jax
from eki_jax import natural

MakeSolver = Callable[[Any], eki_jax.Solver]


class Instance(NamedTuple):
    """A model of one particle, and what it is to fit.

    Attributes:
        forward: function ``forward(params, x) -> outputs``, called with ``key=`` and ``state=`` where there is one;
            with a state it returns ``(outputs, state)``.
        params: one particle's parameters, as the module's own initializers drew them.
        batch: inputs and targets, samples first.
        loss: loss of the outputs.
        state: state of the model that a call gives back, such as batch statistics; None without one.
        is_keyed: flag, True for a model that wants a key in each call.
        driver: name of what spreads its particles over devices, as :func:`eki_jax.sharding.shard_solver` takes it.
    """

    forward: Callable[..., Any]
    params: Any
    batch: tuple[Any, Any]
    loss: Any
    state: Any = None
    is_keyed: bool = False
    driver: Any = "shard_map"

    def solver(self, make: MakeSolver) -> eki_jax.Solver:
        """A solver of the model, with one key for all particles of a step, and its state passed on."""
        if self.state is None and not self.is_keyed:
            return make(self.forward)
        key = jax.random.key(11) if self.is_keyed else None
        return eki_jax.stateful(make, self.forward, key=key, state=self.state, common=True)

    def outputs(self, params: Any, x: Any) -> Any:
        """The outputs, with one key and the first state: a plain ``forward(params, x)``."""
        found = self.forward(params, x, **self._given(jax.random.key(12)))
        return found if self.state is None else found[0]

    def loss_at(self, params: Any) -> jax.Array:
        """The loss of one particle on the batch."""
        x, targets = self.batch
        return self.loss(self.outputs(params, x), targets)

    def _given(self, key: jax.Array) -> dict[str, Any]:
        given: dict[str, Any] = {"key": key} if self.is_keyed else {}
        return given if self.state is None else {**given, "state": self.state}


class Model(NamedTuple):
    """A line of the zoo's table.

    Attributes:
        name: name of the model, the same for all APIs that have it.
        api: name of the API that it is written in: linen, nnx, equinox or plain.
        make: function that makes the :class:`Instance`.
        has_gradient: flag; False for models whose derivatives are zero, so that there is no direction to compare with.
        rounding: largest relative difference between two ways to the same step that rounding explains.
        cosine: least cosine of the localized direction to the exact gradient that is right for this model.
        warns: text that the model's warnings have, for a model of which one is wanted.
        refuses: text of the error that a column ends in, by the column, for what is refused.
        note: text that says what is special about it.
    """

    name: str
    api: str
    make: Callable[[], Instance]
    has_gradient: bool = True
    rounding: float = 1e-5
    cosine: float = 0.85
    warns: str = ""
    refuses: Mapping[str, str] = MappingProxyType({})
    note: str = ""


def half_square(output: Any, target: Any) -> jax.Array:
    """Half the squared error of one sample, of an array or a pytree of them."""
    differences = jax.tree.map(lambda z, y: jnp.sum(jnp.square(z - y)), output, target)
    return 0.5 * sum(jax.tree.leaves(differences))


#: Mean over the samples of half the squared errors, which takes outputs of any structure.
SQUARES = natural.mean_over_samples(half_square)
#: Softmax cross-entropy of logits and integer labels.
CLASSES = natural.softmax_cross_entropy()


def taught(
    forward: Callable[..., Any],
    init: Callable[[jax.Array], Any],
    x: Any,
    loss: Any = SQUARES,
    *,
    state: Any = None,
    is_keyed: bool = False,
) -> Instance:
    """A student whose targets are the outputs of a teacher, the same model with other parameters.

    Args:
        forward: function of one particle.
        init: function from a key to parameters.
        x: inputs of the mini-batch.
        loss: loss; with :data:`CLASSES` the targets are the teacher's most likely classes.
        state: first state of the model.
        is_keyed: flag, True for a model that wants a key.

    Returns:
        An :class:`Instance`.
    """
    student = Instance(forward, init(jax.random.key(1)), (x, None), loss, state, is_keyed)
    targets = jax.jit(student.outputs)(init(jax.random.key(2)), x)
    if loss is CLASSES:
        targets = jnp.argmax(targets, axis=-1)
    return student._replace(batch=(x, targets))


def spiking(currents: jax.Array) -> jax.Array:
    """Rates (B, n) of units that leak, and spike above a half, from currents (B, T, n)."""
    voltage, rates = jnp.zeros_like(currents[:, 0]), 0.0
    for time in range(currents.shape[1]):
        voltage = 0.8 * voltage + currents[:, time]
        spikes = jnp.heaviside(voltage - 0.5, 0.0)
        voltage, rates = voltage * (1 - spikes), rates + spikes / currents.shape[1]
    return jnp.asarray(rates)
