"""One store of results: a file of lines of JSON an experiment. What is finished is kept; a part never replaces more.

The first line says what the others are of: experiment, command, preset, machine, and how many there are. Each of them
is one thing that was measured. Its first entry is its kind with its name, as in ``{"cells": "etki 10", ...}``, or with
its place in a list, as in ``{"rows": 0, ...}``.

A file is whole or not there (:mod:`eki_jax.training.files`). One that is damaged is set aside under another name, and
said; what can still be read of its finished runs is taken from it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.harness.command import Refused, say
from benchmarks.reporting import environment, plain
from eki_jax.training.files import write_text

# Sizes of a run, from the smallest on; some commands have names of their own.
RANKS = {"smoke": 0, "quick": 0, "cpu": 1, "default": 1, "full": 2}
# Kinds of lines that are there before there is a result: what goes on is made of them.
RUNS, UNFINISHED = "runs", "unfinished"


class Damaged(ValueError):
    """A file that is not whole; the message names it."""


def read(path: Path) -> dict[str, Any]:
    """The result in a file: what its first line says, and by their kinds the others, by name or as a list.

    Raises:
        Damaged: it holds none.
    """
    try:
        head, *lines = map(json.loads, path.read_text(encoding="utf-8").rstrip("\n").split("\n"))
        if head.pop("lines") != len(lines):
            raise ValueError(f"{len(lines)} lines after the first, which says otherwise")
        found: dict[str, Any] = head
        for line in lines:
            (kind, name), *entry = line.items()
            if isinstance(name, str):
                found.setdefault(kind, {})[name] = dict(entry)
            else:
                found.setdefault(kind, []).append(dict(entry))
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # no JSON, no UTF-8, or no such lines
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise Damaged(f"{path}: damaged ({reason}); wanted lines of JSON") from error
    return found


def read_object(path: Path) -> dict[str, Any]:
    """The one JSON object in a file, such as the settings of a run.

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


def write(path: Path, result: Mapping[str, Any]) -> Path:
    """Write a result: dicts and lists whose entries are dicts become lines, all else the first; returns the path."""
    head: dict[str, Any] = {}
    lines = []
    for kind, value in plain(result).items():
        named = value if isinstance(value, dict) else dict(enumerate(value)) if isinstance(value, list) else {}
        if named and all(isinstance(entry, dict) and kind not in entry for entry in named.values()):
            lines += [{kind: name, **entry} for name, entry in named.items()]
        else:
            head[kind] = value
    text = (json.dumps(line, ensure_ascii=False) + "\n" for line in ({"lines": len(lines), **head}, *lines))
    write_text(path, "".join(text))
    return path


def save(path: Path, result: Mapping[str, Any]) -> Path:
    """Write a result of this machine, today; returns the path."""
    return write(path, {**result, "environment": environment()})


def result(path: Path, remedy: str, reader: Callable[[Path], dict[str, Any]] = read) -> dict[str, Any]:
    """A result that a table or a picture is made of.

    Args:
        path: its file.
        remedy: words for what to do where it cannot be read.
        reader: function that reads it.

    Raises:
        Refused: it is not there or damaged; the message ends with the remedy.
    """
    if not path.is_file():
        raise Refused(f"{path}: not there; {remedy}")
    try:
        return reader(path)
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
        if isinstance(error, Refused):
            raise
        reason = f"{type(error).__name__}: {error}"
        raise Refused(f"{path}: no result of this command, or not all of it ({reason}); {remedy}") from error


def show(
    path: Path,
    found: dict[str, Any],
    table: Callable[[dict[str, Any]], str],
    draw: Callable[[dict[str, Any], Path], Any],
    remedy: str,
) -> tuple[str, list[str]]:
    """Write the table and the picture of a result beside it; returns the table, and the names of all three files.

    Raises:
        Refused: the result is of another kind, or parts of it are missing; the message ends with the remedy.
    """
    text = made_of(path, found, table, remedy)
    draw(found, path.with_suffix(".png"))
    write_text(path.with_suffix(".md"), text + "\n")
    return text, [path.with_suffix(ending).name for ending in (".jsonl", ".png", ".md")]


