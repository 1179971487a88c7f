"""The parts of a run: lists of measurements that belong side by side, and what is derived from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.performance import networks
from benchmarks.performance.jobs import ours, peer
from eki_jax.kernel.products import cheaper_contraction

Row = dict[str, Any]


class Options(NamedTuple):
    """What all parts share.

    Attributes:
        preset: "quick", "default" or "full".
        folder: where the other libraries' environments are.
        repeats: the least number of timed calls.
        limit: seconds for one measurement's process.
    """

    preset: str
    folder: Path
    repeats: int
    limit: float


_STEPS = {
    "quick": [("dnn1", 200), ("rnn", 50)],
    "default": [("dnn1", 200), ("dnn1", 2000), ("dnn1", 6000), ("dnn2", 200), ("dnn2", 2000), ("dnn2", 6000),
                ("dnn4", 200), ("dnn4", 2000), ("rnn", 200), ("rnn", 2000), ("cnn-mnist", 50)],
    "full": [(name, size) for name in ("dnn1", "dnn2", "dnn4", "cnn-mnist", "rnn") for size in (200, 2000, 6000)],
}  # fmt: skip


def steps(options: Options) -> Iterator[Row]:
    """(a) The step's rate over the machine's own, by network and ensemble size; and momentum's memory."""
    jobs = [(name, size, "euler") for name, size in _STEPS[options.preset]]
    jobs += {"quick": [("dnn1", 200, "nesterov")]}.get(
        options.preset, [("dnn1", 2000, "nesterov"), ("dnn2", 2000, "nesterov"), ("dnn3", 2000, "nesterov"),
                         ("dnn4", 2000, "nesterov")]
    )  # fmt: skip
    for name, size, solver in jobs:
        task = {"kind": "step", "network": name, "J": size, "solver": solver, "repeats": options.repeats}
        yield _step_row(name, size, solver, ours(task, options.limit))


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


def frameworks(options: Options) -> Iterator[Row]:
    """(b) The same step as the paper states it, in PyTorch and in plain JAX, beside this library's."""
    cases = {"quick": [("dnn1", 200)]}.get(options.preset, [("dnn1", 2000), ("dnn2", 2000), ("dnn2", 6000)])
    for name, size in cases:
        task = {"network": name, "J": size, "repeats": options.repeats, "batch": networks.BATCH}
        task["widths"] = list(networks.WIDTHS[name])
        results = {
            "eki_jax": ours({**task, "kind": "step"}, options.limit),
            "PyTorch": peer("torch", task, options.folder, options.limit),
            "plain JAX": ours({**task, "kind": "plain"}, options.limit),
            "eki_jax bf16": ours({**task, "kind": "step", "precision": "bf16"}, options.limit),
        }
        for label, result in results.items():
            row = _step_row(name, size, label, result)
            yield row | _ratios(result, results["eki_jax"])


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


def linear_problems(options: Options) -> Iterator[Row]:
    """(c) One assimilation of a linear inverse problem, by libraries that offer the Kalman step."""
    every = [(p, m, j) for p in (10**3, 10**5, 10**6) for m in (100, 1000, 10_000) for j in (100, 500)]
    few = [(1000, 100, 100), (1000, 10_000, 500), (10**5, 100, 500), (10**5, 1000, 100), (10**6, 1000, 100)]
    cases = {"quick": few[:1], "default": few, "full": every}[options.preset]
    for parameters, data, size in cases:
        task = {"P": parameters, "M": data, "J": size, "repeats": options.repeats}
        kalman = ours({**task, "kind": "linear", "method": "kalman"}, options.limit)
        results = {
            "eki_jax kalman": kalman,
            "eki_jax euler": ours({**task, "kind": "linear", "method": "euler"}, options.limit),
        }
        results |= {name: peer(name, task, options.folder, options.limit) for name in _LIBRARIES}
        for label, result in results.items():
            yield {"P": parameters, "M": data, "J": size, "what": label, **result, **_ratios(result, kalman)}


