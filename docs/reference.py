"""Writes ``docs/api.md`` from the docstrings: ``python docs/reference.py``.

The public surface is what ``eki_jax/__init__.py``, every package's ``__init__.py`` and every module at the top level
export: what they import as a name (``from a import b as b``) or define, unless it begins with an underscore. What lies
in ``eki_jax.kernel`` is public only where one of these exports it.
"""

from __future__ import annotations

import ast
import enum
import importlib
import inspect
import pkgutil
import re
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, get_origin, is_typeddict

import eki_jax

PAGE = Path(__file__).with_name("api.md")
#: Modules in the order of a reader's needs; others follow by name.
ORDER = """losses step_sizes failures ensembles solvers compact kalman flows momentum natural training metrics online
semi_supervised sharding optax flax equinox edf"""
#: What a module needs beyond the core, where its docstring does not say.
EXTRAS = {
    "edf": "Needs the extra `optax`.",
    "equinox": "Needs the extra `equinox`.",
    "flax": "Needs the extra `flax`.",
    "flows": "An ODE solver for the fields comes with the extra `ode`.",
    "semi_supervised": "Needs SciPy, in the extra `graph`.",
    "training": "`Checkpoints` needs the extra `checkpoint`; pictures and progress bars come with `benchmarks`.",
}
HEAD = """# Reference

Every public name. This page is made from the docstrings by `python docs/reference.py`; they have shapes, maths, errors,
examples and sources (`help(eki_jax.direction)`). Names are given as the package has them: `euler` is `eki_jax.euler`,
`optax.eki` is `eki_jax.optax.eki`. Arguments after `*` go by name.
"""
TABLE = "\n\n| {} | {} | {} |\n|---|---|---|\n"


def modules() -> dict[str, ModuleType]:
    """The modules of the public surface by their names within the package ("" for itself), in the page's order."""
    found = [
        info.name.removeprefix("eki_jax.")
        for info in pkgutil.walk_packages(eki_jax.__path__, "eki_jax.")
        if (info.ispkg or info.name.count(".") == 1) and not re.search(r"\._|\.kernel\b", info.name)
    ]
    order = ORDER.split()
    place = lambda name: order.index(name) if name in order else len(order)
    found.sort(key=lambda name: (place(name.split(".")[0]), name))
    return {"": eki_jax} | {name: importlib.import_module(f"eki_jax.{name}") for name in found}


def exports(module: ModuleType) -> list[str]:
    """The names that a module says are its own."""
    names: list[str] = []
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.ImportFrom):
            names += [alias.asname for alias in node.names if alias.asname]
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign):
            names += [target.id for target in node.targets if isinstance(target, ast.Name)]
    return [name for name in names if not name.startswith("_") and not inspect.ismodule(getattr(module, name))]


def is_code(thing: Any) -> bool:
    """Whether a thing has a docstring of its own: a function or a class, no constant and no type alias."""
    return callable(thing) and get_origin(thing) is None


def signature(path: str, thing: Any) -> str:
    """``path(a, b, *, c)``, the names of the arguments; the path alone of what nobody calls."""
    is_error = inspect.isclass(thing) and issubclass(thing, BaseException)
    if not is_code(thing) or is_typeddict(thing) or is_error or getattr(thing, "_is_protocol", False):
        return path
    if inspect.isclass(thing) and issubclass(thing, enum.Enum):  # what inspect says depends on Python's version
        return f"{path}(value)"
    words: list[str] = []
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    for name, argument in inspect.signature(thing).parameters.items():
        if argument.kind is argument.KEYWORD_ONLY and not any(re.match(r"\*(?!\*)", word) for word in words):
            words.append("*")
        if not (name in ("parent", "name") and hasattr(thing, "scope")):  # fields of every linen module
            words.append(stars.get(argument.kind, "") + name)
    return f"{path}({', '.join(words)})"


def comment(name: str) -> str:
    """The ``#:`` comment above the definition of data."""
    text = ""
    for path in sorted(Path(eki_jax.__path__[0]).rglob("*.py")):
        if found := re.search(rf"((?:^#: .*\n)+){name}\b.* = ", path.read_text(), re.MULTILINE):
            text = re.sub("^#: ", "", found[1], flags=re.MULTILINE)
    return " ".join(text.split())


def sentence(name: str, thing: Any) -> str:
    """The first sentence of a docstring, or of the comment above the definition of data."""
    text = (inspect.getdoc(thing) or "") if is_code(thing) else comment(name)
    return markdown(re.split(r"(?<=\.)\s+(?=[A-Z(`])", text.split("\n\n")[0], maxsplit=1)[0])


def markdown(text: str) -> str:
    """One line, with the roles and literals of reStructuredText as code, safe in a table."""
    text = re.sub(r":\w+:`([^`]*)`", r"`\1`", " ".join(text.split())).replace("``", "`")
    return re.sub(r"(?<!\.)\.$", "", text).replace("|", r"\|")


def about(where: str, module: ModuleType) -> str:
    """The first paragraph of a module's docstring, and what the module needs beyond the core."""
    text = markdown((module.__doc__ or "").partition("\n\n")[0])
    return f"{text}. {EXTRAS.get(where, '')}".strip()


class Entry(NamedTuple):
    """A public thing: its shortest path within the package, the thing, and the other paths to it."""

    path: str
    thing: Any
    also: list[str]

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rpartition(".")[2]


def entries() -> dict[str, list[Entry]]:
    """Each thing once, under its shortest path, by the module that has it under one; a module may have none."""
    surface, ways, things = modules(), {}, {}
    for place, (where, module) in enumerate(surface.items()):
        for name in exports(module):
            thing, path = getattr(module, name), f"{where}.{name}".removeprefix(".")
            is_alias = getattr(thing, "__name__", name) != name
            things[id(thing)] = thing
            ways.setdefault(id(thing), []).append((is_alias, path.count("."), place, where, path))
    rows: dict[str, list[tuple[str, Any, list[tuple[str, str]]]]] = {where: [] for where in surface}
    for key, found in ways.items():
        (*_, path), *others = sorted(found)
        home = next((where for *_, where, _ in sorted(found) if where), "")
        rows[home].append((path, things[key], [(where, way) for *_, where, way in others]))
    return {
        home: [Entry(path, thing, [way for where, way in also if rows[where]]) for path, thing, also in found]
        for home, found in rows.items()
    }


def page() -> str:
    """The text of the index: a table a module, and one for the modules whose names are all at home elsewhere."""
    surface, rows, text, others = modules(), entries(), HEAD, ""
    for where, module in surface.items():
        if not rows[where]:
            names = ", ".join(f"`{name}`" for name in exports(module))
            others += f"| `{where}` | {about(where, module)} | {names} |\n"
            continue
        text += f"\n## {f'`{where}`' if where else 'The method'}\n\n{about(where, module)}"
        text += TABLE.format("name", "what it is", "also as")
        for path, thing, also in rows[where]:
            what = sentence(path.rpartition(".")[2], thing)
            text += f"| `{signature(path, thing)}` | {what} | {', '.join(f'`{way}`' for way in also)} |\n"
    return f"{text}\n## Other ways to the same names{TABLE.format('module', 'what it holds', 'its names')}{others}"


if __name__ == "__main__":
    PAGE.write_text(page())
