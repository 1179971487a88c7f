"""Unmodified flax modules evaluated with matrices of the form mean plus low rank."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from eki_jax._types import Array
from eki_jax.flax._windows import told_windows
from eki_jax.flax.linen import linen_forward
from eki_jax.flax.low_rank_nnx import perturbed_call
from eki_jax.flax.nnx import nnx_forward
from eki_jax.natural.deviations.matrix import LowRankMatrix, is_low_rank

Matrices = dict[tuple[str, ...], LowRankMatrix]


def low_rank_forward(
    module: nn.Module | nnx.Module,
    *example_inputs: Any,
    method: str | None = None,
    constants: Mapping[str, Any] | None = None,
) -> tuple[Callable[..., Any], Any]:
    """A linen or nnx module as a forward map that takes low-rank deviations of its matrices.

    Like :func:`linen_forward` and :func:`nnx_forward`, but ``params`` may have a
    :class:`eki_jax.natural.LowRankMatrix` in the place of the kernel of a dense or convolutional layer (grouped and
    dilated ones too) or of an embedding, recurrent cells made of such layers included: the layer then adds
    ``(x a) b^T`` to what it returns for the mean. All other leaves are arrays. The module is not modified.

    Args:
        module: A linen module, or an initialized nnx module.
        *example_inputs: inputs for a linen module, like those of a mini-batch.
        method: Name of the method to call; ``None`` for ``__call__``.
        constants: Values of a linen module's other collections.

    Returns:
        ``(forward, template)`` as from :func:`linen_forward`.

    Raises:
        ValueError: As :func:`linen_forward` and :func:`nnx_forward`; from ``forward``, a :class:`LowRankMatrix` for a
            leaf that no such layer uses; it is named.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import linen as nn
        >>> from eki_jax.natural import LowRankMatrix
        >>> forward, template = low_rank_forward(nn.Dense(3, use_bias=False), jnp.ones((1, 2)))
        >>> w = LowRankMatrix(jnp.ones((2, 3)), jnp.ones((2, 1)), jnp.ones((3, 1)))
        >>> forward({"kernel": w}, jnp.ones((1, 2)))
        Array([[4., 4., 4.]], dtype=float32)
    """
    if isinstance(module, nnx.Module):
        _, template = nnx_forward(module, method=method or "__call__")
        return _split(perturbed_call(module, method or "__call__"), type(module).__name__), template
    plain, template = linen_forward(module, *example_inputs, method=method, constants=constants)

    def intercepted(means: Any, matrices: Matrices, *inputs: Any) -> tuple[Any, set[tuple[str, ...]]]:
        interceptor = _Interceptor(matrices)
        with _intercepted(interceptor):
            outputs = plain(means, *inputs)
        return outputs, interceptor.used

    return _split(intercepted, type(module).__name__), template


def _split(run: Callable[..., Any], kind: str) -> Callable[..., Any]:
    """``forward(params, *inputs)`` from a function of the means and the low-rank matrices by path."""

    def forward(params: Any, *inputs: Any) -> Any:
        leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_low_rank)
        matrices = {_names(path): leaf for path, leaf in leaves if is_low_rank(leaf)}
        means = jax.tree.map(lambda leaf: leaf.mean if is_low_rank(leaf) else leaf, params, is_leaf=is_low_rank)
        outputs, used = run(means, matrices, *inputs)
        unknown = sorted(set(matrices) - used)
        if unknown:
            raise ValueError(
                f"module: {kind} uses the leaf {'/'.join(unknown[0])} in no layer that can take a deviation of low "
                "rank (Dense or Linear, Conv without a mask, Embed, each with a matrix of its own: not stacked for "
                "scan or vmap); disturb it in all its entries with low_rank(..., plain=lambda name: ...)"
            )
        return outputs

    return forward


class _Current(threading.local):
    """The interceptor at work in a thread.

    Attributes:
        interceptor: interceptor that is at work, or None.
        entered: the context in which flax asks for it, once there is one.
    """

    interceptor: Any = None
    entered: Any = None

    def __call__(self, next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        if self.interceptor is None:
            return next_fun(*args, **kwargs)
        return self.interceptor(next_fun, args, kwargs, context)


_CURRENT = _Current()


@contextmanager
def _intercepted(interceptor: _Interceptor) -> Iterator[None]:
    """``nn.intercept_methods``, under ``python -O`` as well.

    flax forgets an interceptor inside of an assert statement, which does not exist there: one that was entered would
    stay for good, and keep tracers. There one for each thread stays, and passes on to what is at work.
    """
    if __debug__:
        with nn.intercept_methods(interceptor):
            yield
        return
    if _CURRENT.entered is None:
        _CURRENT.entered = nn.intercept_methods(_CURRENT)
        _CURRENT.entered.__enter__()
    before, _CURRENT.interceptor = _CURRENT.interceptor, interceptor
    try:
        yield
    finally:
        _CURRENT.interceptor = before


class _Interceptor:
    """Adds to what a linen layer returns for its mean parameters what its deviation contributes."""

    def __init__(self, matrices: Matrices) -> None:
        self.matrices = matrices
        self.used: set[tuple[str, ...]] = set()

    def __call__(
        self, next_fun: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext
    ) -> Any:
        module = context.module
        leaf, methods = _LAYERS.get(type(module), ("", {}))
        contribution = methods.get(context.method_name)
        path = (*module.path, leaf)
        if contribution is None or path not in self.matrices or getattr(module, "mask", None) is not None:
            return next_fun(*args, **kwargs)
        if module.get_variable("params", leaf).shape != self.matrices[path].shape:  # one slice of a stack
            return next_fun(*args, **kwargs)
        self.used.add(path)
        outputs = next_fun(*args, **kwargs)
        return outputs + contribution(module, self.matrices[path], *args, **kwargs).astype(outputs.dtype)


def _dense(module: nn.Dense, w: LowRankMatrix, inputs: Array) -> Array:
    return w.perturbation(inputs, bias="bias" if module.use_bias else None)


def _conv(module: nn.Conv, w: LowRankMatrix, inputs: Array) -> Array:
    groups = module.feature_group_count

    def convolved(kernel: Array, inputs: Array) -> Array:
        narrow: Any = module.clone(features=kernel.shape[-1], use_bias=False, parent=None, name=None)
        return narrow.apply({"params": {"kernel": kernel}}, inputs)

    w = told_windows(w, convolved, inputs, groups, module.use_bias)
    return w.expanded(convolved(jnp.tile(w.left, groups), inputs), groups)


def _embed(module: nn.Embed, w: LowRankMatrix, inputs: Array) -> Array:
    return w.perturbation_of_rows(inputs)


def _attend(module: nn.Embed, w: LowRankMatrix, query: Array) -> Array:
    return w.T.perturbation(query)


_LAYERS: dict[type, tuple[str, dict[str, Callable[..., Array]]]] = {
    nn.Dense: ("kernel", {"__call__": _dense}),
    nn.Conv: ("kernel", {"__call__": _conv}),
    nn.Embed: ("embedding", {"__call__": _embed, "attend": _attend}),
}


def _names(path: Any) -> tuple[str, ...]:
    return tuple(str(getattr(part, "key", getattr(part, "idx", getattr(part, "name", part)))) for part in path)
