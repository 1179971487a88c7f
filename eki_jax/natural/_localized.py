r"""The model's derivative estimated sample by sample, from what every sample's particles saw.

A deviation ``a_j b_j^T`` of a weight matrix reaches sample x only as ``(x a_j) b_j``, added to the matrix's n outputs:
a vector of n known numbers instead of the matrix's P. The derivative of the sample's outputs z with respect to it,

.. math:: \Delta_x = \frac{\sum_j z_j\, (x a_j) b_j^T}{\sum_j (x a_j)^2}, \qquad
          \frac{\partial z}{\partial W} \cdot V \approx \Delta_x\, (x V),

is the covariance C_uG of the sample and the matrix without what cannot be there: localization, as the ensemble Kalman
filter knows it for space. Its noise is that of n unknowns from J particles, not of P. Other parameters
keep the plain estimate ``sum_j z_j e_j^T / (J sigma)``. With it the damped Gauss-Newton system is that of all P
parameters, solved by conjugate gradients:

.. math:: (J^T H J + \tfrac{\lambda}{\sigma^2} I)\, d = J^T g
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from eki_jax._types import Array, Params
from eki_jax.natural._deviations import LowRank


class Local(NamedTuple):
    """One matrix whose products with the samples are known.

    Attributes:
        inputs: x, shape (B, n_in).
        slopes: Delta, shape (B, C, n_out), in units of a deviation.
    """

    inputs: Array
    slopes: Array

    def times(self, v: Array) -> Array:
        """Jacobian times a matrix, shape (B C,)."""
        return jnp.sum((self.inputs @ v)[:, None] * self.slopes, axis=-1).ravel()

    def transposed(self, r: Array) -> Array:
        """Jacobian transposed times outputs."""
        samples, classes, _ = self.slopes.shape
        return self.inputs.T @ jnp.sum(r.reshape(samples, classes, 1) * self.slopes, axis=1)


class Columns(NamedTuple):
    """One small leaf whose estimated Jacobian is formed.

    Attributes:
        matrix: shape (M, P).
        shape: of the leaf.
    """

    matrix: Array
    shape: tuple[int, ...]

    def times(self, v: Array) -> Array:
        """Jacobian times the leaf, shape (M,)."""
        return self.matrix @ v.ravel()

    def transposed(self, r: Array) -> Array:
        """Jacobian transposed times outputs."""
        return (r @ self.matrix).reshape(self.shape)


class Spanned(NamedTuple):
    """One large leaf, whose estimated Jacobian is ``rows^T`` times its deviations.

    Attributes:
        rows: centred outputs over J sigma, shape (J, M).
        left: a, shape (J, N, r).
        right: b, shape (J, k, r).
        shape: of the leaf, (..., k) with N the product of the others.
    """

    rows: Array
    left: Array
    right: Array
    shape: tuple[int, ...]

    def times(self, v: Array) -> Array:
        """Jacobian times the leaf, shape (M,)."""
        inner = jnp.einsum("jnr,nk->jkr", self.left, v.reshape(-1, self.shape[-1]))
        return jnp.einsum("jkr,jkr->j", inner, self.right) @ self.rows

    def transposed(self, r: Array) -> Array:
        """Jacobian transposed times outputs."""
        weighted = self.right * (self.rows @ r)[:, None, None]
        return jnp.einsum("jnr,jkr->nk", self.left, weighted).reshape(self.shape)


class Jacobian(NamedTuple):
    """The estimated derivative of the outputs with respect to all parameters, in units of their deviations."""

    parts: list[Any]
    structure: Any

    def times(self, v: Params) -> Array:
        """Jacobian times a pytree of parameters, shape (M,)."""
        leaves = self.structure.flatten_up_to(v)
        return sum((part.times(leaf) for part, leaf in zip(self.parts, leaves, strict=True)), jnp.zeros(()))

    def transposed(self, r: Array) -> Params:
        """Jacobian transposed times outputs, a pytree of parameters."""
        return self.structure.unflatten([part.transposed(r) for part in self.parts])


def estimated_jacobian(
    deviations: LowRank,
    mean: Params,
    drawn: tuple[Any, Array],
    rows: Array,
    sigma: Array,
    inputs: dict[str, Array],
    inner: dict[str, Array],
    samples: int,
) -> Jacobian:
    """The derivative of the outputs in the parameters, in units of the deviations' scales.

    Args:
        deviations: of low rank.
        mean: m.
        drawn: factors and signs of the particles that took part; zero rows for others.
        rows: centred outputs over sqrt(J - 1), shape (J, M).
        sigma: scale of the deviations.
        inputs: x of each matrix that is local, shape (B, n), by its name.
        inner: ``x (sigma a_j)`` of the same, shape (J, B, r).
        samples: B.
    """
    structure: Any = jax.tree.structure(mean)
    factors, signs = drawn
    leaves = jax.tree_util.tree_leaves_with_path(mean)
    scales = structure.flatten_up_to(deviations.scales(mean))
    healthy = jnp.any(rows != 0, axis=1)
    number = jnp.maximum(jnp.sum(healthy), 2)
    spread = jnp.sqrt(number - 1.0).astype(rows.dtype)
    spanned = rows * (signs / (sigma * spread))[:, None]
    parts: list[Any] = []
    for (path, m), e, scale in zip(leaves, structure.flatten_up_to(factors), scales, strict=True):
        name = jax.tree_util.keystr(path)
        if name in inputs:
            s = jnp.where(healthy[:, None, None], inner[name], 0)
            parts.append(Local(inputs[name], scale * spread * _slopes(rows, s, e[1], samples)))
            continue
        if not isinstance(e, tuple):
            columns = (e / scale).reshape(len(signs), -1)
            parts.append(Columns(spanned.T @ columns, m.shape))
            continue
        left = (e[0] / scale).reshape(len(signs), -1, deviations.rank)
        if m.size <= len(signs):
            columns = jnp.einsum("jnr,jkr->jnk", left, e[1]).reshape(len(signs), -1)
            parts.append(Columns(spanned.T @ columns, m.shape))
        else:
            parts.append(Spanned(spanned, left, e[1], m.shape))
    return Jacobian(parts, structure)


def _slopes(rows: Array, inner: Array, right: Array, samples: int) -> Array:
    """``sum_j z_jbc s_jbr b_jnr / sum_jr s_jbr^2``, shape (B, C, n)."""
    z = rows.reshape(len(rows), samples, -1)
    norm = jnp.sum(inner**2, axis=(0, 2))
    total = sum(jnp.einsum("jbc,jn->bcn", z * inner[:, :, r, None], right[:, :, r]) for r in range(inner.shape[-1]))
    return total / jnp.where(norm > 0, norm, 1)[:, None, None]


def damped_newton(
    jacobian: Jacobian,
    curve: Callable[[Array], Array],
    gradient: Array,
    damping: Array,
    iterations: int,
) -> Params:
    """``(J^T H J + damping I)^-1 J^T g`` by conjugate gradients, in units of the deviations' scales.

    Args:
        jacobian: J.
        curve: ``q -> H q``.
        gradient: g, shape (M,).
        damping: > 0.
        iterations: the most products with the matrix.
    """

    def matrix(v: Params) -> Params:
        product = jacobian.transposed(curve(jacobian.times(v)))
        return jax.tree.map(lambda a, b: a + damping * b, product, v)

    solution, _ = jax.scipy.sparse.linalg.cg(matrix, jacobian.transposed(gradient), maxiter=iterations)
    return solution
