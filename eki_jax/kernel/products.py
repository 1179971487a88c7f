r"""The algebra of the library: products with the ensemble's covariances.

With Z the centred outputs and R the cotangents, both (J, M), and U a leaf of the ensemble, (J, P), every function
here is a product of the three. ``R (Z^T U)`` goes through output space and costs 4 J M P operations;
``(R Z^T) U`` goes through particle space and costs 2 J^2 (M + P). The shapes decide, while tracing. The walk over the
leaves in place is that of :mod:`eki_jax.kernel.blocks`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from eki_jax._checks import arrays, one_of
from eki_jax._types import Array, Ensemble
from eki_jax.kernel.axes import Axes, Axis
from eki_jax.kernel.blocks import block_width, map_blocks
from eki_jax.kernel.costs import Communication, choose_communication
from eki_jax.kernel.health import OUTLIER_CUT, finite_particles, near_particles
from eki_jax.kernel.layouts import Multiply, checked_communication, multiplier
from eki_jax.kernel.once import compiled_once
from eki_jax.kernel.particles import check_like, ensemble_size, flatten_outputs, local_size, wide_dtype
from eki_jax.kernel.precision import Precision, check_precision, is_bf16, product

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

Contraction = Literal["outputs", "particles"]


def direction(
    ensemble: Ensemble,
    outputs: Any,
    cotangents: Any,
    *,
    axis_name: str | None = None,
    contraction: Contraction | None = None,
    communication: Communication | None = None,
    precision: Precision = None,
) -> Ensemble:
    r"""The ensemble's estimate of the preconditioned loss gradient, ``+ C_uG r_j`` for every particle j.

    .. math:: d_j = \frac1J \sum_k (u_k - \bar u)\,\langle G_k - \bar G, r_j\rangle

    The vector field of ensemble Kalman inversion is minus this (Kovachki and Stuart, arXiv:1808.03620, equation 13).
    Nothing is differentiated: the model enters by its outputs only. A particle that is not finite, in its parameters,
    outputs or cotangents, or far beyond all others (``outlier_cut`` of :class:`eki_jax.SharedSettings`), takes no part,
    and its own direction is zero; with fewer than two others, all are.

    Args:
        ensemble: particles u_j, pytree of floating-point arrays of shape (J, ...).
        outputs: outputs G(u_j), an array of shape (J, ...), of any rank, or a pytree of them.
        cotangents: gradients r_j of the loss with respect to the outputs of particle j, in the shape of ``outputs``.
        axis_name: mapped axis over which the particles are spread (vmap, pmap, shard_map). The sums then run over all
            devices.
        contraction: order of the products, ``"outputs"`` or ``"particles"``; the cheaper one by default.
        communication: layout in which devices share their particles, ``"all_reduce"`` (of M x P numbers, whatever J
            is), ``"reduce_scatter"``, ``"all_to_all"``, ``"gather"``, ``"ring"`` or ``"bf16_sums"`` (the all-reduce's
            sums, sent in bfloat16 and added in float32); the cheapest by default, the last only with products in
            bfloat16, see :func:`eki_jax.sharding.choose_communication`.
        precision: precision of the matrix products, as in :func:`jax.numpy.matmul`; or ``"bf16"``: centred factors
            rounded to bfloat16, sums in float32.

    Returns:
        A pytree like ``ensemble``, in its dtypes. Units: parameters times loss.

    Raises:
        TypeError: a leaf of the ensemble is not floating-point.
        ValueError: leaves that disagree on J, J < 2, outputs of another J, cotangents of another shape.

    >>> import jax.numpy as jnp
    >>> u = jnp.array([[0.0, 1.0], [2.0, 1.0]])
    >>> direction(u, outputs=u[:, :1], cotangents=jnp.array([[3.0], [1.0]]))
    Array([[3., 0.],
           [1., 0.]], dtype=float32)
    """
    for name, tree in (("ensemble", ensemble), ("outputs", outputs), ("cotangents", cotangents)):
        arrays(name, tree)
    check_precision(precision)
    one_of("contraction", contraction, ("outputs", "particles", None))
    checked_communication(communication)
    return _direction(ensemble, outputs, cotangents, axis_name, contraction, communication, precision)


_SETTINGS = ("axis_name", "contraction", "communication", "precision")


@partial(compiled_once, static=_SETTINGS)
def _direction(
    ensemble: Ensemble,
    outputs: Any,
    cotangents: Any,
    axis_name: str | None,
    contraction: Contraction | None,
    communication: Communication | None,
    precision: Precision,
) -> Ensemble:
    ensemble_size(ensemble, axis_name=axis_name)
    local = local_size(ensemble, name="ensemble")
    flatten_outputs(outputs, local, name="outputs")  # names J before anything else
    check_like(cotangents, outputs)
    finite = finite_particles((ensemble, outputs, cotangents))
    products = Products.of(
        ensemble,
        outputs,
        cotangents,
        healthy=finite & near_particles(outputs, cotangents, finite, OUTLIER_CUT, Axes(Axis(axis_name))),
        axis=Axis(axis_name),
        contraction=contraction,
        communication=communication,
        precision=precision,
    )
    (result,), _ = products.map_blocks(lambda d, u: (d.astype(u.dtype),), ensemble)
    return result


def drift_norm(
    outputs: Any, cotangents: Any, *, axis_name: str | None = None, precision: Precision = None
) -> Float[Array, ""]:
    r"""The paper's norm of D, ``||D||_F`` with ``D_kj = <G_k - mean G, r_j>`` and no 1/J.

    The paper's step ``u - h D u`` is ``u - h J direction``. Where M < J/2 the norm comes from the two M x M matrices
    of inner products, ``||D||_F^2 = <Z^T Z, R^T R>``; should that sum cancel beyond what its dtype resolves, D itself
    is summed instead. (arXiv:1808.03620, section 4.3.3.)

    Args:
        outputs: array of shape (J, ...) or a pytree of them.
        cotangents: gradients of the loss, in the shape of ``outputs``.
        axis_name: mapped axis over which the particles are spread.
        precision: precision of the matrix products.

    Returns:
        A scalar, float32 or wider, without the particles that are not finite. Units: outputs times loss per output,
        that is loss.

    Raises:
        ValueError: leading axes that disagree, or cotangents of another shape.

    >>> import jax.numpy as jnp
    >>> drift_norm(jnp.array([[0.0], [2.0]]), jnp.array([[3.0], [4.0]]))
    Array(7.071068, dtype=float32)
    """
    arrays("outputs", outputs)
    arrays("cotangents", cotangents)
    check_precision(precision)
    return _drift_norm(outputs, cotangents, axis_name, precision)


@partial(compiled_once, static=("axis_name", "precision"))
def _drift_norm(outputs: Any, cotangents: Any, axis_name: str | None, precision: Precision) -> Array:
    size = local_size(outputs, name="outputs")
    check_like(cotangents, outputs)
    axis = Axis(axis_name)
    healthy = finite_particles((outputs, cotangents))
    number = jnp.maximum(axis.sum(jnp.sum(healthy, dtype=jnp.int32)), 1)
    z = centred(flatten_outputs(outputs, size, name="outputs"), healthy, number, axis)
    r = jnp.where(healthy[:, None], flatten_outputs(cotangents, size, name="cotangents"), 0)
    return _frobenius(z, r.astype(z.dtype), axis, precision)


class Products(NamedTuple):
    """The centred outputs and the cotangents of one step, ready to be multiplied with the ensemble.

    Attributes:
        anomalies: centred outputs Z, shape (J, M); their mean is over the particles of all devices.
        cotangents: cotangents R, shape (J, M).
        size: number of particles J on all devices together.
        healthy: flags, shape (J,), False where a particle is to take no part; None where all do.
        axis: devices over which the particles are spread.
        weights: matrix D^T = R Z^T, shape (J, J on all devices), where the products go through particle space; else
            None.
        precision: precision of the matrix products.
        multiply: product with R Z^T over devices, where it is more than an order of the products; else None.
    """

    anomalies: Array
    cotangents: Array
    size: int | Array
    healthy: Array | None = None
    axis: Axis = Axis()
    weights: Array | None = None
    precision: Precision = None
    multiply: Multiply | None = None

    @classmethod
    def of(
        cls,
        ensemble: Ensemble,
        outputs: Any,
        cotangents: Any,
        *,
        healthy: Array | None = None,
        axis: Axis = Axis(),  # noqa: B008
        contraction: Contraction | None = None,
        communication: Communication | None = None,
        precision: Precision = None,
    ) -> Products:
        """Check the arguments of :func:`direction` and centre the outputs."""
        one_of("contraction", contraction, ("outputs", "particles", None))
        check_precision(precision)
        local = local_size(ensemble, name="ensemble")
        size: int | Array = ensemble_size(ensemble, axis_name=axis.name)
        local_outputs = flatten_outputs(outputs, local, name="outputs")  # names J before it names shapes
        check_like(cotangents, outputs)
        r = flatten_outputs(cotangents, local, name="cotangents")
        if healthy is not None:
            r = jnp.where(healthy[:, None], r, 0)
            size = jnp.maximum(axis.sum(jnp.sum(healthy.astype(jnp.int32))), 1)
        z = centred(local_outputs, healthy, size, axis)
        wide = wide_dtype(z.dtype, r.dtype)
        z, r, weights, multiply = z.astype(wide), r.astype(wide), None, None
        communication = checked_communication(communication)
        parameters = sum(math.prod(jnp.shape(leaf)[1:]) for leaf in jax.tree.leaves(ensemble))
        if axis.is_mapped:
            if communication is None and contraction is not None:
                communication = "all_reduce" if contraction == "outputs" else "gather"
            elif communication is None:
                sizes = local * axis.size, z.shape[1], parameters, axis.size
                communication = choose_communication(*sizes, rounded=is_bf16(precision))
            contraction = "particles" if communication == "gather" else "outputs"
            multiply = multiplier(communication, z, r, axis, precision)
        elif contraction is None:
            contraction = cheaper_contraction(z.shape[0], z.shape[1], parameters)
        if contraction == "particles":
            weights = product(r, axis.gathered(z).T, precision)
        return cls(z, r, size, healthy, axis, weights, precision, multiply)

    def norm(self) -> Array:
        """The paper's ``||D||_F``; see :func:`drift_norm`."""
        if self.weights is not None:
            return jnp.sqrt(self.axis.sum(jnp.sum(self.weights * self.weights)))
        return _frobenius(self.anomalies, self.cotangents, self.axis, self.precision)

    def map_blocks(
        self,
        fn: Callable[..., tuple[Array, ...]],
        ensemble: Ensemble,
        *companions: Ensemble,
        when: Array | None = None,
    ) -> tuple[tuple[Ensemble, ...], Array]:
        """``fn(direction, ensemble, *companions)`` on one block of columns after another, in place.

        Only a block of the direction exists at any time, so that with donated buffers a step keeps one copy of the
        ensemble. ``fn`` works column by column and returns blocks in the shapes and dtypes of its arguments; a
        companion may have another leading axis than the ensemble. Where the scalar ``when`` is False, the blocks stay
        as they are. Give it wherever ``fn`` returns more than one block: it is a branch then, which makes the compiler
        compute all of them before it writes one. Without it, it would copy whole leaves to keep what the second block
        still reads of the first.

        Returns:
            The trees that ``fn`` returns, at most as many as it was given, and tr C(u), the summed variance of all
            parameters, which costs nothing here.
        """
        transposed = self.anomalies.T  # once, not while every block is packed
        trees = (ensemble, *companions)
        width = block_width(self.anomalies, ensemble)
        moved, squares = map_blocks(fn, lambda block: self._block_direction(block, transposed), trees, width, when)
        return moved, squares / jnp.asarray(self.size, squares.dtype)

    def _block_direction(self, block: Array, transposed: Array) -> tuple[Array, Array]:
        """``C_uG r`` for a block of columns, shape (J, w), in the wide dtype; and the block's share of J tr C(u)."""
        wide = wide_dtype(block.dtype, self.anomalies.dtype)
        # Z sums to zero, so the centring changes nothing but the rounding: an ensemble that has nearly collapsed keeps
        # its digits.
        u = centred(block.astype(wide), self.healthy, self.size, self.axis)
        if self.multiply is not None:
            d = self.multiply(u, block.dtype)
        elif self.weights is not None:
            d = self._matmul(self.weights.astype(wide), self.axis.gathered(u))
        else:
            through = self.axis.sum(self._matmul(transposed.astype(wide), u))
            d = self._matmul(self.cotangents.astype(wide), through)
        squares = self.axis.sum(jnp.sum(u * u))
        return d / jnp.asarray(self.size, wide), squares.astype(self.anomalies.dtype)

    def _matmul(self, a: Array, b: Array) -> Array:
        return product(a, b, self.precision)


