"""A stage in a process of its own, which has the device to itself: ``python -m benchmarks.accelerator.worker JSON``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

import jax

from benchmarks.accelerator import cells, correctness
from benchmarks.harness import store
from benchmarks.harness.command import Refused, command
from benchmarks.performance.cli import parts
from benchmarks.reporting import print_result
from benchmarks.scaling.cli import scaling


@command("accelerator")
def main(argv: list[str]) -> int:
    """Run a task; it is a JSON object with a ``stage``, and what that wants."""
    task = json.loads(argv[0])
    print_result({"correctness": correct, "plan": planned, "cell": cell}[task.pop("stage")](**task))
    return 0


def correct(preset: str, out: str) -> dict[str, Any]:
    """Writes ``correctness.jsonl``; an error where the device's steps are not the processor's."""
    device = jax.devices()[0]
    if device.platform == "cpu" and preset != "smoke":
        raise Refused(
            f"no accelerator was found (JAX {jax.__version__} has {device.device_kind}); wanted a GPU or a TPU in "
            "jax.devices(), with the jaxlib for it, or --preset smoke"
        )
    rows = correctness.measure(preset)
    store.save(Path(out) / "correctness.jsonl", {"command": "accelerator", "preset": preset, "rows": rows})
    correctness.check(rows)
    worst = {
        name: max(row["error"] for row in rows if row["precision"] == name) for name in {r["precision"] for r in rows}
    }
    return {"platform": device.platform, "device": f"{device.platform}: {device.device_kind}", "worst": worst}


def planned(preset: str, out: str, seed: int) -> dict[str, Any]:
    """Writes ``plan.jsonl``: the paper's cells that are left, in their order."""
    folder = Path(out)
    remedy = "run the same command again"
    rate = scaling().read(folder / "scaling.jsonl", remedy)["machine_at_hand"][1]["flops"]
    rows = parts(folder).get("steps", {"rows": []})["rows"]
    share = median([row["of_matmul_rate"] for row in rows if "of_matmul_rate" in row] or [cells.SHARE])
    jobs = cells.plan(preset, folder / "paper", seed, rate * share)
    found = {"rate": rate, "share": share, "jobs": [job._asdict() for job in jobs]}
    store.save(folder / "plan.jsonl", {"command": "accelerator", "preset": preset, **found})
    return {"cells": len(jobs)}


def cell(preset: str, out: str, data: str | None, table: str, name: str, seed: int) -> dict[str, Any]:
    """One seed of one of the paper's cells."""
    return cells.run(table, name, seed, preset, Path(out) / "paper", None if data is None else Path(data))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
