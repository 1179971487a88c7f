"""The tables of the EDF experiments as Markdown, from their results."""

from __future__ import annotations

from typing import Any

from benchmarks.forward_budget.summary import at_budget
from benchmarks.harness.tables import machine, markdown


def table(result: dict[str, Any]) -> str:
    """``result`` (of any of the experiments) as a Markdown table, with a line about where it comes from."""
    header, rows = _TABLES[result["experiment"]](result)
    return f"{markdown(header, rows)}\n\n(`{result['command']}`, {machine(result['environment'])})"


def _number(value: float | None) -> str:
    return (
        "not finite" if value is None else f"{value:.2e}" if abs(value) < 0.01 or abs(value) >= 1000 else f"{value:.3f}"
    )


def _convergence(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    last = result["steps"]
    shown = [step for step in (10, 20, 50, 100, 200) if step <= last] or [last]
    header = ["method", *(f"step {step}" for step in shown), "ended", "gradient norm at the end"]
    rows = []
    for name, curve in result["curves"].items():
        losses = curve["losses"]
        values = [_number(losses[step]) if step < len(losses) else "–" for step in shown]
        ended = f"{curve['ended']}, {len(losses) - 1}"
        rows.append([name, *values, ended, _number(curve["gradient_norms"][-1])])
    return header, rows


def _stochastic(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    header = ["method", "gradients a step"]
    for problem in result["problems"]:
        header += [f"{problem}: rate", "training loss", "test error"]
    names = next(iter(result["problems"].values()))
    rows = []
    for name in names:
        row = [name, str(names[name]["gradients_per_step"])]
        for found in result["problems"].values():
            row += _best(found[name])
        rows.append(row)
    return header, rows


def _full_vs_stochastic(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    rows = [[name, *_best(curve)] for name, curve in result["curves"].items()]
    return ["EDF-G", "rate", "training loss", "test error"], rows


def _best(curve: dict[str, Any]) -> list[str]:
    """Rate, training loss and test error at the best of the rates."""
    best = curve["best"]
    return [f"{best['rate']:g}", _number(best["train_loss"][-1]), f"{100 * best['test_error'][-1]:.1f} %"]


def _harness(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    budgets = [round(result["budget"] * share) for share in (0.01, 0.1, 1)]
    rows = []
    for name, curve in result["curves"].items():
        points = [at_budget(curve, budget) for budget in budgets]
        accuracies = ["–" if point is None else f"{point[0]:.4f}" for point in points]
        rows.append([name, str(curve["passes_per_sample"]), *accuracies])
    return ["method", "passes of a sample a step", *(f"{budget:,} passes" for budget in budgets)], rows


_TABLES = {
    "edf convergence": _convergence,
    "edf stochastic": _stochastic,
    "edf full-vs-stochastic": _full_vs_stochastic,
    "edf harness": _harness,
}
