"""What the alpha-beta model says of 1 to 1,024 GPUs, for the paper's networks."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax

from benchmarks.scaling.measured import forward_flops
from eki_jax import sharding
from eki_jax.flax import cnn3, dnn4, linen_forward

#: In the place of a layout: the natural gradient, whose devices share the samples; and how many these are in a batch.
NATURAL, SAMPLES = "natural", 1000


class Network(NamedTuple):
    """What the model needs to know of a network and its training.

    Attributes:
        parameters: P.
        outputs: M, the samples of a batch.
        classes: outputs of a sample, for the natural gradient.
        forward_flops: operations of one particle's forward pass.
        paper_particles: J in the paper.
    """

    parameters: int
    outputs: int
    classes: int
    forward_flops: float
    paper_particles: int


class Row(NamedTuple):
    """A prediction for one number of devices.

    Attributes:
        network: its name.
        scaling: ``"strong"`` at the paper's J or ``"weak"`` with J per device fixed.
        communication: the layout, or :data:`NATURAL`.
        devices: n.
        particles: J on all devices together, rounded up to a multiple of n; on each of them for the natural gradient.
        compute: seconds of arithmetic a step.
        communication_seconds: seconds of communication a step.
        sent: bytes that leave a device.
        seconds: a step whose communication waits for its arithmetic.
        efficiency: particles a second and device, over those of one device.
        efficiency_overlapped: the same, if communication ran wholly beside the kernel's products.
        wins: whether it takes the least time there, of those that a step takes by itself in float32.
    """

    network: str
    scaling: str
    communication: str
    devices: int
    particles: int
    compute: float
    communication_seconds: float
    sent: float
    seconds: float
    efficiency: float
    efficiency_overlapped: float
    wins: bool


def networks() -> dict[str, Network]:
    """DNN 4 on MNIST and CNN-3 on SVHN with the paper's batches and ensembles."""
    return {
        "DNN 4": _network(dnn4(), (600, 28, 28, 1), 2000),
        "CNN-3": _network(cnn3(), (500, 32, 32, 3), 2800),
    }


def predict(
    name: str, network: Network, scaling: str, particles: int, devices: int, machine: sharding.Machine, messages: int
) -> list[Row]:
    """All layouts for one number of devices; ``particles`` is J, or J per device for weak scaling."""
    total = particles * devices if scaling == "weak" else math.ceil(particles / devices) * devices
    settings: dict[str, Any] = {"machine": machine, "forward_flops": network.forward_flops, "messages": messages}
    sizes = network.outputs, network.parameters
    of_one = [sharding.step_cost(one, particles, *sizes, 1, **settings) for one in ("all_reduce", "gather")]
    alone = min(of_one, key=lambda cost: cost.seconds)
    costs = {one: sharding.step_cost(one, total, *sizes, devices, **settings) for one in sharding.COMMUNICATIONS}
    exact = [layout for layout in costs if layout != "bf16_sums"]
    best = min(exact, key=lambda layout: costs[layout].seconds)  # the first of equals

    def row(communication: str, cost: sharding.Cost) -> Row:
        ideal = alone.seconds * total / particles / devices
        return Row(
            name,
            scaling,
            communication,
            devices,
            total,
            cost.compute,
            cost.communication,
            cost.sent,
            cost.seconds,
            ideal / cost.seconds,
            ideal / cost.overlapped,
            communication == best,
        )

    return [row(communication, cost) for communication, cost in costs.items()]


def predict_natural(
    name: str, network: Network, scaling: str, particles: int, devices: int, machine: sharding.Machine
) -> Row:
    """The natural gradient with J particles on every device: weak scaling has a batch a device, strong one in all."""

    def cost(n: int) -> sharding.Cost:
        samples = SAMPLES * (n if scaling == "weak" else 1)
        flops = samples / network.outputs * network.forward_flops
        sizes = particles, samples, network.classes, network.parameters, n
        return sharding.natural_step_cost(*sizes, machine=machine, forward_flops=flops)

    found = cost(devices)
    ideal = cost(1).seconds / (1 if scaling == "weak" else devices)
    times = found.compute, found.communication, found.sent, found.seconds
    efficiency = ideal / found.seconds
    return Row(name, scaling, NATURAL, devices, particles, *times, efficiency, efficiency, False)


def winners(rows: list[Row]) -> dict[str, Any]:
    """Which layout wins for which numbers of devices, for each network and scaling."""
    found: dict[str, Any] = {}
    for row in rows:
        if row.wins and row.devices > 1:
            found.setdefault(f"{row.network}, {row.scaling}", {}).setdefault(row.communication, []).append(row.devices)
    return found


def _network(module: Any, shape: tuple[int, ...], particles: int) -> Network:
    x = jax.ShapeDtypeStruct(shape, "float32")
    forward, template = linen_forward(module, x)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(template))
    classes = jax.eval_shape(forward, template, x).shape[-1]
    return Network(parameters, shape[0], classes, forward_flops(forward, template, x), particles)
