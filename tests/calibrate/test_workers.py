"""Members on threads, processes and by themselves: failures, time limits, second tries, and what is kept on disk."""

from __future__ import annotations

import concurrent.futures
import io
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calibrate import simulators

from eki_jax import calibrate

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pool() -> Iterator[Any]:
    with calibrate.process_pool(2) as pool:
        yield pool


@pytest.fixture(params=["here", "threads", "processes"])
def executor(request: pytest.FixtureRequest, pool: Any) -> Iterator[Any]:
    if request.param == "threads":
        with concurrent.futures.ThreadPoolExecutor(2) as threads:
            yield threads
    else:
        yield pool if request.param == "processes" else None


def members(*what: int) -> list[dict[str, Any]]:
    return [{"what": value, "x": float(i)} for i, value in enumerate(what)]


def test_results_come_in_the_members_order(executor: Any) -> None:
    results = calibrate.map_particles(simulators.square, [{"x": float(i)} for i in range(20)], executor)
    assert [result["y"] for result in results] == [float(i) ** 2 for i in range(20)]


def test_a_failed_member_takes_no_other_with_it(executor: Any) -> None:
    """Its error's type and last line are kept; a call of exit is a failure, and no end of the program."""
    results = calibrate.map_particles(simulators.moody, members(0, 1, 0, 4, 5, 6, 0), executor)
    assert [type(result) for result in results if isinstance(result, dict)] == [dict] * 3
    assert results[1].reason == "ValueError: negative depth"
    assert results[3].reason == "SystemExit: the mesh is empty"
    assert results[4].reason == "Unpicklable: a and b"
    assert results[5].reason == "returned None"


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_a_member_that_hangs_blocks_no_other(kind: str, pool: Any) -> None:
    """As many hang as there are workers; those after them run."""
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        executor = threads if kind == "threads" else pool
        started = time.monotonic()
        results = calibrate.map_particles(simulators.moody, members(2, 2, 0, 0), executor, timeout=1.0)
        assert time.monotonic() - started < 60
    end = "its process was ended" if kind == "processes" else "goes on on a thread that cannot be stopped"
    assert {results[0].reason, results[1].reason} == {f"TimeoutError: took longer than 1 s, and {end}"}
    assert [result["y"][0] for result in results[2:]] == [2.0, 3.0]


def test_a_hanging_member_without_a_pool() -> None:
    results = calibrate.map_particles(simulators.moody, members(2, 0), timeout=0.2)
    assert results[0].reason.startswith("TimeoutError: took longer than 0.2 s")
    assert results[1]["y"][0] == 1.0


def test_a_process_that_dies_takes_one_member(pool: Any) -> None:
    """The others go on, on a new process."""
    results = calibrate.map_particles(simulators.moody, members(3, 0, 3, 0), pool)
    assert results[0].reason == results[2].reason == "RuntimeError: its process died, exit code 7"
    assert [results[1]["y"][0], results[3]["y"][0]] == [1.0, 3.0]


@pytest.mark.slow
def test_a_timed_out_process_is_gone(pool: Any) -> None:
    """With the programs that it started."""
    mark = f"mark{os.getpid()}"
    sleeper = (
        f"import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)', '{mark}'])"
    )
    results = calibrate.map_particles(simulators.run_code, [{"code": sleeper}], pool, timeout=1.5)
    assert "its process was ended" in results[0].reason
    deadline = time.monotonic() + 10
    while is_running(mark) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not is_running(mark)


def is_running(words: str) -> bool:
    commands = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            commands.append(path.read_text())
        except OSError:
            continue
    return any(words in command and "subprocess" not in command for command in commands)


def test_processes_are_others_and_stay(pool: Any) -> None:
    """Two of them for ten members, and none is this one."""
    results = calibrate.map_particles(simulators.square, [{"x": float(i)} for i in range(10)], pool)
    found = {result["process"] for result in results}
    assert os.getpid() not in found
    assert len(found) <= 2


@pytest.mark.slow
def test_a_standard_pool_that_breaks_is_no_error() -> None:
    """It ends with the first process that dies; what that means is said of each member, and no result is lost."""
    import multiprocessing

    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as broken:
        first = calibrate.map_particles(simulators.moody, members(0), broken)
        rest = calibrate.map_particles(simulators.moody, members(3, 0), broken, retries=1)
    assert first[0]["y"][0] == 0.0
    assert all(result.reason.startswith("BrokenProcessPool: ") for result in rest)


