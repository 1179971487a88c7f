"""Long experiments in pieces: what was done is kept, and an interrupted run goes on from there."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.harness.command import say
from benchmarks.harness.store import Runs, differences
from benchmarks.reporting import plain


def collect(out: Path, settings: dict[str, Any], jobs: dict[str, Callable[[], dict[str, Any]]]) -> dict[str, Any]:
    """The jobs' results by name, in order; those that an interrupted run with the same settings left are taken."""
    runs, wanted, results = Runs(_folder(out)), {"settings": plain(settings)}, {}
    for name, job in jobs.items():
        trouble = lambda found: differences(found, wanted) or "found"[: 0 if "found" in found else None]
        results[name] = runs.get(name, trouble, lambda job=job: {**wanted, "found": job()})["found"]
        say(f"{name}: done")
    return results


def forget(out: Path) -> None:
    """Remove what :func:`collect` kept, once ``out`` is written."""
    shutil.rmtree(_folder(out), ignore_errors=True)


def _folder(out: Path) -> Path:
    return out.with_suffix(".unfinished")
