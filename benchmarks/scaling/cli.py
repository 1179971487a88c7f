"""``python -m benchmarks scaling``: strong and weak scaling over devices, measured and predicted."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import jax

from benchmarks.harness import store
from benchmarks.harness.command import Parser, Refused, command, folder, number, whole
from benchmarks.reporting import RESULTS, print_result
from benchmarks.scaling import measured, pictures, predicted
from eki_jax import sharding
from eki_jax.training.files import claimed

_IMAGES = Path(__file__).parents[2] / "docs" / "images"
_GPUS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_COLUMNS = "{:8} {:15} {:>4} {:>6} {:>9} {:>8} {:>7} {:>9} {:>9} {:>9} {:>9} {:>7} {:>10}"


@command("scaling")
def main(argv: list[str]) -> int:
    """Measure on the devices that there are, predict for those that there are not, and draw both."""
    arguments = _parser().parse_args(argv)
    if arguments.anchor and arguments.predict_only:
        raise Refused(
            "--anchor: wants the rate of a measurement, which --predict-only leaves out; wanted one of the two"
        )
    out = arguments.out
    images = arguments.images or (_IMAGES if out.resolve() == RESULTS.resolve() else out)
    path = out / "scaling.jsonl"
    with claimed(out, ".scaling.lock"):
        before = store.earlier(path, experiment="scaling") or {}
        _make_devices(arguments.virtual_devices)
        machine = _machine(arguments)
        payload = {"experiment": "scaling", "command": _line(arguments), "kind": _kind()}
        if arguments.predict_only:  # what was measured stays, and says on what
            payload |= {key: before[key] for key in _MEASURED if key in before}
            if "measured" in before:
                payload.setdefault("measured_in", before["environment"])
        else:
            payload |= _measure(arguments, _kind(), before)
            if arguments.anchor:
                machine = machine._replace(flops=payload["machine_at_hand"]["1"]["flops"])
        payload |= _predict(arguments, machine)
        store.save(path, payload)
        if "measured" in payload:
            pictures.draw_measured(payload, images / "scaling_measured.png")
        pictures.draw_predicted(payload, images / "scaling_predicted.png")
    print_result({"command": "scaling", "kind": payload["kind"], "result": path.name, "wins": payload["wins"]})
    return 0


def _line(arguments: argparse.Namespace) -> str:
    """The command, with what is not as always."""
    usual = vars(_parser().parse_args([]))
    text = "python -m benchmarks scaling"
    for name, value in vars(arguments).items():
        if value != usual[name] and name not in ("out", "images"):
            values = [] if value is True else value if isinstance(value, list) else [value]
            text += " ".join([f" --{name.replace('_', '-')}", *map(str, values)])
    return text


# The entries of a result that a measurement makes.
_MEASURED = ("kind", "problem", "machine_at_hand", "measured", "measured_in")


def _measure(arguments: argparse.Namespace, kind: str, before: dict[str, Any]) -> dict[str, Any]:
    counts = [n for n in (2**k for k in range(11)) if n <= min(jax.device_count(), arguments.max_devices)]
    cases = {(scaling, one, n) for scaling in ("strong", "weak") for one in arguments.communication for n in counts}
    lost = {(row["scaling"], row["communication"], row["devices"]) for row in before.get("measured", [])} - cases
    if lost:
        first = ", ".join(map(str, min(lost)))
        raise Refused(f"scaling.jsonl: has {len(lost)} cases that this run lacks, {first} first; name another --out")
    problem = measured.dense_workload(arguments.inputs, tuple(arguments.widths), arguments.batch_size)
    print(f"measured on {kind}: {problem.parameters} parameters, {problem.outputs} samples a batch, float32")
    machines = {n: measured.machine_at_hand(n, problem, arguments.weak) for n in counts}
    for n, rates in machines.items():
        link = f", {rates.local.bandwidth / 1e9:.2f} GB/s and {1e6 * rates.local.latency:.0f} us a message" * (n > 1)
        print(f"  {n} at once: {rates.flops / 1e9:.1f} GFLOP/s a device in matrix products{link}")
    rows = []
    for scaling, particles in (("strong", arguments.strong), ("weak", arguments.weak)):
        for communication in arguments.communication:
            for n in counts:
                total = particles * n if scaling == "weak" else particles
                row = measured.measure(problem, scaling, communication, n, total, machines[n], arguments.steps)
                rows.append(row)
    rows = measured.compared(rows)
    _print_measured(rows)
    about = {"parameters": problem.parameters, "outputs": problem.outputs, "forward_flops": problem.forward_flops}
    return {
        "problem": about,
        "machine_at_hand": {str(n): _as_dict(rates) for n, rates in machines.items()},
        "measured": [row._asdict() for row in rows],
    }


def _print_measured(rows: list[measured.Row]) -> None:
    head = ("scaling", "layout", "n", "J", "ms/step", "speed-up", "effic.", "peak MB", "GFLOP", "MB sent", "model MB")
    print("\n" + _COLUMNS.format(*head, "calls", "model ms"))
    for row in rows:
        numbers = (row.devices, row.particles, f"{1e3 * row.seconds:.2f}", f"{row.speedup:.2f}")
        numbers += (f"{row.efficiency:.2f}", f"{row.memory / 1e6:.2f}", f"{row.flops / 1e9:.3f}")
        numbers += (f"{row.sent / 1e6:.3f}", f"{row.predicted_sent / 1e6:.3f}", row.collectives)
        print(_COLUMNS.format(row.scaling, row.communication, *numbers, f"{1e3 * row.predicted_seconds:.2f}"))
    print("ms, speed-up: measured; peak MB: the compiler's plan for a device; GFLOP, MB sent, calls: read from the")
    print("compiled program, of one device a step; model: the alpha-beta model with the measured rates above")


def _predict(arguments: argparse.Namespace, machine: sharding.Machine) -> dict[str, Any]:
    rows = []
    for name, network in predicted.networks().items():
        for scaling, particles in (("weak", arguments.per_gpu), ("strong", network.paper_particles)):
            for n in _GPUS:
                rows += predicted.predict(name, network, scaling, particles, n, machine, arguments.messages)
    print(f"\npredicted, not measured: {pictures.about(_as_dict(machine))}")
    for row in rows:
        if row.scaling == "weak" and row.devices in (8, 64, 1024) and row.wins:
            print(
                f"  {row.network}, J = {arguments.per_gpu} a GPU, {row.devices:4} GPUs, {row.communication}: "
                f"compute {1e3 * row.compute:6.2f} ms, communication {1e3 * row.communication_seconds:5.2f} ms, "
                f"{row.sent / 1e9:.2f} GB; efficiency {row.efficiency:.2f} if it waits, "
                f"{row.efficiency_overlapped:.2f} if it overlaps"
            )
    wins = predicted.winners(rows)
    for case, layouts in wins.items():
        print(f"  {case}: " + "; ".join(f"{name} at {_ranges(counts)} GPUs" for name, counts in layouts.items()))
    return {"machine": _as_dict(machine), "predicted": [row._asdict() for row in rows], "wins": wins}


def _ranges(counts: list[int]) -> str:
    return ", ".join(map(str, counts))


def _as_dict(machine: sharding.Machine) -> dict[str, Any]:
    return {**machine._asdict(), "local": machine.local._asdict(), "remote": machine.remote._asdict()}


def _machine(arguments: argparse.Namespace) -> sharding.Machine:
    local = sharding.Link(1e9 * arguments.local_bandwidth, 1e-6 * arguments.local_latency)
    remote = sharding.Link(1e9 * arguments.remote_bandwidth, 1e-6 * arguments.remote_latency)
    return sharding.Machine(1e12 * arguments.tflops, local, remote, arguments.gpus_per_host)


def _make_devices(count: int) -> None:
    """Virtual devices on a processor, unless there are some already; accelerators are not affected."""
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", count)


def _kind() -> str:
    device = jax.devices()[0]
    if device.platform == "cpu":
        return f"{jax.device_count()} virtual devices of one processor (correctness and bytes, never speed)"
    return f"{jax.device_count()} x {device.device_kind}"


def _parser() -> Parser:
    parser = Parser(
        prog="python -m benchmarks scaling", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    run = parser.add_argument_group("what is measured")
    run.add_argument("--strong", type=whole(), default=256, help="J on all devices together")
    run.add_argument("--weak", type=whole(), default=64, help="J on each device")
    run.add_argument("--inputs", type=whole(), default=784, help="inputs of the dense network")
    run.add_argument("--widths", type=whole(), nargs="+", default=[32, 10], help="its layers' outputs")
    run.add_argument("--batch-size", type=whole(), default=128, help="samples of a batch")
    run.add_argument("--steps", type=whole(), default=3, help="timed steps; the median counts")
    run.add_argument("--max-devices", type=whole(), default=1024, help="use no more than these")
    run.add_argument("--virtual-devices", type=whole(), default=8, help="devices to make of a processor")
    run.add_argument(
        "--communication", nargs="+", default=list(sharding.COMMUNICATIONS), choices=sharding.COMMUNICATIONS
    )
    rates = parser.add_argument_group("the machine of the predictions")
    machine, latency = sharding.HOPPER, number("a finite number >= 0", lambda value: value >= 0)
    rates.add_argument("--tflops", type=number(), default=machine.flops / 1e12, help="matrix products of one GPU")
    rates.add_argument("--anchor", action="store_true", help="take that rate as measured on this machine instead")
    rates.add_argument("--local-bandwidth", type=number(), default=machine.local.bandwidth / 1e9, help="GB/s in a host")
    rates.add_argument("--local-latency", type=latency, default=machine.local.latency * 1e6, help="microseconds")
    rates.add_argument("--remote-bandwidth", type=number(), default=machine.remote.bandwidth / 1e9, help="GB/s, a GPU")
    rates.add_argument("--remote-latency", type=latency, default=machine.remote.latency * 1e6, help="microseconds")
    rates.add_argument("--gpus-per-host", type=whole(), default=machine.devices_per_host)
    rates.add_argument("--per-gpu", type=whole(), default=2000, help="J of a GPU for weak scaling")
    rates.add_argument("--messages", type=whole(), default=32, help="blocks that a step's communication is cut into")
    parser.add_argument("--predict-only", action="store_true", help="measure nothing")
    parser.add_argument("--out", "--output", metavar="DIR", type=folder, default=RESULTS, help="folder of the numbers")
    words = "folder of the pictures, that of scaling.jsonl or of the documentation's"
    parser.add_argument("--images", metavar="DIR", type=folder, help=words)
    return parser
