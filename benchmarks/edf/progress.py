"""Long experiments in pieces: what was done is kept, and an interrupted run goes on from there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.reporting import plain, save_result


def collect(out: Path, settings: dict[str, Any], jobs: dict[str, Callable[[], dict[str, Any]]]) -> dict[str, Any]:
    """The jobs' results by name, in order.

    ``out`` is written after every job. Results that an interrupted run with the same settings left there are taken
    as they are; those of a finished run, or of other settings, are not.
    """
    done = _left_behind(out, settings)
    results = {}
    for name, job in jobs.items():
        results[name] = done[name] if name in done else job()
        save_result(out, {**settings, "complete": False, "done": {**done, **results}})
        print(f"{name}: done", flush=True)
    return results


def _left_behind(out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    if not out.is_file():
        return {}
    found = json.loads(out.read_text(encoding="utf-8"))
    same = all(found.get(key) == value for key, value in plain(settings).items())
    return found["done"] if same and found.get("complete") is False else {}
