"""What a compiled program does, read from its text: matrix products and communication, loops counted in full."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
_BYTES |= {"s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16}
_KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.+?) ([\w\-]+)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_TRIPS = re.compile(r'known_trip_count"?:\{"?n"?:"?(\d+)')


class Collective(NamedTuple):
    """One communication between devices.

    Attributes:
        kind: as the compiler calls it.
        numbers: how many numbers a device contributes (all-reduce, all-to-all, permute) or ends up with (all-gather),
            or contributes before the sum is split (reduce-scatter).
        size: bytes of those numbers.
        devices: how many take part.
        times: how often it runs.
    """

    kind: str
    numbers: int
    size: int
    devices: int
    times: int

    @property
    def sent(self) -> float:
        """Bytes that leave a device, by the algorithms that send the least."""
        share = (self.devices - 1) / self.devices
        factor = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share)
        return factor * self.size * self.times


class Program(NamedTuple):
    """A compiled program of one device.

    Attributes:
        flops: operations of its matrix products and convolutions.
        collectives: its communication.
    """

    flops: float
    collectives: tuple[Collective, ...]

    @property
    def sent(self) -> float:
        """Bytes that leave the device."""
        return sum(collective.sent for collective in self.collectives)


def read(text: str, devices: int) -> Program:
    """Read ``compiled.as_text()``.

    Where a program branches, the branch that communicates more is counted; a loop of unknown length, such as one that
    tries shorter steps until one is good, counts once.

    Args:
        text: of a compiled program.
        devices: how many the program runs on, for collectives that do not name them.

    Returns:
        A :class:`Program`.
    """
    computations, entry = _computations(text)
    return _total(entry, computations, devices)


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    entry = ""
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            lines = found.setdefault(match[2], [])
            entry = match[2] if match[1] else entry
        elif line.startswith(" "):
            lines.append(line)
    return found, entry


def _total(name: str, computations: dict[str, list[str]], devices: int) -> Program:
    flops, collectives = 0.0, []
    shapes: dict[str, str] = {}
    for line in computations[name]:
        match = _INSTRUCTION.match(line)
        if match is None:
            continue
        result, shape, operation, rest = match.groups()
        shapes[result] = shape
        kind = operation.removesuffix("-start")
        if re.fullmatch(_KINDS, kind):
            collectives.append(_collective(kind, shape, operation, rest, devices))
            continue
        if operation in ("dot", "convolution"):
            flops += _product_flops(operation, shape, rest, shapes)
        times = _trips(rest) if operation == "while" else 1
        for called in _called(operation, rest, computations, devices):
            flops += called.flops * times
            collectives += [one._replace(times=one.times * times) for one in called.collectives]
    return Program(flops, tuple(collectives))


def _called(operation: str, rest: str, computations: dict[str, list[str]], devices: int) -> Iterator[Program]:
    if operation == "conditional":
        branches = re.search(r"branch_computations=\{([^}]*)\}", rest)
        names = re.findall(r"[\w.\-]+", branches[1]) if branches else _CALLED.findall(rest)
        yield max((_total(name, computations, devices) for name in names), key=lambda one: (one.sent, one.flops))
    elif operation in ("while", "fusion", "call", "async-start", "custom-call"):
        for name in _CALLED.findall(rest):
            yield _total(name, computations, devices)


def _collective(kind: str, shape: str, operation: str, rest: str, devices: int) -> Collective:
    arrays = _ARRAY.findall(shape)
    if operation.endswith("-start") and kind != "all-reduce":
        arrays = arrays[len(arrays) // 2 :]  # such a result names the operands first
    numbers = sum(_numbers(dims) for _, dims in arrays)
    size = sum(_numbers(dims) * _BYTES[dtype] for dtype, dims in arrays)
    group = _group_size(rest, devices)
    factor = group if kind == "reduce-scatter" else 1
    return Collective(kind, numbers * factor, size * factor, group, 1)


def _group_size(rest: str, devices: int) -> int:
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return match[1].count(",") + 1
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
        return int(match[1])
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", rest):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", match[1])}
        return math.prod(sizes[name] for name in re.findall(r"'([^']+)'", match[2]))
    return devices


def _product_flops(operation: str, shape: str, rest: str, shapes: dict[str, str]) -> float:
    (_, out), *_ = _ARRAY.findall(shape)
    operands = re.findall(r"%([\w.\-]+)", rest)[:2]
    left, right = ([int(n) for n in _ARRAY.findall(shapes[name])[0][1].split(",") if n] for name in operands)
    if operation == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", rest)
        depth = math.prod(left[int(at)] for at in contracted[1].split(",") if at) if contracted else 1
    else:
        labels = re.search(r"dim_labels=\w+_(\w+)->", rest)
        assert labels is not None
        depth = math.prod(n for n, label in zip(right, labels[1], strict=True) if label != "o")
    return 2.0 * _numbers(out) * depth


def _trips(rest: str) -> int:
    match = _TRIPS.search(rest)
    return int(match[1]) if match else 1


def _numbers(dims: str) -> int:
    return math.prod(int(n) for n in dims.split(",") if n)
