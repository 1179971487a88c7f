"""Commands in processes that can be killed: forked from one that has imported the packages, and compiled nothing."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
PACKAGES = ["matplotlib.figure", "matplotlib.backends.backend_agg", "orbax.checkpoint", "sklearn.datasets"]
COMMANDS = ["benchmarks.train", "benchmarks.paper.classification", "benchmarks.forward_budget.cli"]
CONTEXT.set_forkserver_preload([*PACKAGES, *COMMANDS])


def command(folder: Path, *argv: str) -> None:
    """``python -m benchmarks`` in a folder."""
    _enter(folder)
    from benchmarks.__main__ import main

    sys.exit(main(list(argv)))


def table(folder: Path) -> None:
    """A table of one cell that leaves checkpoints, as those on all images do."""
    _enter(folder)
    from benchmarks.paper.classification import Cell, run_table

    cell = Cell("digits-dnn", "eki-r", "digits", epochs=3, batch=300, particles=6)
    run_table("t", lambda preset: [cell], "full", Path("out"), None, 0)


def run(target: Callable[..., None], *args: Any, until: float | None = None) -> int | None:
    """Run to the end, or kill by SIGKILL after so many seconds; the exit code, or None if it was killed."""
    process = CONTEXT.Process(target=target, args=args)
    process.start()
    process.join(until)
    if process.exitcode is None:
        process.kill()
        process.join()
        return None
    return process.exitcode


def together(*calls: tuple[Any, ...]) -> list[int | None]:
    """The exit codes of some that begin in the same moment, each a target and its arguments."""
    processes = [CONTEXT.Process(target=target, args=args) for target, *args in calls]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def seconds(target: Callable[..., None], *args: Any) -> float:
    """How long it takes to its end."""
    begun = time.perf_counter()
    assert run(target, *args) == 0
    return time.perf_counter() - begun


def _enter(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
