"""One way to run an experiment: a spec, a function that measures, and what is made of the numbers, now and later.

A command runs one (:func:`run`); ``report`` makes what is committed from the numbers again (:func:`beside`,
:func:`pages`).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.harness import store
from benchmarks.harness.command import Refused, require, say
from benchmarks.harness.tables import replaced
from benchmarks.reporting import RESULTS, print_result
from eki_jax.training.files import claimed, write_text

Result = dict[str, Any]
ROOT = RESULTS.parents[1]
WRONG = 1  # the exit code of a run whose numbers miss their bounds


class Made(NamedTuple):
    """A file that is made of results.

    Attributes:
        path: where it is.
        write: function that writes it, to a path.
    """

    path: Path
    write: Callable[[Path], Any]


class Experiment(NamedTuple):
    """What is measured, and what is made of it.

    Attributes:
        name: words of its command, after ``python -m benchmarks``.
        title: what it is, in a line.
        file: where its numbers are, below the folder of the results, without an ending; with ``{preset}`` if each
            preset has a file of its own.
        measure: function ``measure(arguments, path)`` that measures what is missing, and writes the numbers.
        table: function of the result: its table, in Markdown.
        draw: function ``draw(result, path)`` of its picture; None where it has none.
        says: function of the result: what the last line on standard output has of it.
        wrong: function of the result: lines about what misses its bounds.
        picture: where the committed picture is, from the root of the repository; by default beside the numbers, under
            their name.
        sections: functions of the result that make the texts between marks of pages of the documentation, by
            ``PAGE#MARK``; ``{preset}`` in the mark is that of the result.
        summarized: function of a file and its numbers: these with what follows from them, for all the others.
        makes: function ``makes(path, result)`` of the files that are made in the place of a picture and a table beside
            the numbers; None for these two.
        lock: name of the file that keeps others out of the folder; by default that of the numbers, so that another
            experiment may have the same folder.
        needs: packages without which nothing is begun.
    """

    name: str
    title: str
    file: str
    measure: Callable[[argparse.Namespace, Path], Any]
    table: Callable[[Result], str]
    draw: Callable[[Result, Path], Any] | None = None
    says: Callable[[Result], Result] = lambda result: {}
    wrong: Callable[[Result], list[str]] = lambda result: []
    picture: str | None = None
    sections: Mapping[str, Callable[[Result], str]] = {}  # of a tuple, which nobody changes
    summarized: Callable[[Path, Result], Result] = lambda path, result: result
    makes: Callable[[Path, Result], Iterator[Made]] | None = None
    lock: str | None = None
    needs: tuple[str, ...] = ("matplotlib",)

    def path(self, preset: str, out: Path | None = None) -> Path:
        """Where the numbers go: into a folder, or else to the committed ones; those of a smoke test into ``runs``."""
        file = Path(f"{self.file.format(preset=preset)}.jsonl")
        if out is not None:
            return out / file.name
        return (RESULTS if store.RANKS[preset] else Path("runs")) / file

    def read(self, path: Path, remedy: str) -> Result:
        """The result in a file.

        Args:
            path: the file.
            remedy: words for what to do where there is none.

        Raises:
            Refused: it is not there, damaged, of another kind or of a run that was interrupted; the message ends with
                the remedy.
        """
        found = store.result(path, remedy)
        if store.is_begun(found):
            raise Refused(f"{path}: of a run that was interrupted; {remedy}")
        return store.made_of(path, found, lambda found: self.summarized(path, found), remedy)

    def committed(self) -> Iterator[Path]:
        """The committed files of its numbers."""
        yield from sorted(RESULTS.glob(f"{self.file.format(preset='*')}.jsonl"))

    def is_committed(self, path: Path) -> bool:
        """Whether a file is one of the committed ones."""
        return path.resolve() in {one.resolve() for one in self.committed()}

    def drawn(self, path: Path) -> Path:
        """Where the picture of a file is."""
        if self.picture is None:
            return path.with_suffix(".png")
        return ROOT / self.picture if self.is_committed(path) else path.with_name(Path(self.picture).name)


def run(experiment: Experiment, arguments: argparse.Namespace, path: Path) -> int:
    """Measure, or with ``--draw`` read; then write what is made of the numbers, print the table and the last line.

    Args:
        experiment: what is run.
        arguments: the command line's, with ``preset`` and ``draw``.
        path: file of the numbers.

    Returns:
        The exit code: 1 where numbers miss their bounds.

    Raises:
        Refused: something that the user can mend.
    """
    code, last = perform(experiment, arguments, path)
    print_result(last)
    return code


def perform(experiment: Experiment, arguments: argparse.Namespace, path: Path) -> tuple[int, Result]:
    """The same without the last line, which is returned with the exit code."""
    require(*experiment.needs)
    remedy = f"run python -m benchmarks {experiment.name} --preset {arguments.preset}"
    with claimed(path.parent, experiment.lock or f".{path.stem}.lock"):
        if not arguments.draw:
            experiment.measure(arguments, path)
        found = experiment.read(path, remedy)
        text = store.made_of(path, found, experiment.table, remedy)
        files = [*beside(experiment, path, found)]
        if experiment.is_committed(path):
            files += pages(sections(experiment, found))
        for one in files:
            one.write(one.path)
    print(text)
    wrong = experiment.wrong(found)
    for line in wrong:
        say(line)
    names = [path.name, *(one.path.name for one in files)]
    last = {"experiment": experiment.name, "preset": found["preset"], **experiment.says(found), "files": names}
    return WRONG if wrong else 0, last


def beside(experiment: Experiment, path: Path, found: Result) -> Iterator[Made]:
    """What is made of a file: its picture and its table; the latter may be on a page alone, if they are committed."""
    if experiment.makes is not None:
        yield from experiment.makes(path, found)
        return
    picture = experiment.drawn(path)
    if (draw := experiment.draw) is not None:
        yield Made(picture, lambda target: draw(found, target))
    if not (experiment.is_committed(path) and experiment.table in experiment.sections.values()):
        table = path.with_name(f"{picture.stem}.md")
        yield Made(table, lambda target: write_text(target, experiment.table(found) + "\n"))


def sections(experiment: Experiment, found: Result) -> dict[str, Callable[[], str]]:
    """The texts between marks of pages, by ``PAGE#MARK``."""
    return {
        place.format(preset=found["preset"]): lambda make=make: make(found)
        for place, make in experiment.sections.items()
    }


def pages(texts: Mapping[str, Callable[[], str]]) -> Iterator[Made]:
    """The pages of the documentation that have some texts between marks, each page once.

    Args:
        texts: functions that make them, by ``PAGE#MARK``.
    """
    by: dict[str, dict[str, Callable[[], str]]] = {}
    for place, make in texts.items():
        page, mark = place.split("#")
        by.setdefault(page, {})[mark] = make
    for page, marks in by.items():

        def write(target: Path, page: str = page, marks: dict[str, Callable[[], str]] = marks) -> None:
            text = (ROOT / "docs" / page).read_text(encoding="utf-8")
            for mark, make in marks.items():
                text = replaced(text, mark, make())
            write_text(target, text)

        yield Made(ROOT / "docs" / page, write)
