"""``python -m benchmarks report``: all tables and pictures of the committed results, made of their files.

It runs nothing. For when they are to look otherwise, and to see that they are what the runs give.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import overview
from benchmarks.harness import store
from benchmarks.harness.command import Parser, Refused, command, folder, require, say
from benchmarks.harness.tables import replaced, where
from benchmarks.reporting import RESULTS, print_result
from eki_jax.training.files import write_text

DOCS = Path(__file__).parents[1] / "docs"
IMAGES = DOCS / "images"
DIFFERENT = 1  # the exit code of --check where something is not what the runs give


class Made(NamedTuple):
    """A file that is made of results.

    Attributes:
        path: where it is.
        write: function that writes it, to a path.
    """

    path: Path
    write: Callable[[Path], Any]


@command("report")
def main(argv: list[str]) -> int:
    """Make what is asked for, or say what differs; 1 where something does, 2 for what the user can mend."""
    arguments = _parser().parse_args(argv)
    require("matplotlib")
    files = {one.path.name: one for one in made()}
    chosen = arguments.names or list(files)
    if unknown := sorted(set(chosen) - set(files)):
        raise Refused(f"NAME: {', '.join(unknown)}; wanted some of {', '.join(files)}")
    different = []
    with tempfile.TemporaryDirectory() as temporary:
        for name in chosen:
            path, write = files[name]
            target = Path(temporary) / name if arguments.check else (arguments.out or path.parent) / name
            store.made_of(path, {}, lambda _: write(target), "run the command of its numbers again")  # noqa: B023
            if not arguments.check:
                say(str(target))
            elif not is_same(path, target):
                different.append(name)
                say(f"{path}: not what the runs give; python -m benchmarks report {name} makes it")
    print_result({"files": len(chosen), "different": different} if arguments.check else {"files": chosen})
    return DIFFERENT if different else 0


def is_same(path: Path, other: Path) -> bool:
    """Whether two files show the same: texts to the byte, pictures to the pixel where one Matplotlib drew both."""
    if not path.is_file():
        return False
    if path.suffix != ".png":
        return path.read_bytes() == other.read_bytes()
    import numpy as np
    from PIL import Image

    with Image.open(path) as old, Image.open(other) as new:
        if old.info.get("Software") != new.info.get("Software"):
            return True  # its letters and lines may be others
        return bool(old.size == new.size and np.array_equal(np.asarray(old), np.asarray(new)))


def made() -> Iterator[Made]:
    """All that is made of the committed results."""
    yield from _paper()
    yield from _performance()
    yield from _with_a_table()
    yield from _scaling()
    yield from _pages()


def _read(name: str) -> dict[str, Any]:
    return store.result(RESULTS / name, "wanted a clone of the repository, which has the numbers")


def _paper() -> Iterator[Made]:
    from benchmarks.paper import classification
    from benchmarks.paper.cli import COMMITTED
    from benchmarks.paper.common import measured
    from benchmarks.paper.experiments import EXPERIMENTS, module
    from benchmarks.paper.table import write_table

    yield Made(RESULTS / "paper.md", lambda path: write_table(COMMITTED, path))
    for name in EXPERIMENTS:
        if (COMMITTED / f"{name}.jsonl").is_file() and measured(result := _read(f"paper/{name}.jsonl")):
            of = module(name)
            if hasattr(of, "draw"):
                write = lambda path, of=of, result=result: of.draw(result, path)
            else:
                write = lambda path, of=of, result=result: classification.draw(result, path, of.cells)
            yield Made(COMMITTED / f"{name}.png", write)


def _performance() -> Iterator[Made]:
    from benchmarks.performance.picture import draw
    from benchmarks.performance.tables import write

    yield Made(RESULTS / "performance.md", lambda path: write(RESULTS, path))
    yield Made(RESULTS / "performance.png", lambda path: draw(RESULTS, path))


def _with_a_table() -> Iterator[Made]:
    """Those that have a table and a picture beside their file."""
    from benchmarks.forward_budget import picture as budget
    from benchmarks.forward_budget import summary
    from benchmarks.language import comparison as language
    from benchmarks.policy import picture as policy
    from benchmarks.policy.summary import table as policies

    for path in sorted(RESULTS.glob("forward_budget_*.jsonl")):
        found = summary.summarized(path, _read(path.name))
        yield Made(path.with_suffix(".md"), lambda path, found=found: write_text(path, summary.table(found) + "\n"))
        yield Made(path.with_suffix(".png"), lambda path, found=found: budget.draw(found["curves"], path))
    for pattern, table, draw in (
        ("policy_*.jsonl", policies, policy.draw),
        ("language_*.jsonl", language.table, language.draw),
    ):
        for path in sorted(RESULTS.glob(pattern)):
            found = _read(path.name)
            write = lambda path, table=table, found=found: write_text(path, table(found) + "\n")
            yield Made(path.with_suffix(".md"), write)
            yield Made(path.with_suffix(".png"), lambda path, draw=draw, found=found: draw(found, path))


def _scaling() -> Iterator[Made]:
    from benchmarks.scaling import pictures

    found = _read("scaling.jsonl")
    yield Made(IMAGES / "scaling_measured.png", lambda path: pictures.draw_measured(found, path))
    yield Made(IMAGES / "scaling_predicted.png", lambda path: pictures.draw_predicted(found, path))


def _pages() -> Iterator[Made]:
    """Pages of the documentation with tables between marks, and their pictures."""
    from benchmarks.calibration.cli import EXPERIMENTS
    from benchmarks.edf import pictures, tables
    from benchmarks.forward_budget.summary import discrete_table, summarized
    from benchmarks.language import comparison
    from benchmarks.models.table import table
    from benchmarks.policy.summary import at_the_end

    def page(name: str, texts: dict[str, Callable[[], str]]) -> Made:
        def write(path: Path) -> None:
            text = (DOCS / name).read_text(encoding="utf-8")
            for mark, make in texts.items():
                text = replaced(text, mark, make())
            write_text(path, text)

        return Made(DOCS / name, write)

    with_origin = lambda table, found: lambda: f"{table(found)}\n\n{where(found)}"
    calibration = {}
    for name, module in EXPERIMENTS.items():
        of, found = importlib.import_module(module), _read(f"calibration/{name}.jsonl")
        calibration[name] = with_origin(of.table, found)
        yield Made(IMAGES / f"calibration_{name}.png", lambda path, of=of, found=found: of.draw(found, path))
    yield page("calibration_benchmarks.md", calibration)
    budget = summarized(RESULTS / "forward_budget_cpu.jsonl", _read("forward_budget_cpu.jsonl"))
    yield page("forward_budget.md", {"discrete": with_origin(discrete_table, budget)})
    policies = _read("policy_cpu.jsonl")
    yield page("policy.md", {"policies": with_origin(at_the_end, policies)})
    language = _read("language_cpu.jsonl")
    yield page("per_sample.md", {"language": lambda: comparison.table(language)})
    yield page("models.md", {"models": with_origin(table, _read("models.jsonl"))})
    edf = {path.stem: _read(path.name) for path in sorted(RESULTS.glob("edf_*.jsonl"))}
    for name, found in edf.items():
        yield Made(RESULTS / f"{name}.png", lambda path, found=found: pictures.draw(found, path))
    yield Made(DOCS / "results.md", lambda path: write_text(path, overview.text()))
    yield page("edf.md", {name: lambda found=found: tables.table(found) for name, found in edf.items()})


def _parser() -> Parser:
    parser = Parser(
        prog="python -m benchmarks report",
        description="Make all tables and pictures of the committed results from their files. It runs nothing. "
        "The last line on standard output is one JSON object.",
    )
    parser.add_argument("names", metavar="NAME", nargs="*", help="only these files, such as paper.md or dense.png")
    parser.add_argument("--out", metavar="DIR", type=folder, help="folder for all of them (default: where they are)")
    words = "write nothing: say which are not what the runs give, and exit with 1 if there are any"
    parser.add_argument("--check", action="store_true", help=words)
    return parser
