"""``python -m benchmarks performance``: speed and memory of the step, beside other libraries."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import store
from benchmarks.harness.command import Parser, Refused, command, folder, number, require, whole
from benchmarks.harness.peers import default_folder
from benchmarks.performance.parts import PARTS, Options
from benchmarks.performance.picture import draw
from benchmarks.performance.tables import line, section, write
from benchmarks.reporting import RESULTS, print_result
from eki_jax.training.files import claimed

# What other commands call the sizes.
_SIZES = {"smoke": "quick", "cpu": "default"}


@command("performance")
def main(argv: list[str]) -> int:
    """Measure the parts asked for, one file each; draw and tabulate what is there."""
    arguments = _parser().parse_args(argv)
    require("matplotlib")
    preset, out = _SIZES.get(arguments.preset, arguments.preset), arguments.out
    limit, linear = arguments.limit, arguments.linear_limit
    options = Options(preset, (arguments.peers or default_folder()).resolve(), arguments.repeats, limit)
    options_of = {"linear": options if linear is None else options._replace(limit=linear)}
    written, troubles = {}, []
    with claimed(out, ".performance.lock"):
        for name in PARTS:  # which all become the table, at the end
            path = _file(out, name)
            if name in arguments.parts:
                store.earlier(path, preset, part=name)
            elif path.exists():
                remedy = f"run --parts {name}, or remove it"
                store.made_of(path, store.result(path, remedy), lambda found, name=name: section(name, found), remedy)
        for name in arguments.parts:
            print(f"\n{name}: {(PARTS[name].__doc__ or '').splitlines()[0]}", flush=True)
            start = time.perf_counter()
            rows = []
            for row in PARTS[name](options_of.get(name, options)):
                rows.append(row)
                print(f"  {line(name, row)}", flush=True)
            seconds, text = time.perf_counter() - start, f"python -m benchmarks performance --parts {name}"
            head = {"part": name, "command": f"{text} --preset {preset}", "preset": preset, "seconds": seconds}
            payload = {**head, "rows": rows}
            path = _file(out, name)
            lost = measured((store.earlier(path) or {}).get("rows", [])) - measured(rows)
            if lost:
                beside = store.save(path.with_suffix(".partial"), payload).name
                troubles.append(f"{path}: left as it is, as it has {'; '.join(sorted(lost))}; this run is in {beside}")
            else:
                written[name] = store.save(path, payload)
        picture, table = draw(out, out / "performance.png"), write(out, out / "performance.md")
    files = {"results": {part: path.name for part, path in written.items()}}
    print_result({**files, "picture": picture and picture.name, "table": table.name})
    if troubles:
        raise Refused(" ".join(troubles))
    return 0


def _file(out: Path, part: str) -> Path:
    return out / f"performance-{part}.jsonl"


def measured(rows: list[dict[str, Any]]) -> set[str]:
    """What was measured, and not skipped, by the names in the rows."""
    found = set()
    for row in rows:
        name = ", ".join(str(row[key]) for key in _NAMES if key in row)
        if "median" in row or "fitted" in row:
            found.add(name)
        found |= {f"{name}, {problem}" for problem in row.get("test_accuracy", {})}
    return found


def _parts(text: str) -> list[str]:
    names = text.split(",")
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
    words = "folder for performance-PART.jsonl and the picture"
    parser.add_argument("--out", metavar="DIR", type=folder, default=RESULTS, help=words)
    return parser


_NAMES = ("network", "P", "M", "J", "contraction", "axis", "what")
