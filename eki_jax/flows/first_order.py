"""The continuous method: the vector field of ensemble Kalman inversion, and its direction as a gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from eki_jax._checks import arrays, function, pair, traceable, whole
from eki_jax._types import Array, Batch, Ensemble, ForwardFn, LossFn
from eki_jax.kernel.axes import Axis
from eki_jax.kernel.costs import Communication
from eki_jax.kernel.health import finite_particles
from eki_jax.kernel.once import compiled_once
from eki_jax.kernel.particles import ensemble_size
from eki_jax.kernel.precision import check_precision
from eki_jax.kernel.products import direction
from eki_jax.losses.shortcut import by_shortcut
from eki_jax.losses.support import evaluate_support, value_and_cotangents


def value_and_direction(
    forward: ForwardFn,
    loss: LossFn,
    *,
    axis_name: str | None = None,
    chunk_size: int | None = None,
    communication: Communication | None = None,
    precision: Any = None,
) -> Callable[[Ensemble, Batch], tuple[Array, Ensemble]]:
    r"""The derivative-free counterpart of :func:`jax.value_and_grad`.

    Args:
        forward: function ``forward(params, x) -> outputs`` of one particle.
        loss: function ``loss(outputs, targets) -> scalar`` of one particle.
        axis_name: mapped axis over which the particles are spread.
        chunk_size: number of particles evaluated at a time; by default from a memory budget.
        communication: layout in which devices share their particles, see :func:`direction`; the cheapest by default.
        precision: precision of the kernel's matrix products; ``"bf16"`` is that of the model's too, see
            :func:`eki_jax.evaluate`.

    Returns:
        ``f(ensemble, (x, targets)) -> (losses, direction)``: the particles' losses, shape (J,), and
        ``C_uG grad L(G(u_j), targets)``, a pytree like the ensemble; hand it to any gradient transformation. A particle
        that is not finite takes no part: its row is zero, and its loss tells.

    Raises:
        TypeError, ValueError: from ``f``, as :func:`direction` does.

    >>> import jax.numpy as jnp
    >>> from eki_jax import losses
    >>> f = value_and_direction(lambda u, x: x * u["w"], losses.squared_error())
    >>> values, d = f({"w": jnp.array([[1.0], [3.0]])}, (2.0, jnp.array([0.0])))
    >>> values
    Array([ 2., 18.], dtype=float32)
    >>> d["w"]  # the variance of the particles, 1, times x^2 u
    Array([[ 4.],
           [12.]], dtype=float32)
    """
    function("forward", forward, "a model, forward(params, x) -> outputs", arguments=2)
    function("loss", loss, "a function of outputs and targets", arguments=2)
    if chunk_size is not None:
        whole("chunk_size", chunk_size, or_="None for a memory budget")
    check_precision(precision)

    def f(ensemble: Ensemble, batch: Batch) -> tuple[Array, Ensemble]:
        x, targets = batch
        ensemble_size(ensemble, axis_name=axis_name)

        def of_targets(loss: LossFn, targets: Any) -> tuple[Array, Ensemble]:
            entries, reduced = evaluate_support(
                forward, loss, ensemble, x, targets, chunk_size=chunk_size, precision=precision
            )
            losses, cotangents = value_and_cotangents(reduced, entries, targets)
            d = direction(
                ensemble, entries, cotangents, axis_name=axis_name, communication=communication, precision=precision
            )
            return losses, d

        return by_shortcut(of_targets, loss, targets)

    once = compiled_once(f)
    return lambda ensemble, batch: once(arrays("ensemble", ensemble), traceable("batch", pair("batch", batch)))


def vector_field(
    forward: ForwardFn, loss: LossFn, *, axis_name: str | None = None, chunk_size: int | None = None
) -> Callable[[Any, Ensemble, Batch], Ensemble]:
    r"""The right-hand side of ensemble Kalman inversion, ``du_j/dt = -C_uG(u) grad L(G(u_j), y)``.

    (Kovachki and Stuart, arXiv:1808.03620, equation 13; equation 12 with :func:`eki_jax.losses.squared_error`.)

    Args:
        forward: function ``forward(params, x) -> outputs`` of one particle.
        loss: function ``loss(outputs, targets) -> scalar`` of one particle.
        axis_name: mapped axis over which the particles are spread.
        chunk_size: number of particles evaluated at a time; by default from a memory budget.

    Returns:
        ``f(t, ensemble, (x, targets)) -> pytree like ensemble``, the signature an ODE solver wants. It does not depend
        on t. A particle that is not finite takes no part, and its own row is NaN, so that a solver of ODEs sees it;
        with fewer than two others, all rows are.

    Raises:
        TypeError, ValueError: from ``f``, as :func:`direction` does.

    >>> import jax.numpy as jnp
    >>> from eki_jax import losses
    >>> f = vector_field(lambda u, x: x * u, losses.squared_error())
    >>> f(0.0, jnp.array([[1.0], [3.0]]), (2.0, jnp.array([0.0])))
    Array([[ -4.],
           [-12.]], dtype=float32)
    """
    of_batch = value_and_direction(forward, loss, axis_name=axis_name, chunk_size=chunk_size)

    def f(t: Any, ensemble: Ensemble, batch: Batch) -> Ensemble:
        del t
        losses, d = of_batch(ensemble, batch)
        return seen_by_solvers(jax.tree.map(jnp.negative, d), finite_particles((losses, ensemble)), Axis(axis_name))

    return f


def seen_by_solvers(field: Ensemble, healthy: Array, axis: Axis) -> Ensemble:
    """A field whose rows are NaN where a particle failed: zeros would let a solver of ODEs go on without it unseen.

    >>> seen_by_solvers(jnp.ones((3, 1)), jnp.array([True, False, True]), Axis()).ravel()
    Array([ 1., nan,  1.], dtype=float32)
    """
    healthy &= axis.sum(jnp.sum(healthy, dtype=jnp.int32)) >= 2

    def leaf(rows: Array) -> Array:
        return jnp.where(healthy.reshape(-1, *[1] * (rows.ndim - 1)), rows, jnp.asarray(jnp.nan, rows.dtype))

    return jax.tree.map(leaf, field)
