"""Running one measurement in a process of its own, so that its peak memory is its own."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.harness.peers import Unavailable, ask, python_of

_HERE = Path(__file__).parent
_SCRIPTS = {
    "torch": "torch_step.py",
    "iterative_ensemble_smoother": "ies_update.py",
    "cuthbert": "cuthbert_update.py",
    "pyesmda": "pyesmda_update.py",
    "dapper": "dapper_update.py",
    "evosax": "evosax_generation.py",
}


def ours(task: dict[str, Any], limit: float) -> dict[str, Any]:
    """A task of :mod:`benchmarks.performance.worker`, in this environment."""
    return _run([sys.executable, "-m", "benchmarks.performance.worker"], task, limit, _HERE.parent.parent)


def peer(name: str, task: dict[str, Any], folder: Path, limit: float) -> dict[str, Any]:
    """A task of another library, in its own environment; ``{"skipped": reason}`` where it cannot run."""
    try:
        python = python_of(name, folder)
    except Unavailable as error:
        return {"skipped": str(error)}
    return _run([str(python), str(_HERE / "peers" / _SCRIPTS[name])], task, limit, _HERE / "peers")


def _run(command: list[str], task: dict[str, Any], limit: float, folder: Path) -> dict[str, Any]:
    try:
        return ask([*command, json.dumps(task)], folder, limit=limit, MPLBACKEND="agg")
    except Unavailable as error:
        late = {"more_than": limit / (task.get("repeats", 1) + 2)} if error.is_late else {}
        return {"skipped": str(error), **late}
