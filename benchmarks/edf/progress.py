"""Long experiments in pieces: what was done is kept, and an interrupted run goes on from there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.reporting import plain, save_result


def collect(out: Path, settings: dict[str, Any], jobs: dict[str, Callable[[], dict[str, Any]]]) -> dict[str, Any]:
    """The jobs' results by name, in order.

    What is done so far is in :func:`partial_file` after every job. Results that an interrupted run with the same
    settings left there are taken as they are.
    """
    done = _left_behind(out, settings)
    results = {}
    for name, job in jobs.items():
        results[name] = done[name] if name in done else job()
        save_result(partial_file(out), {**settings, "done": {**done, **results}})
        print(f"{name}: done", flush=True)
    return results


def partial_file(out: Path) -> Path:
    """Where an unfinished experiment keeps its results until ``out`` is written."""
    return out.with_suffix(".partial")


def _left_behind(out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    if not partial_file(out).is_file():
        return {}
    found = json.loads(partial_file(out).read_text(encoding="utf-8"))
    return found["done"] if all(found.get(key) == value for key, value in plain(settings).items()) else {}
