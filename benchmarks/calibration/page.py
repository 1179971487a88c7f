"""Where an experiment's picture and table go."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from eki_jax.training.files import write_text

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "calibration_benchmarks.md"
IMAGES = ROOT / "docs" / "images"


def write(name: str, result: dict[str, Any], experiment: Any, out: Path, *, is_committed: bool) -> dict[str, str]:
    """Draw the picture and write the table: into the page and beside it, or all of it into ``out``.

    Args:
        name: name of the experiment.
        result: its file's content.
        experiment: its module, with ``table`` and ``draw``.
        out: folder of the file.
        is_committed: flag, True where the page's own numbers are meant.

    Returns:
        The names of the files written.
    """
    text = experiment.table(result) + "\n\n" + where(result)
    picture = (IMAGES if is_committed else out) / f"calibration_{name}.png"
    experiment.draw(result, picture)
    target = PAGE if is_committed else out / f"calibration_{name}.md"
    write_text(target, replaced(target.read_text(encoding="utf-8"), name, text) if is_committed else text + "\n")
    return {"picture": picture.name, "table": target.name}


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


def where(result: dict[str, Any]) -> str:
    """Where the numbers come from."""
    environment = result["environment"]
    return f"(`{result['command']}`; {environment['device']}, jax {environment['versions']['jax']})"


def number(value: float | None, digits: int = 2) -> str:
    """A number as a cell shows it, a dash where there is none.

    >>> number(0.1234), number(None), number(1234.5), number(3e-13)
    ('0.12', '–', '1.2e+03', '3.0e-13')
    """
    if value is None:
        return "–"
    small = value != 0 and abs(value) < 10**-digits
    return f"{value:.1e}" if small or abs(value) >= 1000 else f"{value:.{digits}f}"


def misfit_axis(axis: Any, most_runs: float) -> None:
    """Axes of a race: simulator runs up to the limit of iterations, and misfits with the target as a line."""
    from matplotlib.ticker import FixedLocator, NullLocator

    axis.axhline(1, color="0.4", lw=0.8)
    axis.set(xlabel="simulator runs", yscale="log", xlim=(0, most_runs), ylim=(0.6, 8))
    ticks = (0.6, 0.8, 1, 1.5, 2, 3, 4, 6, 8)
    axis.yaxis.set_major_locator(FixedLocator(ticks))
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.yaxis.set_minor_locator(NullLocator())
    axis.grid(alpha=0.3)
