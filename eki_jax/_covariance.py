r"""The one kernel of the library: products with the ensemble's covariances.

With Z the centred outputs and R the cotangents, both (J, M), and U a leaf of the ensemble, (J, P), every function
here is a product of the three. ``R (Z^T U)`` goes through output space and costs 4 J M P operations;
``(R Z^T) U`` goes through particle space and costs 2 J^2 (M + P). The shapes decide, while tracing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from eki_jax._communication import Multiply, checked_communication, multiplier
from eki_jax._costs import Communication, choose_communication
from eki_jax._precision import Precision, product
from eki_jax._tree import check_like, ensemble_size, flatten_outputs, local_size, wide_dtype
from eki_jax._types import Array, Ensemble

Contraction = Literal["outputs", "particles"]

# A block's copies are kept below this share of the ensemble and below this many bytes, ...
_BLOCK_SHARE = 1 / 4
_BLOCK_BYTES = 64 * 2**20
# ... and on a processor within its cache between the two products (at P = 1e6 and J = 100 that is three times as fast),
# unless they would be narrower than products need to run at full speed.
_CACHE_BYTES = 8 * 2**20
_FULL_SPEED_WIDTH = 1024


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
    Nothing is differentiated: the model enters by its outputs only.

    Args:
        ensemble: pytree of floating-point arrays of shape (J, ...); the particles u_j.
        outputs: array of shape (J, ...), of any rank, or a pytree of them; G(u_j).
        cotangents: shaped like ``outputs``; r_j, the loss's gradient with respect to the outputs of particle j.
        axis_name: mapped axis over which the particles are spread (vmap, pmap, shard_map). The sums then run over all
            devices.
        contraction: ``"outputs"`` or ``"particles"`` forces the order of the products; the cheaper one by default.
        communication: ``"all_reduce"`` (of M x P numbers, whatever J is), ``"reduce_scatter"``, ``"all_to_all"``,
            ``"gather"`` or ``"ring"`` forces how devices share their particles; the cheapest by default, see
            :func:`eki_jax.sharding.choose_communication`.
        precision: of the matrix products, as in :func:`jax.numpy.matmul`; or ``"bf16"``: centred factors rounded to
            bfloat16, sums in float32.

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
    products = Products.of(
        ensemble,
        outputs,
        cotangents,
        axis_name=axis_name,
        contraction=contraction,
        communication=communication,
        precision=precision,
    )
    (result,), _ = products.map_blocks(lambda d, u: (d.astype(u.dtype),), ensemble)
    return result


def drift_norm(outputs: Any, cotangents: Any, *, axis_name: str | None = None, precision: Precision = None) -> Array:
    r"""The paper's norm of D, ``||D||_F`` with ``D_kj = <G_k - mean G, r_j>`` and no 1/J.

    The paper's step ``u - h D u`` is ``u - h J direction``. Where M < J/2 the norm comes from the two M x M matrices
    of inner products, ``||D||_F^2 = <Z^T Z, R^T R>``; should that sum cancel beyond what its dtype resolves, D itself
    is summed instead. (arXiv:1808.03620, section 4.3.3.)

    Args:
        outputs: array of shape (J, ...) or a pytree of them.
        cotangents: shaped like ``outputs``.
        axis_name: mapped axis over which the particles are spread.
        precision: of the matrix products.

    Returns:
        A scalar, float32 or wider. Units: outputs times loss per output, that is loss.

    Raises:
        ValueError: leading axes that disagree, or cotangents of another shape.

    >>> import jax.numpy as jnp
    >>> drift_norm(jnp.array([[0.0], [2.0]]), jnp.array([[3.0], [4.0]]))
    Array(7.071068, dtype=float32)
    """
    size = local_size(outputs, name="outputs")
    check_like(cotangents, outputs)
    z, r = _anomalies(outputs, size, axis_name), flatten_outputs(cotangents, size, name="cotangents")
    return _frobenius(z, r.astype(z.dtype), axis_name, precision)


class Products(NamedTuple):
    """The centred outputs and the cotangents of one step, ready to be multiplied with the ensemble.

    Attributes:
        anomalies: Z, shape (J, M), centred over the particles of all devices.
        cotangents: R, shape (J, M).
        size: J on all devices together.
        healthy: shape (J,), False where a particle is to take no part; None where all do.
        axis_name: mapped axis over which the particles are spread.
        weights: D^T = R Z^T, shape (J, J on all devices), where the products go through particle space; else None.
        precision: of the matrix products.
        multiply: the product with R Z^T over devices, where it is more than an order of the products; else None.
    """

    anomalies: Array
    cotangents: Array
    size: int | Array
    healthy: Array | None = None
    axis_name: str | None = None
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
        axis_name: str | None = None,
        contraction: Contraction | None = None,
        communication: Communication | None = None,
        precision: Precision = None,
    ) -> Products:
        """Check the arguments of :func:`direction` and centre the outputs."""
        if contraction not in (None, "outputs", "particles"):
            raise ValueError(f"contraction: {contraction!r}; wanted 'outputs', 'particles' or None")
        size: int | Array = ensemble_size(ensemble, axis_name=axis_name)
        local = local_size(ensemble, name="ensemble")
        local_outputs = flatten_outputs(outputs, local, name="outputs")  # names J before it names shapes
        check_like(cotangents, outputs)
        r = flatten_outputs(cotangents, local, name="cotangents")
        if healthy is not None:
            r = jnp.where(healthy[:, None], r, 0)
            size = jnp.maximum(_sum(healthy.astype(jnp.int32), axis_name), 1)
        z = _centred(local_outputs, healthy, size, axis_name)
        wide = wide_dtype(z.dtype, r.dtype)
        z, r, weights, multiply = z.astype(wide), r.astype(wide), None, None
        communication = checked_communication(communication)
        parameters = sum(math.prod(jnp.shape(leaf)[1:]) for leaf in jax.tree.leaves(ensemble))
        if axis_name is not None:
            if communication is None and contraction is not None:
                communication = "all_reduce" if contraction == "outputs" else "gather"
            elif communication is None:
                devices = lax.axis_size(axis_name)
                communication = choose_communication(local * devices, z.shape[1], parameters, devices)
            contraction = "particles" if communication == "gather" else "outputs"
            multiply = multiplier(communication, z, r, axis_name, precision)
        elif contraction is None:
            contraction = cheaper_contraction(z.shape[0], z.shape[1], parameters)
        if contraction == "particles":
            weights = product(r, _gather(z, axis_name).T, precision)
        return cls(z, r, size, healthy, axis_name, weights, precision, multiply)

    def norm(self) -> Array:
        """The paper's ``||D||_F``; see :func:`drift_norm`."""
        if self.weights is not None:
            return jnp.sqrt(_sum_devices(jnp.sum(self.weights * self.weights), self.axis_name))
        return _frobenius(self.anomalies, self.cotangents, self.axis_name, self.precision)

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
        trees = (ensemble, *companions)
        columns = [_as_columns(tree) for tree in trees]
        width = self._block_width(columns[0])
        transposed = self.anomalies.T  # once, not while every block is packed
        results, trace = [], jnp.zeros((), self.anomalies.dtype)
        for leaves in zip(*columns, strict=True):
            new, squares = self._map_leaf(fn, leaves, width, when, transposed)
            results.append(new)
            trace += squares.astype(trace.dtype)
        structure: Any = jax.tree.structure(ensemble)
        reshaped = tuple(
            structure.unflatten(
                [leaf.reshape(jnp.shape(old)) for leaf, old in zip(new, jax.tree.leaves(tree), strict=True)]
            )
            for new, tree in zip(zip(*results, strict=True), trees, strict=False)
        )
        return reshaped, trace / self.size

    def _map_leaf(
        self,
        fn: Callable[..., tuple[Array, ...]],
        leaves: tuple[Array, ...],
        width: int,
        when: Array | None,
        transposed: Array,
    ) -> tuple[tuple[Array, ...], Array]:
        kept = len(jax.eval_shape(lambda *blocks: fn(blocks[0], *blocks), *leaves))

        def one_block(blocks: tuple[Array, ...]) -> tuple[tuple[Array, ...], Array]:
            d, squares = self._block_direction(blocks[0], transposed)
            if when is None:
                return fn(d, *blocks), squares
            if kept == 1:  # nothing to keep apart: a select is fused with the write
                (block,) = fn(d, *blocks)
                return (jnp.where(when, block, blocks[0]),), squares
            return lax.cond(when, fn, lambda d, *blocks: blocks[:kept], d, *blocks), squares

        total = leaves[0].shape[1]
        if total <= width:
            return one_block(leaves)
        width = _even_width(total, width)
        count = total // width

        def at(start: Any, size: int, carry: tuple[tuple[Array, ...], Array]) -> tuple[tuple[Array, ...], Array]:
            arrays, squares = carry
            blocks = tuple(lax.dynamic_slice_in_dim(a, start, size, axis=1) for a in arrays)
            new, more = one_block(blocks)
            written = tuple(
                lax.dynamic_update_slice_in_dim(a, block, start, axis=1) for a, block in zip(arrays, new, strict=False)
            )
            return (*written, *arrays[len(written) :]), squares + more

        _, shape = jax.eval_shape(one_block, leaves)
        start = jnp.zeros((), shape.dtype)  # summed over devices, so it does not vary over a mesh
        carry = lax.fori_loop(0, count, lambda i, c: at(i * width, width, c), (leaves, start))
        if total % width:
            carry = at(count * width, total % width, carry)
        arrays, squares = carry
        return arrays[:kept], squares

    def _block_direction(self, block: Array, transposed: Array) -> tuple[Array, Array]:
        """``C_uG r`` for a block of columns, shape (J, w), in the wide dtype; and the block's share of J tr C(u)."""
        wide = wide_dtype(block.dtype, self.anomalies.dtype)
        # Z sums to zero, so the centring changes nothing but the rounding: an ensemble that has nearly collapsed keeps
        # its digits.
        u = _centred(block.astype(wide), self.healthy, self.size, self.axis_name)
        if self.multiply is not None:
            d = self.multiply(u, block.dtype)
        elif self.weights is not None:
            d = self._matmul(self.weights.astype(wide), _gather(u, self.axis_name))
        else:
            through = _sum_devices(self._matmul(transposed.astype(wide), u), self.axis_name)
            d = self._matmul(self.cotangents.astype(wide), through)
        squares = _sum_devices(jnp.sum(u * u), self.axis_name)
        return d / jnp.asarray(self.size, wide), squares

    def _matmul(self, a: Array, b: Array) -> Array:
        return product(a, b, self.precision)

    def _block_width(self, leaves: list[Array]) -> int:
        size, outputs = self.anomalies.shape
        row = (2 * size + min(size, outputs)) * self.anomalies.dtype.itemsize  # bytes of one column's copies
        budget = min(_BLOCK_BYTES, _BLOCK_SHARE * sum(leaf.nbytes for leaf in leaves))
        if jax.default_backend() == "cpu":
            budget = min(budget, max(_CACHE_BYTES, _FULL_SPEED_WIDTH * row))
        return max(64, int(budget / row))


