"""Mathematics as MathML: every current browser draws it by itself, with no script and from no other server.

Not every system has a font for it, so the site brings one: STIX Two Math (SIL Open Font License), as the package
ziamath has it, reduced to the characters of formulas.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

from docutils import nodes
from fontTools import subset
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.util import logging

logger = logging.getLogger(__name__)


def mathml(node: nodes.Element, display: str) -> str:
    """The node's LaTeX as a ``<math>`` element, with the source as its label for who copies or listens."""
    text = node.astext()
    if "\\\\" in text and "\\begin" not in text:
        text = rf"\begin{{aligned}}{text}\end{{aligned}}"
    try:
        made = convert(text, display=display)
        if unknown := re.findall(r"\\[A-Za-z]+", made):
            raise ValueError(f"unknown {', '.join(unknown)}")
        return made
    except Exception as error:  # whatever its parser raises is a formula that nobody could read
        logger.warning("no MathML for %r: %s", text, error, location=node)
        return f"<code>{text}</code>"


def visit_math(self: Any, node: nodes.Element) -> None:
    """A formula in a line of text."""
    self.body.append(f'<span class="math">{mathml(node, "inline")}</span>')
    raise nodes.SkipNode


def visit_displaymath(self: Any, node: nodes.Element) -> None:
    """A formula by itself."""
    self.body.append(f'<div class="math">{mathml(node, "block")}</div>\n')
    raise nodes.SkipNode


#: Latin, accents, Greek, punctuation, letter-like signs, arrows, operators, brackets, stretching parts, alphabets.
CHARACTERS = (
    (0x20, 0x17F),
    (0x2B0, 0x3FF),
    (0x2000, 0x206F),
    (0x20D0, 0x22FF),
    (0x2300, 0x23FF),
    (0x27C0, 0x27FF),
    (0x2980, 0x2AFF),
    (0x1D400, 0x1D7FF),
)


def write_font(app: Sphinx, exception: Exception | None) -> None:
    """The font that ``site.css`` names, into the site."""
    out = Path(app.outdir) / "_static" / "math.woff"
    if exception is not None or app.builder.format != "html" or out.exists():
        return
    package = importlib.util.find_spec("ziamath")
    assert package is not None
    assert package.origin is not None
    options = subset.Options(flavor="woff", layout_features=["*"], name_IDs=["*"], notdef_outline=True)
    font = subset.load_font(str(Path(package.origin).parent / "fonts" / "STIXTwoMath-Regular.ttf"), options)
    reduced = subset.Subsetter(options)
    reduced.populate(unicodes=[code for first, last in CHARACTERS for code in range(first, last + 1)])
    reduced.subset(font)
    subset.save_font(font, str(out), options)


def setup(app: Sphinx) -> dict[str, Any]:
    """Offers the renderer as ``html_math_renderer = "mathml"``."""
    app.connect("build-finished", write_font)
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_displaymath, None))
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
