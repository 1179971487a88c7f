"""Pages that are made from the repository: one a module, one an example, and what lies outside of ``docs/``.

They are made below ``docs/`` before a build reads it, in the folders ``reference``, ``gallery`` and ``repository``,
which git does not know. The pages that people write have the links of the repository's own view; on the site these lead
to the page that shows the same file.
"""

from __future__ import annotations

import ast
import inspect
import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import reference

if TYPE_CHECKING:
    from sphinx.application import Sphinx

DOCS = Path(__file__).parents[1]
ROOT = DOCS.parent
#: Pages of the repository beside ``docs/`` that the site shows too.
OUTSIDE = {
    "CONTRIBUTING.md": "repository/contributing",
    "CHANGELOG.md": "repository/changes",
    "SECURITY.md": "repository/security",
    "benchmarks/accelerator.md": "repository/accelerator",
    "benchmarks/results/paper.md": "repository/paper_results",
    "benchmarks/results/performance.md": "repository/performance_results",
    "benchmarks/results/forward_budget_cpu.md": "repository/forward_budget_results",
}
HEADINGS = {"repository/forward_budget_results": "Accuracy for a number of forward passes, as measured"}
#: Files that are shown on one page with another, which uses them.
WITH = {"calibration_program": "calibration_command_line"}
#: Packages whose things are at home in another module, which tells how they work.
BEHIND = {"solvers.kalman": "kalman"}
#: Pictures of the gallery: what an example draws, or the benchmark's picture with what it measures.
PICTURES = {
    "continuous": "docs/images/continuous.png",
    "edf_flow": "docs/images/edf_flow.png",
    "momentum": "docs/images/momentum.png",
    "natural_digits": "docs/images/natural_digits.png",
    "sign_units": "docs/images/sign_units.png",
    "two_moons": "docs/images/two_moons.png",
}
LINK = re.compile(r"(?P<start>!?\[(?:[^\]\[]|\[[^\]]*\])*\]\()(?P<target>[^)\s]+)(?P<end>\))")


def examples() -> list[Path]:
    """The scripts that have a page."""
    return [path for path in sorted((ROOT / "examples").glob("*.py")) if path.stem not in WITH]


def documents() -> dict[str, str]:
    """Files of the repository, by their paths in it, and the site's pages that show them."""
    shown = {f"docs/{path.name}": path.stem for path in DOCS.glob("*.md")} | OUTSIDE
    shown |= {f"examples/{path.name}": f"gallery/{path.stem}" for path in examples()}
    return (
        shown
        | {f"examples/{name}.py": f"gallery/{host}" for name, host in WITH.items()}
        | {
            "README.md": "index",
            "examples": "gallery",
        }
    )


