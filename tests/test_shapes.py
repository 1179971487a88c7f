"""Shapes in signatures, held against what the examples of the docstrings pass and get."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import eki_jax

beartype = pytest.importorskip("beartype")
jaxtyping = pytest.importorskip("jaxtyping")

STATED = re.compile(r"\w+\[(?:jax\.Array|Array|np\.ndarray), '")


def annotations(thing: Any) -> dict[str, str]:
    """The annotations of a function that state shapes."""
    found = getattr(inspect.unwrap(thing), "__annotations__", {}) if callable(thing) else {}
    return {name: text for name, text in found.items() if isinstance(text, str) and STATED.search(text)}


def functions() -> dict[str, Callable[..., Any]]:
    """All functions of the library that state shapes, by module and name."""
    found = {}
    for info in pkgutil.walk_packages(eki_jax.__path__, "eki_jax."):
        module = importlib.import_module(info.name)
        for name, thing in vars(module).items():
            if getattr(thing, "__module__", "") == info.name and annotations(thing):
                found[f"{info.name}.{name}"] = thing
    return found


def checked(thing: Callable[..., Any]) -> Callable[..., Any]:
    """The function with what it states checked at every call."""
    plain = inspect.unwrap(thing)
    copy = types.FunctionType(plain.__code__, plain.__globals__, plain.__name__, plain.__defaults__, plain.__closure__)
    copy.__kwdefaults__ = plain.__kwdefaults__
    names = {**vars(jaxtyping), **plain.__globals__}
    copy.__annotations__ = {name: eval(text, names) for name, text in annotations(thing).items()}
    return jaxtyping.jaxtyped(copy, typechecker=beartype.beartype)


FUNCTIONS = functions()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_shapes_are_those_of_the_example(name: str) -> None:
    """Every function that states shapes has an example, in which it takes and returns them."""
    thing, calls = FUNCTIONS[name], []
    module = sys.modules[thing.__module__]
    right = checked(thing)
    spy = lambda *args, **kwargs: calls.append(1) or right(*args, **kwargs)
    names = {**vars(module), thing.__name__: spy}
    example = doctest.DocTestParser().get_doctest(inspect.getdoc(thing) or "", names, name, None, None)
    said: list[str] = []
    doctest.DocTestRunner(verbose=False).run(example, out=said.append)
    assert not said, "".join(said)
    assert calls


def test_other_shapes_fail() -> None:
    """A function that returns another shape than it states, or another dtype, or is given one, is found."""

    def shorter(x: jaxtyping.Float[jax.Array, " n"]) -> jaxtyping.Float[jax.Array, " n"]:
        return x[1:]

    def whole(x: jaxtyping.Float[jax.Array, " n"]) -> jaxtyping.Float[jax.Array, " n"]:
        return jnp.round(x).astype(int)

    def same(x: jaxtyping.Float[jax.Array, " n"]) -> jaxtyping.Float[jax.Array, " n"]:
        return x

    for function, x in ((shorter, jnp.ones(3)), (whole, jnp.ones(3)), (same, jnp.ones((3, 1)))):
        with pytest.raises(jaxtyping.TypeCheckError):
            checked(function)(x)
    assert len(checked(same)(jnp.ones(3))) == 3
    assert "eki_jax.flax.discrete.sign" in FUNCTIONS


def test_the_library_does_not_need_jaxtyping() -> None:
    """It is for those who check types: the core imports without it."""
    code = "import sys; sys.modules['jaxtyping'] = None; import eki_jax, eki_jax.kalman, eki_jax.policy"
    subprocess.run([sys.executable, "-c", code], check=True)
