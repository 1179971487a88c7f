"""``python -m benchmarks performance``: speed and memory of the step, beside other libraries."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from benchmarks.performance.environments import default_folder
from benchmarks.performance.parts import PARTS, Options
from benchmarks.performance.picture import draw
from benchmarks.performance.tables import write
from benchmarks.reporting import RESULTS, print_result, save_result


def main(argv: list[str]) -> int:
    """Measure the parts asked for, one JSON file each; draw and tabulate what is there."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks performance", description=__doc__)
    parser.add_argument("--preset", choices=("quick", "default", "full"), default="default", help="how many shapes")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"comma-separated, of: {', '.join(PARTS)}")
    parser.add_argument("--repeats", type=int, default=3, help="least number of timed calls (default: 3)")
    parser.add_argument("--limit", type=float, default=120, help="seconds for one measurement (default: 120)")
    parser.add_argument("--linear-limit", type=float, help="the same for the part linear (default: as --limit)")
    parser.add_argument("--env-dir", type=Path, default=default_folder(), help="where other libraries are installed")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for performance-PART.json and the picture")
    arguments = parser.parse_args(argv)
    names = arguments.parts.split(",")
    unknown = sorted(set(names) - set(PARTS))
    if unknown:
        parser.error(f"--parts: {', '.join(unknown)}; wanted some of {', '.join(PARTS)}")
    limit, linear = arguments.limit, arguments.linear_limit
    options = Options(arguments.preset, arguments.env_dir.resolve(), arguments.repeats, limit)
    options_of = {"linear": options if linear is None else options._replace(limit=linear)}
    written = {}
    for name in names:
        print(f"\n{name}: {(PARTS[name].__doc__ or '').splitlines()[0]}", flush=True)
        start = time.perf_counter()
        rows = PARTS[name](options_of.get(name, options), lambda row: print("  " + line(row), flush=True))
        payload = {"part": name, "preset": options.preset, "seconds": time.perf_counter() - start, "rows": rows}
        written[name] = save_result(arguments.out / f"performance-{name}.json", payload)
    picture, table = draw(arguments.out), write(arguments.out)
    files = {"results": {part: path.name for part, path in written.items()}}
    print_result({**files, "picture": picture and picture.name, "table": table.name})
    return 0


def line(row: dict[str, Any]) -> str:
    """A row as a person reads it."""
    keys = [key for key in ("network", "P", "M", "J", "contraction", "axis", "what") if key in row]
    cells = [f"{key} {row[key]}" if key in ("P", "M", "J") else str(row[key]) for key in keys]
    if "skipped" in row:
        cells.append(f"skipped: {row['skipped']}")
    for key, text in _CELLS.items():
        if isinstance(row.get(key), int | float):
            cells.append(text(row[key]))
    cells += [f"direction error {name} {value:.2g}" for name, value in row.get("direction_error", {}).items()]
    cells += [f"test accuracy {name} {value:.4f}" for name, value in row.get("test_accuracy", {}).items()]
    return "  ".join(cells)


_CELLS = {
    "median": lambda v: f"{v * 1e3:.1f} ms",
    "processor_median": lambda v: f"(processor {v * 1e3:.1f} ms)",
    "of_matmul_rate": lambda v: f"{100 * v:.0f} % of the matrix rate",
    "of_matmul_processor_rate": lambda v: f"({100 * v:.0f} % by processor time)",
    "times_ours": lambda v: f"{v:.2f} times ours",
    "times_ours_processor": lambda v: f"({v:.2f} by processor time)",
    "of_full_rank": lambda v: f"{v:.2f} of the full-rank step",
    "times_ours_at_least": lambda v: f"> {v:.1f} times ours",
    "peak_bytes": lambda v: f"peak {v / 2**20:.0f} MiB",
    "peak_over_ensemble": lambda v: f"= {v:.2f} ensembles",
    "compile_seconds": lambda v: f"compiled in {v:.1f} s",
    "fitted": lambda v: f"fitted exponent {v:.2f}",
    "predicted": lambda v: f"predicted {v:.2f}",
}