def _even_width(total: int, width: int) -> int:
    """The largest divisor of ``total`` in (width / 2, width]; where there is none, a width with a short remainder."""
    divisors = (n for n in range(width, width // 2, -1) if total % n == 0)
    return next(divisors, total // -(-total // width))


def descended(block: Array, step_size: Array, d: Array) -> Array:
    """``block - step_size d``, computed in the dtype of ``d``, in the dtype of ``block``."""
    return (block.astype(d.dtype) - step_size.astype(d.dtype) * d).astype(block.dtype)


def cheaper_contraction(ensemble_size: int, outputs: int, parameters: int) -> Contraction:
    """The order of the products that needs fewer operations.

    Through outputs: 4 J M P. Through particles: 2 J^2 (M + P), the inner products and then the combinations.

    >>> cheaper_contraction(2000, 600, 79510), cheaper_contraction(100, 600, 79510)
    ('outputs', 'particles')
    """
    through_outputs = 4 * ensemble_size * outputs * parameters
    through_particles = 2 * ensemble_size**2 * (outputs + parameters)
    return "outputs" if through_outputs <= through_particles else "particles"


def _frobenius(z: Array, r: Array, axis_name: str | None, precision: Precision) -> Array:
    """``||Z R^T||_F``, by M x M matrices where they are the smaller, by rows of D otherwise."""
    size, outputs = z.shape
    if size == 0 or outputs == 0:
        return jnp.zeros((), z.dtype)

    def by_particles() -> Array:
        d = product(r, _gather(z, axis_name).T, precision)
        return _sum_devices(jnp.sum(d * d), axis_name)

    if 2 * outputs > size:
        return jnp.sqrt(by_particles())
    zz = _sum_devices(jnp.matmul(z.T, z, precision=lax.Precision.HIGHEST), axis_name)
    rr = _sum_devices(jnp.matmul(r.T, r, precision=lax.Precision.HIGHEST), axis_name)
    square = jnp.sum(zz * rr)
    # The sum's rounding error is about eps ||Z^T Z|| ||R^T R||: where the residuals are nearly orthogonal to the
    # anomalies, little of it would be left.
    scale = jnp.sqrt(jnp.sum(zz * zz) * jnp.sum(rr * rr))
    resolved = square > 1e3 * jnp.finfo(z.dtype).eps * scale
    return jnp.sqrt(lax.cond(resolved | ~jnp.isfinite(square), lambda: square, by_particles))


def _anomalies(outputs: Any, size: int, axis_name: str | None) -> Array:
    flat = flatten_outputs(outputs, size, name="outputs")
    total = size if axis_name is None else size * lax.axis_size(axis_name)
    return _centred(flat.astype(wide_dtype(flat.dtype)), None, total, axis_name)


def _centred(rows: Array, healthy: Array | None, size: int | Array, axis_name: str | None) -> Array:
    """``rows`` minus their mean over the healthy particles; zero in the rows of the others."""
    rows = rows.astype(wide_dtype(rows.dtype))
    if healthy is None:
        return rows - _sum(rows, axis_name) / jnp.asarray(size, rows.dtype)
    rows = jnp.where(healthy[:, None], rows, 0)
    mean = _sum(rows, axis_name) / jnp.asarray(size, rows.dtype)
    return jnp.where(healthy[:, None], rows - mean, 0)


def _sum(rows: Array, axis_name: str | None) -> Array:
    return _sum_devices(jnp.sum(rows, axis=0), axis_name)


def _sum_devices(x: Array, axis_name: str | None) -> Array:
    return x if axis_name is None else lax.psum(x, axis_name)


def _gather(rows: Array, axis_name: str | None) -> Array:
    return rows if axis_name is None else lax.all_gather(rows, axis_name, tiled=True)


def _as_columns(tree: Any) -> list[Array]:
    return [leaf.reshape(leaf.shape[0], math.prod(leaf.shape[1:])) for leaf in map(jnp.asarray, jax.tree.leaves(tree))]
