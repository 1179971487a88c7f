"""A model and its loss as a function of the parameters: gradient, Gauss-Newton and Hessian products, in chunks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from eki_jax._checks import arrays, function, one_of, pair, traceable, whole
from eki_jax._types import Array, Batch, ForwardFn, LossFn, Params, PyTree
from eki_jax.losses.protocol import reduction_of

Operator = Callable[[PyTree], PyTree]


@dataclass(frozen=True)
class Objective:
    r"""``L(forward(params, x), targets)`` and its derivatives, for one set of parameters.

    Products with a matrix are taken by ``jax.linearize``, its transpose and forward-over-reverse differentiation; the
    matrix itself never exists. With ``chunk_size`` a batch of any size is accumulated over slices of that many
    samples, so that the memory for activations does not grow with the batch; the results are the same to rounding.

    Attributes:
        forward: function ``forward(params, x) -> outputs``, such as :func:`eki_jax.flax.linen_forward` makes. In
            chunks, a sample's outputs must not depend on the other samples (batch normalization with the batch's own
            statistics then uses each chunk's).
        loss: function ``loss(outputs, targets) -> scalar``, twice differentiable in the outputs, like
            ``optax.losses.softmax_cross_entropy_with_integer_labels(...).mean()``. For the Gauss-Newton matrix to be
            positive semi-definite it has to be convex.
        chunk_size: number of samples in a slice; None for the whole batch at once. The last slice may be smaller.
        reduction: name of what ``loss`` does with the samples, ``"mean"`` or ``"sum"``; it decides how slices are added
            up. By default what the loss says of itself, see :mod:`eki_jax.losses.protocol`, and else the mean.

    Raises:
        TypeError: ``forward`` or ``loss`` is no function, ``chunk_size`` no whole number; params that are not
            floating-point, a batch that is no pair.
        ValueError: ``chunk_size`` < 1, an unknown ``reduction`` or another than the loss's own, a loss that is not a
            scalar, a batch whose arrays disagree in length.

    >>> import jax.numpy as jnp
    >>> objective = Objective(lambda w, x: x @ w, lambda outputs, y: 0.5 * jnp.mean((outputs - y) ** 2))
    >>> batch = (jnp.array([[1.0, 0.0], [0.0, 2.0]]), jnp.array([1.0, 2.0]))
    >>> value, gradient = objective.value_and_grad(jnp.zeros(2), batch)
    >>> gradient
    Array([-0.5, -2. ], dtype=float32)
    >>> objective.gauss_newton(jnp.zeros(2), batch)(jnp.ones(2))
    Array([0.5, 2. ], dtype=float32)
    """

    forward: ForwardFn
    loss: LossFn
    chunk_size: int | None = None
    reduction: Literal["mean", "sum"] | None = None

    def __post_init__(self) -> None:
        function("forward", self.forward, "a model, forward(params, x) -> outputs", arguments=2)
        function("loss", self.loss, "a function of outputs and targets", arguments=2)
        if self.chunk_size is not None:
            size = whole("chunk_size", self.chunk_size, or_="None for the whole batch")
            object.__setattr__(self, "chunk_size", size)
        one_of("reduction", self.reduction, ("mean", "sum", None))
        own = reduction_of(self.loss)
        if own is not None and self.reduction not in (own, None):
            raise ValueError(f"reduction: {self.reduction!r}, but the loss says {own!r} of itself; wanted {own!r}")

    def value(self, params: Params, batch: Batch) -> Array:
        """Loss of the batch, a scalar."""
        _check(params, batch)
        return self._accumulate(lambda chunk: self._loss_of(chunk)(params), batch)

    def value_and_grad(self, params: Params, batch: Batch) -> tuple[Array, Params]:
        """Loss of the batch and its gradient, a pytree like ``params``."""
        _check(params, batch)
        return self._accumulate(lambda chunk: jax.value_and_grad(self._loss_of(chunk))(params), batch)

    def gauss_newton(self, params: Params, batch: Batch) -> Operator:
        """``G = J^T H_L J`` as a function of a pytree like ``params``; ``J`` is the model's Jacobian.

        ``H_L`` is the Hessian of the loss with respect to the outputs (the paper's equations 17 and 29).
        """
        return self._operator(self._gauss_newton_of, params, batch)

    def hessian(self, params: Params, batch: Batch) -> Operator:
        """``H``, the Hessian of the loss with respect to the parameters, as a function of a pytree like ``params``."""
        return self._operator(self._hessian_of, params, batch)

    def _operator(self, linear: Callable[[Params, Batch], Operator], params: Params, batch: Batch) -> Operator:
        _check(params, batch)
        if self._is_whole(batch):
            return linear(params, batch)  # linearized once, however many products follow
        return lambda vector: self._accumulate(lambda chunk: linear(params, chunk)(vector), batch)

    def _gauss_newton_of(self, params: Params, chunk: Batch) -> Operator:
        x, targets = chunk
        outputs, pushforward = jax.linearize(lambda p: self.forward(p, x), params)
        pullback = jax.linear_transpose(pushforward, params)
        output_gradient = jax.grad(lambda o: self.loss(o, targets))
        _, output_hessian = jax.linearize(output_gradient, outputs)
        return lambda vector: pullback(output_hessian(pushforward(vector)))[0]

    def _hessian_of(self, params: Params, chunk: Batch) -> Operator:
        return jax.linearize(jax.grad(self._loss_of(chunk)), params)[1]

    def _loss_of(self, chunk: Batch) -> Callable[[Params], Array]:
        def loss_of(params: Params) -> Array:
            x, targets = chunk
            value = jnp.asarray(self.loss(self.forward(params, x), targets))
            if value.ndim:
                raise ValueError(f"loss: returned shape {value.shape}; wanted a scalar")
            return value

        return loss_of

    def _is_whole(self, batch: Batch) -> bool:
        return self.chunk_size is None or self.chunk_size >= _batch_size(batch)

    def _accumulate(self, function: Callable[[Batch], PyTree], batch: Batch) -> PyTree:
        """``function`` of the batch, from its values on the slices."""
        if self._is_whole(batch):
            return function(batch)
        size, chunk_size = _batch_size(batch), self.chunk_size
        assert chunk_size is not None
        count, rest = divmod(size, chunk_size)
        reduction = self.reduction or reduction_of(self.loss) or "mean"
        weight = lambda samples: samples / size if reduction == "mean" else 1.0
        slices = jax.tree.map(
            lambda leaf: leaf[: count * chunk_size].reshape(count, chunk_size, *leaf.shape[1:]), batch
        )
        first = jax.tree.map(lambda leaf: leaf[0], slices)
        like = jax.eval_shape(function, first)
        zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32)), like)
        add = lambda total, part, scale: jax.tree.map(lambda a, b: a + scale * b, total, part)

        def body(total: PyTree, one: Batch) -> tuple[PyTree, None]:
            return add(total, function(one), weight(chunk_size)), None

        total, _ = jax.lax.scan(body, zero, slices)
        if rest:
            total = add(total, function(jax.tree.map(lambda leaf: leaf[count * chunk_size :], batch)), weight(rest))
        return jax.tree.map(lambda leaf, shape: leaf.astype(shape.dtype), total, like)


def _check(params: Params, batch: Batch) -> None:
    arrays("params", params, floating=True, some=True)
    traceable("batch", pair("batch", batch))


def _batch_size(batch: Batch) -> int:
    sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(batch)}
    if len(sizes) != 1 or () in sizes:
        raise ValueError(f"batch: leading axes {sorted(sizes)}; wanted arrays that share one leading axis, the samples")
    return next(iter(sizes))[0]
