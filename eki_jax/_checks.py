"""One checker for each kind of argument; each names the argument, what it was and what was wanted.

What is known is checked while tracing. A traced number passes here, and its range is asked again in the compiled
program, by :meth:`Within.holds`, where a step that it spoils is refused.
"""

from __future__ import annotations

import inspect
import math
import operator
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from eki_jax._types import Array, Schedule


class Within(NamedTuple):
    """A range of numbers.

    Attributes:
        words: words for it in an error.
        low: least number.
        high: largest number.
        low_counts: flag, True where ``low`` itself is in the range.
        high_counts: flag, True where ``high`` itself is in the range.

    >>> bool(SHARE.holds(0.0)), bool(SHARE.holds(1.0)), bool(POSITIVE.holds(float("nan")))
    (True, False, False)
    """

    words: str
    low: float = -math.inf
    high: float = math.inf
    low_counts: bool = False
    high_counts: bool = False

    def holds(self, value: Any) -> Any:
        """Whether a number, known or traced, is in the range; NaN never is."""
        above = value >= self.low if self.low_counts else value > self.low
        return above & (value <= self.high if self.high_counts else value < self.high)


FINITE = Within("a finite number")
POSITIVE = Within("a finite number > 0", low=0)
NOT_NEGATIVE = Within("a finite number >= 0", low=0, low_counts=True)
ABOVE_ONE = Within("a finite number > 1", low=1)
AT_LEAST_ONE = Within("a finite number >= 1", low=1, low_counts=True)
SHARE = Within("a number in [0, 1)", low=0, high=1, low_counts=True)
FROM_0_TO_1 = Within("a number in [0, 1]", low=0, high=1, low_counts=True, high_counts=True)


def is_known(value: Any) -> bool:
    """Whether the numbers of an array are known, which they are not while a function is traced."""
    return not isinstance(value, jax.core.Tracer)


def real(name: str, value: Any, within: Within = FINITE, *, or_: str = "") -> Any:
    """``value``, a real number of Python, NumPy or JAX; traced ones are not asked for their range.

    Args:
        name: name of the argument.
        value: number.
        within: range of it.
        or_: words for what else is wanted, at the end of an error.

    Raises:
        TypeError: no real number.
        ValueError: an array, or a number out of the range.

    >>> real("damping", np.float32(-1), POSITIVE, or_="a schedule of the step count")
    Traceback (most recent call last):
        ...
    ValueError: damping: -1.0; wanted a finite number > 0, or a schedule of the step count
    """
    wanted = f"wanted {within.words}{', or ' if or_ else ''}{or_}"
    if isinstance(value, bool | str | bytes) or not _is_real(value):
        raise TypeError(f"{name}: {_shown(value)}; {wanted}")
    if np.ndim(value):
        raise ValueError(f"{name}: of shape {np.shape(value)}; {wanted}")
    if is_known(value) and not bool(within.holds(np.asarray(value, np.float64))):
        raise ValueError(f"{name}: {value}; {wanted}")
    return value


def schedule(name: str, value: Schedule, within: Within) -> Callable[[Any], Any]:
    """A number, or a function of the step count, as a function whose results are checked.

    >>> schedule("sigma", 0.1, POSITIVE)(jnp.array(7))
    0.1
    >>> schedule("sigma", lambda count: -1.0, POSITIVE)(jnp.array(7))
    Traceback (most recent call last):
        ...
    ValueError: sigma: -1.0; wanted a finite number > 0, or a schedule of the step count
    """
    kind = "a schedule of the step count"
    if callable(value):
        function(name, value, f"{within.words}, or {kind}", arguments=1)
        return lambda count: real(name, value(count), within, or_=kind)
    number = real(name, value, within, or_=kind)
    return lambda count: number


def whole(name: str, value: Any, least: int = 1, *, or_: str = "") -> int:
    """``value``, a known whole number of at least ``least``, as an int.

    Raises:
        TypeError: no whole number, or a traced one.
        ValueError: one that is too small.

    >>> whole("particles", np.int64(3)), whole("chunk_size", 2.5)
    Traceback (most recent call last):
        ...
    TypeError: chunk_size: 2.5; wanted a whole number, at least 1
    """
    wanted = f"wanted a whole number, at least {least}{', or ' if or_ else ''}{or_}"
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: {_shown(value)}; {wanted}") from None
    if number < least:
        raise ValueError(f"{name}: {number}; {wanted}")
    return number


def random_key(name: str, value: Any) -> Array:
    """``value``, one JAX random key: of :func:`jax.random.key`, or the raw numbers of one.

    Raises:
        TypeError: anything else.

    >>> random_key("key", 0)
    Traceback (most recent call last):
        ...
    TypeError: key: 0; wanted one JAX random key, such as jax.random.key(0)
    """
    dtype = getattr(value, "dtype", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key) and np.ndim(value) == 0
    raw = dtype == jnp.uint32 and np.ndim(value) == 1
    if not (typed or raw):
        raise TypeError(f"{name}: {_shown(value)}; wanted one JAX random key, such as jax.random.key(0)")
    return value