def cheaper_contraction(ensemble_size: int, outputs: int, parameters: int) -> Contraction:
    """The order of the products that needs fewer operations.

    Through outputs: 4 J M P. Through particles: 2 J^2 (M + P), the inner products and then the combinations.

    >>> cheaper_contraction(2000, 600, 79510), cheaper_contraction(100, 600, 79510)
    ('outputs', 'particles')
    """
    through_outputs = 4 * ensemble_size * outputs * parameters
    through_particles = 2 * ensemble_size**2 * (outputs + parameters)
    return "outputs" if through_outputs <= through_particles else "particles"


def _frobenius(z: Array, r: Array, axis: Axis, precision: Precision) -> Array:
    """``||Z R^T||_F``, by M x M matrices where they are the smaller, by rows of D otherwise."""
    size, outputs = z.shape
    if size == 0 or outputs == 0:
        return jnp.zeros((), z.dtype)

    def by_particles() -> Array:
        d = product(r, axis.gathered(z).T, precision)
        return axis.sum(jnp.sum(d * d))

    if 2 * outputs > size:
        return jnp.sqrt(by_particles())
    zz = axis.sum(jnp.matmul(z.T, z, precision=lax.Precision.HIGHEST))
    rr = axis.sum(jnp.matmul(r.T, r, precision=lax.Precision.HIGHEST))
    square = jnp.sum(zz * rr)
    # The sum's rounding error is about eps ||Z^T Z|| ||R^T R||: where the residuals are nearly orthogonal to the
    # anomalies, little of it would be left.
    scale = jnp.sqrt(jnp.sum(zz * zz) * jnp.sum(rr * rr))
    resolved = square > 1e3 * jnp.finfo(z.dtype).eps * scale
    return jnp.sqrt(lax.cond(resolved | ~jnp.isfinite(square), lambda: square, by_particles))


def centred(
    rows: Float[Array, "j m"], healthy: Bool[Array, " j"] | None, size: int | Array, axis: Axis
) -> Float[Array, "j m"]:
    """``rows`` minus their mean over the healthy particles of all devices; zero in the rows of the others.

    Args:
        rows: rows of this device's particles, shape (j, ...).
        healthy: flags of those that take part, shape (j,); None for all.
        size: number of those that take part on all devices.
        axis: devices over which the particles are spread.

    >>> centred(jnp.array([[1.0], [jnp.nan], [3.0]]), jnp.array([True, False, True]), 2, Axis()).ravel()
    Array([-1.,  0.,  1.], dtype=float32)
    """
    rows = rows.astype(wide_dtype(rows.dtype))
    if healthy is not None:
        rows = jnp.where(healthy[:, None], rows, 0)
    rows = rows - axis.sum(jnp.sum(rows, axis=0, keepdims=True)) / jnp.asarray(size, rows.dtype)
    return rows if healthy is None else jnp.where(healthy[:, None], rows, 0)
