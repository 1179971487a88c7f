"""The tables of a run, in Markdown, from the files that its parts wrote."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.harness.tables import device_of, markdown
from eki_jax.training.files import write_text

Row = dict[str, Any]


def write(parts: dict[str, dict[str, Any]], path: Path) -> Path:
    """Write the page of some parts' tables; returns the path."""
    sections = [section(name, parts[name]) for name in _TABLES if name in parts]
    text = "# Speed and memory, as measured\n\nMade by `python -m benchmarks performance` from the JSON beside it.\n\n"
    write_text(path, text + "\n\n".join(sections) + "\n")
    return path


def with_rows(result: dict[str, Any]) -> dict[str, Any]:
    """A result with the rows of all its cases."""
    return {**result, "rows": [row for cell in result["cells"].values() for row in cell["found"]["rows"]]}


def section(name: str, result: dict[str, Any]) -> str:
    """The table of a part."""
    title, columns = _TABLES[name]
    rows = [list(cells(name, row).values()) for row in result["rows"]]
    run = f"`--parts {name} --preset {result['preset']}`"
    machines = dict.fromkeys(_machine(cell["environment"]) for cell in result["cells"].values())
    return f"## {title}\n\n{markdown(list(columns), rows, '---')}\n\n({'; '.join([run, *machines])})"


def _machine(environment: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
    return f"{device_of(environment)}, {environment['processors']} processors; {versions}"


def cells(name: str, row: Row) -> dict[str, str]:
    """A row of a part's table, by its columns."""
    return {title: _cell(row, column) for title, column in _TABLES[name][1].items()}


def line(name: str, row: Row) -> str:
    """The same as a person reads it while the part runs."""
    return ", ".join(f"{title}: {text}" for title, text in cells(name, row).items() if text != "–")


def _cell(row: Row, column: Callable[[Row], str]) -> str:
    try:
        return column(row)
    except (KeyError, TypeError):  # this measurement was skipped, or does not have the figure
        return "–"


def _milliseconds(row: Row) -> str:
    return f"{row['median'] * 1e3:,.1f}" if "median" in row else f"skipped: {row['skipped']}"


def _mebibytes(row: Row) -> str:
    return f"{row['peak_bytes'] / 2**20:,.0f}"


def times_ours(row: Row) -> str:
    """How many times as long as ours, or more than how many."""
    if "times_ours_at_least" in row:
        return f"> {row['times_ours_at_least']:.1f}"
    return f"{row['times_ours']:.2f}"


def _gigaflops(row: Row) -> str:
    return f"{row['matmul_rate'] / 1e9:.0f}"


def _compiled(row: Row) -> int:
    """Bytes that the compiled step has for its state and all else; the process has more, whatever it runs."""
    return row["state_bytes"] + row["compiler_temporary_bytes"]


def _kept(row: Row) -> str:
    if row["within_bound"]:
        return "yes"
    return "by the compiled step" if _compiled(row) <= row["bound_bytes"] else "no"


_STEP: dict[str, Callable[[Row], str]] = {
    "network": lambda row: row["network"],
    "J": lambda row: f"{row['J']:,}",
    "what": lambda row: row["what"],
    "ms a step": _milliseconds,
}
_FRAMEWORKS: dict[str, Callable[[Row], str]] = {
    **_STEP,
    "times ours": times_ours,
    "by processor time": lambda row: f"{row['times_ours_processor']:.2f}",
    "its matrix rate, GFLOP/s": _gigaflops,
    "peak, MiB": _mebibytes,
}
_PROBLEM: dict[str, Callable[[Row], str]] = {
    "P": lambda row: f"{row['P']:,}",
    "M": lambda row: f"{row['M']:,}",
    "J": lambda row: f"{row['J']:,}",
    "library": lambda row: row["what"],
    "ms": _milliseconds,
    "times ours": times_ours,
    "by processor time": lambda row: f"{row['times_ours_processor']:.2f}",
    "peak, MiB": _mebibytes,
}
_TABLES: dict[str, tuple[str, dict[str, Callable[[Row], str]]]] = {
    "steps": (
        "The step",
        {
            **_STEP,
            "% of the matrix rate": lambda row: f"{100 * row['of_matmul_rate']:.0f}",
            "matrix rate, GFLOP/s": _gigaflops,
            "compiled in s": lambda row: f"{row['compile_seconds']:.1f}",
            "peak, MiB": _mebibytes,
            "peak / ensemble": lambda row: f"{row['peak_over_ensemble']:.2f}",
            "state + compiled temporaries, MiB": lambda row: f"{_compiled(row) / 2**20:,.0f}",
            "bound, MiB": lambda row: f"{row['bound_bytes'] / 2**20:,.0f}",
            "kept": _kept,
        },
    ),
    "frameworks": ("The same step elsewhere", _FRAMEWORKS),
    "units": ("The same step elsewhere, on a processor with matrix units for bfloat16", _FRAMEWORKS),
    "linear": ("One assimilation of a linear inverse problem", _PROBLEM),
    "evolution": (
        "A generation of evolution strategies",
        {
            **_STEP,
            "ns a particle and sample": lambda row: f"{row['seconds_per_sample_and_particle'] * 1e9:.1f}",
            "times ours": times_ours,
            "peak, MiB": _mebibytes,
        },
    ),
    "natural": (
        "A step of the natural gradient",
        {**_STEP, "of the full-rank step": lambda row: f"{row['of_full_rank']:.2f}", "peak, MiB": _mebibytes},
    ),
    "per-sample": (
        "A step with noise of a sample's own",
        {
            **_STEP,
            "of a step of backpropagation": lambda row: f"{row['of backpropagation']:.1f}",
            "of a forward pass": lambda row: f"{row['of forward pass']:.1f}",
            "peak, MiB": _mebibytes,
        },
    ),
    "growth": (
        "How the kernel's cost grows",
        {
            "products": lambda row: row["contraction"],
            "along": lambda row: row["axis"],
            "sizes": lambda row: f"{row['points'][0][row['axis']]:,} to {row['points'][-1][row['axis']]:,}",
            "fitted exponent": lambda row: f"{row['fitted']:.2f}",
            "predicted": lambda row: f"{row['predicted']:.2f}",
        },
    ),
    "precision": (
        "What lower precision costs",
        {
            "precision": lambda row: row["what"],
            **{
                f"direction's relative error, {name}": lambda row, name=name: f"{row['direction_error'][name]:.1e}"
                for name in ("digits-dnn", "mnist-dnn1")
            },
            **{
                f"test accuracy, {name}": lambda row, name=name: f"{row['test_accuracy'][name]:.4f}"
                for name in ("digits-dnn", "mnist-dnn1")
            },
        },
    ),
}
#: The parts, and what each is called.
TITLES = {part: title for part, (title, _) in _TABLES.items()}