def is_begun(found: dict[str, Any]) -> bool:
    """Whether a file has finished runs alone, and no result yet."""
    return set(found) <= {RUNS, UNFINISHED}


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
        whole = _whole_runs(path)
        set_aside(path, str(error))
        if whole:
            write(path, whole)
        return None
    if is_begun(found):
        return None
    wrong = [f"{key}: {found.get(key)!r}, not {value!r}" for key, value in identity.items() if found.get(key) != value]
    if wrong:
        raise Refused(f"{path}: holds something else ({'; '.join(wrong)}); name another by --out")
    if preset is not None and RANKS.get(found.get("preset", ""), 0) > RANKS[preset]:
        raise Refused(
            f"{path}: holds a run of preset {found['preset']}, which is larger than {preset}; name another by --out"
        )
    return found


def _whole_runs(path: Path) -> dict[str, Any]:
    """The finished runs in a damaged file whose lines are whole."""
    found: dict[str, Any] = {}
    for text in path.read_bytes().splitlines():
        try:
            (kind, name), *entry = json.loads(text).items()
        except (AttributeError, ValueError):
            continue
        if kind in (RUNS, UNFINISHED) and isinstance(name, str):
            found.setdefault(kind, {})[name] = dict(entry)
    return found


def set_aside(path: Path, reason: str) -> None:
    """Give a damaged file another name, and say so."""
    place, count = path.with_name(f"{path.name}.damaged"), 1
    while place.exists():
        place, count = path.with_name(f"{path.name}.damaged-{count}"), count + 1
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
    """Finished runs in the file of a result, a line each, so that an interrupted command goes on with what is left.

    They are beside the result that is there, which stays as it is until the command writes another.

    Args:
        path: file of the result.
        kind: kind of the lines.
        others: runs of other files, which are taken too.
    """

    def __init__(self, path: Path, kind: str = RUNS, others: Mapping[str, Any] | None = None) -> None:
        self.path, self._kind, self._others = path, kind, others or {}
        earlier(path)  # of a damaged file, what is whole
        self._wrong: dict[str, str] = {}

    @property
    def all(self) -> dict[str, Any]:
        """The runs in the file, by their names."""
        return self._result().get(self._kind, {})

    def find(self, name: str, trouble: Callable[[dict[str, Any]], str]) -> dict[str, Any] | None:
        """The run called ``name``, or None.

        Args:
            name: name of the run.
            trouble: function of what is in the file: what is wrong with it for this run, or nothing.
        """
        found = self.all.get(name, self._others.get(name))
        if found is None:
            return None
        try:
            reason = trouble(found)
            reason = reason and f"of another run ({reason})"
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            reason = f"damaged ({type(error).__name__}: {error})"
        if not reason:
            return found
        if self._wrong.get(name) != reason:
            say(f"{self.path}: {name}: {reason}; made again")
        self._wrong[name] = reason
        return None

    def get(
        self, name: str, trouble: Callable[[dict[str, Any]], str], measure: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """The run called ``name``: found, or else measured and kept at once."""
        found = self.find(name, trouble)
        return self.keep(name, measure()) if found is None else found

    def keep(self, name: str, found: dict[str, Any]) -> dict[str, Any]:
        """Write a run; returns it as it is read. One that it takes the place of goes to a file beside."""
        result = self._result()
        runs = result.setdefault(self._kind, {})
        if self._wrong.pop(name, None) and name in runs:
            beside = self.path.with_name(f"{self.path.name}.other")
            lines = beside.read_text(encoding="utf-8") if beside.exists() else ""
            write_text(beside, lines + json.dumps({self._kind: name, **runs[name]}) + "\n")
        runs[name] = plain({**found, "environment": environment()})
        write(self.path, result)
        return runs[name]

    def _result(self) -> dict[str, Any]:
        return read(self.path) if self.path.is_file() else {}


class Cells:
    """The cells of a result: each is kept as soon as it is measured, and the result takes its place when it is whole.

    Until then the earlier result stays as it is, and what is measured is beside it, from where the same command goes on
    after an interruption.

    Args:
        path: file of the result.
        head: entries of the result besides the cells, which say what it is of.
        keep: flag, True where cells of an earlier result with the same head are not measured again.
        part: flag, True for a run of some cells only: the others of the earlier result stay.
        cut: function of a cell: what it lacks, or nothing; such a cell is measured again.
        say: function that shows a line of progress.

    Attributes:
        cells: those of this run, by name.
        extra: entries of the result that follow from them.
        earlier: the earlier result; empty where there is none.

    Raises:
        Refused: the earlier result is of a larger preset or of another experiment, or has other settings than a part.
    """

    def __init__(
        self,
        path: Path,
        head: dict[str, Any],
        *,
        keep: bool = False,
        part: bool = False,
        cut: Callable[[dict[str, Any]], str] | None = None,
        say: Callable[[str], None] = say,
    ) -> None:
        self.path, self.head, self._say = path, dict(head), say
        self.extra: dict[str, Any] = {}
        identity = {key: head[key] for key in ("experiment",) if key in head}
        self.earlier = before = earlier(path, head.get("preset"), **identity) or {}
        other = differences(before, head)
        if part and before and other:
            raise Refused(f"{path}: is of other settings, and this run is a part ({other}); name another by --out")
        self._before: dict[str, Any] = {} if other else before.get("cells", {})
        self._keep, self.part, self._cut = keep, part, cut or _cut
        self._runs = Runs(path, UNFINISHED)
        self.cells: dict[str, Any] = {}

    def get(self, name: str, settings: dict[str, Any], measure: Callable[[], Any]) -> Any:
        """The cell called ``name``, measured unless it is there with the same settings.

        Of a cell that could not be measured, the one of the earlier result stays.
        """
        wanted = {"settings": plain(settings)}
        before = self._before.get(name)
        if before is not None and (trouble := self._trouble(before, wanted)):
            if self._keep and trouble != "skipped":
                self._say(f"{name}: the one of the earlier result is {trouble}; made again")
            before = None
        if self._keep and before is not None:
            self._say(f"{name}: kept")
            self.cells[name] = before
            return before["found"]

        here = {"head": self.head, **wanted}
        cell = self._runs.find(name, lambda cell: differences(cell, here) or self._cut(cell))
        if cell is not None:
            self._say(f"{name}: kept of a run that was interrupted")
        else:
            begun = time.perf_counter()
            cell = {**here, "found": plain(measure()), "seconds": time.perf_counter() - begun}
            if "skipped" not in cell["found"]:
                cell = self._runs.keep(name, cell)
                self._say(f"{name}: {cell['seconds']:.1f} s")
            elif before is not None:
                self._say(f"{name}: not run ({cell['found']['skipped']}); the one of the earlier result stays")
                cell = before
        self.cells[name] = {key: plain(value) for key, value in cell.items() if key != "head"}
        return self.cells[name]["found"]

    def _trouble(self, cell: dict[str, Any], wanted: dict[str, Any]) -> str:
        """Why a cell of the earlier result is not the one that is wanted, or nothing."""
        try:
            if "skipped" in cell["found"]:
                return "skipped"
            return (differences(cell, wanted) and "of other settings") or self._cut(cell)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            return f"damaged ({type(error).__name__}: {error})"

    def _is_lost(self, name: str, before: dict[str, Any]) -> bool:
        """Whether a cell that was measured is one now that could not be."""
        now = self.cells.get(name, {}).get("found", {})
        return "skipped" in now and "skipped" not in before.get("found", {})

    def payload(self) -> dict[str, Any]:
        """All there is to write."""
        return {**self.head, **self.extra, "cells": self.cells}

    def finish(self) -> dict[str, Any]:
        """Write the result in the place of the earlier one; returns what is in the file.

        A part leaves the earlier result's other cells, and what an interrupted run of another part has measured.

        Raises:
            Refused: the earlier result has cells that could not be measured now, under other settings.
        """
        lost = [name for name, cell in self.earlier.get("cells", {}).items() if self._is_lost(name, cell)]
        if lost:
            reason = self.cells[lost[0]]["found"]["skipped"]
            names = ", ".join(lost[:4])
            raise Refused(f"{self.path}: left as it is, since it has what this run lacks: {names} ({reason})")
        others = {}
        if self.part:
            others = {name: cell for name, cell in self._runs.all.items() if name not in self.cells}
            self.cells = {**self._before, **self.cells}
        return read(save(self.path, self.payload() | ({UNFINISHED: others} if others else {})))


class Job(NamedTuple):
    """A cell that is to be measured.

    Attributes:
        settings: settings of the cell.
        measure: function that measures it.
    """

    settings: dict[str, Any]
    measure: Callable[[], Any]


def fill(path: Path, head: dict[str, Any], jobs: Mapping[str, Job], *, keep: bool = False) -> dict[str, Any]:
    """The result whose cells are some jobs; cells that an earlier one has besides stay, if its head is the same.

    Args:
        path: its file.
        head: entries besides the cells.
        jobs: the cells, by their names.
        keep: flag, True where cells that are there already are not measured again.
    """
    before = earlier(path, head["preset"], experiment=head["experiment"]) or {}
    cells = Cells(path, head, keep=keep, part=bool(set(before.get("cells", {})) - set(jobs)))
    for name, job in jobs.items():
        cells.get(name, *job)
    return cells.finish()


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
