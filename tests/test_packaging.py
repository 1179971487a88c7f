"""What is published: versions and extras agree, the front page works away from the repository, what is built installs.

``pytest -m package`` builds the sdist and the wheel and installs them into empty environments, which needs the extra
``dev`` and a package index.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

import eki_jax

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["metadata"]["hooks"]["custom"]


def resolved(extra: str) -> set[str]:
    """The packages of an extra and of the extras that it names."""
    found: set[str] = set()
    for line in EXTRAS[extra]:
        if own := re.fullmatch(r"eki_jax\[(.*)\]", line):
            found |= set().union(*(resolved(name) for name in own[1].split(",")))
        else:
            found.add(re.split(r"[<>=]", line)[0])
    return found


def front_page() -> Any:
    """The function that makes README a package's page; hatchling calls it, and may not be here."""
    pytest.importorskip("hatchling")
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.front_page


def test_the_version_has_one_place() -> None:
    """The package's own; CITATION.cff says the same, and CHANGELOG knows it or what comes after it."""
    assert "version" in PROJECT["dynamic"]
    (cited,) = re.findall(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert cited == eki_jax.__version__
    released = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert released[0] == "Unreleased" or released[0] == eki_jax.__version__


def test_extras_say_what_they_are_for() -> None:
    """By a comment above each."""
    text = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    for name in set(EXTRAS) - {"flax", "equinox"}:  # which share a comment with `optax`
        assert re.search(rf"^# .*\n{name} = ", text, re.MULTILINE), name


def test_all_is_all_but_tests() -> None:
    """All of the extras for users and the site's tools, and nothing of what only tests and developers need."""
    tests = resolved("test") - resolved("features")
    assert resolved("all") == set().union(*(resolved(name) for name in EXTRAS if name not in ("test", "dev")))
    assert not resolved("all") & tests
    assert {"pytest", "hypothesis"} <= tests


def test_imports_are_in_an_extra() -> None:
    """What the package imports, but for type checkers, comes with the core or with an extra that users install."""
    known = {"sklearn": "scikit-learn", "orbax": "orbax-checkpoint"}
    offered = resolved("features") | {re.split(r"[<>=]", line)[0] for line in PROJECT["dependencies"]}
    wanted = set()
    for path in (ROOT / "eki_jax").rglob("*.py"):
        tree = ast.parse(path.read_text())
        tree.body = [node for node in tree.body if not ast.unparse(node).startswith("if TYPE_CHECKING:")]
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                wanted |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                wanted.add(node.module.partition(".")[0])
    wanted -= set(sys.stdlib_module_names) | {"eki_jax", "jaxlib"}
    assert {known.get(name, name) for name in wanted} <= offered


@pytest.mark.parametrize(
    ("text", "alone", "there"),
    [
        ("a\n\n![p](docs/p.png)\n\nb", "a\n\nb", "a\n\n![p](https://r/raw/main/docs/p.png)\n\nb"),
        ("see [a](docs/a.md#b).", "see a.", "see [a](https://r/blob/main/docs/a.md#b)."),
        ("[a](https://b/c)", "[a](https://b/c)", "[a](https://b/c)"),
        ("[a](#b)", "[a](#b)", "[a](#b)"),
    ],
)
def test_links_of_a_front_page(text: str, alone: str, there: str) -> None:
    """With the repository's address they are absolute; without one they are words."""
    assert front_page()(text, "") == alone
    assert front_page()(text, "https://r") == there


@pytest.mark.parametrize("repository", ["", "https://example.org/r"])
def test_readme_as_a_front_page(repository: str) -> None:
    """No link and no picture is relative, and nothing is lost but these."""
    readme = (ROOT / "README.md").read_text()
    page = front_page()(readme, repository)
    assert not re.findall(r"\]\((?!https?://|#|mailto:)", page)
    assert re.findall(r"^#+ .*", page, re.MULTILINE) == re.findall(r"^#+ .*", readme, re.MULTILINE)
    assert page.count("![") == (1 if repository else 0)


def test_readme_is_short() -> None:
    """A stranger decides in a minute; the code is some twenty lines."""
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 130
    (code,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert len([line for line in code.splitlines() if line]) <= 20
    assert readme.count("![") == 1


def test_workflows() -> None:
    """They run what a developer runs, on each version that the classifiers name, with actions pinned by hash."""
    texts = {path.name: path.read_text() for path in (ROOT / ".github/workflows").glob("*.yml")}
    assert "run: .ci/run" in texts["ci.yml"]
    versions = [line.rsplit(" ", 1)[1] for line in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", line)]
    listed = ", ".join(f'"{version}"' for version in versions)
    assert f"python: [{listed}]" in texts["ci.yml"]
    for text in texts.values():
        for action in re.findall(r"uses: (\S+)", text):
            assert re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", action), action
    assert "id-token: write" in texts["release.yml"]


def test_the_oldest_versions() -> None:
    """The constraints of the workflow are what pyproject.toml admits at least."""
    lines = (ROOT / ".github/oldest.txt").read_text().splitlines()
    oldest = dict(line.split("==") for line in lines if "==" in line)
    for line in PROJECT["dependencies"]:
        name, least = line.split(">=")
        assert oldest[name].startswith(least), name


# What is built


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist, and the wheel that is made of it."""
    for needed in ("build", "hatchling"):
        pytest.importorskip(needed)
    out = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)], check=True)
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


@pytest.mark.package
def test_what_the_sdist_holds(built: tuple[Path, Path]) -> None:
    """Sources, tests, pages and what they link to; no file of a run."""
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {f"{name}.md" for name in ("README", "CHANGELOG", "CONTRIBUTING", "SECURITY")} <= names
    assert {"LICENSE", "CITATION.cff", "hatch_build.py", "docs/conf.py", "tests/conftest.py"} <= names
    assert {f"docs/images/{path.name}" for path in (ROOT / "docs/images").glob("*.png")} <= names
    assert not [name for name in names if name.startswith("benchmarks/results") and name.endswith((".json", ".jsonl"))]
    assert not [name for name in names if re.match(r"docs/(reference|gallery|repository)/|build/", name)]


@pytest.mark.package
def test_what_the_wheel_holds(built: tuple[Path, Path]) -> None:
    """The package alone, all of it, typed, with the licence."""
    with zipfile.ZipFile(built[1]) as archive:
        names = set(archive.namelist())
        (metadata,) = [archive.read(name).decode() for name in names if name.endswith("/METADATA")]
    code = {path.relative_to(ROOT).as_posix() for path in (ROOT / "eki_jax").rglob("*.py")}
    info = f"eki_jax-{eki_jax.__version__}.dist-info"
    assert names == code | {"eki_jax/py.typed"} | {
        f"{info}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "licenses/LICENSE")
    }
    assert f"\nVersion: {eki_jax.__version__}\n" in metadata
    assert not re.findall(r"\]\((?!https?://|#)", metadata)
    assert ("Project-URL" in metadata) == bool(SETTINGS["repository"] or SETTINGS["documentation"])


@pytest.mark.package
@pytest.mark.parametrize("kind", ["sdist", "wheel"])
def test_it_installs_and_solves(built: tuple[Path, Path], tmp_path: Path, kind: str) -> None:
    """In an empty environment, with no extra: it imports, solves, and says which extra an adapter needs."""
    python = tmp_path / "env/bin/python"
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "env")], check=True)
    chosen = built[0] if kind == "sdist" else built[1]
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", str(chosen)], check=True)
    code = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[0]
    code += """
for name in ("optax", "flax", "equinox", "edf"):
    try:
        __import__(f"eki_jax.{name}")
    except ImportError as error:
        assert "extra" in str(error) or "pip install" in str(error), error
    else:
        raise AssertionError(name)
print(eki_jax.__version__, accuracy)
"""
    done = subprocess.run([str(python), "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{eki_jax.__version__} ")
