"""The parts of a run: cases whose measurements belong side by side, and what is derived from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.performance import networks
from benchmarks.performance.jobs import ours, peer
from benchmarks.performance.precision import VARIANTS, measure_precision, trainings
from benchmarks.reporting import UNITS, processor
from eki_jax.kernel.products import cheaper_contraction

Row = dict[str, Any]


class Options(NamedTuple):
    """What all measurements share.

    Attributes:
        folder: where the other libraries' environments are.
        repeats: the least number of timed calls.
        limit: seconds for one measurement's process.
    """

    folder: Path
    repeats: int
    limit: float


class Part(NamedTuple):
    """Measurements that make one table.

    Attributes:
        cases: function of the preset, "quick", "default" or "full": the settings of every case.
        rows: function ``rows(options, **settings)`` that measures a case; ratios are between rows of one.
    """

    cases: Callable[[str], Sequence[dict[str, Any]]]
    rows: Callable[..., Iterator[Row]]


def name_of(settings: dict[str, Any]) -> str:
    """A case in words.

    >>> name_of({"network": "dnn1", "J": 200, "repeats": [1, 2]})
    'network dnn1, J 200'
    """
    return ", ".join(f"{key} {value}" for key, value in settings.items() if not isinstance(value, list | dict))


def _networks(quick: list[tuple[str, int]], default: list[tuple[str, int]]) -> Callable[[str], list[dict[str, Any]]]:
    return lambda preset: [{"network": name, "J": size} for name, size in (quick if preset == "quick" else default)]


_STEPS = {
    "quick": [("dnn1", 200), ("rnn", 50)],
    "default": [("dnn1", 200), ("dnn1", 2000), ("dnn1", 6000), ("dnn2", 200), ("dnn2", 2000), ("dnn2", 6000),
                ("dnn4", 200), ("dnn4", 2000), ("rnn", 200), ("rnn", 2000), ("cnn-mnist", 50)],
    "full": [(name, size) for name in ("dnn1", "dnn2", "dnn4", "cnn-mnist", "rnn") for size in (200, 2000, 6000)],
}  # fmt: skip


def _step_cases(preset: str) -> list[dict[str, Any]]:
    momentum = [("dnn1", 200)] if preset == "quick" else [(f"dnn{number}", 2000) for number in (1, 2, 3, 4)]
    cases = [(*case, "euler") for case in _STEPS[preset]] + [(*case, "nesterov") for case in momentum]
    return [{"network": name, "J": size, "solver": solver} for name, size, solver in cases]


# The step's rate over the machine's own, by network and ensemble size; and momentum's memory.
def _steps(options: Options, network: str, J: int, solver: str) -> Iterator[Row]:
    task = {"kind": "step", "network": network, "J": J, "solver": solver, "repeats": options.repeats}
    yield _step_row(network, J, solver, ours(task, options.limit))


def _step_row(name: str, size: int, label: str, result: Row) -> Row:
    """A step's time as a share of the matrix rate, and its memory as multiples of the ensemble."""
    row = {"network": name, "J": size, "what": label, **result}
    if "median" not in result:
        return row
    parameters = networks.parameters(networks.build(name)[1])
    products = min(4 * size * networks.BATCH * parameters, 2 * size**2 * (networks.BATCH + parameters))
    operations = size * networks.forward_operations(name) + products
    ensemble = 4 * size * parameters
    row |= {
        "operations": operations,
        "rate": operations / result["median"],
        "of_matmul_rate": operations / result["median"] / result["matmul_rate"],
        "of_matmul_processor_rate": operations / result["processor_median"] / result["matmul_processor_rate"],
        "peak_over_ensemble": result["peak_bytes"] / ensemble,
    }
    if "state_bytes" in result:  # the bounds: 1.3 ensembles (EKI) or 2.3 (MEKI) and twice the batch's outputs
        bound = (2.3 if label == "nesterov" else 1.3) * ensemble + 2 * 4 * size * networks.BATCH * 10
        row |= {"bound_bytes": bound, "within_bound": result["peak_bytes"] <= bound}
    return row


