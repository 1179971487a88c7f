"""Models that take a random key, or carry a state of their own such as running statistics, through any solver.

Dropout and noisy simulators ask for random numbers, batch normalization keeps averages over the batches. A solver of
the library knows neither: its model is ``forward(params, x)``. Here the key and the state travel with the inputs to a
model of that kind, and come back as part of the solver's state.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from eki_jax._checks import a_solver, arrays, flag, function, pair
from eki_jax._types import Array, Batch, Ensemble, ForwardFn, Params
from eki_jax.kernel.evaluate import IndexedForward
from eki_jax.kernel.keys import particle_key
from eki_jax.kernel.once import compiled_once
from eki_jax.kernel.particles import check_like
from eki_jax.solvers.protocol import Solver, check_state, compiled, extended, given

# Folded into the key, so that a solver which was given the same one draws other numbers for its deviations.
_MODEL = 0x6D6F64
_BATCH = "batch"  # as sharding.make_mesh names it


class StatefulState(NamedTuple):
    """State of :func:`stateful`.

    Attributes:
        inner: state of the solver.
        key: data of the model's key, uint32; None where the model takes none. A step's key is a function of it and of
            the number of steps taken.
        model_state: state of the model, a pytree of arrays; None where the model has none.
    """

    inner: Any
    key: Array | None
    model_state: Any

    @property
    def ensemble(self) -> Any:
        """The particles where outputs are wanted, where the solver's state has them."""
        return self.inner.ensemble

    @property
    def position(self) -> Any:
        """The particles to predict with, where the solver's state has them."""
        return self.inner.position

    @property
    def time(self) -> Array:
        """The sum of the step sizes so far, where the solver's state has it."""
        return self.inner.time

    @property
    def count(self) -> Array:  # type: ignore[override]  # hides tuple.count
        """The number of steps taken, int32."""
        return self.inner[-1] if callable(self.inner.count) else self.inner.count


class Inputs(NamedTuple):
    """What the wrapped solver takes for the inputs.

    Attributes:
        x: inputs of the model.
        key: data of the step's key, uint32, or None.
        model_state: state of the model, or None.
    """

    x: Any
    key: Array | None
    model_state: Any


