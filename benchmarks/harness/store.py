"""One store of results: what is finished is kept, and a part never takes the place of more.

A file is whole or not there (:mod:`eki_jax.training.files`); one that is damaged, or of other settings, is set aside
under another name, and said.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from benchmarks.harness.command import Refused, say
from benchmarks.reporting import plain, save_result

# Sizes of a run, from the smallest on; some commands have names of their own.
RANKS = {"smoke": 0, "quick": 0, "cpu": 1, "default": 1, "full": 2}


class Damaged(ValueError):
    """A file that is not whole; the message names it."""


def read(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        Damaged: it holds none.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of JSON, or of UTF-8
        raise Damaged(f"{path}: damaged ({error})") from error
    if not isinstance(found, dict):
        raise Damaged(f"{path}: damaged (wanted a JSON object)")
    return found


def result(path: Path, remedy: str) -> dict[str, Any]:
    """A result that a table or a picture is made of.

    Raises:
        Refused: it is not there or damaged; the message ends with the remedy.
    """
    if not path.is_file():
        raise Refused(f"{path}: not there; {remedy}")
    try:
        return read(path)
    except Damaged as error:
        raise Refused(f"{error}; {remedy}") from error


def made_of(path: Path, found: dict[str, Any], make: Callable[[dict[str, Any]], Any], remedy: str) -> Any:
    """What a function makes of a result, a table or the like.

    Raises:
        Refused: the result is of another kind, or parts of it are missing; the message ends with the remedy.
    """
    try:
        return make(found)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise Refused(f"{path}: no result of this command, or not all of it ({reason}); {remedy}") from error


def earlier(path: Path, preset: str | None = None, **identity: Any) -> dict[str, Any] | None:
    """The result that a run is going to replace, or None.

    Args:
        path: its file; one that is damaged is set aside, since it is to be made again.
        preset: preset of the run.
        **identity: entries that a result of the same experiment has.

    Raises:
        Refused: it belongs to another experiment, or to a larger preset.
    """
    if not path.is_file():
        return None
    try:
        found = read(path)
    except Damaged as error:
        set_aside(path, str(error))
        return None
    wrong = [f"{key}: {found.get(key)!r}, not {value!r}" for key, value in identity.items() if found.get(key) != value]
    if wrong:
        raise Refused(f"{path}: holds something else ({'; '.join(wrong)}); name another by --out")
    if preset is not None and RANKS.get(found.get("preset", ""), 0) > RANKS[preset]:
        raise Refused(
            f"{path}: holds a run of preset {found['preset']}, which is larger than {preset}; name another by --out"
        )
    return found


def set_aside(path: Path, reason: str, ending: str = "damaged") -> None:
    """Give a file another name, and say so."""
    place, count = path.with_name(f"{path.name}.{ending}"), 1
    while place.exists():
        place, count = path.with_name(f"{path.name}.{ending}-{count}"), count + 1
    path.rename(place)
    say(f"{reason}: set aside as {place.name}; made again")


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    """What is other than wanted, or nothing.

    >>> differences({"seed": 1, "epochs": 2}, {"seed": 0, "epochs": 2})
    'seed: 1, wanted 0'
    """
    wanted = plain(wanted)
    other = {key: value for key, value in wanted.items() if found.get(key) != value}
    return "; ".join(f"{key}: {found.get(key)!r}, wanted {value!r}" for key, value in other.items())


class Runs:
    """Finished runs in a folder, a file of JSON each, so that an interrupted command goes on with what is left.

    Args:
        folder: folder of the files.
        is_open: flag; False for a store that is only read, where a file that cannot be used is an error.
    """

    def __init__(self, folder: Path, *, is_open: bool = True) -> None:
        self.folder, self._is_open = folder, is_open

    def path(self, name: str) -> Path:
        """The file of a run."""
        return self.folder / f"{quote(name, safe=' ,=.()')}.json"

    def find(self, name: str, trouble: Callable[[dict[str, Any]], str]) -> dict[str, Any] | None:
        """The run called ``name``, or None.

        Args:
            name: name of the run.
            trouble: function of the file's content: what is wrong with it for this run, or nothing.

        Raises:
            Refused: it cannot be used, and the store is only read.
        """
        path = self.path(name)
        if not path.is_file():
            return None
        try:
            found, ending = read(path), "other"
            reason = trouble(found)
            reason = reason and f"{path}: of another run ({reason})"
        except Damaged as error:
            reason, ending = str(error), "damaged"
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            reason, ending = f"{path}: damaged ({type(error).__name__}: {error})", "damaged"
        if not reason:
            return found
        if not self._is_open:
            raise Refused(f"{reason}; run the same command so that it is made again, or remove the file")
        set_aside(path, reason, ending)
        return None

    def get(
        self, name: str, trouble: Callable[[dict[str, Any]], str], measure: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """The run called ``name``: found, or else measured and kept at once."""
        found = self.find(name, trouble)
        return self.keep(name, measure()) if found is None else found

    def keep(self, name: str, found: dict[str, Any]) -> dict[str, Any]:
        """Write a run; returns it as it is read."""
        return read(save_result(self.path(name), found))


class Cells:
    """The cells of a result: each is kept as soon as it is measured, and the result takes its place when it is whole.

    Until then the earlier result stays as it is, and what is measured lies in a folder beside it, from where the same
    command goes on after an interruption.

    Args:
        path: file of the result.
        head: entries of the result besides the cells, which say what it is of.
        keep: flag, True where cells of an earlier result with the same head are not measured again.
        say: function that shows a line of progress.

    Raises:
        Refused: the earlier result is of a larger preset.
    """

    def __init__(
        self, path: Path, head: dict[str, Any], *, keep: bool = False, say: Callable[[str], None] = say
    ) -> None:
        self.path, self.head, self._say = path, dict(head), say
        self.extra: dict[str, Any] = {}
        before = earlier(path, head.get("preset")) or {}
        is_same = before.get("cells") is not None and not differences(before, head)
        self._before: dict[str, Any] = before["cells"] if is_same else {}
        self._keep = keep
        self._runs = Runs(path.with_suffix(".unfinished"))
        self.cells: dict[str, Any] = {}

    def get(self, name: str, settings: dict[str, Any], measure: Callable[[], Any]) -> Any:
        """The cell called ``name``, measured unless it is there with the same settings.

        Of a cell that could not be measured, the one of the earlier result stays.
        """
        wanted = {"settings": plain(settings)}
        before = self._before.get(name)
        if before is not None and ("skipped" in before["found"] or differences(before, wanted) or _cut(before)):
            before = None
        if self._keep and before is not None:
            self._say(f"{name}: kept")
            self.cells[name] = before
            return before["found"]

        here = {"head": self.head, **wanted}
        cell = self._runs.find(name, lambda cell: differences(cell, here) or _cut(cell))
        if cell is not None:
            self._say(f"{name}: kept of a run that was interrupted")
        else:
            begun = time.perf_counter()
            cell = {**here, "found": plain(measure()), "seconds": time.perf_counter() - begun}
            if "skipped" not in cell["found"]:
                save_result(self._runs.path(name), cell)
                self._say(f"{name}: {cell['seconds']:.1f} s")
            elif before is not None:
                self._say(f"{name}: not run ({cell['found']['skipped']}); the one of the earlier result stays")
                cell = before
        self.cells[name] = {key: plain(cell[key]) for key in ("settings", "found", "seconds")}
        return self.cells[name]["found"]

    def payload(self) -> dict[str, Any]:
        """All there is to write."""
        return {**self.head, **self.extra, "cells": self.cells}

    def finish(self, *, is_whole: bool = True) -> dict[str, Any]:
        """Write the result, and forget what was kept until then; returns what is in the file.

        Args:
            is_whole: flag, False for a run of some cells only: the others of the earlier result stay.
        """
        if not is_whole:
            self.cells = {**self._before, **self.cells}
        save_result(self.path, self.payload())
        shutil.rmtree(self._runs.folder, ignore_errors=True)
        return read(self.path)


def _cut(cell: dict[str, Any]) -> str:
    """What a cell with a row for each seed lacks.

    >>> _cut({"settings": {"seeds": 2}, "found": [{"seed": 0}]})
    '1 rows, wanted 2'
    """
    seeds, found = cell["settings"].get("seeds"), cell["found"]
    rows = found.get("rows") if isinstance(found, dict) else found
    count = len(seeds) if isinstance(seeds, list) else seeds
    if count is None or not isinstance(rows, list) or len(rows) == count:
        return ""
    return f"{len(rows)} rows, wanted {count}"
