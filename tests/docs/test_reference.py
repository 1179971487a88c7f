"""The reference page: made from the docstrings, with every public name of every module."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any, get_origin

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/api.md").read_text()


def public_modules() -> list[str]:
    """Packages and the modules at the top level, from the folders; the kernel is no public surface."""
    package = ROOT / "eki_jax"
    found = [file.parent for file in package.rglob("__init__.py")] + [
        file.with_suffix("") for file in package.glob("*.py")
    ]
    names = {".".join(path.relative_to(ROOT).parts) for path in found if path.name != "__init__"}
    return sorted(name for name in names if "._" not in name and "eki_jax.kernel" not in name)


def public_names(module: ModuleType) -> list[str]:
    """What a person sees in a module: all but modules, private names and what a plain module imports for itself."""
    is_package = hasattr(module, "__path__")
    own = [
        name
        for name, thing in vars(module).items()
        if not name.startswith("_")
        and not inspect.ismodule(thing)
        and name != "annotations"
        and (is_package or is_re_export(module, name) or getattr(thing, "__module__", "") == module.__name__)
    ]
    return sorted(own)


def is_re_export(module: ModuleType, name: str) -> bool:
    return f" import {name} as {name}\n" in inspect.getsource(module)


MODULES = {name: importlib.import_module(name) for name in public_modules()}
NAMES = [(module, name) for module in MODULES for name in public_names(MODULES[module])]


def generator() -> Any:
    spec = importlib.util.spec_from_file_location("reference", ROOT / "docs/reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def listed() -> set[str]:
    """The paths that the page gives: a row's own, the others in its last column, and those in the last table."""
    paths = set()
    tables, _, others = PAGE.partition("## Other ways")
    for row in re.findall(r"^\| `.*\|$", tables, re.MULTILINE):
        name, *_, also = re.split(r"(?<!\\) \| ?", row.removeprefix("| ").removesuffix("|"))[:3]
        paths |= {re.sub(r"\(.*", "", name.strip("`"))} | set(re.findall(r"`([^`]+)`", also))
    for module, names in re.findall(r"^\| `([\w.]+)` \|.*\| (.*) \|$", others, re.MULTILINE):
        paths |= {f"{module}.{name}" for name in re.findall(r"`(\w+)`", names)}
    return {f"eki_jax.{path}" for path in paths}


def test_the_page_is_what_the_docstrings_make() -> None:
    assert generator().page() == PAGE, "docs/api.md is behind the docstrings: run `python docs/reference.py`"


def test_every_public_name_is_on_the_page() -> None:
    missing = {f"{module}.{name}" for module, name in NAMES} - listed()
    assert not missing, "run `python docs/reference.py`"


def test_the_page_names_nothing_else() -> None:
    """Every path that the page gives can be imported."""
    for path in listed():
        module, _, name = path.rpartition(".")
        assert hasattr(MODULES[module], name), path


@pytest.mark.parametrize("module", MODULES)
def test_every_public_module_is_on_the_page(module: str) -> None:
    short = module.removeprefix("eki_jax").removeprefix(".")
    assert f"## `{short}`" in PAGE or f"\n| `{short}` |" in PAGE or not short


@pytest.mark.parametrize("module", MODULES)
def test_public_things_have_docstrings(module: str) -> None:
    """Functions and classes; the text that NamedTuple and dataclass write by themselves does not count."""
    assert MODULES[module].__doc__
    bare = []
    for name in public_names(MODULES[module]):
        thing = getattr(MODULES[module], name)
        if callable(thing) and get_origin(thing) is None:
            text = thing.__doc__ or ""
            bare += [name] * (not text or text.startswith(f"{thing.__name__}("))
    assert not bare


def test_no_row_is_empty() -> None:
    """Constants and type aliases have a ``#:`` comment in the place of a docstring."""
    assert not re.findall(r"^\| `[^`]*` \| +\|.*$", PAGE, re.MULTILINE)


def test_a_new_name_is_missed() -> None:
    """The list of names follows the modules, not the page: a name that a package gets is asked for at once."""
    package = MODULES["eki_jax.losses"]
    package.new_loss = lambda outputs, targets: 0.0  # type: ignore[attr-defined]
    try:
        assert "new_loss" in public_names(package)
    finally:
        del package.new_loss
    assert "eki_jax.losses.new_loss" not in listed()


def test_the_extras_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for text in generator().EXTRAS.values():
        assert set(re.findall(r"`([a-z]+)`", text)) <= set(project["optional-dependencies"])


def test_the_old_name_of_the_driver_remains() -> None:
    sharding = MODULES["eki_jax.sharding"]
    assert sharding.spread is sharding.over_devices
