"""What docstrings write for a reader of the source, in the words of reStructuredText."""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx

_kept: dict[str, list[str]] = {}


def tables(lines: list[str]) -> list[str]:
    """Tables with bars, which docutils does not know, as ``list-table``.

    >>> tables(["| a | b |", "|---|---|", "| 1 | 2 |"])[:2]
    ['.. list-table::', '   :header-rows: 1']
    """
    made: list[str] = []
    for number, line in enumerate(lines):
        if not re.match(r"\|.*\|$", line):
            made.append(line)
            continue
        if re.fullmatch(r"[|:\- ]+", line):
            continue
        if number == 0 or not lines[number - 1].startswith("|"):
            made += [".. list-table::", "   :header-rows: 1", ""]
        first, *others = [cell.strip() for cell in line.strip("|").split("|")]
        made += [f"   * - {first}", *(f"     - {cell}" for cell in others)]
    return made


def before(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Tables and stars; and the text of a property as it is, for :func:`after`."""
    lines[:] = [re.sub(r"(?<![\w*`\\(])\*(?=\w+[,)])", r"\\*", line) for line in tables(lines)]
    if what in ("property", "attribute"):
        _kept[name] = list(lines)


def after(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """A property's "Yes: what is said of it" is no type with a text, which napoleon takes it for."""
    if any(line.startswith(":type:") for line in lines) and name in _kept:
        lines[:] = _kept[name]


def skip_field(app: Sphinx, what: str, name: str, thing: Any, skip: bool, options: Any) -> bool | None:
    """Leaves out the fields of a NamedTuple, which its docstring has under Attributes."""
    return True if type(thing).__name__ in ("_tuplegetter", "member_descriptor") else None


def plain_attributes(app: Sphinx, document: nodes.document) -> None:
    """Attributes as docstrings have them: under this name, and without types; the words say shapes and kinds."""
    for signature in document.findall(addnodes.desc_signature):
        for note in list(signature.findall(addnodes.desc_annotation)):
            if note.astext().lstrip().startswith(":"):
                note.parent.remove(note)
    for name in document.findall(nodes.field_name):
        if name.astext() == "Variables":
            name.children = [nodes.Text("Attributes")]


def setup(app: Sphinx) -> dict[str, Any]:
    """Around napoleon, whose priority is 500."""
    app.connect("autodoc-process-docstring", before, priority=400)
    app.connect("autodoc-process-docstring", after, priority=600)
    app.connect("autodoc-skip-member", skip_field)
    app.connect("doctree-read", plain_attributes)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
