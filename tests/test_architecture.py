"""Imports point one way: read from the source, so that no module can hide one in a function."""

from __future__ import annotations

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

#: From the ground up, as the table in docs/design.md has them: each imports only from itself and from those before it.
LAYERS = (
    *("_types", "_checks", "kernel", "losses", "ensembles", "solvers", "flows", "natural", "training", "sharding"),
    *("calibrate", "policy", "online", "semi_supervised", "optax", "flax", "equinox", "edf"),
)
#: Modules of old names, which re-export what moved; nothing inside the package imports them but its front.
THIN = ("checkpoints", "compact", "failures", "kalman", "metrics", "momentum", "prediction", "priors", "step_sizes")


def modules() -> dict[str, Path]:
    paths = sorted((ROOT / "eki_jax").rglob("*.py"))
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths]
    return dict(zip(names, paths, strict=True))


def imports(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of the package that a module imports, those for type checking and inside of functions included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "eki_jax":
            submodules = {f"{node.module}.{alias.name}" for alias in node.names} & set(known)
            found |= submodules or {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "eki_jax"}
    return found - {name}


KNOWN = modules()
ARROWS = {name: imports(name, path, KNOWN) for name, path in KNOWN.items()}


def layer(module: str) -> str:
    return module.split(".")[1] if "." in module else "eki_jax"


def test_imports_point_one_way() -> None:
    """A package imports from those below it alone."""
    wrong = [
        f"{name} imports {other}"
        for name, others in ARROWS.items()
        if layer(name) in LAYERS
        for other in others
        if layer(other) not in LAYERS[: LAYERS.index(layer(name)) + 1]
    ]
    assert not wrong


def test_no_circles() -> None:
    """No module imports itself through others."""
    try:
        TopologicalSorter(ARROWS).prepare()
    except CycleError as error:
        pytest.fail(str(error))


def test_every_module_has_its_place() -> None:
    """Every file belongs to a layer, or re-exports what moved and does nothing else."""
    assert {layer(name) for name in KNOWN} == {*LAYERS, *THIN, "eki_jax"}
    for name in THIN:
        body = ast.parse(KNOWN[f"eki_jax.{name}"].read_text()).body
        assert all(isinstance(node, ast.ImportFrom | ast.Expr) for node in body), name


def test_the_page_has_the_layers() -> None:
    """The table of docs/design.md names the layers in this order."""
    table = (ROOT / "docs/design.md").read_text().split("## Layers")[1].split("The map of")[0]
    rows = [row.split("|")[1] for row in table.splitlines() if row.startswith("| `")]
    assert re.findall(r"`(\w+)`", " ".join(rows)) == list(LAYERS)


def test_no_class_of_a_loss_is_asked_for() -> None:
    """Methods ask a loss for what it offers, not what it is."""
    losses = {"CrossEntropy", "SquaredError", "SoftmaxCrossEntropy", "SampleLoss"}
    asked = [
        name
        for name, path in KNOWN.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance"
        if losses & {inner.id for inner in ast.walk(node.args[1]) if isinstance(inner, ast.Name)}
    ]
    assert not asked


def test_little_is_compiled_inside_the_library() -> None:
    """``jax.jit`` stands where the design says so, and nowhere else."""
    compiling = {
        name
        for name, path in KNOWN.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr == "jit" and getattr(node.value, "id", "") == "jax"
    }
    page = (ROOT / "docs/design.md").read_text().split("**Little `jit` inside the library.**")[1].split("\n\n")[0]
    assert compiling == {
        *("eki_jax.training.loop", "eki_jax.training.checkpoints", "eki_jax.solvers.failures"),
        *("eki_jax.kernel.once", "eki_jax.losses.checks"),
    }
    assert all(f"`{name.removeprefix('eki_jax.')}`" in page for name in compiling)


@pytest.mark.parametrize("name", ["euler", "nesterov", "heavy_ball", "compact"])
def test_a_discretization_is_one_file(name: str) -> None:
    """The discretizations use no private name of another module, and those of the flow fit on a hundred lines."""
    text = KNOWN[f"eki_jax.solvers.{name}"].read_text()
    imported = [
        alias.name
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ImportFrom)
        for alias in [*node.names, ast.alias(node.module or "")]
        if any(part.startswith("_") for part in alias.name.split("."))
        and node.module not in ("__future__", "eki_jax._types")
    ]
    assert not imported
    assert name == "compact" or len(text.splitlines()) <= 100


def test_one_problem_and_one_method() -> None:
    """One class is called a problem, and the method is the library's; docs/design.md names what else there is."""
    texts = [path.read_text() for path in (ROOT / "benchmarks").rglob("*.py")]
    count = lambda name: sum(len(re.findall(rf"^class {name}\b", text, re.MULTILINE)) for text in texts)
    design = (ROOT / "docs/design.md").read_text()
    others = re.findall(r"^\| `[^|]*(?=\| )", design.partition("is not a `Problem`")[2], re.MULTILINE)
    named = [name for cell in others[:6] for name in re.findall(r"\b([A-Z]\w+)`", cell)]
    assert (count("Problem"), count("Method"), len(named)) == (1, 0, 11)
    assert all(count(name) for name in named)
