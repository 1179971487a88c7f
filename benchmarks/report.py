"""``python -m benchmarks report``: all tables and pictures of the committed results, made of their files.

It runs nothing. For when they are to look otherwise, and to see that they are what the runs give.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks import overview
from benchmarks.harness import store
from benchmarks.harness.command import Parser, Refused, command, folder, require, say
from benchmarks.harness.experiment import Made, beside, pages, sections
from benchmarks.reporting import print_result
from eki_jax.training.files import write_text

DOCS = Path(__file__).parents[1] / "docs"
DIFFERENT = 1  # the exit code of --check where something is not what the runs give


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
    """All that is made of the committed results, each file once, even where several have a part in it."""
    yield from {one.path: one for one in _of_experiments()}.values()
    yield Made(DOCS / "results.md", lambda path: write_text(path, overview.text()))


def _of_experiments() -> Iterator[Made]:
    """What is beside their numbers, and the pages that have their tables."""
    texts = {}
    for one in itertools.chain(*overview.experiments()):
        for path in one.committed():
            found = one.read(path, overview.REMEDY)
            yield from beside(one, path, found)
            texts |= sections(one, found)
    yield from pages(texts)


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