def evolution(options: Options) -> Iterator[Row]:
    """(d) A generation of evosax's strategies with the same network: seconds per particle and training sample."""
    cases = {"quick": [("dnn1", 200)]}.get(options.preset, [("dnn1", 2000), ("dnn2", 2000)])
    for name, size in cases:
        task = {"J": size, "batch": networks.BATCH, "widths": list(networks.WIDTHS[name]), "repeats": options.repeats}
        mine = ours({**task, "kind": "step", "network": name}, options.limit)
        results = {"eki_jax": mine}
        for strategy in ("Open_ES", "PGPE"):
            results[f"evosax {strategy}"] = peer(
                "evosax", {**task, "strategy": strategy}, options.folder, options.limit
            )
        for label, result in results.items():
            row = {"network": name, "J": size, "what": label, **result, **_ratios(result, mine)}
            if "median" in result:
                row["seconds_per_sample_and_particle"] = result["median"] / (size * networks.BATCH)
            yield row


def natural(options: Options) -> Iterator[Row]:
    """A step of the natural gradient: rank-1 deviations beside full-rank ones."""
    cases = {"quick": [("dnn1", 50)]}.get(options.preset, [("dnn2", 1000), ("dnn4", 1000)])
    for name, size in cases:
        full: Row = {}
        for deviations, localized in (("full rank", False), ("rank 1", False), ("rank 1", True)):
            task = {"kind": "natural", "network": name, "J": size, "repeats": options.repeats}
            result = ours({**task, "deviations": deviations, "localized": localized}, options.limit)
            full = full or result
            row = {"network": name, "J": size, "what": deviations + ", localized" * localized, **result}
            if "median" in result and "median" in full:
                row["of_full_rank"] = result["median"] / full["median"]
            yield row


def per_sample(options: Options) -> Iterator[Row]:
    """A step with noise of a sample's own beside a step of backpropagation, and beside a forward pass."""
    names, sizes = {"quick": (("dnn1",), (4,))}.get(options.preset, (("dnn2", "dnn4", "rnn", "cnn-mnist"), (9, 64)))
    for name in names:
        task = {"kind": "single", "network": name, "repeats": options.repeats}
        results = {what: ours({**task, "what": what}, options.limit) for what in ("forward pass", "backpropagation")}
        cases = {(1, what): result for what, result in results.items()}
        cases |= {
            (size, "per sample"): ours({**task, "what": "per sample", "J": size}, options.limit) for size in sizes
        }
        for (size, what), result in cases.items():
            row = {"network": name, "J": size, "what": what, **result}
            for reference, of in results.items():
                if "median" in result and "median" in of:
                    row[f"of {reference}"] = result["median"] / of["median"]
            yield row


def growth(options: Options) -> Iterator[Row]:
    """How the kernel's time grows with J, P and M over a decade each: fitted exponents beside the predicted ones."""
    outputs, particles = {"J": 2000, "M": 400, "P": 8000}, {"J": 1000, "M": 2000, "P": 8000}
    cases = [("outputs", "J", outputs), ("outputs", "P", outputs)]
    # Few outputs are bound by reading the ensemble, so that M grows where the products are what takes the time.
    cases += [("outputs", "M", {"J": 4000, "M": 1000, "P": 8000})]
    # 2 J^2 (M + P) is a sum in M: no power.
    cases += [("particles", "J", particles), ("particles", "P", particles)]
    factors = (0.1, 1.0) if options.preset == "quick" else (0.2, 0.43, 0.93, 2.0)
    for contraction, axis, shape in cases:
        points = []
        for factor in factors:
            task = {**shape, axis: int(shape[axis] * factor), "contraction": contraction}
            result = ours({**task, "kind": "kernel", "repeats": options.repeats}, options.limit)
            points.append({**task, **result})
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


def precisions(options: Options) -> Iterator[Row]:
    """What lower precision costs in accuracy: the direction's error, and the accuracy after training."""
    from benchmarks.performance.precision import measure_precisions

    yield from measure_precisions(options.preset)


PARTS: dict[str, Callable[[Options], Iterator[Row]]] = {
    "steps": steps,
    "frameworks": frameworks,
    "linear": linear_problems,
    "evolution": evolution,
    "natural": natural,
    "per-sample": per_sample,
    "growth": growth,
    "precision": precisions,
}