def function(
    name: str, value: Any, kind: str = "a function", *, arguments: int | None = None, keywords: Collection[str] = ()
) -> Any:
    """``value``, which can be called, with so many arguments where their number is given, and with these keywords.

    Raises:
        TypeError: it cannot.

    >>> function("loss", 3)
    Traceback (most recent call last):
        ...
    TypeError: loss: 3; wanted a function
    """
    if not callable(value):
        raise TypeError(f"{name}: {_shown(value)}; wanted {kind}")
    if arguments is not None:
        try:
            inspect.signature(value).bind(*[None] * arguments, **dict.fromkeys(keywords))
        except TypeError:
            called = f" (is {getattr(value, '__name__', 'it')}() meant?)"
            these = f" and {', '.join(f'{word}=' for word in keywords)}" if keywords else ""
            asked = [word for word in ("key", "state") if _asks_for(value, word)]
            if keywords:
                called = ""
            elif asked:
                called = f" (it asks for {' and '.join(f'{word}=' for word in asked)}, which eki_jax.stateful gives)"
            raise TypeError(
                f"{name}: {_shown(value)}, which does not take {arguments} arguments{these}; wanted {kind}{called}"
            ) from None
        except ValueError:  # a built-in function that does not say
            pass
    return value


def offers(name: str, value: Any, attributes: Collection[str], kind: str) -> Any:
    """``value``, an object with functions of these names; a class, which nobody has called yet, is none.

    Args:
        name: name of the argument.
        value: object.
        attributes: names of the functions.
        kind: words for what is wanted.

    Raises:
        TypeError: one of them is missing.

    >>> offers("prior", 3, ("sample", "noise"), "a prior")
    Traceback (most recent call last):
        ...
    TypeError: prior: 3, which has no sample and no noise; wanted a prior
    """
    missing = [one for one in attributes if isinstance(value, type) or not callable(getattr(value, one, None))]
    if missing:
        raise TypeError(f"{name}: {_shown(value)}, which has no {' and no '.join(missing)}; wanted {kind}")
    return value


def a_prior(name: str, value: Any, attributes: Collection[str] = ("sample", "noise")) -> Any:
    """``value``, a distribution of one particle's parameters.

    Raises:
        TypeError: anything else.

    >>> a_prior("prior", "normal")
    Traceback (most recent call last):
        ...
    TypeError: prior: 'normal', which has no sample and no noise; wanted a prior, such as eki_jax.gaussian(mean, scale)
    """
    return offers(name, value, attributes, "a prior, such as eki_jax.gaussian(mean, scale)")


def a_solver(name: str, value: Any) -> Any:
    """``value``, a solver.

    Raises:
        TypeError: anything else.

    >>> a_solver("solver", None)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    TypeError: solver: None, which has no init and ...; wanted a solver, such as eki_jax.euler(forward, loss)
    """
    names = ("init", "step", "update", "ensemble", "estimate", "with_ensemble")
    return offers(name, value, names, "a solver, such as eki_jax.euler(forward, loss)")


def one_of(name: str, value: Any, choices: Collection[Any]) -> Any:
    """``value``, one of some strings, whole numbers or None.

    Raises:
        ValueError: another.

    >>> one_of("space", "both", ("output", "ensemble", None))
    Traceback (most recent call last):
        ...
    ValueError: space: 'both'; wanted 'output', 'ensemble' or None
    """
    plain = isinstance(value, str | int) and not isinstance(value, bool)
    if not (value is None and None in choices) and not (plain and value in choices):
        *some, last = map(repr, choices)
        raise ValueError(f"{name}: {_shown(value)}; wanted {', '.join(some)} or {last}")
    return value


def pair(name: str, value: Any, parts: str = "(x, targets)") -> tuple[Any, Any]:
    """``value``, a tuple or list of two.

    Raises:
        TypeError: anything else.

    >>> pair("batch", 3)
    Traceback (most recent call last):
        ...
    TypeError: batch: 3; wanted a pair (x, targets)
    """
    if not (isinstance(value, tuple | list) and len(value) == 2):
        raise TypeError(f"{name}: {_shown(value)}; wanted a pair {parts}")
    return value[0], value[1]


