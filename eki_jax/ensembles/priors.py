"""Priors: where an ensemble starts, and the noise that keeps it from collapsing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from eki_jax._types import Array, Params


class Gaussian(NamedTuple):
    """N(mean, F F^T), leaf by leaf; see :func:`gaussian` and :func:`xavier`.

    Attributes:
        mean: pytree of one particle's parameters.
        factor: pytree of the same structure: the factor F of each leaf's covariance: a number or an array of the
            leaf's shape (standard deviations), a (size, rank) matrix that acts on the flattened leaf, or a function
            from ``key`` to a centred draw of the leaf's shape.
    """

    mean: Params
    factor: Any

    def sample(self, key: Array) -> Params:
        """One particle's parameters, drawn from N(mean, F F^T)."""
        return jax.tree.map(lambda mean, noise: (mean + noise).astype(mean.dtype), self.mean, self.noise(key))

    def noise(self, key: Array) -> Params:
        """One draw of N(0, F F^T), a pytree like ``mean``."""
        means = jax.tree.leaves(self.mean)
        structure: Any = jax.tree.structure(self.mean)
        factors = structure.flatten_up_to(self.factor)
        keys = jax.random.split(key, len(means))
        return structure.unflatten([_noise(*args) for args in zip(keys, means, factors, strict=True)])


def gaussian(mean: Params, factor: Any) -> Gaussian:
    """A Gaussian prior with any covariance factor.

    Args:
        mean: pytree of floating-point arrays, one particle's parameters.
        factor: one factor for all leaves or a pytree of them with the structure of ``mean``. A factor F is a number, an
            array of the leaf's shape (standard deviations), a (size, rank) matrix with covariance F F^T of the
            flattened leaf, or a function ``key -> draw`` for covariances that are never formed.

    Returns:
        A prior with ``sample(key)`` and ``noise(key)``.

    Raises:
        TypeError: a leaf of ``mean`` is not floating-point.
        ValueError: a factor that does not fit its leaf.

    >>> import jax, jax.numpy as jnp
    >>> prior = gaussian({"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([[3.0], [3.0]])})
    >>> noise = prior.noise(jax.random.key(0))["w"]
    >>> bool(noise[0] == noise[1])  # rank one: the two move together
    True
    """
    mean = jax.tree.map(jnp.asarray, mean)
    structure: Any = jax.tree.structure(mean)
    if not structure.num_leaves:
        raise ValueError("mean: has no arrays; wanted one particle's parameters")
    if callable(factor) or isinstance(factor, int | float) or structure == jax.tree.structure(0):
        factor = structure.unflatten([factor] * structure.num_leaves)
    try:
        factors = structure.flatten_up_to(factor)
    except (ValueError, TypeError) as error:
        raise ValueError(f"factor: its structure does not fit the mean's: {error}") from error
    for (path, leaf), one in zip(jax.tree_util.tree_leaves_with_path(mean), factors, strict=True):
        _check_factor(jax.tree_util.keystr(path), leaf, one)
    return Gaussian(mean, factor)


