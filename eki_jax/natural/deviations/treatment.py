"""What a step does with each leaf of low-rank deviations: the one place where it is decided."""

from __future__ import annotations

import math
import warnings
from typing import Any, Literal, NamedTuple

import jax

from eki_jax._types import Params
from eki_jax.kernel.interpreter import Use, Watcher, leaf_name
from eki_jax.natural.deviations.low_rank import LowRankDeviations

# What a layer may give to one sample: more would take the memory of the batch's outputs as often as there are numbers,
# and there are never particles enough for it.
_MOST_NUMBERS = 4096
# What the slopes of one leaf may be, for all samples and outputs: 256 MiB in single precision.
_MOST_SLOPES = 2**26
_LOOPS = ("scan", "while")


class LocalityWarning(UserWarning):
    """A localized step knows less of a leaf than of others like it, for the way in which the model is written."""


class LeafTreatment(NamedTuple):
    """What a step does with one leaf of the parameters, and why.

    Attributes:
        name: name of the leaf, such as ``"['Dense_0']['kernel']"``.
        shape: shape of the leaf.
        deviation: kind of its deviations: "low rank", two factors with which the model's products are made; "plain",
            disturbed in all its entries; "formed", the same from a matrix that is added up, or of full rank; "per
            sample", noise in what its layer returns.
        localized: estimate of a localized step: "local", slopes of its own for each sample; "as its layer", those of
            the matrix to whose product it is added; "plain estimate", a covariance; "-" where there are no such steps.
        places: number of rows of one sample that the matrix multiplies; None where that is not known or no matrix.
        reason: words that say why.
        remedy: change that would give a better treatment, where the way the model is written is in its way; else "".
        layer: name of the matrix whose slopes it has; else "".
    """

    name: str
    shape: tuple[int, ...]
    deviation: Literal["low rank", "plain", "formed", "per sample"]
    localized: Literal["local", "as its layer", "plain estimate", "-"]
    places: int | None
    reason: str
    remedy: str = ""
    layer: str = ""


class Watched(NamedTuple):
    """What was seen of a model in one evaluation.

    Attributes:
        outputs: outputs, or their shapes.
        watcher: notes.
    """

    outputs: Any
    watcher: Watcher

    @property
    def samples(self) -> int:
        """B, the length of the outputs' first axis; 0 where they have none, or do not agree on it."""
        first = {leaf.shape[:1] for leaf in jax.tree.leaves(self.outputs)}
        return first.pop()[0] if len(first) == 1 and () not in first else 0

    @property
    def numbers(self) -> int:
        """The number of all outputs."""
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.outputs))

    def uses(self, name: str) -> list[Use]:
        """The uses of a matrix."""
        return [use for use in self.watcher.uses if use.name == name]


def treatments(deviations: LowRankDeviations, mean: Params, watched: Watched) -> tuple[LeafTreatment, ...]:
    """What is done with each leaf of the parameters, in their order."""
    leaves = [(leaf_name(path), m.shape) for path, m in jax.tree_util.tree_leaves_with_path(mean)]
    matrices = {name: _matrix(name, shape, watched) for name, shape in leaves if deviations.has_factors(name, shape)}
    if deviations.formed:
        because = "is added up for the model (formed=True)"
        matrices = {
            name: LeafTreatment(name, found.shape, "formed", "plain estimate", None, because)
            for name, found in matrices.items()
        }
    return tuple(matrices.get(name) or _vector(name, shape, matrices, watched) for name, shape in leaves)


def warn_of_lost(leaves: tuple[LeafTreatment, ...]) -> None:
    """One warning that names all leaves of which a localized step knows less than it could."""
    lost = [f"{leaf.name} {leaf.reason} (wanted {leaf.remedy})" for leaf in leaves if leaf.remedy]
    if lost:
        warnings.warn(
            "localized: the estimate is worse than it could be, for what the model does with these leaves: "
            f"{'; '.join(lost)}. See eki_jax.natural.describe(forward, params, x)",
            LocalityWarning,
            stacklevel=2,
        )


def few_numbers(size: int, places: int, features: int) -> bool:
    """Whether a matrix gives a sample so few numbers that slopes for each of them are worth it.

    Args:
        size: number of the matrix's entries.
        places: number of places in which a sample meets it.
        features: number of what comes out at each.

    >>> few_numbers(200, 25, 8), few_numbers(200, 26, 8), few_numbers(10_000, 1, 10_000)
    (True, False, True)
    """
    return places == 1 or places * features <= min(_MOST_NUMBERS, size)


