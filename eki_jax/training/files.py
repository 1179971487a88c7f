"""Files that are whole or not there, and folders that one process at a time writes to."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, which has other locks
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"


class InUse(ValueError):
    """A folder or file that another process is writing to; the message names both."""


@contextlib.contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
    """A temporary file beside ``path``, which takes its place at the end: whole, or not at all.

    Args:
        path: file to write; its folder is made if it is not there.

    Yields:
        The path to write to. After an error it is gone, and ``path`` is as it was.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "a.txt"
    ...     with replacing(path) as new:
    ...         _ = new.write_text("whole")
    ...     path.read_text(), [one.name for one in Path(folder).iterdir()]
    ('whole', ['a.txt'])
    """
    path = Path(os.path.realpath(path))  # a link stays one
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield new
        with new.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(new, path)
    except OSError as error:
        error.filename, error.filename2 = str(path), None  # a reader knows this one
        raise
    finally:
        new.unlink(missing_ok=True)


def write_text(path: Path | str, text: str) -> None:
    """Write a file of UTF-8 text by :func:`replacing`."""
    with replacing(path) as new:
        new.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def claimed(folder: Path | str, name: str = LOCK) -> Iterator[None]:
    """Hold a folder for this process alone.

    The lock is the system's: it goes with the process, however that ends, so that no file has to be removed by hand.
    Where the system has no such locks (Windows), nothing is held.

    Args:
        folder: folder; made if it is not there.
        name: name of the lock's file in it, which stays.

    Raises:
        InUse: another process, or another part of this one, holds it.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder, claimed(folder):
    ...     try:
    ...         with claimed(folder):
    ...             pass
    ...     except InUse as error:
    ...         print(str(error).replace(folder, "runs/a").replace(str(os.getpid()), "12"))
    runs/a: in use by process 12; wait for its end, or name another folder
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if fcntl is not None:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                holder = os.read(handle, 200).decode("utf-8", "replace").strip() or "another process"
                raise InUse(f"{folder}: in use by {holder}; wait for its end, or name another folder") from error
            except OSError as error:
                warnings.warn(f"{folder}: cannot be locked ({error}); no other run may write to it", stacklevel=4)
        try:
            os.ftruncate(handle, 0)
            os.write(handle, f"process {os.getpid()}\n".encode())
        except OSError as error:  # a full disk
            error.filename = str(folder / name)
            raise
        yield
    finally:
        os.close(handle)
