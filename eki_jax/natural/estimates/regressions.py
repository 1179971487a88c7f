"""Regressions, a sample at a time, of the particles' outputs on what reached that sample.

See :mod:`eki_jax.natural.estimates.localized` for what they are for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from operator import add
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import lax

from eki_jax._types import Array
from eki_jax.kernel.axes import Axis
from eki_jax.kernel.interpreter.products import Kind, Roles

# What stays in the processor's cache of the samples that are solved at a time.
_CACHE_BYTES = 2**20
# Of conjugate gradients: enough to take apart what different leaves did, ...
_ITERATIONS = 8
# ... or few, which regularize what has more numbers than there are particles.
_FEW = 2
# What rounding leaves of a residual, in units of the dtype's own.
_ROUNDING = 32


class Reach(NamedTuple):
    """How the particles' deviations of one leaf reach the samples: at each place as ``sum_r (x a_jr) b_jr``.

    Attributes:
        inputs: rows x, shape (B, p, n).
        left: factors a, times sigma and the particle's sign, shape (n, r, J).
        right: factors b, shape (r, J, k).
        vector: a vector's deviations in the same places, as left (1, 1, J) and right (1, J, k), or None.
    """

    inputs: Array
    left: Array
    right: Array
    vector: tuple[Array, Array] | None = None

    @property
    def places(self) -> int:
        """The number of places p."""
        return self.inputs.shape[1]

    @property
    def features(self) -> int:
        """The number k of what comes out at each."""
        return self.right.shape[-1]

    def of_sample(self, x: Array) -> FactoredEffect | FormedEffect:
        """What reaches one sample of inputs (p, n)."""
        inner = jnp.moveaxis(jnp.tensordot(x, self.left, axes=1), 0, 1)
        right = self.right
        if self.vector is not None:
            constant = jnp.broadcast_to(self.vector[0], (1, *inner.shape[1:]))
            inner, right = jnp.concatenate([inner, constant]), jnp.concatenate([right, self.vector[1]])
        if len(x) == 1:
            return FactoredEffect(inner[:, 0], right)
        return FormedEffect(reduce(add, (s[:, None] * b.T for s, b in zip(inner, right, strict=True))))


class MixedReach(NamedTuple):
    """The same of a leaf whose factors are not what is summed over and what comes out, as of a grouped convolution.

    Attributes:
        inputs: rows x, shape (B, p, g n).
        left: factors a, times sigma and the particle's sign, the particles last, shape (..., r, J).
        right: factors b, shape (..., r, J).
        roles: roles of the axes of both in the products.
        vector: a vector's deviations in the same places, as left (1, 1, J) and right (1, J, g k), or None.
    """

    inputs: Array
    left: Array
    right: Array
    roles: Roles
    vector: tuple[Array, Array] | None = None

    @property
    def places(self) -> int:
        """The number of places p."""
        return self.inputs.shape[1]

    @property
    def features(self) -> int:
        """The number g k of what comes out at each."""
        return self.roles.features

    def of_sample(self, x: Array) -> FormedEffect:
        """What reaches one sample of inputs (p, g n)."""
        number = {kind: [i for i, axis in enumerate(self.roles.axes) if axis[0] == kind] for kind in get_args(Kind)}
        cut, count = len(self.roles.left), len(self.roles.axes)
        place, terms = count, [count + 1, count + 2]
        rows = x.reshape(len(x), *self.roles.sizes("shared"), *self.roles.sizes("summed"))
        left, right = (
            factor.reshape(*(size for _, size in axes), *factor.shape[-2:])
            for factor, axes in ((self.left, self.roles.left), (self.right, self.roles.right))
        )
        numbers = jnp.einsum(
            *(rows, [place, *number["shared"], *number["summed"]]),
            *(left, [*range(cut), *terms]),
            *(right, [*range(cut, count), *terms]),
            [place, *number["shared"], *number["free"], terms[1]],
        ).reshape(len(x), self.features, -1)
        if self.vector is not None:
            numbers = numbers + self.vector[0] * self.vector[1][0].T
        return FormedEffect(numbers)


class FactoredEffect(NamedTuple):
    """What reaches one sample of one leaf in one place: the vector ``sum_r s_jr b_jr``, by its factors.

    Attributes:
        inner: products s, shape (r, J).
        right: factors b, shape (r, J, k): the same for all samples, so that products with it are shared by many.
    """

    inner: Array
    right: Array

    def times(self, slopes: Array) -> Array:
        """The sample's outputs (C, J) of its slopes (C, 1, k)."""
        return reduce(add, (s[None] * (slopes[:, 0] @ b.T) for s, b in zip(self.inner, self.right, strict=True)))

    def transposed(self, outputs: Array) -> Array:
        """The sample's slopes (C, 1, k) of its outputs (C, J)."""
        return reduce(add, ((outputs * s[None]) @ b for s, b in zip(self.inner, self.right, strict=True)))[:, None]

    def size(self) -> Array:
        """The squared size of one of its numbers, summed over the particles."""
        return jnp.sum(self.inner**2 * jnp.mean(self.right**2, axis=-1))


