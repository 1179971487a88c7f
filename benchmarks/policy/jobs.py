"""Running one task: ours in this process, an evolution strategy in evosax's environment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.harness.peers import Unavailable, ask, python_of
from benchmarks.policy import methods
from benchmarks.policy.curve import follow
from benchmarks.policy.networks import build
from benchmarks.policy.settings import DISCRETE, RIVALS, TASKS

_ROOT = Path(__file__).parents[2]


def perform(task: dict[str, Any], peers: Path) -> dict[str, Any]:
    """The curves of the seeds, ``rows``, see :func:`benchmarks.policy.curve.follow`; or why it was ``skipped``."""
    of = TASKS[task["environment"]]
    if task["method"] in RIVALS:
        try:
            python = python_of("evosax-gymnax", peers)
            return ask([str(python), "-m", "benchmarks.policy.evolution", json.dumps(task)], _ROOT)
        except Unavailable as error:
            return {"skipped": str(error)}
    network = build(task["environment"], of.widths, DISCRETE.get(task["method"], of.units))
    return {"rows": follow(network, methods.build(network, task), task)}
