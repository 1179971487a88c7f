"""Every particle's loss and its cotangents, from the entries of the outputs on which the loss depends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from eki_jax._checks import arrays, function, traceable
from eki_jax._types import Array, Ensemble, ForwardFn, LossFn
from eki_jax.kernel.axes import Axis
from eki_jax.kernel.evaluate import default_chunk_size, map_particles, of_rows
from eki_jax.kernel.particles import local_size
from eki_jax.kernel.precision import Precision, model_in
from eki_jax.losses.protocol import supported


def value_and_cotangents(
    loss: LossFn, outputs: Any, targets: Any, *, targets_axis: int | None = None
) -> tuple[Array, Any]:
    """Every particle's loss, and its gradient with respect to that particle's outputs.

    Args:
        loss: function ``loss(outputs, targets) -> scalar`` of one particle.
        outputs: arrays of shape (J, ...).
        targets: targets that ``loss`` takes; shared by the particles, or one for each with ``targets_axis=0``.
        targets_axis: particle axis of ``targets`` (perturbed data), 0, or None.

    Returns:
        ``(losses, cotangents)``: shape (J,), and arrays shaped like ``outputs``.

    Raises:
        ValueError: ``loss`` does not return a scalar.

    >>> import jax.numpy as jnp
    >>> from eki_jax import squared_error
    >>> outputs = jnp.array([[1.0, 2.0], [3.0, 5.0]])
    >>> value_and_cotangents(squared_error(), outputs, jnp.array([1.0, 1.0]))
    (Array([ 0.5, 10. ], dtype=float32), Array([[0., 1.],
           [2., 4.]], dtype=float32))
    """

    def scalar(one: Any, target: Any) -> Array:
        value = jnp.asarray(loss(one, target))
        if value.ndim:
            raise ValueError(f"loss: returned shape {value.shape} for one particle; wanted a scalar")
        return value

    function("loss", loss, "a function of outputs and targets", arguments=2)
    local_size(arrays("outputs", outputs, floating=True), name="outputs")
    traceable("targets", targets)
    return jax.vmap(jax.value_and_grad(scalar), in_axes=(0, targets_axis))(outputs, targets)


def supported_outputs(
    loss: LossFn, outputs: Any, targets: Any, *, targets_axis: int | None = None
) -> tuple[Any, LossFn]:
    """The entries of the outputs on which the loss depends at all, and the loss as a function of those.

    A loss that offers its support, see :class:`eki_jax.losses.SupportedLoss`, is reduced to it: for cross-entropy with
    integer labels one entry a sample instead of one a class, so that the kernel's products are smaller by the number of
    classes. Any other loss comes back as it is.

    Args:
        loss: a loss of one particle.
        outputs: arrays of shape (J, ...).
        targets: targets that ``loss`` takes.
        targets_axis: particle axis of ``targets``, 0, or None.

    Returns:
        ``(entries, loss_of_entries)`` with entries of shape (J, ...).

    Raises:
        TypeError: ``loss`` is no function, or outputs are no floating-point arrays.
        ValueError: outputs without a particle axis.

    >>> import jax.numpy as jnp
    >>> from eki_jax import cross_entropy
    >>> probabilities = jnp.array([[[0.1, 0.9], [0.8, 0.2]], [[0.3, 0.7], [0.5, 0.5]]])
    >>> entries, _ = supported_outputs(cross_entropy(), probabilities, jnp.array([1, 0]))
    >>> entries
    Array([[0.9, 0.8],
           [0.7, 0.5]], dtype=float32)
    """
    local_size(outputs, name="outputs")
    select, reduced = support_of(loss, targets)
    return (outputs if reduced is loss else jax.vmap(select, in_axes=(0, targets_axis))(outputs, targets)), reduced


def support_of(loss: LossFn, targets: Any) -> tuple[Callable[[Any, Any], Any], LossFn]:
    """For one particle: the function that selects the entries the loss depends on, and the loss of those.

    Raises:
        TypeError: ``loss`` is no function, or offers only a part of what makes a support.

    >>> from eki_jax import cross_entropy
    >>> select, of_entries = support_of(cross_entropy(delta=0.0), jnp.array([1]))
    >>> float(of_entries(select(jnp.array([[0.0, 1.0]]), jnp.array([1])), jnp.array([1])))
    -0.0
    """
    function("loss", loss, "a function of outputs and targets", arguments=2)
    offered = supported(loss)
    if offered is None or not offered.has_support(targets):
        return lambda outputs, targets: outputs, loss
    return offered.support, offered.of_support


def evaluate_support(
    forward: ForwardFn,
    loss: LossFn,
    ensemble: Ensemble,
    x: Any,
    targets: Any,
    *,
    targets_axis: int | None = None,
    chunk_size: int | None = None,
    axis: Axis = Axis(),  # noqa: B008
    particle: Callable[[Any], Any] | None = None,
    precision: Precision = None,
) -> tuple[Any, LossFn]:
    """The entries of the outputs on which the loss depends, and the loss as a function of those.

    As :func:`supported_outputs` of :func:`eki_jax.evaluate`, but taken inside every chunk: of a classifier's
    outputs, J x batch x classes, only the labelled class's are ever kept. ``particle`` makes a particle of a row of the
    ensemble, where these are none.

    >>> import jax.numpy as jnp
    >>> from eki_jax import cross_entropy
    >>> probabilities = jnp.array([[[0.1, 0.9]], [[0.3, 0.7]]])
    >>> evaluate_support(lambda u, x: u, cross_entropy(), probabilities, None, jnp.array([1]))[0]
    Array([[0.9],
           [0.7]], dtype=float32)
    """
    local_size((ensemble, targets) if targets_axis == 0 else ensemble, name="ensemble")
    one, rows = of_rows(forward, particle, ensemble, axis)
    if chunk_size is None:
        chunk_size = default_chunk_size(one, rows, x)
    select, reduced = support_of(loss, targets)

    def every(rows: Any, x: Any, targets: Any) -> Any:
        if targets_axis is None:
            return map_particles(lambda row: select(one(row, x), targets), rows, chunk_size)
        return map_particles(lambda pair: select(one(pair[0], x), pair[1]), (rows, targets), chunk_size)

    return model_in(precision, every)(rows, x, targets), reduced
