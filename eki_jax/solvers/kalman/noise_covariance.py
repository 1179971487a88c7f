"""The observation noise's covariance Gamma: diagonal, dense, of low rank, in blocks; never formed if it need not be."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import solve_triangular

from eki_jax._checks import is_known, quantities
from eki_jax._types import Array
from eki_jax.kernel.linear_algebra import HIGHEST


class LowRankNoise(NamedTuple):
    """A covariance ``diag(diagonal) + factor factor^T`` that is never formed.

    Attributes:
        diagonal: number or array of shape (M,), > 0; without it the covariance would be singular.
        factor: matrix of shape (M, K), with K well below M.
    """

    diagonal: Any
    factor: Any


class Data(NamedTuple):
    """Data that come with the covariance of their own noise, in the place of the targets: a mini-batch, for example.

    Attributes:
        values: data y, in the shape of one particle's outputs; of every particle's own with ``targets_axis=0``.
        noise_covariance: covariance Gamma of these data, in any form that a solver takes.

    >>> import jax.numpy as jnp
    >>> from eki_jax import kalman
    >>> solver = kalman.etki(lambda u, x: x * u, None)
    >>> state = solver.init(jnp.array([[1.0], [3.0]]))
    >>> state, info = solver.step(state, (2.0, Data(jnp.array([8.0]), 4.0)))
    >>> float(solver.estimate(state)[0])  # 2 + (8 - 4) / 4
    3.0
    """

    values: Any
    noise_covariance: Any


class Diagonal(NamedTuple):
    """Independent noise: standard deviations, a number or shape (M,)."""

    scale: Any

    def whiten(self, rows: Array) -> Array:
        """``rows W^T`` with ``W Gamma W^T = I``, shape (J, M)."""
        return rows / jnp.asarray(self.scale, rows.dtype)


class Dense(NamedTuple):
    """Correlated noise: the lower Cholesky factor of Gamma, shape (M, M)."""

    cholesky: Any

    def whiten(self, rows: Array) -> Array:
        """``rows W^T`` with ``W Gamma W^T = I``, shape (J, M)."""
        return solve_triangular(jnp.asarray(self.cholesky, rows.dtype), rows.T, lower=True).T


class DiagonalPlusLowRank(NamedTuple):
    """Noise of a `LowRankNoise`.

    With ``A`` the factor over the diagonal's root, ``(I + A A^T)^(-1/2) = I + A B A^T``.

    Attributes:
        scale: root of the diagonal, a number or shape (M,).
        factor: matrix A, shape (M, K).
        core: matrix B, shape (K, K).
    """

    scale: Any
    factor: Any
    core: Any

    def whiten(self, rows: Array) -> Array:
        """``rows W^T`` with ``W Gamma W^T = I``, shape (J, M)."""
        scaled, factor = rows / jnp.asarray(self.scale, rows.dtype), jnp.asarray(self.factor, rows.dtype)
        inner = jnp.matmul(scaled, factor, precision=HIGHEST)
        inner = jnp.matmul(inner, jnp.asarray(self.core, rows.dtype), precision=HIGHEST)
        return scaled + jnp.matmul(inner, factor.T, precision=HIGHEST)


class Blocks(NamedTuple):
    """Noise that is independent from one leaf of the outputs' tree to the next.

    Attributes:
        parts: covariance of each leaf, in the order of the tree.
        structure: structure of the tree.
        sizes: number of outputs of each leaf; None before they are known.
    """

    parts: tuple[NoiseCovariance, ...]
    structure: Any
    sizes: tuple[int, ...] | None = None

    def whiten(self, rows: Array) -> Array:
        """``rows W^T`` with ``W Gamma W^T = I``, shape (J, M)."""
        assert self.sizes is not None
        ends = np.cumsum(self.sizes)[:-1].tolist()
        blocks = jnp.split(rows, ends, axis=1)
        return jnp.concatenate([part.whiten(block) for part, block in zip(self.parts, blocks, strict=True)], axis=1)


NoiseCovariance: TypeAlias = Diagonal | Dense | DiagonalPlusLowRank | Blocks


def is_usable(covariance: NoiseCovariance) -> Array:
    """Whether all numbers that whiten are finite and none of the scales is zero, which is known where they are."""
    if isinstance(covariance, Blocks):
        return jnp.stack([is_usable(part) for part in covariance.parts]).all()
    parts = [jnp.asarray(part) for part in covariance]
    finite = jnp.stack([jnp.isfinite(part).all() for part in parts]).all()
    return finite & (isinstance(covariance, Dense) | (parts[0] > 0).all())


def as_noise_covariance(value: Any, name: str = "noise_covariance") -> NoiseCovariance:
    """Check Gamma and factor it once.

    Args:
        value: covariance Gamma: a number or shape (M,), the noise's variances; shape (M, M), the matrix; a
            `LowRankNoise`; or a mapping of them with the keys of the outputs.
        name: name of the argument in an error.

    Returns:
        The covariance with what is needed to whiten with it. What is not known while tracing and is no covariance
        whitens to NaN.

    Raises:
        TypeError: no real numbers; flags.
        ValueError: a covariance of another shape, not finite, not symmetric, or singular (where values are known).

    >>> import jax.numpy as jnp
    >>> as_noise_covariance([1.0, 4.0]).whiten(jnp.array([[2.0, 2.0]]))
    Array([[2., 1.]], dtype=float32)
    """
    if isinstance(value, LowRankNoise):
        return _low_rank(value, name)
    if isinstance(value, Mapping):
        is_one = lambda node: isinstance(node, LowRankNoise | list | tuple)
        leaves, structure = jax.tree_util.tree_flatten_with_path(value, is_leaf=is_one)
        if not leaves:
            raise ValueError(f"{name}: an empty mapping; wanted a covariance for every output")
        parts = (as_noise_covariance(part, f"{name}{jax.tree_util.keystr(path)}") for path, part in leaves)
        return Blocks(tuple(parts), structure)
    wanted = "wanted a number, (M,), (M, M), a LowRankNoise or a mapping of them with the outputs' keys"
    if not jax.tree_util.all_leaves([value]) and not isinstance(value, list | tuple):
        raise TypeError(f"{name}: {value!r}; {wanted}")
    quantities(name, value)
    known = is_known(value)
    matrix = np.asarray(value, np.float64) if known else value
    if matrix.ndim > 2 or (matrix.ndim == 2 and matrix.shape[0] != matrix.shape[1]):
        raise ValueError(f"{name}: shape {matrix.shape}; {wanted}")
    if known and not np.all(np.isfinite(matrix)):
        raise ValueError(f"{name}: has values that are not finite; wanted a covariance")
    if matrix.ndim < 2:
        if known and not np.all(matrix > 0):
            raise ValueError(f"{name}: singular, least variance {matrix.min()}; wanted variances > 0")
        return Diagonal(np.sqrt(matrix) if known else jnp.sqrt(matrix))
    return Dense(_cholesky(matrix, name) if known else jnp.linalg.cholesky(matrix))


def fitted(covariance: NoiseCovariance, outputs: Any, name: str = "noise_covariance") -> NoiseCovariance:
    """The covariance for outputs of these shapes, or an error where it is of others.

    Args:
        covariance: covariance that :func:`as_noise_covariance` returned.
        outputs: outputs of the particles, arrays of shape (J, ...).
        name: name of the covariance in an error.
    """
    sizes = tuple(math.prod(jnp.shape(leaf)[1:]) for leaf in jax.tree.leaves(outputs))
    if isinstance(covariance, Blocks):
        found: Any = jax.tree.structure(outputs)
        if found != covariance.structure:
            raise ValueError(f"{name}: structure {covariance.structure}, but the outputs have {found}; wanted the same")
        for part, size in zip(covariance.parts, sizes, strict=True):
            _check_size(part, size, name)
        return covariance._replace(sizes=sizes)
    _check_size(covariance, sum(sizes), name)
    return covariance


def _check_size(covariance: Any, outputs: int, name: str) -> None:
    """Raise unless the covariance is one of ``outputs`` numbers."""
    shape = jnp.shape(covariance.factor if isinstance(covariance, DiagonalPlusLowRank) else covariance[0])
    if shape and shape[0] != outputs and shape != (1,):
        raise ValueError(f"{name}: of {shape[0]} outputs, but a particle has {outputs}; wanted as many")


def shrinkage_covariance(samples: Any) -> Any:
    r"""A covariance from samples that may be fewer than the outputs, shrunk to its diagonal.

    .. math:: \Gamma = D\,\bigl((1 - \delta) R + \delta I\bigr)\,D

    with D the samples' standard deviations, R their correlations, and the intensity delta of least expected error of
    Ledoit and Wolf (Journal of Multivariate Analysis 88, 2004), from scikit-learn. In this form outputs of many
    magnitudes are shrunk alike.

    Args:
        samples: draws of the outputs' noise, shape (n, M), for example repeated or long simulations.

    Returns:
        Shape (M, M), or a :class:`LowRankNoise` where samples are fewer than outputs.

    Raises:
        ImportError: scikit-learn is missing.
        TypeError: no array of real numbers.
        ValueError: fewer than two samples, samples that are not finite, or an output that never varies.

    >>> import numpy as np
    >>> draws = np.random.default_rng(0).normal(size=(50, 3)) * [1.0, 10.0, 100.0]
    >>> shrinkage_covariance(draws).shape, type(shrinkage_covariance(draws[:2])).__name__
    ((3, 3), 'LowRankNoise')
    """
    try:
        from sklearn.covariance import ledoit_wolf_shrinkage
    except ImportError as error:
        raise ImportError("shrinkage_covariance: needs scikit-learn; pip install 'eki_jax[calibrate]'") from error
    rows = np.asarray(quantities("samples", samples), np.float64)
    if rows.ndim != 2 or len(rows) < 2:
        raise ValueError(f"samples: shape {rows.shape}; wanted (n, M) with n of at least 2")
    if not np.all(np.isfinite(rows)):
        raise ValueError("samples: have values that are not finite; wanted draws of the outputs' noise")
    rows = rows - rows.mean(axis=0)
    deviations = rows.std(axis=0, ddof=1)
    if not np.all(deviations > 0):
        raise ValueError(f"samples: output {int(np.argmin(deviations))} never varies; wanted it left out")
    scaled = rows / deviations
    delta = float(ledoit_wolf_shrinkage(scaled, assume_centered=True))
    factor = math.sqrt((1 - delta) / (len(rows) - 1)) * rows.T
    if len(rows) < rows.shape[1]:
        return LowRankNoise(delta * deviations**2, factor)
    return factor @ factor.T + np.diag(delta * deviations**2)


def _low_rank(value: LowRankNoise, name: str) -> DiagonalPlusLowRank:
    for part, numbers in value._asdict().items():
        quantities(f"{name}.{part}", numbers)
    known = all(map(is_known, value))
    diagonal, factor = (np.asarray(part, np.float64) for part in value) if known else map(jnp.asarray, value)
    if factor.ndim != 2 or diagonal.shape not in ((), (1,), factor.shape[:1]):
        raise ValueError(
            f"{name}: diagonal of shape {diagonal.shape} and factor of shape {factor.shape}; wanted a number "
            "or (M,), and (M, K)"
        )
    for part, numbers in (("diagonal", diagonal), ("factor", factor)) if known else ():
        if not np.all(np.isfinite(numbers)):
            raise ValueError(f"{name}.{part}: has values that are not finite; wanted a covariance")
    if known and not np.all(diagonal > 0):
        raise ValueError(f"{name}: singular, least diagonal {diagonal.min()}; wanted a diagonal > 0")
    xp: Any = np if known else jnp
    scale = xp.sqrt(diagonal)
    factor = factor / scale.reshape(-1, 1)
    squares, vectors = xp.linalg.eigh(factor.T @ factor)
    squares = xp.maximum(squares, 0)
    # ((1 + s)^(-1/2) - 1) / s, without a difference of numbers that are nearly equal
    root = xp.sqrt(1 + squares)
    return DiagonalPlusLowRank(scale, factor, (vectors / (-root * (1 + root))) @ vectors.T)


def _cholesky(matrix: np.ndarray, name: str) -> np.ndarray:
    """The factor of a covariance that is symmetric and, to double precision, not singular."""
    if not np.allclose(matrix, matrix.T, rtol=1e-5, atol=1e-8 * np.abs(matrix).max()):
        raise ValueError(f"{name}: a matrix that is not symmetric; wanted a covariance")
    diagonal = np.diag(matrix)
    if not np.all(diagonal > 0):
        raise ValueError(f"{name}: singular, least variance {diagonal.min():.3g}; wanted variances > 0")
    # As correlations: variances over many magnitudes make a matrix no more singular.
    scale = np.sqrt(diagonal)
    correlations = matrix / np.outer(scale, scale)
    eigenvalues = np.linalg.eigvalsh(correlations)
    if not eigenvalues[0] > len(matrix) * np.finfo(np.float64).eps * eigenvalues[-1]:
        raise ValueError(
            f"{name}: singular, eigenvalues of the correlations from {eigenvalues[0]:.3g} to "
            f"{eigenvalues[-1]:.3g}; wanted a positive definite matrix"
        )
    return scale[:, None] * np.linalg.cholesky(correlations)
