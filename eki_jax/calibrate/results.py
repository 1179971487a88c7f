"""What members returned: outputs in rows, and why those failed that did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from eki_jax.calibrate.observations import real_array


class MemberFailed(RuntimeError):
    """A member whose simulation failed: what :func:`eki_jax.calibrate.map_particles` gives in the place of outputs.

    Args:
        reason: last line of the error, with its type; or what else happened.

    >>> MemberFailed("ValueError: negative depth").reason
    'ValueError: negative depth'
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Outputs(NamedTuple):
    """The outputs of all members.

    Attributes:
        rows: numbers of all outputs in a row for each member, shape (J, N), float64; NaN for those that failed.
        failures: reasons by the members' indices.
        imputed: number of values that were filled in.
    """

    rows: np.ndarray
    failures: dict[int, str]
    imputed: int


def last_line(error: BaseException) -> str:
    r"""The type of an error and the last line of what it says.

    Args:
        error: any error.

    >>> last_line(ValueError("line 3 of input.nml\nnegative depth"))
    'ValueError: negative depth'
    """
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1].strip()}" if lines else type(error).__name__


def collected(
    results: Any,
    shapes: Mapping[str, tuple[int, ...]],
    observed: np.ndarray,
    particles: int | None,
    impute: float,
    name: str = "results",
) -> Outputs:
    """The results of all members, checked.

    Args:
        results: list of one result for each member: a dict of arrays by the outputs' names; None, NaN or an exception
            for a member that failed.
        shapes: shapes of the outputs by their names.
        observed: flags of the numbers that are compared with data, shape (N,); what the others are is of no concern.
        particles: number of members J; None for any number.
        impute: largest share of a member's observed numbers that may be NaN, and are then given the mean of the other
            members'.
        name: name of the argument in an error.

    Raises:
        TypeError: results of another kind; they are never taken apart by guessing.
        ValueError: another number of results, names or shapes that are not those of the data.
    """
    if isinstance(results, str | bytes | Mapping) or not isinstance(results, Sequence):
        shape = f" of shape {results.shape}" if hasattr(results, "shape") else ""
        raise TypeError(
            f"{name}: a {type(results).__name__}{shape}; wanted a list with a dict of outputs for each member"
        )
    if particles is not None and len(results) != particles:
        raise ValueError(f"{name}: {len(results)} of them; wanted {particles}, one for each member, in their order")
    rows = np.full((len(results), len(observed)), np.nan)
    failures = {}
    for j, result in enumerate(results):
        reason = failure(result)
        if reason is None:
            rows[j] = _row(f"{name}[{j}]", result, shapes)
        else:
            failures[j] = reason
    imputed = _impute(rows, failures, observed, impute)
    for j in range(len(results)):
        bad = ~np.isfinite(rows[j]) & observed
        if j not in failures and bad.any():
            failures[j] = _not_finite(rows[j], bad, observed, shapes)
    rows[list(failures)] = np.nan
    return Outputs(rows, failures, imputed)


def failure(result: Any) -> str | None:
    """Why a member failed, or None if it has outputs.

    Args:
        result: result of a simulator.

    >>> failure(float("nan")), failure({"flow": 1.0})
    ('returned NaN', None)
    """
    if result is None:
        return "returned None"
    if isinstance(result, MemberFailed):
        return result.reason
    if isinstance(result, BaseException):
        return last_line(result)
    is_nan = isinstance(result, float | np.floating) and np.isnan(result)
    return "returned NaN" if is_nan else None


def _row(where: str, result: Any, shapes: Mapping[str, tuple[int, ...]]) -> np.ndarray:
    if not isinstance(result, Mapping):
        raise TypeError(
            f"{where}: a {type(result).__name__}; wanted a dict of the outputs {', '.join(map(repr, shapes))}, or None "
            "or an exception for a member that failed"
        )
    if set(result) != set(shapes):
        missing, unknown = [n for n in shapes if n not in result], [n for n in result if n not in shapes]
        said = [f"without {', '.join(map(repr, missing))}"] * bool(missing)
        said += [f"with {', '.join(map(repr, unknown))}"] * bool(unknown)
        raise ValueError(f"{where}: outputs {' and '.join(said)}; wanted those of the data, {', '.join(shapes)}")
    parts = []
    for name, shape in shapes.items():
        value = real_array(f"{where}[{name!r}]", result[name])
        if value.shape != shape:
            transposed = " (it is transposed)" if value.shape == shape[::-1] else ""
            raise ValueError(f"{where}[{name!r}]: shape {value.shape}{transposed}; wanted that of the data, {shape}")
        parts.append(value.ravel())
    return np.concatenate(parts)


def _impute(rows: np.ndarray, failures: Mapping[int, str], observed: np.ndarray, share: float) -> int:
    """Fill single NaN in with the mean of the members whose observed outputs are all there; how many there were."""
    missing = np.isnan(rows) & observed
    missing[list(failures)] = False
    whole = np.isfinite(rows[:, observed]).all(axis=1)
    few = missing.any(axis=1) & (missing.sum(axis=1) <= share * observed.sum())
    few &= ~(np.isinf(rows) & observed).any(axis=1)
    if not few.any() or not whole.any():
        return 0
    mean = rows[whole].mean(axis=0)
    for j in np.flatnonzero(few):
        rows[j, missing[j]] = mean[missing[j]]
    return int(missing[few].sum())


def _not_finite(row: np.ndarray, bad: np.ndarray, observed: np.ndarray, shapes: Mapping[str, tuple[int, ...]]) -> str:
    start = 0
    for name, shape in shapes.items():
        part = slice(start, start + int(np.prod(shape, dtype=int)))
        start = part.stop
        if bad[part].any():
            what = "NaN" if np.isnan(row[part][bad[part]]).all() else "not finite"
            return f"{name} is {what} at {bad[part].sum()} of {observed[part].sum()} observed numbers"
    raise AssertionError("no number that is not finite")
