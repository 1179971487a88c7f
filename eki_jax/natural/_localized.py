r"""The model's derivative estimated sample by sample, from what every sample's particles saw.

A deviation ``a_j b_j^T`` of a weight matrix reaches sample x only as ``d_j(x) = (x a_j) b_j``, added to the matrix's n
outputs: a vector of n known numbers instead of the matrix's P. A vector reaches it as itself. To first order the
particles' outputs z are linear in these few numbers, so that a regression for every sample has the derivatives,

.. math:: \min_\Delta \sum_j \Big| z_j(x) - \bar z(x) - \sum_{W} \Delta_{W,x}\, d_{W,j}(x) \Big|^2, \qquad
          \frac{\partial z}{\partial W} \cdot V \approx \Delta_{W,x}\, (x V) .

The first iterate of its conjugate gradients is the covariance C_uG of the sample and the matrix without what cannot be
there: localization, as the ensemble Kalman filter knows it for space. The iterations take out what all the other
matrices put into that covariance, which is most of its noise. Leaves that reach a sample in another way keep the plain
estimate ``sum_j z_j e_j^T / (J sigma)``. The damped Gauss-Newton system is that of all P parameters, solved by
conjugate gradients too:

.. math:: (J^T H J + \tfrac{\lambda}{\sigma^2} I)\, d = J^T g
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from operator import add
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from eki_jax._types import Array, Params
from eki_jax.natural._axes import Axes
from eki_jax.natural._deviations import LowRank

# Outputs of as many samples at a time as stay in the processor's cache.
_CACHE_BYTES = 2**20
_ITERATIONS = 8  # of a sample's regression


class Local(NamedTuple):
    """One leaf that reaches a sample through few numbers: a matrix through its products, a vector through itself.

    Attributes:
        inputs: x, shape (B, n_in); of a vector ones, shape (B, 1).
        slopes: Delta, shape (B, C, n_out), in units of a deviation.
        shape: of the leaf.
    """

    inputs: Array
    slopes: Array
    shape: tuple[int, ...]

    def times(self, v: Array) -> Array:
        """Jacobian times the leaf, shape (B C,)."""
        reached = self.inputs @ v.reshape(self.inputs.shape[1], -1)
        return jnp.sum(reached[:, None] * self.slopes, axis=-1).ravel()

    def transposed(self, r: Array) -> Array:
        """Jacobian transposed times outputs."""
        samples, classes, _ = self.slopes.shape
        back = jnp.sum(r.reshape(samples, classes, 1) * self.slopes, axis=1)
        return (self.inputs.T @ back).reshape(self.shape)


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

    parts: list[Local | Columns | Spanned]
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
    factors, signs = drawn
    particles = len(signs)
    structure: Any = jax.tree.structure(mean)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(mean)]
    trees = (structure.flatten_up_to(tree) for tree in (mean, factors, deviations.scales(mean)))
    leaves = list(zip(names, *trees, strict=True))

    local: dict[str, tuple[Array, Reach]] = {}
    for name, _, e, _ in leaves:
        if name in inputs:
            s = jnp.where(healthy[:, None, None], inner[name], 0)
            local[name] = inputs[name], Reach(jnp.transpose(s, (1, 2, 0)), jnp.moveaxis(e[1], -1, 0))
        elif not isinstance(e, tuple):
            s = jnp.where(healthy, signs * sigma, 0)
            local[name] = jnp.ones((samples, 1), rows.dtype), Reach(s[None], e.reshape(1, particles, -1))
    spread = jnp.sqrt(jnp.maximum(number, 2) - 1.0).astype(rows.dtype)
    outputs = jnp.transpose(spread * rows.reshape(particles, samples, -1), (1, 2, 0))
    reaches = [jax.tree.map(lambda factor: factor.astype(rows.dtype), reach) for _, reach in local.values()]
    slopes = dict(zip(local, regressions(outputs, reaches, axes.particles, _ITERATIONS), strict=True))

    spanned = rows * (signs / (sigma * spread))[:, None]

    def part(name: str, m: Array, e: Any, scale: Array) -> Local | Columns | Spanned:
        if name in local:
            return Local(local[name][0], scale * slopes[name], m.shape)
        left = (e[0] / scale).reshape(particles, -1, deviations.rank)
        if m.size > particles:
            return Spanned(spanned, left, e[1], m.shape, axes.particles)
        columns = jnp.einsum("jnr,jkr->jnk", left, e[1]).reshape(particles, -1)
        return Columns(_sum(spanned.T @ columns, axes.particles), m.shape)

    return Jacobian([part(*leaf) for leaf in leaves], structure, axes.batch)


def _sum(value: Any, axis: str | None) -> Any:
    return value if axis is None else lax.psum(value, axis)


class Reach(NamedTuple):
    """How the particles' deviations of one leaf reach a sample: as ``sum_r s_jr b_jnr``.

    Attributes:
        inner: s, shape (B, r, J), or (r, J) of one sample, or of all where they do not differ.
        right: b, shape (r, J, n).
    """

    inner: Array
    right: Array

    def times(self, slopes: Array) -> Array:
        """One sample's outputs (C, J) of its slopes (C, n)."""
        return reduce(add, (s * (slopes @ b.T) for s, b in zip(self.inner, self.right, strict=True)))

    def transposed(self, outputs: Array) -> Array:
        """One sample's slopes (C, n) of its outputs (C, J)."""
        return reduce(add, ((outputs * s) @ b for s, b in zip(self.inner, self.right, strict=True)))


