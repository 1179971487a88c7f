"""Figures 5 and 6: six methods on four dense networks.

The paper does not say how many epochs it ran; `full` takes the 30 of its convolutional network. MEKI and MEKI(R) on
DNN 3 and DNN 4, which the paper could not run for lack of memory, are among the cells. Some of the paper's differences
are as small as those of seeds, so there are three. Beside them is the natural gradient from noise of each sample's own,
which the paper does not have. `cpu` keeps DNN 1 at the paper's own settings, for fewer epochs, and
the larger networks at a J that two cores can pay for, with one seed.
"""

from __future__ import annotations

from benchmarks.paper.classification import Cell, costly, natural_cell, smoke

TITLE = "MNIST with dense networks: six methods on DNN 1 to 4 (Figures 5 and 6)"
NETWORKS = ("dnn1", "dnn2", "dnn3", "dnn4")
# method -> the paper's final accuracies of the four networks (mean particle), and of the best particle
PAPER: dict[str, tuple[float | None, ...]] = {
    "sgd": (0.9199, 0.9735, 0.9798, 0.9818),
    "msgd": (0.9257, 0.9807, 0.9830, 0.9840),
    "eki": (0.9092, 0.9398, 0.9424, 0.9404),
    "meki": (0.9094, 0.9320, None, None),
    "eki-r": (0.9252, 0.9721, 0.9738, 0.9741),
    "meki-r": (0.9142, 0.9509, None, None),
}
BEST: dict[str, tuple[float | None, ...]] = {
    "eki": (0.9114, 0.9416, 0.9432, 0.9418),
    "meki": (0.9107, 0.9332, None, None),
    "eki-r": (0.9260, 0.9695, 0.9716, 0.9691),
    "meki-r": (0.9162, 0.9511, None, None),
}
# SGD's is the paper's. Momentum's is not said: of 0.01 and 0.1, the one that comes closer to the paper on the network.
RATES = {"sgd": (0.1, 0.1, 0.1, 0.1), "msgd": (0.01, 0.1, 0.1, 0.1)}
NATURAL_RATE = 0.03
# What two cores can pay for: network -> (J, images), and the epochs of DNN 1; the others have two.
_CPU = {"DNN 1": (2000, None), "DNN 2": (300, 20_000), "DNN 3": (100, 10_000)}
_CPU_EPOCHS = {"eki": 6, "meki": 2, "eki-r": 10, "meki-r": 6}


def cells(preset: str) -> list[Cell]:
    """The table's cells in a preset."""
    table = []
    for index, network in enumerate(NETWORKS):
        table += [_cell(network, method) for method in PAPER]
        table.append(natural_cell(f"mnist-{network}", f"DNN {index + 1}", 30, NATURAL_RATE))
    if preset == "smoke":
        chosen = ("eki-r", "meki-r", "msgd", "natural-eki-per-sample")
        runs = lambda cell: cell.label == "DNN 1" and cell.method in chosen
        return smoke(table, runs, particles=8, epochs=2, batch=50, images=100, seeds=2)
    return [_on_two_cores(cell) for cell in table] if preset == "cpu" else table


def _cell(network: str, method: str) -> Cell:
    index = NETWORKS.index(network)
    return Cell(
        f"mnist-{network}",
        method,
        f"DNN {index + 1}",
        epochs=30,
        final=PAPER[method][index],
        rate=RATES[method][index] if method in RATES else 0.0,
        seeds=3,
        best=BEST[method][index] if method in BEST else None,
    )


def _on_two_cores(cell: Cell) -> Cell:
    if not cell.is_ensemble:
        return cell
    if cell.label not in _CPU:
        return costly(cell)
    particles, images = _CPU[cell.label]
    epochs, seeds = (_CPU_EPOCHS[cell.method], 3) if cell.label == "DNN 1" else (2, 1)
    return cell._replace(particles=particles, images=images, epochs=epochs, seeds=seeds)
