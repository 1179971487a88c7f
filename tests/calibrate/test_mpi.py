"""Members on the ranks of an MPI program, one of which dies."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from calibrate import mpi_program

ROOT = Path(__file__).parents[2]
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
MPIEXEC = shutil.which("mpiexec", path=PATH)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("mpi4py") is None or MPIEXEC is None,
        reason="needs mpi4py and mpiexec, which `pip install mpi4py mpich` brings",
    ),
]


def ranks(what: str, folder: Path, **variables: str) -> tuple[Any, int]:
    """What the program found on three ranks, None where it ended before, and its exit status."""
    path = folder / "found.json"
    program = [sys.executable, "-m", "mpi4py.futures", mpi_program.__file__, what, str(path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])} | variables
    done = subprocess.run([str(MPIEXEC), "-n", "3", *program], env=environment, cwd=folder, timeout=300)
    return json.loads(path.read_text()) if path.exists() else None, done.returncode


def test_ranks_give_the_serial_results(tmp_path: Path) -> None:
    """A whole calibration, to the last bit; two ranks run the members, and one the calibration."""
    (found, processes), status = ranks("calibrated", tmp_path)
    assert status == 0
    assert found == mpi_program.calibrated(None)
    assert processes == 3


def test_a_failed_member_of_a_rank(tmp_path: Path) -> None:
    """It raises, exits, hangs or returns nothing, and takes no other with it; the program ends."""
    found, status = ranks("failing", tmp_path)
    assert status == 0
    hung = "TimeoutError: took longer than 2 s, and goes on on a thread that cannot be stopped"
    wanted = ["ValueError: negative depth", hung, "SystemExit: the mesh is empty", "Unpicklable: a and b"]
    assert found[1:-1] == [*wanted, "returned None"]
    assert [line[:4] for line in (found[0], found[-1])] == ["{'y'", "{'y'"]


def test_a_rank_that_dies_ends_the_program(tmp_path: Path) -> None:
    """As MPI has it; started again, the program computes nothing twice but the member that was not done."""
    counts = {"COUNTING_FOLDER": str(tmp_path / "runs")}
    (tmp_path / "runs").mkdir()
    found, status = ranks("dying", tmp_path, **counts, DYING="yes")
    assert (found, status != 0) == (None, True)
    found, status = ranks("dying", tmp_path, **counts)
    assert (found, status) == ([0.0, 2.0, 4.0, 6.0, 8.0, 10.0], 0)
    runs = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert runs == ["0.0-0", "1.0-0", "2.0-0", "2.0-1", "3.0-0", "4.0-0", "5.0-0"]
