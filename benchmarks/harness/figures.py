"""Pictures: one way to write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from eki_jax.training.files import replacing


def save(figure: Any, path: Path, dpi: int = 100) -> Path:
    """Write a figure as a PNG, all of it or nothing, and forget it; returns the path."""
    from matplotlib import pyplot

    with replacing(path) as new:
        figure.savefig(new, dpi=dpi, format="png")
    pyplot.close(figure)
    return path
