"""The kernel written as its definition reads, in float64 NumPy: two loops over particles."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np


def rows(tree: Any) -> np.ndarray:
    """All leaves side by side, shape (J, total), float64."""
    return np.concatenate(
        [np.asarray(leaf, np.float64).reshape(len(leaf), -1) for leaf in jax.tree.leaves(tree)], axis=1
    )


def drift(outputs: Any, cotangents: Any) -> np.ndarray:
    """D_kj = <G_k - mean G, r_j>."""
    g, r = rows(outputs), rows(cotangents)
    mean = g.mean(axis=0)
    d = np.zeros((len(g), len(g)))
    for k in range(len(g)):
        for j in range(len(g)):
            d[k, j] = np.sum((g[k] - mean) * r[j])
    return d


def direction(ensemble: Any, outputs: Any, cotangents: Any) -> np.ndarray:
    """(1/J) sum_k (u_k - mean u) <G_k - mean G, r_j>, shape (J, P)."""
    u, d = rows(ensemble), drift(outputs, cotangents)
    mean = u.mean(axis=0)
    result = np.zeros_like(u)
    for j in range(len(u)):
        for k in range(len(u)):
            result[j] += (u[k] - mean) * d[k, j] / len(u)
    return result
