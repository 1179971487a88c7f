"""Names become links: what docstrings refer to, and what pages write as code, here and in other libraries.

A name may be written along any public path to it (``eki_jax.kalman.etki``, ``kalman.etki``) or, where just one thing
has it, alone. Other libraries' names are in ``external.json``, which ``python docs/external.py`` makes, so that a build
asks no server for them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import external
import reference
from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.nodes import make_refnode

EXTERNAL: dict[str, str] = json.loads((Path(__file__).parents[1] / "external.json").read_text())
#: What a page writes as code and means as a name: perhaps called, perhaps with a dot in it.
NAME = re.compile(r"(?P<path>[A-Za-z_]\w*(?:\.\w+)*)(?:\((?P<arguments>.*)\))?", re.DOTALL)


class Names:
    """All ways to write a public name, each with the path under which the reference has it."""

    def __init__(self) -> None:
        self.paths: dict[str, str] = {}
        self.modules = {f"eki_jax.{where}" for where in reference.modules()}
        alone: dict[str, set[str]] = {}
        for where, rows in reference.entries().items():
            self.paths[f"eki_jax.{where}".removesuffix(".")] = f"eki_jax.{where}".removesuffix(".")
            if where:
                self.paths[where] = f"eki_jax.{where}"
            for path, _, also in rows:
                for way in (path, *also):
                    self.paths[way] = self.paths[f"eki_jax.{way}"] = f"eki_jax.{path}"
                alone.setdefault(path.rpartition(".")[2], set()).add(f"eki_jax.{path}")
        surface = reference.modules()
        for where, module in surface.items():  # names whose module is at home elsewhere
            for name in reference.exports(module):
                known = [path for path in alone.get(name, ()) if reference_object(path) is getattr(module, name)]
                for path in known:
                    self.paths.setdefault(f"{where}.{name}".removeprefix("."), path)
                    self.paths.setdefault(f"eki_jax.{where}.{name}", path)
        self.alone = {name: min(paths) for name, paths in alone.items() if len(paths) == 1}

    def find(self, text: str, near: str = "") -> str | None:
        """The path of what ``text`` means in the module ``near``, or None."""
        for candidate in (f"{near}.{text}", text):
            if candidate in self.paths:
                return self.paths[candidate]
        return self.alone.get(text)


def reference_object(path: str) -> Any:
    """What is behind a path."""
    thing: Any = reference.eki_jax
    for part in path.split(".")[1:]:
        thing = getattr(thing, part)
    return thing


NAMES = Names()


def external_link(name: str, shown: nodes.Node) -> nodes.reference | None:
    """A link to another library's page, where the list has the name."""
    name = external.in_full(name)
    if name not in EXTERNAL:  # a type that its module imports by itself
        name = next((full for full in EXTERNAL if full.endswith(f".{name}") and name[:1].isupper()), "")
    if not name:
        return None
    link = nodes.reference("", "", shown, refuri=EXTERNAL[name], internal=False)
    link["reftitle"] = name
    return link


def internal_link(env: BuildEnvironment, builder: Any, page: str, path: str, shown: nodes.Node) -> nodes.Element | None:
    """A link to the reference, where it has the path."""
    domain: Any = env.domains["py"]
    found = domain.objects.get(path) or domain.modules.get(path)
    return make_refnode(builder, page, found.docname, found.node_id, [shown], path) if found else None


def resolve_missing(app: Sphinx, env: BuildEnvironment, node: pending_xref, shown: nodes.Element) -> Any:
    """What a role in a docstring refers to, along another path than the reference's, or in another library."""
    if node.get("refdomain") != "py":
        return None
    target, near = node["reftarget"], node.get("py:module") or ""
    if found := external_link(target, shown):
        return found
    page = node.get("refdoc", "")
    for path in candidates(env, target, near):
        if link := internal_link(env, app.builder, page, path, shown):
            return link
    return None


def candidates(env: BuildEnvironment, target: str, near: str) -> Iterator[str]:
    """Paths that a role's target may mean, the likeliest first."""
    if path := NAMES.find(target, near):
        yield path
    owner, _, member = target.rpartition(".")
    if owner and (found := NAMES.find(owner, near)):
        yield f"{found}.{member}"
    domain: Any = env.domains["py"]  # a method of the class whose docstring this is, or a name of a module inside
    known = [name for name in domain.objects if name.endswith(f".{target}")]
    near_ones = [name for name in known if name.startswith(f"{near}.")] or known
    if len(near_ones) == 1:
        yield near_ones[0]
    while target.startswith("eki_jax."):  # what has no page of its own is explained on its package's
        target = target.rpartition(".")[0]
        yield NAMES.find(target) or target


class CodeToLinks(SphinxPostTransform):
    """Code in a page's text that is a public name links to the reference."""

    default_priority = 500

    def run(self, **_: Any) -> None:
        """Replaces literals by links to what they name."""
        page = self.env.docname
        if page.startswith("reference/"):  # docstrings say themselves what they refer to
            return
        for literal in list(self.document.findall(nodes.literal)):
            if any(isinstance(parent, nodes.reference | nodes.title | pending_xref) for parent in parents(literal)):
                continue
            found = NAME.fullmatch(literal.astext())
            path = found and NAMES.find(found["path"])
            shown, link = literal.deepcopy(), None
            if found and path:
                plain = "." not in found["path"] and found["arguments"] is None  # perhaps no name but an argument's
                elsewhere = page == "edf" and found["path"] not in NAMES.alone  # it has a `nesterov` of its own
                if not (plain and page != "api" and (path in NAMES.modules or elsewhere)):
                    link = internal_link(self.env, self.app.builder, page, path, shown)
            elif found:
                link = external_link(found["path"], shown)
            if link is not None:
                literal.replace_self(link)


def parents(node: nodes.Node) -> list[nodes.Node]:
    """The nodes around a node."""
    found = []
    while node.parent is not None:
        node = node.parent
        found.append(node)
    return found


def setup(app: Sphinx) -> dict[str, Any]:
    """Connects both ways."""
    app.connect("missing-reference", resolve_missing)
    app.add_post_transform(CodeToLinks)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
