r"""The model's derivative estimated sample by sample, from what every sample's particles saw.

A deviation ``a_j b_j^T`` of a weight matrix reaches sample x only as ``d_j(x) = (x a_j) b_j``, added to the matrix's n
outputs: a vector of n known numbers instead of the matrix's P. A vector reaches it as itself. To first order the
particles' outputs z are linear in these few numbers, so that a regression for every sample has the derivatives,

.. math:: \min_\Delta \sum_j \Big| z_j(x) - \bar z(x) - \sum_{W} \Delta_{W,x}\, d_{W,j}(x) \Big|^2, \qquad
          \frac{\partial z}{\partial W} \cdot V \approx \Delta_{W,x}\, (x V) .

The first iterate of its conjugate gradients is the covariance C_uG of the sample and the matrix without what cannot be
there: localization, as the ensemble Kalman filter knows it for space. The iterations take out what all the other
matrices put into that covariance, which is most of its noise. A bias reaches a sample where its layer's matrix does and
has the same Delta; a convolution does so at every pixel. Leaves that reach a sample in another way keep the plain
estimate ``sum_j z_j e_j^T / (J sigma)``, of what the regression leaves of z. The damped Gauss-Newton system is that of
all P parameters, solved by conjugate gradients too:

.. math:: (J^T H J + \tfrac{\lambda}{\sigma^2} I)\, d = J^T g
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np

from eki_jax._checks import whole
from eki_jax._types import Array, Batch, ForwardFn, Params
from eki_jax.kernel.axes import Axes, Axis
from eki_jax.kernel.interpreter import Roles, leaf_name
from eki_jax.losses.curvature import check_convex, curvature
from eki_jax.natural.deviations import LowRankDeviations
from eki_jax.natural.direction import Direction, Setup, refusal
from eki_jax.natural.draws import Seen, low_rank_of
from eki_jax.natural.estimates.regressions import (
    MixedReach,
    Participants,
    Reach,
    conjugate_gradients,
    regressions,
)
from eki_jax.natural.estimates.span import centred, share_of_loss


class Local(NamedTuple):
    """One leaf that reaches a sample through few numbers: a matrix through its products, a vector through itself.

    Attributes:
        inputs: rows x at the p places where a sample is multiplied, shape (B, p, g n); of a vector ones, (B, p, 1).
        slopes: Delta, shape (B, C, p, g k), in units of a deviation.
        shape: shape of the leaf.
        roles: roles of its axes in the products, by which its numbers are g matrices of (n, k).
    """

    inputs: Array
    slopes: Array
    shape: tuple[int, ...]
    roles: Roles

    def times(self, v: Array) -> Array:
        """Jacobian times the leaf, shape (B C,)."""
        matrices = self.roles.matrices(v)
        if len(matrices) == 1:
            reached = self._rows()[:, 0] @ matrices[0]
        else:
            reached = jnp.einsum("xgn,gnk->xgk", self._rows(), matrices)
        return jnp.sum(reached.reshape(len(self.slopes), 1, -1) * self._flat(), axis=-1).ravel()

    def transposed(self, r: Array) -> Array:
        """Jacobian transposed times outputs."""
        back = jnp.sum(r.reshape(*self.slopes.shape[:2], 1) * self._flat(), axis=1)
        shared, free = self.roles.size("shared"), self.roles.size("free")
        if shared == 1:
            found = self._rows()[:, 0].T @ back.reshape(-1, free)
        else:
            found = jnp.einsum("xgn,xgk->gnk", self._rows(), back.reshape(-1, shared, free))
        return self.roles.array(found, self.shape)

    def _rows(self) -> Array:
        return self.inputs.reshape(-1, self.roles.size("shared"), self.roles.size("summed"))

    def _flat(self) -> Array:
        """The slopes with one axis for all numbers that reach a sample: products of more axes are slow (JAX 0.10)."""
        return self.slopes.reshape(*self.slopes.shape[:2], -1)


class Columns(NamedTuple):
    """One small leaf whose estimated Jacobian is formed.

    Attributes:
        matrix: Jacobian's columns of the leaf, shape (M, P).
        shape: shape of the leaf.
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
        left: factors a, shape (J, N, r).
        right: factors b, shape (J, k, r).
        shape: shape of the leaf, of N k numbers.
        axis: devices over which the particles are spread.
    """

    rows: Array
    left: Array
    right: Array
    shape: tuple[int, ...]
    axis: Axis

    def times(self, v: Array) -> Array:
        """Jacobian times the leaf, shape (M,)."""
        inner = jnp.einsum("jnr,nk->jkr", self.left, v.reshape(self.left.shape[1], -1))
        return self.axis.sum(jnp.einsum("jkr,jkr->j", inner, self.right) @ self.rows)

    def transposed(self, r: Array) -> Array:
        """Jacobian transposed times outputs."""
        weighted = self.right * (self.rows @ r)[:, None, None]
        return self.axis.sum(jnp.einsum("jnr,jkr->nk", self.left, weighted)).reshape(self.shape)


class Jacobian(NamedTuple):
    """The estimated derivative of the outputs with respect to all parameters, in units of their deviations.

    Its rows are those of this device's samples.
    """

    parts: list[Local | Columns | Spanned]
    structure: Any
    batch_axis: Axis

    def times(self, v: Params) -> Array:
        """Jacobian times a pytree of parameters, shape (M,)."""
        leaves = self.structure.flatten_up_to(v)
        return sum((part.times(leaf) for part, leaf in zip(self.parts, leaves, strict=True)), jnp.zeros(()))

    def transposed(self, r: Array) -> Params:
        """Jacobian transposed times outputs, a pytree of parameters."""
        return self.batch_axis.sum(self.structure.unflatten([part.transposed(r) for part in self.parts]))


def estimated_jacobian(
    deviations: LowRankDeviations,
    mean: Params,
    drawn: tuple[Any, Array],
    rows: Array,
    sigma: Array,
    seen: Seen,
    healthy: Array,
    number: Array,
    axes: Axes,
) -> Jacobian:
    """The derivative of the outputs in the parameters, in units of the deviations' scales.

    Args:
        deviations: deviations of low rank.
        mean: parameters m of the mean particle.
        drawn: factors and signs of the particles.
        rows: centred outputs over sqrt(J - 1), shape (J, M); zero for particles that failed.
        sigma: scale of the deviations.
        seen: observations of the mean particle's pass, of the B samples.
        healthy: flags of the particles that did not fail, shape (J,).
        number: number of those on all devices.
        axes: devices over which particles and samples are spread; J and B are then those of this device.
    """
    sigma, signs = sigma.astype(rows.dtype), drawn[1].astype(rows.dtype)
    particles = len(signs)
    reaches, place = _reaches(deviations, mean, (drawn[0], signs), sigma, seen, healthy)
    spread = jnp.sqrt(jnp.maximum(number, 2) - 1.0).astype(rows.dtype)
    outputs = jnp.transpose(spread * rows.reshape(particles, seen.samples, -1), (1, 2, 0))
    known = jax.tree.map(lambda factor: factor.astype(rows.dtype), list(reaches.values()))
    taking_part = Participants(healthy.astype(rows.dtype), number, axes.particles)
    found, unexplained = regressions(outputs, known, taking_part)
    slopes = dict(zip(reaches, found, strict=True))
    # What the regressions explain is noise for the leaves that keep the plain estimate.
    rest = jnp.transpose(unexplained, (2, 0, 1)).reshape(rows.shape)
    spanned = rest * (signs / (sigma * spread**2))[:, None]

    def part(name: str, m: Array, e: Any, scale: Array) -> Local | Columns | Spanned:
        if name in place:
            rows = reaches[place[name]].inputs
            if name not in seen.met:
                return Local(jnp.ones_like(rows[..., :1]), scale * slopes[place[name]], m.shape, _vector(m.size))
            return Local(rows, scale * slopes[name], m.shape, seen.met[name].roles)
        left, right = (factor.reshape(particles, -1, deviations.rank) for factor in e)
        if m.size > particles:  # its columns would be more numbers than the particles' own
            return Spanned(spanned, left / scale, right, m.shape, axes.particles)
        columns = jnp.einsum("jnr,jkr->jnk", left / scale, right).reshape(particles, -1)
        return Columns(axes.particles.sum(spanned.T @ columns), m.shape)

    structure: Any = jax.tree.structure(mean)
    leaves = zip(*_named(mean, drawn[0], deviations.scales(mean)), strict=True)
    return Jacobian([part(*leaf) for leaf in leaves], structure, axes.batch)


def _vector(size: int) -> Roles:
    """Those of a vector: all of it comes out."""
    return Roles.of([], [("free", size)])


def _named(mean: Params, *trees: Any) -> tuple[list[Any], ...]:
    """The leaves' names, the leaves, and what the other trees have in their places."""
    structure: Any = jax.tree.structure(mean)
    names = [leaf_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(mean)]
    return names, *(structure.flatten_up_to(tree) for tree in (mean, *trees))


