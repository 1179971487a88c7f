"""The loss's gradient from noise that every sample has of its own, see :func:`eki_jax.natural.per_sample`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate, groupby
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from eki_jax._types import Array, Batch, ForwardFn, Params
from eki_jax.ensembles.priors import xavier
from eki_jax.kernel.evaluate import map_particles
from eki_jax.kernel.health import finite_particles
from eki_jax.kernel.interpreter import Disturber, Mixing, Point, interpreted
from eki_jax.kernel.interpreter.binding import varying, varying_over
from eki_jax.kernel.precision import Precision, is_bf16
from eki_jax.natural.deviations.per_sample import PerSample
from eki_jax.natural.direction import Direction, Setup
from eki_jax.natural.estimates.feedback import Learned, Memory, Ways
from eki_jax.natural.estimates.feedback import sizes as feedback_sizes
from eki_jax.natural.estimates.predicting import Known, expected, learned, what_answers
from eki_jax.natural.estimates.span import share_of_loss
from eki_jax.natural.estimates.undisturbed import Undisturbed, batch_of_one, of_setup, samples_first, tagged
from eki_jax.solvers.reasons import Reason, first_reason

# What the noise of the samples that are solved at a time may take.
_NOISE_BYTES = 64 * 2**20
# Folded into a particle's key for the leaves that are disturbed as wholes; layers have the numbers from 0.
_WHOLE = 2**31 - 1


class Gradient(NamedTuple):
    """See :func:`gradient`."""

    def extra_passes(self, setup: Setup) -> int:
        """One: the mean particle's, which is watched; and one for slopes through the matrices of the layers behind."""
        feedback = of_setup(setup).feedback
        return 2 if feedback is not None and feedback.answers else 1

    @property
    def needs_model(self) -> bool:
        """Yes: it adds noise inside of the model."""
        return True

    def check(self, setup: Setup) -> None:
        """Raise for other deviations, and for settings that say nothing about a gradient."""
        if not isinstance(setup.cloud.deviations, PerSample):
            raise ValueError("estimate: gradient() with other deviations; wanted per_sample(...)")
        others = {
            "antithetic": setup.cloud.antithetic or None,
            "norm_constraint": setup.norm_constraint,
        }
        for name, value in others.items():
            if value is not None:
                raise TypeError(f"{name}: {value!r} with per_sample(...), whose direction is a gradient; wanted none")
        if is_bf16(setup.precision):
            raise TypeError(
                "precision: 'bf16' with per_sample(...), whose noise is smaller than what bfloat16 rounds; wanted "
                "None, or what jax.numpy.matmul takes"
            )

    def memory(self, setup: Setup, forward: ForwardFn, mean: Params) -> Memory | None:
        """What is learned of the layers' slopes, by their numbers, before the first step; None without feedback."""
        feedback = of_setup(setup).feedback
        if feedback is None:
            return None
        found: list[tuple[dict[int, tuple[int, int]], dict[int, int], set[int]]] = []

        def traced(mean: Params, x: Any) -> None:
            seen = Undisturbed.of(forward, mean, x, of_setup(setup))
            outputs = [leaf.shape for leaf in jax.tree.leaves(seen.outputs)]
            sizes = {u: feedback_sizes(samples_first(seen.points[u]), outputs) for u in seen.noisy}
            alike = {u: len(seen.alike(u)) for u in seen.noisy}
            found.append((sizes, alike, what_answers(seen) if feedback.answers else set()))

        jax.eval_shape(traced, mean, feedback.example)
        sizes, alike, answering = found[-1]
        layers, ways = dict[str, Learned](), dict[str, Ways]()
        for u, (features, units) in sizes.items():
            layers[str(u)] = Learned.nothing(features, units, feedback.bins)
            if u in answering:
                ways[str(u)] = Ways.nothing(1, (units, feedback.bins))
            elif alike[u] > 1:
                ways[str(u)] = Ways.nothing(alike[u], None)
        return Memory(layers, ways)

    def direction(
        self,
        setup: Setup,
        forward: ForwardFn,
        mean: Params,
        drawn: Any,
        sigma: Array,
        damping: Array,
        batch: Batch,
        memory: Memory | None = None,
    ) -> Direction:
        """The gradient, evaluating the model with noise in it."""
        del damping
        x, targets = batch
        axes = setup.axes
        seen = Undisturbed.of(forward, mean, x, of_setup(setup))
        for point in (seen.points[number] for number in seen.noisy):
            if point.dtype == jnp.bfloat16:
                raise TypeError(
                    f"deviations: per_sample(...) and a layer in bfloat16, with {point.pulls[0][0]}, which rounds more "
                    "than its noise is; wanted parameters and inputs in float32"
                )
        share = share_of_loss(setup.loss, axes)
        value, in_outputs = jax.value_and_grad(lambda z: jnp.asarray(setup.loss(z, targets)))(seen.outputs)
        in_outputs = jax.tree.map(lambda g: share * g, in_outputs)
        keys = axes.particles.gathered(drawn[0])
        known = {} if memory is None else expected(seen, setup, in_outputs, memory, sigma)
        slopes, healthy, whole = _slopes(seen, setup, in_outputs, drawn[0], keys, sigma, known)
        if memory is not None:
            memory = learned(seen, setup, memory, known, {u: slope.unbiased for u, slope in slopes.items()})
        found = seen.pulled({u: slope.used for u, slope in slopes.items()}, in_outputs)
        unused = {name: jnp.zeros_like(m) for name, m in seen.leaves.items()}
        found = axes.batch.sum(unused | found | whole)
        number = axes.particles.sum(jnp.sum(healthy, dtype=jnp.int32))
        structure: Any = jax.tree.structure(mean)
        ascent = structure.unflatten([found[name].astype(m.dtype) for name, m in seen.leaves.items()])
        slope = sum((jnp.vdot(d, d) for d in jax.tree.leaves(ascent)), jnp.zeros(()))
        reason = first_reason((Reason.FEW_PARTICLES, number < 2), (Reason.NOT_FINITE, ~jnp.isfinite(slope)))
        ascent = jax.tree.map(lambda d: jnp.where(reason == 0, d, 0), ascent)
        value = axes.batch.sum(share * value)
        zero = jnp.zeros(())
        return Direction(ascent, value, slope, zero, number, jnp.asarray(False), reason, memory=memory)

    def from_outputs(
        self, setup: Setup, mean: Params, drawn: Any, sigma: Array, damping: Array, outputs: Any, targets: Any
    ) -> Direction:
        """Refused: the outputs alone do not show the noise."""
        raise TypeError("deviations: per_sample(...), with noise inside of the model; wanted others for update()")