def stateful(
    make: Callable[[ForwardFn | None], Solver],
    forward: Callable[..., Any] | None,
    *,
    key: Array | None = None,
    state: Any = None,
    common: bool = False,
) -> Solver:
    """Any solver for a model that takes a random key, or a state that it changes, or both.

    The model is ``forward(params, x, key=key) -> outputs``, ``forward(params, x, state=state) -> (outputs, state)``, or
    both together, ``forward(params, x, key=key, state=state) -> (outputs, state)``, for one particle.

    In step n the key is ``k = fold_in(key, n)``, and particle j gets ``fold_in(k, j)`` with j its index among those of
    all devices, so that its numbers depend neither on the devices nor on the chunks. All particles see the same state.
    After the step the model is evaluated once more, on the same batch with ``k`` at the solver's estimate (the mean
    particle), and the state that this returns is the next one. A step that is refused changes neither, nor does a new
    state that is not finite; ``info.refreshed`` says so.

    Where devices share the samples of a batch, the key of a step is ``fold_in(k, s)`` on those with the share s, so
    that no two samples get the same numbers; these then depend on how many devices share them. A state comes from one
    share of the samples, and is refused there.

    Args:
        make: function ``make(forward) -> solver`` that makes a solver of the library from a model ``forward(params,
            x)``, such as ``lambda f: eki_jax.euler(f, loss)``. It is to hand on the very model that it is given.
        forward: model of one particle; None where only ``update`` is used.
        key: JAX random key, for a model that takes one; None for one that does not.
        state: first state of the model, a pytree of arrays such as batch statistics, for a model that has one; None for
            one that has none.
        common: flag; True gives all particles of a step the same key ``k``, as with common random numbers in a
            gradient: what differs between their outputs is the parameters' doing alone, and the step has the noise of
            one draw. False gives each its own: the draws average out over the particles, and with few of them the
            covariances take them for the parameters' doing. With dropout natural gradients learn better with masks of
            the particles' own, and few particles of :func:`eki_jax.euler` with common ones.

    Returns:
        A :class:`eki_jax.Solver` with :class:`StatefulState`; its ``init`` takes what the wrapped solver's takes, its
        ``info`` is that solver's, with a flag ``refreshed`` more for a model with a state. Ask and tell, that is
        ``update``, has no call of the model to give a key or a state to: it leaves the model's state as it is.

    Raises:
        TypeError: ``make`` or ``forward`` is no function, or does not take ``key`` or ``state`` where these are given;
            neither ``key`` nor ``state``; a key that is none; from ``step``, a model that returns no pair where it has
            a state, and a solver that does not tell the model which particle it evaluates, with ``common=False``.
        ValueError: from ``step``, a model that returns a state of another structure or of other shapes; a model with a
            state on a mesh of devices that spreads the samples, whose statistics would be those of a part.

    >>> import jax, jax.numpy as jnp
    >>> import eki_jax
    >>> def forward(params, x, *, key, state):  # measured with noise; counts its calls
    ...     return params * x + 0.1 * jax.random.normal(key, x.shape), {"calls": state["calls"] + 1}
    >>> make = lambda f: eki_jax.euler(f, eki_jax.squared_error())
    >>> solver = stateful(make, forward, key=jax.random.key(0), state={"calls": jnp.array(0)})
    >>> state = solver.init(jnp.array([[1.0], [3.0], [2.5]]))
    >>> for _ in range(20):
    ...     state, info = solver.step(state, (2.0 * jnp.ones(1), jnp.array([8.0])))
    >>> bool(abs(solver.estimate(state) - 4.0) < 0.3), int(state.model_state["calls"]), bool(info.refreshed)
    (True, 20, True)
    """
    function("make", make, "a function of a model that makes a solver", arguments=1)
    if key is None and state is None:
        raise TypeError("key, state: None; wanted one of them, or make(forward) alone for a model without either")
    # Compiled, so that the number is no transfer from the host, which a guard may forbid.
    of_model = compiled_once(lambda key: jax.random.key_data(jax.random.fold_in(key, _MODEL)))
    own = None if key is None else of_model(particle_key("key", key))
    if state is not None:
        arrays("state", state)
    flag("common", common)
    if forward is not None:
        words = [name for name, value in (("key", key), ("state", state)) if value is not None]
        returned = "outputs" if state is None else "(outputs, state)"
        kind = f"a model, forward(params, x, {', '.join(f'{word}={word}' for word in words)}) -> {returned}"
        function("forward", forward, kind, arguments=2, keywords=words)
    told: list[bool] = []  # whether a solver has ever asked for a particle by its index, known once a step is traced

    def called(params: Params, inputs: Inputs, index: Array | None = None) -> tuple[Any, Any]:
        """The outputs and the state after them, of a particle by its index or of their mean."""
        run: Callable[..., Any] = given(forward)
        words: dict[str, Any] = {}
        if inputs.key is not None:
            words["key"] = jax.random.wrap_key_data(inputs.key)
            if index is not None and not common:
                words["key"] = jax.random.fold_in(words["key"], index)
        if state is None:
            return run(params, inputs.x, **words), None
        return pair("forward: returned", run(params, inputs.x, **words, state=inputs.model_state), "(outputs, state)")

    def indexed(params: Params, index: Array, inputs: Inputs) -> Any:
        told.append(True)
        return called(params, inputs, index)[0]

    model: ForwardFn | None = None
    if forward is not None:
        plain = lambda params, inputs: called(params, inputs)[0]
        model = plain if key is None or common else IndexedForward(plain, indexed)
    solver = a_solver("make: returned", make(model))

    @functools.wraps(solver.init)  # whose number of arguments tells the kinds of solvers apart
    def init(*start: Any) -> StatefulState:
        # Buffers of their own: a state that is donated must not take the caller's with it.
        first = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), state)
        return StatefulState(solver.init(*start), None if own is None else jnp.array(own, copy=True), first)

    def step(before: StatefulState, batch: Batch) -> tuple[StatefulState, Any]:
        check_state(before, StatefulState, "stateful")
        given(forward)
        shares = _shares_of_samples()
        if shares > 1 and state is not None:
            raise ValueError(
                f"state: of a model whose samples are spread over {shares} devices, each of which would have the "
                "statistics of its own; wanted a mesh that spreads particles alone, make_mesh(), or a model without a "
                "state, in evaluation mode"
            )
        x, targets = pair("batch", batch)
        drawn = None
        if before.key is not None:
            of_step = jax.random.fold_in(jax.random.wrap_key_data(before.key), before.count)
            drawn = jax.random.key_data(jax.random.fold_in(of_step, lax.axis_index(_BATCH)) if shares > 1 else of_step)
        inputs = Inputs(x, drawn, before.model_state)
        inner, info = solver.step(before.inner, (inputs, targets))
        if isinstance(model, IndexedForward) and not told:
            raise TypeError(
                "make: its solver does not tell the model which particle it evaluates; wanted a solver of the library "
                "that is given the very model of make(forward), or common=True"
            )
        if state is None:
            return before._replace(inner=inner), info
        found = _like(called(solver.estimate(inner), inputs)[1], before.model_state)
        refreshed = jnp.asarray(info.moved) & _is_finite(found)
        kept = jax.tree.map(lambda new, old: jnp.where(refreshed, new, old), found, before.model_state)
        return before._replace(inner=inner, model_state=kept), _info(info, refreshed)

    def update(before: StatefulState, outputs: Any, targets: Any) -> tuple[StatefulState, Any]:
        check_state(before, StatefulState, "stateful")
        inner, info = solver.update(before.inner, outputs, targets)
        return before._replace(inner=inner), info if state is None else _info(info, jnp.zeros((), bool))

    def with_ensemble(before: StatefulState, ensemble: Ensemble) -> StatefulState:
        return before._replace(inner=solver.with_ensemble(before.inner, ensemble))

    return compiled(
        Solver(
            init,
            step,
            update,
            lambda state: solver.ensemble(state.inner),
            lambda state: solver.estimate(state.inner),
            with_ensemble,
            lambda state: solver.done(state.inner),
            lambda particles: solver.passes(particles) + (state is not None),
        )
    )


