"""Files that are whole or not there, and folders that one process at a time writes to."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eki_jax
from eki_jax.training import ensemble_method, files, fit
from eki_jax.training.files import InUse, claimed, replacing, write_text

FILES = files.__file__


def test_one_run_a_folder(tmp_path: Path) -> None:
    """Of two runs on a folder one is refused, and the other's files stay."""
    forward = lambda params, x: jax.nn.softmax(x @ params)
    solver = eki_jax.euler(forward, eki_jax.cross_entropy())
    method = ensemble_method(solver, forward, eki_jax.xavier(jnp.zeros((4, 2))), 6)
    data = np.eye(4, dtype=np.float32), np.array([0, 1, 0, 1])
    key = jax.random.key(1)
    train = lambda epochs, **more: fit(
        method, data, data, batch_size=2, epochs=epochs, key=key, directory=tmp_path, progress=False, **more
    )
    train(1)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with claimed(tmp_path), pytest.raises(InUse, match=f"{tmp_path}: in use by process {os.getpid()}; wait"):
        train(2, resume=True)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert len(train(2, resume=True).history) == 2


def test_a_lock_goes_with_its_process(tmp_path: Path) -> None:
    """A process that is killed leaves no lock; one that lives has it alone."""
    code = f"""import importlib.util, sys, time
spec = importlib.util.spec_from_file_location("files", {FILES!r})
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)
with files.claimed({str(tmp_path)!r}):
    print("held", flush=True)
    time.sleep(60)"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(InUse, match=f"in use by process {holder.pid}"), claimed(tmp_path):
            pass
        holder.kill()
    with claimed(tmp_path):
        pass


def test_files_are_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error while writing leaves what was there, and no temporary file; a new file does not go over the old one."""
    path = tmp_path / "a.txt"
    write_text(path, "first")
    with path.open() as reader:  # which keeps what it has opened, unless that is written over
        write_text(path, "before")
        assert reader.read() == "first"

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=rf"No space left on device: '{path}'"):
        write_text(path, "after")
    with contextlib.suppress(ZeroDivisionError), replacing(path) as new:
        new.write_text("af" * (1 // 0))
    monkeypatch.setattr(os, "write", lambda handle, data: full(handle))
    with pytest.raises(OSError, match=rf"No space left on device: '{tmp_path}/.lock'"), claimed(tmp_path):
        pass
    (tmp_path / ".lock").unlink()
    assert path.read_text() == "before"
    assert [one.name for one in tmp_path.iterdir()] == ["a.txt"]
