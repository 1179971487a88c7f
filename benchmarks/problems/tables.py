"""The small data sets of the paper: voting records and two time series."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.problems.files import Source, locate, read
from benchmarks.problems.idx import DamagedFile

Folder = Path | str | None

VOTES = Source(
    "votes",
    "house-votes-84.data",
    "https://archive.ics.uci.edu/ml/machine-learning-databases/voting-records/house-votes-84.data",
    content_md5="4497c37943e4a65979807a7f6bd3f2b1",
    size=20_000,
)
_PARTIES = {"democrat": 267, "republican": 168}  # how many of each there are
_SERIES = "https://raw.githubusercontent.com/jbrownlee/Datasets/master/"
TEMPERATURES = Source(
    "time_series",
    "daily-min-temperatures.csv",
    _SERIES + "daily-min-temperatures.csv",
    content_md5="5d343d678173fadff7c8474073145e73",
    size=100_000,
)
SUNSPOTS = Source(
    "time_series",
    "monthly-sunspots.csv",
    _SERIES + "monthly-sunspots.csv",
    content_md5="dee19278d812667c0933bfcccbe4d0b2",
    size=100_000,
)


class Votes(NamedTuple):
    """The US House of Representatives in 1984.

    Attributes:
        records: float64, shape ``(435, 16)``: +1 for, -1 against, 0 not known.
        labels: int32, shape ``(435,)``: +1 Democrat, -1 Republican.
    """

    records: np.ndarray
    labels: np.ndarray


class Series(NamedTuple):
    """A univariate series split one step ahead: the target of every value is the next one.

    Attributes:
        train_x: float32, shape ``(T, 1)``, scaled to [0, 1].
        train_y: The values that follow, same shape.
        test_x: The rest of the series, scaled as the training part.
        test_y: The values that follow.
        minimum: Of the training part, in the series' own unit.
        maximum: Of the training part.
    """

    train_x: np.ndarray
    train_y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray
    minimum: float
    maximum: float


def votes(data: Folder = None, *, verify: bool = True) -> Votes:
    """Voting records as in section 5.2.1 of the paper, not normalised.

    Raises:
        MissingFile: The file is missing and could not be downloaded.
        DamagedFile: It is not the published file, a row is not a party and 16 votes, or there are not 435 of them.
    """
    name = str(locate(VOTES, data))
    rows = list(csv.reader(io.StringIO(read(VOTES, data, verify=verify).decode("ascii", "replace"))))
    parties, values = {"democrat": 1, "republican": -1}, {"y": 1.0, "n": -1.0, "?": 0.0}
    rows = [row for row in rows if row]
    for number, row in enumerate(rows, 1):
        if len(row) != 17 or row[0] not in parties or not set(row[1:]) <= set(values):
            raise DamagedFile(f"{name}: row {number} is {','.join(row)!r}; wanted a party, then 16 of y, n, ?")
    counts = {party: sum(row[0] == party for row in rows) for party in parties}
    if counts != _PARTIES:
        raise DamagedFile(f"{name}: {len(rows)} rows, {counts}; wanted {sum(_PARTIES.values())}, {_PARTIES}")
    return Votes(
        np.array([[values[vote] for vote in row[1:]] for row in rows]).reshape(-1, 16),
        np.array([parties[row[0]] for row in rows], np.int32),
    )


def temperatures(data: Folder = None, *, verify: bool = True) -> Series:
    """Daily minimum temperatures of Melbourne, 1981 to 1990 (Celsius); the first 3,001 values train."""
    return one_step_ahead(_column(TEMPERATURES, 3650, data, verify), 3001)


def sunspots(data: Folder = None, *, verify: bool = True) -> Series:
    """Monthly sunspot numbers of Zürich, 1749 to 1983; the first 2,301 values train."""
    return one_step_ahead(_column(SUNSPOTS, 2820, data, verify), 2301)


def one_step_ahead(values: np.ndarray, train: int) -> Series:
    """Scale by the minimum and maximum of the first ``train`` values, and pair every value with the next one.

    Raises:
        ValueError: There are fewer than ``train + 2`` values, or the training part is constant.
    """
    if len(values) < train + 2 or train < 2:
        raise ValueError(f"train: {train} of {len(values)} values; wanted at least two on each side of the split")
    minimum, maximum = float(values[:train].min()), float(values[:train].max())
    if maximum <= minimum:
        raise ValueError(f"values: the training part is constant ({minimum}); it cannot be scaled to [0, 1]")
    scaled = ((values - minimum) / (maximum - minimum)).astype(np.float32)[:, None]
    first, rest = scaled[:train], scaled[train:]
    return Series(first[:-1], first[1:], rest[:-1], rest[1:], minimum, maximum)


def _column(source: Source, count: int, data: Folder, verify: bool) -> np.ndarray:
    name = str(locate(source, data))
    rows = list(csv.reader(io.StringIO(read(source, data, verify=verify).decode("utf-8", "replace"))))
    rows = [row for row in rows[1:] if row]
    try:
        values = np.array([float(row[1]) for row in rows])
    except (IndexError, ValueError) as error:
        raise DamagedFile(f"{name}: a row that is not a date and a number ({error})") from error
    if len(values) != count or not np.isfinite(values).all():
        finite = int(np.isfinite(values).sum())
        raise DamagedFile(f"{name}: {len(values)} values, {finite} of them numbers; wanted {count} numbers")
    return values
