"""Priors: where an ensemble starts, and the noise that keeps it from collapsing."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from eki_jax._checks import arrays, function, is_known
from eki_jax._types import Array, Params


class Gaussian(NamedTuple):
    """N(mean, F F^T), leaf by leaf; see :func:`gaussian` and :func:`xavier`.

    Attributes:
        mean: pytree of one particle's parameters.
        factor: pytree of the same structure, the factor F of each leaf's covariance: a number or an array of the
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


def gaussian(mean: Params, scale: Any = None, *, factor: Any = None, covariance: Any = None) -> Gaussian:
    """A Gaussian prior, from standard deviations, a factor of the covariance or the covariance itself.

    Exactly one of the three is wanted: one value for all leaves, or a pytree of them with the structure of ``mean``. A
    leaf of n numbers is seen as a vector of n where a matrix acts on it. An array of the leaf's own shape always
    belongs to the entries one by one, also where the leaf is a square matrix.

    Args:
        mean: pytree of floating-point arrays, one particle's parameters.
        scale: standard deviations, a number or an array of the leaf's shape. A matrix goes by its name, because nothing
            in its shape says which of the next two it is.
        factor: factor F of the covariance F F^T: a matrix of shape (n, rank), a function ``key -> draw`` for
            covariances that are never formed, or what ``scale`` takes.
        covariance: variances, a number or an array of the leaf's shape, or a symmetric positive semi-definite matrix
            of shape (n, n), which is factored here, once.

    Returns:
        A prior with ``sample(key)`` and ``noise(key)``.

    Raises:
        TypeError: none or several of the three; a leaf of ``mean`` that is not floating-point; a function that is not
            given as ``factor``.
        ValueError: values that do not fit their leaf, such as a matrix as ``scale``; a covariance that is not finite,
            not symmetric or not positive semi-definite (where its numbers are known).

    >>> import jax, jax.numpy as jnp
    >>> prior = gaussian({"w": jnp.array([1.0, 2.0])}, factor={"w": jnp.array([[3.0], [3.0]])})
    >>> noise = prior.noise(jax.random.key(0))["w"]
    >>> bool(noise[0] == noise[1])  # rank one: the two move together
    True
    >>> float(gaussian(jnp.zeros(3), covariance=4.0).factor)  # a variance; gaussian(jnp.zeros(3), 2.0) is the same
    2.0
    """
    mean = jax.tree.map(jnp.asarray, arrays("mean", mean))
    if not jax.tree.leaves(mean):
        raise ValueError("mean: has no arrays; wanted one particle's parameters")
    choices = {"scale": scale, "factor": factor, "covariance": covariance}
    given = [name for name, value in choices.items() if value is not None]
    if len(given) != 1:
        raise TypeError(f"scale, factor, covariance: {' and '.join(given) or 'none'} given; wanted one of them")
    return Gaussian(mean, _factors(given[0], mean, choices[given[0]]))


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
        template: one particle's parameters: nested mappings (flax), a module with attributes ``weight`` and ``bias``
            (equinox, which has outputs first and the window last), or any pytree, of arrays or
            :class:`jax.ShapeDtypeStruct`. A bias belongs to the kernel beside it in the same mapping: the one of its
            name with ``kernel`` for ``bias``, else the first whose last axis has its length.
        window: flag; True multiplies both fans of a kernel by the sizes of its axes before the last two.

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
    leaves = jax.tree_util.tree_leaves_with_path(arrays("template", template))
    for path, leaf in leaves:
        if not hasattr(leaf, "shape"):
            raise TypeError(
                f"template{jax.tree_util.keystr(path)}: {leaf!r}; wanted an array of a floating-point dtype"
            )
    if not leaves:
        raise ValueError("template: has no arrays; wanted one particle's parameters")
    means, factors = [], []
    names = _unboxed([path for path, _ in leaves])
    siblings = _siblings(names, leaves)
    for (path, leaf), named in zip(leaves, names, strict=True):
        if not hasattr(leaf, "dtype"):
            raise TypeError(
                f"template{jax.tree_util.keystr(path)}: {leaf!r}; wanted an array of a floating-point dtype"
            )
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(f"template{jax.tree_util.keystr(path)}: dtype {leaf.dtype}; wanted a floating-point dtype")
        name = _name(named)
        is_scale = len(leaf.shape) < 2 and name in ("scale", ".weight")
        means.append(jnp.full(leaf.shape, int(is_scale), leaf.dtype))
        factors.append(math.sqrt(2 / _fans(name, leaf.shape, siblings[named[:-1]], window)))
    structure: Any = jax.tree.structure(template)
    return Gaussian(structure.unflatten(means), structure.unflatten(factors))


