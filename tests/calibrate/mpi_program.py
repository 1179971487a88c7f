"""A program for ``mpiexec -n 3 python -m mpi4py.futures``: a calibration, and members that fail, to a JSON file."""

from __future__ import annotations

import json
import os
import sys
import time
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

from calibrate import simulators

from eki_jax import calibrate


def calibrated(executor: Executor | None) -> list[Any]:
    """The reports of a small calibration as lines, and its last members."""
    calibration = calibrate.Calibration({"x": calibrate.normal(1.0, 1.0)}, {"y": [2.0, 1.0]}, 0.1, particles=8)
    lines = []
    while not calibration.done:
        results = calibrate.map_particles(simulators.slow_line, calibration.ask(), executor)
        lines.append(str(calibration.tell(results)))
    return [lines, calibration.posterior().samples["x"].tolist()]


def dying(member: dict[str, Any]) -> dict[str, Any]:
    """Ends its process where it should, when the others have had their time."""
    found = simulators.counting(member)
    if member["x"] == 2.0 and os.environ.get("DYING"):
        time.sleep(2.0)
        os._exit(7)
    return found


def main(what: str, path: str) -> None:
    from mpi4py.futures import MPIPoolExecutor

    found: Any
    with MPIPoolExecutor() as executor:
        if what == "calibrated":
            processes = [result["process"] for result in run(simulators.square, 20, executor)]
            found = [calibrated(executor), len({os.getpid(), *processes})]
        elif what == "failing":
            members = [{"what": what, "x": float(i)} for i, what in enumerate([0, 1, 2, 4, 5, 6, 0])]
            results = calibrate.map_particles(simulators.moody, members, executor, timeout=2.0)
            found = [str(getattr(result, "reason", result)) for result in results]
        else:
            found = [float(result["y"]) for result in run(dying, 6, executor, directory=Path(path).parent / "kept")]
        Path(path).write_text(json.dumps(found))


def run(simulate: Any, number: int, executor: Executor, **settings: Any) -> list[Any]:
    return calibrate.map_particles(simulate, [{"x": float(i)} for i in range(number)], executor, **settings)


if __name__ == "__main__":
    main(*sys.argv[1:])