def test_a_member_is_tried_again(executor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As often as asked for, and no more."""
    monkeypatch.setenv("COUNTING_FOLDER", str(tmp_path))
    fresh = calibrate.process_pool(1) if isinstance(executor, calibrate.processes.ProcessPool) else executor
    wanted = [{"x": 1.0, "failures": 1}, {"x": 2.0, "failures": 9}, {"x": 3.0, "failures": 0}]
    results = calibrate.map_particles(simulators.counting, wanted, fresh, retries=2)
    assert [results[0]["y"], results[2]["y"]] == [2.0, 6.0]
    assert results[1].reason == "OSError: the licence server is busy"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.0-0", "1.0-1", "2.0-0", "2.0-1", "2.0-2", "3.0-0"]
    if fresh is not executor:
        fresh.shutdown()


def test_results_on_disk_are_not_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor those of other members of another run; failures are not kept."""
    runs, kept = tmp_path / "runs", tmp_path / "kept"
    runs.mkdir()
    monkeypatch.setenv("COUNTING_FOLDER", str(runs))
    wanted = [{"x": 1.0, "failures": 0}, {"x": 2.0, "failures": 1}]
    first = calibrate.map_particles(simulators.counting, wanted, directory=kept)
    assert isinstance(first[1], calibrate.MemberFailed)
    assert len(list(kept.iterdir())) == 1
    second = calibrate.map_particles(simulators.counting, [*wanted, {"x": 3.0}], directory=kept)
    assert [float(result["y"]) for result in second] == [2.0, 4.0, 6.0]
    assert sorted(path.name for path in runs.iterdir()) == ["1.0-0", "2.0-0", "2.0-1", "3.0-0"]


def test_a_crash_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the third member: the first two are on disk."""
    monkeypatch.setenv("COUNTING_FOLDER", str(tmp_path))
    (tmp_path / "kept").mkdir()

    def interrupted(member: dict[str, Any]) -> dict[str, Any]:
        if member["x"] == 2.0 and "resumed" not in os.environ:
            raise KeyboardInterrupt
        return simulators.counting(member)

    wanted = [{"x": float(i)} for i in range(4)]
    with pytest.raises(KeyboardInterrupt):
        calibrate.map_particles(interrupted, wanted, directory=tmp_path / "kept")
    monkeypatch.setenv("resumed", "yes")
    results = calibrate.map_particles(interrupted, wanted, directory=tmp_path / "kept")
    assert [float(result["y"]) for result in results] == [0.0, 2.0, 4.0, 6.0]
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == ["0.0-0", "1.0-0", "2.0-0", "3.0-0"]


def test_a_damaged_file_is_computed_again(tmp_path: Path) -> None:
    """With a warning."""
    (result,) = calibrate.map_particles(simulators.square, [{"x": 3.0}], directory=tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:100])
    with pytest.warns(RuntimeWarning, match="a damaged one; .*it is computed again"):
        (again,) = calibrate.map_particles(simulators.square, [{"x": 3.0}], directory=tmp_path)
    assert again["y"] == result["y"] == 9.0


def test_a_bar_is_shown_on_standard_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """With what is done, and what failed; none unless it is asked for, or there is a terminal."""
    calibrate.map_particles(simulators.moody, members(0, 1))
    assert capsys.readouterr().err == ""
    calibrate.map_particles(simulators.moody, members(0, 1, 0), progress=True)
    shown = capsys.readouterr()
    assert "members 3/3" in shown.err
    assert "1 failed" in shown.err
    assert shown.out == ""
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    calibrate.map_particles(simulators.moody, members(0))
    assert "1/1" in terminal.getvalue()


def test_threads_run_side_by_side() -> None:
    """Two members that wait for each other."""
    barrier = threading.Barrier(2, timeout=30)
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        results = calibrate.map_particles(lambda member: {"y": barrier.wait()}, [{"x": 1.0}, {"x": 2.0}], threads)
    assert sorted(result["y"] for result in results) == [0, 1]


@pytest.mark.slow
def test_an_error_ends_the_processes() -> None:
    """And does not wait for what they run."""
    started = time.monotonic()

    def stopped() -> None:
        with calibrate.process_pool(1) as pool:
            pool.submit(time.sleep, 600)
            time.sleep(0.5)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        stopped()
    assert time.monotonic() - started < 30


@pytest.mark.slow
def test_a_script_without_a_guard_is_told(tmp_path: Path) -> None:
    """Processes import the script that starts them."""
    script = tmp_path / "script.py"
    script.write_text(
        "import numpy as np\nfrom eki_jax import calibrate\n"
        "def simulate(member):\n    return {'y': member['x']}\n"
        "with calibrate.process_pool(1) as pool:\n"
        "    print(calibrate.map_particles(simulate, [{'x': 1.0}], pool))\n"
    )
    done = subprocess.run([sys.executable, str(script)], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert "a process died before its first member, exit code 1; a script needs if __name__" in done.stdout


BAD = [
    ({"simulate": 3}, r"simulate: 3; wanted a function of one member"),
    ({"timeout": 0.0}, r"timeout: 0\.0; wanted a finite number > 0, or None for no limit"),
    ({"retries": -1}, r"retries: -1; wanted a whole number, at least 0"),
    (
        {"executor": 4},
        r"executor: 4, which has no submit; wanted a concurrent\.futures\.Executor, such as process_pool\(\), or None",
    ),
    ({"executor": concurrent.futures.ThreadPoolExecutor}, r"executor: <class .*wanted a concurrent\.futures\.Executor"),
    ({"simulate": lambda a, b: a}, r"simulate: .*does not take 1 arguments; wanted a function of one member"),
    ({"progress": "yes"}, r"progress: 'yes'; wanted True or False, or None"),
    ({"directory": 3}, r"directory: 3; wanted a path"),
    ({"directory": __file__}, r"directory: .* is a file; wanted a folder"),
    ({"members": 3}, r"members: a int; wanted a list of dicts of parameters"),
    ({"members": [{3: 1.0}], "directory": "kept"}, r"members\[0\]: a parameter called 3; wanted a name"),
    ({"members": [{"x": "a"}], "directory": "kept"}, r"members\[0\]\['x'\]: dtype <U1; wanted an array"),
    ({"members": [3.0]}, r"members\[0\]: a float; wanted a dict of parameters, as ask\(\) gives"),
]


@pytest.mark.parametrize(("settings", "words"), BAD)
def test_bad_arguments_are_named(settings: dict[str, Any], words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        calibrate.map_particles(**{"simulate": simulators.square, "members": [{"x": 1.0}]} | settings)


def test_a_local_function_is_not_for_processes(pool: Any) -> None:
    with pytest.raises(TypeError, match=r"simulate: .*wanted a function at the top level of a module"):
        calibrate.map_particles(lambda member: member, [{"x": 1.0}], pool)


def test_failures_that_are_returned_are_not_kept(tmp_path: Path) -> None:
    """A simulator that catches its own errors: NaN, or the exception."""
    for value in (float("nan"), ValueError("negative depth")):
        (result,) = calibrate.map_particles(lambda member, value=value: value, [{"x": 1.0}], directory=tmp_path)
        assert result is value
    assert not list(tmp_path.iterdir())


def test_results_that_cannot_be_kept(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"simulate: returned a float; wanted a dict of arrays, to keep it on disk"):
        calibrate.map_particles(lambda member: 1.0, [{"x": 1.0}], directory=tmp_path)
    with pytest.raises(TypeError, match=r"y: an array of dtype object; wanted one of numbers"):
        calibrate.map_particles(lambda member: {"y": [None]}, [{"x": 1.0}], directory=tmp_path)
    assert not list(tmp_path.iterdir())


def test_equal_members_have_one_name() -> None:
    """Other values, shapes and dtypes have others."""
    from eki_jax.calibrate.workers import content_hash

    assert content_hash({"a": 1.0, "b": np.ones(2)}) == content_hash({"b": np.ones(2), "a": np.float64(1.0)})
    others = [{"a": 1.0}, {"a": 2.0}, {"b": 1.0}, {"a": np.ones(1)}, {"a": np.float32(1.0)}, {"a": 1}]
    assert len({content_hash(member) for member in others}) == len(others)
