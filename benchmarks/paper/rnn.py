"""Figure 12: a two-layer tanh network that reads MNIST row by row, with an ensemble that grows."""

from __future__ import annotations

from benchmarks.paper.classification import Cell, natural_cell, smoke

TITLE = "MNIST by rows with a two-layer recurrent network: SGD, EKI(R), natural EKI (Figure 12)"


def cells(preset: str) -> list[Cell]:
    """The table's cells in a preset: layers with states of their own, and composed along one as the paper writes them.

    The paper's numbers stand beside the former, which give them.
    """
    table = []
    for problem, label, sgd, eki in (
        ("mnist-stacked-rnn", "stacked RNN", (0.2825, 0.9391), (0.4810, 0.9566)),
        ("mnist-rnn", "RNN", (None, None), (None, None)),
    ):
        number = dict(zip(("first", "final"), sgd, strict=True))
        table.append(Cell(problem, "sgd", label, epochs=30, rate=0.05, seeds=5 if "stacked" in label else 1, **number))
        number = dict(zip(("first", "final"), eki, strict=True))
        sizes = {"particles": 1000, "growth": 1000, "limit": 4000}
        table.append(Cell(problem, "eki-r", label, epochs=30, **sizes, **number))
        if "stacked" in label:  # momentum SGD, which the paper does not have, is for the natural gradient
            table.append(Cell(problem, "msgd", label, epochs=30, rate=0.01, seeds=3))
            table.append(natural_cell(problem, label, 30, 0.01))
    if preset == "smoke":
        small = {"epochs": 2, "batch": 50, "images": 100}
        runs = lambda cell: "stacked" in cell.label and cell.method in ("sgd", "eki-r")
        growing = {"particles": 4, "growth": 4, "limit": 8}
        return [one._replace(**growing) if one.is_ensemble else one for one in smoke(table, runs, **small)]
    if preset == "cpu":
        growing = {"particles": 250, "growth": 250, "limit": 1000, "epochs": 4}
        return [cell._replace(**growing) if cell.is_ensemble else cell for cell in table]
    return table
