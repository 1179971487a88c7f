"""The parts of an experiment, each written as soon as it is done."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.reporting import plain, save_result


class Cells:
    """What an experiment has measured so far, by name, and the file where it is kept.

    Args:
        path: JSON file.
        head: entries of the file besides the cells.
        keep: flag, True where cells of an earlier run with the same head, settings included, are not measured again.
        say: function that shows a line of progress.
    """

    def __init__(self, path: Path, head: dict[str, Any], *, keep: bool, say: Callable[[str], None]) -> None:
        self.path, self.head, self.cells, self._say = path, dict(head), {}, say
        self.extra: dict[str, Any] = {}
        self._asked: set[str] = set()
        if keep and path.exists():
            before = json.loads(path.read_text(encoding="utf-8"))
            if all(before.get(key) == value for key, value in plain(head).items()):
                found = before["cells"].items()
                self.cells = {name: cell for name, cell in found if "skipped" not in cell["found"]}

    def get(self, name: str, settings: dict[str, Any], measure: Callable[[], Any]) -> Any:
        """The cell called ``name``, measured unless it is there with the same settings."""
        self._asked.add(name)
        cell = self.cells.get(name)
        if cell is None or cell["settings"] != plain(settings):
            begun = time.perf_counter()
            found = plain(measure())
            cell = {"settings": plain(settings), "found": found, "seconds": time.perf_counter() - begun}
            self.cells[name] = cell
            save_result(self.path, self.payload())
            self._say(f"{name}: {cell['seconds']:.1f} s")
        return cell["found"]

    def payload(self) -> dict[str, Any]:
        """All there is to write."""
        return {**self.head, **self.extra, "cells": self.cells}

    def drop_others(self) -> None:
        """Forget the cells of an earlier run that this one did not ask for."""
        self.cells = {name: cell for name, cell in self.cells.items() if name in self._asked}
