"""Timing of a function by wall clock, processor time and peak memory. Standard library only: every peer uses it."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from typing import Any


def measure(run: Callable[[], Any], repeats: int, baseline: int | None = None) -> dict[str, Any]:
    """Time ``run`` after two warm-up calls (the second compiles for the types that the first returned, if need be).

    Where a call takes over a minute, one warm-up call and two timed ones are enough.

    Args:
        run: what to time; it returns when the work is done.
        repeats: the least number of timed calls; short ones are repeated for two seconds, up to a hundred times.
        baseline: resident bytes before the problem's data existed; the peak is given above it.

    Returns:
        ``seconds`` and ``processor_seconds`` of every call, their medians, ``warm_up`` seconds and ``peak_bytes``.
    """
    reset_peak()
    start = time.perf_counter()
    run()
    warm_up = time.perf_counter() - start
    if warm_up > 60:
        repeats = min(repeats, 2)
    else:
        run()
    seconds, processor = [], []
    while len(seconds) < repeats or (sum(seconds) < 2 and len(seconds) < 100):
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        seconds.append(time.perf_counter() - wall)
        processor.append(time.process_time() - cpu)
    return {
        "seconds": seconds,
        "median": median(seconds),
        "processor_seconds": processor,
        "processor_median": median(processor),
        "warm_up": warm_up,
        "peak_bytes": None if baseline is None else peak() - baseline,
    }


def median(values: list[float]) -> float:
    """The middle value, or the mean of the two middle ones."""
    ordered, half = sorted(values), len(values) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def resident() -> int:
    """Bytes of memory that this process holds now."""
    return _status("VmRSS") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak() -> int:
    """The most bytes that it held since :func:`reset_peak` (since its start where the system cannot reset it)."""
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reset_peak() -> None:
    """Let :func:`peak` start again."""
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
    except OSError:
        pass


def serve(main: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Run ``main`` on the JSON object of the command line and print its result as the last line."""
    print(json.dumps(main(json.loads(sys.argv[1]))), flush=True)


def _status(name: str) -> int:
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            for line in file:
                if line.startswith(name + ":"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0
