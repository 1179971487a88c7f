"""A model without noise: its layers, what they return and read, and where noise would be added."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from eki_jax._types import Array, ForwardFn, Params
from eki_jax.kernel.interpreter import Disturber, Held, Passed, Point, Tagged, interpreted, leaf_name
from eki_jax.kernel.interpreter.parts import Trace
from eki_jax.natural.deviations.per_sample import PerSample
from eki_jax.natural.direction import Setup


class Undisturbed(NamedTuple):
    """A model's pass without noise.

    Attributes:
        forward: model.
        mean: parameters.
        x: inputs, all with the samples first.
        outputs: outputs.
        points: places where noise is added, by their numbers.
        exact: numbers of the points that are outputs themselves, each with the place of its output.
        leaves: leaves of the parameters by name.
        whole: names of leaves that are disturbed as wholes.
        formed: names of leaves that go through a function of their own, number by number.
        scaled: names of those of which such a function computes a scale, which counts as a constant.
        moves: points behind products that mix places, by number, each with the number of products before that.
        mixes: number of samples, where such products are looked for; None where not.
        returned: outputs of the layers' equations, by number; of no loop.
        passing: numbers of the layers that what they read passes through, as a bias or a scale.
        axes: axis of the samples in what each layer returns, by number; None where there is none.
        loops: loops that have layers in them.
    """

    forward: ForwardFn
    mean: Params
    x: Any
    outputs: Any
    points: dict[int, Point]
    exact: dict[int, int]
    leaves: dict[str, Array]
    whole: frozenset[str]
    formed: frozenset[str]
    scaled: frozenset[str]
    moves: dict[int, int]
    mixes: int | None
    returned: dict[int, Array]
    passing: set[int]
    axes: dict[int, int | None]
    loops: list[Passed]

    @classmethod
    def of(cls, forward: ForwardFn, mean: Params, x: Any, deviations: PerSample) -> Undisturbed:
        """The pass; raises ValueError for inputs or outputs without the samples as their first axis, or no samples."""
        leaves = {leaf_name(path): m for path, m in jax.tree_util.tree_leaves_with_path(mean)}
        first = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(x)}
        if len(first) != 1 or () in first:
            shapes = jax.tree.map(jnp.shape, x)
            raise ValueError(f"x: shapes {shapes} with per_sample(...); wanted the samples as the first axis of all")
        (samples,) = first.pop()
        if not samples:
            raise ValueError("x: has no samples, with per_sample(...); wanted one at least")
        # What a batch of one makes shorter is the axis of samples.
        alone = Disturber(lambda number, shape: None)
        jax.eval_shape(lambda x: interpreted(forward, mean, tagged(leaves), (batch_of_one(x),), alone), _first(x))
        of_one = lambda number: alone.met[number] if number < len(alone.met) else ()  # which is an error, below
        axis_of = lambda number, shape: _axis_of_samples(shape, of_one(number), samples)
        mixes = samples if deviations.causal and deviations.mixing else None
        disturber = Disturber(axis_of, samples=mixes)
        outputs = interpreted(forward, mean, tagged(leaves), (x,), disturber)
        if len(alone.met) != len(disturber.met):
            raise ValueError(
                f"forward: has {len(disturber.met)} layers for {samples} samples and {len(alone.met)} for one, with "
                "per_sample(...); wanted a model that does the same with any number of samples"
            )
        for leaf in jax.tree.leaves(outputs):
            if jnp.shape(leaf)[:1] != (samples,):
                raise ValueError(
                    f"forward: outputs of shape {jnp.shape(leaf)} for {samples} samples, with per_sample(...); wanted "
                    "the samples as their first axis"
                )
        return cls(
            forward=forward,
            mean=mean,
            x=x,
            outputs=outputs,
            points=disturber.points,
            exact=disturber.exact,
            leaves=leaves,
            whole=frozenset(disturber.others),
            formed=frozenset(disturber.formed),
            scaled=frozenset(disturber.scaled),
            moves={number: product.earlier for number, product in disturber.mixing.items()},
            mixes=mixes,
            returned=disturber.returned,
            passing=disturber.passing,
            axes=disturber.axes,
            loops=disturber.loops,
        )

    @property
    def noisy(self) -> list[int]:
        """The numbers of the points where noise is added."""
        return [number for number in self.points if number not in self.exact]

    def alike(self, number: int) -> list[int]:
        """The numbers of the points that return equal shapes, the point's own too."""
        shape = samples_first(self.points[number])[1:]
        return [u for u in self.noisy if samples_first(self.points[u])[1:] == shape]

    def loop_of(self, number: int) -> Passed | None:
        """The loop that a point is in."""
        return next((loop for loop in self.loops if number in loop.numbers), None)

    def disturber(self, noise: Any = None, *, held: Mapping[Held, Array] | None = None) -> Disturber:
        """One for the batch that finds the same points."""
        return Disturber(self.axis_of, noise, samples=self.mixes, moves=self.moves, held=held)

    def evaluated(self, disturber: Disturber) -> Any:
        """The outputs, disturbed."""
        return interpreted(self.forward, self.mean, tagged(self.leaves), (self.x,), disturber)

    def sizes(self, setup: Setup, sigma: Array) -> dict[int, Array]:
        """The size of the noise at every point."""
        return {number: _sized(setup, sigma, point.size) for number, point in self.points.items()}

    @staticmethod
    def size(setup: Setup, sigma: Array, value: Array) -> Array:
        """The size of a change of an array, as of noise at a point that it would lie at."""
        return _sized(setup, sigma, jnp.sqrt(jnp.mean(jnp.square(value))))

    def asked_by(self) -> dict[int, frozenset[int]]:
        """By the points where noise is added, the products that mix places and ask for what it changes."""
        noisy = self.noisy
        if not self.moves:
            return dict.fromkeys(noisy, frozenset())

        def asked(added: dict[str, Array], leaves: dict[str, Array], row: Any) -> list[Array]:
            noise = lambda number, shape, dtype: added.get(str(number), 0)
            disturber = Disturber(self.axis_of, noise, samples=1, moves=self.moves)
            interpreted(self.forward, self.mean, tagged(leaves), (batch_of_one(row),), disturber)
            return [disturber.asked[u] for u in self.moves]

        added = {str(u): jnp.zeros(self.points[u].of_one, self.points[u].dtype) for u in noisy}
        trace = Trace.of(asked, added, self.leaves, _first(self.x))
        names = sorted(added)  # the order of a dictionary's leaves
        needed = [
            {int(name) for name, is_needed in zip(names, flags, strict=False) if is_needed} for flags in trace.needed()
        ]
        return {u: frozenset(m for m, points in zip(self.moves, needed, strict=True) if u in points) for u in noisy}

    def axis_of(self, number: int, shape: tuple[int, ...]) -> int | None:
        """The axis of samples of what a layer returns."""
        return self.axes.get(number)

    def places(self) -> int:
        """The number of places; raises ValueError for layers that do not return something at every one."""
        places = {leaf.shape[1:2] for leaf in jax.tree.leaves(self.outputs)}
        for point in [self.points[number] for number in self.noisy]:
            if {samples_first(point)[1:2]} != places:
                raise ValueError(
                    f"causal: True for a layer that returns shape {point.shape} and outputs of shapes "
                    f"{jax.tree.map(jnp.shape, self.outputs)}; wanted (B, T, ...) of all, or causal=False"
                )
        return math.prod(places.pop())

    def pulled(self, slopes: dict[int, Array], in_outputs: Any) -> dict[str, Array]:
        """The gradient of the leaves from those at the points."""
        found: dict[str, Array] = {}
        outputs = jax.tree.leaves(in_outputs)
        for number, point in self.points.items():
            slope = outputs[self.exact[number]] if number in self.exact else slopes[number]
            for name, pull in point.pulls:
                if name not in self.whole:
                    part = pull(self.leaves[name], slope.reshape(point.shape).astype(point.dtype))
                    found[name] = found[name] + part if name in found else part
        return found


