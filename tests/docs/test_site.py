"""The site: what its pages are made of, and, where Sphinx is there, that it builds and reads well in a browser.

Tests of the built site have the marker ``site``: ``pytest -m site`` builds it once. Those that look at it in a browser
want chromium on the path and playwright (in the extra ``dev``), and say so where one is missing.
"""

from __future__ import annotations

import functools
import html.parser
import http.server
import importlib
import importlib.util
import json
import posixpath
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def module(path: str) -> Any:
    """A module of ``docs/``, which is no package."""
    sys.path[:0] = [str(DOCS), str(DOCS / "_ext")]
    try:
        spec = importlib.util.spec_from_file_location(Path(path).stem, DOCS / path)
        assert spec is not None
        assert spec.loader is not None
        loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
        return loaded
    finally:
        del sys.path[:2]


PAGES = module("_ext/pages.py")
REFERENCE = PAGES.reference


# What the pages are made of


@pytest.fixture(scope="module")
def made() -> dict[str, str]:
    """The pages that are made, by their paths below ``docs/``."""
    return PAGES.made_pages("")


def test_a_page_for_every_module(made: dict[str, str]) -> None:
    """Each has each of its names: documented, or with a link to where it is."""
    for where, thing in REFERENCE.modules().items():
        text = made[f"reference/{where or 'eki_jax'}.rst"]
        for name in REFERENCE.exports(thing):
            pattern = rf"^(\.\. (auto\w+|py:data):: [\w.]*\b{name}$|\* :py:obj:`[\w.]*\b{name}`$)"
            assert re.search(pattern, text, re.MULTILINE), f"{where}.{name}"


def test_a_thing_is_documented_once(made: dict[str, str]) -> None:
    """All other paths to it are links."""
    found = [
        path
        for text in made.values()
        for path in re.findall(r"^\.\. auto(?:function|class|exception):: (\S+)$", text, re.MULTILINE)
    ]
    assert len(found) == len(set(found)) > 150


def test_every_example_is_in_the_gallery(made: dict[str, str]) -> None:
    """With a page of its own, or on the page of the one that uses it; and the gallery lists each page."""
    listed = (DOCS / "gallery.md").read_text()
    shown = "".join(text for name, text in made.items() if name.startswith("gallery/"))
    for path in (ROOT / "examples").glob("*.py"):
        assert f"../../examples/{path.name}\n" in shown
    for path in PAGES.examples():
        assert f"(../examples/{path.name})" in listed, "give it a row in docs/gallery.md"


def test_pages_are_in_the_navigation() -> None:
    """Every page that is written by hand is in a table of contents of the home page."""
    listed = set(re.findall(r"^[\w/]+$", (DOCS / "index.md").read_text(), re.MULTILINE))
    missing = {path.stem for path in DOCS.glob("*.md")} - {"index"} - listed
    assert not missing, "name these in a table of contents of docs/index.md"
    assert {page for source, page in PAGES.OUTSIDE.items() if (ROOT / source).exists()} <= listed


@pytest.mark.parametrize(
    ("link", "shown"),
    [
        ("[a](methods.md#how-long)", "[a](methods.md#how-long)"),
        ("[a](../examples/momentum.py)", "[a](gallery/momentum.rst)"),
        ("[a](../CONTRIBUTING.md#how-to-add-a-loss)", "[a](repository/contributing.md#how-to-add-a-loss)"),
        ("![a](../benchmarks/results/performance.png)", "![a](../benchmarks/results/performance.png)"),
        ("[a](../benchmarks/results/paper)", "a (`benchmarks/results/paper` in the repository)"),
        ("[a](https://example.org/b.md)", "[a](https://example.org/b.md)"),
        ("[a](#here)", "[a](#here)"),
        ("```\n[a](../README.md)\n```", "```\n[a](../README.md)\n```"),
    ],
)
def test_links_lead_to_the_sites_pages(link: str, shown: str) -> None:
    """The repository's own view and the site have the same text."""
    assert PAGES.on_the_site(link, "docs/page.md", "page", "") == shown


def test_links_with_an_address() -> None:
    """Folders and files without a page link to the repository where its address is stated."""
    made = PAGES.on_the_site("[a](../benchmarks/results/paper)", "docs/page.md", "page", "https://example.org/r")
    assert made == "[a](https://example.org/r/tree/main/benchmarks/results/paper)"


