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
from jax import lax

from eki_jax._types import Array, Params
from eki_jax.natural._axes import Axes
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
        axis: over which the particles are spread.
    """

    rows: Array
    left: Array
    right: Array
    shape: tuple[int, ...]
    axis: str | None

    def times(self, v: Array) -> Array:
        """Jacobian times the leaf, shape (M,)."""
        inner = jnp.einsum("jnr,nk->jkr", self.left, v.reshape(-1, self.shape[-1]))
        return _sum(jnp.einsum("jkr,jkr->j", inner, self.right) @ self.rows, self.axis)

    def transposed(self, r: Array) -> Array:
        """Jacobian transposed times outputs."""
        weighted = self.right * (self.rows @ r)[:, None, None]
        return _sum(jnp.einsum("jnr,jkr->nk", self.left, weighted), self.axis).reshape(self.shape)


class Jacobian(NamedTuple):
    """The estimated derivative of the outputs with respect to all parameters, in units of their deviations.

    Its rows are those of this device's samples.
    """

    parts: list[Any]
    structure: Any
    batch_axis: str | None

    def times(self, v: Params) -> Array:
        """Jacobian times a pytree of parameters, shape (M,)."""
        leaves = self.structure.flatten_up_to(v)
        return sum((part.times(leaf) for part, leaf in zip(self.parts, leaves, strict=True)), jnp.zeros(()))

    def transposed(self, r: Array) -> Params:
        """Jacobian transposed times outputs, a pytree of parameters."""
        return _sum(self.structure.unflatten([part.transposed(r) for part in self.parts]), self.batch_axis)


def estimated_jacobian(
    deviations: LowRank,
    mean: Params,
    drawn: tuple[Any, Array],
    rows: Array,
    sigma: Array,
    inputs: dict[str, Array],
    inner: dict[str, Array],
    samples: int,
    healthy: Array,
    number: Array,
    axes: Axes,
) -> Jacobian:
    """The derivative of the outputs in the parameters, in units of the deviations' scales.

    Args:
        deviations: of low rank.
        mean: m.
        drawn: factors and signs of the particles.
        rows: centred outputs over sqrt(J - 1), shape (J, M); zero for particles that failed.
        sigma: scale of the deviations.
        inputs: x of each matrix that is local, shape (B, n), by its name.
        inner: ``x (sigma a_j)`` of the same, shape (J, B, r).
        samples: B.
        healthy: which particles did not fail, shape (J,).
        number: how many on all devices.
        axes: over which the particles and samples are spread; J and B are then those of this device.
    """
    structure: Any = jax.tree.structure(mean)
    factors, signs = drawn
    leaves = jax.tree_util.tree_leaves_with_path(mean)
    scales = structure.flatten_up_to(deviations.scales(mean))
    spread = jnp.sqrt(jnp.maximum(number, 2) - 1.0).astype(rows.dtype)
    spanned = rows * (signs / (sigma * spread))[:, None]
    parts: list[Any] = []
    for (path, m), e, scale in zip(leaves, structure.flatten_up_to(factors), scales, strict=True):
        name = jax.tree_util.keystr(path)
        if name in inputs:
            s = jnp.where(healthy[:, None, None], inner[name], 0)
            parts.append(Local(inputs[name], scale * spread * _slopes(rows, s, e[1], samples, axes.particles)))
            continue
        if not isinstance(e, tuple):
            columns = (e / scale).reshape(len(signs), -1)
            parts.append(Columns(_sum(spanned.T @ columns, axes.particles), m.shape))
            continue
        left = (e[0] / scale).reshape(len(signs), -1, deviations.rank)
        if m.size <= len(signs):
            columns = jnp.einsum("jnr,jkr->jnk", left, e[1]).reshape(len(signs), -1)
            parts.append(Columns(_sum(spanned.T @ columns, axes.particles), m.shape))
        else:
            parts.append(Spanned(spanned, left, e[1], m.shape, axes.particles))
    return Jacobian(parts, structure, axes.batch)


def _sum(value: Any, axis: str | None) -> Any:
    return value if axis is None else lax.psum(value, axis)


def _slopes(rows: Array, inner: Array, right: Array, samples: int, axis: str | None) -> Array:
    """``sum_j z_jbc s_jbr b_jnr / sum_jr s_jbr^2``, shape (B, C, n)."""
    z = rows.reshape(len(rows), samples, -1)
    norm = _sum(jnp.sum(inner**2, axis=(0, 2)), axis)
    ranks = range(inner.shape[-1])
    total = _sum(sum(jnp.einsum("jbc,jn->bcn", z * inner[:, :, r, None], right[:, :, r]) for r in ranks), axis)
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

    return _conjugate_gradients(matrix, jacobian.transposed(gradient), iterations)


def _conjugate_gradients(matrix: Callable[[Params], Params], right: Params, iterations: int) -> Params:
    """``matrix^-1 right`` for a positive definite matrix, from zero, to a relative residual of 1e-5.

    That of ``jax.scipy`` cannot be used: its matrix may not sum over devices (JAX 0.10).
    """

    def dot(a: Params, b: Params) -> Array:
        return sum((jnp.vdot(u, v) for u, v in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)), jnp.zeros(()))

    def plus(a: Params, factor: Array, b: Params) -> Params:
        return jax.tree.map(lambda u, v: u + factor.astype(u.dtype) * v, a, b)

    size = dot(right, right)

    def unfinished(carry: Any) -> Array:
        *_, rest, count = carry
        return (rest > 1e-10 * size) & (count < iterations)

    def body(carry: Any) -> Any:
        x, residual, along, rest, count = carry
        product = matrix(along)
        step = rest / dot(along, product)
        x, residual = plus(x, step, along), plus(residual, -step, product)
        new = dot(residual, residual)
        return x, residual, plus(residual, new / rest, along), new, count + 1

    zero = jax.tree.map(jnp.zeros_like, right)
    return jax.lax.while_loop(unfinished, body, (zero, right, right, size, 0))[0]