class FormedEffect(NamedTuple):
    """What reaches one sample of one leaf in many places: ``sum_r s_jpr b_jr``, formed.

    Attributes:
        numbers: sums at each place, shape (p, k, J).
    """

    numbers: Array

    def times(self, slopes: Array) -> Array:
        """The sample's outputs (C, J) of its slopes (C, p, k)."""
        return slopes.reshape(len(slopes), -1) @ self._rows()

    def transposed(self, outputs: Array) -> Array:
        """The sample's slopes (C, p, k) of its outputs (C, J)."""
        return (outputs @ self._rows().T).reshape(len(outputs), *self.numbers.shape[:2])

    def size(self) -> Array:
        """The squared size of one of its numbers, summed over the particles."""
        return jnp.mean(jnp.sum(self.numbers**2, axis=-1))

    def _rows(self) -> Array:
        return self.numbers.reshape(-1, self.numbers.shape[-1])


class Participants(NamedTuple):
    """Those that take part in a regression.

    Attributes:
        healthy: number 1 for each that does, else 0, shape (J,) on this device.
        number: number of those that do, on all devices.
        axis: devices over which they are spread.
    """

    healthy: Array
    number: Array
    axis: Axis = Axis()

    def centred(self, values: Array) -> Array:
        """Values (..., J) without their mean; 0 for those that do not take part."""
        mean = self.sum(values @ self.healthy) / jnp.maximum(self.number, 1).astype(values.dtype)
        return (values - mean[..., None]) * self.healthy.reshape(*[1] * (values.ndim - 1), -1)

    def sum(self, value: Any) -> Any:
        """The sum over the devices that have particles."""
        return self.axis.sum(value)


def regressions(
    outputs: Array, reaches: list[Reach | MixedReach], particles: Participants
) -> tuple[list[Array], Array]:
    """For each sample the slopes that explain its outputs from what reached it, in least squares.

    First those of the leaves that reach a sample in one place, then, from what is left, those of the others: a
    convolution's are many numbers, which would explain everything.

    Args:
        outputs: anomalies of the outputs, shape (B, C, J).
        reaches: ways in which the leaves reach the samples.
        particles: particles that take part.

    Returns:
        Slopes (B, C, p, k) for every leaf, and what the first ones leave of the outputs.
    """
    once = [reach for reach in reaches if reach.places == 1]
    often = [reach for reach in reaches if reach.places > 1]
    numbers = sum(reach.places * reach.features for reach in often)
    slopes, rest = least_squares(outputs, once, particles, _ITERATIONS)
    everyone = len(particles.healthy) * particles.axis.size
    others, _ = least_squares(rest, often, particles, _FEW if numbers > everyone else _ITERATIONS)
    in_order = {False: iter(slopes), True: iter(others)}
    return [next(in_order[reach.places > 1]) for reach in reaches], rest


