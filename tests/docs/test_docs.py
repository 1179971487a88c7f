"""What is written is true: the examples of docstrings and pages run, the README's commands are there."""

from __future__ import annotations

import ast
import contextlib
import doctest
import importlib
import io
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import eki_jax

ROOT = Path(__file__).parents[2]
MODULES = sorted(
    name
    for package in ("eki_jax", "benchmarks")
    for _, name, _ in pkgutil.walk_packages([str(ROOT / package)], f"{package}.")
    if not name.endswith("__main__") and ".peers." not in name  # each of the peers runs in an environment of its own
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name: str) -> None:
    module = importlib.import_module(name)
    found = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert found.failed == 0, f"{found.failed} of {found.attempted} examples"


def public_names() -> list[str]:
    """The names that ``eki_jax/__init__.py`` exports, one a line as ``x as x``."""
    tree = ast.parse((ROOT / "eki_jax/__init__.py").read_text())
    return [
        alias.asname for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names if alias.asname
    ]


def test_every_public_function_has_an_example() -> None:
    """Every public function says where it comes from."""
    functions = [getattr(eki_jax, name) for name in public_names()]
    bare = [f.__name__ for f in functions if callable(f) and not isinstance(f, type) and ">>>" not in (f.__doc__ or "")]
    assert set(bare) <= {"checked"}  # shown in raise_failed, which it goes with


def test_the_core_imports_neither_flax_nor_optax() -> None:
    code = "import sys, eki_jax; print([m for m in ('flax', 'optax', 'orbax', 'scipy.sparse') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_quick_start_has_exactly_two_commands() -> None:
    quick_start = (ROOT / "README.md").read_text().split("## Quick start")[1].split("\n## ")[0]
    commands = re.findall(r"```sh\n(.*?)```", quick_start, re.S)
    assert len(commands) == 2
    assert "python -m benchmarks train" in commands[0]
    assert "python -m pytest" in commands[1]


PAGES = sorted(ROOT.glob("*.md")) + sorted((ROOT / "docs").glob("*.md"))
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```)?", re.DOTALL | re.MULTILINE)
SLOW = {"continuous.md", "momentum.md", "sign_units.md", "train.md"}  # ODE solvers compile for long
MODELS = ("models", "models_flax", "models_equinox")
NETWORKS = ("edf", *MODELS, "natural_gradient", "optax", "semi_supervised", "sign_units", "train")
TRAIN = {f"{name}.md" for name in NETWORKS}  # networks, as benchmarks do


def marks(page: Path) -> list[pytest.MarkDecorator]:
    return [pytest.mark.slow] * (page.name in SLOW) + [pytest.mark.benchmarks] * (page.name in TRAIN)


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=marks(page), id=page.name) for page in PAGES if BLOCK.search(page.read_text())],
)
def test_snippets_print_what_the_page_says(page: Path) -> None:
    """Snippets run and print what the page says.

    Every ``python`` block of a page, in order, in one namespace; failures name the page and the line.
    """
    text = page.read_text()
    namespace: dict[str, Any] = {"__name__": page.stem}
    for block in BLOCK.finditer(text):
        line = text[: block.start()].count("\n") + 1
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile("\n" * line + block[1], page.name, "exec"), namespace)
        assert block[2] is None or printed.getvalue() == block[2]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_and_pictures_exist(page: Path) -> None:
    links = re.findall(r"\]\((?!https?://|#|mailto:)([^)#]+)", page.read_text())
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing
