"""What a natural-gradient step does with each leaf of a model's parameters, and why."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

from eki_jax._checks import arrays, function, offers, traceable
from eki_jax._types import ForwardFn, Params
from eki_jax.kernel.interpreter import leaf_name
from eki_jax.natural.deviations import Deviations, LowRankDeviations, PerSample, low_rank
from eki_jax.natural.deviations.treatment import LeafTreatment, treatments
from eki_jax.natural.draws import Cloud
from eki_jax.natural.estimates.predicting import what_answers
from eki_jax.natural.estimates.undisturbed import Undisturbed

# What to do about leaves for which nothing in the model is in the way.
_MORE = "a plain estimate wants more particles than a local one; per_sample() has one for each sample of most leaves"


class Description(NamedTuple):
    """The treatment of all leaves; printed, a table, and what to do where no change of the model would be better.

    Attributes:
        leaves: one :class:`LeafTreatment` for each leaf, in the order of the parameters.
    """

    leaves: tuple[LeafTreatment, ...]

    def __str__(self) -> str:
        rows = [("leaf", "shape", "deviation", "localized step", "why: it")]
        rows += [(leaf.name, _shape(leaf.shape), leaf.deviation, leaf.localized, _why(leaf)) for leaf in self.leaves]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        aligned = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
        lines = ["  ".join(row).rstrip() for row in aligned]
        return "\n".join([*lines, _MORE] if any(leaf.localized == "plain estimate" for leaf in self.leaves) else lines)

    @property
    def lost(self) -> tuple[LeafTreatment, ...]:
        """The leaves of which a localized step knows less than it could; it warns of them."""
        return tuple(leaf for leaf in self.leaves if leaf.remedy)


def describe(
    forward: ForwardFn,
    params: Params,
    x: Any,
    deviations: Deviations = low_rank(1),  # noqa: B008
) -> Description:
    """What a step does with each leaf of the parameters: its deviations, its localized estimate, and why.

    The model is traced, not evaluated. A step decides by the same trace, so that what it does is what is said here.

    Args:
        forward: function ``forward(params, x) -> outputs`` of one particle, as for :func:`natural_gradient`.
        params: one particle's parameters, arrays or ``jax.ShapeDtypeStruct``.
        x: inputs of a mini-batch, a pytree of arrays or ``jax.ShapeDtypeStruct``.
        deviations: kind of deviations, :func:`low_rank`, :func:`full_rank` or :func:`per_sample`.

    Returns:
        A :class:`Description`, whose text is a table.

    Raises:
        TypeError: ``forward`` is no function of two arguments, ``params`` or ``x`` are no arrays, ``deviations`` no
            deviations.
        ValueError: a rank above a leaf's.

    >>> import jax.numpy as jnp
    >>> from eki_jax.natural import affine
    >>> params = {"w": jnp.zeros((3, 2)), "b": jnp.zeros(2)}
    >>> print(describe(lambda p, x: affine(x, p["w"], p["b"]), params, jnp.zeros((5, 3))))
    leaf   shape   deviation  localized step  why: it
    ['b']  (2,)    plain      as its layer    is added to the product with ['w']
    ['w']  (3, 2)  low rank   local           is multiplied once a sample
    """
    function("forward", forward, "a model, forward(params, x) -> outputs", arguments=2)
    arrays("params", params, floating=True, some=True)
    traceable("x", x)
    offers("deviations", deviations, ("draw", "particle", "dense", "combine"), "deviations, such as low_rank(1)")
    if isinstance(deviations, PerSample):
        noise = deviations
        by_noise: list[tuple[LeafTreatment, ...]] = []

        def seen_through(params: Params, x: Any) -> None:
            seen = Undisturbed.of(forward, params, x, noise)
            answered = what_answers(seen) if noise.feedback is not None and noise.feedback.answers else None
            by_noise.append(tuple(_by_noise(seen, name, m.shape, answered) for name, m in seen.leaves.items()))

        jax.eval_shape(seen_through, params, x)
        return Description(by_noise[-1])
    if not isinstance(deviations, LowRankDeviations):
        reason = "is disturbed in all its entries; localized steps want deviations of low rank"
        named = jax.tree_util.tree_leaves_with_path(params)
        return Description(
            tuple(LeafTreatment(leaf_name(path), m.shape, "formed", "-", None, reason) for path, m in named)
        )
    found: list[tuple[LeafTreatment, ...]] = []

    def traced(params: Params, x: Any) -> None:
        found.append(treatments(deviations, params, Cloud(deviations, 2).watch(forward, params, x)))

    jax.eval_shape(traced, params, x)
    return Description(found[-1])


def _by_noise(seen: Undisturbed, name: str, shape: tuple[int, ...], answered: set[int] | None) -> LeafTreatment:
    """The treatment of a leaf; ``answered`` has the points to which something answers, where that is asked."""
    if name in seen.whole:
        reason = "is used in a loop or a branch within a loop, or computed with: is disturbed as a whole"
        return LeafTreatment(name, shape, "plain", "-", None, reason)
    numbers = [number for number, point in seen.points.items() if name in dict(point.pulls)]
    if not numbers:
        return LeafTreatment(name, shape, "plain", "-", None, "is not used")
    is_exact = all(number in seen.exact for number in numbers)
    reason = "is in the last layer, whose gradient is known" if is_exact else "has noise in what its layer returns"
    if any(number in seen.moves for number in numbers):
        reason = "has noise behind a product that mixes places, which is linear in what its layer returns"
    if name in seen.formed:
        reason += ", behind a function of its own, whose slopes are found by differences"
    if name in seen.scaled:
        reason += ", with its scale for a constant"
    if answered is not None and not is_exact:
        what = (
            "what lies behind" if answered.issuperset(u for u in numbers if u not in seen.exact) else "nothing behind"
        )
        reason += f"; {what} answers to it"
    return LeafTreatment(name, shape, "per sample", "-", None, reason)


def _shape(shape: tuple[int, ...]) -> str:
    return str(tuple(map(int, shape)))


def _why(leaf: LeafTreatment) -> str:
    return f"{leaf.reason}; wanted {leaf.remedy}" if leaf.remedy else leaf.reason
