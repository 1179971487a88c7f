"""``python -m benchmarks scaling``: strong and weak scaling over devices, measured and predicted."""

from __future__ import annotations

import argparse
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from benchmarks.harness import experiment, store
from benchmarks.harness.command import Parser, Refused, command, folder, number, whole
from benchmarks.harness.experiment import ROOT, Experiment, Made, Result
from benchmarks.harness.store import Job
from benchmarks.scaling import measured, pictures, predicted
from eki_jax import sharding

_GPUS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_COLUMNS = "{:8} {:15} {:>4} {:>6} {:>9} {:>8} {:>7} {:>9} {:>9} {:>9} {:>9} {:>7} {:>10}"
# What is measured, by the flags that say otherwise.
_CPU: dict[str, Any] = {
    "strong": 256,
    "weak": 64,
    "inputs": 784,
    "widths": [32, 10],
    "batch_size": 128,
    "steps": 3,
    "max_devices": 1024,
    "virtual_devices": 8,
    "communication": [*sharding.COMMUNICATIONS, predicted.NATURAL],
}
_SMOKE = {"strong": 8, "weak": 4, "inputs": 8, "widths": [4, 3], "batch_size": 6, "steps": 1, "max_devices": 1}
PRESETS = {
    "smoke": _CPU | _SMOKE | {"virtual_devices": 1, "communication": ["all_reduce"]},
    "cpu": _CPU,
    "full": _CPU | {"strong": 2000, "weak": 2000, "widths": [500, 300, 100, 10], "batch_size": 600},
}


def scaling(images: Path | None = None) -> Experiment:
    """The experiment, whose pictures go into a folder, or to where the documentation has them."""
    return Experiment(
        "scaling",
        "Scaling over devices",
        "scaling",
        _measure,
        table,
        says=lambda found: {"kind": found["kind"], "wins": found["wins"]},
        summarized=lambda path, found: summarized(found),
        makes=lambda path, found: _pictures(images or _images(path), found),
    )


@command("scaling")
def main(argv: list[str]) -> int:
    """Measure on the devices that there are, predict for those that there are not, and draw both."""
    arguments = _parser().parse_args(argv)
    if arguments.anchor and arguments.predict_only:
        raise Refused(
            "--anchor: wants the rate of a measurement, which --predict-only leaves out; wanted one of the two"
        )
    of = scaling(arguments.images)
    return experiment.run(of, arguments, of.path(arguments.preset, arguments.out))


def _images(path: Path) -> Path:
    return ROOT / "docs" / "images" if scaling().is_committed(path) else path.parent


def _pictures(folder: Path, found: Result) -> Iterator[Made]:
    if found["cells"]:
        yield Made(folder / "scaling_measured.png", lambda path: pictures.draw_measured(found, path))
    yield Made(folder / "scaling_predicted.png", lambda path: pictures.draw_predicted(found, path))


def _line(arguments: argparse.Namespace) -> str:
    """The command, with what is not as always."""
    usual = vars(_parser().parse_args([]))
    text = "python -m benchmarks scaling"
    for name, value in vars(arguments).items():
        if value != usual[name] and name not in ("out", "images", "draw"):
            values = [] if value is True else value if isinstance(value, list) else [value]
            text += " ".join([f" --{name.replace('_', '-')}", *map(str, values)])
    return text


def _measure(arguments: argparse.Namespace, path: Path) -> None:
    """Measure every case, and predict; what was measured before stays beside predictions alone."""
    preset = PRESETS[arguments.preset]
    sizes = {name: preset[name] if (given := getattr(arguments, name)) is None else given for name in preset}
    _make_devices(sizes["virtual_devices"])
    head = {"experiment": "scaling", "preset": arguments.preset, "command": _line(arguments), "kind": _kind()}
    if arguments.predict_only:
        before = store.earlier(path, experiment="scaling") or {}
        kept = {key: before[key] for key in ("preset", "kind", "problem") if key in before}
        found = {**head, **kept, "cells": before.get("cells", {})}
    else:
        problem = measured.dense_workload(sizes["inputs"], tuple(sizes["widths"]), sizes["batch_size"])
        about = {"parameters": problem.parameters, "outputs": problem.outputs, "forward_flops": problem.forward_flops}
        found = store.fill(path, {**head, "problem": about}, _jobs(sizes, problem))
    store.save(path, {**found, **_predict(arguments, found)})