def _reaches(
    deviations: LowRankDeviations,
    mean: Params,
    drawn: tuple[Any, Array],
    sigma: Array,
    seen: Seen,
    healthy: Array,
) -> tuple[dict[str, Reach | MixedReach], dict[str, str]]:
    """How the local leaves reach the samples, and by the name of each local leaf the one that has its slopes."""
    factors, signs = drawn
    size = jnp.where(healthy, signs * sigma, 0)
    reaches: dict[str, Reach | MixedReach] = {}
    for name, m, e in zip(*_named(mean, factors), strict=True):
        if name in seen.met:
            met = seen.met[name]
            if not met.roles.side:
                left, right = (jnp.moveaxis(factor.astype(size.dtype), 0, -1) for factor in e)
                reaches[name] = MixedReach(met.rows, size * left, right, met.roles)
                continue
            left, right = (factor.reshape(len(signs), -1, deviations.rank) for factor in e)
            inner, outer = (left, right) if met.roles.side == "left" else (right, left)
            inner = jnp.moveaxis(size[:, None, None] * inner.astype(size.dtype), 0, 2)
            reaches[name] = Reach(met.rows, inner, jnp.moveaxis(outer, -1, 0))
        elif not isinstance(e, tuple):
            ones = jnp.ones((seen.samples, 1, 1), m.dtype)
            reaches[name] = Reach(ones, size[None, None], e.reshape(1, len(signs), -1))
    # What is added to the same numbers has the same slopes: one unknown for both.
    place = {name: name for name in reaches}
    for bias, matrix in seen.matrix_of.items():
        vector = reaches.pop(bias)
        reaches[matrix] = reaches[matrix]._replace(vector=(vector.left, vector.right))
        place[bias] = matrix
    return reaches, place


