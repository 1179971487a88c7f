"""Pictures: one style, and one way to write them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eki_jax.training.files import replacing

SMALL = 8  # of a legend's letters


def panels(rows: int, columns: int, size: tuple[float, float], **options: Any) -> tuple[Any, np.ndarray]:
    """A figure and its panels, shape (rows, columns), each with a grid.

    Args:
        rows: number of rows.
        columns: number of columns.
        size: width and height of the figure in inches.
        **options: of Matplotlib's ``Figure.subplots``.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    return figure, axes


def pairs(number: int, size: tuple[float, float], columns: int = 3) -> tuple[Any, list[tuple[Any, Any]]]:
    """A figure and pairs of panels, one below the other.

    Args:
        number: number of pairs.
        size: width and height of a pair in inches.
        columns: largest number of pairs side by side.
    """
    columns = min(columns, number)
    rows = -(-number // columns)
    figure, axes = panels(2 * rows, columns, (size[0] * columns, size[1] * rows))
    found = [tuple(axes[2 * (i // columns) : 2 * (i // columns) + 2, i % columns]) for i in range(rows * columns)]
    for pair in found[number:]:
        for axis in pair:
            axis.set_visible(False)
    return figure, found[:number]


def band(
    axis: Any, x: Any, low: Any, middle: Any, high: Any, *, alpha: float = 0.2, marks: str = "", **style: Any
) -> None:
    """A line, and the band that it is in.

    Args:
        axis: panel.
        x: where the points are.
        low: lower edge of the band.
        middle: line.
        high: upper edge of the band.
        alpha: opacity of the band.
        marks: Matplotlib's format of the line.
        **style: of the line; the band has its color.
    """
    (line,) = axis.plot(x, middle, marks, **style)
    axis.fill_between(x, low, high, color=line.get_color(), alpha=alpha, linewidth=0)


def legend(of: Any, title: str = "", handles: Sequence[Any] = (), **options: Any) -> None:
    """A legend in small letters, of a panel or of a figure with the handles and labels of one."""
    of.legend(*handles, fontsize=SMALL, title=title or None, title_fontsize=SMALL, **options)


def legend_below(figure: Any, panels: Sequence[Any], title: str) -> None:
    """One legend below a figure, with what any of some panels has."""
    entries = {label: line for axis in panels for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    legend(figure, title, (list(entries.values()), list(entries)), loc="outside lower center", ncols=4)


def whole_numbers(axis: Any) -> None:
    """Ticks of whole numbers below a panel."""
    axis.xaxis.get_major_locator().set_params(integer=True)


def logarithmic(axis: Any) -> None:
    """A logarithmic scale below a panel, with labels at powers alone: others would run into each other."""
    axis.set_xscale("log")
    axis.xaxis.set_minor_formatter("")


def save(figure: Any, path: Path, dpi: int = 100) -> Path:
    """Write a figure as a PNG, all of it or nothing; returns the path."""
    with replacing(path) as new:
        figure.savefig(new, dpi=dpi, format="png")
    return path
