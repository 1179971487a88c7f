"""Where an experiment's picture and table go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.harness.tables import replaced, where
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


def misfit_axis(axis: Any, most_runs: float) -> None:
    """Axes of a race: simulator runs up to the limit of iterations, and misfits with the target as a line."""
    from matplotlib.ticker import FixedLocator, NullLocator

    axis.axhline(1, color="0.4", lw=0.8)
    axis.set(xlabel="simulator runs", yscale="log", xlim=(0, most_runs), ylim=(0.6, 8))
    ticks = (0.6, 0.8, 1, 1.5, 2, 3, 4, 6, 8)
    axis.yaxis.set_major_locator(FixedLocator(ticks))
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.yaxis.set_minor_locator(NullLocator())
