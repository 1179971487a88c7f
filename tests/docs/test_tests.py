"""What the tests and the benchmarks keep to: short names, and the library's public modules."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
LONGEST = 45  # characters; the sentence is the docstring's
TESTS = sorted((ROOT / "tests").rglob("*.py"))
OUTSIDE = [p for p in TESTS if ROOT / "tests/kernel" not in p.parents] + sorted((ROOT / "benchmarks").rglob("*.py"))


def imported(tree: ast.Module) -> Iterator[str]:
    """The dotted path of every module and name that is imported."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_private(path: str) -> bool:
    package, *components = path.split(".")
    return package == "eki_jax" and any(part.startswith("_") and not part.endswith("__") for part in components)


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def test_names_are_short() -> None:
    functions = [node for path in TESTS for node in ast.walk(parsed(path)) if isinstance(node, ast.FunctionDef)]
    names = [node.name for node in functions if node.name.startswith("test_")]
    assert len(names) > 500
    assert [name for name in names if len(name) > LONGEST] == []


def test_private_modules_are_not_imported() -> None:
    """The kernel's own tests excepted."""
    found = {path: [n for n in imported(parsed(path)) if is_private(n)] for path in OUTSIDE}
    assert {path: names for path, names in found.items() if names} == {}


def test_what_counts_as_private() -> None:
    code = "import eki_jax._a, os._b\nfrom eki_jax import __version__, b\nfrom eki_jax.a._b import c\nfrom .d import _e"
    assert [name for name in imported(ast.parse(code)) if is_private(name)] == ["eki_jax._a", "eki_jax.a._b.c"]


def test_long_tests_are_there() -> None:
    """Every line of ``long.txt`` names a test of a file."""
    lines = (ROOT / "tests/long.txt").read_text().splitlines()
    functions = {line.split("[")[0] for line in lines}
    missing = [
        name for name in functions if f"def {name.split('::')[1]}(" not in (ROOT / name.split("::")[0]).read_text()
    ]
    assert lines == sorted(set(lines))
    assert not missing
