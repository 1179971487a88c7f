"""Simulators at the top level of a module, as processes want them."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np


def square(member: dict[str, Any]) -> dict[str, Any]:
    return {"y": member["x"] ** 2, "process": os.getpid()}


def moody(member: dict[str, Any]) -> dict[str, Any]:
    """Does what ``member["what"]`` says."""
    what = member["what"]
    if what == 1:
        raise ValueError("line 3\nnegative depth")
    if what == 2:
        time.sleep(600)
    if what == 3:
        os._exit(7)
    if what == 4:
        sys.exit("the mesh is empty")
    if what == 5:
        raise Unpicklable("a", "b")
    if what == 6:
        return None
    return {"y": np.array([member["x"], 2.0])}


class Unpicklable(Exception):
    """An error that cannot be pickled and read again, as some packages have them."""

    def __init__(self, one: str, other: str) -> None:
        super().__init__(f"{one} and {other}")


def counting(member: dict[str, Any]) -> dict[str, Any]:
    """Leaves a file for every run, and fails the first ``member["failures"]`` times."""
    folder = Path(os.environ["COUNTING_FOLDER"])
    runs = len(list(folder.glob(f"{float(member['x'])}-*")))
    (folder / f"{float(member['x'])}-{runs}").touch()
    if runs < member.get("failures", 0):
        raise OSError("the licence server is busy")
    return {"y": np.asarray(member["x"]) * 2}


def run_code(member: dict[str, Any]) -> dict[str, Any]:
    exec(member["code"])
    return {"y": 0.0}


def slow_line(member: dict[str, Any]) -> dict[str, Any]:
    """Slow enough that there is a time to be killed in."""
    time.sleep(0.2)
    return {"y": member["x"] * np.array([2.0, 1.0])}
