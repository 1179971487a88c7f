"""What the runs say: median and quartiles over seeds at shares of the budget, and the table."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.harness.tables import machine, markdown
from benchmarks.policy.settings import GRIDS, NAMES, OF_GAMES, TASKS, TUNING_SEED

#: Shares of the budget of environment steps that the table shows.
SHARES = (0.1, 0.25, 0.5, 1.0)
# Name of what no policy exceeds, where it is known.
MOST = "the most there is"


def runs_of(found: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """By environment and method the cell of the reported runs, in the order of the settings."""
    by: dict[str, dict[str, dict[str, Any]]] = {}
    for environment in TASKS:
        for method in NAMES:
            cell = found["cells"].get(f"{environment}, {method}")
            if cell is not None and "skipped" not in cell["found"]:
                by.setdefault(environment, {})[method] = cell
    return by


def at_share(cell: dict[str, Any], share: float) -> np.ndarray:
    """Returns of the seeds at the last measurement that a share of the budget pays for."""
    points = cell["settings"]["points"]
    return np.array([row["returns"][int(share * points)] for row in cell["found"]["rows"]])


def middle(values: np.ndarray) -> tuple[float, float, float]:
    """Median and quartiles.

    >>> middle(np.arange(5.0))
    (2.0, 1.0, 3.0)
    """
    return tuple(float(q) for q in np.quantile(values, [0.5, 0.25, 0.75]))  # type: ignore[return-value]


def _spread(numbers: tuple[float, float, float]) -> str:
    """Median and quartiles as a cell shows them, and no zero with a sign.

    >>> _spread((-0.04, -1.25, 500.0))
    '0.0 (-1.2 to 500.0)'
    """
    return "{:.1f} ({:.1f} to {:.1f})".format(*(round(number, 1) + 0.0 for number in numbers))


def at_end(found: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The median return at the end of the budget, by environment and method."""
    by = runs_of(found)
    return {env: {method: middle(at_share(cell, 1.0))[0] for method, cell in row.items()} for env, row in by.items()}


def most_of(found: dict[str, Any], environment: str) -> tuple[float, float] | None:
    """What no policy exceeds on average, and the deviation of one episode from another; None where it is not known."""
    cell = found["cells"].get(f"{environment}, {MOST}")
    return None if cell is None else (cell["found"]["mean"], cell["found"]["deviation"])


def _most(mean: float, deviation: float, episodes: int) -> str:
    """A sentence about it.

    >>> _most(-137.8, 74.0, 64)
    'The most there is, by dynamic programming: -137.8, by the draw of 64 episodes -128.6 to -147.1 (standard error).'
    """
    spread = deviation / episodes**0.5
    drawn = f"by the draw of {episodes} episodes {mean + spread:.1f} to {mean - spread:.1f} (standard error)"
    return f"The most there is, by dynamic programming: {mean:.1f}, {drawn}."


def table(found: dict[str, Any]) -> str:
    """Median and quartiles as Markdown, a table an environment."""
    lines = []
    for environment, row in runs_of(found).items():
        budget = max(cell["settings"]["budget"] for cell in row.values())
        header = ["method", *(f"{share * budget:,.0f} steps" for share in SHARES), "episodes", "seconds", "chosen"]
        body = []
        for method, cell in row.items():
            numbers = [_spread(middle(at_share(cell, share))) for share in SHARES]
            last = [np.median([one[key][-1] for one in cell["found"]["rows"]]) for key in ("episodes", "seconds")]
            setting = GRIDS[method][0]
            chosen = f"{setting.replace('_', ' ')} {cell['settings'][setting]:g}"
            body.append([NAMES[method], *numbers, f"{last[0]:,.0f}", f"{last[1]:.0f}", chosen])
        lines += [f"### {TASKS[environment].title}", "", markdown(header, body), ""]
        if most := most_of(found, environment):
            lines += [f"{_most(*most, next(iter(row.values()))['settings']['test_episodes'])}\n"]
    return "\n".join([*lines, _footer(found)])


def at_the_end(found: dict[str, Any]) -> str:
    """Median and quartiles at the end of the budgets as Markdown, a line a method and a column an environment."""
    by = runs_of(found)
    budget = lambda row: max(cell["settings"]["budget"] for cell in row.values())
    header = ["method", *(f"{TASKS[env].title}, {budget(row):,} steps" for env, row in by.items())]
    number = lambda cell: _spread(middle(at_share(cell, 1.0)))
    rows = [
        [NAMES[method], *(number(row[method]) if method in row else "–" for row in by.values())]
        for method in NAMES
        if any(method in row for row in by.values())
    ]
    most = [most_of(found, env) for env in by]
    if any(most):
        rows.append([MOST, *("–" if one is None else f"{one[0]:.1f}" for one in most)])
    return markdown(header, rows)


def _footer(found: dict[str, Any]) -> str:
    settings = next(iter(found["cells"].values()))["settings"] if found["cells"] else {"test_episodes": 0}
    grids = "; ".join(f"{NAMES[method]}: {name.replace('_', ' ')} {values}" for method, (name, values) in GRIDS.items())
    games = "; ".join(
        f"{NAMES[method]}: {more['copies']} copies of {more['steps']} steps, {values}"
        for method, (more, values) in OF_GAMES.items()
    )
    return (
        f"Return of the greedy policy in {settings['test_episodes']} episodes, which are the same at all points and "
        "not counted, after that many environment steps: median over the seeds (and quartiles); episodes and seconds "
        f"to the end. Learning rates of the policy gradients fall to zero on the way, and settings were chosen with "
        f"seed {TUNING_SEED}, on half of the budget, from grids ({grids}; on MinAtar {games}). "
        f"`{found['command']}`, {machine(found['environment'])}."
    )
