"""Running one measurement in a process of its own, so that its peak memory is its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.performance.environments import Unavailable, python_of

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
    variables = {key: value for key, value in os.environ.items() if key not in ("XLA_FLAGS", "PYTHONPATH")}
    variables["MPLBACKEND"] = "agg"
    try:
        done = subprocess.run(
            [*command, json.dumps(task)],
            cwd=folder,
            env=variables,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=limit,
        )
    except subprocess.TimeoutExpired:
        return {"skipped": f"more than {limit:.0f} s in all", "more_than": limit / (task.get("repeats", 1) + 2)}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        return {"skipped": "killed, out of memory" if done.returncode == -9 else last[:300]}
    return json.loads(done.stdout.strip().splitlines()[-1])
