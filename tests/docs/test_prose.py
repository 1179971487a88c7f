"""Every entry of ``Args`` and ``Attributes`` begins with a noun phrase that can be read alone."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "eki_jax").rglob("*.py"))

#: Words that cannot begin a noun phrase, whatever follows.
NO_NOUNS = """whether how which what where when who whose whom why that such see as like if unless while because of
for in on at by to from with without over under between among beside before after until into through is are was has
have had does do can may must should will not no none never also else then there here keeps says gets returns makes
takes gives shows lets holds adds sends hands goes keep take show go hand let made passed shaped handed same it its
their them this these those only"""
#: Words that begin one, but not where a comma, a bracket or the end comes next.
WANT_A_NOUN = """shape positive negative symmetric ascending descending centred sorted differentiable square more less
least most true false given wanted used called"""


def entries(docstring: str) -> Iterator[tuple[str, str]]:
    """The entries of the sections ``Args`` and ``Attributes``: names, and what is said of them."""
    section = ""
    for line in docstring.splitlines():
        if line and not line.startswith(" "):
            section = line
        found = re.fullmatch(r" {4}(\S[^:]*):\s+(.*)", line)
        if found and section in ("Args:", "Attributes:"):
            yield found[1], found[2]


def begins_with_a_noun(text: str) -> bool:
    """Whether the first word can begin a noun phrase; a letter, number, literal or reference alone cannot."""
    found = re.match(r"(?:(?:the|an?)\s+)*([a-z][\w'-]+)(\s*[,.;:(]|$)?", text.lower())
    if not found or found[1] in NO_NOUNS.split():
        return False
    return found[2] is None or found[1] not in WANT_A_NOUN.split()


def wrong_entries(module: str) -> list[str]:
    wrong = []
    for node in ast.walk(ast.parse((ROOT / module).read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            for name, text in entries(ast.get_docstring(node) or ""):
                if not begins_with_a_noun(text):
                    wrong.append(f"{module}:{node.lineno} {node.name}: {name}: {text}")
    return wrong


@pytest.mark.parametrize("module", MODULES)
def test_entries_begin_with_a_noun(module: str) -> None:
    """What stands in a docstring."""
    wrong = wrong_entries(module)
    assert not wrong, "begin these with a noun, as in 'driver: name of what runs':\n" + "\n".join(wrong)


@pytest.mark.parametrize(
    ("text", "is_noun"),
    [
        ("which.", False),
        ("of the penalty", False),
        ("whose centred noise is added", False),
        ("``forward(params, x) -> outputs`` for one particle", False),
        (":func:`low_rank` or :func:`full_rank`.", False),
        ("J, on all devices together.", False),
        ("0 where every particle has its own.", False),
        ("the same, for the accuracy", False),
        ("None for all pairs", False),
        ("shape (J, M).", False),
        ("shape of the leaf", True),
        ("symmetric, shape (N, N)", False),
        ("symmetric matrix", True),
        ("function ``loss(outputs, targets) -> scalar`` of one particle", True),
        ("distribution whose centred noise is added", True),
        ("a JAX random key.", True),
        ("number of particles J", True),
    ],
)
def test_what_can_be_read_alone(text: str, is_noun: bool) -> None:
    assert begins_with_a_noun(text) == is_noun


def test_entries_are_found_in_their_sections() -> None:
    docstring = (
        "Text: of it.\n\nArgs:\n    a: of b\n        c: more\n    *rest: numbers\n\nRaises:\n    KeyError: of a key."
    )
    assert list(entries(docstring)) == [("a", "of b"), ("*rest", "numbers")]
