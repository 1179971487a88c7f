"""The particles around a mean: drawn from a key, evaluated in chunks, summed up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from eki_jax._types import Array, Ensemble, ForwardFn, Params
from eki_jax.kernel.axes import Axis
from eki_jax.kernel.evaluate import IndexedForward, activation_bytes, map_particles, of_rows
from eki_jax.kernel.interpreter import Roles, Use, Watcher
from eki_jax.kernel.precision import model_in
from eki_jax.natural.deviations import Deviations, LowRankDeviations
from eki_jax.natural.deviations.matrix import low_rank_call
from eki_jax.natural.deviations.treatment import Watched, treatments, warn_of_lost

# What the values of one chunk of particles may take: their intermediate values, and the numbers drawn for them.
# (XLA makes the mean's products once, whatever the number of chunks: few particles that stay in the caches are fine.)
_ACTIVATION_BYTES = {"cpu": 64 * 2**20}
_DEVICE_BYTES = 512 * 2**20
_DRAW_BYTES = 16 * 2**20


class Met(NamedTuple):
    """The rows that a matrix multiplies.

    Attributes:
        rows: rows x, shape (B, p, g n) for p places; those of g matrices side by side.
        roles: roles of the matrix's axes in the products.
    """

    rows: Array
    roles: Roles

    @classmethod
    def of(cls, uses: Sequence[Use]) -> Met:
        """Those of all of its products."""
        rows = [use.rows() for use in uses if use.rows is not None]
        roles = [use.roles for use in uses if use.roles is not None]
        return cls(jnp.concatenate([x.reshape(len(x), -1, x.shape[-1]) for x in rows], axis=1), roles[0])


class Seen(NamedTuple):
    """What the mean particle's forward pass shows of a model.

    Attributes:
        outputs: outputs of the mean particle.
        met: rows that each matrix multiplies, of those that are local, by its name.
        matrix_of: the matrix to whose product a vector is added, by the vector's name.
    """

    outputs: Any
    met: dict[str, Met]
    matrix_of: dict[str, str]

    @property
    def samples(self) -> int:
        """B."""
        return int(jax.tree.leaves(self.outputs)[0].shape[0])


class Cloud(NamedTuple):
    """Deviations e_j of J particles, as a function of a key and of each particle's index.

    Attributes:
        deviations: kind of deviations.
        particles: number of particles J on all devices together.
        antithetic: flag; True gives particle 2i + 1 minus the deviation of particle 2i.
        axis: devices over which the particles are spread.
    """

    deviations: Deviations
    particles: int
    antithetic: bool = False
    axis: Axis = Axis()

    def draw(self, key: Array, mean: Params) -> tuple[Any, Array]:
        """The factors of this device's particles, with a leading axis, and their signs."""
        devices = self.axis.size
        if self.particles % devices:
            raise ValueError(f"particles: {self.particles} on {devices} devices; wanted a multiple of {devices}")
        local = self.particles // devices
        number = self.axis.own_indices(local)
        seeds = number // 2 if self.antithetic else number
        signs = jnp.where(number % 2 == 1, -1, 1) if self.antithetic else jnp.ones(local)
        signs = signs.astype(jnp.float32)  # as sigma is, whatever the default

        def one(seed: Array) -> Any:
            return self.deviations.draw(jax.random.fold_in(key, seed), mean)

        shapes = jax.eval_shape(one, jax.ShapeDtypeStruct((), jnp.int32))
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
        return map_particles(one, seeds, min(local, max(1, _DRAW_BYTES // max(1, size)))), signs

    def evaluate(
        self,
        forward: ForwardFn,
        mean: Params,
        drawn: Any,
        sigma: Array,
        x: Any,
        chunk_size: int | None,
        precision: Any = None,
    ) -> Any:
        """The model's outputs, shape (J, ...).

        Args:
            forward: function of one particle.
            mean: parameters m of the mean particle.
            drawn: factors and signs of the particles.
            sigma: scale of the deviations.
            x: inputs that ``forward`` takes.
            chunk_size: number of particles evaluated at a time; None for a memory budget's.
            precision: precision of the model's products, as :func:`eki_jax.evaluate` takes it.
        """

        def particle(row: Any) -> Params:
            factors, sign = row
            return self.deviations.particle(mean, factors, sign * sigma)

        one, rows = of_rows(_taking_low_rank(forward), particle, drawn, self.axis)
        if chunk_size is None:
            budget = _ACTIVATION_BYTES.get(jax.default_backend(), _DEVICE_BYTES)
            chunk_size = max(1, budget // max(1, activation_bytes(one, rows, x)))
        every = lambda rows, x: map_particles(lambda row: one(row, x), rows, chunk_size)
        return model_in(precision, every)(rows, x)

    def see(self, forward: ForwardFn, mean: Params, x: Any) -> Seen:
        """Evaluate the mean particle, and watch; a warning names the leaves whose locality is lost."""
        watched = self.watch(forward, mean, x)
        leaves = treatments(low_rank_of(self.deviations), mean, watched)
        warn_of_lost(leaves)
        matrix_of = {leaf.name: leaf.layer for leaf in leaves if leaf.layer}
        local = [watched.uses(leaf.name) for leaf in leaves if leaf.localized == "local" and leaf.places]
        return Seen(watched.outputs, {uses[0].name: Met.of(uses) for uses in local}, matrix_of)

    def watch(self, forward: ForwardFn, mean: Params, x: Any) -> Watched:
        """The mean particle's outputs, and what the model does with its parameters.

        Raises:
            TypeError: deviations of full rank.
        """
        deviations = low_rank_of(self.deviations)
        shapes = jax.eval_shape(lambda: deviations.draw(jax.random.key(0), mean))
        # No particle's factors: they are the same on all devices.
        factors = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        watcher = Watcher()
        outputs = low_rank_call(forward, deviations.particle(mean, factors, jnp.zeros(())), x, watcher=watcher)
        return Watched(outputs, watcher)

    def ensemble(self, mean: Params, drawn: Any, sigma: Array) -> Ensemble:
        """``mean + sigma e_j``, every one of them in full."""

        def one(row: Any) -> Params:
            e = self.deviations.dense(mean, row[0])
            return jax.tree.map(lambda m, d: (m + (row[1] * sigma).astype(d.dtype) * d).astype(m.dtype), mean, e)

        return jax.vmap(one)(drawn)

    def combine(self, mean: Params, drawn: Any, weights: Array) -> Params:
        """``sum_j w_j e_j`` over all devices."""
        factors, signs = drawn
        return self.axis.sum(self.deviations.combine(mean, factors, weights * signs.astype(weights.dtype)))


def low_rank_of(deviations: Deviations) -> LowRankDeviations:
    """The deviations, which have to be of low rank.

    Raises:
        TypeError: others.
    """
    if not isinstance(deviations, LowRankDeviations):
        raise TypeError(f"deviations: {type(deviations).__name__}; wanted low_rank(...)")
    return deviations


def _taking_low_rank(forward: ForwardFn) -> ForwardFn:
    """The model, evaluated with particles that have matrices of low rank."""
    if not isinstance(forward, IndexedForward):
        return lambda params, x: low_rank_call(forward, params, x)
    indexed = forward.indexed
    return IndexedForward(
        lambda params, x: low_rank_call(forward, params, x),
        lambda params, index, x: low_rank_call(indexed, params, index, x),
    )
