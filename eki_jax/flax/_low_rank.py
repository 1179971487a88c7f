"""Unmodified linen modules evaluated with matrices of the form mean plus low rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from eki_jax._types import Array
from eki_jax.flax._linen import linen_forward
from eki_jax.natural._low_rank import LowRankMatrix, is_low_rank


def low_rank_forward(
    module: nn.Module,
    *example_inputs: Any,
    method: str | None = None,
    constants: Mapping[str, Any] | None = None,
) -> tuple[Callable[..., Any], Any]:
    plain, template = linen_forward(module, *example_inputs, method=method, constants=constants)

    def forward(params: Any, *inputs: Any) -> Any:
        leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_low_rank)
        matrices = {_names(path): leaf for path, leaf in leaves if is_low_rank(leaf)}
        means = jax.tree.map(lambda leaf: leaf.mean if is_low_rank(leaf) else leaf, params, is_leaf=is_low_rank)
        interceptor = _Interceptor(matrices)
        with nn.intercept_methods(interceptor):
            outputs = plain(means, *inputs)
        unused = sorted(set(matrices) - interceptor.used)
        if unused:
            raise ValueError(
                f"module: {type(module).__name__} does not use the leaf {matrices[unused[0]].name} through a layer that is "
                f"known ({', '.join(kind.__name__ for kind in _LAYERS)}); disturb it in all its entries with "
                "low_rank(..., plain=lambda name: ...)"
            )
        return outputs

    return forward, template


class _Interceptor:
    def __init__(self, matrices: Mapping[tuple[str, ...], LowRankMatrix]) -> None:
        self.matrices, self.used = matrices, set()

    def __call__(
        self, next_fun: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext
    ) -> Any:
        module = context.module
        for kind, (leaf, methods) in _LAYERS.items():
            if type(module) is not kind or context.method_name not in methods:
                continue
            key = (*module.path, leaf)
            if key not in self.matrices:
                break
            self.used.add(key)
            return next_fun(*args, **kwargs) + methods[context.method_name](module, self.matrices[key], *args, **kwargs)
        return next_fun(*args, **kwargs)


def _dense(module: nn.Dense, w: LowRankMatrix, inputs: Array) -> Array:
    return w.perturbation(inputs)


def _conv(module: nn.Conv, w: LowRankMatrix, inputs: Array) -> Array:
    rank, groups = w.right.shape[-1], module.feature_group_count
    narrow = module.clone(features=rank * groups, use_bias=False, parent=None, name=None)
    kernel = jnp.tile(w.left, groups)
    inner = narrow.apply({"params": {"kernel": kernel}}, inputs)
    if groups == 1:
        return inner * w.right[:, 0] if rank == 1 else inner @ w.right.T
    inner = inner.reshape(*inner.shape[:-1], groups, rank)
    right = w.right.reshape(groups, -1, rank)
    return jnp.einsum("...gr,gkr->...gk", inner, right).reshape(*inner.shape[:-2], -1)


def _embed(module: nn.Embed, w: LowRankMatrix, inputs: Array) -> Array:
    return w.left[inputs] @ w.right.T


def _attend(module: nn.Embed, w: LowRankMatrix, query: Array) -> Array:
    return w.T.perturbation(query)


_LAYERS: dict[Any, tuple[str, dict[str, Callable[..., Array]]]] = {
    nn.Dense: ("kernel", {"__call__": _dense}),
    nn.Conv: ("kernel", {"__call__": _conv}),
    nn.Embed: ("embedding", {"__call__": _embed, "attend": _attend}),
}


def _names(path: Any) -> tuple[str, ...]:
    return tuple(str(getattr(part, "key", getattr(part, "name", part))) for part in path)