def test_other_libraries_names(tmp_path: Path) -> None:
    """The list is sorted, of addresses that are safe, and what refreshes it reads an inventory of Sphinx."""
    external, text = module("external.py"), (DOCS / "external.json").read_text()
    links = json.loads(text)
    assert text == json.dumps(dict(sorted(links.items())), indent=1) + "\n"
    assert all(link.startswith("https://") for link in links.values())
    packed = external.zlib.compress(b"jax.jit py:function 1 api/jit.html#$ -\nguide std:doc -1 guide.html -\n")
    content = b"# Sphinx inventory version 2\n# Project: a\n# Version: 1\n# The rest is packed.\n" + packed
    assert list(external.inventory(content, "https://a/")) == [("jax.jit", "https://a/api/jit.html#jax.jit")]
    assert external.in_full("jnp.einsum") == "jax.numpy.einsum"
    assert "jax.jit" in external.mentioned()
    (tmp_path / "objects.inv").write_bytes(content)
    kept = tmp_path / "external.json"
    kept.write_text('{"jax.vmap": "https://b/vmap.html"}')
    external.main(["--site", f"{tmp_path.as_uri()}/", "--site", f"{tmp_path.as_uri()}/none/", "--out", str(kept)])
    assert json.loads(kept.read_text()) == {
        "jax.jit": f"{tmp_path.as_uri()}/api/jit.html#jax.jit",
        "jax.vmap": "https://b/vmap.html",
    }


@pytest.mark.slow
def test_the_sign_units_example(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Noise teaches the layers that have no derivative, and draws its picture."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    noise, through, plain = importlib.import_module("sign_units").main(tmp_path / "units.png", epochs=8).values()
    assert plain[-1] < min(noise[-1], through[-1])
    assert (tmp_path / "units.png").stat().st_size > 10_000


# The site


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as README says, with every warning an error."""
    for needed in ("sphinx", "furo", "myst_parser"):
        pytest.importorskip(needed)
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", str(DOCS), str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


class Page(html.parser.HTMLParser):
    """What a page refers to, the anchors it has, and its text outside of code."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = set()
        self.text = ""
        self._code = 0
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attributes}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag in ("img", "script", "iframe") and "src" in given:
            self.loaded.append(given["src"])
        elif tag == "link" and given.get("rel") not in ("canonical", "index", "search", "next", "prev"):
            self.loaded.append(given.get("href", ""))
        self._code += tag in ("code", "pre", "script", "style")

    def handle_endtag(self, tag: str) -> None:
        self._code -= tag in ("code", "pre", "script", "style")

    def handle_data(self, data: str) -> None:
        if not self._code:
            self.text += data


@pytest.fixture(scope="session")
def read(site: Path) -> dict[str, Page]:
    """All pages by their paths in the site."""
    return {path.relative_to(site).as_posix(): Page(path) for path in sorted(site.rglob("*.html"))}


@pytest.mark.site
def test_links_lead_somewhere(site: Path, read: dict[str, Page]) -> None:
    """Every internal link has its page and its anchor there."""
    broken = []
    for name, page in read.items():
        for link in page.links:
            if re.match(r"[a-z]+:", link):
                continue
            target, _, anchor = link.partition("#")
            path = posixpath.normpath(posixpath.join(posixpath.dirname(name), target)) if target else name
            known = path in read and (not anchor or anchor in read[path].anchors)
            if not (known or (path not in read and (site / path).is_file())):
                broken.append(f"{name}: {link}")
    assert not broken
    assert len(read) > 60


@pytest.mark.site
def test_nothing_comes_from_elsewhere(site: Path, read: dict[str, Page]) -> None:
    """Scripts, styles, fonts and pictures are the site's own files."""
    assert not [(name, url) for name, page in read.items() for url in page.loaded if re.match(r"(https?:)?//", url)]
    for name, page in read.items():
        for url in page.loaded:
            path = posixpath.normpath(posixpath.join(posixpath.dirname(name), url.partition("?")[0]))
            assert (site / path).is_file(), f"{name}: {url}"
    for path in (site / "_static").rglob("*.css"):
        assert not re.search(r"url\(\W?(https?:)?//", path.read_text()), path