def _matrix(name: str, shape: tuple[int, ...], watched: Watched) -> LeafTreatment:
    uses, samples = watched.uses(name), watched.samples

    def plain(reason: str, remedy: str = "", places: int | None = None) -> LeafTreatment:
        formed = any(use.how == "formed" or use.is_formed for use in uses)
        return LeafTreatment(name, shape, "formed" if formed else "low rank", "plain estimate", places, reason, remedy)

    if not uses:
        return plain("is not multiplied by")
    for use in uses:
        hidden = [kind for kind in use.inside if kind not in _LOOPS]
        if use.how == "formed" and use.inside:
            return plain(f"is added up inside of {use.inside[-1]}")
        if hidden:
            return plain(f"is used inside of a branch ({hidden[0]})")
        if use.inside and use.how == "product" and use.shape[:1] != (samples,):
            return plain(
                f"is multiplied inside of a loop ({use.inside[0]}) over something else than the places of a sample",
                "jax.vmap for a loop over samples",
            )
        if samples in use.turns:  # the samples of a turn may be the places of a sample, and the other way round
            return plain(
                f"is multiplied inside of a loop ({use.inside[0]}) of {samples} turns, as many as samples, so that "
                "either may be the samples"
            )
    others = [use.how for use in uses if use.how != "product"]
    if others:
        return plain(_OTHER_USES[others[0]] + (f", one of {len(uses)} uses" if len(uses) > 1 else ""))
    looped = [use.inside[0] for use in uses if use.inside and use.rows is None]
    if looped:
        return plain(f"is used inside of a loop ({looped[0]})")
    if len({use.roles for use in uses}) > 1:
        sides = {use.roles.side for use in uses if use.roles is not None}
        ways = "as it is and as its transpose" if sides == {"left", "right"} else "along other axes in other products"
        return plain(f"is multiplied by {ways}")
    for use in uses:
        if len(use.shape) < 2 or use.shape[0] != samples:
            return plain(
                f"multiplies an array of shape {use.shape}, whose first axis is not the {samples} samples of the "
                "outputs",
                "samples along the first axis of what layers multiply and of the outputs",
            )
    places, features = sum(math.prod(use.shape[1:-1]) for use in uses), _features(uses[0])
    where = "once a sample" if places == 1 else f"at {places} places of a sample"
    numbers, size = places * features, math.prod(shape)
    if not few_numbers(size, places, features):
        most = min(_MOST_NUMBERS, size)
        return plain(f"is multiplied {where}: {numbers} numbers, worth it up to {most}", "", places)
    if watched.numbers * numbers > _MOST_SLOPES:
        return plain(
            f"is multiplied {where}: {watched.numbers * numbers:,} slopes for all outputs, which are kept up to "
            f"{_MOST_SLOPES:,}",
            "fewer samples or outputs at a time",
            places,
        )
    if any(use.is_formed for use in uses):
        reason = f"is multiplied {where}, and added up for that: its outputs are no axis of one factor alone"
        return LeafTreatment(name, shape, "formed", "local", places, reason)
    return LeafTreatment(name, shape, "low rank", "local", places, f"is multiplied {where}")


def _features(use: Use) -> int:
    """The number of what comes out of a product at each place, in the order of the matrix's axes; else 0."""
    return use.roles.features if use.roles is not None else 0


_OTHER_USES: dict[str, str] = {
    "part": "is multiplied by in parts, scaled, or side by side with other leaves",
    "other product": "multiplies no rows of the samples: in an outer product, or a convolution of samples last",
    "rows": "is looked up by rows (an embedding)",
    "formed": "is computed with before it is multiplied by, and added up for that",
}


def _vector(name: str, shape: tuple[int, ...], matrices: dict[str, LeafTreatment], watched: Watched) -> LeafTreatment:
    def own(reason: str, remedy: str = "") -> LeafTreatment:
        return LeafTreatment(name, shape, "plain", "local", None, reason, remedy)

    additions = watched.watcher.additions
    layers = sorted({added.matrix for added in additions if added.bias == name})
    computed = sorted({added.matrix for added in additions if name in added.computed_from})
    if computed:
        return own(
            f"was computed with before it is added to the product with {computed[0]}: has slopes of its own",
            "the leaf itself as the bias",
        )
    if len(layers) > 1:
        return own(f"is added to the products with {len(layers)} matrices: has slopes of its own")
    if layers and name in watched.watcher.others:
        return own(f"is added to the product with {layers[0]} and used otherwise: has slopes of its own")
    if layers and len(watched.uses(layers[0])) != sum(added.bias == name for added in additions):
        return own(f"is added to the product with {layers[0]}, but not in all of its uses: has slopes of its own")
    if layers and matrices[layers[0]].localized == "local":
        if not all(added.in_order for added in additions if added.bias == name):
            return own(
                f"is added to the product with {layers[0]}, but its numbers lie otherwise: has slopes of its own"
            )
        return LeafTreatment(
            name, shape, "plain", "as its layer", None, f"is added to the product with {layers[0]}", layer=layers[0]
        )
    if layers:
        return own("reaches a sample as itself, its layer not being local")
    return own("reaches a sample as itself")
