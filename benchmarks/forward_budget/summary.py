"""What the runs say: mean and spread at every budget, who is ahead, the table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.forward_budget.settings import MILLION, NAMES, RIVALS, TITLES
from benchmarks.harness.tables import markdown

#: From this budget on the natural gradient is to be ahead.
FROM = 5 * MILLION


def at_budget(run: dict[str, Any], budget: int) -> tuple[float, float] | None:
    """Accuracy and seconds of the last measurement that the budget pays for; None before the first."""
    index = int(np.searchsorted(run["passes"], budget, side="right")) - 1
    return None if index < 1 else (run["test_accuracy"][index], run["seconds"][index])


def statistics(runs: Sequence[dict[str, Any]], budgets: Sequence[int]) -> dict[str, dict[str, float]]:
    """Mean, standard deviation over the seeds, least and largest accuracy, and mean seconds, by budget."""
    found = {}
    for budget in budgets:
        points = [at_budget(run, budget) for run in runs]
        if not points or any(point is None for point in points):
            continue
        accuracies, seconds = np.array(points, float).T
        found[str(budget)] = {
            "mean": float(accuracies.mean()),
            "spread": float(accuracies.std(ddof=1)) if len(accuracies) > 1 else 0.0,
            "least": float(accuracies.min()),
            "most": float(accuracies.max()),
            "seconds": float(seconds.mean()),
            "seeds": len(accuracies),
        }
    return found


def claims(results: dict[str, dict[str, Any]], start: int = FROM) -> list[dict[str, Any]]:
    """For every problem, natural method, rival and budget from ``start`` on: the lead, and whether it is clear.

    Clear is a lead larger than the two methods' standard deviations over the seeds together, where every seed of the
    natural method beats every seed of the rival.
    """
    found = []
    for problem, by_method in results.items():
        for ours in ("natural-eki-per-sample", "natural-eki-lowrank", "natural-eki"):
            for rival in RIVALS:
                a, b = (by_method.get(name, {}) for name in (ours, rival))
                for budget in (key for key in a if key in b and int(key) >= start):
                    lead, spread = a[budget]["mean"] - b[budget]["mean"], a[budget]["spread"] + b[budget]["spread"]
                    found.append(
                        {
                            "problem": problem,
                            "method": ours,
                            "rival": rival,
                            "budget": int(budget),
                            "lead": lead,
                            "spread": spread,
                            "holds": bool(lead > spread and a[budget]["least"] > b[budget]["most"]),
                        }
                    )
    return found


def table(result: dict[str, Any]) -> str:
    """The accuracies as Markdown, one table a problem; problems without a finished run are left out."""
    lines = []
    for problem, by_method in result["results"].items():
        if not by_method:
            continue
        budgets = result["budgets"][problem]
        header, rows = ["method", *(f"{budget / MILLION:g} M" for budget in budgets), "seconds"], []
        for method, found in by_method.items():
            row = [NAMES[method]]
            for budget in budgets:
                point = found.get(str(budget))
                row.append("–" if point is None else f"{point['mean']:.4f} ± {point['spread']:.4f}")
            last = [found[str(budget)] for budget in budgets if str(budget) in found]
            row.append(f"{last[-1]['seconds']:.1f}" if last else "–")
            rows.append(row)
        title = f"### {TITLES[problem]} ({result['parameters'][problem]:,} parameters)"
        lines += [title, "", markdown(header, rows), ""]
    return "\n".join([*lines, _footer(result)])


def _footer(result: dict[str, Any]) -> str:
    environment = result["environment"]
    chosen = ", ".join(f"{key} {value:g}" for key, value in result["chosen"].items())
    return (
        "Test accuracy after that many sample-forward passes (a gradient counts as three), mean ± standard deviation "
        f"over {len(result['seeds'])} seeds; seconds of the steps to the last budget. Step sizes of the evolution "
        f"strategies, chosen from a grid: {chosen or 'none'}. `{result['command']}`, {environment['device']}, "
        f"{environment['processors']} processors, jax {environment['versions']['jax']}."
    )
