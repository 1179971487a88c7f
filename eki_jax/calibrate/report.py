"""What is said of an iteration."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from eki_jax.solvers import Reason


class Report(NamedTuple):
    """What one call of ``tell`` did; as a text it is one line.

    Attributes:
        iteration: number of steps taken so far.
        time: power of the likelihood reached, 1 at the posterior; None for methods that do not temper.
        step_size: step size of this step.
        misfit: mean over the members of the mean squared residual in units of the noise, before the step; about 1
            where the fit is as good as the noise lets it be.
        misfit_of_mean: mean squared residual of the members' mean output.
        spread: root mean square standard deviation of the latent parameters after the step; 1 for the prior.
        particles: number of members J.
        failures: reasons of the members that failed, by their indices; they took no part.
        masked: number of data that are NaN, which are left out.
        imputed: number of outputs that were NaN and filled in.
        constant: names of outputs that do not vary over the members, from which nothing can be learned.
        moved: flag, False where the step was refused, and used nothing up.
        reason: reason of the refusal.
        done: flag, True where the calibration is at its end.
    """

    iteration: int
    time: float | None
    step_size: float
    misfit: float
    misfit_of_mean: float
    spread: float
    particles: int
    failures: dict[int, str]
    masked: int
    imputed: int
    constant: tuple[str, ...]
    moved: bool
    reason: Reason
    done: bool

    @property
    def failed(self) -> int:
        """The number of members that took no part."""
        return len(self.failures)

    def __str__(self) -> str:
        words = [f"misfit {self.misfit:.3g}", f"spread {self.spread:.3g}"]
        if self.time is not None:
            words.insert(0, f"time {self.time:.3g}")
        if self.failures:
            words.append(f"{self.failed} of {self.particles} failed ({commonest(self.failures)})")
        if self.masked:
            words.append(f"{self.masked} data masked")
        if self.imputed:
            words.append(f"{self.imputed} outputs imputed")
        if self.constant:
            words.append(f"constant: {', '.join(self.constant)}")
        if not self.moved:
            words.append(f"refused: {self.reason.name}")
        if self.done:
            words.append("done")
        return f"iteration {self.iteration}: {', '.join(words)}"


def commonest(failures: dict[int, str]) -> str:
    """The commonest reason, cut to one short line; "..." where there are others.

    Args:
        failures: reasons by the members' indices.

    >>> commonest({1: "TimeoutError", 4: "returned None", 7: "TimeoutError"})
    'TimeoutError, ...'
    """
    reasons, counts = np.unique(list(failures.values()), return_counts=True)
    reason = " ".join(str(reasons[np.argmax(counts)]).split())
    reason = reason if len(reason) <= 80 else f"{reason[:77]}..."
    return reason if len(reasons) == 1 else f"{reason}, ..."
