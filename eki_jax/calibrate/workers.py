"""Running a simulator for many members: on threads, processes or a cluster, with time limits, and kept on disk."""

from __future__ import annotations

import concurrent.futures
import hashlib
import pickle
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from eki_jax._checks import POSITIVE, arrays, flag, function, offers, real, whole
from eki_jax._checks import path as path_of
from eki_jax.calibrate.extras import extra
from eki_jax.calibrate.processes import ProcessPool
from eki_jax.calibrate.results import MemberFailed, failure, last_line
from eki_jax.calibrate.storage import read, write

Simulator = Callable[[dict[str, Any]], Any]


def map_particles(
    simulate: Simulator,
    members: Sequence[Mapping[str, Any]],
    executor: Executor | None = None,
    timeout: float | None = None,
    retries: int = 0,
    directory: Path | str | None = None,
    progress: bool | None = None,
) -> list[Any]:
    """The simulator's results for all members, in their order; a member that fails takes no other with it.

    ``executor`` is any :class:`concurrent.futures.Executor`: a :class:`concurrent.futures.ThreadPoolExecutor`,
    :func:`process_pool` of this package, ``dask.distributed.Client(...).get_executor()`` (the extra ``cluster``), or
    ``mpi4py.futures.MPIPoolExecutor()`` in a program started with ``mpiexec -n 9 python -m mpi4py.futures script.py``,
    where a rank that dies ends the program: only what ``directory`` keeps is there afterwards.

    A member that takes longer than ``timeout`` counts as failed and blocks nothing. In :func:`process_pool` its process
    is ended, whatever it is doing. Elsewhere it runs on a thread that is left behind: Python cannot stop a thread, so
    that it keeps its processor until it is done or its process ends, and code that holds Python's global lock cannot be
    timed out at all.

    Args:
        simulate: function from one member, a dict of parameters, to a dict of outputs. For processes and clusters it
            has to be at the top level of a module that the workers can import.
        members: members, as :meth:`Calibration.ask` gives them.
        executor: executor of the simulations; by default they run one after another, here.
        timeout: seconds that a member may take from when it starts; None for no limit.
        retries: number of times that a failed member is run again.
        directory: folder where every result is kept as soon as it is there, under a name made from the member's
            parameters; what is there is not computed again, after a crash or in another run. One folder for one
            simulator: another one's results would be taken for its own.
        progress: flag; True shows a bar on standard error (needs rich), False none; by default one is shown where
            standard error is a terminal and rich is there.

    Returns:
        A list of what ``simulate`` returned, with a :class:`MemberFailed`, which has the last line of the error, for
        each member that failed.

    Raises:
        TypeError: arguments of another kind; a simulator that a process pool cannot take; with ``directory``, results
            that are no dicts of arrays.
        ValueError: numbers out of their ranges.

    >>> def simulate(member):
    ...     if member["depth"] < 0:
    ...         raise ValueError("negative depth")
    ...     return {"flow": np.sqrt(member["depth"])}
    >>> with concurrent.futures.ThreadPoolExecutor(2) as pool:
    ...     results = map_particles(simulate, [{"depth": 4.0}, {"depth": -1.0}], pool)
    >>> results[0]["flow"], results[1]
    (np.float64(2.0), MemberFailed('ValueError: negative depth'))
    """
    function("simulate", simulate, "a function of one member", arguments=1)
    if timeout is not None:
        timeout = float(real("timeout", timeout, POSITIVE, or_="None for no limit"))
    retries = whole("retries", retries, 0)
    if progress is not None:
        flag("progress", progress, or_="None")
    if isinstance(members, str | bytes | Mapping) or not isinstance(members, Sequence):
        raise TypeError(f"members: a {type(members).__name__}; wanted a list of dicts of parameters, as ask() gives")
    for j, member in enumerate(members):
        if not isinstance(member, Mapping):
            raise TypeError(f"members[{j}]: a {type(member).__name__}; wanted a dict of parameters, as ask() gives")
        if directory is not None:
            content_hash(member, f"members[{j}]")  # raises for what has none
    if executor is not None:
        _check_executor(executor, simulate)
    store = _Store(directory)
    results: list[Any] = [store.found(member) for member in members]
    wanted = [j for j, result in enumerate(results) if result is None]
    with _bar(progress, len(members), len(members) - len(wanted)) as advance:
        for j, result in _finished(simulate, {j: dict(members[j]) for j in wanted}, executor, timeout, retries):
            results[j] = result
            if failure(result) is None:
                store.keep(members[j], result)
            advance(result)
    return results


