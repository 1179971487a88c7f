"""Draws the pictures of the results again from their files, and runs nothing: ``python -m benchmarks.pictures [NAME]``.

For when they are to be drawn otherwise. Those of the series and of the calibrations show data that their files do not
hold; their commands draw them.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.harness.store import read
from benchmarks.reporting import RESULTS

IMAGES = Path(__file__).parents[1] / "docs/images"
TABLES = {  # of accuracies by epochs
    "dense": "benchmarks.paper.dense",
    "large-ensemble": "benchmarks.paper.large_ensemble",
    "cnn-mnist": "benchmarks.paper.cnn_mnist",
    "cnn-svhn": "benchmarks.paper.cnn_svhn",
    "rnn": "benchmarks.paper.rnn",
}
EDF = ("edf_convergence_cpu", "edf_convergence_full", "edf_stochastic_cpu", "edf_full_vs_stochastic_cpu")


def _table(name: str, results: Path, out: Path) -> Path:
    from benchmarks.paper.classification import draw_epochs

    experiment = importlib.import_module(TABLES[name])
    labels = list(dict.fromkeys(cell.label for cell in experiment.cells("full")))
    result = read(results / f"paper/{name}.json")
    runs = {key: found if isinstance(found, list) else [found] for key, found in result["runs"].items()}  # of one seed
    draw_epochs(out / f"{name}.png", runs, labels, result["title"])
    return out / f"{name}.png"


def _curves(name: str, results: Path, out: Path) -> Path:
    module = importlib.import_module(f"benchmarks.paper.{name.replace('-', '_')}")
    module.draw(out / f"{name}.png", read(results / f"paper/{name}.json")["curves"])
    return out / f"{name}.png"


def _edf(name: str, results: Path, out: Path) -> Path:
    from benchmarks.edf.pictures import draw

    return draw(read(results / f"{name}.json"), out / f"{name}.png")


def _performance(name: str, results: Path, out: Path) -> Path:
    from benchmarks.performance.picture import draw

    path = draw(results, out)
    assert path is not None
    return path


def _forward_budget(name: str, results: Path, out: Path) -> Path:
    from benchmarks.forward_budget.picture import draw

    curves: dict[str, dict[str, list[Any]]] = {}
    for run in read(results / f"{name}.json")["runs"]:
        curves.setdefault(run["problem"], {}).setdefault(run["method"], []).append(run)
    draw(curves, out / f"{name}.png")
    return out / f"{name}.png"


def _policy(name: str, results: Path, out: Path) -> Path:
    from benchmarks.policy.picture import draw

    draw(read(results / f"{name}.json"), out / f"{name}.png")
    return out / f"{name}.png"


def _scaling(name: str, results: Path, out: Path) -> Path:
    from benchmarks.scaling import measured, pictures

    result = read(results / "scaling.json")
    rows = [measured.Row(**row) for row in result["measured"]]
    pictures.draw_measured(out / f"{name}.png", rows, result["kind"])
    return out / f"{name}.png"


#: name -> (its folder, what draws it)
PICTURES: dict[str, tuple[Path, Callable[[str, Path, Path], Path]]] = {
    **dict.fromkeys(TABLES, (RESULTS / "paper", _table)),
    **dict.fromkeys(("particles", "noise-ratio"), (RESULTS / "paper", _curves)),
    **dict.fromkeys(EDF, (RESULTS, _edf)),
    "performance": (RESULTS, _performance),
    "forward_budget_cpu": (RESULTS, _forward_budget),
    "policy_cpu": (RESULTS, _policy),
    "scaling_measured": (IMAGES, _scaling),
}


def redraw(name: str, out: Path | None = None) -> Path:
    """Draws a picture into its folder, or into ``out``."""
    folder, draw = PICTURES[name]
    return draw(name, RESULTS, out or folder)


def main(arguments: list[str] | None = None) -> Any:
    """Draws those that are named, or all."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pictures", description=__doc__)
    parser.add_argument("names", metavar="NAME", nargs="*", help=f"some of {', '.join(PICTURES)}")
    parser.add_argument("--out", metavar="DIR", type=Path, help="folder for all of them (default: where they are)")
    chosen = parser.parse_args(arguments)
    if unknown := sorted(set(chosen.names) - set(PICTURES)):
        parser.error(f"{', '.join(unknown)}; wanted some of {', '.join(PICTURES)}")
    if chosen.out is not None:
        chosen.out.mkdir(parents=True, exist_ok=True)
    for name in chosen.names or PICTURES:
        print(redraw(name, chosen.out))


if __name__ == "__main__":
    main()
