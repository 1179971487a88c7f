"""Members that fail, hang or blow up: what is left of the posterior."""

from __future__ import annotations

import concurrent.futures
import hashlib
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.calibration import front_door
from benchmarks.calibration.problems import decay
from benchmarks.harness.figures import panels, save
from benchmarks.harness.store import Cells
from benchmarks.harness.tables import markdown, number
from eki_jax import calibrate

TITLE = "Members that fail, hang or blow up: the posterior beside that of an undisturbed run"
SIZES = {"smoke": (20, 2), "cpu": (50, 12), "full": (50, 100)}
TIMEOUT = 0.2  # seconds that a member may take; one that hangs would wait for ever


class Case(NamedTuple):
    """A disturbance.

    Attributes:
        label: name in the table.
        spoil: function of a member's outputs, what becomes of them.
        share: share of the members that are hit.
        policy: name of what is done with failed members.
        has_cut: flag, False for a step without the cut of outliers.
    """

    label: str
    spoil: Callable[[dict[str, np.ndarray]], Any]
    share: float
    policy: str = "redraw"
    has_cut: bool = True


def crash(outputs: dict[str, np.ndarray]) -> Any:
    """An error, as of a program that returns no numbers."""
    raise RuntimeError("segmentation fault")


def hang(outputs: dict[str, np.ndarray]) -> Any:
    """Nothing, for long after the time is up."""
    threading.Event().wait(5 * TIMEOUT)
    return outputs


def last_is_nan(outputs: dict[str, np.ndarray]) -> Any:
    """One number of twelve is NaN."""
    return {"left": np.append(outputs["left"][:-1], np.nan)}


def blow_up(outputs: dict[str, np.ndarray]) -> Any:
    """Finite numbers, of 1e12."""
    return {"left": outputs["left"] * 1e12}


CASES: dict[str, Case] = {
    "none": Case("nothing", lambda outputs: outputs, 0.0),
    "crash-0.1": Case("crashes", crash, 0.1),
    "crash-0.3": Case("crashes", crash, 0.3),
    "crash-0.6": Case("crashes", crash, 0.6),
    "crash-keep-0.3": Case("crashes, members kept where they are", crash, 0.3, "keep"),
    "hang-0.1": Case("hangs, timed out", hang, 0.1),
    "nan-0.3": Case("one output is NaN", last_is_nan, 0.3),
    "blow-up-0.3": Case("outputs of 1e12", blow_up, 0.3),
    "blow-up-no-cut-0.3": Case("outputs of 1e12, no cut of outliers", blow_up, 0.3, has_cut=False),
}


def is_hit(member: dict[str, Any], iteration: int, share: float) -> bool:
    """Whether a member is among those that fail: by chance, but the same in every run of this code."""
    text = f"{iteration} " + " ".join(f"{float(value):.9g}" for value in member.values())
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") < share * 2**48


def measure(case: Case, particles: int, seeds: range) -> list[dict[str, Any]]:
    """A calibration a seed; members run on threads, with a limit of time where some of them hang."""
    rows = []
    for seed in seeds:

        def simulate(members: Sequence[dict[str, Any]], iteration: int) -> list[Any]:
            def one(member: dict[str, Any]) -> Any:
                outputs = decay.simulate(member)
                return case.spoil(outputs) if is_hit(member, iteration, case.share) else outputs

            if case.spoil is not hang:
                return calibrate.map_particles(one, members, progress=False)
            with concurrent.futures.ThreadPoolExecutor(8) as pool:
                return calibrate.map_particles(one, members, pool, timeout=TIMEOUT, progress=False)

        solver = front_door.method(case.policy, case.has_cut)
        rows.append(front_door.run(decay.prior(), particles, seed, simulate, solver))
    return rows


def run(preset: str, cells: Cells, peers: Path) -> None:
    """Every case."""
    del peers
    particles, seeds = SIZES[preset]
    cells.extra |= {"particles": particles, "seeds": seeds}
    for name, case in CASES.items():
        settings = {"label": case.label, "share": case.share, "particles": particles, "seeds": seeds}
        cells.get(name, settings, lambda: measure(case, particles, range(seeds)))  # noqa: B023


def table(result: dict[str, Any]) -> str:
    """What became of the posterior, in exact posterior deviations; medians of the seeds."""
    header = ["what happens", "to members", "failed in all", "iterations", "error of the means", "deviations / exact"]
    rows = []
    for cell in result["cells"].values():
        settings, runs = cell["settings"], cell["found"]
        median = lambda name, runs=runs: np.median([run[name] for run in runs if name in run] or [np.nan])
        values = [median(name) for name in ("failed", "iterations", "mean", "deviation")]
        ended = [run["ended"].split(";")[0] for run in runs if run["ended"]]
        label = settings["label"] + (f" ({len(ended)} of {len(runs)} stopped: {ended[0]})" if ended else "")
        shown = [f"{values[0]:.0f}", f"{values[1]:.0f}", *(number(v) if v == v else "–" for v in values[2:])]
        rows.append([label, f"{100 * settings['share']:.0f} %", *shown])
    caption = f"{result['particles']} members, {result['seeds']} seeds."
    return markdown([*header], rows) + f"\n\n{caption}"


def draw(result: dict[str, Any], path: Path) -> None:
    """Errors of the means in every case, a point a seed."""
    cells = list(result["cells"].values())
    figure, (axes,) = panels(1, 2, (11, 4.6), sharey=True)
    titles = {"mean": "Error of the means, in exact deviations", "deviation": "Deviations over the exact ones"}
    for axis, (quantity, title) in zip(axes, titles.items(), strict=True):
        for index, cell in enumerate(cells):
            values = [run[quantity] for run in cell["found"] if quantity in run]
            axis.plot(values, [index] * len(values), ".", color="C0", alpha=0.4)
            if values:
                axis.plot(np.median(values), index, "D", color="C3", ms=6)
            else:
                axis.annotate("stopped with an error", (0.35, index), xycoords=("axes fraction", "data"), va="center")
        axis.set(title=title, ylim=(len(cells) - 0.5, -0.5))
    labels = [f"{cell['settings']['label']}, {100 * cell['settings']['share']:.0f} %" for cell in cells]
    axes[0].set_yticks(range(len(cells)), labels)
    save(figure, path)
