"""Layers of an nnx module that add the contribution of a low-rank deviation of their matrix."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from eki_jax._types import Array
from eki_jax.flax._windows import told_windows
from eki_jax.natural.deviations.matrix import LowRankMatrix

Matrices = Mapping[tuple[str, ...], LowRankMatrix]


def perturbed_call(module: nnx.Module, method: str) -> Callable[..., tuple[Any, set[tuple[str, ...]]]]:
    """``run(means, matrices, *inputs) -> (outputs, used)``: a call of a copy of the module, with deviations by path."""
    graph, *states = nnx.split(module, nnx.Param, ...)

    def run(means: Any, matrices: Matrices, *inputs: Any) -> tuple[Any, set[tuple[str, ...]]]:
        copy = nnx.merge(graph, means, states[1], copy=True)
        used = _perturb(copy, matrices)
        return getattr(copy, method)(*inputs), used

    return run


def _perturb(module: nnx.Module, matrices: Matrices) -> set[tuple[str, ...]]:
    """Change the layers of ``module``, a copy that is used once; the paths of the matrices that found their layer."""
    used = set()
    for path, layer in nnx.iter_modules(module):
        leaf, change = _LAYERS.get(type(layer), ("", None))
        name = (*map(str, path), leaf)
        if change is not None and name in matrices and getattr(layer, "mask", None) is None:
            change(layer, matrices[name])
            used.add(name)
    return used


def _linear(layer: nnx.Linear, w: LowRankMatrix) -> None:
    plain = layer.dot_general

    def dot_general(inputs: Array, kernel: Array, *args: Any, **kwargs: Any) -> Array:
        _check(w, kernel)
        outputs = plain(inputs, kernel, *args, **kwargs)
        return outputs + w.perturbation(inputs, bias="bias" if layer.use_bias else None).astype(outputs.dtype)

    layer.dot_general = dot_general


def _conv(layer: nnx.Conv, w: LowRankMatrix) -> None:
    plain = layer.conv_general_dilated

    def convolved(inputs: Array, kernel: Array, *args: Any, **kwargs: Any) -> Array:
        _check(w, kernel)
        groups, dtype = kwargs.get("feature_group_count", 1), kernel.dtype
        narrow = lambda matrix, inputs: plain(inputs, matrix.astype(dtype), *args, **kwargs)
        told = told_windows(w, narrow, inputs, groups, layer.use_bias)
        inner = narrow(jnp.tile(told.left, groups), inputs)
        outputs = plain(inputs, kernel, *args, **kwargs)
        return outputs + told.expanded(inner, groups).astype(outputs.dtype)

    layer.conv_general_dilated = convolved


def _check(w: LowRankMatrix, kernel: Array) -> None:
    if kernel.shape != w.shape:
        raise ValueError(
            f"module: {w!r} meets a layer with a kernel of shape {kernel.shape}, one of those that are stacked for "
            "scan or vmap; disturb it in all its entries with low_rank(..., plain=lambda name: ...)"
        )


class _Embed(nnx.Embed):
    """An embedding with the deviation in the attribute ``deviation``."""

    deviation: Callable[[], LowRankMatrix]

    def __call__(self, inputs: Array, out_sharding: Any = None) -> Array:
        outputs = super().__call__(inputs, out_sharding)
        return outputs + self.deviation().perturbation_of_rows(inputs).astype(outputs.dtype)

    def attend(self, query: Array, out_sharding: Any = None) -> Array:
        outputs = super().attend(query, out_sharding)
        return outputs + self.deviation().T.perturbation(query).astype(outputs.dtype)


def _embed(layer: nnx.Embed, w: LowRankMatrix) -> None:
    layer.__class__ = _Embed
    layer.deviation = lambda: w  # type: ignore[attr-defined]  # a function: no part of the module's state


_LAYERS: dict[type, tuple[str, Callable[[Any, LowRankMatrix], None]]] = {
    nnx.Linear: ("kernel", _linear),
    nnx.Conv: ("kernel", _conv),
    nnx.Embed: ("embedding", _embed),
}
