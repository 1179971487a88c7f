"""Processes of which each runs one member at a time, and can be ended alone."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import pickle
import queue
import signal
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Executor, Future
from contextlib import suppress
from typing import Any

from eki_jax._checks import whole
from eki_jax.calibrate.results import MemberFailed, last_line


def process_pool(workers: int | None = None) -> ProcessPool:
    """Processes that run members, each on its own: a crash or a time limit ends one process and one member.

    They are started by "spawn", since a fork of a process in which JAX runs can hang. A script that uses them has to
    start by ``if __name__ == "__main__":``, as with all processes of Python. Use it in a ``with`` statement, around the
    whole calibration: starting a process takes seconds.

    Args:
        workers: number of processes; by default that of the processors.

    Returns:
        An :class:`concurrent.futures.Executor` for :func:`map_particles`.

    Raises:
        ValueError: fewer than one.

    >>> with process_pool(1) as pool:
    ...     pool.submit(abs, -3).result()
    3
    """
    return ProcessPool(workers)


class ProcessPool(Executor):
    """What :func:`process_pool` returns.

    Args:
        workers: number of processes; by default that of the processors.
    """

    def __init__(self, workers: int | None = None) -> None:
        number = (os.cpu_count() or 1) if workers is None else whole("workers", workers)
        first = _Worker()  # at once: in a script without its guard this raises, before anything is lost
        self._threads = concurrent.futures.ThreadPoolExecutor(number)
        self._workers = [first]
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._idle.put(first)
        self._broken = ""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Run ``fn(*args, **kwargs)`` on a process.

        Args:
            fn: function at the top level of a module.
            *args: arguments, which pickle knows.
            **kwargs: arguments by name.
        """
        return self.submit_within(None, fn, *args, **kwargs)

    def submit_within(self, timeout: float | None, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """The same, with an end to the process that takes longer.

        Args:
            timeout: seconds, or None for no limit.
            fn: function at the top level of a module.
            *args: arguments, which pickle knows.
            **kwargs: arguments by name.
        """
        return self._threads.submit(self._call, timeout, pickle.dumps((fn, args, kwargs)))

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the processes.

        Args:
            wait: flag; False ends them even where they are running something.
            cancel_futures: flag; True drops what has not begun.
        """
        if not wait:
            self._broken = "the pool was shut down"
            for worker in list(self._workers):
                worker.end()
        self._threads.shutdown(wait=wait, cancel_futures=cancel_futures)
        for worker in list(self._workers):
            worker.end()

    def __exit__(self, kind: Any, value: Any, traceback: Any) -> None:
        """End the processes; after an error or Ctrl-C without waiting for what they run."""
        self.shutdown(wait=kind is None, cancel_futures=kind is not None)

    def _call(self, timeout: float | None, task: bytes) -> Any:
        if self._broken:
            raise BrokenExecutor(self._broken)
        try:
            worker = self._idle.get_nowait()
        except queue.Empty:
            worker = _Worker()
            self._workers.append(worker)
        try:
            return worker.call(timeout, task)
        except BrokenExecutor as error:
            self._broken = str(error)
            raise
        finally:
            if worker.is_alive:
                self._idle.put(worker)
            else:
                self._workers.remove(worker)


class _Worker:
    """A process and the pipe to it."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        self._has_begun = False

    @property
    def is_alive(self) -> bool:
        return self._process.is_alive()

    def call(self, timeout: float | None, task: bytes) -> Any:
        try:
            self._pipe.send_bytes(task)
            self._pipe.recv_bytes()  # it begins: what it imported is not the member's time
            self._has_begun = True
            if not self._pipe.poll(timeout):
                self.end()
                raise TimeoutError(f"took longer than {timeout:g} s, and its process was ended")
            succeeded, value = pickle.loads(self._pipe.recv_bytes())
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self._process.join(5)
            code = self._process.exitcode
            self.end()
            if not self._has_begun:  # and so would all others
                hint = "a script needs if __name__ == '__main__': around what it runs"
                raise BrokenExecutor(f"a process died before its first member, exit code {code}; {hint}") from None
            raise RuntimeError(f"its process died, exit code {code}") from None
        if not succeeded:
            raise MemberFailed(value)
        return value

    def end(self) -> None:
        pid = self._process.pid
        if hasattr(os, "killpg") and pid and self._process.exitcode is None:  # with the programs that it started
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)
        self._process.kill()
        self._process.join()
        self._pipe.close()


def _serve(pipe: Any) -> None:
    """What a process does: tasks, one after another, until the pipe is closed."""
    if hasattr(os, "setsid"):
        os.setsid()
    while True:
        try:
            task = pipe.recv_bytes()
        except EOFError:
            return
        try:
            fn, args, kwargs = pickle.loads(task)
            pipe.send_bytes(b"")
        except Exception as error:
            pipe.send_bytes(b"")
            answer = pickle.dumps((False, last_line(error)))
        else:
            answer = _answer(fn, args, kwargs)
        pipe.send_bytes(answer)


def _answer(fn: Callable[..., Any], args: Any, kwargs: Any) -> bytes:
    try:
        return pickle.dumps((True, fn(*args, **kwargs)))
    except (Exception, SystemExit) as error:
        return pickle.dumps((False, last_line(error)))
