"""The site: ``python -m sphinx -W --keep-going docs build/site``. It needs no network, and nor do its pages."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS), str(DOCS / "_ext"), str(DOCS.parent)]

import eki_jax  # noqa: E402

PYPROJECT = tomllib.loads((DOCS.parent / "pyproject.toml").read_text())

project = "eki_jax"
author = "The eki_jax developers"
copyright = "The eki_jax developers, under the Apache License 2.0"
release = version = eki_jax.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "myst_parser",
    "sphinx_copybutton",
    "docstrings",
    "mathml",
    "names",
    "pages",
]
exclude_patterns = ["_ext", "_static", "build"]
nitpicky = True
#: What docstrings mention that has no page: private helpers, and a type of a library that is not linked to.
nitpick_ignore = [("py:func", "axes_of_left"), ("py:class", "matplotlib.figure.Figure")]
#: The repository's address, stated once, for links to files that have no page here.
repository = PYPROJECT["tool"]["hatch"]["metadata"]["hooks"]["custom"]["repository"]

myst_enable_extensions = ["dollarmath", "deflist", "colon_fence", "attrs_inline"]
myst_heading_anchors = 4
myst_links_external_new_tab = False

html_math_renderer = "mathml"
autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_preserve_defaults = True
autodoc_class_signature = "mixed"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_attr_annotations = False
napoleon_use_rtype = False
python_maximum_signature_line_length = 90
python_display_short_literal_types = True
pygments_style, pygments_dark_style = "friendly", "native"

html_theme = "furo"
html_title = "eki_jax"
html_static_path = ["_static"]
html_favicon = html_logo = "_static/logo.svg"
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0b6e5f", "color-brand-content": "#0b6e5f"},
    "dark_css_variables": {"color-brand-primary": "#5fd3bf", "color-brand-content": "#5fd3bf"},
}
if repository:
    html_theme_options |= {"source_repository": repository, "source_branch": "main", "source_directory": "docs/"}
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True