def model_with(run: Callable[[Params, tuple[Any, ...], Array | None, Any], Any], keyed: bool, stated: bool) -> Any:
    """A model with the arguments that :func:`stateful` gives it, and no others, so that a signature tells its kind.

    Args:
        run: function ``run(params, inputs, key, state)``, with None for what the model does not take.
        keyed: flag, True where the model takes a key.
        stated: flag, True where it takes a state, and returns ``(outputs, state)``.

    Returns:
        ``forward(params, *inputs)``, with the keywords ``key`` and ``state`` where these are taken.

    >>> forward = model_with(lambda params, inputs, key, state: (params * inputs[0], state + 1), False, True)
    >>> forward(2.0, 3.0, state=0)
    (6.0, 1)
    """
    if keyed and stated:
        return lambda params, *inputs, key, state: run(params, inputs, key, state)
    if keyed:
        return lambda params, *inputs, key: run(params, inputs, key, None)
    if stated:
        return lambda params, *inputs, state: run(params, inputs, None, state)
    return lambda params, *inputs: run(params, inputs, None, None)


def unpacked(
    inputs: tuple[Any, ...], examples: int, takes: Callable[[tuple[Any, ...]], bool] = lambda inputs: True
) -> tuple[Any, ...]:
    """The inputs of a call of a model that has several, from a batch's one x, which is a tuple of them.

    Args:
        inputs: inputs of a call of the forward map.
        examples: number of example inputs that the model was made with; 0 where there were none.
        takes: function of inputs, True where the model can be called with so many; asked where there were no examples.

    >>> unpacked(((1, 2),), 2), unpacked(((1, 2),), 1), unpacked(((1, 2),), 0), unpacked((1, 2), 2)
    ((1, 2), ((1, 2),), ((1, 2),), (1, 2))
    """
    if len(inputs) != 1 or not isinstance(inputs[0], tuple | list):
        return inputs
    is_batch = examples == len(inputs[0]) > 1 if examples else not takes(inputs)
    return tuple(inputs[0]) if is_batch else inputs


def _like(new: Any, old: Any) -> Any:
    """A model's new state in the dtypes of the old one, if it is one like that.

    Raises:
        TypeError: numbers of another kind, whole ones in the place of real ones for example.
        ValueError: another structure or another shape.
    """
    name, words = "forward: its new state", {"other": "old ones", "hint": "the same, in every call"}
    check_like(arrays(name, new), old, name=name, **words)

    def leaf(path: Any, one: Any, before: Array) -> Array:
        found = jnp.result_type(one)
        if found != before.dtype and not all(jnp.issubdtype(dtype, jnp.floating) for dtype in (found, before.dtype)):
            where = name + jax.tree_util.keystr(path)
            raise TypeError(f"{where}: dtype {found}, but the old one has {before.dtype}; wanted the same")
        return jnp.asarray(one, before.dtype)

    return jax.tree_util.tree_map_with_path(leaf, new, old)


def _is_finite(tree: Any) -> Array:
    """Whether all numbers of a pytree are finite."""
    return jnp.stack([jnp.ones((), bool), *(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))]).all()


def _shares_of_samples() -> int:
    """The number of devices that share the samples of a batch."""
    try:
        return lax.axis_size(_BATCH)
    except NameError:
        return 1


def _info(info: Any, refreshed: Array) -> Any:
    """A solver's info with a flag more."""
    return extended(info, "Stateful", refreshed=refreshed)
