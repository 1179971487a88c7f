r"""What a step over n devices costs: a static model of its arithmetic and its communication.

An alpha-beta model: a message of ``b`` bytes takes ``alpha + b / beta`` seconds. Devices share a host, whose links are
fast; hosts are joined by slower ones, one for each device. The layouts are those of :mod:`eki_jax.kernel.layouts`.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, get_args

from eki_jax._checks import NOT_NEGATIVE, flag, one_of, real, whole

#: Name of a layout in which devices share their particles.
Communication = Literal["all_reduce", "gather", "reduce_scatter", "all_to_all", "ring", "bf16_sums"]
#: All layouts; where two cost the same, the first of them is chosen.
COMMUNICATIONS: tuple[Communication, ...] = get_args(Communication)
#: The one that rounds what it sends, and that only products in bfloat16 choose by themselves.
ROUNDED: Communication = "bf16_sums"


class Link(NamedTuple):
    """A way between devices.

    Attributes:
        bandwidth: rate beta in bytes a second into one device, the same being sent out of it at once.
        latency: time alpha in seconds until the first byte.
    """

    bandwidth: float
    latency: float


class Machine(NamedTuple):
    """Rates of the devices and of their links.

    Attributes:
        flops: floating-point operations a second of one device in matrix products.
        local: link between devices of one host.
        remote: link of one device to those of other hosts.
        devices_per_host: number of devices that share the local link.
    """

    flops: float
    local: Link
    remote: Link
    devices_per_host: int = 8


#: Hosts of eight Hopper devices from the vendors' data, not measured: half a data sheet's dense TF32 rate, 495 TFLOP/s,
#: and 80 % of the link rates, NVLink 4 at 450 GB/s a direction and InfiniBand NDR at 50 GB/s for each device.
HOPPER = Machine(flops=250e12, local=Link(360e9, 5e-6), remote=Link(40e9, 10e-6), devices_per_host=8)


class Cost(NamedTuple):
    """What one device does in one step.

    Attributes:
        flops: operations of the kernel's matrix products and of the forward passes.
        sent: bytes that leave the device.
        compute: seconds of arithmetic.
        communication: seconds of communication.
        overlapped: seconds of a step whose communication runs wholly beside the kernel's products.
        seconds: seconds of a step whose communication waits for them, but for the ring, which is made to overlap.
    """

    flops: float
    sent: float
    compute: float
    communication: float
    overlapped: float
    seconds: float


def step_cost(
    communication: Communication,
    ensemble_size: int,
    outputs: int,
    parameters: int,
    devices: int,
    *,
    machine: Machine = HOPPER,
    forward_flops: float = 0.0,
    itemsize: int = 4,
    messages: int = 1,
) -> Cost:
    r"""The cost of one step on one of ``devices`` devices.

    With j = J / n particles a device, M outputs and P parameters (numbers sent by a device, then operations):

    ================  =============================  ==========================
    all_reduce        2 (n-1)/n M P                  4 j M P
    reduce_scatter    2 (n-1)/n M P, half as stored  4 j M P
    bf16_sums         2 (n-1)/n M P, of 2 bytes      4 j M P
    all_to_all        2 (n-1)/n j P                  the fewer of both
    gather, ring      (n-1) j P                      2 j J (M + P)
    ================  =============================  ==========================

    The last three also gather the outputs of all particles, and ``all_to_all`` the cotangents or their J x J products.
    Between hosts ``bf16_sums`` sends more than an all-reduce does: each device exchanges its share with every other.

    Args:
        communication: layout of the step.
        ensemble_size: number of particles J, on all devices together.
        outputs: number of outputs M.
        parameters: number of parameters P.
        devices: number of devices n.
        machine: rates of devices and links.
        forward_flops: operations of one particle's forward pass.
        itemsize: bytes of one parameter as the ensemble stores it; sums are of 4 bytes at least.
        messages: blocks into which the communication is cut, each with its latency.

    Returns:
        A :class:`Cost`.

    Raises:
        TypeError: sizes that are not whole numbers; ``machine`` is none.
        ValueError: an unknown layout, or numbers out of range.

    >>> cost = step_cost("all_reduce", 16_000, 600, 573_910, 8)
    >>> round(cost.sent / 1e9, 2)  # GB; the same for any J
    2.41
    """
    one_of("communication", communication, COMMUNICATIONS)
    _check_sizes(ensemble_size, outputs, parameters, devices, machine, itemsize)
    real("forward_flops", forward_flops, NOT_NEGATIVE)
    whole("messages", messages)
    local = ensemble_size / devices
    wide = max(4, itemsize)
    through_outputs = 4 * local * outputs * parameters
    through_particles = 2 * local * ensemble_size * (outputs + parameters)
    gathered = (devices - 1) * local * outputs * wide  # the others' outputs
    if communication in ("all_reduce", "reduce_scatter"):
        half = _share(devices) * outputs * parameters
        back = wide if communication == "all_reduce" else itemsize
        flops, sent = through_outputs, half * (wide + back)
        seconds = _reduction(half * wide, half * back, devices, machine)
    elif communication == ROUNDED:
        half = _share(devices) * outputs * parameters * 2
        flops, sent = through_outputs, 2 * half
        seconds = _exchange(half, devices, machine) + _gathering(half, devices, machine)
    elif communication == "all_to_all":
        both_ways = 2 * _share(devices) * local * parameters * wide
        by_particles = 2 * outputs > ensemble_size
        gathered += (devices - 1) * local * (ensemble_size if by_particles else outputs) * wide
        flops, sent = through_particles if by_particles else through_outputs, both_ways + gathered
        seconds = _exchange(both_ways, devices, machine) + _gathering(gathered, devices, machine)
    else:
        flops, sent = through_particles, (devices - 1) * local * parameters * wide + gathered
        seconds = (_passing if communication == "ring" else _gathering)(sent, devices, machine)
    seconds += messages * _latency(communication, devices, machine)
    forward, products = local * forward_flops / machine.flops, flops / machine.flops
    overlapped = forward + max(products, seconds)
    total = overlapped if communication == "ring" else forward + products + seconds
    return Cost(flops + local * forward_flops, sent, forward + products, seconds, overlapped, total)


def natural_step_cost(
    ensemble_size: int,
    samples: int,
    outputs: int,
    parameters: int,
    devices: int,
    *,
    machine: Machine = HOPPER,
    forward_flops: float = 0.0,
) -> Cost:
    r"""The cost of one natural-gradient step on one of ``devices`` devices that share the samples.

    Every device evaluates all J particles on its own S / n samples with R outputs each. What crosses is the matrix of
    the step with one more column, J (J + 1) numbers, whatever S, R and P are, and the loss, a number where the step
    begins and one where it ends. All devices make the solution and the step:

    .. math:: J F / n + 2 J^2 S R / n + J^3 / 3 + 2 J P

    operations, F being those of a particle's forward pass on all samples.

    Args:
        ensemble_size: number of particles J.
        samples: number of samples S, on all devices together.
        outputs: number of outputs R of a sample.
        parameters: number of parameters P.
        devices: number of devices n.
        machine: rates of devices and links.
        forward_flops: operations F of one particle's forward pass on all samples.

    Returns:
        A :class:`Cost`, whose communication waits: the solution needs the whole sum.

    Raises:
        TypeError: sizes that are not whole numbers; ``machine`` is none.
        ValueError: numbers out of range.

    >>> cost = natural_step_cost(1000, 600 * 8, 10, 573_910, 8)
    >>> round(cost.sent / 1e6, 2)  # MB; the same for any network and batch
    7.01
    """
    whole("samples", samples)
    _check_sizes(ensemble_size, outputs, parameters, devices, machine, itemsize=4)
    real("forward_flops", forward_flops, NOT_NEGATIVE)
    shared = ensemble_size * forward_flops + 2 * ensemble_size**2 * samples * outputs
    flops = shared / devices + ensemble_size**3 / 3 + 2 * ensemble_size * parameters
    half = 4 * _share(devices) * ensemble_size * (ensemble_size + 1)
    seconds = _reduction(half, half, devices, machine) + 3 * _latency("all_reduce", devices, machine)
    total = flops / machine.flops + seconds
    return Cost(flops, 2 * half, flops / machine.flops, seconds, total, total)


def choose_communication(
    ensemble_size: int,
    outputs: int,
    parameters: int,
    devices: int,
    *,
    machine: Machine = HOPPER,
    itemsize: int = 4,
    rounded: bool = False,
) -> Communication:
    """The layout whose step is the cheapest by :func:`step_cost`.

    Args:
        ensemble_size: number of particles J, on all devices together.
        outputs: number of outputs M.
        parameters: number of parameters P.
        devices: number of devices n.
        machine: rates of devices and links.
        itemsize: bytes of one parameter as the ensemble stores it.
        rounded: flag, True if sums may be sent in bfloat16, as with products in bfloat16.

    Returns:
        The layout's name.

    Raises:
        TypeError, ValueError: as :func:`step_cost`.

    >>> choose_communication(16_000, 600, 573_910, 8), choose_communication(2_000, 600, 573_910, 8)
    ('all_reduce', 'all_to_all')
    >>> choose_communication(16_000, 600, 573_910, 8, rounded=True)
    'bf16_sums'
    """
    flag("rounded", rounded)

    def seconds(name: Communication) -> float:
        return step_cost(name, ensemble_size, outputs, parameters, devices, machine=machine, itemsize=itemsize).seconds

    return min((name for name in COMMUNICATIONS if rounded or name != ROUNDED), key=seconds)


def _check_sizes(ensemble_size: Any, outputs: Any, parameters: Any, devices: Any, machine: Any, itemsize: Any) -> None:
    for name, size, least in (
        ("ensemble_size", ensemble_size, 1),
        ("outputs", outputs, 0),
        ("parameters", parameters, 0),
        ("devices", devices, 1),
        ("itemsize", itemsize, 1),
    ):
        whole(name, size, least)
    if not isinstance(machine, Machine):
        raise TypeError(f"machine: {machine!r}; wanted a Machine, such as eki_jax.sharding.HOPPER")


def _share(devices: int) -> float:
    """The part of evenly spread data that belongs to others."""
    return (devices - 1) / devices


def _hosts(devices: int, machine: Machine) -> tuple[int, int]:
    """Devices on one host, and hosts."""
    inside = min(devices, machine.devices_per_host)
    return inside, math.ceil(devices / inside)


def _reduction(scattered: float, gathered: float, devices: int, machine: Machine) -> float:
    """Reduce-scatter and all-gather: inside the host over all the data, then each device's share between hosts."""
    inside, hosts = _hosts(devices, machine)
    total = (scattered + gathered) / max(_share(devices), 1e-30)
    return total * (_share(inside) / machine.local.bandwidth + _share(hosts) / inside / machine.remote.bandwidth)