def least_squares(
    outputs: Array, reaches: list[Reach | MixedReach], particles: Participants, iterations: int
) -> tuple[list[Array], Array]:
    """One regression for all leaves.

    By conjugate gradients from zero, every leaf in units of its own deviations: to stop early regularizes where there
    are fewer particles than numbers that reach a sample. The first iterate is along the covariances.

    Args:
        outputs: anomalies of the outputs, shape (B, C, J).
        reaches: ways in which the leaves reach the samples.
        particles: particles that take part.
        iterations: number of conjugate gradients.

    Returns:
        Slopes (B, C, p, k) for every leaf, and what they leave of the outputs.
    """

    def one(row: tuple[Array, list[Array]]) -> tuple[list[Array], Array]:
        sample, inputs = row
        seen = [reach.of_sample(x) for reach, x in zip(reaches, inputs, strict=True)]
        slopes = _regression(sample, seen, particles, iterations)
        explained = reduce(add, (part.times(v) for part, v in zip(seen, slopes, strict=True)))
        return slopes, sample - particles.centred(explained)

    if not reaches:
        return [], outputs
    formed = sum(reach.places * reach.features for reach in reaches if reach.places > 1) * outputs.shape[-1]
    together = max(1, _CACHE_BYTES // ((outputs[0].size + formed // 4) * outputs.dtype.itemsize))
    return lax.map(one, (outputs, [reach.inputs for reach in reaches]), batch_size=min(len(outputs), together))


def _regression(
    outputs: Array, seen: list[FactoredEffect | FormedEffect], particles: Participants, iterations: int
) -> list[Array]:
    sizes = [particles.sum(part.size()) for part in seen]
    units = [lax.rsqrt(jnp.where(size > 0, size, 1)) for size in sizes]

    # In units of each leaf's own deviations: else the leaf with the largest would be the only one that few iterations
    # see.
    def back(residuals: Array) -> list[Array]:
        return [unit * particles.sum(part.transposed(residuals)) for unit, part in zip(units, seen, strict=True)]

    def matrix(slopes: list[Array]) -> list[Array]:
        reached = (part.times(unit * v) for unit, part, v in zip(units, seen, slopes, strict=True))
        return back(particles.centred(reduce(add, reached)))

    def dot(a: list[Array], b: list[Array]) -> Array:
        return reduce(add, (jnp.sum(u * v, axis=(-2, -1), keepdims=True) for u, v in zip(a, b, strict=True)))

    floor = _ROUNDING * float(jnp.finfo(outputs.dtype).eps)
    found = conjugate_gradients(matrix, back(outputs), iterations, dot, floor)
    return [unit * v for unit, v in zip(units, found, strict=True)]


def conjugate_gradients(
    matrix: Callable[[Any], Any], right: Any, iterations: int, dot: Callable[[Any, Any], Array], floor: float = 0.0
) -> Any:
    """``matrix^-1 right`` for a positive definite matrix, from zero; or many such, one for each number that dot gives.

    A matrix may be singular where ``floor`` says which share of the right side is rounding: iterations on what only
    rounding has put where the matrix is zero would grow without bounds.

    That of ``jax.scipy`` cannot be used: its matrix may not sum over devices (JAX 0.10).
    """

    def plus(a: Any, factor: Array, b: Any) -> Any:
        return jax.tree.map(lambda u, v: u + factor.astype(u.dtype) * v, a, b)

    def body(_: Any, carry: Any) -> Any:
        x, residual, along, rest = carry
        product = matrix(along)
        step = _ratio(rest, dot(along, product))  # zero for a sample that is solved, so that it stays where it is
        x, residual = plus(x, step, along), plus(residual, -step, product)
        new = dot(residual, residual)
        new = jnp.where(new > floor**2 * first, new, 0)
        return x, residual, plus(residual, _ratio(new, rest), along), new

    zero, first = jax.tree.map(jnp.zeros_like, right), dot(right, right)
    return lax.fori_loop(0, iterations, body, (zero, right, right, first))[0]


def _ratio(a: Array, b: Array) -> Array:
    """``a / b``; zero where nothing is left to do."""
    return jnp.where(b > 0, a / jnp.where(b > 0, b, 1), 0)
