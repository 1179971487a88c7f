"""Names for what the functions of this library pass to each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol, TypeAlias

import jax

Array: TypeAlias = jax.Array
PyTree: TypeAlias = Any

#: A pytree whose floating-point leaves carry a leading particle axis of length J.
Ensemble: TypeAlias = Any
#: The parameters of one particle: the ensemble's tree without the particle axis.
Params: TypeAlias = Any
#: ``(x, targets)``, as a loader yields it; the whole ensemble sees the same batch.
Batch: TypeAlias = tuple[Any, Any]
#: Where the linear system of a step is solved: among the particles, J x J, or among the outputs, M x M.
Space: TypeAlias = Literal["ensemble", "output"]
#: A number, or a function of the step count n = 0, 1, 2, ... that returns one.
Schedule: TypeAlias = float | Callable[[Array], Any]


class ForwardFn(Protocol):
    """The model for ONE particle: ``forward(params, x) -> outputs``. It is evaluated, never differentiated."""

    def __call__(self, params: Params, x: Any, /) -> Any:
        """Outputs of the model with parameters ``params`` on the inputs ``x``."""


class LossFn(Protocol):
    """The loss of ONE particle: ``loss(outputs, targets) -> scalar``, differentiable in the outputs."""

    def __call__(self, outputs: Any, targets: Any, /) -> Any:
        """The scalar loss of ``outputs``."""


class StepSizeFn(Protocol):
    """The step size dt, in units of the vector field's time."""

    def __call__(self, drift_norm: Array, ensemble_size: int | Array, count: Array, /) -> Any:
        """The step size from the paper's norm of D, the number of particles J and the number of steps taken."""


class Prior(Protocol):
    """A distribution of one particle's parameters."""

    def sample(self, key: Array) -> Params:
        """One draw, mean included."""

    def noise(self, key: Array) -> Params:
        """One draw of the centred distribution, N(0, C_0)."""