def _finished(
    simulate: Simulator, members: dict[int, dict[str, Any]], executor: Executor | None, timeout: Any, retries: int
) -> Iterator[tuple[int, Any]]:
    """The members' results as they come, each once."""
    tries = dict.fromkeys(members, 0)
    if executor is None:
        for j, member in members.items():
            for _ in range(retries + 1):
                result = _outcome(partial(_run, simulate, member, timeout))
                if not isinstance(result, MemberFailed):
                    break
            yield j, result
        return

    def submit(j: int) -> Future[Any]:
        if isinstance(executor, ProcessPool):
            return executor.submit_within(timeout, simulate, members[j])
        try:
            return executor.submit(_run, simulate, members[j], timeout)
        except BrokenExecutor as error:  # what is there already is not to be lost with it
            future: Future[Any] = Future()
            future.set_exception(error)
            return future

    pending: dict[Future[Any], int] = {}
    try:
        for j in members:
            pending[submit(j)] = j
        while pending:
            finished, _ = concurrent.futures.wait(pending, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in finished:
                j = pending.pop(future)
                result = _outcome(future.result)
                if isinstance(result, MemberFailed) and tries[j] < retries:
                    tries[j] += 1
                    pending[submit(j)] = j
                else:
                    yield j, result
    finally:
        for future in pending:
            future.cancel()


def _outcome(call: Callable[[], Any]) -> Any:
    try:
        result = call()
    except MemberFailed as error:
        return error
    except Exception as error:
        failed = MemberFailed(last_line(error))
        failed.__cause__ = error
        return failed
    return MemberFailed("returned None") if result is None else result


def _run(simulate: Simulator, member: dict[str, Any], timeout: float | None) -> Any:
    """The simulator's result, or TimeoutError while it goes on on a thread that nobody waits for."""
    if timeout is None:
        return _guarded(simulate, member)
    found: Future[Any] = Future()

    def body() -> None:
        try:
            found.set_result(_guarded(simulate, member))
        except BaseException as error:
            found.set_exception(error)

    threading.Thread(target=body, daemon=True).start()
    try:
        return found.result(timeout)
    except TimeoutError:
        raise TimeoutError(f"took longer than {timeout:g} s, and goes on on a thread that cannot be stopped") from None


def _guarded(simulate: Simulator, member: dict[str, Any]) -> Any:
    """Errors as ones that every executor can carry: some of other packages cannot be pickled, and break a pool."""
    try:
        return simulate(member)
    except (Exception, SystemExit) as error:
        raise MemberFailed(last_line(error)) from error


class _Store:
    """Results on disk by a hash of the parameters; nothing where there is no folder."""

    def __init__(self, directory: Path | str | None) -> None:
        self._directory = None if directory is None else path_of("directory", directory)
        if self._directory is not None:
            if self._directory.exists() and not self._directory.is_dir():
                raise ValueError(f"directory: {self._directory} is a file; wanted a folder, or a name for a new one")
            self._directory.mkdir(parents=True, exist_ok=True)

    def found(self, member: Mapping[str, Any]) -> dict[str, np.ndarray] | None:
        if self._directory is None or not (path := self._path(member)).exists():
            return None
        try:
            return read(path)[1]
        except ValueError as error:
            warnings.warn(f"directory: {error}; it is computed again", RuntimeWarning, stacklevel=3)
            return None

    def keep(self, member: Mapping[str, Any], result: Any) -> None:
        if self._directory is None:
            return
        if not isinstance(result, Mapping):
            raise TypeError(
                f"simulate: returned a {type(result).__name__}; wanted a dict of arrays, to keep it on disk"
            )
        about = {name: np.asarray(value).tolist() for name, value in member.items()}
        write(self._path(member), {"parameters": about}, {name: np.asarray(value) for name, value in result.items()})

    def _path(self, member: Mapping[str, Any]) -> Path:
        assert self._directory is not None
        return self._directory / f"{content_hash(member)}.npz"


def content_hash(member: Mapping[str, Any], name: str = "member") -> str:
    """A name made from the parameters, the same for equal ones in any order.

    Args:
        member: parameters by their names.
        name: name of the member in an error.

    Raises:
        TypeError: a parameter that is no number and no array of them, or that has no name.

    >>> content_hash({"a": 1.0, "b": 2.0}) == content_hash({"b": np.float64(2.0), "a": np.ones(())})
    True
    """
    digest = hashlib.sha256()
    for key in member:
        if not isinstance(key, str):
            raise TypeError(f"{name}: a parameter called {key!r}; wanted a name, a string")
        arrays(f"{name}[{key!r}]", np.asarray(member[key]))
    for key in sorted(member):
        value = np.ascontiguousarray(member[key])
        digest.update(repr((key, np.shape(member[key]), value.dtype.str)).encode() + value.tobytes())
    return digest.hexdigest()[:32]


def _check_executor(executor: Any, simulate: Simulator) -> None:
    offers("executor", executor, ("submit",), "a concurrent.futures.Executor, such as process_pool(), or None")
    if isinstance(executor, ProcessPool | concurrent.futures.ProcessPoolExecutor):
        try:
            pickle.dumps(simulate)
        except Exception as error:
            raise TypeError(
                f"simulate: {last_line(error)}; wanted a function at the top level of a module, which processes can "
                "import"
            ) from None


@contextmanager
def _bar(shown: bool | None, total: int, done: int) -> Iterator[Callable[[Any], None]]:
    """A bar on standard error with what is done and what failed; standard output stays the caller's."""
    if shown is None:
        shown = sys.stderr.isatty() and _has_rich()
    if not shown:
        yield lambda result: None
        return
    rich, console = extra("rich.progress"), extra("rich.console").Console(stderr=True)
    columns = (
        rich.TextColumn("members {task.completed}/{task.total}"),
        rich.BarColumn(),
        rich.TextColumn("{task.description}"),
        rich.TimeElapsedColumn(),
        rich.TextColumn("left:"),
        rich.TimeRemainingColumn(),
    )
    failed = 0
    with rich.Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=total, completed=done)

        def advance(result: Any) -> None:
            nonlocal failed
            failed += isinstance(result, MemberFailed)
            bar.update(task, advance=1, description=f"{failed} failed" if failed else "")

        yield advance


def _has_rich() -> bool:
    try:
        extra("rich.progress")
    except ImportError:
        return False
    return True
