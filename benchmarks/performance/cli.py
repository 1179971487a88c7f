"""``python -m benchmarks performance``: speed and memory of the step, beside other libraries."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.harness import experiment, store
from benchmarks.harness.command import Parser, command, folder, number, say, whole
from benchmarks.harness.experiment import Experiment, Made, Result
from benchmarks.harness.peers import default_folder
from benchmarks.harness.store import Job
from benchmarks.performance.parts import PARTS, Options, name_of
from benchmarks.performance.picture import PANELS, draw
from benchmarks.performance.tables import TITLES, line, section, with_rows, write
from benchmarks.reporting import print_result

# What other commands call the sizes.
_SIZES = {"smoke": "quick", "cpu": "default"}


def part(name: str) -> Experiment:
    """A part by its name; the picture and the page of tables are of all parts in a folder."""

    def measure(arguments: argparse.Namespace, path: Path) -> None:
        head = {"experiment": f"performance {name}", "preset": arguments.preset}
        head["command"] = f"python -m benchmarks performance --parts {name} --preset {arguments.preset}"
        say(f"{name}: {TITLES[name]}")
        store.fill(path, head, _jobs(name, arguments, path))

    return Experiment(
        f"performance --parts {name}",
        TITLES[name],
        f"performance-{name}",
        measure,
        functools.partial(section, name),
        summarized=lambda path, found: with_rows(found),
        makes=lambda path, found: _together(path.parent),
        lock=".performance.lock",
    )


def _together(folder: Path) -> Iterator[Made]:
    """The picture and the page of the parts that are in a folder."""
    found = parts(folder)
    if set(found) & set(PANELS):
        yield Made(folder / "performance.png", functools.partial(draw, found))
    yield Made(folder / "performance.md", functools.partial(write, found))


def parts(folder: Path, but: tuple[str, ...] = ()) -> dict[str, Result]:
    """The results in a folder, by their parts.

    Args:
        folder: the folder.
        but: parts that are to be made again, whose files may be anything.

    Raises:
        Refused: a file is damaged, or no result of its part.
    """
    found = {}
    for name in PARTS:
        path = folder / f"performance-{name}.jsonl"
        if name not in but and path.exists():
            remedy = f"run --parts {name}, or remove it"
            result = store.result(path, remedy)
            if not store.is_begun(result):
                found[name] = store.made_of(path, result, with_rows, remedy)
                store.made_of(path, found[name], functools.partial(section, name), remedy)
    return found


def _jobs(name: str, arguments: argparse.Namespace, path: Path) -> dict[str, Job]:
    """The cases of a part; one that lacks a measurement which the earlier result has does not take its place."""
    limit = arguments.linear_limit if name == "linear" else None
    peers = (arguments.peers or default_folder()).resolve()
    options = Options(peers, arguments.repeats, arguments.limit if limit is None else limit)
    before = (store.earlier(path) or {}).get("cells", {})

    def measure(case: str, settings: dict[str, Any]) -> dict[str, Any]:
        rows = []
        for row in PARTS[name].rows(options, **settings):
            rows.append(row)
            say(f"  {line(name, row)}")
        lost = measured(before.get(case, {}).get("found", {}).get("rows", [])) - measured(rows)
        return {"skipped": f"it lacks {'; '.join(sorted(lost))}"} if lost else {"rows": rows}

    cases = {name_of(settings): settings for settings in PARTS[name].cases(arguments.preset)}
    return {case: Job(settings, functools.partial(measure, case, settings)) for case, settings in cases.items()}


def measured(rows: list[dict[str, Any]]) -> set[str]:
    """What was measured, and not skipped, by the names in the rows."""
    found = set()
    for row in rows:
        name = str(row.get("what", "its rates"))
        if "median" in row or "fitted" in row:
            found.add(name)
        found |= {f"{name} on {problem}" for problem in row.get("test_accuracy", {})}
    return found


@command("performance")
def main(argv: list[str]) -> int:
    """Measure the parts asked for, one file each; draw and tabulate what is there."""
    arguments = _parser().parse_args(argv)
    arguments.preset = _SIZES.get(arguments.preset, arguments.preset)
    asked = [(of := part(name), of.path(arguments.preset, arguments.out)) for name in arguments.parts]
    if arguments.draw and arguments.parts == tuple(PARTS):  # of all, those that are there
        asked = [one for one in asked if one[1].exists()] or asked
    for _, path in asked:
        parts(path.parent, () if arguments.draw else arguments.parts)  # which all become the page, at the end
    several = [experiment.perform(of, arguments, path)[1] for of, path in asked]
    made = sorted({file for one in several for file in one["files"]})
    print_result({"experiment": "performance", "preset": arguments.preset, "parts": arguments.parts, "files": made})
    return 0


def _parts(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    unknown = sorted(set(names) - set(PARTS))
    if unknown:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown) or repr(text)}; wanted some of {', '.join(PARTS)}")
    return names


def _parser() -> Parser:
    parser = Parser(prog="python -m benchmarks performance", description=__doc__)
    sizes = ("quick", "default", "full", *_SIZES)
    parser.add_preset(choices=sizes, default="default", help="how many shapes; smoke is quick, and cpu is default")
    every = ",".join(PARTS)
    parser.add_argument("--parts", "--only", type=_parts, default=every, help=f"comma-separated, of: {every}")
    parser.add_argument("--repeats", type=whole(), default=3, help="least number of timed calls (default: 3)")
    parser.add_argument("--limit", type=number(), default=120, help="seconds for one measurement (default: 120)")
    parser.add_argument("--linear-limit", type=number(), help="the same for the part linear (default: as --limit)")
    parser.add_peers()
    parser.add_draw()
    words = "folder for performance-PART.jsonl, the page and the picture (default: benchmarks/results)"
    parser.add_argument("--out", metavar="DIR", type=folder, help=words)
    return parser