def _samples_first(outputs: Any) -> np.ndarray:
    """The order of all output numbers in which those of one sample are side by side.

    Raises:
        ValueError: outputs that do not all have the samples as their first axis.

    >>> _samples_first({"a": jnp.zeros((2, 1)), "b": jnp.zeros((2, 2))})
    array([0, 2, 3, 1, 4, 5])
    """
    leaves = jax.tree.leaves(outputs)
    if len({leaf.shape[:1] for leaf in leaves}) > 1 or not leaves[0].ndim:
        shapes = jax.tree.map(jnp.shape, outputs)
        raise ValueError(f"localized: outputs of shapes {shapes}; wanted the samples as the first axis of all of them")
    samples, starts = len(leaves[0]), np.cumsum([0, *(leaf.size for leaf in leaves)])
    numbers = [np.arange(a, b).reshape(samples, -1) for a, b in itertools.pairwise(starts)]
    return np.concatenate(numbers, axis=1).ravel()


def damped_newton(
    jacobian: Jacobian,
    curve: Callable[[Array], Array],
    gradient: Array,
    damping: Array,
    iterations: int,
) -> Params:
    """``(J^T H J + damping I)^-1 J^T g`` by conjugate gradients, in units of the deviations' scales.

    Args:
        jacobian: estimated Jacobian J.
        curve: function ``q -> H q``.
        gradient: loss's gradient g in the outputs, shape (M,).
        damping: damping > 0.
        iterations: largest number of products with the matrix.
    """

    def matrix(v: Params) -> Params:
        product = jacobian.transposed(curve(jacobian.times(v)))
        return jax.tree.map(lambda a, b: a + damping.astype(a.dtype) * b, product, v)

    def dot(a: Params, b: Params) -> Array:
        return sum((jnp.vdot(u, v) for u, v in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)), jnp.zeros(()))

    return conjugate_gradients(matrix, jacobian.transposed(gradient), iterations, dot)


