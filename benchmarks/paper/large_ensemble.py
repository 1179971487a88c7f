"""Figure 9: four EKI methods on DNN 2 with 6,000 particles, beside the gradient methods of Figure 5."""

from __future__ import annotations

from benchmarks.paper import dense
from benchmarks.paper.classification import Cell, smoke

TITLE = "MNIST, DNN 2 with a large ensemble (Figure 9)"
# method -> the paper's accuracies after the first and the last epoch
PAPER = {
    "eki": (0.8661, 0.9611),
    "meki": (0.9447, 0.9471),
    "eki-r": (0.8652, 0.9745),
    "meki-r": (0.9373, 0.9696),
}


def cells(preset: str) -> list[Cell]:
    """The table's cells in a preset."""
    baselines = [cell for cell in dense.cells(preset) if cell.label == "DNN 2" and not cell.is_ensemble]
    table = [
        Cell("mnist-dnn2", method, "DNN 2", epochs=30, particles=6000, first=first, final=final)
        for method, (first, final) in PAPER.items()
    ]
    if preset == "smoke":
        return baselines + smoke(table, lambda cell: cell.method == "eki", particles=8, epochs=2, batch=50, images=100)
    if preset == "cpu":
        return baselines + [cell._replace(particles=500, epochs=2, images=10_000) for cell in table]
    return baselines + table
