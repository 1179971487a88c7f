"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]], numbers: str = "---:") -> str:
    """A table: the first column to the left, numbers to the right.

    Args:
        header: names of the columns.
        rows: cells.
        numbers: rule of the columns after the first; ``---`` has them to the left.

    >>> print(markdown(["method", "misfit"], [["EnKF", "0.5"]]))
    | method | misfit |
    | --- | ---: |
    | EnKF | 0.5 |
    """
    lines = [header, ["---", *[numbers] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