def _fans(name: str, shape: tuple[int, ...], siblings: Mapping[str, tuple[int, ...]], window: bool) -> int:
    """fan-in plus fan-out of the layer that the leaf belongs to."""
    if name.startswith(".bias") and (weights := [dims for other, dims in siblings.items() if other[:7] == ".weight"]):
        return _fans(".weight", weights[-1], {}, window)
    if name == ".weight" and len(shape) > 2:  # of a convolution, outputs first
        return max(1, (shape[0] + shape[1]) * (math.prod(shape[2:]) if window else 1))
    if len(shape) >= 2:
        return max(1, (shape[-2] + shape[-1]) * (math.prod(shape[:-2]) if window else 1))
    kernels = {other: dims for other, dims in siblings.items() if len(dims) >= 2 and shape and dims[-1] == shape[0]}
    if name == "scale" or not kernels:
        return 2 * max(1, math.prod(shape))
    own = kernels.get(name.replace("bias", "kernel"), next(iter(kernels.values())))
    return _fans("kernel", own, {}, window)


def _unboxed(paths: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Paths of the variables where each is a box of one array, as in an ``nnx.State``; else the paths themselves."""
    parents = Counter(path[:-1] for path in paths)
    is_box = lambda path: len(path) > 1 and getattr(path[-1], "name", "") == "value" and parents[path[:-1]] == 1
    return [path[:-1] if is_box(path) else path for path in paths]


def _siblings(names: list[tuple[Any, ...]], leaves: list[Any]) -> dict[Any, dict[str, tuple[int, ...]]]:
    found: dict[Any, dict[str, tuple[int, ...]]] = {}
    for path, (_, leaf) in zip(names, leaves, strict=True):
        found.setdefault(path[:-1], {})[_name(path)] = leaf.shape
    return found


def _name(path: tuple[Any, ...]) -> str:
    """A key, or an attribute with the dot that tells it from one: modules whose layers are attributes are equinox's."""
    if not path:
        return ""
    return str(path[-1].key) if hasattr(path[-1], "key") else f".{path[-1].name}" if hasattr(path[-1], "name") else ""


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


def _factors(name: str, mean: Params, value: Any) -> Params:
    """A factor for each leaf of ``mean``, from what the argument called ``name`` says of its noise."""
    structure: Any = jax.tree.structure(mean)
    is_number = jax.tree_util.all_leaves([value]) and np.ndim(value) == 0
    if isinstance(value, bool | str | bytes):
        raise TypeError(f"{name}: {value!r}; wanted numbers")
    if callable(value) or is_number or structure == jax.tree.structure(0):
        value = structure.unflatten([value] * structure.num_leaves)
    try:
        values = structure.flatten_up_to(value)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name}: its structure does not fit the mean's: {error}") from error
    one = {"scale": _from_scale, "factor": _from_factor, "covariance": _from_covariance}[name]
    leaves = jax.tree_util.tree_leaves_with_path(mean)
    return structure.unflatten(
        [one(jax.tree_util.keystr(path), leaf, part) for (path, leaf), part in zip(leaves, values, strict=True)]
    )


def _from_scale(where: str, mean: Array, scale: Any) -> Any:
    _check_floating(where, mean)
    if callable(scale):
        raise TypeError(f"scale{where}: a function; wanted standard deviations, or the function as factor=")
    if np.shape(scale) not in ((), mean.shape):
        raise ValueError(
            f"scale{where}: shape {np.shape(scale)} for a leaf of shape {mean.shape}; wanted a number or standard "
            f"deviations of the leaf's shape, and a matrix by its name: factor= of shape ({mean.size}, rank), or "
            f"covariance= of shape ({mean.size}, {mean.size})"
        )
    return _finite_scale(f"scale{where}", scale)


