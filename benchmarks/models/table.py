"""The table of the zoo, from the numbers of a run."""

from __future__ import annotations

from typing import Any

from benchmarks.harness.tables import markdown
from benchmarks.models import measures
from benchmarks.models.entry import Model
from benchmarks.models.zoo import MODELS

HEADER = [
    "model",
    "API",
    "parameters",
    "low rank, plain, formed",
    "local",
    "Euler",
    "natural",
    "refused steps",
    "low rank = explicit",
    "cosine, localized",
    "in the span",
    "sharded = single",
]


def cell_name(model: Model) -> str:
    """The name of a model's cell in the file."""
    return f"{model.name} ({model.api})"


def troubles(result: dict[str, Any]) -> list[str]:
    """What is wrong in a run, cell by cell."""
    found = []
    for model in _measured(result):
        columns = result["cells"][cell_name(model)]["found"]
        texts = {column: measures.trouble(model, column, columns[column]) for column in measures.COLUMNS}
        found += [f"{cell_name(model)}, {column}: {text}" for column, text in texts.items() if text]
    return found


def table(result: dict[str, Any]) -> str:
    """All models that were measured, a line each; what is wrong is called so."""
    rows = [_row(model, result["cells"][cell_name(model)]["found"]) for model in _measured(result)]
    return markdown(HEADER, rows)


def _measured(result: dict[str, Any]) -> list[Model]:
    return [model for model in MODELS if cell_name(model) in result["cells"]]


def _row(model: Model, found: dict[str, Any]) -> list[str]:
    def text(column: str, shown: Any) -> str:
        cell = found[column]
        if measures.trouble(model, column, cell):
            return "**wrong**"
        if "error" in cell:
            return "refused"
        return "–" if "none" in cell else shown(cell)

    name = f"{model.name} ({model.note})" if model.note else model.name
    return [
        name,
        model.api,
        str(found["parameters"]),
        text("leaves", lambda cell: f"{cell['low rank']}, {cell['plain']}, {cell['formed']}"),
        text("leaves", lambda cell: f"{cell['local']} of {cell['leaves']}"),
        text("euler", lambda cell: f"{cell['ratio']:.2g}"),
        text("natural", lambda cell: f"{cell['ratio']:.2g}"),
        text("natural", lambda cell: f"{cell['refused']} of {cell['steps']}"),
        text("equal", lambda cell: f"{max(cell['step'], cell['outputs']):.0e}"),
        text("cosine", lambda cell: f"{cell['localized']:.3f}"),
        text("cosine", lambda cell: f"{cell['span']:.2f}"),
        text("sharded", lambda cell: f"{cell['step']:.0e}"),
    ]