def regressions(outputs: Array, reaches: list[Reach], axis: str | None, iterations: int) -> list[Array]:
    """For each sample the slopes that explain its outputs from what reached it, in least squares.

    By conjugate gradients from zero, every leaf in units of its own deviations: to stop early regularizes where there
    are fewer particles than numbers that reach a sample. The first iterate is along the covariances.

    Args:
        outputs: centred, shape (B, C, J).
        reaches: of the leaves.
        axis: over which the particles are spread.
        iterations: of conjugate gradients.

    Returns:
        Slopes (B, C, n) for every leaf.
    """

    def one(row: tuple[Array, list[Array]]) -> list[Array]:
        sample, inners = row
        own = iter(inners)
        reached = [reach._replace(inner=next(own)) if reach.inner.ndim == 3 else reach for reach in reaches]
        return _regression(sample, reached, axis, iterations)

    if not reaches:
        return []
    together = max(1, _CACHE_BYTES // (outputs[0].size * outputs.dtype.itemsize))
    inners = [reach.inner for reach in reaches if reach.inner.ndim == 3]
    return lax.map(one, (outputs, inners), batch_size=min(len(outputs), together))


def _regression(outputs: Array, reaches: list[Reach], axis: str | None, iterations: int) -> list[Array]:
    norms = [_sum(jnp.sum(reach.inner**2), axis) for reach in reaches]
    units = [lax.rsqrt(jnp.where(norm > 0, norm, 1)) for norm in norms]

    def back(residuals: Array) -> list[Array]:
        return [unit * _sum(reach.transposed(residuals), axis) for unit, reach in zip(units, reaches, strict=True)]

    def matrix(slopes: list[Array]) -> list[Array]:
        reached = (reach.times(unit * v) for unit, reach, v in zip(units, reaches, slopes, strict=True))
        return back(reduce(add, reached))

    def dot(a: list[Array], b: list[Array]) -> Array:
        return reduce(add, (jnp.sum(u * v, axis=-1, keepdims=True) for u, v in zip(a, b, strict=True)))

    found = _conjugate_gradients(matrix, back(outputs), iterations, dot)
    return [unit * v for unit, v in zip(units, found, strict=True)]


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

    def dot(a: Params, b: Params) -> Array:
        return sum((jnp.vdot(u, v) for u, v in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)), jnp.zeros(()))

    return _conjugate_gradients(matrix, jacobian.transposed(gradient), iterations, dot)


def _conjugate_gradients(
    matrix: Callable[[Any], Any], right: Any, iterations: int, dot: Callable[[Any, Any], Array]
) -> Any:
    """``matrix^-1 right`` for a positive definite matrix, from zero; or many such, one for each number that dot gives.

    That of ``jax.scipy`` cannot be used: its matrix may not sum over devices (JAX 0.10).
    """

    def plus(a: Any, factor: Array, b: Any) -> Any:
        return jax.tree.map(lambda u, v: u + factor.astype(u.dtype) * v, a, b)

    def body(_: Any, carry: Any) -> Any:
        x, residual, along, rest = carry
        product = matrix(along)
        step = _ratio(rest, dot(along, product))
        x, residual = plus(x, step, along), plus(residual, -step, product)
        new = dot(residual, residual)
        return x, residual, plus(residual, _ratio(new, rest), along), new

    zero = jax.tree.map(jnp.zeros_like, right)
    return lax.fori_loop(0, iterations, body, (zero, right, right, dot(right, right)))[0]


def _ratio(a: Array, b: Array) -> Array:
    """``a / b``; zero where nothing is left to do."""
    return jnp.where(b > 0, a / jnp.where(b > 0, b, 1), 0)