def _jobs(sizes: dict[str, Any], problem: measured.Workload) -> dict[str, Job]:
    """The rates of the machine for every number of devices, and every case, which are compared with these."""
    counts = [n for n in (2**k for k in range(11)) if n <= min(jax.device_count(), sizes["max_devices"])]
    chosen = {name: sizes[name] for name in ("inputs", "widths", "batch_size")}
    machines: dict[int, sharding.Machine] = {}

    def rates(n: int) -> dict[str, Any]:
        machines[n] = measured.machine_at_hand(n, problem, sizes["weak"])
        return {"rates": _as_dict(machines[n])}

    def case(devices: int, **of: Any) -> dict[str, Any]:
        if devices not in machines:  # these are kept of a run that was interrupted, and cheap
            rates(devices)
        common = {"devices": devices, "machine": machines[devices], "steps": sizes["steps"]}
        if of["communication"] != predicted.NATURAL:
            return {"row": measured.measure(problem, **of, **common)._asdict()}
        del of["communication"]
        samples = sizes["batch_size"] * (devices if of["scaling"] == "weak" else 1)
        mine = measured.dense_workload(sizes["inputs"], tuple(sizes["widths"]), samples)
        return {"row": measured.measure_natural(mine, **of, **common)._asdict()}

    jobs = {f"rates, {n} devices": Job({**chosen, "devices": n}, functools.partial(rates, n)) for n in counts}
    for of, particles in (("strong", sizes["strong"]), ("weak", sizes["weak"])):
        for layout in sizes["communication"]:
            for n in counts:
                if layout == predicted.NATURAL and of == "strong" and sizes["batch_size"] % n:
                    continue  # its devices share the samples of one batch
                total = particles * n if of == "weak" and layout != predicted.NATURAL else particles
                wanted = {"scaling": of, "communication": layout, "devices": n, "particles": total}
                jobs[f"{of}, {layout}, {n} devices"] = Job({**chosen, **wanted}, functools.partial(case, **wanted))
    return jobs


def summarized(found: Result) -> Result:
    """A result with its rates by the number of devices, and with what was measured, beside one device."""
    cells = [cell["found"] for cell in found["cells"].values()]
    rates = [one["rates"] for one in cells if "rates" in one]
    rows = measured.compared([measured.Row(**one["row"]) for one in cells if "row" in one])
    at_hand = {one["devices_per_host"]: one for one in rates}
    return {**found, "machine_at_hand": at_hand, "measured": [row._asdict() for row in rows]}


def table(found: Result) -> str:
    """What was measured, and what is predicted, as a person reads it."""
    return "\n".join([*_measured_lines(found), *_predicted_lines(found)])


