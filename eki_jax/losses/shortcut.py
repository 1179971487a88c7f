"""Cheaper targets where their values allow it: one-hot labels become integer ones, which need one output a sample.

The support of the others has another shape, so all that depends on it stands in a function of the loss and the targets,
which is compiled for both. Where the values are not known while tracing, a flag decides in the compiled program which
of the two runs (under :func:`jax.vmap` over the targets, both do).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from eki_jax._checks import is_known
from eki_jax._types import Array, LossFn
from eki_jax.kernel.axes import Axis
from eki_jax.losses.protocol import shortcut_of

Result = TypeVar("Result")
State = TypeVar("State")
Rest = TypeVar("Rest")


def by_shortcut(
    body: Callable[[LossFn, Any], Result],
    loss: LossFn,
    targets: Any,
    *,
    axis: Axis = Axis(),  # noqa: B008
) -> Result:
    """``body(loss, targets)``, with the loss's shortcut in their place where that gives the same.

    Args:
        body: function ``body(loss, targets)`` whose result has the same shapes and dtypes for both.
        loss: loss of one particle.
        targets: targets that ``loss`` takes, or one for each particle.
        axis: devices over which ``targets`` are spread, so that all of them go the same way; none where all have all.

    Raises:
        TypeError: ``body`` gives other shapes or dtypes for the shortcut.

    >>> from eki_jax.losses import cross_entropy
    >>> body = lambda loss, targets: print(targets.shape) or loss(jnp.full((2, 2), 0.5), targets)
    >>> float(by_shortcut(body, cross_entropy(delta=1.5), jnp.eye(2))) < 0
    (2,)
    True
    """
    found = shortcut_of(loss, targets)
    if found is None:
        return body(loss, targets)
    short, whole = (lambda: body(found.loss, found.targets)), (lambda: body(loss, targets))
    if is_known(found.flag):
        return short() if found.flag else whole()
    return lax.cond(axis.all(found.flag), short, whole)


def in_place_by_shortcut(
    body: Callable[[LossFn, Any, State], tuple[State, Rest]],
    loss: LossFn,
    targets: Any,
    state: State,
    *,
    axis: Axis = Axis(),  # noqa: B008
) -> tuple[State, Rest]:
    """``body(loss, targets, state)`` as :func:`by_shortcut` does it, without a copy of a state that is donated.

    Args:
        body: function ``body(loss, targets, state) -> (state, rest)``; the state has the shapes and dtypes it had.
        loss: loss of one particle.
        targets: targets that ``loss`` takes, or one for each particle.
        state: pytree of arrays.
        axis: devices over which ``targets`` are spread.

    Raises:
        TypeError: ``body`` gives other shapes or dtypes for the shortcut, or for the state.

    >>> from eki_jax.losses import cross_entropy
    >>> step = lambda y: in_place_by_shortcut(lambda loss, y, n: (n + 1, y.ndim), cross_entropy(), y, jnp.zeros(1))
    >>> [int(jax.jit(step)(y)[1]) for y in (jnp.eye(2), 0.5 * jnp.eye(2))]
    [1, 2]
    """
    found = shortcut_of(loss, targets)
    if found is None or is_known(found.flag):
        return by_shortcut(lambda loss, targets: body(loss, targets, state), loss, targets)
    short, short_values = _closed(lambda state: body(found.loss, found.targets, state), state)
    whole, whole_values = _closed(lambda state: body(loss, targets, state), state)
    rest = jax.tree.map(jnp.zeros_like, jax.eval_shape(short, state, *short_values)[1])

    @jax.custom_jvp
    def either(flag: Array, state: Any, short_values: Any, whole_values: Any) -> Any:
        # Loops of one turn or none: what a loop carries is changed in place, but of a state that two branches of a
        # conditional change the compiler keeps a copy (XLA of JAX 0.10).
        turns = flag.astype(jnp.int32)
        carry = lax.fori_loop(0, turns, lambda _, carry: short(carry[0], *short_values), (state, rest))
        return lax.fori_loop(0, 1 - turns, lambda _, carry: whole(carry[0], *whole_values), carry)

    @either.defjvp
    def derivative(primals: Any, tangents: Any) -> Any:
        # The conditional for derivatives: none in reverse goes through a loop of unknown length.
        flag, *primal = primals

        def branch(state: Any, short_values: Any, whole_values: Any) -> Any:
            return lax.cond(flag, lambda: short(state, *short_values), lambda: whole(state, *whole_values))

        return jax.jvp(branch, tuple(primal), tuple(tangents[1:]))

    return either(axis.all(found.flag), state, short_values, whole_values)


def _closed(function: Callable[[Any], Any], argument: Any) -> tuple[Callable[..., Any], list[Any]]:
    """``function`` as one that takes all arrays that it closes over, and these.

    A function with a derivative of its own may close over none that is traced; :func:`jax.closure_convert` leaves
    integers behind.
    """
    jaxpr, shape = jax.make_jaxpr(function, return_shape=True)(argument)
    structure: Any = jax.tree.structure(shape)

    def open_function(argument: Any, *values: Any) -> Any:
        return structure.unflatten(jax.core.eval_jaxpr(jaxpr.jaxpr, list(values), *jax.tree.leaves(argument)))

    return open_function, list(jaxpr.consts)
