"""Data and noise: outputs by name as one row of numbers, less what was not observed, in units of the noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from eki_jax._checks import arrays, quantities
from eki_jax.calibrate.extras import extra
from eki_jax.solvers.kalman import LowRankNoise
from eki_jax.solvers.kalman.noise_covariance import Dense, Diagonal, DiagonalPlusLowRank, as_noise_covariance

#: A covariance in one piece.
Covariance: TypeAlias = Diagonal | Dense | DiagonalPlusLowRank


class Block(NamedTuple):
    """Outputs whose noise is independent of all others'.

    Attributes:
        columns: slice of the observed outputs, those of all names in a row.
        covariance: covariance of their noise, factored.
    """

    columns: slice
    covariance: Covariance


class Observations(NamedTuple):
    """The data of a calibration.

    Attributes:
        shapes: shapes of the outputs by their names.
        data: all data in a row, in the order of the names, float64; NaN where nothing was observed.
        observed: flags of the numbers that are data, shape of ``data``.
        blocks: parts of the observed numbers with their noise.
    """

    shapes: dict[str, tuple[int, ...]]
    data: np.ndarray
    observed: np.ndarray
    blocks: tuple[Block, ...]

    @property
    def size(self) -> int:
        """The number M of observed outputs."""
        return int(self.observed.sum())

    @property
    def masked(self) -> int:
        """The number of data that are NaN."""
        return int((~self.observed).sum())

    def whitened(self, rows: np.ndarray) -> np.ndarray:
        """``W (G_j - y)`` with ``W Gamma W^T = I``, in double precision, shape (J, M).

        Before anything is rounded to the precision of the particles: so data of many magnitudes keep their digits.

        Args:
            rows: outputs of the particles in a row each, those not observed included, shape (J, N).
        """
        with np.errstate(over="ignore", invalid="ignore"):
            residuals = (rows - self.data)[:, self.observed]
            parts = [_whiten(block.covariance, residuals[:, block.columns]) for block in self.blocks]
        return np.concatenate(parts, axis=1)

    def scaled(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """``(G_j - y)`` over the noise's standard deviations, by outputs, shape (J, m) each.

        Args:
            rows: outputs of the particles in a row each, shape (J, N).
        """
        with np.errstate(over="ignore", invalid="ignore"):
            found = ((rows - self.data) / self.sd())[:, self.observed]
        return {name: found[:, columns] for name, columns in self._columns().items()}

    def residual_noise(self) -> dict[str, Any]:
        """The noise's covariance after :meth:`scaled`, its correlations, by outputs.

        Raises:
            ValueError: noise that is correlated between outputs.
        """
        columns = self._columns()
        if len(self.blocks) == 1 and len(columns) > 1 and not isinstance(self.blocks[0].covariance, Diagonal):
            raise ValueError("noise: correlated between outputs; wanted noise by the outputs' names with localization")
        if len(self.blocks) == 1 and len(columns) > 1:
            return {name: np.ones(part.stop - part.start) for name, part in columns.items()}
        return {name: _correlations(block.covariance) for name, block in zip(columns, self.blocks, strict=True)}

    def _columns(self) -> dict[str, slice]:
        """The observed columns of each output that has some."""
        found, start = {}, 0
        for name, seen in self.split(self.observed[None]).items():
            if number := int(seen.sum()):
                found[name] = slice(start, start + number)
                start += number
        return found

    def split(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """The outputs by their names, shape (J, ...) each, from rows of shape (J, N)."""
        found, start = {}, 0
        for name, shape in self.shapes.items():
            size = int(np.prod(shape, dtype=int))
            found[name] = rows[:, start : start + size].reshape(len(rows), *shape)
            start += size
        return found

    def sd(self) -> np.ndarray:
        """The noise's standard deviations, in the order of ``data``; NaN where nothing was observed."""
        parts = [np.sqrt(_variances(block.covariance)) for block in self.blocks]
        found = np.full(len(self.data), np.nan)
        found[self.observed] = np.concatenate(parts)
        return found


