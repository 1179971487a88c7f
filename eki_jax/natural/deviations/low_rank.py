"""Deviations of low rank, with which the ensemble never exists."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from eki_jax._checks import arrays, function, whole
from eki_jax._types import Array, Params
from eki_jax.ensembles.priors import normal
from eki_jax.kernel.interpreter import leaf_name
from eki_jax.kernel.particles import wide_dtype
from eki_jax.natural.deviations.base import Scale, check_scale, scales_of
from eki_jax.natural.deviations.matrix import LowRankMatrix, axes_of_left, cuts_by_module, is_matrix, largest_rank

# A layer with several axes of outputs has a bias with as many, which nothing multiplies.
_BIAS = re.compile(r"(\['bias'\]|\.bias)$")


class LowRankDeviations(NamedTuple):
    """See :func:`low_rank`."""

    rank: int = 1
    scale: Scale = "xavier"
    plain: Callable[[str], bool] | None = None
    formed: bool = False

    def draw(self, key: Array, mean: Params) -> Any:
        """Factors ``(a, b)`` of each matrix, plain numbers for each vector."""
        leaves = jax.tree_util.tree_leaves_with_path(arrays("mean", mean, floating=True, some=True))
        structure: Any = jax.tree.structure(mean)
        scales = structure.flatten_up_to(scales_of(self.scale, mean))
        keys = jax.random.split(key, len(leaves))
        cuts = cuts_by_module(mean)
        drawn = [self._leaf(*args, cuts) for args in zip(leaves, scales, keys, strict=True)]
        return structure.unflatten(drawn)

    def particle(self, mean: Params, factors: Any, sigma: Array) -> Params:
        """A :class:`LowRankMatrix` for each matrix, unless they are to be formed; vectors are added up."""

        def leaf(path: Any, m: Array, e: Any) -> Any:
            if not isinstance(e, tuple):
                return (m + sigma.astype(e.dtype) * e).astype(m.dtype)
            wide = wide_dtype(e[0].dtype)
            left, right = (sigma.astype(wide) * e[0].astype(wide)).astype(m.dtype), e[1].astype(m.dtype)
            matrix = LowRankMatrix(m, left, right, name=leaf_name(path))
            return matrix.dense() if self.formed else matrix

        return self._map(leaf, mean, factors)

    def dense(self, mean: Params, factors: Any) -> Params:
        """``a b^T`` of each matrix."""

        def leaf(path: Any, m: Array, e: Any) -> Array:
            if not isinstance(e, tuple):
                return e
            left, right = (factor.reshape(-1, self.rank) for factor in e)
            return (left @ right.T).reshape(m.shape)

        return self._map(leaf, mean, factors)

    def combine(self, mean: Params, factors: Any, weights: Array) -> Params:
        """``A^T diag(w) B``, one matrix product for each matrix."""

        def leaf(path: Any, m: Array, e: Any) -> Array:
            if not isinstance(e, tuple):
                return jnp.tensordot(weights.astype(e.dtype), e, axes=1)
            # (J, r) is one axis to sum over.
            a, b = (jnp.moveaxis(x.reshape(len(x), -1, x.shape[-1]), 1, 2) for x in e)
            weighted = b * weights.astype(b.dtype)[:, None, None]
            product = a.reshape(-1, a.shape[-1]).T @ weighted.reshape(-1, weighted.shape[-1])
            return product.reshape(m.shape)

        return self._map(leaf, mean, factors)

    def scales(self, mean: Params) -> Params:
        """The standard deviations of each leaf's entries, a pytree like ``mean``."""
        return scales_of(self.scale, mean)

    def has_factors(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether a leaf has deviations of low rank: a matrix that is no layer's bias, and ``plain`` does not name."""
        return is_matrix(shape) and not _BIAS.search(name) and not (self.plain is not None and self.plain(name))

    @staticmethod
    def _map(fn: Callable[..., Any], mean: Params, factors: Any) -> Any:
        structure: Any = jax.tree.structure(mean)
        pairs = zip(jax.tree_util.tree_leaves_with_path(mean), structure.flatten_up_to(factors), strict=True)
        return structure.unflatten([fn(path, m, e) for (path, m), e in pairs])

    def _leaf(self, path_and_mean: Any, scale: Any, key: Array, cuts: dict[Any, int]) -> Any:
        path, m = path_and_mean
        name = leaf_name(path)
        if not self.has_factors(name, m.shape):
            return jnp.asarray(scale, m.dtype) * normal(key, m.shape, m.dtype)
        if jnp.ndim(scale):
            where = f"scale{jax.tree_util.keystr(path)}"
            raise ValueError(f"{where}: shape {jnp.shape(scale)}; wanted one number for a matrix of low rank")
        cut = cuts.get(path) or axes_of_left(m.shape)
        if self.rank > largest_rank(m.shape, cut):
            raise ValueError(
                f"rank: {self.rank}, but the leaf {name} of shape {m.shape} has at most {largest_rank(m.shape, cut)}; "
                "wanted no more, or that leaf named by `plain`"
            )
        left, right = jax.random.split(key)
        a = normal(left, (*m.shape[:cut], self.rank), m.dtype)
        # Every entry of a b^T then has the variance of a full deviation's.
        b = normal(right, (*m.shape[cut:], self.rank), m.dtype)
        return a * jnp.asarray(scale / math.sqrt(self.rank), m.dtype), b


def low_rank(
    rank: int = 1, scale: Scale = "xavier", *, plain: Callable[[str], bool] | None = None, formed: bool = False
) -> LowRankDeviations:
    r"""Deviations ``e_j = a_j b_j^T / sqrt(r)`` of every matrix; vectors, and leaves that are called "bias", are plain.

    A convolution's kernel counts as a matrix from its window and inputs to its outputs. The model, which is written for
    arrays, is evaluated from its trace: a product with such a matrix costs the mean's product and a cheap one, and the
    J x P numbers of the ensemble never exist. A matrix with which a model does something else than to multiply by it is
    added up there, for each particle that is being evaluated; :func:`describe` says which. (The idea for evolution
    strategies: arXiv:2511.16652.)

    Args:
        rank: rank r >= 1, not above any matrix's own.
        scale: standard deviation of the entries of e_j: "xavier", a number, a pytree of numbers, or a prior such as
            :func:`eki_jax.xavier` of which the factors are taken.
        plain: function that says of a leaf's name, such as ``"['Dense_0']['kernel']"``, whether it is to be disturbed
            in all its entries, at the cost of a copy for each particle that is being evaluated.
        formed: flag; True hands matrices to the model in full, a chunk of particles at a time.

    Raises:
        TypeError: ``rank`` is not an integer, ``plain`` no function.
        ValueError: ``rank`` < 1, or a scale that is negative; when drawn, a rank above a leaf's.

    >>> import jax, jax.numpy as jnp
    >>> a, b = low_rank(1, 1.0).draw(jax.random.key(0), {"w": jnp.zeros((3, 2))})["w"]
    >>> a.shape, b.shape
    ((3, 1), (2, 1))
    """
    if plain is not None:
        function("plain", plain, "a function of a leaf's name", arguments=1)
    check_scale(scale)
    return LowRankDeviations(whole("rank", rank), scale, plain, formed)
