"""Figure 12: a two-layer tanh network that reads MNIST row by row, with an ensemble that grows."""

from __future__ import annotations

from benchmarks.paper.classification import Cell, natural_cell, smoke

TITLE = "MNIST by rows with a two-layer recurrent network: SGD, EKI(R), natural EKI (Figure 12)"


def cells(preset: str) -> list[Cell]:
    """The table's cells in a preset; momentum SGD, which the paper does not have, is for the natural gradient."""
    sgd = Cell("mnist-rnn", "sgd", "RNN", epochs=30, rate=0.05, first=0.2825, final=0.9391)
    momentum = Cell("mnist-rnn", "msgd", "RNN", epochs=30, rate=0.01, seeds=3)
    eki = Cell(
        "mnist-rnn", "eki-r", "RNN", epochs=30, particles=1000, growth=1000, limit=4000, first=0.4810, final=0.9566
    )
    ours = natural_cell("mnist-rnn", "RNN", 30, 0.03)
    if preset == "smoke":
        small = {"epochs": 2, "batch": 50, "images": 100}
        few = smoke([sgd, momentum, ours], lambda cell: cell is sgd, **small)
        return [*few, eki._replace(particles=4, growth=4, limit=8, **small)]
    if preset == "cpu":
        eki = eki._replace(particles=250, growth=250, limit=1000, epochs=4)
    return [sgd, momentum, eki, ours]
