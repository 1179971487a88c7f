"""The paper's experiments by the names that the command line has for them."""

from __future__ import annotations

import importlib
from typing import Any

# name -> module with TITLE, measure(preset, data, seed) and draw(result, path). A table of networks has cells(preset)
# alone, a figure of what their ensembles do from epoch to epoch a FIGURE; where cells are of another kind, there is a
# run(preset, out, data, seed, only) that keeps them.
EXPERIMENTS = {
    "dense": "benchmarks.paper.dense",
    "particles": "benchmarks.paper.particles",
    "noise-ratio": "benchmarks.paper.noise_ratio",
    "large-ensemble": "benchmarks.paper.large_ensemble",
    "cnn-mnist": "benchmarks.paper.cnn_mnist",
    "cnn-svhn": "benchmarks.paper.cnn_svhn",
    "rnn": "benchmarks.paper.rnn",
    "voting": "benchmarks.paper.voting",
    "online-temperatures": "benchmarks.paper.online_temperatures",
    "online-sunspots": "benchmarks.paper.online_sunspots",
    "linear": "benchmarks.paper.linear",
    "fashion-mnist": "benchmarks.paper.fashion_mnist",
    "ensemble": "benchmarks.paper.ensemble",
    "long-memory": "benchmarks.paper.long_memory",
}


def module(name: str) -> Any:
    """An experiment's module."""
    return importlib.import_module(EXPERIMENTS[name])


def title(name: str) -> str:
    """What an experiment is, in a line; its sizes are those of a result, which says them itself."""
    return module(name).TITLE if name in EXPERIMENTS else name
