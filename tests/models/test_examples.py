"""The examples with stock layers learn, and take the models as they are."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_transformer_example_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few steps take it below a guess by the letters' frequencies, which is below a uniform one."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    result = importlib.import_module("transformer_flax").main(steps=60, particles=200, samples=64)
    assert result.last < result.frequencies < result.uniform < result.first


@pytest.mark.slow
def test_the_equinox_example_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples")
    assert importlib.import_module("cnn_equinox").main(epochs=4) > 0.8


def test_the_examples_take_models_as_they_are() -> None:
    """Neither names a leaf that is to be treated in another way."""
    for name in ("transformer_flax", "cnn_equinox"):
        text = (ROOT / f"examples/{name}.py").read_text()
        assert "natural_gradient(" in text
        assert "plain=" not in text
