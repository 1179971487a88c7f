"""What a run does about steps that were refused: counts them, says so, and stops where they go on."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np

from eki_jax.solvers.reasons import Reason, StepRefused


class Refusals:
    """The refused steps of one run.

    Args:
        most: number of them in a row after which the run is to stop.

    >>> refusals = Refusals(3)
    >>> refusals.counted({"reason": np.array([0, 1, 1])}), refusals.too_many
    ({'refused': 2, 'reason': 'FEW_PARTICLES'}, False)
    >>> refusals.counted({"reason": np.array([1, 0, 0])}), refusals.too_many
    ({'refused': 1, 'reason': 'FEW_PARTICLES'}, True)
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._in_a_row = 0
        self._all = 0
        self._steps = 0
        self._last = Reason.TAKEN
        self.too_many = False

    def counted(self, metrics: dict[str, Any]) -> dict[str, Any]:
        """What an epoch's line says of its refused steps; empty for methods that never refuse one."""
        if "reason" not in metrics:
            return {}
        codes = np.ravel(metrics["reason"])
        refused = [code for code in codes.tolist() if code not in (Reason.TAKEN, Reason.ENDED)]
        for code in codes.tolist():
            if self.too_many:
                break
            self._in_a_row = 0 if code in (Reason.TAKEN, Reason.ENDED) else self._in_a_row + 1
            self.too_many = self._in_a_row >= self._most
            self._last = Reason(code) if self._in_a_row else self._last
        self._steps += len(codes)
        self._all += len(refused)
        return {"refused": len(refused), **({"reason": Reason(refused[-1]).name} if refused else {})}

    def tell(self, *, stop: bool = True, directory: Path | str | None = None) -> None:
        """Raise :class:`StepRefused` where there were too many in a row, and warn where there were some.

        Args:
            stop: flag; False warns only.
            directory: folder of the run, for the error.
        """
        if self.too_many and stop:
            kept = "" if directory is None else f"; what was learned before is in {directory}"
            raise StepRefused(self._last, f"{self._most} steps in a row were refused{kept}")
        if self._all:
            warnings.warn(
                f"{self._all} of {self._steps} steps were refused, the last for {self._last.name}: {self._last.remedy}",
                RuntimeWarning,
                stacklevel=3,
            )
