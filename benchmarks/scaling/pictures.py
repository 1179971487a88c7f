"""Two pictures: what was measured, and what the model predicts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.harness.figures import legend, legend_below, panels, save
from benchmarks.scaling import measured, predicted
from eki_jax import sharding

_NAMES = (*sharding.COMMUNICATIONS, predicted.NATURAL)
_STYLES = dict(zip(_NAMES, ("-o", "-s", "--^", "-D", ":v", "-P", "--*"), strict=True))
_WIDTHS = dict(zip(_NAMES, (7.0, 4.5, 2.5, 1.5, 1.5, 1.5, 1.5), strict=True))  # in the order of drawing


def draw_measured(result: dict[str, Any], path: Path) -> None:
    """Time, communication and memory against the number of devices, strong above weak."""
    rows = [measured.Row(**row) for row in result["measured"]]
    columns: list[tuple[str, Callable[[Any], float]]] = [
        ("milliseconds a step", lambda row: 1e3 * row.seconds),
        ("MB sent by a device a step", lambda row: row.sent / 1e6),
        ("peak MB of a device", lambda row: row.memory / 1e6),
    ]
    figure, grid = panels(2, 3, (12, 7), sharex=True)
    for axes_row, scaling in zip(grid, ("strong", "weak"), strict=True):
        some = [row for row in rows if row.scaling == scaling]
        held = f"J = {some[0].particles}" if scaling == "strong" else f"J = {some[0].particles} a device"
        for axes, (label, value) in zip(axes_row, columns, strict=True):
            _lines(axes, some, lambda row: row.communication, value)
            axes.set(ylabel=label, title=f"{scaling}: {held}", ylim=(0, None))
            if label.startswith("MB"):
                _predicted_marks(axes, some)
    for axes in grid[1]:
        axes.set(xlabel="devices")
    legend(grid[0, 2])
    marks = "crosses: what the model says is sent (of bf16_sums a processor sends twice as much: it makes them float32)"
    marks += "\nwhere lines coincide, the thinner lie upon the wider; of natural, the samples are strong and weak"
    figure.suptitle(f"Measured on {result['kind']}\n{marks}", fontsize=11)
    save(figure, path, dpi=90)


def about(machine: dict[str, Any]) -> str:
    """The machine of the predictions in words."""
    local, remote = machine["local"]["bandwidth"], machine["remote"]["bandwidth"]
    return (
        f"{machine['flops'] / 1e12:.0f} TFLOP/s a GPU, {machine['devices_per_host']} GPUs a host at "
        f"{local / 1e9:.0f} GB/s, {remote / 1e9:.0f} GB/s a GPU between hosts"
    )


def draw_predicted(result: dict[str, Any], path: Path) -> None:
    """Weak-scaling efficiency and strong-scaling speed-up against the number of GPUs, a column a network."""
    rows = [predicted.Row(**row) for row in result["predicted"]]
    networks = list(dict.fromkeys(row.network for row in rows))
    figure, grid = panels(2, len(networks), (11, 8), sharex=True)
    for column, network in enumerate(networks):
        weak = [row for row in rows if row.network == network and row.scaling == "weak"]
        strong = [row for row in rows if row.network == network and row.scaling == "strong"]
        _lines(grid[0, column], weak, lambda row: row.communication, lambda row: row.efficiency)
        best = [row for row in weak if row.communication == "all_reduce"]
        top = [row.efficiency_overlapped for row in best]
        grid[0, column].plot([row.devices for row in best], top, "k:", label="all_reduce, wholly overlapped")
        held = f"weak: J = {weak[0].particles // weak[0].devices} a GPU"
        grid[0, column].set(title=f"{network}, {held}", ylabel="efficiency", ylim=(0, 1.05))
        _lines(grid[1, column], strong, lambda row: row.communication, lambda row: row.efficiency * row.devices)
        counts = sorted({row.devices for row in strong})
        grid[1, column].plot(counts, counts, "k-", linewidth=0.7, label="ideal")
        grid[1, column].set(title=f"{network}, strong: the paper's J = {strong[0].particles}", ylabel="speed-up")
        grid[1, column].set(yscale="log", xlabel="GPUs", ylim=(0.5, None))
    for axes in grid.flat:
        axes.axvline(8.5, color="grey", linewidth=0.7)
    legend_below(figure, grid[:, 0], "")
    figure.suptitle(
        f"Predicted, not measured: {about(result['machine'])}\n(grey line: the end of one host)", fontsize=10
    )
    save(figure, path, dpi=90)


def _lines(axes: Any, rows: Iterable[Any], label: Callable[[Any], str], value: Callable[[Any], float]) -> None:
    groups: dict[str, list[Any]] = {}
    for row in rows:
        groups.setdefault(label(row), []).append(row)
    for name, members in groups.items():
        style, width = _STYLES[name], _WIDTHS[name]  # type: ignore[index]
        axes.plot(
            [row.devices for row in members],
            list(map(value, members)),
            style,
            label=name,
            linewidth=width,
            markersize=width + 3,
            alpha=0.9,
        )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")


def _predicted_marks(axes: Any, rows: list[measured.Row]) -> None:
    axes.plot([row.devices for row in rows], [row.predicted_sent / 1e6 for row in rows], "kx", markersize=7)