def gradient() -> Gradient:
    """The estimate of :func:`eki_jax.natural.per_sample` deviations: the loss's gradient, for any optimizer.

    >>> gradient().needs_model
    True
    """
    return Gradient()


def _slopes(
    seen: Undisturbed, setup: Setup, in_outputs: Any, own: Array, keys: Array, sigma: Array, known: dict[int, Known]
) -> tuple[dict[int, Slope], Array, dict[str, Array]]:
    """The loss's gradient at every point, the healthy ones of this device's particles, and that of whole leaves.

    Args:
        seen: model without noise.
        setup: settings of the step.
        in_outputs: loss's gradient in the outputs.
        own: keys' data of this device's particles.
        keys: keys' data of all particles.
        sigma: scale of the noise.
        known: predictions of the slopes.
    """
    deviations, axes = of_setup(setup), setup.axes
    samples = jax.tree.leaves(seen.outputs)[0].shape[0]
    indices = axes.batch.own_indices(samples)
    sizes = seen.sizes(setup, sigma)
    scales = dict(zip(seen.leaves, jax.tree.leaves(xavier(seen.mean).factor), strict=True))
    noisy = seen.noisy
    expected = {u: part.slopes.reshape(part.features.shape) for u, part in known.items()}

    def weights(data: Array) -> dict[str, Array]:
        key = jax.random.fold_in(_key(data), _WHOLE)
        names = [name for name in seen.leaves if name in seen.whole]
        return {
            name: jax.random.normal(k, seen.leaves[name].shape, seen.leaves[name].dtype)
            for name, k in zip(names, jax.random.split(key, max(1, len(names))), strict=False)
        }

    cuts = _Cuts.of([seen.points[u] for u in noisy], seen.places() if deviations.causal else 1)
    one_sample, asked_by = 1 if seen.moves else None, seen.asked_by()

    def changes(particle: Any, row: Any, g: Any, z: Any, mixing: Any) -> tuple[Array, dict[int, Array]]:
        """How the loss changes, to first order in the outputs, at every place, shape (T,); and what is asked."""
        data, noise = particle
        drawn = weights(data)
        moved = {n: m + sigma * scales[n] * drawn[n] if n in drawn else m for n, m in seen.leaves.items()}
        added = {u: sizes[u].astype(e.dtype) * e for u, e in zip(noisy, cuts.parts(noise), strict=True)}
        disturber = Disturber(
            seen.axis_of,
            lambda number, shape, dtype: added[number].astype(dtype) if number in added else 0,
            samples=one_sample,
            moves=seen.moves,
        )
        disturber.spread = varying(list(added.values()))
        found = interpreted(seen.forward, seen.mean, tagged(moved), (batch_of_one(row),), disturber)
        if set(disturber.mixing) != set(seen.moves):  # noise of these layers would be nowhere
            lost = [name for u in set(seen.moves) - set(disturber.mixing) for name, _ in seen.points[u].pulls]
            raise ValueError(
                f"forward: mixes places by other products of one sample than of {samples}, with {', '.join(lost)}; "
                "wanted a model that does the same with any number of samples, or per_sample(mixing=False)"
            )
        parts = jax.tree.map(lambda a, b, c: ((a[0] - b) * c).reshape(cuts.places, -1).sum(axis=1), found, z, g)
        asked = {u: disturber.asked[u] - product.asked for u, product in mixing.items()}
        return sum(jax.tree.leaves(parts), jnp.zeros(())), asked

    def one(args: Any) -> tuple[list[Array], Array, Array, Array]:
        row, index, g, z, expected = args
        # One draw for all layers and particles, in the order in which it is multiplied: copies would cost as much.
        key = jax.random.fold_in(_key(keys[0]), index)
        bits = random_bits(key, (cuts.places, len(keys)), cuts.numbers)
        noise = signs(bits, cuts.numbers, cuts.dtype)
        mine = axes.particles.own_part(jnp.moveaxis(noise, 1, 0))
        mixing = _mixing(seen, row)
        look = lambda particle: changes(particle, row, g, z, mixing)
        r, asked = map_particles(look, (own, mine), setup.chunk_size or len(own))
        r = axes.particles.gathered(r)
        if expected:  # less what is expected of the noise
            along = cuts.joined([sizes[u] * expected[u] for u in noisy]).astype(noise.dtype)
            r = r - jnp.einsum("tjm,tm->tj", noise, along, precision=setup.precision).T.astype(r.dtype)
        healthy = finite_particles(r)
        taking_part = healthy.astype(r.dtype)[:, None]

        def clean(r: Array) -> Array:
            r = jnp.where(jnp.isfinite(r), r, 0)
            return (r - jnp.sum(taking_part * r, axis=0) / jnp.maximum(jnp.sum(taking_part), 1)) * taking_part

        r = clean(r)
        solve, share = _solution(deviations, cuts.places, r.dtype, bits, cuts.numbers, healthy)
        regression = _Regression(noisy, cuts, noise, solve, deviations.discount, setup.precision)
        elsewhere: dict[int, Array] = {}
        credit = lambda u: sum((elsewhere[m] for m in asked_by[u] if m in elsewhere), r)
        for u in sorted(mixing, reverse=True):  # the last product first: its slopes are credit for what lies before
            slope = regression.slopes([u], credit(u)).reshape(seen.points[u].of_one) / sizes[u]
            if expected:
                before = expected[u].reshape(slope.shape).astype(slope.dtype)
                slope = before + _followed(slope, share[None], deviations)
            gathered = (clean(axes.particles.gathered(part)) for part in _exchanged(mixing[u], slope, asked[u]))
            elsewhere[u] = _trusted(credit(u), *gathered)
        runs = [list(run) for _, run in groupby(noisy, asked_by.__getitem__)]
        slopes = [regression.slopes(run, credit(run[0])) for run in runs]
        found = cuts.parts(jnp.concatenate(slopes, axis=1)) if runs else []
        return [e / sizes[u] for u, e in zip(noisy, found, strict=True)], share, healthy, r

    numbers = sum(math.prod(leaf.shape[1:]) for leaf in jax.tree.leaves(seen.outputs))
    numbers += cuts.places * cuts.numbers
    numbers += sum(math.prod(seen.points[u].of_one) for u in seen.moves)
    together = max(1, min(samples, _NOISE_BYTES // (4 * len(keys) * max(1, numbers))))
    rows = (seen.x, indices, in_outputs, seen.outputs, expected)
    found, share, healthy, r = lax.map(one, rows, batch_size=together)
    everyone = axes.batch.all(healthy.all(axis=0))
    # All devices have the same; it is their mean that the compiler knows to be.
    found, share = axes.particles.mean((found, share))
    at_points = {
        u: _slope(seen, u, slope, share, known.get(u), deviations) for u, slope in zip(noisy, found, strict=True)
    }
    number = jnp.maximum(jnp.sum(everyone) - 1, 1).astype(r.dtype)
    total = jnp.sum(r, axis=(0, 2)) / number
    drawn = jax.vmap(weights)(keys) if seen.whole else {}
    whole = {n: jnp.tensordot(total.astype(e.dtype), e, axes=1) / (sigma * scales[n]) for n, e in drawn.items()}
    mine = everyone[axes.particles.own_indices(len(own))]
    return at_points, mine, axes.particles.mean(whole)


def _slope(
    seen: Undisturbed, number: int, found: Array, share: Array, known: Known | None, deviations: PerSample
) -> Slope:
    """One point's slopes from what the noise found, shape (B, *of_one), and from what was known."""
    axis = seen.points[number].axis
    arranged = lambda rows: jnp.moveaxis(rows, 0, axis)
    found = jnp.squeeze(found, axis + 1)
    if known is None:
        return Slope(arranged(found), arranged(found))
    assert deviations.feedback is not None
    prediction = known.slopes.reshape(known.features.shape).astype(found.dtype)
    share = share if deviations.causal else share[:, 0]
    used = _followed(found, share, deviations)
    return Slope(arranged(prediction + found), arranged(prediction + used))


def _mixing(seen: Undisturbed, row: Any) -> dict[int, Mixing]:
    """The products that mix a sample's places, by the points behind them, with what a layer returns at each.

    One more pass of the sample: the products' other operands are its own, and lie in the batch's along any axis.
    """
    if not seen.moves:
        return {}
    alone = Disturber(seen.axis_of, samples=1)
    interpreted(seen.forward, seen.mean, tagged(seen.leaves), (batch_of_one(row),), alone)
    places = seen.places()
    return {u: product for u, product in alone.mixing.items() if product.asked.shape[:2] == (1, places)}


class Slope(NamedTuple):
    """The loss's gradient at a point, like what the layer returns.

    Attributes:
        unbiased: the estimate without bias.
        used: the one that is followed: with feedback, that of the smaller error.
    """

    unbiased: Array
    used: Array


class _Cuts(NamedTuple):
    """How the noise of all layers is one array, whose last axis has the layers one after another.

    Attributes:
        shapes: shapes of what each layer returns for one sample.
        places: number T of places whose outputs are credited apart.
        dtype: dtype of the noise.
    """

    shapes: list[tuple[int, ...]]
    places: int
    dtype: Any

    @classmethod
    def of(cls, points: list[Point], places: int) -> _Cuts:
        """The cuts of some points."""
        return cls([point.of_one for point in points], places, jnp.result_type(jnp.float32, *[p.dtype for p in points]))

    @property
    def widths(self) -> list[int]:
        """The numbers of the layers at each place."""
        return [math.prod(shape) // self.places for shape in self.shapes]

    @property
    def numbers(self) -> int:
        """The number M at each place of all layers together."""
        return sum(self.widths)

    def parts(self, whole: Array) -> list[Array]:
        """The layers' parts of an array (T, M), each like what the layer returns for a sample."""
        ends = accumulate(self.widths)
        cut = zip(ends, self.widths, self.shapes, strict=True)
        return [whole[:, end - width : end].reshape(shape) for end, width, shape in cut]

    def start(self, layer: int) -> int:
        """Where a layer's numbers begin at each place."""
        return sum(self.widths[:layer])

    def joined(self, parts: list[Array]) -> Array:
        """The array (T, M) of these parts."""
        return jnp.concatenate([part.reshape(self.places, -1) for part in parts], axis=1)


class _Regression(NamedTuple):
    """One sample's noise, and how slopes are found of it.

    Attributes:
        points: numbers of the points where noise is added.
        cuts: cuts of the noise between them.
        noise: signs, shape (T, J, M).
        solve: function of changes (J, T) of the loss, weights (J, T) of the particles.
        discount: factor of a change one place later.
        precision: precision of products.
    """

    points: list[int]
    cuts: _Cuts
    noise: Array
    solve: Callable[[Array], Array]
    discount: Any
    precision: Precision

    def slopes(self, points: Sequence[int], credit: Array) -> Array:
        """The slopes (T, m) at points that lie side by side, in units of their noise, from one credit (J, T)."""
        first, last = self.points.index(points[0]), self.points.index(points[-1])
        weights = self.solve(_credit(credit, self.discount)).astype(self.noise.dtype)
        part = self.noise[..., self.cuts.start(first) : self.cuts.start(last + 1)]
        return jnp.einsum("jt,tjm->tm", weights, part, precision=self.precision)


def _followed(found: Array, share: Array, deviations: PerSample) -> Array:
    """What is followed of the slopes (B, ...) that the noise found beyond their predictions, of which it tells a share.

    The share is of each sample, or of each place.
    """
    assert deviations.feedback is not None
    if deviations.feedback.unbiased:
        return found
    share = share.reshape(*share.shape, *[1] * (found.ndim - share.ndim)).astype(found.dtype)
    # The errors of so many samples cancel in a weight's gradient, as those of as many times more particles would.
    averaged = jnp.asarray(deviations.feedback.averaged, found.dtype)
    return averaged * share / (1 + (averaged - 1) * share) * found


def _exchanged(product: Mixing, slope: Array, asked: Array) -> tuple[Array, Array]:
    """What particles' noise at a place changes through a product that mixes places, and what all change at a place.

    Args:
        product: product.
        slope: loss's gradient behind it, shape (1, T, ...).
        asked: changes of what is asked of each place, shape (J, 1, T, ...), of J particles.

    Returns:
        Changes of the loss to first order, (J, T) both: those of all places by what one place is asked, and those of
        one place by what it asks of all.
    """
    along = lambda a, b: jnp.sum(a * b, axis=(1, *range(3, a.ndim)))
    slope = slope.astype(product.asked.dtype)
    (back,) = jax.vjp(product.through, product.asked)[1](slope)
    return along(asked, back[None]), along(jax.vmap(product.through)(asked), slope[None])


def _trusted(credit: Array, given: Array, taken: Array) -> Array:
    """What places give others less what they take, (J, T), as far as slopes are right that say what they take.

    What a place takes is part of its credit, which says how much of that these slopes explain: all of it where they are
    exact, and nothing where they are noise.
    """
    explained = jnp.sum(taken * taken)
    trust = jnp.clip(jnp.sum(credit * taken) / jnp.where(explained > 0, explained, 1), 0, 1)
    return trust * (given - taken)


def _key(data: Array) -> Array:
    return jax.random.wrap_key_data(data)


def _credit(changes: Array, discount: Any) -> Array:
    """What each place is credited with of the changes (J, T): its own, and the later ones by their discounts.

    >>> _credit(jnp.ones((1, 3)), 0.5).tolist(), _credit(jnp.ones((1, 3)), 0).tolist()
    ([[1.75, 1.5, 1.0]], [[1.0, 1.0, 1.0]])
    """

    def place(later: Array, own: Array) -> tuple[Array, Array]:
        total = own + jnp.asarray(discount, own.dtype) * later
        return total, total

    return lax.scan(place, jnp.zeros_like(changes[:, 0]), changes.T, reverse=True)[1].T


def random_bits(key: Array, rows: tuple[int, ...], number: int) -> Array:
    """Random bits in words of 32, so many for each row, shape (*rows, W); what is left of the last word is zero.

    >>> random_bits(jax.random.key(0), (2, 3), 40).shape
    (2, 3, 2)
    """
    words = jax.random.bits(key, (*rows, -(-number // 32)), jnp.uint32)
    used = np.clip(number - 32 * np.arange(words.shape[-1]), 0, 32)
    return words & jnp.asarray((np.uint64(1) << used.astype(np.uint64)) - np.uint64(1), jnp.uint32)


def signs(bits: Array, number: int, dtype: Any) -> Array:
    """The numbers 1 and -1 that bits (..., W) stand for, shape (..., number).

    >>> signs(jnp.array([5], jnp.uint32), 4, jnp.float32).tolist()
    [1.0, -1.0, 1.0, -1.0]
    """
    each = (bits[..., None] >> jnp.arange(32, dtype=jnp.uint32)) & jnp.uint32(1)
    # Made once, in this layout: fused into what uses them, they would be made again there, and more slowly.
    found = lax.optimization_barrier(jnp.where(each == 1, 1, -1).astype(dtype))
    return found.reshape(*bits.shape[:-1], -1)[..., :number]


def products_of_signs(bits: Array, number: int, dtype: Any) -> Array:
    """The products (..., J, J) of rows of signs with each other, from their bits (..., J, W).

    What is equal counts, less what is not.

    >>> bits = random_bits(jax.random.key(0), (5,), 70)
    >>> rows = signs(bits, 70, jnp.float32)
    >>> bool(jnp.array_equal(products_of_signs(bits, 70, jnp.float32), rows @ rows.T))
    True
    """

    def different(word: Array) -> Array:
        return lax.population_count(word[..., :, None] ^ word[..., None, :]).astype(jnp.int32)

    def at_once(bits: Array) -> Array:
        return jnp.sum(jax.vmap(different, -1, -1)(bits), axis=-1, dtype=jnp.int32)

    def a_word_at_a_time(bits: Array) -> Array:
        words = jnp.moveaxis(bits, -1, 0)
        nothing = varying_over(jnp.zeros((*bits.shape[:-1], bits.shape[-2]), jnp.int32), varying([bits]))
        return lax.scan(lambda total, word: (total + different(word), None), nothing, words, unroll=8)[0]

    # A processor would write all counts to memory before it adds them.
    found = lax.platform_dependent(bits, cpu=a_word_at_a_time, default=at_once)
    return number - 2 * found.astype(dtype)


def _solution(
    deviations: PerSample, places: int, dtype: Any, bits: Array, numbers: int, healthy: Array
) -> tuple[Callable[[Array], Array], Array]:
    """A function of changes r (J, T) of the loss, whose slopes are ``sum_j a_j e_j``, unbiased; and a share (T,).

    The weights a (J, T) of the particles at each place add up to zero, as r does, so that the noise, of bits (T, J, W),
    need not lose its mean; its products do.

    The share is that of the slopes that this many particles can tell: so much of the unbiased estimate has the smallest
    error, where slopes are expected to be zero.
    """
    count = jnp.maximum(jnp.sum(healthy), 1).astype(dtype)
    if deviations.solve == "covariance" or not numbers:
        return lambda r: r / jnp.maximum(count - 1, 1), jnp.full(places, count / (count + numbers), dtype)
    matrices = _centred(products_of_signs(bits, numbers, dtype), healthy)
    inverses, share = jax.vmap(partial(_inverse, numbers=numbers, ridge=deviations.ridge))(matrices)
    return lambda r: jnp.einsum("tij,jt->it", inverses, r) / share, share


def _centred(products: Array, healthy: Array) -> Array:
    """What the products (..., J, J) of rows are once these have lost their mean, and those that are not healthy all.

    >>> rows, healthy = jax.random.normal(jax.random.key(0), (5, 3)), jnp.array([True, True, False, True, True])
    >>> centred = jnp.where(healthy[:, None], rows - jnp.mean(rows[healthy], axis=0), 0)
    >>> bool(jnp.allclose(_centred(rows @ rows.T, healthy), centred @ centred.T, atol=1e-6))
    True
    """
    weights = healthy.astype(products.dtype)
    means = products @ weights / jnp.maximum(jnp.sum(weights), 1)
    mean = means @ weights / jnp.maximum(jnp.sum(weights), 1)
    return (products - means[..., None] - means[..., None, :] + mean[..., None, None]) * jnp.outer(weights, weights)


def _inverse(matrix: Array, *, numbers: int, ridge: Any) -> tuple[Array, Array]:
    """What finds the weights of the smallest slopes that explain changes, and the share of the slopes that these are.

    With fewer particles than numbers these are the part of the slopes in the span of the noise, which is the k-th part
    of them on average, k being the trace of the projection over the numbers. They are to be divided by that: layers
    whose slopes are known otherwise have to be in proportion, and an average of many estimates has to end at the
    gradient.
    """
    mean = jnp.trace(matrix) / len(matrix)
    # The largest eigenvalues are about J. With many times more particles than numbers the others are what is added, and
    # an inverse's rounding is in proportion to those.
    mean = jnp.where(mean > 0, jnp.maximum(mean, len(matrix) / 2), 0)
    added = jnp.where(mean > 0, jnp.maximum(ridge, 1e-6) * mean, 1)
    one = jnp.eye(len(matrix), dtype=matrix.dtype)
    inverse = jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(matrix + added * one), True), one)
    return inverse, jnp.maximum(jnp.vdot(inverse, matrix), 1e-6) / numbers
