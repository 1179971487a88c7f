"""The picture of a run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from benchmarks.harness.figures import legend, panels, save
from benchmarks.performance.tables import times_ours


def draw(parts: dict[str, dict[str, Any]], path: Path) -> Path:
    """Draw some parts, a panel each of those that have one, which some of them do."""
    plots = [(parts[name]["rows"], plot) for name, plot in PANELS.items() if name in parts]
    columns = len(plots) if len(plots) < 4 else 2
    lines = -(-len(plots) // columns)
    figure, axes = panels(lines, columns, (6.4 * columns, 5.5 * lines))
    for axis, (rows, plot) in zip(axes.ravel(), plots, strict=False):
        plot(axis, rows)
    return save(figure, path, dpi=80)


def _steps(axis: Any, rows: list[dict[str, Any]]) -> None:
    rows = [row for row in rows if row.get("of_matmul_rate")]
    labels = [f"{row['network']}, J = {row['J']}{', MEKI' if row['what'] == 'nesterov' else ''}" for row in rows]
    axis.barh(labels, [100 * row["of_matmul_rate"] for row in rows], color="#4477aa")
    axis.axvline(100, color="black", linewidth=0.8)
    axis.invert_yaxis()
    axis.set(xlabel="% of the machine's matrix-product rate", title="A whole step")


def _frameworks(axis: Any, rows: list[dict[str, Any]], title: str = "The same step elsewhere") -> None:
    rows = [row for row in rows if row["what"] != "eki_jax" and ("times_ours" in row or "times_ours_at_least" in row)]
    labels = [f"{row['what']}, {row['network']}, J = {row['J']}" for row in rows]
    bars = axis.barh(labels, [row.get("times_ours") or row["times_ours_at_least"] for row in rows], color="#ee6677")
    axis.bar_label(bars, [times_ours(row) for row in rows], padding=3)
    axis.margins(x=0.15)
    axis.axvline(1, color="black", linewidth=0.8)
    axis.invert_yaxis()
    axis.set(xlabel="seconds of a step / seconds of eki_jax", title=title)


def _units(axis: Any, rows: list[dict[str, Any]]) -> None:
    _frameworks(axis, rows, "The same, on a processor with matrix units for bfloat16")


def _linear(axis: Any, rows: list[dict[str, Any]]) -> None:
    libraries = [name for name in dict.fromkeys(row["what"] for row in rows) if not name.startswith("eki_jax")]
    cases = list(dict.fromkeys((row["P"], row["M"], row["J"]) for row in rows))
    markers = dict(zip(libraries, "osD^v", strict=False))
    for name in libraries:
        found = [row for row in rows if row["what"] == name and row.get("times_ours")]
        at = [cases.index((row["P"], row["M"], row["J"])) for row in found]
        axis.plot([row["times_ours"] for row in found], at, markers[name], label=name)
    axis.axvline(1, color="black", linewidth=0.8)
    power = lambda number: f"$10^{{{round(math.log10(number))}}}$"
    axis.set_yticks(range(len(cases)), [f"P = {power(p)}, M = {power(m)}, J = {j}" for p, m, j in cases])
    axis.invert_yaxis()
    axis.set(xscale="log", xlabel="seconds / seconds of eki_jax's Kalman step", title="One step of an inverse problem")
    legend(axis, loc="lower right")


# The parts that have a panel.
PANELS = {"steps": _steps, "frameworks": _frameworks, "units": _units, "linear": _linear}