def arrays(name: str, tree: Any, *, floating: bool = False, some: bool = False) -> Any:
    """``tree``, whose leaves are real numbers or arrays of them.

    Args:
        name: name of the argument.
        tree: pytree of arrays.
        floating: flag; True wants floating-point ones.
        some: flag; True wants one of them at least.

    Raises:
        TypeError: a leaf of another kind or dtype.
        ValueError: no leaf at all where ``some`` is True.

    >>> arrays("outputs", {"a": np.zeros(2, complex)})
    Traceback (most recent call last):
        ...
    TypeError: outputs['a']: dtype complex128; wanted an array of real numbers
    """
    if some and not jax.tree.leaves(tree):
        raise ValueError(f"{name}: {_shown(tree)}, which has no arrays; wanted one at least")
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        where, wanted = name + jax.tree_util.keystr(path), "an array of real numbers"
        if isinstance(leaf, str | bytes) or (dtype := _dtype(leaf)) is None:
            raise TypeError(f"{where}: {_shown(leaf)}; wanted {wanted}")
        if jnp.issubdtype(dtype, jnp.complexfloating) or not (
            jnp.issubdtype(dtype, jnp.number) or jnp.issubdtype(dtype, jnp.bool_)
        ):
            raise TypeError(f"{where}: dtype {dtype}; wanted {wanted}")
        if floating and not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(f"{where}: dtype {dtype}; wanted a floating-point dtype")
    return tree


def array(name: str, value: Any) -> Any:
    """``value``, one array of real numbers, or what NumPy makes one of; no pytree.

    Raises:
        TypeError: anything else.

    >>> array("weights", {"a": 1.0})
    Traceback (most recent call last):
        ...
    TypeError: weights: {'a': 1.0}; wanted an array of real numbers
    """
    if value is None or isinstance(value, dict):
        raise TypeError(f"{name}: {_shown(value)}; wanted an array of real numbers")
    return arrays(name, value, some=True)


def quantities(name: str, value: Any) -> Any:
    """``value``, one array of real numbers as :func:`array` has it, but no flags, which measure nothing.

    Raises:
        TypeError: anything else.

    >>> quantities("sd", True)
    Traceback (most recent call last):
        ...
    TypeError: sd: True; wanted real numbers, no flags
    """
    array(name, value)
    if any(jnp.issubdtype(jnp.result_type(leaf), jnp.bool_) for leaf in jax.tree.leaves(value)):
        raise TypeError(f"{name}: {_shown(value)}; wanted real numbers, no flags")
    return value


def path(name: str, value: Any) -> Path:
    """``value``, the name of a file or folder, as a :class:`pathlib.Path`.

    Raises:
        TypeError: anything else.

    >>> path("directory", 3)
    Traceback (most recent call last):
        ...
    TypeError: directory: 3; wanted a path
    """
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"{name}: {_shown(value)}; wanted a path")
    return Path(value)


def flag(name: str, value: Any, *, or_: str = "") -> bool:
    """``value``, True or False.

    Raises:
        TypeError: anything else.

    >>> flag("restart", 1)
    Traceback (most recent call last):
        ...
    TypeError: restart: 1; wanted True or False
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name}: {_shown(value)}; wanted True or False{', or ' if or_ else ''}{or_}")
    return value


def sizes(name: str, value: Any) -> tuple[int, ...]:
    """``value``, one or more whole numbers of at least 1, as a tuple of ints.

    Raises:
        TypeError: no sequence, or one of other things.
        ValueError: none at all, or numbers below 1.

    >>> sizes("widths", (100, 0))
    Traceback (most recent call last):
        ...
    ValueError: widths[1]: 0; wanted a whole number, at least 1
    """
    if not isinstance(value, tuple | list):
        raise TypeError(f"{name}: {_shown(value)}; wanted a tuple of whole numbers")
    if not value:
        raise ValueError(f"{name}: {_shown(value)}; wanted one whole number at least")
    return tuple(whole(f"{name}[{index}]", number) for index, number in enumerate(value))


def traceable(name: str, tree: Any) -> Any:
    """``tree``, whose leaves are numbers, arrays or keys: what a compiled function can take.

    Raises:
        TypeError: a leaf of another kind, such as a string.

    >>> traceable("x", {"a": "text"})
    Traceback (most recent call last):
        ...
    TypeError: x['a']: 'text'; wanted arrays
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        dtype = _dtype(leaf)
        if dtype is None or (isinstance(leaf, np.ndarray) and leaf.dtype.kind in "OUSM"):
            raise TypeError(f"{name}{jax.tree_util.keystr(path)}: {_shown(leaf)}; wanted arrays")
    return tree


def _asks_for(value: Any, keyword: str) -> bool:
    """Whether a function wants an argument by this name."""
    argument = inspect.signature(value).parameters.get(keyword)
    return argument is not None and argument.kind is argument.KEYWORD_ONLY and argument.default is argument.empty


def _is_real(value: Any) -> bool:
    dtype = _dtype(value)
    return dtype is not None and (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer))


def _dtype(value: Any) -> Any:
    if isinstance(value, bool | int | float | complex):
        return np.result_type(value)
    return getattr(value, "dtype", None)


def _shown(value: Any) -> str:
    """A short word for a value in an error."""
    if hasattr(value, "shape") and hasattr(value, "dtype") and np.ndim(value):
        return f"an array of shape {np.shape(value)} and dtype {value.dtype}"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