def _gathering(received: float, devices: int, machine: Machine) -> float:
    """All-gather: each device fetches its share from other hosts, and passes it on inside."""
    inside, hosts = _hosts(devices, machine)
    total = received / max(_share(devices), 1e-30)
    return total * (_share(inside) / machine.local.bandwidth + _share(hosts) / inside / machine.remote.bandwidth)


def _exchange(sent: float, devices: int, machine: Machine) -> float:
    """All-to-all: what is for other hosts goes over the slow link, at once with what stays inside."""
    inside, _ = _hosts(devices, machine)
    remote = sent * (devices - inside) / max(devices - 1, 1)
    return max((sent - remote) / machine.local.bandwidth, remote / machine.remote.bandwidth)


def _passing(sent: float, devices: int, machine: Machine) -> float:
    """A ring of neighbours goes at the pace of its slowest link."""
    link = machine.local if devices <= machine.devices_per_host else machine.remote
    return sent / link.bandwidth


def _latency(communication: Communication, devices: int, machine: Machine) -> float:
    """Seconds of a message without bytes: trees for reductions, one round for each neighbour of a ring."""
    inside, hosts = _hosts(devices, machine)
    if communication == "ring":
        return (devices - 1) * (machine.local if hosts == 1 else machine.remote).latency
    rounds = 1 if communication == "gather" else 2
    depth = math.ceil(math.log2(inside)) * machine.local.latency + math.ceil(math.log2(hosts)) * machine.remote.latency
    return rounds * depth
