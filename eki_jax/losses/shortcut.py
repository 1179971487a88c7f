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

from eki_jax._types import LossFn
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
    if not isinstance(found.flag, jax.core.Tracer):
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
    if found is None or not isinstance(found.flag, jax.core.Tracer):
        return by_shortcut(lambda loss, targets: body(loss, targets, state), loss, targets)
    # Loops of one turn or none: what a loop carries is changed in place, but of a state that two branches of a
    # conditional change the compiler keeps a copy (XLA of JAX 0.10).
    turns = axis.all(found.flag).astype(jnp.int32)
    short = lambda state: body(found.loss, found.targets, state)
    whole = lambda state: body(loss, targets, state)
    rest = jax.tree.map(jnp.zeros_like, jax.eval_shape(short, state)[1])
    carry = lax.fori_loop(0, turns, lambda _, carry: short(carry[0]), (state, rest))
    return lax.fori_loop(0, 1 - turns, lambda _, carry: whole(carry[0]), carry)