# The same step as the paper states it, in PyTorch and in plain JAX, beside this library's.
def _frameworks(options: Options, network: str, J: int) -> Iterator[Row]:
    task = {"network": network, "J": J, "repeats": options.repeats, "batch": networks.BATCH}
    task["widths"] = list(networks.WIDTHS[network])
    results = {
        "eki_jax": ours({**task, "kind": "step"}, options.limit),
        "PyTorch": peer("torch", task, options.folder, options.limit),
        "plain JAX": ours({**task, "kind": "plain"}, options.limit),
        "eki_jax bf16": ours({**task, "kind": "step", "precision": "bf16"}, options.limit),
    }
    for label, result in results.items():
        yield _step_row(network, J, label, result) | _ratios(result, results["eki_jax"])


# The same, for a processor of another kind, beside those of the other table.
def _units(options: Options, network: str, J: int) -> Iterator[Row]:
    if UNITS in processor():
        yield from _frameworks(options, network, J)
    else:
        yield {"network": network, "J": J, "what": "eki_jax", "skipped": f"a processor without {UNITS}"}


def _ratios(result: Row, reference: Row) -> Row:
    """How many times as long as the reference, by wall clock and by processor time."""
    if "median" not in reference:
        return {}
    if "median" not in result:
        return {"times_ours_at_least": result["more_than"] / reference["median"]} if "more_than" in result else {}
    return {
        "times_ours": result["median"] / reference["median"],
        "times_ours_processor": result["processor_median"] / reference["processor_median"],
    }


_LIBRARIES = ("iterative_ensemble_smoother", "cuthbert", "pyesmda", "dapper")


def _linear_cases(preset: str) -> list[dict[str, Any]]:
    every = [(p, m, j) for p in (10**3, 10**5, 10**6) for m in (100, 1000, 10_000) for j in (100, 500)]
    few = [(1000, 100, 100), (1000, 10_000, 500), (10**5, 100, 500), (10**5, 1000, 100), (10**6, 1000, 100)]
    cases = {"quick": few[:1], "default": few, "full": every}[preset]
    return [{"P": parameters, "M": data, "J": size} for parameters, data, size in cases]


def _linear(options: Options, **shape: int) -> Iterator[Row]:
    task = {**shape, "repeats": options.repeats}
    mine = {
        f"eki_jax {method}": ours({**task, "kind": "linear", "method": method}, options.limit)
        for method in ("kalman", "euler")
    }
    others = {name: peer(name, task, options.folder, options.limit) for name in _LIBRARIES}
    for label, result in (mine | others).items():
        yield {**shape, "what": label, **result, **_ratios(result, mine["eki_jax kalman"])}


# A generation with the same network: seconds per particle and training sample.
def _evolution(options: Options, network: str, J: int) -> Iterator[Row]:
    task = {"J": J, "batch": networks.BATCH, "widths": list(networks.WIDTHS[network]), "repeats": options.repeats}
    results = {"eki_jax": ours({**task, "kind": "step", "network": network}, options.limit)}
    for strategy in ("Open_ES", "PGPE"):
        results[f"evosax {strategy}"] = peer("evosax", {**task, "strategy": strategy}, options.folder, options.limit)
    for label, result in results.items():
        row = {"network": network, "J": J, "what": label, **result, **_ratios(result, results["eki_jax"])}
        if "median" in result:
            row["seconds_per_sample_and_particle"] = result["median"] / (J * networks.BATCH)
        yield row


def _natural(options: Options, network: str, J: int) -> Iterator[Row]:
    full: Row = {}
    for deviations, localized in (("full rank", False), ("rank 1", False), ("rank 1", True)):
        task = {"kind": "natural", "network": network, "J": J, "repeats": options.repeats}
        result = ours({**task, "deviations": deviations, "localized": localized}, options.limit)
        full = full or result
        row = {"network": network, "J": J, "what": deviations + ", localized" * localized, **result}
        if "median" in result and "median" in full:
            row["of_full_rank"] = result["median"] / full["median"]
        yield row


