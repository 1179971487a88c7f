"""Parameters with bounds: priors that have them, beside ways to go on without."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.calibration import front_door
from benchmarks.calibration.problems import decay
from benchmarks.harness.figures import legend, panels, save
from benchmarks.harness.store import Cells
from benchmarks.harness.tables import markdown, number
from eki_jax import calibrate

TITLE = "A share between 0 and 1 and a positive rate: priors with bounds, without, and clipped"
SIZES = {"smoke": ((20,), 2), "cpu": ((20, 50, 200), 12), "full": ((20, 50, 200, 1000), 50)}
LABELS = {
    "bounded": "priors with bounds",
    "normal": "normal priors, bounds ignored",
    "clipped": "normal priors, members clipped to the bounds",
}


def normal_prior() -> dict[str, Any]:
    """Normal priors with the moments of the ones that have bounds."""
    low, high = decay.SHARE
    return {
        "rate": calibrate.normal(*decay.RATE),
        "share": calibrate.normal((low + high) / 2, (high - low) / np.sqrt(12)),
    }


def outside(member: dict[str, Any]) -> bool:
    """Whether a member is one that the simulator was not made for."""
    return member["rate"] <= 0 or not decay.SHARE[0] <= member["share"] <= decay.SHARE[1]


def clipped(member: dict[str, Any]) -> dict[str, Any]:
    """The nearest member within the bounds."""
    return {"rate": np.maximum(member["rate"], 0), "share": np.clip(member["share"], *decay.SHARE)}


def measure(kind: str, particles: int, seeds: range) -> list[dict[str, Any]]:
    """A calibration a seed; ``outside`` counts the members beyond the bounds, of ``asked``."""
    prior = decay.prior() if kind == "bounded" else normal_prior()
    rows = []
    for seed in seeds:
        asked: list[dict[str, Any]] = []

        def simulate(members: Sequence[dict[str, Any]], iteration: int) -> list[Any]:
            del iteration
            asked.extend(members)  # noqa: B023
            return [decay.simulate(clipped(member) if kind == "clipped" else member) for member in members]

        row = front_door.run(prior, particles, seed, simulate, front_door.method())
        rows.append({**row, "asked": len(asked), "outside": sum(map(outside, asked))})
    return rows


def run(preset: str, cells: Cells, peers: Path) -> None:
    """Every way with every number of members."""
    del peers
    sizes, seeds = SIZES[preset]
    cells.extra |= {"sizes": list(sizes), "labels": LABELS}
    for kind in LABELS:
        for particles in sizes:
            settings = {"particles": particles, "seeds": seeds}
            cells.get(f"{kind} {particles}", settings, lambda: measure(kind, particles, range(seeds)))  # noqa: B023


def _values(result: dict[str, Any], kind: str, quantity: str) -> dict[int, float]:
    found = {}
    for size in result["sizes"]:
        values = [row[quantity] for row in result["cells"][f"{kind} {size}"]["found"] if quantity in row]
        if values:
            found[size] = float(np.median(values))
    return found


def table(result: dict[str, Any]) -> str:
    """Members beyond the bounds, and errors of the posterior in physical units."""
    sizes = result["sizes"]
    header = ["", *(f"members outside, J = {n}" for n in sizes), *(f"error of the means, J = {n}" for n in sizes)]
    rows = []
    for kind, label in result["labels"].items():
        shares = []
        for size in sizes:
            runs = result["cells"][f"{kind} {size}"]["found"]
            shares.append(f"{100 * sum(r['outside'] for r in runs) / sum(r['asked'] for r in runs):.1f} %")
        mean, deviation = (_values(result, kind, quantity) for quantity in ("mean", "deviation"))
        rows.append([label, *shares, *(number(values.get(n)) for values in (mean, deviation) for n in sizes)])
    return markdown([*header, *(f"deviations / exact, J = {n}" for n in sizes)], rows)


def draw(result: dict[str, Any], path: Path) -> None:
    """Errors of the means and ratios of the deviations against J."""
    figure, (axes,) = panels(1, 2, (10, 4.4))
    titles = {"mean": "Error of the means, in exact deviations", "deviation": "Deviations over the exact ones"}
    for axis, (quantity, title) in zip(axes, titles.items(), strict=True):
        for index, (kind, label) in enumerate(result["labels"].items()):
            for size in result["sizes"]:
                runs = result["cells"][f"{kind} {size}"]["found"]
                values = [row[quantity] for row in runs if quantity in row]
                axis.plot([size * 1.06 ** (index - 1)] * len(values), values, ".", color=f"C{index}", alpha=0.35)
            medians = _values(result, kind, quantity)
            axis.plot(*zip(*medians.items(), strict=True), "o-", color=f"C{index}", label=label)
        axis.set(title=title, xlabel="members J", xscale="log")
        axis.set_xticks(result["sizes"], map(str, result["sizes"]))
        axis.minorticks_off()
    axes[1].axhline(1, color="0.4", lw=0.8)
    legend(figure, "", axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    save(figure, path)
