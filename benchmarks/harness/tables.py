"""Tables in Markdown: one way to write them, to put them into a page, and to say where their numbers come from."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any


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


def replaced(page: str, name: str, text: str) -> str:
    """``page`` with ``text`` between its marks for ``name``.

    >>> print(replaced("a <!-- table x -->old<!-- end x --> b", "x", "new"))
    a <!-- table x -->
    <BLANKLINE>
    new
    <BLANKLINE>
    <!-- end x --> b
    """
    begin, end = f"<!-- table {name} -->", f"<!-- end {name} -->"
    if begin not in page or end not in page:
        raise ValueError(f"page: has no marks {begin} and {end}; wanted both")
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    return pattern.sub(lambda _: f"{begin}\n\n{text}\n\n{end}", page)


def machine(environment: dict[str, Any]) -> str:
    """A machine in words.

    >>> machine({"device": "gpu: H200", "processors": 16, "versions": {"jax": "0.10.2"}})
    'gpu: H200, 16 processors, jax 0.10.2'
    """
    return f"{device_of(environment)}, {environment['processors']} processors, jax {environment['versions']['jax']}"


def device_of(environment: dict[str, Any]) -> str:
    """The device of a run, a processor by its name where that was recorded.

    >>> device_of({"device": "cpu: cpu", "processor": "Z80"}), device_of({"device": "gpu: H200", "processor": "Z80"})
    ('cpu: Z80', 'gpu: H200')
    """
    named = environment.get("processor") if environment["device"].startswith("cpu") else None
    return f"cpu: {named}" if named else str(environment["device"])


def where(result: dict[str, Any]) -> str:
    """Where the numbers come from."""
    environment = result["environment"]
    return f"(`{result['command']}`; {device_of(environment)}, jax {environment['versions']['jax']})"


def with_origin(table: Callable[[dict[str, Any]], str]) -> Callable[[dict[str, Any]], str]:
    """A function that makes a result's table, with a line about where the numbers come from."""
    return lambda result: f"{table(result)}\n\n{where(result)}"


def number(value: float | None, digits: int = 2) -> str:
    """A number as a cell shows it, a dash where there is none.

    >>> number(0.1234), number(None), number(1234.5), number(3e-13)
    ('0.12', '–', '1.2e+03', '3.0e-13')
    """
    if value is None:
        return "–"
    small = value != 0 and abs(value) < 10**-digits
    return f"{value:.1e}" if small or abs(value) >= 1000 else f"{value:.{digits}f}"
