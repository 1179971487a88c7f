"""The ensemble's direction and the adaptive step, from the model's outputs and cotangents."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from eki_jax._checks import function, one_of, pair, traceable
from eki_jax._types import Array, Batch, Ensemble, ForwardFn, LossFn
from eki_jax.kernel.axes import Axes, Axis
from eki_jax.kernel.costs import Communication
from eki_jax.kernel.health import OUTLIER_CUT, finite_particles, near_particles
from eki_jax.kernel.once import compiled_once
from eki_jax.kernel.particles import check_like, local_size, wide_dtype
from eki_jax.kernel.precision import Precision, check_precision
from eki_jax.kernel.products import Contraction, Products
from eki_jax.losses.support import evaluate_support, value_and_cotangents
from eki_jax.optax._checks import check_extra_args, check_given, check_params, check_stacked, check_zeros
from eki_jax.solvers.step_sizes import frobenius_step_size


def value_and_extra_args(
    forward: ForwardFn, loss: LossFn, *, chunk_size: int | None = None, precision: Precision = None
) -> Callable[[Ensemble, Batch], tuple[Array, dict[str, Any]]]:
    """The particles' losses, and the extra arguments that :func:`ensemble_gradient` and its chains want.

    Args:
        forward: function ``forward(params, x) -> outputs`` of one particle.
        loss: function ``loss(outputs, targets) -> scalar`` of one particle.
        chunk_size: number of particles evaluated at a time; by default from a memory budget.
        precision: precision of the model's products, ``"bf16"`` or its own, see :func:`eki_jax.evaluate`.

    Returns:
        ``f(ensemble, (x, targets)) -> (losses, {"outputs": ..., "cotangents": ...})``: losses of shape (J,), the
        outputs on which the loss depends and the loss's gradient with respect to them, both of shape (J, ...).

    Raises:
        TypeError: ``forward`` or ``loss`` is no function; from ``f``: leaves that are not floating-point, a batch that
            is no pair.
        ValueError: from ``f``: leaves that disagree on J, a loss that is no scalar, targets that do not fit.

    >>> import jax.numpy as jnp
    >>> from eki_jax import losses
    >>> f = value_and_extra_args(lambda u, x: x * u, losses.squared_error())
    >>> values, extra = f(jnp.array([[1.0], [3.0]]), (2.0, jnp.array([1.0])))
    >>> values, extra["outputs"].ravel(), extra["cotangents"].ravel()
    (Array([ 0.5, 12.5], dtype=float32), Array([2., 6.], dtype=float32), Array([1., 5.], dtype=float32))
    """
    function("forward", forward, "a model, forward(params, x) -> outputs", arguments=2)
    function("loss", loss, "a function of outputs and targets", arguments=2)
    check_precision(precision)

    def f(ensemble: Ensemble, batch: Batch) -> tuple[Array, dict[str, Any]]:
        x, targets = traceable("batch", pair("batch", batch))
        local_size(ensemble, name="ensemble", floating=True)
        entries, reduced = evaluate_support(
            forward, loss, ensemble, x, targets, chunk_size=chunk_size, precision=precision
        )
        losses, cotangents = value_and_cotangents(reduced, entries, targets)
        return losses, {"outputs": entries, "cotangents": cotangents}

    return f


def ensemble_gradient(
    *,
    axis_name: str | None = None,
    contraction: Contraction | None = None,
    communication: Communication | None = None,
    precision: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""The ensemble's direction ``+C_uG r`` as the first transformation of a chain; see :func:`eki_jax.direction`.

    ``update(zeros, state, ensemble, *, outputs, cotangents, **extra)``: ``zeros`` is a pytree like the ensemble and
    is not used but to carry the shapes (values that are known and not zero are an error); ``outputs`` and
    ``cotangents`` have shape (J, ...) and come from :func:`value_and_extra_args`; further extra arguments are ignored.

    Args:
        axis_name: mapped axis over which the particles are spread (vmap, pmap, shard_map).
        contraction: order of the kernel's products; the cheaper one by default.
        communication: layout in which devices share their particles; the cheapest by default.
        precision: precision of the kernel's matrix products.

    Returns:
        A transformation without a state.

    Raises:
        TypeError: from ``update``: no ``outputs`` or ``cotangents``; leaves that are not floating-point.
        ValueError: from ``init`` and ``update``: parameters that are not stacked; no parameters; outputs with another
            J; a gradient with respect to the parameters in place of ``zeros`` or of ``cotangents``.

    >>> import jax, jax.numpy as jnp, optax
    >>> from eki_jax import losses
    >>> f = value_and_extra_args(lambda u, x: x * u[:1], losses.squared_error())
    >>> ensemble = jnp.array([[1.0, 5.0], [3.0, 4.0]])
    >>> tx = optax.chain(ensemble_gradient(), optax.scale(-0.1))
    >>> state = tx.init(ensemble)
    >>> values, extra = f(ensemble, (2.0, jnp.array([1.0])))
    >>> updates, state = tx.update(jnp.zeros_like(ensemble), state, ensemble, **extra)
    >>> optax.apply_updates(ensemble, updates)
    Array([[0.8, 5.1],
           [2. , 4.5]], dtype=float32)
    """
    options = kernel_options(axis_name, contraction, communication, precision)

    def init(params: Ensemble) -> optax.EmptyState:
        check_stacked(params, "ensemble_gradient")
        return optax.EmptyState()

    def update(
        updates: Ensemble,
        state: optax.EmptyState,
        params: Ensemble | None = None,
        *,
        outputs: Any = None,
        cotangents: Any = None,
        **extra: Any,
    ) -> tuple[Ensemble, optax.EmptyState]:
        del extra
        check_given("ensemble_gradient", outputs, cotangents)
        check_params(params, "ensemble_gradient")
        if not jax.tree.leaves(params):  # all masked
            return updates, state
        check_zeros(updates, params)
        check_extra_args(outputs, cotangents, params)
        return _gradient(params, outputs, cotangents, **options), state

    return optax.GradientTransformationExtraArgs(init, update)


