"""A linen module as the ``forward(params, x)`` of one particle."""

from __future__ import annotations

import inspect
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, overload

import jax
import jax.numpy as jnp
from flax import errors
from flax import linen as nn

from eki_jax._checks import traceable
from eki_jax._types import Array
from eki_jax.kernel.once import compiled_once
from eki_jax.solvers.stateful import model_with, unpacked


@overload
def linen_forward(
    module: nn.Module,
    *example_inputs: Any,
    method: str | None = None,
    constants: Mapping[str, Any] | None = None,
    rngs: str | Sequence[str] = (),
    mutable: None = None,
    **options: Any,
) -> tuple[Callable[..., Any], Any]: ...


@overload
def linen_forward(
    module: nn.Module,
    *example_inputs: Any,
    method: str | None = None,
    constants: Mapping[str, Any] | None = None,
    rngs: str | Sequence[str] = (),
    mutable: str | Sequence[str],
    **options: Any,
) -> tuple[Callable[..., Any], Any, Any]: ...


def linen_forward(
    module: nn.Module,
    *example_inputs: Any,
    method: str | None = None,
    constants: Mapping[str, Any] | None = None,
    rngs: str | Sequence[str] = (),
    mutable: str | Sequence[str] | None = None,
    **options: Any,
) -> Any:
    """Turn a linen module into a forward map and the shapes of one particle.

    No parameters are initialized: their shapes come from tracing. An ensemble is drawn from a prior over the template.

    A module that draws random numbers in this mode, such as dropout in training, gets them through ``rngs``; one that
    writes to collections of its own, such as batch statistics, through ``mutable``. Its forward map then takes a key or
    a state, and :func:`eki_jax.stateful` gives it these in every step::

        forward, template, state = linen_forward(module, x, train=True, rngs="dropout", mutable="batch_stats")
        solver = eki_jax.stateful(lambda f: eki_jax.euler(f, loss), forward, key=key, state=state)
        predict, _, _ = linen_forward(module, x, train=False, mutable="batch_stats")

    Args:
        module: linen module whose trainable values live in the collection ``params``.
        *example_inputs: inputs like those of a mini-batch (arrays, pytrees of arrays or ``jax.ShapeDtypeStruct``),
            usually one. Where there are several, the x of a batch is a tuple of as many.
        method: name of the method to call; ``None`` for ``__call__``.
        constants: values of the module's other collections (for example ``batch_stats`` that stay as they are), shared
            by all particles.
        rngs: names of the streams of random numbers that a call draws from, such as ``"dropout"``; none by default. The
            key of a stream is ``fold_in(key, crc32(name))``.
        mutable: names of the collections that a call writes, such as ``"batch_stats"``; None for none.
        **options: keywords of the method that are the same in every call, such as ``train=False``.

    Returns:
        ``(forward, template)``: ``forward(params, x)`` for one particle, and the pytree of
        ``jax.ShapeDtypeStruct`` that ``params`` has to look like. With ``rngs`` it is ``forward(params, x, key=key)``.
        With ``mutable`` it is ``forward(params, x, state=state) -> (outputs, state)``, and the result
        ``(forward, template, state)``, with the collections' first values by their names.

    Raises:
        TypeError: ``module`` is no linen module, ``constants`` no mapping, ``rngs`` or ``mutable`` no names, the inputs
            are no arrays; inputs and ``options`` that the method does not take, or that it lacks.
        ValueError: ``method`` is no method of the module. The module has a collection besides ``params`` that neither
            ``constants`` nor ``mutable`` gives, or both, or none of the name that ``mutable`` gives. A call draws
            random numbers or writes to a collection, and ``rngs`` or ``mutable`` do not say so; the message says what
            to pass.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import linen as nn
        >>> from eki_jax.flax import linen_forward
        >>> forward, template = linen_forward(nn.Dense(3), jnp.ones((5, 2)))
        >>> template["kernel"].shape
        (2, 3)
        >>> norm = nn.BatchNorm(momentum=0.5)
        >>> forward, template, state = linen_forward(
        ...     norm, jnp.ones((5, 2)), mutable="batch_stats", use_running_average=False
        ... )
        >>> params = {"scale": jnp.ones(2), "bias": jnp.zeros(2)}
        >>> outputs, state = forward(params, 4.0 * jnp.ones((5, 2)), state=state)
        >>> state["batch_stats"]["mean"]
        Array([2., 2.], dtype=float32)
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: {module!r}; wanted a flax module, such as nn.Dense(3)")
    if constants is not None and not isinstance(constants, Mapping):
        raise TypeError(f"constants: {constants!r}; wanted a mapping from collections to their values")
    check_method(module, method)
    streams = _names("rngs", rngs, "dropout")
    written = () if mutable is None else _names("mutable", mutable, "batch_stats")
    traceable("example_inputs", example_inputs)
    check_call(module, method, example_inputs, options)
    kind, fixed = type(module).__name__, dict(constants or {})
    for name in sorted(set(written) & {"params", *fixed}):
        other = "constants, which stay as they are" if name in fixed else "the parameters, which the solver moves"
        raise ValueError(f"mutable: {name!r} is in {other}; wanted collections that a call writes")

    def initial(*inputs: Any) -> Any:
        keys = {name: jax.random.key(0) for name in ("params", *streams)}
        return module.init(keys, *inputs, method=method, **options)

    shapes = jax.eval_shape(initial, *example_inputs)
    unknown = sorted(set(shapes) - {"params", *fixed, *written})
    if unknown:
        raise ValueError(
            f"module: {kind} has the collections {unknown} besides 'params'; give their fixed values "
            "through `constants` (a particle is its parameters alone), or name them in `mutable` if a call writes them"
        )

    def run(params: Any, inputs: tuple[Any, ...], key: Array | None, state: Any) -> Any:
        keys = None if key is None else {name: jax.random.fold_in(key, zlib.crc32(name.encode())) for name in streams}
        inputs = unpacked(inputs, len(example_inputs))
        writes: Any = list(written) if mutable is not None else False
        variables = {"params": params, **fixed, **(state or {})}
        try:
            return module.apply(variables, *inputs, method=method, rngs=keys, mutable=writes, **options)
        except errors.InvalidRngError as error:
            raise ValueError(
                f"module: {kind} draws random numbers in this mode ({_said(error)}); wanted their streams' names, such "
                "as rngs='dropout', for a forward that takes a key, or the mode without them, such as "
                "deterministic=True or train=False"
            ) from error
        except errors.ModifyScopeVariableError as error:
            found = re.search(r'collection "(\w+)"', str(error))
            name = found[1] if found else "batch_stats"
            raise ValueError(
                f"module: {kind} writes to the collection {name!r} in this mode, and what is written would be lost; "
                f"wanted mutable={name!r}, for a forward that takes a state and returns it, or the mode that only "
                "reads, such as use_running_average=True or train=False"
            ) from error

    template = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(leaf.dtype)), shapes.get("params", {})
    )
    forward = model_with(run, bool(streams), mutable is not None)
    words: dict[str, Any] = {"key": jax.eval_shape(lambda: jax.random.key(0))} if streams else {}
    if mutable is not None:
        missing = sorted(set(written) - set(shapes))
        if missing:
            raise ValueError(f"mutable: {missing}; wanted some of the collections {sorted(set(shapes) - {'params'})}")
        words["state"] = {name: shapes[name] for name in written}
    jax.eval_shape(lambda params, inputs, words: forward(params, *inputs, **words), template, example_inputs, words)
    if mutable is None:
        return forward, template
    inputs = jax.tree.map(_example, example_inputs)
    # Compiled, so that the parameters, which nobody asks for, are not drawn.
    state = compiled_once(lambda *inputs: {name: initial(*inputs)[name] for name in words["state"]})(*inputs)
    return forward, template, state


def check_method(module: Any, method: str | None) -> None:
    """Raise ValueError unless a flax module has a method of that name."""
    if method is not None and not (isinstance(method, str) and callable(getattr(type(module), method, None))):
        raise ValueError(f"method: {method!r}; wanted the name of a method of {type(module).__name__}")


def check_call(module: Any, method: str | None, inputs: tuple[Any, ...], options: Mapping[str, Any]) -> None:
    """Raise TypeError unless a method takes so many inputs and these keywords, and nothing more."""
    name = method or "__call__"
    try:
        signature = inspect.signature(getattr(type(module), name))
    except ValueError:  # a built-in one that does not say
        return
    try:
        signature.bind(module, *inputs, **options)
    except TypeError as error:
        raise TypeError(
            f"module: {type(module).__name__}.{name}{signature} with {len(inputs)} inputs and the options "
            f"{sorted(options)}: {error}; wanted an example of each input, and the other arguments by name, such as "
            "train=False"
        ) from None


def _names(argument: str, value: Any, example: str) -> tuple[str, ...]:
    """A name or several of them, as a tuple."""
    names = (value,) if isinstance(value, str) else value
    if not isinstance(names, tuple | list) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"{argument}: {value!r}; wanted a name such as {example!r}, or a tuple of names")
    return tuple(dict.fromkeys(names))


def _example(leaf: Any) -> Any:
    """An input with numbers: zeros where its shape alone is known."""
    return jnp.zeros(leaf.shape, leaf.dtype) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf


def _said(error: Exception) -> str:
    """The first sentence of an error of flax."""
    return str(error).split(" (https://")[0].split("\n")[0].rstrip(".")