def observations(data: Mapping[str, Any], noise: Any) -> Observations:
    """Check data and noise, and factor the noise's covariance once.

    Args:
        data: data by the outputs' names, arrays of any shape; NaN, or masked, where nothing was observed.
        noise: covariance Gamma of the noise: a dict with the outputs' names, of a variance (a number), variances (the
            output's shape), a matrix of shape (N, N) for the N numbers of the output, or a
            :class:`eki_jax.kalman.LowRankNoise`; or one of these for all numbers of all outputs, in the order of
            ``data``. Rows and columns of what was not observed are dropped.

    Returns:
        The :class:`Observations`.

    Raises:
        TypeError: data or noise of another kind.
        ValueError: no data, or none that are observed; infinite data; names that differ; a covariance that is singular,
            not symmetric, or of a shape that does not fit.

    >>> found = observations({"flow": [1.0, float("nan"), 3.0], "level": 5.0}, {"flow": 4.0, "level": 0.25})
    >>> found.size, found.masked, found.whitened(np.array([[3.0, 9.0, 3.0, 6.0]]))
    (3, 1, array([[1., 0., 2.]]))
    """
    if not isinstance(data, Mapping) or not data:
        raise TypeError(f"data: {type(data).__name__}; wanted a dict of at least one array, by the outputs' names")
    values = {_checked_name(name): real_array(f"data[{name!r}]", value) for name, value in data.items()}
    shapes = {name: value.shape for name, value in values.items()}
    row = np.concatenate([value.ravel() for value in values.values()])
    for name, value in values.items():
        if np.isinf(value).any():
            raise ValueError(f"data[{name!r}]: has infinite values; wanted numbers, or NaN for what was not observed")
    observed = np.isfinite(row)
    if not observed.any():
        raise ValueError("data: no valid observation, all of them are NaN; wanted at least one number")
    if not isinstance(noise, Mapping):
        return Observations(shapes, row, observed, (Block(slice(None), _covariance("noise", noise, observed)),))
    if set(noise) != set(values):
        raise ValueError(f"noise: for outputs {sorted(noise)}; wanted one for each of the data, {sorted(values)}")
    blocks, start, place = [], 0, 0
    for name, value in values.items():
        seen = observed[start : start + value.size]
        start += value.size
        if not seen.any():
            continue
        end = place + int(seen.sum())
        covariance = _covariance(f"noise[{name!r}]", noise[name], seen, value.shape)
        blocks.append(Block(slice(place, end), covariance))
        place = end
    return Observations(shapes, row, observed, tuple(blocks))


def _checked_name(name: Any) -> str:
    if not isinstance(name, str):
        raise TypeError(f"data: an output called {name!r}; wanted a name, a string")
    return name


def real_array(name: str, value: Any) -> np.ndarray:
    """``value`` as a float64 array of its own, NaN where it is masked.

    Args:
        name: name of it in an error.
        value: real numbers.

    Raises:
        TypeError: anything else.

    >>> real_array("flow", np.ma.masked_array([1, 2], mask=[False, True]))
    array([ 1., nan])
    """
    if isinstance(value, np.ma.MaskedArray):
        value = np.ma.filled(value.astype(np.float64), np.nan)
    return np.array(arrays(name, np.asarray(value)), np.float64)


def _covariance(name: str, value: Any, seen: np.ndarray, shape: tuple[int, ...] = ()) -> Covariance:
    """The covariance of the observed ones of some numbers; errors are those of the solvers' checker, with this name."""
    number, known = len(seen), np.flatnonzero(seen)
    if isinstance(value, LowRankNoise):
        parts = (quantities(f"{name}.{part}", np.asarray(number)) for part, number in value._asdict().items())
        diagonal, factor = (np.array(part, np.float64) for part in parts)
        if factor.ndim != 2 or len(factor) != number or diagonal.shape not in ((), (1,), (number,)):
            raise ValueError(
                f"{name}: diagonal of shape {diagonal.shape} and factor of shape {factor.shape}; wanted a number or "
                f"({number},), and ({number}, K)"
            )
        diagonal = diagonal[known] if diagonal.shape == (number,) else diagonal
        return _renamed(name, lambda: as_noise_covariance(LowRankNoise(diagonal, factor[known])))
    found = np.array(quantities(name, np.asarray(value)), np.float64)
    if found.shape == (number, number):
        return _renamed(name, lambda: as_noise_covariance(found[np.ix_(known, known)]))
    if found.shape not in ((), (1,), (number,), shape):
        raise ValueError(
            f"{name}: shape {found.shape}; wanted a variance, {shape or (number,)} variances, a matrix of shape "
            f"({number}, {number}), or a LowRankNoise"
        )
    variances = np.broadcast_to(found.ravel(), number)[known]
    return _renamed(name, lambda: as_noise_covariance(variances))


def _renamed(name: str, make: Callable[[], Any]) -> Covariance:
    try:
        return make()
    except ValueError as error:
        raise ValueError(str(error).replace("noise_covariance", name, 1)) from None


def _whiten(covariance: Covariance, rows: np.ndarray) -> np.ndarray:
    if isinstance(covariance, Diagonal):
        return rows / covariance.scale
    if isinstance(covariance, Dense):
        return extra("scipy.linalg").solve_triangular(covariance.cholesky, rows.T, lower=True, check_finite=False).T
    scaled = rows / covariance.scale
    return scaled + ((scaled @ covariance.factor) @ covariance.core) @ covariance.factor.T


def _correlations(covariance: Covariance) -> Any:
    scale = np.sqrt(_variances(covariance))
    if isinstance(covariance, Diagonal):
        return np.ones(len(scale))
    if isinstance(covariance, Dense):
        factor = covariance.cholesky / scale[:, None]
        return factor @ factor.T
    share = covariance.scale / scale
    return LowRankNoise(share**2, covariance.factor * share[:, None])


def _variances(covariance: Covariance) -> np.ndarray:
    if isinstance(covariance, Diagonal):
        return np.asarray(covariance.scale) ** 2
    if isinstance(covariance, Dense):
        return np.sum(np.asarray(covariance.cholesky) ** 2, axis=1)
    scale = np.broadcast_to(covariance.scale, len(covariance.factor))
    return scale**2 * (1 + np.sum(np.asarray(covariance.factor) ** 2, axis=1))