def on_the_site(text: str, source: str, page: str, repository: str) -> str:
    """A page's text with links for the site.

    Args:
        text: the page in Markdown.
        source: the path in the repository that its links start from.
        page: the name of the page that shows it.
        repository: the address of the repository, or nothing: links to folders and files without a page are then
            their names as code.
    """
    shown = documents()

    def link(found: re.Match[str]) -> str:
        target, _, anchor = found["target"].partition("#")
        if not target or re.match(r"[a-z]+:", target):
            return found[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        anchor = f"#{anchor}" if anchor else ""
        here = posixpath.dirname(page) or "."
        if path in shown:
            kind = "rst" if shown[path].startswith("gallery/") else "md"
            return f"{found['start']}{posixpath.relpath(shown[path], here)}.{kind}{anchor}{found['end']}"
        if path.endswith((".png", ".svg")):
            return f"{found['start']}{posixpath.relpath(f'../{path}', here)}{found['end']}"
        if not (ROOT / path).exists() and not path.startswith("benchmarks/results/"):  # which an sdist does not have
            return found[0]  # for the build to complain of
        if repository:
            kind = "tree" if (ROOT / path).is_dir() else "blob"
            return f"{found['start']}{repository}/{kind}/main/{path}{anchor}{found['end']}"
        return f"{found['start'][1:-2]} (`{path}` in the repository)"

    parts = re.split(r"(^```.*?^```$)", text, flags=re.DOTALL | re.MULTILINE)
    return "".join(part if part.startswith("```") else LINK.sub(link, part) for part in parts)


def title(text: str, mark: str = "=") -> str:
    """A heading of reStructuredText."""
    return f"{text}\n{mark * len(text)}\n\n"


def directive(where: str, entry: reference.Entry) -> str:
    """What documents one thing: by its docstring, or, for constants and types, by the comment above it."""
    home, _, name = f"eki_jax.{entry.path}".rpartition(".")
    thing, also = entry.thing, ""
    if entry.also:
        also = f"   Also {', '.join(f'``eki_jax.{way}``' for way in entry.also)}.\n\n"
    if not reference.is_code(thing):
        return f".. py:data:: {name}\n   :module: {home}\n\n   {reference.comment(name)}\n\n{also}"
    kind = "class" if inspect.isclass(thing) else "function"
    options = ""
    if inspect.isclass(thing):
        kind = "exception" if issubclass(thing, BaseException) else "class"
        options = "   :members:\n"
        if getattr(thing, "_is_protocol", False):
            options += "   :special-members: __call__\n"
    return f".. auto{kind}:: eki_jax.{entry.path}\n{options}\n{also}"


def background(where: str) -> str:
    """What the modules inside a package say at length of how they work."""
    where = {home: name for name, home in BEHIND.items()}.get(where, "" if where in BEHIND else where)
    module = reference.modules()[where]
    text, package = "", Path(inspect.getfile(module))
    if package.name != "__init__.py" or module is reference.eki_jax:
        return ""
    prefix = module.__name__
    for path in sorted(package.parent.glob("*.py")):
        said = ast.get_docstring(ast.parse(path.read_text())) or ""
        if not path.name.startswith("_") and said.count("\n\n") >= 1:
            text += f"{title(f'{prefix}.{path.stem}', '^')}.. automodule:: {prefix}.{path.stem}\n   :no-members:\n\n"
    return f"{title('How it works inside', '-')}{text}" if text else ""


def module_page(where: str, module: Any, rows: list[reference.Entry]) -> str:
    """The reference page of a module."""
    name = f"eki_jax.{where}".removesuffix(".")
    text = f".. meta::\n   :description: Reference of {name}\n\n{title(name)}"
    text += f".. automodule:: {name}\n   :no-members:\n\n"
    if where in reference.EXTRAS:
        text += f"{reference.EXTRAS[where].replace('`', '``')}\n\n"
    here = {row.path for row in rows}
    others = [other for other in reference.exports(module) if f"{where}.{other}".strip(".") not in here]
    if rows:
        text += title("Names", "-") if others or background(where) else ""
        text += "".join(directive(where, entry) for entry in rows)
    if others:
        text += title("Names whose page is another", "-")
        text += "".join(f"* :py:obj:`{name}.{other}`\n" for other in others) + "\n"
    return text + background(where)


def example_page(path: Path) -> str:
    """A page with a script: what its docstring says, its picture, its code."""
    said = ast.get_docstring(ast.parse(path.read_text())) or ""
    first, _, rest = said.partition("\n\n")
    name = re.sub(r"\b(cnn|edf|mnist)\b", lambda word: word[0].upper(), path.stem.replace("_", " "))
    name = name[:1].upper() + name[1:]
    picture = ""
    if path.stem in PICTURES:
        picture = f".. image:: ../../{PICTURES[path.stem]}\n   :alt: {' '.join(first.split())}\n\n"
    rest = re.sub(r"^(?:    )?(?=python examples/)", "    ", rest, flags=re.MULTILINE)
    rest = re.sub(r"(?<=\n\n)(?=    \S)|\A(?=    \S)", "::\n\n", rest, count=1)
    text = f"{title(name)}{first}\n\n{picture}{rest}\n\n"
    for file in [path, *(path.with_name(f"{other}.py") for other, host in WITH.items() if host == path.stem)]:
        shown = f"examples/{file.name}"
        text += f".. literalinclude:: ../../{shown}\n   :language: python\n   :caption: {shown}\n\n"
    return text


def made_pages(repository: str) -> dict[str, str]:
    """All pages that are made, by their paths below ``docs/``."""
    pages, surface = {}, reference.modules()
    for where, rows in reference.entries().items():
        pages[f"reference/{where or 'eki_jax'}.rst"] = module_page(where, surface[where], rows)
    pages |= {f"gallery/{path.stem}.rst": example_page(path) for path in examples()}
    for source, page in OUTSIDE.items():
        if (ROOT / source).exists():
            text = (ROOT / source).read_text()
            if not text.startswith("# "):  # a file of tables
                text = f"# {HEADINGS[page]}\n\n{re.sub('^###', '##', text, flags=re.MULTILINE)}"
            pages[f"{page}.md"] = on_the_site(text, source, page, repository)
    return pages


def write(app: Sphinx) -> None:
    """Writes what is new and removes what is no longer made."""
    pages = made_pages(app.config.repository)
    for folder in ("reference", "gallery", "repository"):
        (DOCS / folder).mkdir(exist_ok=True)
        for path in (DOCS / folder).iterdir():
            if f"{folder}/{path.name}" not in pages:
                path.unlink()
    for name, text in pages.items():
        path = DOCS / name
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


def read(app: Sphinx, page: str, source: list[str]) -> None:
    """The links of a page that is written, and what the index of the reference lists."""
    if (DOCS / f"{page}.md").exists() and "/" not in page:
        source[0] = on_the_site(source[0], f"docs/{page}.md", page, app.config.repository)
    if page == "api":
        names = "\n".join(f"reference/{where or 'eki_jax'}" for where in reference.entries())
        source[0] += f"\n```{{toctree}}\n:hidden:\n\n{names}\n```\n"


def setup(app: Sphinx) -> dict[str, Any]:
    """Writes the pages before a build, and mends links while it reads."""
    app.add_config_value("repository", "", "env", types=(str,))
    app.connect("builder-inited", write)
    app.connect("source-read", read)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
