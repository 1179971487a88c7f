"""Equinox modules for ensembles: a module as the ``forward(params, x)`` of one particle.

Importing this module needs the extra ``equinox``; nothing else in ``eki_jax`` imports it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, overload

import jax
import jax.numpy as jnp

try:
    import equinox as eqx
except ImportError as error:
    raise ImportError("equinox is not installed: pip install 'eki_jax[equinox]'") from error

from eki_jax._checks import arrays, flag, function, traceable
from eki_jax._types import Array, Params
from eki_jax.ensembles.priors import Gaussian
from eki_jax.solvers.stateful import model_with, unpacked


@overload
def equinox_forward(
    module: Callable[..., Any],
    *example_inputs: Any,
    method: str = "__call__",
    filter: Callable[[Any], bool] = ...,
    per_sample: bool = True,
    keyed: bool = False,
    state: None = None,
    axis_name: str = "batch",
    **options: Any,
) -> tuple[Callable[..., Any], Any]: ...


@overload
def equinox_forward(
    module: Callable[..., Any],
    *example_inputs: Any,
    method: str = "__call__",
    filter: Callable[[Any], bool] = ...,
    per_sample: bool = True,
    keyed: bool = False,
    state: eqx.nn.State,
    axis_name: str = "batch",
    **options: Any,
) -> tuple[Callable[..., Any], Any, Any]: ...


def equinox_forward(
    module: Any,
    *example_inputs: Any,
    method: str = "__call__",
    filter: Callable[[Any], bool] = eqx.is_inexact_array,
    per_sample: bool = True,
    keyed: bool = False,
    state: Any = None,
    axis_name: str = "batch",
    **options: Any,
) -> Any:
    """Turn an equinox module into a forward map and the shapes of one particle.

    The module is split by :func:`equinox.partition` into its floating-point arrays, which are the parameters, and the
    rest, which all particles share. Equinox's layers take one sample each; the forward map takes a batch of them.

    A module in training mode asks for a key (dropout) or a state (batch normalization). By default these are errors:
    :func:`equinox.nn.inference_mode` makes a module that asks for no key. With ``keyed`` and ``state`` the forward map
    takes them, and :func:`eki_jax.stateful` gives it these in every step::

        module, state = eqx.nn.make_with_state(Model)(key)
        forward, template, state = equinox_forward(module, keyed=True, state=state)
        solver = eki_jax.stateful(lambda f: eki_jax.euler(f, loss), forward, key=key, state=state)
        predict, _, _ = equinox_forward(eqx.nn.inference_mode(module), state=state)

    Args:
        module: equinox module that can be called, or any pytree of arrays and layers with a method.
        *example_inputs: inputs like those of a mini-batch (arrays, pytrees of arrays or ``jax.ShapeDtypeStruct``), with
            which the mode is checked at once; without them, when the forward map is called. Where there are several,
            the x of a batch is a tuple of as many; without examples a tuple is unpacked where the module does not take
            a single input.
        method: name of the method to call.
        filter: function of a leaf of the module, True for those that are parameters.
        per_sample: flag; True maps the module over the first axis of its inputs, as equinox's layers want it. False
            for a module that takes whole batches.
        keyed: flag; True for a forward map that takes a key and hands it to the module as ``key``, with
            ``per_sample`` one for each sample, ``split(key, B)``.
        state: state of the module as :func:`equinox.nn.make_with_state` returns it; None for a module without one. The
            module is called as ``module(*inputs, state)``.
        axis_name: name of the axis of samples, with which batch normalization takes its means.
        **options: keywords of the method that are the same in every call.

    Returns:
        ``(forward, template)``: ``forward(params, x)`` for one particle, x of shape (B, ...), where ``params`` is the
        module with None in the place of what is no parameter, ``equinox.filter(module, equinox.is_inexact_array)``, and
        the same of ``jax.ShapeDtypeStruct``. With ``keyed`` it is ``forward(params, x, key=key)``. With ``state`` it is
        ``forward(params, x, state=state) -> (outputs, state)``, and the result ``(forward, template, state)``.

    Raises:
        ImportError: from the import of this module, where equinox is not installed; it names the extra.
        TypeError: ``module`` has no such method; ``filter`` is no function, ``per_sample`` or ``keyed`` no flag,
            ``state`` no state; inputs, ``options``, a key or a state that the method does not take.
        ValueError: The module has no parameters, or the state is another module's. A call asks for a key or for a state
            that it is not given, gets parameters of another module, or takes means over the samples (batch
            normalization) inside of :func:`jax.shard_map`; the message says what to do. It comes from ``forward`` where
            only the call can tell and no example inputs are given.

    Example:
        >>> import equinox as eqx, jax, jax.numpy as jnp
        >>> from eki_jax.equinox import equinox_forward
        >>> module = eqx.nn.MLP(2, 3, width_size=8, depth=1, key=jax.random.key(0))
        >>> forward, template = equinox_forward(module)
        >>> params = eqx.filter(module, eqx.is_inexact_array)
        >>> forward(params, jnp.ones((5, 2))).shape, template.layers[0].weight.shape
        ((5, 3), (8, 2))
    """
    kind = type(module).__name__
    if not callable(getattr(module, method, None)):
        raise TypeError(f"module: {kind}, which has no method {method!r}; wanted a module such as eqx.nn.MLP(...)")
    function("filter", filter, "a function of a leaf such as equinox.is_inexact_array", arguments=1)
    flag("per_sample", per_sample)
    flag("keyed", keyed)
    if state is not None and not isinstance(state, eqx.nn.State):
        raise TypeError(f"state: a {type(state).__name__}; wanted the state that equinox.nn.make_with_state returns")
    params, static = eqx.partition(module, filter)
    if not jax.tree.leaves(params):
        raise ValueError(f"module: {kind} has no arrays that are parameters; wanted a module with something to train")
    if state is None and any(isinstance(leaf, eqx.nn.StateIndex) for leaf in _indices(module)):
        raise ValueError(
            f"module: {kind} has layers that keep a state; wanted state=state, as equinox.nn.make_with_state returns "
            "it, for a forward that takes a state and returns it"
        )
    if state is not None:
        _check_state(module, state)
    traceable("example_inputs", example_inputs)
    signature, stated = _signature(module, method), state is not None
    words = {"key": None} if keyed else {}
    if keyed and not _binds(signature, ("key",)):
        raise TypeError(f"keyed: True, but {kind}.{method}{signature} takes no key; wanted keyed=False")

    def check_call(inputs: tuple[Any, ...]) -> None:
        """Raise unless the method takes these inputs, the options, and what a key and a state make of them."""
        try:
            signature.bind(*inputs, *((None,) if stated else ()), **words, **options)
        except TypeError as error:
            wanted = "keyed=True for a forward that takes a key" if "'key'" in str(error) else "inputs that it takes"
            raise TypeError(
                f"module: {kind}.{method}{signature} with {len(inputs)} inputs{' and a state' if stated else ''} and "
                f"the keywords {sorted({*words, *options})}: {error}; wanted {wanted}"
            ) from None

    def takes(inputs: tuple[Any, ...]) -> bool:
        try:
            check_call(inputs)
        except TypeError:
            return False
        return True

    def run(params: Any, inputs: tuple[Any, ...], key: Array | None, state: Any) -> Any:
        traceable("inputs", inputs)
        inputs = unpacked(inputs, len(example_inputs), takes)
        check_call(inputs)
        if stated:
            _check_state(module, state)
        # A state that was written to cannot be read again; this one is everybody's.
        state = jax.tree.map(lambda leaf: leaf, state)
        call = getattr(_combined(params, static, template), method)

        def one(inputs: tuple[Any, ...], key: Any, state: Any) -> Any:
            given = {} if key is None else {"key": key}
            return call(*inputs, *((state,) if stated else ()), **given, **options)

        try:
            if not per_sample:
                return one(inputs, key, state)
            keys = None if key is None else jax.random.split(key, _samples(inputs))
            out_axes: Any = (0, None) if stated else 0
            return jax.vmap(one, (0, 0, None), out_axes, axis_name=axis_name)(inputs, keys, state)
        except RuntimeError as error:
            if key is not None or "key" not in str(error):
                raise
            raise ValueError(
                f"module: {kind} asks for a key in this mode ({error}); wanted equinox.nn.inference_mode(module), or "
                "keyed=True for a forward that takes a key"
            ) from error
        except AssertionError as error:
            if not (per_sample and jax.sharding.get_abstract_mesh().manual_axes):
                raise
            # An axis of jax.vmap has no name among those of devices (JAX 0.10 to 0.12).
            raise ValueError(
                f"module: {kind} takes means over its samples, the axis {axis_name!r} of jax.vmap, which JAX cannot do "
                "inside of jax.shard_map; wanted shard_solver(..., driver='jit'), or equinox.nn.inference_mode(module)"
            ) from error

    shapes = lambda tree: jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
    template, forward = shapes(params), model_with(run, keyed, stated)
    if example_inputs:
        given: dict[str, Any] = {"key": jax.eval_shape(lambda: jax.random.key(0))} if keyed else {}
        if stated:
            given["state"] = shapes(state)
        jax.eval_shape(lambda params, inputs, given: forward(params, *inputs, **given), template, example_inputs, given)
    return (forward, template, state) if stated else (forward, template)


#: The name under which a low-rank step's forward map is looked for: it takes any.
low_rank_forward = equinox_forward


def xavier(template: Params, *, window: bool = False) -> Gaussian:
    """Glorot's prior, as :func:`eki_jax.xavier`, by the types of equinox's layers.

    That one goes by names and shapes, and takes a stack of linear layers (``eqx.filter_vmap``) for a convolution.

    Args:
        template: template from :func:`equinox_forward`, or the parameters of one particle.
        window: flag; True multiplies both fans of a convolution by the sizes of its window.

    Returns:
        A prior with ``sample(key)`` and ``noise(key)``: zero mean, variance ``2 / (fan_in + fan_out)``. Biases are
        drawn like the weight beside them; scales of normalisation layers start at one, with variance 1/n; a vector
        without a weight beside it has variance 1/n.

    Raises:
        TypeError: a leaf is no array of a floating-point dtype; a ``window`` that is no flag.
        ValueError: no leaves.

    >>> import equinox as eqx, jax
    >>> layer = eqx.nn.Conv2d(16, 8, 3, key=jax.random.key(0))
    >>> prior = xavier(eqx.filter(layer, eqx.is_inexact_array))
    >>> round(prior.factor.weight**2, 4), round(prior.factor.bias**2, 4)
    (0.0833, 0.0833)
    """
    flag("window", window)
    leaves = jax.tree_util.tree_leaves_with_path(arrays("template", template, floating=True, some=True))
    means, factors = [], []
    for path, leaf in leaves:
        owner, name = _at(template, path[:-1]), _name_of(path)
        is_scale = isinstance(owner, _NORMALISATIONS) and name == "weight"
        if not hasattr(leaf, "shape"):
            where = jax.tree_util.keystr(path)
            raise TypeError(f"template{where}: {leaf!r}; wanted an array of a floating-point dtype")
        means.append(jnp.full(leaf.shape, float(is_scale), leaf.dtype))
        factors.append(math.sqrt(2 / _fans(owner, name, leaf.shape, is_scale, window)))
    structure: Any = jax.tree.structure(template)
    return Gaussian(structure.unflatten(means), structure.unflatten(factors))


_NORMALISATIONS = (eqx.nn.LayerNorm, eqx.nn.RMSNorm, eqx.nn.GroupNorm, eqx.nn.BatchNorm)


def _fans(owner: Any, name: str, shape: tuple[int, ...], is_scale: bool, window: bool) -> int:
    """fan-in plus fan-out of the layer that a leaf belongs to."""
    if name.startswith("bias") and not isinstance(owner, _NORMALISATIONS):
        beside = [getattr(owner, other, None) for other in ("weight", "weight_hh")]
        shape = next((weight.shape for weight in beside if weight is not None), shape[-1:])
    if is_scale or len(shape) < 2:
        return 2 * max(1, math.prod(shape))
    places = len(shape) - getattr(owner, "num_spatial_dims", 0)
    size = math.prod(shape[places:]) if window else 1
    return max(1, (shape[places - 2] + shape[places - 1]) * size)


def _at(tree: Any, path: Any) -> Any:
    """The node of a tree at a path."""
    for part in path:
        tree = (
            getattr(tree, part.name) if hasattr(part, "name") else tree[getattr(part, "idx", getattr(part, "key", 0))]
        )
    return tree


def _name_of(path: Any) -> str:
    return str(getattr(path[-1], "name", "")) if path else ""


def _signature(module: Any, method: str) -> inspect.Signature:
    return inspect.signature(getattr(module, method))


def _binds(signature: inspect.Signature, keywords: tuple[str, ...]) -> bool:
    """Whether a method has arguments of these names, or any."""
    try:
        signature.bind_partial(**dict.fromkeys(keywords))
    except TypeError:
        return False
    return True


def _combined(params: Any, static: Any, template: Any) -> Any:
    """The module with these parameters.

    Raises:
        ValueError: parameters of another structure.
    """
    try:
        return eqx.combine(params, static)
    except ValueError as error:
        wanted = "those of the module that the forward map was made of, equinox.filter(module, is_inexact_array)"
        if type(params) is type(static) and _shapes(params) == _shapes(template):
            wanted += (
                ", or their numbers in its structure, jax.tree.unflatten(jax.tree.structure(template), "
                "jax.tree.leaves(params)): modules that keep a state and are not made by make_with_state each have "
                "places of their own for it"
            )
        where = str(error).splitlines()[1:2] or [""]
        place = where[0].strip().removeprefix("tree_map tree") or "the first node"
        raise ValueError(
            f"params: a {type(params).__name__}, whose structure is another one than the module's at {place}; wanted "
            f"{wanted}"
        ) from error


def _shapes(tree: Any) -> list[tuple[int, ...]]:
    return [jnp.shape(leaf) for leaf in jax.tree.leaves(tree)]


def _check_state(module: Any, state: Any) -> None:
    """Raise ValueError for a state without a place that the module writes to."""
    for index in _indices(module):
        if isinstance(index, eqx.nn.StateIndex):
            try:
                state.get(index)
            except KeyError as error:
                raise ValueError(
                    f"state: that of another module, which has no place {error}; wanted that of this "
                    f"{type(module).__name__}, which equinox.nn.make_with_state returns beside it"
                ) from error


def _indices(module: Any) -> list[Any]:
    """The leaves of a module, and the places of its states."""
    return jax.tree.leaves(module, is_leaf=lambda node: isinstance(node, eqx.nn.StateIndex))


def _samples(inputs: tuple[Any, ...]) -> int:
    """The number of samples B."""
    return jax.tree.leaves(inputs)[0].shape[0]
