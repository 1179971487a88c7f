"""The step as the paper states it, in PyTorch: D in R^{J x J} and the gradient of all one-hot outputs."""

from __future__ import annotations

from itertools import pairwise

import torch
from timing import measure, resident, serve


def main(task: dict) -> dict:
    """Time one network's step, and a square matrix product in the same process."""
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    size, batch, widths = task["J"], task["batch"], task["widths"]
    square = torch.randn(2048, 2048)
    rate = measure(lambda: square @ square, 7)
    baseline = resident()
    layers = [
        (torch.randn(size, i, o).mul_((2 / (i + o)) ** 0.5), torch.randn(size, o).mul_((2 / (i + o)) ** 0.5))
        for i, o in pairwise(widths)
    ]
    x = torch.randn(batch, widths[0])
    labels = torch.nn.functional.one_hot(torch.randint(widths[-1], (batch,)), widths[-1]).float()

    def step() -> None:
        outputs = forward(layers, x)
        cotangents = (-labels / (outputs + 0.005) / batch).reshape(size, -1)
        outputs = outputs.reshape(size, -1)
        d = (outputs - outputs.mean(0)) @ cotangents.T
        h = float(2.0 / (torch.linalg.norm(d) + 0.5))
        for index, (w, b) in enumerate(layers):
            flat = w.reshape(size, -1)
            layers[index] = (torch.addmm(flat, d.T, flat, alpha=-h).reshape(w.shape), torch.addmm(b, d.T, b, alpha=-h))

    result = measure(step, task["repeats"], baseline)
    again = measure(lambda: square @ square, 7)
    processor = min(rate["processor_median"], again["processor_median"])
    return {
        **result,
        "matmul_rate": 2 * 2048**3 / min(rate["median"], again["median"]),
        "matmul_processor_rate": 2 * 2048**3 / processor,
        "version": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def forward(layers: list, x: torch.Tensor) -> torch.Tensor:
    """Class probabilities of all particles, (J, batch, classes)."""
    (w, b), rest = layers[0], layers[1:]
    hidden = torch.einsum("bi,jio->jbo", x, w).add_(b[:, None])  # one product of stacked weights, the fastest form
    for w, b in rest:
        hidden = torch.baddbmm(b[:, None], hidden.relu_(), w)
    return torch.softmax(hidden, -1)


if __name__ == "__main__":
    serve(main)
