"""What the runs say: mean and spread at every budget, who is ahead, the table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.forward_budget.settings import DISCRETE, GOALS, MILLION, NAMES, RIVALS, TITLES, TUNING_SEED
from benchmarks.harness.command import Refused
from benchmarks.harness.tables import machine, markdown

#: From this budget on the natural gradient is to be ahead.
FROM = 5 * MILLION


def summarized(path: Path, found: dict[str, Any]) -> dict[str, Any]:
    """What the runs of a file say, besides what it says itself.

    Args:
        path: the file, which errors name.
        found: its content.

    Returns:
        The content with ``curves``, those of all seeds by problem and method; the step sizes that were ``chosen``;
        ``results`` at the budgets; ``claims``; and what was ``skipped``, with the reasons.

    Raises:
        Refused: a curve is cut, or the runs of a method are of several settings.
    """
    curves: dict[str, dict[str, list[dict[str, Any]]]] = {}
    remedy = f"run `{found.get('command', 'the command')}` again"
    by_seed: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    skipped = {}
    for name, cell in found.get("cells", {}).items():
        try:
            settings, curve = cell["settings"], cell["found"]
            key = settings["problem"], settings["method"]
            if "skipped" in curve:
                skipped[", ".join(key)] = curve["skipped"]
                continue
            trouble = is_cut(curve, settings["budget"])
            if settings["seed"] != TUNING_SEED:
                by_seed.setdefault(key, {})[settings["seed"]] = cell
        except (KeyError, IndexError, TypeError) as error:
            trouble = f"damaged ({type(error).__name__}: {error})"
        if trouble:
            raise Refused(f"{path}: {name}: {trouble}; {remedy}")
    chosen = {}
    for problem in found.get("budgets", {}):
        for method in NAMES:
            cells = by_seed.get((problem, method), {})
            if not set(found["seeds"]) <= set(cells):
                continue
            of_seeds = [cells[seed] for seed in found["seeds"]]
            curves.setdefault(problem, {})[method] = [cell["found"] for cell in of_seeds]
            first, *others = (cell["settings"] | {"seed": None} for cell in of_seeds)
            if any(other != first for other in others):
                raise Refused(f"{path}: {problem}, {method}: runs of several settings; {remedy}")
            if method in RIVALS:
                chosen[f"{problem} {NAMES[method]}"] = first["learning_rate"]
    results = {
        problem: {method: statistics(of_seeds, found["budgets"][problem]) for method, of_seeds in by_method.items()}
        for problem, by_method in curves.items()
    }
    made = {"curves": curves, "chosen": chosen, "results": results, "claims": claims(results), "skipped": skipped}
    return {**found, **made}


def best_rate(curves: dict[float, dict[str, Any]]) -> float:
    """The step size of the tuning run with the best accuracy at the end."""
    return max(curves, key=lambda rate: curves[rate]["test_accuracy"][-1] or 0.0)


def is_cut(curve: dict[str, Any], budget: int) -> str:
    """What a curve lacks: it has as many numbers of each kind, and its passes are those of the whole budget."""
    lengths = {name: len(curve[name]) for name in ("passes", "seconds", "test_accuracy")}
    if len(set(lengths.values())) > 1 or min(lengths.values()) < 2:
        return f"cut: {lengths}, wanted as many of each, and two at least"
    passes = curve["passes"]
    if passes[-1] + (passes[1] - passes[0]) <= budget:
        return f"cut: {passes[-1]} of {budget} passes"
    return ""


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
        header = ["method", *_millions(budgets), "seconds"]
        rows = [[NAMES[method], *_cells(found, budgets)] for method, found in by_method.items()]
        title = f"### {TITLES[problem]} ({result['parameters'][problem]:,} parameters)"
        lines += [title, "", markdown(header, rows), ""]
    return "\n".join([*lines, _footer(result)])


def derivatives_table(result: dict[str, Any]) -> str:
    """The accuracies on networks with derivatives of noise per sample, its goals, and gradients and others beside."""
    methods = ("natural-eki-per-sample", "msgd", "natural-eki-lowrank", "open-es")
    shown = {name: found for name, found in result["results"].items() if name in TITLES and name not in DISCRETE}
    rows = []
    for problem, found in shown.items():
        budgets, goals = result["budgets"][problem], GOALS.get(problem, {})
        own = [[NAMES[method], *_cells(found[method], budgets)] for method in methods if method in found]
        if goals:
            own.insert(1, ["*goal*", *(f"*{goals[at]:g}*" if at in goals else "" for at in budgets), ""])
        rows += [[TITLES[problem], *row] for row in own]
    header = ["network", "method", *_millions(max((result["budgets"][name] for name in shown), key=len, default=[]))]
    return markdown([*header, "seconds"], rows)


def _millions(budgets: Sequence[int]) -> list[str]:
    return [f"{budget / MILLION:g} M" for budget in budgets]


def _cells(found: dict[str, Any], budgets: Sequence[int]) -> list[str]:
    """The accuracies of one method at the budgets, and its seconds to the last."""
    points = [found.get(str(budget)) for budget in budgets]
    shown = ["–" if point is None else f"{point['mean']:.4f} ± {point['spread']:.4f}" for point in points]
    last = [point for point in points if point is not None]
    return [*shown, f"{last[-1]['seconds']:.1f}" if last else "–"]


def discrete_table(result: dict[str, Any]) -> str:
    """Of the networks without derivatives the accuracies after the first and the last budget, a line a network."""
    methods = ("natural-eki-per-sample", "ste", "natural-eki-lowrank")
    shown = [problem for problem in DISCRETE if problem in result["results"]]
    header, rows = ["network"], []
    for problem in shown:
        budgets = result["budgets"][problem]
        ends = (budgets[0], budgets[-1])
        header = ["network", *(f"{NAMES[m]}, {budget / MILLION:g} M" for m in methods for budget in ends)]
        points = [result["results"][problem].get(m, {}).get(str(budget)) for m in methods for budget in ends]
        cells = ["–" if point is None else f"{point['mean']:.4f} ± {point['spread']:.4f}" for point in points]
        rows.append([TITLES[problem], *cells])
    return markdown(header, rows)


def _footer(result: dict[str, Any]) -> str:
    chosen = ", ".join(f"{key} {value:g}" for key, value in result["chosen"].items())
    return (
        "Test accuracy after that many sample-forward passes (a gradient counts as three), mean ± standard deviation "
        f"over {len(result['seeds'])} seeds; seconds of the steps to the last budget. Step sizes of the evolution "
        f"strategies, chosen from a grid: {chosen or 'none'}. `{result['command']}`, {machine(result['environment'])}."
    )
