"""The pages on continuous time run as they are written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.slow
@pytest.mark.parametrize("page", ["continuous.md", "momentum.md"])
def test_page_runs(page):
    """Every ``python`` block, in order, in one namespace; failures name the page and the line."""
    text = (DOCS / page).read_text(encoding="utf-8")
    blocks = list(re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    assert blocks
    namespace: dict = {"__name__": page}
    for block in blocks:
        line = text[: block.start()].count("\n") + 1
        exec(compile("\n" * line + block[1], page, "exec"), namespace)


@pytest.mark.parametrize("page", ["continuous.md", "momentum.md"])
def test_pages_pictures_exist(page):
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", (DOCS / page).read_text(encoding="utf-8"))
    assert pictures
    assert all((DOCS / picture).is_file() for picture in pictures)
