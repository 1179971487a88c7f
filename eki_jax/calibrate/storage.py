"""Files of a JSON header and arrays: no pickle, and whole or not there at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


def write(path: Path | str, header: Any, arrays: Mapping[str, np.ndarray]) -> None:
    """Write a file that :func:`read` reads, in the format of :func:`numpy.savez`.

    Args:
        path: name of the file; one that is there is replaced.
        header: numbers, texts, lists and dicts that JSON knows.
        arrays: arrays by their names.

    Raises:
        TypeError: an array of objects.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write(f"{folder}/a.npz", {"version": 1}, {"a/b": np.arange(3)})
    ...     read(f"{folder}/a.npz")
    ({'version': 1}, {'a/b': array([0, 1, 2])})
    """
    path = Path(path)
    for name, array in arrays.items():
        if array.dtype.hasobject:
            raise TypeError(f"{name}: an array of dtype {array.dtype}; wanted one of numbers")
    text = json.dumps({"header": header, "names": list(arrays)})
    members = {"header": np.frombuffer(text.encode(), np.uint8)}
    members |= {f"array{i}": array for i, array in enumerate(arrays.values())}
    # The last act is a change of name, which the system does at once or not at all.
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, **members)  # type: ignore[arg-type]  # of its keyword allow_pickle
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read(path: Path | str) -> tuple[Any, dict[str, np.ndarray]]:
    """The header and the arrays of a file.

    Args:
        path: name of the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file of another kind, or one that is damaged.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"path: {path}, no such file; wanted one that was saved")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as members:
            about = json.loads(bytes(members["header"]))
            return about["header"], {name: members[f"array{i}"] for i, name in enumerate(about["names"])}
    except Exception as error:  # of the many layers of such a file each has errors of its own
        raise ValueError(
            f"path: {path}, no file of arrays that eki_jax wrote, or a damaged one; wanted one that was saved"
        ) from error