class Localized(NamedTuple):
    """See :func:`localized`."""

    iterations: int = 10

    def extra_passes(self, setup: Setup) -> int:
        """One: the mean particle's, which is watched."""
        del setup
        return 1

    @property
    def needs_model(self) -> bool:
        """Yes: it looks at the inputs of the layers."""
        return True

    def check(self, setup: Setup) -> None:
        """Raise unless the deviations are of low rank, and for a precision, which it has no product for."""
        if setup.precision is not None:
            raise TypeError(
                f"precision: {setup.precision!r} of the products that form a matrix, which a localized step does not; "
                "wanted none"
            )
        if not isinstance(setup.cloud.deviations, LowRankDeviations):
            raise ValueError("localized: True with deviations of full rank; wanted low_rank(...)")

    def memory(self, setup: Setup, forward: ForwardFn, mean: Params) -> None:
        """None: every step stands alone."""

    def direction(
        self,
        setup: Setup,
        forward: ForwardFn,
        mean: Params,
        drawn: Any,
        sigma: Array,
        damping: Array,
        batch: Batch,
        memory: Any = None,
    ) -> Direction:
        """The direction, evaluating the model and looking into it."""
        del memory
        x, targets = batch
        deviations, axes = low_rank_of(setup.cloud.deviations), setup.axes
        seen = setup.cloud.see(forward, mean, x)
        outputs = setup.cloud.evaluate(forward, mean, drawn, sigma, x, setup.chunk_size)
        order = _samples_first(seen.outputs)
        rows, healthy, number = centred(outputs, axes, setup.outlier_cut)
        rows = rows[:, order]
        model = curvature(setup.loss, seen.outputs, targets)
        check_convex(model)
        share = share_of_loss(setup.loss, axes)
        jacobian = estimated_jacobian(deviations, mean, drawn, rows, sigma, seen, healthy, number, axes)
        gradient = lambda z: curvature(setup.loss, z, targets).gradient
        flat, unravel = jax.flatten_util.ravel_pytree(seen.outputs)
        back = np.argsort(order)
        curve = lambda q: (
            share * jax.jvp(lambda z: gradient(unravel(z)), (flat,), (q[back].astype(flat.dtype),))[1][order]
        )
        residual = share * model.gradient[order]
        d = damped_newton(jacobian, curve, residual, damping / sigma**2, self.iterations)
        along = jacobian.times(d)
        over_samples = axes.batch
        value, slope, bend = over_samples.sum(
            (share * model.value, jnp.vdot(residual, along), jnp.vdot(along, curve(along)))
        )
        is_convex = over_samples.all(model.is_convex)
        reason = refusal(slope, bend, sigma, damping, is_convex=is_convex, healthy=number, setup=setup)
        ok = reason == 0
        scales = deviations.scales(mean)
        ascent = jax.tree.map(lambda m, v, s: jnp.where(ok, (s * v).astype(m.dtype), 0), mean, d, scales)
        direction = Direction(ascent, value, slope, bend, number, jnp.asarray(False), reason)
        return direction.within(setup.norm_constraint)

    def from_outputs(
        self, setup: Setup, mean: Params, drawn: Any, sigma: Array, damping: Array, outputs: Any, targets: Any
    ) -> Direction:
        """Refused: the outputs alone do not show what reached them."""
        raise TypeError("localized: True, which sees inside of the model; wanted False for update()")


def localized(iterations: int = 10) -> Localized:
    """The estimate of each sample's derivative by a regression on what reached that sample.

    The step then solves for all parameters instead of the deviations' span, with fewer particles for the same accuracy.

    Args:
        iterations: number of conjugate gradients of the solve, >= 1.

    Raises:
        ValueError: fewer than one iteration.

    >>> localized(5).iterations
    5
    """
    return Localized(whole("iterations", iterations))
