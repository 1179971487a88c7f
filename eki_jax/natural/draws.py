"""The particles around a mean: drawn from a key, evaluated in chunks, summed up."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from eki_jax._types import Array, Ensemble, ForwardFn, Params
from eki_jax.kernel.axes import Axis
from eki_jax.kernel.evaluate import activation_bytes, map_particles
from eki_jax.natural.deviations import Deviations, LowRankDeviations
from eki_jax.natural.deviations.matrix import LowRankMatrix, is_low_rank
from eki_jax.natural.deviations.treatment import treatments, warn_of_lost
from eki_jax.natural.deviations.watching import Leaf, Watched, watch

# What the values of one chunk of particles may take: their intermediate values, and the numbers drawn for them.
# (XLA makes the mean's products once, whatever the number of chunks: few particles that stay in the caches are fine.)
_ACTIVATION_BYTES = {"cpu": 64 * 2**20}
_DEVICE_BYTES = 512 * 2**20
_DRAW_BYTES = 16 * 2**20


class Seen(NamedTuple):
    """What the mean particle's forward pass shows of a model.

    Attributes:
        outputs: outputs of the mean particle.
        inputs: rows x of each matrix that meets a sample in one product, shape (B, p, n) for p places, by its name.
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
        *,
        seen: bool = False,
    ) -> Any:
        """The model's outputs, shape (J, ...).

        Args:
            forward: function of one particle.
            mean: parameters m of the mean particle.
            drawn: factors and signs of the particles.
            sigma: scale of the deviations.
            x: inputs that ``forward`` takes.
            chunk_size: number of particles evaluated at a time; None for a memory budget's.
            seen: flag, True where :meth:`see` was called: it finds what is done with factors of low rank.
        """

        def checked() -> None:
            self.watch(forward, mean, x)  # raises where factors are changed

        if not seen and isinstance(self.deviations, LowRankDeviations):
            jax.eval_shape(checked)

        def one(row: Any, x: Any) -> Any:
            factors, sign = row
            return _called(forward, self.deviations.particle(mean, factors, sign * sigma), x)

        if chunk_size is None:
            budget = _ACTIVATION_BYTES.get(jax.default_backend(), _DEVICE_BYTES)
            chunk_size = max(1, budget // max(1, activation_bytes(one, drawn, x)))
        return map_particles(lambda row: one(row, x), drawn, chunk_size)

    def see(self, forward: ForwardFn, mean: Params, x: Any) -> Seen:
        """Evaluate the mean particle, and watch; a warning names the leaves whose locality is lost."""
        watched = self.watch(forward, mean, x)
        leaves = treatments(low_rank_of(self.deviations), mean, watched)
        warn_of_lost(leaves)
        local = {leaf.name for leaf in leaves if leaf.localized == "local" and leaf.places}
        outputs, inputs = watched.evaluate(local)
        matrix_of = {leaf.name: leaf.layer for leaf in leaves if leaf.layer}
        return Seen(outputs, {n: x.reshape(len(x), -1, x.shape[-1]) for n, x in inputs.items()}, matrix_of)

    def watch(self, forward: ForwardFn, mean: Params, x: Any) -> Watched:
        """The model's trace for the mean particle.

        Raises:
            TypeError: deviations of full rank; a matrix of low rank whose factors are changed one by one.
        """
        deviations = low_rank_of(self.deviations)
        shapes = jax.eval_shape(lambda: deviations.draw(jax.random.key(0), mean))
        # No particle's factors: they are the same on all devices.
        factors = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        particle = deviations.particle(mean, factors, jnp.zeros(()), watched=True)
        return watch(lambda particle: _called(forward, particle, x), particle, _origins(particle))

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


def _origins(particle: Params) -> list[Leaf]:
    """The name and place of each array of a particle."""
    leaves = jax.tree_util.tree_leaves_with_path(particle, is_leaf=is_low_rank)
    named = [(jax.tree_util.keystr(path), is_low_rank(leaf)) for path, leaf in leaves]
    parts = lambda is_matrix: ("mean", "left", "right") if is_matrix else ("vector",)
    return [Leaf(name, part) for name, is_matrix in named for part in parts(is_matrix)]  # type: ignore[arg-type]


def _called(forward: ForwardFn, params: Params, x: Any) -> Any:
    """``forward(params, x)``; a leaf that it cannot take as a :class:`LowRankMatrix` is named."""
    try:
        return forward(params, x)
    except (TypeError, AttributeError) as error:
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
    except (TypeError, AttributeError):
        return False
    return True
