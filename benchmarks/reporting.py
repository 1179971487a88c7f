"""What every run leaves behind: one JSON object with its numbers and where they came from."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import math
import os
import platform
from pathlib import Path
from typing import Any

import jax
import numpy as np

from eki_jax.training.files import write_text

RESULTS = Path(__file__).parent / "results"
#: What a processor's name says of one that multiplies matrices in bfloat16 by itself.
UNITS = "AMX units"
_PACKAGES = ("jax", "jaxlib", "numpy", "optax", "flax")


def environment() -> dict[str, Any]:
    """Day, versions, device and processor count: what a reader needs to judge a number."""
    device = jax.devices()[0]
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": f"{device.platform}: {device.device_kind}",
        "device_count": jax.device_count(),
        "processor": processor(),
        "processors": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
    }


def processor() -> str:
    """The processor's name, and its matrix units for bfloat16 if it has them, where the system says so; else its kind.

    >>> bool(processor())
    True
    """
    try:
        lines = [line.split(":", 1) for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()]
    except OSError:
        return platform.processor() or platform.machine()
    found = {line[0].strip(): line[1].strip() for line in lines if len(line) == 2}
    name = found.get("model name") or platform.machine()
    return f"{name}, {UNITS}" if "amx_bf16" in found.get("flags", "").split() else name


def save_result(path: Path | str, payload: dict[str, Any]) -> Path:
    """Write ``payload`` with its environment to ``path`` (JSON): all of it, or nothing; returns the path."""
    path = Path(path)
    text = json.dumps(plain({**payload, "environment": environment()}), indent=1)
    write_text(path, text + "\n")
    return path


def print_result(payload: dict[str, Any]) -> None:
    """Print ``payload`` as one line of JSON: the last line of a run on standard output."""
    print(json.dumps(plain(payload)), flush=True)


def plain(value: Any) -> Any:
    """``value`` as JSON knows it: arrays as lists, numbers that are not finite as ``None``."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray | jax.Array | np.generic):
        return plain(value.tolist())
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