def _measured_lines(found: Result) -> list[str]:
    if not found["measured"]:
        return []
    problem = found["problem"]
    lines = [f"measured on {found['kind']}: {problem['parameters']} parameters, {problem['outputs']} samples a batch"]
    for n, rates in found["machine_at_hand"].items():
        link, local = "", rates["local"]
        if n > 1:
            link = f", {local['bandwidth'] / 1e9:.2f} GB/s and {1e6 * local['latency']:.0f} us a message"
        lines.append(f"  {n} at once: {rates['flops'] / 1e9:.1f} GFLOP/s a device in matrix products{link}")
    head = ("scaling", "layout", "n", "J", "ms/step", "speed-up", "effic.", "peak MB", "GFLOP", "MB sent", "model MB")
    lines += ["", _COLUMNS.format(*head, "calls", "model ms")]
    for row in (measured.Row(**row) for row in found["measured"]):
        numbers = (row.devices, row.particles, f"{1e3 * row.seconds:.2f}", f"{row.speedup:.2f}")
        numbers += (f"{row.efficiency:.2f}", f"{row.memory / 1e6:.2f}", f"{row.flops / 1e9:.3f}")
        numbers += (f"{row.sent / 1e6:.3f}", f"{row.predicted_sent / 1e6:.3f}", row.collectives)
        lines.append(_COLUMNS.format(row.scaling, row.communication, *numbers, f"{1e3 * row.predicted_seconds:.2f}"))
    return [
        *lines,
        "ms, speed-up: measured; peak MB: the compiler's plan for a device; GFLOP, MB sent, calls: read from the",
        "compiled program, of one device a step; model: the alpha-beta model with the measured rates above",
        "",
    ]


def _predict(arguments: argparse.Namespace, found: Result) -> Result:
    machine = _machine(arguments)
    if arguments.anchor:
        machine = machine._replace(flops=summarized(found)["machine_at_hand"][1]["flops"])
    rows = []
    for name, network in predicted.networks().items():
        for of, particles in (("weak", arguments.per_gpu), ("strong", network.paper_particles)):
            for n in _GPUS:
                rows += predicted.predict(name, network, of, particles, n, machine, arguments.messages)
                rows.append(predicted.predict_natural(name, network, of, particles, n, machine))
    wins = predicted.winners(rows)
    return {"machine": _as_dict(machine), "predicted": [row._asdict() for row in rows], "wins": wins}


def _predicted_lines(found: Result) -> list[str]:
    lines = [f"predicted, not measured: {pictures.about(found['machine'])}"]
    for row in (predicted.Row(**row) for row in found["predicted"]):
        is_natural = row.communication == predicted.NATURAL
        is_shown = row.wins or is_natural or (row.communication, row.devices) == ("bf16_sums", 8)
        if row.scaling == "weak" and row.devices in (8, 64, 1024) and is_shown:
            each = row.particles // (1 if is_natural else row.devices)
            lines.append(
                f"  {row.network}, J = {each} a GPU, {row.devices:4} GPUs, {row.communication}: "
                f"compute {1e3 * row.compute:6.2f} ms, communication {1e3 * row.communication_seconds:5.2f} ms, "
                f"{row.sent / 1e9:.2f} GB; efficiency {row.efficiency:.2f} if it waits, "
                f"{row.efficiency_overlapped:.2f} if it overlaps"
            )
    for case, layouts in found["wins"].items():
        lines.append(f"  {case}: " + "; ".join(f"{name} at {_ranges(counts)} GPUs" for name, counts in layouts.items()))
    return lines


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
    parser.add_preset(help="smoke: seconds; cpu: some minutes on two cores; full: DNN 4, for GPUs")
    run = parser.add_argument_group("what is measured, in the place of the preset's")
    run.add_argument("--strong", type=whole(), help="J on all devices together")
    run.add_argument("--weak", type=whole(), help="J on each device")
    run.add_argument("--inputs", type=whole(), help="inputs of the dense network")
    run.add_argument("--widths", type=whole(), nargs="+", help="its layers' outputs")
    run.add_argument("--batch-size", type=whole(), help="samples of a batch")
    run.add_argument("--steps", type=whole(), help="timed steps; the median counts")
    run.add_argument("--max-devices", type=whole(), help="use no more than these")
    run.add_argument("--virtual-devices", type=whole(), help="devices to make of a processor")
    run.add_argument("--communication", nargs="+", choices=_CPU["communication"], help="layouts; natural: its own")
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
    parser.add_argument("--out", "--output", metavar="DIR", type=folder, help="folder of the numbers")
    parser.add_draw()
    words = "folder of the pictures, that of scaling.jsonl or of the documentation's"
    parser.add_argument("--images", metavar="DIR", type=folder, help=words)
    return parser
