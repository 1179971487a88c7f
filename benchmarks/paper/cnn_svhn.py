"""Figure 11, last three columns: CNN-1, 2, 3 on SVHN, with an ensemble that grows.

EKI(R) starts with 200 particles and grows by 200 an epoch to 5,000; the paper could take CNN-3 to 2,800 only. CIFAR-10,
whose images have SVHN's size, exercises the same networks under its own name, without numbers of the paper beside it.
"""

from __future__ import annotations

from benchmarks.paper.classification import Cell, costly, smoke

TITLE = "CNN-1, 2, 3 on colour images: momentum SGD and EKI(R) with a growing ensemble (Figure 11)"
# (network, method) -> the paper's accuracies after the first and the last epoch
PAPER = {
    ("cnn1", "sgd"): (None, None),
    ("cnn1", "msgd"): (0.3263, 0.9150),
    ("cnn1", "eki-r"): (0.3100, 0.9249),
    ("cnn2", "sgd"): (None, None),
    ("cnn2", "msgd"): (0.2734, 0.9324),
    ("cnn2", "eki-r"): (0.2874, 0.9353),
    ("cnn3", "sgd"): (None, None),
    ("cnn3", "msgd"): (0.1959, 0.9414),
    ("cnn3", "eki-r"): (0.2668, 0.9299),
}
LABELS = {"cnn1": "CNN-1", "cnn2": "CNN-2", "cnn3": "CNN-3"}


def cells(preset: str) -> list[Cell]:
    """The table's cells in a preset."""
    table = [_cell(data, network, method) for data in ("svhn", "cifar10") for network, method in PAPER]
    if preset == "smoke":
        runs = lambda cell: cell.problem == "cifar10-cnn1" and cell.method == "eki-r"
        return smoke(table, runs, particles=2, growth=2, limit=4, epochs=2, batch=4, images=8)
    return table if preset == "full" else [_on_two_cores(cell) for cell in table]


def _cell(data: str, network: str, method: str) -> Cell:
    first, final = PAPER[network, method] if data == "svhn" else (None, None)
    label = f"{LABELS[network]} on {data.upper().replace('CIFAR10', 'CIFAR-10')}"
    return Cell(
        f"{data}-{network}",
        method,
        label,
        epochs=40,
        batch=500,
        particles=200,
        growth=200,
        limit=5000,
        rate=0.01,
        first=first,
        final=final,
    )


def _on_two_cores(cell: Cell) -> Cell:
    if cell.is_ensemble:
        return costly(cell)
    # An epoch of CIFAR-10's 20,000 images takes 20, 40 and 150 seconds.
    epochs = {"cnn1": 10, "cnn2": 5, "cnn3": 3}[cell.problem.split("-")[1]]
    return cell._replace(epochs=epochs, images=10_000 if cell.problem.startswith("svhn") else None)
