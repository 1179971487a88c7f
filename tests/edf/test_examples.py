"""The guide's examples run."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_higher_order_trains_faster() -> None:
    """A higher order trains faster on the digits."""
    losses = runpy.run_path(str(ROOT / "examples" / "edf_digits.py"))["main"](steps=12)  # before any is at rounding
    adam, first, fifth, twentieth = losses.values()
    assert adam > first > fifth > twentieth


@pytest.mark.slow
def test_the_picture_of_the_flows_is_drawn(tmp_path: Path) -> None:
    norms = runpy.run_path(str(ROOT / "examples" / "edf_flow.py"))["main"](str(tmp_path / "flow.png"))
    assert (tmp_path / "flow.png").stat().st_size > 20_000
    np.testing.assert_allclose(norms["flow"], norms["flow"][0] * np.exp(-np.linspace(0, 4, 41)), rtol=1e-3)
    np.testing.assert_allclose(norms["geodesic"], norms["flow"][0] * (1 - np.linspace(0, 1, 21)), atol=1e-3)
    assert norms["newton"][-1] < 1e-3
