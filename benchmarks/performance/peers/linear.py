"""The linear inverse problem that all libraries are given: every datum is a weighted parameter, with unit noise."""

from __future__ import annotations

import numpy as np


def problem(task: dict, dtype: str = "float32") -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The prior ensemble (J, P), the indices and weights of the M observed parameters, and the data (M,)."""
    rng = np.random.default_rng(0)
    ensemble = rng.standard_normal((task["J"], task["P"]), np.float32).astype(dtype, copy=False)
    index = (np.arange(task["M"]) * 7) % task["P"]
    weights = rng.uniform(0.5, 1.5, task["M"]).astype(dtype)
    data = weights * rng.standard_normal(task["M"]).astype(dtype)
    return ensemble, index, weights, data
