"""The particles around a mean: drawn from a key, evaluated in chunks, summed up."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from eki_jax._types import Array, Ensemble, ForwardFn, Params
from eki_jax.kernel.axes import Axis
from eki_jax.kernel.evaluate import activation_bytes, map_particles
from eki_jax.natural.deviations import Deviations, LowRankDeviations
from eki_jax.natural.deviations.matrix import LowRankMatrix, Tape, is_low_rank

# What the values of one chunk of particles may take: their intermediate values, and the numbers drawn for them.
# (XLA makes the mean's products once, whatever the number of chunks: few particles that stay in the caches are fine.)
_ACTIVATION_BYTES = {"cpu": 64 * 2**20}
_DEVICE_BYTES = 512 * 2**20
_DRAW_BYTES = 16 * 2**20


class Seen(NamedTuple):
    """What the mean particle's forward pass shows of a model.

    Attributes:
        outputs: of the mean particle.
        inputs: x of each matrix that meets a sample in one product, shape (B, p, n) for p places, by its name.
        matrix_of: the matrix to whose product a vector is added, by the vector's name.
    """

    outputs: Any
    inputs: dict[str, Array]
    matrix_of: dict[str, str]

    @property
    def samples(self) -> int:
        """B."""
        return int(jax.tree.leaves(self.outputs)[0].shape[0])


class Cloud(NamedTuple):
    """Deviations e_j of J particles, as a function of a key and of each particle's index.

    Attributes:
        deviations: how one is drawn.
        particles: J, on all devices together.
        antithetic: whether particle 2i + 1 has minus the deviation of particle 2i.
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
        signs = jnp.where(number % 2 == 1, -1.0, 1.0) if self.antithetic else jnp.ones(local)

        def one(seed: Array) -> Any:
            return self.deviations.draw(jax.random.fold_in(key, seed), mean)

        shapes = jax.eval_shape(one, jax.ShapeDtypeStruct((), jnp.int32))
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
        return map_particles(one, seeds, min(local, max(1, _DRAW_BYTES // max(1, size)))), signs

    def evaluate(
        self, forward: ForwardFn, mean: Params, drawn: Any, sigma: Array, x: Any, chunk_size: int | None
    ) -> Any:
        """The model's outputs, shape (J, ...)."""

        def one(row: Any, x: Any) -> Any:
            factors, sign = row
            return _called(forward, self.deviations.particle(mean, factors, sign * sigma), x)

        if chunk_size is None:
            budget = _ACTIVATION_BYTES.get(jax.default_backend(), _DEVICE_BYTES)
            chunk_size = max(1, budget // max(1, activation_bytes(one, drawn, x)))
        return map_particles(lambda row: one(row, x), drawn, chunk_size)

    def see(self, forward: ForwardFn, mean: Params, drawn: Any, x: Any) -> Seen:
        """Evaluate the mean particle, and watch."""
        assert isinstance(self.deviations, LowRankDeviations)
        tape = Tape()
        factors = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape[1:], leaf.dtype), drawn[0]
        )  # no particle's: the same on all devices
        outputs = _called(forward, self.deviations.particle(mean, factors, jnp.zeros(()), tape), x)
        seen = Seen(outputs, {}, tape.matrix_of)
        known = {n: x for n, x in tape.entries.items() if x is not None and x.ndim > 1 and len(x) == seen.samples}
        return seen._replace(inputs={n: x.reshape(len(x), -1, x.shape[-1]) for n, x in known.items()})

    def ensemble(self, mean: Params, drawn: Any, sigma: Array) -> Ensemble:
        """``mean + sigma e_j``, every one of them in full."""

        def one(row: Any) -> Params:
            e = self.deviations.dense(mean, row[0])
            return jax.tree.map(lambda m, d: (m + (row[1] * sigma).astype(d.dtype) * d).astype(m.dtype), mean, e)

        return jax.vmap(one)(drawn)

    def combine(self, mean: Params, drawn: Any, weights: Array) -> Params:
        """``sum_j w_j e_j`` over all devices."""
        factors, signs = drawn
        return self.axis.sum(self.deviations.combine(mean, factors, weights * signs))


def _called(forward: ForwardFn, params: Params, x: Any) -> Any:
    """``forward(params, x)``; a leaf that it cannot take as a :class:`LowRankMatrix` is named."""
    try:
        return forward(params, x)
    except TypeError as error:
        for path, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_low_rank):
            if is_low_rank(leaf) and not _takes(forward, params, x, leaf):
                raise TypeError(
                    f"forward: cannot take the leaf {jax.tree_util.keystr(path)} of shape {leaf.shape} as a "
                    "LowRankMatrix, which knows x @ w, w @ x, w.T and w[rows]; name it in low_rank(..., plain=...), or "
                    f"set formed=True ({error})"
                ) from error
        raise


def _takes(forward: ForwardFn, params: Params, x: Any, matrix: LowRankMatrix) -> bool:
    """Whether the model runs with ``matrix`` alone of low rank."""
    alone = jax.tree.map(
        lambda leaf: leaf.dense() if is_low_rank(leaf) and leaf is not matrix else leaf, params, is_leaf=is_low_rank
    )
    try:
        jax.eval_shape(lambda: forward(alone, x))
    except TypeError:
        return False
    return True