def _per_sample_cases(preset: str) -> list[dict[str, Any]]:
    names, sizes = (("dnn1",), [4]) if preset == "quick" else (("dnn2", "dnn4", "rnn", "cnn-mnist"), [3, 16])
    return [{"network": name, "J": sizes} for name in names]


def _per_sample(options: Options, network: str, J: list[int]) -> Iterator[Row]:
    task = {"kind": "single", "network": network, "repeats": options.repeats}
    results = {what: ours({**task, "what": what}, options.limit) for what in ("forward pass", "backpropagation")}
    cases = {(1, what): result for what, result in results.items()}
    cases |= {(size, "per sample"): ours({**task, "what": "per sample", "J": size}, options.limit) for size in J}
    for (size, what), result in cases.items():
        row = {"network": network, "J": size, "what": what, **result}
        for reference, of in results.items():
            if "median" in result and "median" in of:
                row[f"of {reference}"] = result["median"] / of["median"]
        yield row


def _growth_cases(preset: str) -> list[dict[str, Any]]:
    outputs, particles = {"J": 2000, "M": 400, "P": 8000}, {"J": 1000, "M": 2000, "P": 8000}
    cases = [("outputs", "J", outputs), ("outputs", "P", outputs)]
    # Few outputs are bound by reading the ensemble, so that M grows where the products are what takes the time.
    cases += [("outputs", "M", {"J": 4000, "M": 1000, "P": 8000})]
    # 2 J^2 (M + P) is a sum in M: no power.
    cases += [("particles", "J", particles), ("particles", "P", particles)]
    factors = (0.1, 1.0) if preset == "quick" else (0.2, 0.43, 0.93, 2.0)
    return [
        {"contraction": contraction, "axis": axis, **shape, axis: [int(shape[axis] * factor) for factor in factors]}
        for contraction, axis, shape in cases
    ]


# How the kernel's time grows over a decade: fitted exponents beside the predicted ones.
def _growth(options: Options, contraction: str, axis: str, **shape: Any) -> Iterator[Row]:
    points = []
    for size in shape[axis]:
        task = {**shape, axis: size, "contraction": contraction}
        points.append({**task, **ours({**task, "kind": "kernel", "repeats": options.repeats}, options.limit)})
    yield {"contraction": contraction, "axis": axis, "points": points, **_exponents(axis, points)}


def _exponents(axis: str, points: list[Row]) -> Row:
    if any("median" not in point for point in points):
        return {}
    sizes = np.log([point[axis] for point in points])

    def slope(values: list[float]) -> float:
        return float(np.polyfit(sizes, np.log(values), 1)[0])

    def operations(point: Row) -> int:
        j, m, p = point["J"], point["M"], point["P"]
        return 4 * j * m * p if point["contraction"] == "outputs" else 2 * j * j * (m + p)

    return {
        "fitted": slope([point["median"] for point in points]),
        "fitted_processor": slope([point["processor_median"] for point in points]),
        "predicted": slope([operations(point) for point in points]),
        "cheaper": [cheaper_contraction(point["J"], point["M"], point["P"]) for point in points],
    }


def _precision_cases(preset: str) -> list[dict[str, Any]]:
    return [{"what": label, "training": trainings(preset)} for label in VARIANTS]


def _precision(options: Options, what: str, training: dict[str, list[int]]) -> Iterator[Row]:
    yield measure_precision(what, training)


_LARGE = [("dnn1", 2000), ("dnn2", 2000)]
PARTS = {
    "steps": Part(_step_cases, _steps),
    "frameworks": Part(_networks([("dnn1", 200)], [*_LARGE, ("dnn2", 6000)]), _frameworks),
    "units": Part(_networks([("dnn1", 200)], _LARGE), _units),
    "linear": Part(_linear_cases, _linear),
    "evolution": Part(_networks([("dnn1", 200)], _LARGE), _evolution),
    "natural": Part(_networks([("dnn1", 50)], [("dnn2", 1000), ("dnn4", 1000)]), _natural),
    "per-sample": Part(_per_sample_cases, _per_sample),
    "growth": Part(_growth_cases, _growth),
    "precision": Part(_precision_cases, _precision),
}
