"""A test of a loss of one's own: what it offers against its value."""

from __future__ import annotations

from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np

from eki_jax._checks import POSITIVE, arrays, function, real
from eki_jax._types import Array, LossFn
from eki_jax.losses.curvature import curvature
from eki_jax.losses.protocol import TOLERANCE, curved, least_of, scalar, separable, shortcut_of
from eki_jax.losses.support import support_of


def check_loss(loss: LossFn, outputs: Any, targets: Any, *, tolerance: float = 1e-3) -> None:
    """Raise where what a loss offers, see :mod:`eki_jax.losses.protocol`, disagrees with its value and derivatives.

    Meant for a test of a new loss, with a batch of few outputs: the whole Hessian is formed.

    Args:
        loss: loss of one particle.
        outputs: one particle's outputs at which to compare, M numbers.
        targets: targets that ``loss`` takes.
        tolerance: largest difference, relative to the largest number compared.

    Raises:
        TypeError: ``loss`` is no function, outputs are no arrays, ``tolerance`` no number; the loss offers half of what
            goes together.
        ValueError: the first of its attributes that disagrees, by name.

    >>> import jax.numpy as jnp
    >>> from eki_jax.losses import cross_entropy
    >>> check_loss(cross_entropy(), jnp.array([[0.2, 0.8], [0.5, 0.5]]), jnp.array([1, 0]))
    >>> class Wrong:
    ...     reduction = "sum"
    ...     per_sample = lambda self, outputs, targets: jnp.sum(outputs**2, axis=-1)
    ...     __call__ = lambda self, outputs, targets: jnp.mean(outputs**2)
    >>> check_loss(Wrong(), jnp.ones((3, 2)), None)
    Traceback (most recent call last):
        ...
    ValueError: loss: its per_sample with reduction = 'sum' gives 6, its value is 1; wanted the same to 0.001
    """
    function("loss", loss, "a function of outputs and targets", arguments=2)
    arrays("outputs", outputs, floating=True, some=True)
    real("tolerance", tolerance, POSITIVE)
    flat, unravel = jax.flatten_util.ravel_pytree(outputs)

    def of_flat(z: Array) -> Array:
        return scalar(loss(unravel(z), targets))

    value, gradient, hessian = jax.jit(lambda z: (of_flat(z), jax.grad(of_flat)(z), jax.hessian(of_flat)(z)))(flat)

    def compare(name: str, found: Any, wanted: Any, what: str = "its value is") -> None:
        a, b = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
        if a.shape != b.shape:
            raise ValueError(f"loss: its {name} has shape {a.shape}; wanted {b.shape}")
        if not np.allclose(a, b, rtol=0, atol=tolerance * max(np.max(np.abs(b), initial=0), 1e-30), equal_nan=True):
            worst = np.unravel_index(np.argmax(np.abs(a - b)), a.shape)
            raise ValueError(
                f"loss: its {name} gives {a[worst]:.6g}, {what} {b[worst]:.6g}; wanted the same to {tolerance}"
            )

    select, reduced = support_of(loss, targets)
    by_support = jax.jit(jax.value_and_grad(lambda z: reduced(select(unravel(z), targets), targets)))(flat)
    compare("of_support", by_support[0], value)
    compare("of_support's gradient", by_support[1], gradient, "its gradient is")
    by_samples = separable(loss)
    if by_samples is not None:
        values = by_samples.per_sample(outputs, targets)
        compare("per_sample", values.shape, jax.tree.leaves(outputs)[0].shape[:1], "the samples are")
        total = jnp.mean(values) if by_samples.reduction == "mean" else jnp.sum(values)
        compare(f"per_sample with reduction = {by_samples.reduction!r}", total, value)
    if curved(loss) is not None or by_samples is not None:
        name = "per_sample's" if curved(loss) is None else "curvature's"
        model = curvature(loss, outputs, targets)
        compare(f"{name} value", model.value, value)
        compare(f"{name} gradient", model.gradient, gradient, "its gradient is")
        factor = model.times_factor(jnp.eye(flat.size, dtype=model.gradient.dtype))
        convex = least_of(jnp.linalg.eigvalsh(hessian)) >= -TOLERANCE
        compare(f"{name} is_convex", model.is_convex, convex, "by its Hessian it is")
        if bool(convex):
            compare(f"{name} factor times itself", factor @ factor.T, hessian, "its Hessian has")
            rest = 0 if model.remainder is None else model.remainder
            compare(f"{name} coordinates", factor @ model.coordinates + rest, gradient, "its gradient is")
    short = shortcut_of(loss, targets)
    if short is not None and bool(short.flag):
        found = jax.jit(jax.value_and_grad(lambda z: scalar(short.loss(unravel(z), short.targets))))(flat)
        compare("shortcut", found[0], value)
        compare("shortcut's gradient", found[1], gradient, "its gradient is")