@pytest.mark.site
def test_mathematics_is_rendered(site: Path, read: dict[str, Page]) -> None:
    """No page shows LaTeX, and formulas of pages and of docstrings are MathML."""
    for name, page in read.items():
        if not name.startswith(("search", "genindex", "py-modindex")):
            shown = re.search(r"\\[A-Za-z(\[]|\$\$", page.text)
            assert shown is None, f"{name}: {shown}"
    for name in ("index.html", "related.html", "reference/kalman.html", "reference/natural.html"):
        assert (site / name).read_text().count("<math ") >= 3


@pytest.mark.site
def test_names_link_to_the_reference(site: Path, read: dict[str, Page]) -> None:
    """Code in a page's text that is a name, ours or another library's, is a link."""
    assert any(link.endswith("#eki_jax.kalman.etki") for link in read["methods.html"].links)
    assert any(link.endswith("#eki_jax.optax.value_and_extra_args") for link in read["optax.html"].links)
    links = [link for page in read.values() for link in page.links]
    for start in ("https://docs.jax.dev/", "https://optax.readthedocs.io/", "https://flax.readthedocs.io/"):
        assert any(link.startswith(start) for link in links), start


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium without a window."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is on the path")
    api = pytest.importorskip("playwright.sync_api", reason="playwright is in the extra `dev`")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def address(site: Path) -> Iterator[str]:
    """The site, as a server on this machine has it."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


#: Formulas without a size or with an error in them, and tables and pictures that make the page itself wider.
LOOK = """() => ({
  formulas: [...document.querySelectorAll("math")].filter(
    (node) => node.getClientRects().length && (node.getBoundingClientRect().width < 2 || node.querySelector("merror"))
  ).map((node) => node.outerHTML),
  wider: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  pictures: [...document.querySelectorAll("article img")].filter(
    (node) => node.complete && !node.naturalWidth
  ).map((node) => node.src),
})"""


@pytest.mark.site
@pytest.mark.parametrize("width", [1280, 390], ids=["desktop", "phone"])
def test_pages_in_a_browser(browser: Any, address: str, read: dict[str, Page], width: int) -> None:
    """No page has an error, asks another server, shows an empty formula or is wider than the window."""
    context = browser.new_context(viewport={"width": width, "height": 900})
    page = context.new_page()
    wrong: list[str] = []
    page.on("console", lambda message: message.type == "error" and wrong.append(f"{page.url}: {message.text}"))
    page.on("pageerror", lambda error: wrong.append(f"{page.url}: {error}"))
    page.on(
        "request", lambda asked: asked.url.startswith((address, "data:")) or wrong.append(f"{page.url}: {asked.url}")
    )
    for name in read:
        page.goto(f"{address}/{name}", wait_until="load")
        seen = page.evaluate(LOOK)
        wrong += [f"{name}: {what} {seen[what]}" for what in ("formulas", "wider", "pictures") if seen[what]]
    context.close()
    assert not wrong


@pytest.mark.site
@pytest.mark.parametrize("words", ["natural gradient", "etki", "how many members"])
def test_the_search_finds(browser: Any, address: str, words: str) -> None:
    """The search answers on the site itself."""
    page = browser.new_page()
    page.goto(f"{address}/search.html?q={words.replace(' ', '+')}")
    page.wait_for_selector("#search-results ul.search li a", timeout=20_000)
    assert page.locator("#search-results ul.search li").count() >= 1
    page.close()


@pytest.mark.site
def test_light_and_dark(browser: Any, address: str) -> None:
    """The page follows the system, and the switch changes it."""
    grounds = {}
    for scheme in ("light", "dark"):
        context = browser.new_context(color_scheme=scheme)
        page = context.new_page()
        page.goto(f"{address}/index.html")
        ground = lambda page=page: page.evaluate("getComputedStyle(document.body).backgroundColor")
        grounds[scheme] = ground()
        for _ in range(3):  # the three settings: as the system has it, light, dark
            page.locator(".theme-toggle:visible").first.click()
            grounds[scheme, ground()] = True
        context.close()
    assert grounds["light"] != grounds["dark"]
    assert all((scheme, grounds[other]) in grounds for scheme in ("light", "dark") for other in ("light", "dark"))