def scale_by_drift_norm(
    h0: Any = 1.0,
    eps: Any = 0.5,
    *,
    axis_name: str | None = None,
    contraction: Contraction | None = None,
    communication: Communication | None = None,
    precision: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""The paper's adaptive step, ``J h0 / (||D||_F + eps)`` times the updates.

    See :func:`eki_jax.step_sizes.frobenius_step_size` (Kovachki and Stuart, arXiv:1808.03620, section 4.3.3).
    ``update(updates, state, params=None, *, outputs, cotangents, **extra)`` takes the extra arguments of
    :func:`ensemble_gradient`.

    Args:
        h0: length of the step, > 0.
        eps: bound of the step, >= 0, in the units of the drift norm.
        axis_name: mapped axis over which the particles are spread.
        contraction: order of the kernel's products, the same as for :func:`ensemble_gradient`, whose products then
            serve both.
        communication: layout in which devices share their particles, the same as for :func:`ensemble_gradient`.
        precision: precision of the matrix products.

    Returns:
        A transformation without a state.

    Raises:
        TypeError: from ``update``: no ``outputs`` or ``cotangents``.
        ValueError: ``h0`` <= 0 or ``eps`` < 0; from ``update``: outputs whose J is not the updates'.

    >>> import jax.numpy as jnp
    >>> tx = scale_by_drift_norm(h0=3.0, eps=0.0)
    >>> outputs, cotangents = jnp.array([[0.0], [2.0]]), jnp.array([[3.0], [4.0]])  # a drift norm of sqrt(50)
    >>> updates, _ = tx.update(jnp.array([[50.0], [0.0]]), tx.init(None), outputs=outputs, cotangents=cotangents)
    >>> round(float(updates[0, 0] / 50**0.5), 4)
    6.0
    """
    step_size = frobenius_step_size(h0, eps)
    options = kernel_options(axis_name, contraction, communication, precision)

    def update(
        updates: Ensemble,
        state: optax.EmptyState,
        params: Ensemble | None = None,
        *,
        outputs: Any = None,
        cotangents: Any = None,
        **extra: Any,
    ) -> tuple[Ensemble, optax.EmptyState]:
        del params, extra
        check_given("scale_by_drift_norm", outputs, cotangents)
        check_extra_args(outputs, cotangents, updates, name="updates")
        if not jax.tree.leaves(updates):  # all masked
            return updates, state
        norm, size = healthy_norm(updates, outputs, cotangents, **options)
        dt = jnp.asarray(step_size(norm, size, jnp.zeros((), jnp.int32)), norm.dtype)
        return _zero_unless(jnp.isfinite(dt * norm), _scaled(dt, updates)), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def kernel_options(
    axis_name: str | None, contraction: Contraction | None, communication: Communication | None, precision: Any
) -> dict[str, Any]:
    """The keywords that the transformations hand on to the kernel."""
    one_of("contraction", contraction, ("outputs", "particles", None))
    return {
        "axis_name": axis_name,
        "contraction": contraction,
        "communication": communication,
        "precision": precision,
    }


_SETTINGS = ("axis_name", "contraction", "communication", "precision")


# The kernel's loops and branches, which a chain that is called as it is would compile anew in every update.
@partial(compiled_once, static=_SETTINGS)
def _gradient(params: Ensemble, outputs: Any, cotangents: Any, **options: Any) -> Ensemble:
    products = _healthy_products(params, outputs, cotangents, **options)
    (d,), _ = products.map_blocks(lambda d, u: (d.astype(u.dtype),), params)
    return _zero_unless(jnp.isfinite(products.norm()), d)


@partial(compiled_once, static=_SETTINGS)
def healthy_norm(tree: Ensemble, outputs: Any, cotangents: Any, **options: Any) -> tuple[Array, Array]:
    """The drift norm of the particles that :func:`ensemble_gradient` takes its direction from, and their number."""
    products = _healthy_products(tree, outputs, cotangents, **options)
    norm = products.norm()
    return norm, jnp.asarray(products.size, norm.dtype)


def _healthy_products(
    tree: Ensemble, outputs: Any, cotangents: Any, *, axis_name: str | None, **options: Any
) -> Products:
    """The kernel's products without the particles that are not finite or far beyond all others."""
    check_like(cotangents, outputs)
    healthy = finite_particles((tree, outputs, cotangents))
    healthy &= near_particles(outputs, cotangents, healthy, OUTLIER_CUT, Axes(Axis(axis_name)))
    return Products.of(tree, outputs, cotangents, healthy=healthy, axis=Axis(axis_name), **options)


def _zero_unless(flag: Array, updates: Any) -> Any:
    """Updates that are refused, which a chain has no other word for, where ``flag`` is down."""
    return jax.tree.map(lambda leaf: jnp.where(flag, leaf, jnp.zeros((), leaf.dtype)), updates)


def _scaled(factor: Array, tree: Any) -> Any:
    """``factor * tree`` in the leaves' dtypes; the product is taken in a wider one."""

    def scale(leaf: Array) -> Array:
        wide = wide_dtype(leaf.dtype)
        return (jnp.asarray(factor, wide) * leaf.astype(wide)).astype(leaf.dtype)

    return jax.tree.map(scale, tree)
