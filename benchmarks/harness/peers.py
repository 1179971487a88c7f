"""Other libraries: an environment of its own for each, made on first use and kept, and processes that run there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.harness.command import say
from eki_jax.training.files import claimed, write_text

# name -> what to install, as published
PEERS = {
    "torch": ["torch==2.13.0", "numpy"],
    "iterative_ensemble_smoother": ["iterative_ensemble_smoother==1.2.0"],
    "cuthbert": ["cuthbert==0.1.1"],
    "pyesmda": ["pyesmda==1.0.0"],
    "dapper": ["dapper==1.7.1"],
    "kalman-inversion-lib": ["kalman-inversion-lib==1.0.4", "ipywidgets==8.1.8"],
    "evosax": ["evosax==0.3.2"],
    "foolbox": ["foolbox==3.3.4", "jax"],
    "evosax-gymnax": ["evosax==0.3.2", "gymnax==1.0.1", "six==1.17.0"],
}


class Unavailable(Exception):
    """A library cannot be had here, or has no answer; the message says why.

    Attributes:
        is_late: Whether its time was up.
    """

    def __init__(self, reason: str, *, is_late: bool = False) -> None:
        super().__init__(reason)
        self.is_late = is_late


def default_folder() -> Path:
    """Where the environments are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "eki_jax" / "peers"


def python_of(peer: str, folder: Path, *, limit: float = 600) -> Path:
    """The interpreter of a peer's environment, which is made if it is not there.

    Args:
        peer: one of ``PEERS``.
        folder: where the environments are.
        limit: seconds that the installation may take.

    Raises:
        Unavailable: it cannot be installed.
    """
    home = folder / peer
    python = home / "bin" / "python"
    if (home / "installed").exists():
        return python
    say(f"installing {', '.join(PEERS[peer])} into {home}")
    options: dict[str, Any] = {"check": True, "capture_output": True, "encoding": "utf-8", "errors": "replace"}
    try:
        with claimed(folder, f".{peer}.lock"):
            subprocess.run([sys.executable, "-m", "venv", "--clear", str(home)], timeout=limit, **options)
            command = [str(python), "-m", "pip", "install", "-q", *PEERS[peer]]
            subprocess.run(command, timeout=limit, **options)
            write_text(home / "installed", "\n".join(PEERS[peer]) + "\n")
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"not installed within {limit:.0f} s") from error
    except subprocess.CalledProcessError as error:
        last = (error.stderr or "").strip().splitlines()[-1:] or ["no message"]
        raise Unavailable(f"cannot be installed: {last[0]}") from error
    return python


def ask(command: list[str], folder: Path, *, limit: float | None = None, **variables: str) -> dict[str, Any]:
    """What a process prints as its last line, an object of JSON.

    Args:
        command: interpreter and arguments.
        folder: where it runs.
        limit: seconds that it may take.
        **variables: of its environment, beside ours without those that steer our own JAX.

    Raises:
        Unavailable: it failed, with its last words, or took too long.
    """
    ours = {key: value for key, value in os.environ.items() if key not in ("XLA_FLAGS", "PYTHONPATH")}
    options: dict[str, Any] = {"env": ours | variables, "encoding": "utf-8", "errors": "replace", "timeout": limit}
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, check=False, **options)
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"more than {limit:.0f} s in all", is_late=True) from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise Unavailable("killed, out of memory" if done.returncode == -9 else last[:300])
    return json.loads(done.stdout.strip().splitlines()[-1])
