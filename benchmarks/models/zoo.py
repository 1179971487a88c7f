"""The zoo: all models, and what is expected of each."""

from __future__ import annotations

from typing import Any

from benchmarks.models import in_equinox, in_linen, in_nnx, in_plain
from benchmarks.models.entry import Model

_APIS = {"linen": in_linen, "nnx": in_nnx, "equinox": in_equinox, "plain": in_plain}
# What is expected of a model, in every API, where it is not what is expected of the others.
_EXPECTED: dict[str, dict[str, Any]] = {
    "experts, top-1 routing": {"cosine": 0.5},
    "spiking units": {"has_gradient": False},
    "8-bit weights": {"has_gradient": False},
    "bfloat16 parameters": {"rounding": 3e-2, "warns": "bfloat16 keeps 7 bits"},
}
_NAMES = tuple(dict.fromkeys(name for zoo in _APIS.values() for name in zoo.MODELS))
#: All models: each name's line in linen, nnx, equinox and as a plain function, one after the other.
MODELS: tuple[Model, ...] = tuple(
    Model(name, api, zoo.MODELS[name], note=zoo.NOTES.get(name, ""), **_EXPECTED.get(name, {}))
    for name in _NAMES
    for api, zoo in _APIS.items()
    if name in zoo.MODELS
)


def model(name: str, api: str) -> Model:
    """One model of the zoo.

    >>> model("GRU", "nnx").api
    'nnx'
    """
    (found,) = (entry for entry in MODELS if (entry.name, entry.api) == (name, api))
    return found
