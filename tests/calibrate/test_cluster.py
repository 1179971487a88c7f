"""Members on a cluster of real processes, one of which is killed while they run."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calibrate import simulators

from eki_jax import calibrate

pytestmark = [
    pytest.mark.slow,
    # Of sockets and loops that the cluster's own threads leave to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture
def client() -> Iterator[Any]:
    import distributed

    settings = {"n_workers": 2, "threads_per_worker": 1, "processes": True, "dashboard_address": None}
    with distributed.LocalCluster(**settings) as cluster, distributed.Client(cluster) as client:
        yield client


def kill_one(client: Any, folder: Path, killed: list[int]) -> None:
    """End a worker without a warning, as soon as there is a first result."""
    while not list(folder.glob("*.npz")):
        time.sleep(0.05)
    pid = next(iter(client.run(os.getpid).values()))
    os.kill(pid, signal.SIGKILL)
    killed.append(pid)


def test_a_killed_worker_changes_nothing(client: Any, tmp_path: Path) -> None:
    """A whole calibration: its members' results, its reports and its posterior are those of an undisturbed one."""
    ends, killed = [], []
    for name in ("disturbed", "undisturbed"):
        calibration = calibrate.Calibration(
            {"x": calibrate.normal(1.0, 1.0)}, {"y": [2.0, 1.0]}, 0.1, particles=12, most_iterations=30
        )
        if name == "disturbed":
            killer = threading.Thread(target=kill_one, args=(client, tmp_path / "disturbed", killed))
            killer.start()
        reports = []
        while not calibration.done:
            results = calibrate.map_particles(
                simulators.slow_line,
                calibration.ask(),
                executor=client.get_executor() if name == "disturbed" else None,
                timeout=60.0,
                directory=tmp_path / name,
            )
            reports.append(calibration.tell(results))
        ends.append((reports, calibration.posterior().samples["x"]))
    killer.join()
    assert len(killed) == 1
    assert ends[0][0] == ends[1][0]
    assert all(report.failed == 0 for report in ends[0][0])
    np.testing.assert_array_equal(ends[0][1], ends[1][1])


def test_a_hanging_member_of_a_cluster(client: Any) -> None:
    """It is timed out, and its worker takes the next one."""
    members = [{"what": what, "x": float(i)} for i, what in enumerate([2, 2, 0, 1, 0])]
    results = calibrate.map_particles(simulators.moody, members, client.get_executor(), timeout=2.0)
    assert all(result.reason.startswith("TimeoutError: took longer than 2 s") for result in results[:2])
    assert results[3].reason == "ValueError: negative depth"
    assert [results[2]["y"][0], results[4]["y"][0]] == [2.0, 4.0]
