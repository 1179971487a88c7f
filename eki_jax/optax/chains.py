"""The paper's methods as chains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optax

from eki_jax._types import Array, Prior
from eki_jax.kernel.costs import Communication
from eki_jax.kernel.products import Contraction
from eki_jax.optax.gradient import ensemble_gradient, kernel_options, scale_by_drift_norm
from eki_jax.optax.momentum import scale_by_nesterov
from eki_jax.optax.prior import add_prior_noise


def eki(
    h0: Any = 1.0,
    eps: Any = 0.5,
    *,
    prior: Prior | None = None,
    key: Array | None = None,
    axis_name: str | None = None,
    contraction: Contraction | None = None,
    communication: Communication | None = None,
    precision: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """The paper's EKI as a chain; :func:`eki_jax.euler` step for step.

    ``chain(ensemble_gradient(), scale_by_drift_norm(h0, eps), scale(-1.0))``, and :func:`add_prior_noise` behind the
    step size where a prior is given. A particle that is not finite is left out and stays where it is,
    as in :func:`eki_jax.euler`.

    Args:
        h0: length of the step, > 0; see :func:`scale_by_drift_norm`.
        eps: bound of the step, >= 0; see :func:`scale_by_drift_norm`.
        prior: distribution whose noise is added at every step; None for no noise.
        key: JAX random key of the noise; wanted where ``prior`` is given.
        axis_name: mapped axis over which the particles are spread.
        contraction: order of the kernel's products; the cheaper one by default.
        communication: layout in which devices share their particles; the cheapest by default.
        precision: precision of the kernel's matrix products.

    Returns:
        A transformation; ``update`` takes the extra arguments of :func:`ensemble_gradient`.

    Raises:
        TypeError: a prior without a key or a key without a prior.
        ValueError: ``h0`` <= 0 or ``eps`` < 0.

    >>> import jax, jax.numpy as jnp, optax
    >>> from eki_jax import losses
    >>> from eki_jax.optax import eki, value_and_extra_args
    >>> f = jax.jit(value_and_extra_args(lambda u, x: x * u, losses.squared_error()))
    >>> tx, ensemble = eki(), jnp.array([[1.0], [3.0]])
    >>> state, update = tx.init(ensemble), jax.jit(tx.update)
    >>> for _ in range(20):
    ...     values, extra = f(ensemble, (2.0, jnp.array([8.0])))
    ...     updates, state = update(jnp.zeros_like(ensemble), state, ensemble, **extra)
    ...     ensemble = optax.apply_updates(ensemble, updates)
    >>> bool(jnp.allclose(ensemble, 4.0, atol=0.2))
    True
    """
    options = kernel_options(axis_name, contraction, communication, precision)
    noise = _noise(prior, key, h0, eps, axis_name)
    return optax.chain(
        ensemble_gradient(**options),
        scale_by_drift_norm(h0, eps, **options),
        *([] if noise is None else [noise]),
        optax.scale(-1.0),
    )


def meki(
    h0: Any = 1.0,
    eps: Any = 0.5,
    momentum: float | Callable[[Array], Any] = 0.9,
    *,
    prior: Prior | None = None,
    key: Array | None = None,
    axis_name: str | None = None,
    contraction: Contraction | None = None,
    communication: Communication | None = None,
    precision: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """The paper's MEKI as a chain, :func:`eki_jax.nesterov` step for step; with a prior its MEKI(R).

    ``chain(ensemble_gradient(), scale_by_drift_norm(h0, eps), scale_by_nesterov(momentum), scale(-1.0))``, with
    ``noise=add_prior_noise(prior, key, h0, eps)`` where a prior is given.

    Args:
        h0: length of the step, > 0; see :func:`scale_by_drift_norm`.
        eps: bound of the step, >= 0; see :func:`scale_by_drift_norm`.
        momentum: factor in [0, 1), or a schedule of the step count; see :func:`scale_by_nesterov`.
        prior: distribution whose noise is added to the momenta at every step; None for no noise.
        key: JAX random key of the noise; wanted where ``prior`` is given.
        axis_name: mapped axis over which the particles are spread.
        contraction: order of the kernel's products; the cheaper one by default.
        communication: layout in which devices share their particles; the cheapest by default.
        precision: precision of the kernel's matrix products.

    Returns:
        A transformation; ``update`` takes the extra arguments of :func:`ensemble_gradient`. The parameters are the
        extrapolated particles, ``nesterov``'s ``state.ensemble``.

    Raises:
        TypeError: a prior without a key or a key without a prior.
        ValueError: ``h0`` <= 0, ``eps`` < 0 or ``momentum`` outside [0, 1).

    >>> import jax, jax.numpy as jnp, optax
    >>> from eki_jax import losses
    >>> from eki_jax.optax import meki, value_and_extra_args
    >>> f = jax.jit(value_and_extra_args(lambda u, x: x * u, losses.squared_error()))
    >>> tx, ensemble = meki(momentum=0.5), jnp.array([[1.0], [3.0]])
    >>> state, update = tx.init(ensemble), jax.jit(tx.update)
    >>> for _ in range(20):
    ...     values, extra = f(ensemble, (2.0, jnp.array([8.0])))
    ...     updates, state = update(jnp.zeros_like(ensemble), state, ensemble, **extra)
    ...     ensemble = optax.apply_updates(ensemble, updates)
    >>> bool(jnp.allclose(ensemble, 4.0, atol=0.2))
    True
    """
    options = kernel_options(axis_name, contraction, communication, precision)
    return optax.chain(
        ensemble_gradient(**options),
        scale_by_drift_norm(h0, eps, **options),
        scale_by_nesterov(momentum, noise=_noise(prior, key, h0, eps, axis_name)),
        optax.scale(-1.0),
    )


def _noise(
    prior: Prior | None, key: Array | None, h0: float, eps: float, axis_name: str | None
) -> optax.GradientTransformationExtraArgs | None:
    if (prior is None) != (key is None):
        raise TypeError(f"{'prior' if prior is None else 'key'}: None; wanted both a prior and a key, or neither")
    return None if prior is None or key is None else add_prior_noise(prior, key, h0, eps, axis_name=axis_name)
