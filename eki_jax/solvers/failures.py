"""What to do about particles whose model failed, that is returned something not finite.

A simulator diverges for some parameters, a network overflows. A policy decides what a step does then; in every case
the failed particles are left out of the means and products of that step, so that the others are not lost with them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import checkify

from eki_jax._checks import function, traceable
from eki_jax._types import Array, Ensemble
from eki_jax.kernel.axes import Axis
from eki_jax.kernel.health import finite_particles
from eki_jax.kernel.keys import particle_key
from eki_jax.kernel.particles import local_size, wide_dtype
from eki_jax.solvers.reasons import Reason, StepRefused, refusals_in


class FailurePolicy(NamedTuple):
    """What happens to failed particles after a step.

    Attributes:
        apply: function ``apply(ensemble, healthy, count, axis_name) -> ensemble``, with ``healthy`` of shape (J,).
    """

    apply: Callable[[Ensemble, Array, Array, str | None], Ensemble]


def keep_failed() -> FailurePolicy:
    """Failed particles stay where they are and take no part until their outputs are finite again.

    >>> import jax.numpy as jnp
    >>> keep_failed().apply(jnp.array([1.0, 2.0]), jnp.array([True, False]), 0, None)
    Array([1., 2.], dtype=float32)
    """
    return FailurePolicy(lambda ensemble, healthy, count, axis_name: ensemble)


def redraw_failed(key: Array) -> FailurePolicy:
    """Failed particles are drawn anew around the healthy ones' mean, with their unbiased covariance.

    So the ensemble keeps its covariance on average, and its affine span. With fewer than two healthy particles there is
    nothing to draw from and the ensemble is kept.

    Args:
        key: JAX random key of the draws; folded with the step count and each particle's index.

    >>> import jax, jax.numpy as jnp
    >>> u = jnp.array([[1.0], [3.0], [jnp.nan]])
    >>> healthy = jnp.array([True, True, False])
    >>> new = redraw_failed(jax.random.key(0)).apply(u, healthy, jnp.array(0), None)
    >>> bool(jnp.isfinite(new).all()), new[:2, 0]
    (True, Array([1., 3.], dtype=float32))
    """
    own = particle_key("key", key)

    def apply(ensemble: Ensemble, healthy: Array, count: Array, axis_name: str | None) -> Ensemble:
        size = local_size(ensemble, name="ensemble", floating=True)
        if jnp.shape(healthy) != (size,):
            raise ValueError(
                f"ensemble: {size} particles, but flags of shape {jnp.shape(healthy)}; wanted one for each"
            )
        axis, healthy = Axis(axis_name), healthy & finite_particles(ensemble)
        ok, size = axis.sum(jnp.sum(healthy, dtype=jnp.int32)), healthy.shape[0] * axis.size
        redraw = partial(_redraw, jax.random.fold_in(own, count), healthy=healthy, ok=ok, axis=axis)
        return lax.cond((ok < size) & (ok >= 2), redraw, lambda ensemble: ensemble, ensemble)

    return FailurePolicy(apply)


def raise_failed() -> FailurePolicy:
    """A failed particle is an error; the state before the step is still the caller's.

    A compiled function cannot raise by itself: wrap the step in :func:`checked`.

    >>> import jax.numpy as jnp
    >>> policy = raise_failed()
    >>> apply = checked(lambda healthy: policy.apply(jnp.zeros(2), healthy, 0, None))
    >>> apply(jnp.array([True, False]))
    Traceback (most recent call last):
        ...
    FloatingPointError: 1 of 2 particles returned outputs or losses that are not finite
    """

    def apply(ensemble: Ensemble, healthy: Array, count: Array, axis_name: str | None) -> Ensemble:
        axis = Axis(axis_name)  # the particles of all devices count
        failed = axis.sum(jnp.sum(~healthy, dtype=jnp.int32))
        size = jnp.asarray(healthy.shape[0] * axis.size, jnp.int32)
        message = "{failed} of {size} particles returned outputs or losses that are not finite"
        checkify.check(failed == 0, message, failed=failed, size=size)
        return ensemble

    return FailurePolicy(apply)


def checked(fn: Callable[..., Any]) -> Callable[..., Any]:
    """``fn`` compiled, raising where a step of it was refused or :func:`raise_failed` found a failed particle.

    Args:
        fn: pure function, such as a solver's ``step``.

    Returns:
        A function of the same arguments; it waits for the result, so it is for debugging and for costly models.

    Raises:
        TypeError: ``fn`` is no function; from the returned function, arguments that are no arrays.
        StepRefused: from the returned function, where an ``info`` in its result says that a step was refused; it names
            the reason and the remedy.
        FloatingPointError: from the returned function, where :func:`raise_failed` found a failed particle.

    >>> import eki_jax
    >>> solver = eki_jax.euler(lambda u, x: x * u, eki_jax.squared_error())
    >>> state = solver.init(jnp.array([[1.0], [3.0]]))
    >>> checked(solver.step)(state, (2.0, jnp.array([jnp.nan])))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    eki_jax.solvers.reasons.StepRefused: step refused: TARGETS: the targets are not finite; ...
    """
    function("fn", fn, "a pure function, such as a solver's step")
    compiled = jax.jit(checkify.checkify(fn, errors=checkify.user_checks))

    def call(*args: Any) -> Any:
        function("fn", fn, f"a function of the {len(args)} that it is given", arguments=len(args))
        error, result = compiled(*traceable("args", args))
        message = error.get()
        if message:
            raise FloatingPointError(message.split(" (`check` failed)")[0].split("\n")[0])
        codes = refusals_in(result)
        if codes.any():
            raise StepRefused(Reason(int(codes[codes > 0][0])))
        return result

    return call


def _redraw(key: Array, ensemble: Ensemble, *, healthy: Array, ok: Array, axis: Axis) -> Ensemble:
    local = local_size(ensemble, name="ensemble")
    every = axis.gathered(healthy)
    keys = jax.vmap(partial(jax.random.fold_in, key))(axis.own_indices(local))
    normal = jax.vmap(lambda k: jax.random.normal(k, every.shape))(keys)
    # Of n healthy particles out of J. With C alone the ensemble's covariance would shrink on average, by the share of
    # 1/n that the others lack and of 1/J that the draws' own mean takes.
    number, size = ok.astype(normal.dtype), len(every)
    scale = jnp.sqrt(size / ((number - 1) * (size - 1)))

    def drawn(rows: Array) -> Array:
        """Draws for this device's particles from some columns of everybody's, shape (J, columns)."""
        rows = jnp.where(every[:, None], rows, 0)
        mean = jnp.sum(rows, axis=0) / ok
        anomalies = jnp.where(every[:, None], rows - mean, 0)
        return mean + normal.astype(rows.dtype) @ anomalies * scale.astype(rows.dtype)

    def leaf(u: Array) -> Array:
        rows = u.reshape(local, -1).astype(wide_dtype(u.dtype))
        new = _by_blocks(drawn, rows, axis) if axis.is_mapped else drawn(rows)
        return jnp.where(healthy[:, None], u.reshape(local, -1), new.astype(u.dtype)).reshape(u.shape)

    return jax.tree.map(leaf, ensemble)


def _by_blocks(drawn: Callable[[Array], Array], rows: Array, axis: Axis) -> Array:
    """``drawn`` of one block of columns after another, gathered: no device holds more than its share at a time."""
    local, columns = rows.shape
    blocks = axis.size
    width = -(-columns // blocks)
    padded = jnp.pad(rows, ((0, 0), (0, blocks * width - columns)))
    parts = jnp.moveaxis(padded.reshape(local, blocks, width), 1, 0)
    done = lax.map(lambda part: drawn(axis.gathered(part)), parts)
    return jnp.moveaxis(done, 0, 1).reshape(local, blocks * width)[:, :columns]
