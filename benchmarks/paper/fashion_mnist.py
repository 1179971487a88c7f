"""The slides' figure of Fashion-MNIST: the methods per epoch. The slides name neither the network nor any number."""

from __future__ import annotations

from benchmarks.paper.classification import Cell, natural_cell, smoke

TITLE = "Fashion-MNIST with DNN 2: SGD, momentum SGD and the EKI methods (slides)"
METHODS = ("sgd", "msgd", "eki", "meki", "eki-r", "meki-r")


def cells(preset: str) -> list[Cell]:
    """The figure's curves in a preset."""
    table = [Cell("fashion-dnn2", method, "DNN 2 on Fashion-MNIST", epochs=20) for method in METHODS]
    table.append(natural_cell("fashion-dnn2", "DNN 2 on Fashion-MNIST", 20, 0.03))
    if preset == "smoke":
        return smoke(table, lambda cell: cell.method == "eki-r", particles=8, epochs=2, batch=50, images=100)
    if preset == "cpu":
        return [cell._replace(particles=300, epochs=3, images=20_000) if cell.is_ensemble else cell for cell in table]
    return table
