"""An nnx module as the ``forward(params, x)`` of one particle."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import Jaxpr

from eki_jax._checks import traceable
from eki_jax._types import Array
from eki_jax.flax._programs import handed_on, read_for
from eki_jax.flax.linen import check_call, check_method
from eki_jax.solvers.stateful import model_with, unpacked


@overload
def nnx_forward(
    module: nnx.Module,
    *example_inputs: Any,
    method: str = "__call__",
    rngs: bool = False,
    mutable: Literal[False] = False,
    **options: Any,
) -> tuple[Callable[..., Any], Any]: ...


@overload
def nnx_forward(
    module: nnx.Module,
    *example_inputs: Any,
    method: str = "__call__",
    rngs: bool = False,
    mutable: Any,
    **options: Any,
) -> tuple[Callable[..., Any], Any, Any]: ...


def nnx_forward(
    module: nnx.Module,
    *example_inputs: Any,
    method: str = "__call__",
    rngs: bool = False,
    mutable: Any = False,
    **options: Any,
) -> Any:
    """Turn an nnx module into a forward map and the shapes of one particle.

    The module is split into its graph, its ``nnx.Param`` values and the rest (running statistics, random streams),
    which all particles share. By default the rest is read only, and a call that draws random numbers or writes
    statistics is an error: put the module into the mode that does neither, by ``module.eval()``, or take a forward map
    with a key or a state, which :func:`eki_jax.stateful` gives these in every step::

        forward, template, state = nnx_forward(module, x, rngs=True, mutable=True)
        solver = eki_jax.stateful(lambda f: eki_jax.euler(f, loss), forward, key=key, state=state)
        module.eval()
        predict, _, _ = nnx_forward(module, x, mutable=True)

    The caller's module is never changed.

    Args:
        module: nnx module, initialized.
        *example_inputs: inputs like those of a mini-batch (arrays, pytrees of arrays or ``jax.ShapeDtypeStruct``), with
            which the mode is checked at once; without them, when the forward map is called. Where there are several,
            the x of a batch is a tuple of as many.
        method: name of the method to call.
        rngs: flag; True for a forward map that takes a key, from which all random streams of the module begin anew in
            every call: the key of a stream is ``fold_in(key, crc32(path))`` of its path in the module.
        mutable: flag, or a filter of nnx such as ``nnx.BatchStat``; True for a forward map that takes a state, all
            variables but parameters and random streams (or those of the filter), and returns the next.
        **options: keywords of the method that are the same in every call.

    Returns:
        ``(forward, template)``: ``forward(params, x)`` for one particle, where ``params`` is a nested dictionary of
        arrays (:func:`flax.nnx.to_pure_dict`) or the :class:`flax.nnx.State` that ``nnx.state(module, nnx.Param)`` is,
        and the same dictionary of ``jax.ShapeDtypeStruct``. With ``rngs`` it is ``forward(params, x, key=key)``. With
        ``mutable`` it is ``forward(params, x, state=state) -> (outputs, state)``, and the result ``(forward, template,
        state)``, with the nested dictionary of the variables' values.

    Raises:
        TypeError: ``module`` is no nnx module, ``rngs`` no flag, inputs or ``options`` that the method does not take;
            from ``forward``, inputs that are no arrays.
        ValueError: ``method`` is no method of the module. The module has no ``nnx.Param``. A call draws random numbers
            or writes to variables, and ``rngs`` or ``mutable`` do not say so; the message names these and says what to
            do. It comes from ``forward`` where no example inputs are given.

    Example:
        >>> from flax import nnx
        >>> from eki_jax.flax import nnx_forward
        >>> forward, template = nnx_forward(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
        >>> template["kernel"].shape
        (2, 3)
        >>> nnx_forward(nnx.BatchNorm(2, rngs=nnx.Rngs(0)), jax.numpy.ones((5, 2)))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        ValueError: module: BatchNorm writes to mean, var, which would be lost, in this mode; ...
    """
    if not isinstance(module, nnx.Module):
        raise TypeError(f"module: {module!r}; wanted an nnx module that is made, such as nnx.Linear(2, 3, rngs=rngs)")
    check_method(module, method)
    if not isinstance(rngs, bool):
        raise TypeError(f"rngs: {rngs!r}; wanted True for a forward that takes a key, or False")
    try:
        graph, *states = nnx.split(module, nnx.Param, nnx.RngState, mutable, ...)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"mutable: {mutable!r}; wanted True, False or a filter such as nnx.BatchStat ({error})"
        ) from None
    kind, stated = type(module).__name__, mutable is not False
    params, streams, written, fixed = (nnx.to_pure_dict(state) for state in states)
    if not jax.tree.leaves(params):
        raise ValueError(f"module: {kind} has no nnx.Param, so there is nothing to train")
    traceable("example_inputs", example_inputs)
    if example_inputs:
        check_call(module, method, example_inputs, options)
    known: set[Any] = set()  # inputs of which kinds have been tried

    def takes(inputs: tuple[Any, ...]) -> bool:
        try:
            check_call(module, method, inputs, options)
        except TypeError:
            return False
        return True

    def called(params: Any, rest: tuple[Any, Any, Any], inputs: tuple[Any, ...]) -> tuple[Any, tuple[Any, Any, Any]]:
        """The outputs, and what the call leaves of random streams, of the state and of what is fixed."""
        # Copied by merge, so that nothing traced leaks into the caller's module.
        copy = nnx.merge(graph, params, *rest, copy=True)
        outputs = getattr(copy, method)(*inputs, **options)
        after = nnx.to_pure_dict(nnx.state(copy))
        # What a call adds, such as intermediate values, is no part of the state.
        return outputs, tuple(_picked(after, part) for part in rest)

    def check(inputs: tuple[Any, ...]) -> None:
        """Raise ValueError where a call draws or writes what its forward map does not hand on."""
        shaped, rest = _shapes(inputs), (streams, written, fixed)
        key = (jax.tree.structure(shaped), *((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(shaped)))
        if key in known or (rngs and mutable is True):
            return
        program, results = jax.make_jaxpr(called, return_shape=True)(template, _shapes(rest), shaped)
        _check_changes(kind, program.jaxpr, results, template, rest, rngs)
        known.add(key)

    def run(params: Any, inputs: tuple[Any, ...], key: Array | None, state: Any) -> Any:
        traceable("inputs", inputs)
        inputs = unpacked(inputs, len(example_inputs), takes)
        check(inputs)
        drawn = streams if key is None else _begun_anew(streams, key)
        outputs, (_, after, _) = called(params, (drawn, written if state is None else state, fixed), inputs)
        return (outputs, after) if stated else outputs

    template, forward = _shapes(params), model_with(run, rngs, stated)
    if example_inputs:
        check(example_inputs)
    return (forward, template, written) if stated else (forward, template)


def _shapes(tree: Any) -> Any:
    dtype = lambda leaf: leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), dtype(leaf)), tree)


def _begun_anew(streams: Any, key: Array) -> Any:
    """Random streams whose keys come from one key, and whose counts are zero."""

    def leaf(path: Any, value: Array) -> Array:
        if not jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
            return jnp.zeros_like(value)
        own = jax.random.fold_in(key, zlib.crc32(jax.tree_util.keystr(path).encode()))
        return own if not value.shape else jax.random.split(own, value.shape)

    return jax.tree_util.tree_map_with_path(leaf, streams)


def _check_changes(kind: str, program: Jaxpr, results: Any, params: Any, rest: Any, rngs: bool) -> None:
    """Raise ValueError where a call's outputs are made of random numbers, or what it writes is lost.

    Args:
        kind: name of the module's class.
        program: program of a call: parameters, ``rest`` and inputs to outputs and ``rest``.
        results: shapes of what it returns.
        params: parameters.
        rest: values of the random streams, of the state that is handed on, and of the other variables.
        rngs: flag, True where the streams get a key in every call.
    """
    first = len(jax.tree.leaves(params))
    numbers = [len(jax.tree.leaves(part)) for part in rest]
    outputs = len(jax.tree.leaves(results[0]))
    streams, _, fixed = (jax.tree_util.tree_leaves_with_path(part) for part in rest)
    drawn, lost = [], []
    if not rngs:
        wanted = [True] * outputs + [False] * numbers[0] + [True] * numbers[1] + [False] * numbers[2]
        used = read_for(program, wanted)[first : first + numbers[0]]
        drawn = [_layer(path) for (path, _), is_used in zip(streams, used, strict=True) if is_used]
    begin = numbers[0] + numbers[1]
    for at, ((path, _), number) in enumerate(zip(fixed, handed_on(program)[outputs + begin :], strict=True)):
        if number != first + begin + at:
            lost.append("/".join(_names(path)))
    if not drawn and not lost:
        return
    does, wants = [], []
    if drawn:
        does.append(f"draws random numbers at {', '.join(dict.fromkeys(drawn))}, the same in every call,")
        wants.append("rngs=True for a forward that takes a key")
    if lost:
        does.append(f"writes to {', '.join(lost)}, which would be lost,")
        wants.append("mutable=True for a forward that takes a state and returns it")
    raise ValueError(
        f"module: {kind} {' and '.join(does)} in this mode; wanted module.eval() first, or {' and '.join(wants)}"
    )


def _names(path: Any) -> list[str]:
    return [str(part.key) for part in path]


def _layer(path: Any) -> str:
    """The layer to which a variable of a random stream belongs."""
    names = _names(path)
    return "/".join(names[: names.index("rngs")] if "rngs" in names else names[:-1]) or "the module itself"


def _picked(tree: Any, like: Any) -> Any:
    """Of a nested dictionary the entries that another one has."""
    return {name: _picked(tree[name], part) for name, part in like.items()} if isinstance(like, dict) else tree
