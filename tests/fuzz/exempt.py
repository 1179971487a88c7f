"""Public callables that no case calls, each with the reason; a test asks whether the reason holds."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, is_typeddict


def takes_nothing(thing: Any) -> bool:
    return not inspect.isclass(thing) and not inspect.signature(thing).parameters


def is_protocol(thing: Any) -> bool:
    return getattr(thing, "_is_protocol", False)


def is_record(thing: Any) -> bool:
    return inspect.isclass(thing) and issubclass(thing, tuple) and hasattr(thing, "_fields")


def is_exception(thing: Any) -> bool:
    return inspect.isclass(thing) and issubclass(thing, BaseException)


def is_enumeration(thing: Any) -> bool:
    return hasattr(thing, "__members__")


class Reason:
    """Why callables are left out.

    Attributes:
        words: words for it.
        holds: function of a callable, True where the reason is one.
        names: paths of the callables, within ``eki_jax``.
    """

    def __init__(self, words: str, holds: Callable[[Any], bool], names: str) -> None:
        self.words, self.holds, self.names = words, holds, names.split()


EXEMPT = [
    Reason(
        "takes no arguments",
        takes_nothing,
        """paper_step_size su_boyd_candes keep_failed raise_failed kalman.sampling_error_correction natural.gradient
        policy.categorical policy.normal
        flax.cnn1 flax.cnn2 flax.cnn3 flax.cnn_mnist flax.dnn1 flax.dnn2 flax.dnn3 flax.dnn4 flax.small_cnn""",
    ),
    Reason(
        "is a protocol, which nobody makes",
        is_protocol,
        """losses.CurvedLoss losses.SeparableLoss losses.ShortcutLoss losses.SupportedLoss natural.Deviations
        online.Cell policy.Distribution""",
    ),
    Reason(
        "names keywords, which the functions that take them check",
        is_typeddict,
        """Settings SharedSettings natural.EstimatorSettings natural.NaturalSettings kalman.KalmanSettings
        kalman.UnscentedSettings policy.LearnerSettings""",
    ),
    Reason("is raised or warned of", is_exception, "StepRefused natural.LocalityWarning calibrate.MemberFailed"),
    Reason("is an enumeration", is_enumeration, "Reason"),
    Reason(
        "is a record that the library fills: states, results, and what a function beside it makes and checks",
        is_record,
        """EulerState HeavyBallState NesterovState StatefulState Info Solver compact.CompactEnsemble
        compact.CompactState calibrate.Group calibrate.Iteration calibrate.Marginal calibrate.Observations
        calibrate.Posterior calibrate.Report kalman.AcceleratedInfo kalman.AcceleratedState kalman.InflatedState
        kalman.Inflation kalman.KalmanState kalman.LangevinState kalman.Localization kalman.SparseInfo
        kalman.SparseState kalman.UnscentedState edf.Acceleration edf.EdfState edf.MinresInfo ensembles.Gaussian
        failures.FailurePolicy losses.Curvature losses.Shortcut natural.AdaptiveDamping natural.Description
        natural.LeafTreatment natural.NaturalInfo natural.NaturalState natural.deviations.FullRank
        natural.deviations.PerSample natural.estimates.Gradient natural.deviations.LowRankDeviations
        natural.estimates.Localized natural.estimates.Span online.OnlineLearner online.OnlineState
        optax.AddPriorNoiseState optax.ScaleByNesterovState semi_supervised.GraphBasis sharding.Cost sharding.Link
        policy.Environment policy.Episodes policy.FisherFactor policy.Learner policy.LearnerInfo policy.LearnerState
        policy.Part policy.Running policy.Step policy.Trajectory policy.Visited
        sharding.Machine training.Accuracy training.Method training.Result""",
    ),
]
