"""What an experiment is going to do: its settings, and a job for each of its curves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Job(NamedTuple):
    """One curve.

    Attributes:
        sizes: numbers of ``images`` and, where there are some, of ``test_images``.
        train: function that returns the curve.
    """

    sizes: dict[str, int]
    train: Callable[[], dict[str, Any]]


class Plan(NamedTuple):
    """An experiment.

    Attributes:
        settings: what all of its curves share.
        jobs: its curves, by their names.
    """

    settings: dict[str, Any]
    jobs: dict[str, Job]
