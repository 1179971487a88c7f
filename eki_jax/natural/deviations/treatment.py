"""What a step does with each leaf of low-rank deviations: the one place where it is decided."""

from __future__ import annotations

import math
import warnings
from typing import Literal, NamedTuple

import jax

from eki_jax._types import Params
from eki_jax.natural.deviations.low_rank import LowRankDeviations
from eki_jax.natural.deviations.watching import Use, Watched

# What a convolution may give to one sample: more would take the memory of the batch's outputs as often as there are
# numbers, and there are never particles enough for it.
_MOST_NUMBERS = 4096
_LOOPS = ("scan", "while")


class LocalityWarning(UserWarning):
    """A localized step knows less of a leaf than of others like it, for the way in which the model is written."""


class LeafTreatment(NamedTuple):
    """What a step does with one leaf of the parameters, and why.

    Attributes:
        name: name of the leaf, such as ``"['Dense_0']['kernel']"``.
        shape: shape of the leaf.
        deviation: kind of its deviations: "low rank", two factors that the model meets as a :class:`LowRankMatrix`;
            "plain", disturbed in all its entries; "formed", the same from a matrix that is added up, or of full rank.
        localized: estimate of a localized step: "local", slopes of its own for each sample; "as its layer", those of
            the matrix to whose product it is added; "plain estimate", a covariance; "-" where there are no such steps.
        places: number of rows of one sample that the matrix multiplies; None where that is not known or no matrix.
        reason: words that say why.
        remedy: change that would give a better treatment, where the way the model is written is in its way; else "".
        layer: name of the matrix whose slopes it has; else "".
    """

    name: str
    shape: tuple[int, ...]
    deviation: Literal["low rank", "plain", "formed"]
    localized: Literal["local", "as its layer", "plain estimate", "-"]
    places: int | None
    reason: str
    remedy: str = ""
    layer: str = ""


def treatments(deviations: LowRankDeviations, mean: Params, watched: Watched) -> tuple[LeafTreatment, ...]:
    """What is done with each leaf of the parameters, in their order."""
    leaves = [(jax.tree_util.keystr(path), m.shape) for path, m in jax.tree_util.tree_leaves_with_path(mean)]
    matrices = {
        name: _matrix(name, shape, [use for use in watched.uses if use.name == name], watched.samples)
        for name, shape in leaves
        if deviations.has_factors(name, shape)
    }
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


def few_numbers(shape: tuple[int, ...], places: int) -> bool:
    """Whether a matrix of that shape gives a sample so few numbers that slopes for each of them are worth it.

    >>> few_numbers((25, 8), 25), few_numbers((25, 8), 26), few_numbers((1, 10_000), 1)
    (True, False, True)
    """
    return places == 1 or places * shape[-1] <= min(_MOST_NUMBERS, math.prod(shape))


def _matrix(name: str, shape: tuple[int, ...], uses: list[Use], samples: int) -> LeafTreatment:
    def plain(reason: str, remedy: str = "", places: int | None = None) -> LeafTreatment:
        formed = any(use.how == "formed" for use in uses)
        return LeafTreatment(name, shape, "formed" if formed else "low rank", "plain estimate", places, reason, remedy)

    if not uses:
        return plain("is not multiplied by")
    for use in uses:
        hidden = [kind for kind in use.inside if kind not in _LOOPS]
        if hidden and use.how in ("product", "unbatched"):
            return plain(f"is used inside of {hidden[0]}, which cannot be looked into", "the product outside of it")
        if use.inside and use.how == "product" and use.rows[:1] != (samples,):
            return plain(
                f"is multiplied inside of a loop ({use.inside[0]}) over something else than the places of a sample",
                "jax.vmap for a loop over samples",
            )
    if any(use.inside for use in uses):
        return plain(f"is used inside of a loop ({next(use.inside[0] for use in uses if use.inside)})")
    if len(uses) > 1:
        return plain(f"is used {len(uses)} times")
    (use,) = uses
    if use.how == "transposed":
        return plain("is multiplied as w.T or w @ x", "its transpose as the parameter, and x @ w")
    if use.how != "product" and use.how != "unbatched":
        return plain(_OTHER_USES[use.how])
    if use.how == "unbatched" or len(use.rows) < 2 or use.rows[0] != samples:
        return plain(
            f"multiplies an array of shape {use.rows}, whose first axis is not the {samples} samples of the outputs",
            "samples along the first axis of what layers multiply and of the outputs",
        )
    places = math.prod(use.rows[1:-1])
    where = "once a sample" if places == 1 else f"at {places} places of a sample"
    if few_numbers(shape, places):
        return LeafTreatment(name, shape, "low rank", "local", places, f"is multiplied {where}")
    most = min(_MOST_NUMBERS, math.prod(shape))
    return plain(f"is multiplied {where}: {places * shape[-1]} numbers, worth it up to {most}", "", places)


_OTHER_USES = {
    "grouped": "is the kernel of a grouped convolution",
    "rows": "is looked up by rows (an embedding)",
    "formed": "is added up by the model (dense())",
    "differentiated": "is multiplied in a function that the model differentiates, so once more",
}


def _vector(name: str, shape: tuple[int, ...], matrices: dict[str, LeafTreatment], watched: Watched) -> LeafTreatment:
    def own(reason: str, remedy: str = "") -> LeafTreatment:
        return LeafTreatment(name, shape, "plain", "local", None, reason, remedy)

    layers = sorted({added.matrix for added in watched.additions if added.bias == name})
    computed = sorted({added.matrix for added in watched.additions if name in added.computed_from})
    if computed:
        return own(
            f"was computed with before it is added to the product with {computed[0]}: has slopes of its own",
            "the leaf itself as the bias",
        )
    if len(layers) > 1:
        return own(f"is added to the products with {len(layers)} matrices: has slopes of its own")
    if layers and matrices[layers[0]].localized == "local" and matrices[layers[0]].shape[-1] == math.prod(shape):
        return LeafTreatment(
            name, shape, "plain", "as its layer", None, f"is added to the product with {layers[0]}", layer=layers[0]
        )
    if layers:
        return own("reaches a sample as itself, its layer not being local")
    return own("reaches a sample as itself")
