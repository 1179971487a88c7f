"""Why a step was refused: a code that a compiled program can carry, and what to do about it."""

from __future__ import annotations

import enum
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eki_jax._types import Array


class Reason(enum.IntEnum):
    """What ``info.reason`` says of a step: that it was taken, or why not.

    Each has a ``remedy``, what to do about it. A refused step leaves the particles, the count of steps and the time of
    tempering as they were.

    >>> Reason(2).name, Reason.SETTING.remedy.split(";")[0]
    ('SETTING', 'a setting that a schedule or a traced number gave was out of its range')
    """

    remedy: str

    TAKEN = 0, "the step was taken"
    FEW_PARTICLES = (
        1,
        "fewer than two particles had finite parameters, outputs and losses below the cut; look at the model, the "
        "data (NaN targets, labels out of range) and the spread of the first ensemble, or redraw_failed(key) early",
    )
    SETTING = (
        2,
        "a setting that a schedule or a traced number gave was out of its range; look at the step size, momentum, "
        "sigma, damping and learning rate at this count of steps",
    )
    NOT_FINITE = (
        3,
        "the step itself overflowed or was NaN though its particles were finite; rescale outputs or loss, shorten the "
        "step, or use float64",
    )
    PARAMETERS = 4, "the mean that the particles are drawn around is not finite; go back to an earlier state"
    NOT_CONVEX = 5, "the loss is not convex in the outputs here; use one that is, or make targets valid for it"
    LOSS_ROSE = (
        6,
        "the step would have raised the loss of its own batch beyond the limit; use a larger damping, "
        "adaptive_damping(), a smaller learning rate or a norm constraint",
    )
    TARGETS = 7, "the targets are not finite; leave out what was not observed, or give it a number and no weight"
    ENDED = 8, "the method had reached its end, solver.done(state); start anew from its ensemble to go on"
    MEAN_FAILED = (
        9,
        "the run of the mean failed, that all others are measured from; start at other parameters, with a prior that "
        "keeps to those that the model can run with",
    )

    def __new__(cls, code: int, remedy: str = "") -> Reason:  # noqa: D102
        member = int.__new__(cls, code)
        member._value_ = code
        member.remedy = remedy
        return member


class StepRefused(FloatingPointError):
    """The error of :func:`eki_jax.checked` and of :func:`eki_jax.training.fit` where steps are refused.

    Attributes:
        reason: the :class:`Reason`.
    """

    def __init__(self, reason: Reason, refused: str = "step refused") -> None:
        super().__init__(f"{refused}: {reason.name}: {reason.remedy}")
        self.reason = reason


def first_reason(*refusals: tuple[Any, Any]) -> Array:
    """The code of the first reason whose flag is up, int32, or that of a step taken; reasons may be traced codes.

    >>> first_reason((Reason.SETTING, False), (Reason.NOT_FINITE, jnp.array(True)))
    Array(3, dtype=int32)
    """
    code = jnp.asarray(Reason.TAKEN, jnp.int32)
    for reason, flag in reversed(refusals):
        code = jnp.where(flag, jnp.asarray(reason, jnp.int32), code)
    return code


def refusals_in(tree: Any) -> np.ndarray:
    """The codes of all infos in the result of a function, flat and in their order, those of one step or of many.

    >>> refusals_in(({"a": 1}, 2))
    array([], dtype=int32)
    """
    has_reason = lambda node: hasattr(node, "_fields") and "reason" in node._fields
    found = [node.reason for node in jax.tree.leaves(tree, is_leaf=has_reason) if has_reason(node)]
    return np.concatenate([np.zeros(0, np.int32), *(np.ravel(jax.device_get(codes)) for codes in found)])
