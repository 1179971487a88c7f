"""Online learning: one solver step per sample, with a recurrent state that every particle carries along.

A model with memory is a function ``cell(params, carry, x) -> (carry, outputs)`` of one particle and one sample. The
learner sees each sample once, in order; nothing is unrolled and no derivative is taken through time
(arXiv:1808.03620, sections 2.1.3 and 5.6).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from eki_jax._checks import a_solver, arrays, function, is_known, pair, traceable
from eki_jax._types import Array, Batch, Params
from eki_jax.kernel.axes import Axis
from eki_jax.kernel.health import finite_particles, masked_mean
from eki_jax.kernel.once import compiled_once
from eki_jax.solvers.protocol import Info, Solver
from eki_jax.solvers.refusals import Refusals


class Cell(Protocol):
    """The model for ONE particle and ONE sample: ``cell(params, carry, x) -> (carry, outputs)``."""

    def __call__(self, params: Params, carry: Any, x: Any, /) -> tuple[Any, Any]:
        """The next recurrent state and the outputs."""


class OnlineState(NamedTuple):
    """State of a learner.

    Attributes:
        solver: state of the solver, with the ensemble.
        carry: recurrent states of the particles, arrays with a leading axis J.
    """

    solver: Any
    carry: Any


class OnlineLearner(NamedTuple):
    """A learner, as three pure functions.

    Attributes:
        init: function ``init(ensemble, carry) -> state``; ``carry`` is one particle's first recurrent state, for all.
            With a solver that makes its own particles, ``init(params, key, carry)``.
        step: function ``step(state, (x, target)) -> (state, outputs, info)``: the outputs (J, ...) come from before the
            update, so that they are honest predictions of the target.
        stream: function ``stream(state, (xs, targets)) -> (state, (predictions, reasons))`` of what has a leading time
            axis, for :func:`learn_stream`: the mean outputs and why steps were refused.
    """

    init: Callable[..., OnlineState]
    step: Callable[[OnlineState, Batch], tuple[OnlineState, Any, Info]]
    stream: Callable[[OnlineState, Batch], tuple[OnlineState, tuple[Any, Array]]]


def online(cell: Cell, solver: Solver) -> OnlineLearner:
    """Learn from one sample at a time.

    Args:
        cell: function ``cell(params, carry, x) -> (carry, outputs)`` of one particle and one sample. A model without
            memory takes and returns an empty carry, ``()``.
        solver: solver whose ``update`` is used, such as ``eki_jax.euler(None, loss)``.

    Returns:
        An :class:`OnlineLearner`.

    Raises:
        TypeError: ``cell`` is no function of three arguments, ``solver`` no solver.
        ValueError: from ``init``, an ensemble whose leaves disagree on J; from ``step``, outputs or targets that do not
            fit.

    >>> import jax, jax.numpy as jnp
    >>> import eki_jax
    >>> cell = lambda u, carry, x: (carry, u * x)
    >>> learner = online(cell, eki_jax.euler(None, eki_jax.squared_error()))
    >>> state = learner.init(jnp.array([[1.0], [3.0]]), ())
    >>> for x in (1.0, 2.0, 1.0, 2.0, 3.0, 1.0, 2.0, 3.0):
    ...     state, outputs, info = learner.step(state, (x, jnp.array([2.5 * x])))
    >>> bool(jnp.allclose(state.solver.ensemble, 2.5, atol=0.1))
    True
    """
    function("cell", cell, "a model, cell(params, carry, x) -> (carry, outputs)", arguments=3)
    a_solver("solver", solver)

    def init(*start_and_carry: Any) -> OnlineState:
        *start, carry = start_and_carry
        state = solver.init(*start)
        size = jax.tree.leaves(jax.eval_shape(solver.ensemble, state))[0].shape[0]
        for_all = lambda leaf: jnp.broadcast_to(jnp.asarray(leaf), (size, *jnp.shape(leaf)))
        return OnlineState(state, jax.tree.map(for_all, carry))

    def step(state: OnlineState, sample: Batch) -> tuple[OnlineState, Any, Info]:
        x, target = traceable("sample", pair("sample", sample, "(x, target)"))
        carry, outputs = jax.vmap(cell, in_axes=(0, 0, None))(solver.ensemble(state.solver), state.carry, x)
        solved, info = solver.update(state.solver, outputs, target)
        return OnlineState(solved, carry), outputs, info

    def in_stream(state: OnlineState, sample: Batch) -> tuple[OnlineState, tuple[Any, Array]]:
        state, outputs, info = step(state, sample)
        return state, (masked_mean(outputs, finite_particles(outputs), Axis()), info.reason)

    return OnlineLearner(init, step, compiled_once(lambda state, samples: lax.scan(in_stream, state, samples)))


def learn_stream(learner: OnlineLearner, state: OnlineState, samples: Batch) -> tuple[OnlineState, Any]:
    """One pass over a stream as one ``lax.scan``.

    Args:
        learner: learner from :func:`online`.
        state: state to start from; the result of one stream continues in the next.
        samples: pair ``(xs, targets)`` with a leading time axis T.

    Returns:
        ``(state, predictions)``: the mean over the particles of the outputs for every sample, each from before its
        target was seen, shape (T, ...); without the outputs that are not finite.

    Raises:
        ValueError: inputs and targets of different lengths.

    Warns:
        RuntimeWarning: steps that were refused, and why, where the function is not called in a compiled one.

    >>> import jax, jax.numpy as jnp
    >>> import eki_jax
    >>> learner = online(lambda u, carry, x: (carry, u * x), eki_jax.euler(None, eki_jax.squared_error()))
    >>> xs = jnp.arange(1.0, 9.0)[:, None]
    >>> state, predictions = learn_stream(learner, learner.init(jnp.array([[1.0], [3.0]]), ()), (xs, 2.5 * xs))
    >>> predictions.shape
    (8, 1)
    """
    traceable("samples", pair("samples", samples, "(xs, targets)"))
    lengths = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(samples)}
    if len(lengths) != 1 or () in lengths:
        raise ValueError(f"samples: leading axes {sorted(lengths)}; wanted one time axis for inputs and targets")

    state, (predictions, reasons) = learner.stream(state, samples)
    if is_known(reasons):  # in a compiled function nobody could be warned
        refusals = Refusals(len(reasons))
        refusals.counted({"reason": reasons})
        refusals.tell(stop=False)
    return state, predictions


def predict_stream(cell: Cell, params: Params, carry: Any, xs: Any) -> tuple[Any, Any]:
    """The outputs of one set of parameters over a stream, without learning.

    Args:
        cell: model of one particle and one sample.
        params: parameters of one particle, such as the mean particle.
        carry: first recurrent state.
        xs: inputs with a leading time axis T.

    Returns:
        ``(carry, outputs)``, the outputs with a leading axis T.

    Raises:
        TypeError: ``cell`` is no function of three arguments; ``params``, ``carry`` or ``xs`` are no arrays.

    >>> import jax.numpy as jnp
    >>> predict_stream(lambda u, total, x: (total + x, u * (total + x)), 2.0, 0.0, jnp.array([1.0, 2.0]))
    (Array(3., dtype=float32), Array([2., 6.], dtype=float32))
    """
    function("cell", cell, "a model, cell(params, carry, x) -> (carry, outputs)", arguments=3)
    arrays("params", params, some=True)
    traceable("carry", carry)
    traceable("xs", xs)
    return lax.scan(lambda state, x: cell(params, state, x), carry, xs)