def xavier(template: Params, *, window: bool = False) -> Gaussian:
    r"""Glorot's prior for a network: zero mean, variance ``2 / (fan_in + fan_out)`` in every layer.

    (Glorot and Bengio, AISTATS 2010; arXiv:1808.03620, section 4.2.) The fans are the last two axes of a kernel: units
    for dense and recurrent layers, *channels* for convolutions: the paper's words, which leave the window out. With
    ``window=True`` the window counts as well, as in the usual initializers of deep-learning libraries; a network of
    several convolutions needs that, since without it every layer multiplies the size of the outputs by the root of the
    window. The paper does not say how biases are drawn; here they are drawn like the kernel of their layer, which
    reproduces its tables. Scales of normalisation layers start at one, with variance 1/n; a vector without a kernel
    beside it has variance 1/n.

    Args:
        template: one particle's parameters: nested mappings (flax) or any pytree, of arrays or
            :class:`jax.ShapeDtypeStruct`. A bias belongs to the kernel beside it in the same mapping: the one of its
            name with ``kernel`` for ``bias``, else the first whose last axis has its length.
        window: both fans of a kernel are multiplied by the sizes of its axes before the last two.

    Returns:
        A prior with ``sample(key)`` and ``noise(key)``.

    Raises:
        TypeError: a leaf is not floating-point.
        ValueError: no leaves.

    >>> import jax, jax.numpy as jnp
    >>> layer = {"kernel": jnp.zeros((3, 3, 16, 8)), "bias": jnp.zeros(8)}
    >>> {name: round(float(factor) ** 2, 4) for name, factor in xavier(layer).factor.items()}
    {'bias': 0.0833, 'kernel': 0.0833}
    >>> {name: round(float(factor) ** 2, 4) for name, factor in xavier(layer, window=True).factor.items()}
    {'bias': 0.0093, 'kernel': 0.0093}
    """
    leaves = jax.tree_util.tree_leaves_with_path(template)
    if not leaves:
        raise ValueError("template: has no arrays; wanted one particle's parameters")
    means, factors = [], []
    siblings = _siblings(leaves)
    for path, leaf in leaves:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(f"template{jax.tree_util.keystr(path)}: dtype {leaf.dtype}; wanted a floating-point dtype")
        name = _name(path)
        means.append(jnp.full(leaf.shape, 1 if name == "scale" and len(leaf.shape) < 2 else 0, leaf.dtype))
        factors.append(math.sqrt(2 / _fans(name, leaf.shape, siblings[path[:-1]], window)))
    structure: Any = jax.tree.structure(template)
    return Gaussian(structure.unflatten(means), structure.unflatten(factors))


def _fans(name: str, shape: tuple[int, ...], siblings: Mapping[str, tuple[int, ...]], window: bool) -> int:
    """fan-in plus fan-out of the layer that the leaf belongs to."""
    if len(shape) >= 2:
        return max(1, (shape[-2] + shape[-1]) * (math.prod(shape[:-2]) if window else 1))
    kernels = {other: dims for other, dims in siblings.items() if len(dims) >= 2 and shape and dims[-1] == shape[0]}
    if name == "scale" or not kernels:
        return 2 * max(1, math.prod(shape))
    own = kernels.get(name.replace("bias", "kernel"), next(iter(kernels.values())))
    return _fans("kernel", own, {}, window)


def _siblings(leaves: list[Any]) -> dict[Any, dict[str, tuple[int, ...]]]:
    found: dict[Any, dict[str, tuple[int, ...]]] = {}
    for path, leaf in leaves:
        found.setdefault(path[:-1], {})[_name(path)] = leaf.shape
    return found


def _name(path: tuple[Any, ...]) -> str:
    return str(getattr(path[-1], "key", getattr(path[-1], "name", ""))) if path else ""


def _noise(key: Array, mean: Array, factor: Any) -> Array:
    if callable(factor):
        return factor(key)
    factor = jnp.asarray(factor, mean.dtype)
    if factor.ndim == 0 or factor.shape == mean.shape:
        return factor * normal(key, mean.shape, mean.dtype)
    return (factor @ normal(key, factor.shape[1:], mean.dtype)).reshape(mean.shape)


def normal(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """``jax.random.normal``, drawn flat and in whole vectors: the same numbers, but a shape that ends in 10 classes
    would make the compiler unroll the generator's rounds ten times over, in seconds of compilation for each leaf.
    """
    size = math.prod(shape)
    return jax.random.normal(key, (-(-size // 64) * 64,), dtype)[:size].reshape(shape)


def _check_factor(where: str, mean: Array, factor: Any) -> None:
    if not jnp.issubdtype(mean.dtype, jnp.floating):
        raise TypeError(f"mean{where}: dtype {mean.dtype}; wanted a floating-point dtype")
    if callable(factor):
        return
    shape = jnp.shape(factor)
    if shape not in ((), mean.shape) and not (len(shape) == 2 and shape[0] == mean.size):
        raise ValueError(
            f"factor{where}: shape {shape} for a leaf of shape {mean.shape}; wanted a scalar, standard deviations of "
            f"the leaf's shape, or a ({mean.size}, rank) matrix"
        )