def _from_factor(where: str, mean: Array, factor: Any) -> Any:
    _check_floating(where, mean)
    shape: tuple[int, ...] = () if callable(factor) else np.shape(factor)
    if shape not in ((), mean.shape) and not (len(shape) == 2 and shape[0] == mean.size):
        raise ValueError(
            f"factor{where}: shape {shape} for a leaf of shape {mean.shape}; wanted a number, standard deviations of "
            f"the leaf's shape, or a ({mean.size}, rank) matrix"
        )
    if callable(factor):
        function(f"factor{where}", factor, "a function of a random key", arguments=1)
        drawn = jax.eval_shape(lambda: factor(jax.random.key(0)))
        if getattr(drawn, "shape", None) != mean.shape:
            raise ValueError(f"factor{where}: a function that draws {drawn}; wanted the leaf's shape {mean.shape}")
        return factor
    return _finite_scale(f"factor{where}", factor, signed=len(shape) == 2 and shape != mean.shape)


def _from_covariance(where: str, mean: Array, covariance: Any) -> Array:
    _check_floating(where, mean)
    if callable(covariance):
        raise TypeError(f"covariance{where}: a function; wanted numbers, or a function that draws as factor=")
    if np.shape(covariance) not in ((), mean.shape, (mean.size, mean.size)):
        raise ValueError(
            f"covariance{where}: shape {np.shape(covariance)} for a leaf of shape {mean.shape}; wanted a number, "
            f"variances of the leaf's shape, or a ({mean.size}, {mean.size}) matrix"
        )
    arrays(f"covariance{where}", covariance)
    known = is_known(covariance)
    values = np.asarray(covariance, np.float64) if known else covariance
    if known and not np.all(np.isfinite(values)):
        raise ValueError(f"covariance{where}: has values that are not finite; wanted variances or a covariance")
    if values.shape in ((), mean.shape):
        if known and np.any(values < 0):
            raise ValueError(f"covariance{where}: {values.min():.3g} is the least variance; wanted variances >= 0")
        return jnp.asarray(values**0.5, mean.dtype)
    return _root(where, covariance, values).astype(mean.dtype)


def _root(where: str, covariance: Any, values: Any) -> Array:
    """F with ``F F^T`` the matrix ``values``, those of ``covariance`` in double precision where they are known.

    All n columns stay, whatever the rank: a single one could be taken for standard deviations of a leaf (n, 1).
    """
    if not is_known(values):
        eigenvalues, vectors = jnp.linalg.eigh(values)
        return vectors * jnp.sqrt(jnp.maximum(eigenvalues, 0))
    tolerance = 10 * len(values) * float(jnp.finfo(_dtype(covariance)).eps) * np.abs(values).max()
    if np.abs(values - values.T).max() > tolerance:
        raise ValueError(f"covariance{where}: a matrix that is not symmetric; wanted a covariance")
    eigenvalues, vectors = np.linalg.eigh(values)
    if eigenvalues[0] < -tolerance:
        raise ValueError(
            f"covariance{where}: {eigenvalues[0]:.3g} is the least eigenvalue; wanted a positive semi-definite matrix"
        )
    return jnp.asarray(vectors * np.sqrt(np.maximum(eigenvalues, 0)))


def _dtype(value: Any) -> Any:
    """The floating-point type in which the numbers were made, for what rounding explains."""
    dtype = getattr(value, "dtype", np.dtype(np.float64))
    return dtype if jnp.issubdtype(dtype, jnp.floating) else np.dtype(np.float64)


def _finite_scale(name: str, value: Any, *, signed: bool = False) -> Any:
    """``value``, standard deviations (or with ``signed`` a matrix), which are finite where they are known."""
    if isinstance(value, bool) or not jax.tree_util.all_leaves([value]):
        raise TypeError(f"{name}: {value}; wanted standard deviations")
    arrays(name, value)
    if is_known(value):
        numbers = np.asarray(value, np.float64)
        if not np.all(np.isfinite(numbers)):
            raise ValueError(f"{name}: has values that are not finite; wanted finite ones")
        if not signed and np.any(numbers < 0):
            raise ValueError(f"{name}: {numbers.min():.3g} is the least; wanted standard deviations >= 0")
    return value


def _check_floating(where: str, mean: Array) -> None:
    if not jnp.issubdtype(mean.dtype, jnp.floating):
        raise TypeError(f"mean{where}: dtype {mean.dtype}; wanted a floating-point dtype")
