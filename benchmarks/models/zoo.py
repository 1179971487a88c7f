"""The zoo: all models, and what is expected of each."""

from __future__ import annotations

from benchmarks.models import in_equinox, in_linen, in_nnx, in_plain
from benchmarks.models.entry import Model

_ALL = (*in_linen.MODELS, *in_nnx.MODELS, *in_equinox.MODELS, *in_plain.MODELS)
_NAMES = tuple(dict.fromkeys(model.name for model in _ALL))
#: All models: each name's line in linen, nnx, equinox and as a plain function, one after the other.
MODELS: tuple[Model, ...] = tuple(sorted(_ALL, key=lambda model: _NAMES.index(model.name)))


def model(name: str, api: str) -> Model:
    """One model of the zoo.

    >>> model("GRU", "nnx").api
    'nnx'
    """
    (found,) = (entry for entry in MODELS if (entry.name, entry.api) == (name, api))
    return found
