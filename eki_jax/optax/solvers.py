"""Any solver of an ensemble as a gradient transformation."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from eki_jax._checks import a_solver
from eki_jax._types import Ensemble
from eki_jax.optax._checks import check_params, check_zeros
from eki_jax.solvers.protocol import Solver, makes_its_particles


def from_solver(solver: Solver) -> optax.GradientTransformationExtraArgs:
    """A solver's step as a transformation whose updates move the ensemble to where the solver would.

    ``update(zeros, state, ensemble, *, outputs, targets, **extra)`` takes the model's outputs on ``ensemble``, shape
    (J, ...), and the targets, as the solver's own ``update`` does. What other transformations did to the ensemble in
    the meantime, the solver takes over by ``with_ensemble``. No learning rate belongs behind it: the step size is the
    solver's.

    Args:
        solver: solver that moves an ensemble, such as :func:`eki_jax.heavy_ball` or :func:`eki_jax.kalman.enkf`.

    Returns:
        A transformation with the solver's state.

    Raises:
        TypeError: no solver, or one that makes its own particles around one mean, whose particles no optimizer holds;
            from ``update``, no ``outputs`` or ``targets``.
        ValueError: from ``update``, no parameters, or updates that are known and not zero.

    >>> import jax.numpy as jnp, optax
    >>> import eki_jax
    >>> from eki_jax.optax import from_solver
    >>> tx, ensemble = from_solver(eki_jax.euler(None, eki_jax.squared_error())), jnp.array([[1.0], [3.0]])
    >>> state = tx.init(ensemble)
    >>> for _ in range(20):
    ...     zeros, outputs = jnp.zeros_like(ensemble), 2.0 * ensemble
    ...     updates, state = tx.update(zeros, state, ensemble, outputs=outputs, targets=jnp.array([8.0]))
    ...     ensemble = optax.apply_updates(ensemble, updates)
    >>> bool(jnp.allclose(ensemble, 4.0, atol=0.2))
    True
    """
    if makes_its_particles(a_solver("solver", solver)):
        raise TypeError(
            "solver: makes its own particles around one mean, which an optimizer of particles cannot hold; wanted "
            "eki_jax.natural.value_and_natural_direction, whose direction goes into any chain as a gradient"
        )

    def update(
        updates: Ensemble,
        state: Any,
        params: Ensemble | None = None,
        *,
        outputs: Any = None,
        targets: Any = None,
        **extra: Any,
    ) -> tuple[Ensemble, Any]:
        del extra
        missing = [name for name, value in (("outputs", outputs), ("targets", targets)) if value is None]
        if missing:
            raise TypeError(
                f"from_solver: no {' and no '.join(missing)}; wanted update(zeros, state, ensemble, outputs=..., "
                "targets=...)"
            )
        check_params(params, "from_solver")
        check_zeros(updates, params)
        state, _ = solver.update(solver.with_ensemble(state, params), outputs, targets)
        return jax.tree.map(jnp.subtract, solver.ensemble(state), params), state

    return optax.GradientTransformationExtraArgs(solver.init, update)