def _sized(setup: Setup, sigma: Array, size: Array) -> Array:
    """The size of the noise where numbers have this root mean square."""
    if not of_setup(setup).relative:
        return sigma
    root = jnp.sqrt(setup.axes.batch.mean(size**2))
    return sigma * jnp.where(root > 0, root, 1)


def samples_first(point: Point) -> tuple[int, ...]:
    """The shape at a point with the axis of samples first."""
    return (point.shape[point.axis], *point.shape[: point.axis], *point.shape[point.axis + 1 :])


def _axis_of_samples(shape: tuple[int, ...], alone: tuple[int, ...], samples: int) -> int | None:
    """The axis of samples of what a layer returns, from its shape for all and for one; None where there is none.

    >>> _axis_of_samples((5, 3), (1, 3), 5), _axis_of_samples((3, 5), (3, 1), 5), _axis_of_samples((3, 3), (3, 3), 5)
    (0, 1, None)
    """
    if len(shape) != len(alone):
        return None
    shorter = [axis for axis, (many, one) in enumerate(zip(shape, alone, strict=True)) if (many, one) == (samples, 1)]
    others = [many == one for axis, (many, one) in enumerate(zip(shape, alone, strict=True)) if axis not in shorter[:1]]
    return shorter[0] if shorter and all(others) else None


def _first(x: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf[0], x)


def batch_of_one(row: Any) -> Any:
    """One sample with an axis of samples."""
    return jax.tree.map(lambda leaf: leaf[None], row)


def tagged(leaves: dict[str, Array]) -> list[Tagged]:
    """Leaves with their names, for a disturber to know them by."""
    return [Tagged(value, leaf=name) for name, value in leaves.items()]


def of_setup(setup: Setup) -> PerSample:
    """The deviations of a setup that has noise of a sample's own."""
    assert isinstance(setup.cloud.deviations, PerSample)
    return setup.cloud.deviations
