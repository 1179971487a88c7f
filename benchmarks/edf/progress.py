"""Long experiments in pieces: what was done is kept, and an interrupted run goes on from there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.harness.command import say
from benchmarks.harness.store import UNFINISHED, Runs, differences
from benchmarks.reporting import plain


def collect(out: Path, settings: dict[str, Any], jobs: dict[str, Callable[[], dict[str, Any]]]) -> dict[str, Any]:
    """The jobs' results by name, in order; those that an interrupted run with the same settings left are taken.

    They are lines of the file of the result, until it is written.
    """
    runs, wanted, results = Runs(out, UNFINISHED), {"settings": plain(settings)}, {}
    for name, job in jobs.items():
        trouble = lambda found: differences(found, wanted) or "found"[: 0 if "found" in found else None]
        results[name] = runs.get(name, trouble, lambda job=job: {**wanted, "found": job()})["found"]
        say(f"{name}: done")
    return results
