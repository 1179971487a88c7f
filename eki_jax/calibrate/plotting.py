"""Pictures of a calibration: parameters against iterations, data beside predictions, pairs of parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from eki_jax.calibrate.extras import extra
from eki_jax.calibrate.history import Iteration
from eki_jax.calibrate.joint import JointPrior
from eki_jax.calibrate.observations import Observations

PRIOR, POSTERIOR, DATA = "#8c8c8c", "#1f6f8b", "#c1440e"
_MOST_PANELS, _MOST_PAIRS, _MOST_ENTRIES = 12, 6, 6
_BAND = (0.05, 0.5, 0.95)


class Picture(NamedTuple):
    """What is drawn.

    Attributes:
        prior: prior of the parameters.
        observations: data and noise.
        history: iterations so far.
        current: physical values of the healthy members now, shape (N, ...) for each parameter.
        predictions: outputs of the members now, shape (N, ...) by their names; None where they were not run.
    """

    prior: JointPrior
    observations: Observations
    history: Sequence[Iteration]
    current: Mapping[str, np.ndarray]
    predictions: Mapping[str, np.ndarray] | None


def draw(picture: Picture, what: str) -> Any:
    """A matplotlib figure.

    Args:
        picture: data of the figure.
        what: kind, "parameters", "data", "pairs" or "all".
    """
    figures = extra("matplotlib.figure")
    parameters, pairs = min(len(_columns_of_panels(picture.prior)), _MOST_PANELS), min(picture.prior.size, _MOST_PAIRS)
    outputs = len(picture.observations.shapes)
    heights = {
        "parameters": 2.3 * _rows(parameters) + 0.5,
        "data": 2.6 * _rows(outputs) + 0.5,
        "pairs": min(1.7 * pairs, 8.5) + 0.6,
    }
    drawers = {"parameters": _parameters, "data": _data, "pairs": _pairs}
    chosen = list(drawers) if what == "all" else [what]
    if what == "all" and picture.prior.size < 2:
        chosen.remove("pairs")
    sizes = [heights[name] for name in chosen]
    figure = figures.Figure(figsize=(9, sum(sizes)), layout="constrained")
    parts = figure.subfigures(len(chosen), 1, height_ratios=sizes, squeeze=False)[:, 0]
    for name, part in zip(chosen, parts, strict=True):
        drawers[name](part, picture)
    return figure


def _rows(panels: int) -> int:
    return -(-panels // _columns(panels))


def _columns(panels: int) -> int:
    return min(panels, 3 if panels != 4 else 2)


def _columns_of_panels(prior: JointPrior) -> list[slice]:
    """The numbers that each panel shows: one, or those of an array that has more entries than a few."""
    found, start = [], 0
    for shape in prior.shapes.values():
        size = math.prod(shape)
        width = size if size > _MOST_ENTRIES else 1
        found += [slice(first, first + width) for first in range(start, start + size, width)]
        start += size
    return found


def _chosen(prior: JointPrior, most: int) -> list[int]:
    """At most so many of all numbers: some of every parameter, spread over its entries."""
    sizes = [math.prod(shape) for shape in prior.shapes.values()]
    shares = [0] * len(sizes)
    while sum(shares) < min(most, prior.size):
        # One more for that which has the fewest of those that have any left; the first of them.
        shares[min((i for i, size in enumerate(sizes) if shares[i] < size), key=shares.__getitem__)] += 1
    ends = np.cumsum(sizes)
    return [
        int(end - size + place * size // share)
        for end, share, size in zip(ends, shares, sizes, strict=True)
        for place in range(share)
    ]


def _flat(values: Mapping[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([np.reshape(part, (len(part), -1)) for part in values.values()], axis=1)


def _panels(figure: Any, number: int) -> list[Any]:
    rows, columns = _rows(number), _columns(number)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for unused in axes[number:]:
        unused.set_axis_off()
    return list(axes[:number])


def _titled(figure: Any, text: str, shown: int, of: int, what: str) -> None:
    figure.suptitle(text if shown == of else f"{text} ({shown} of {of} {what})", fontsize=11)


def _parameters(figure: Any, picture: Picture) -> None:
    """Medians with bands from the 5th to the 95th percentile, the exact prior beside them; arrays as they are now."""
    panels = _columns_of_panels(picture.prior)
    shown, before = panels[:_MOST_PANELS], "prior, 5 to 95 %"
    rows = [_flat({n: v[i.healthy] for n, v in i.parameters.items()}) for i in picture.history] + [
        _flat(picture.current)
    ]
    bands = np.stack([np.quantile(row, _BAND, axis=0) for row in rows])
    prior = np.stack([_flat({n: v[None] for n, v in picture.prior.quantile(p).items()})[0] for p in _BAND])
    for axes, columns in zip(_panels(figure, len(shown)), shown, strict=True):
        name, (low, middle, high) = picture.prior.names[columns.start], prior[:, columns]
        if len(middle) == 1:
            places, now = np.arange(len(rows)), bands[:, :, columns.start].T
            axes.axhspan(low[0], high[0], color=PRIOR, alpha=0.15, lw=0, label=before)
            axes.axhline(middle[0], color=PRIOR, lw=1, ls="--")
            axes.set(title=name, xlabel="iteration", xlim=(0, max(places[-1], 1)))
        else:
            places, now = np.arange(len(middle)), bands[-1][:, columns]
            axes.fill_between(places, low, high, color=PRIOR, alpha=0.15, lw=0, label=before)
            axes.plot(places, middle, color=PRIOR, lw=1, ls="--")
            axes.set(title=name.partition("[")[0], xlabel=f"entry, after iteration {len(rows) - 1}")
            axes.set_xlim(0, places[-1])
        axes.fill_between(places, now[0], now[2], color=POSTERIOR, alpha=0.3, lw=0, label="members, 5 to 95 %")
        axes.plot(places, now[1], "-o", color=POSTERIOR, ms=3, lw=1.5, label="median")
        axes.title.set_fontsize(10)
        axes.xaxis.get_major_locator().set_params(integer=True)
    _legend(figure)
    _titled(figure, "Parameters", len(shown), len(panels), "panels")


def _data(figure: Any, picture: Picture) -> None:
    """Data with two standard deviations of the noise, beside what the first members and the last ones predict."""
    wanted = picture.observations
    data, sd = (wanted.split(row[None]) for row in (wanted.data, wanted.sd()))
    last: Mapping[str, np.ndarray] | None = picture.predictions
    label = "posterior's predictions"
    if last is None and picture.history:
        last, label = _healthy_outputs(picture.history[-1]), f"iteration {len(picture.history)}, before its step"
    first = _healthy_outputs(picture.history[0]) if picture.history else None
    names = list(wanted.shapes)
    for axes, name in zip(_panels(figure, len(names)), names, strict=True):
        values, spread = data[name].ravel(), sd[name].ravel()
        place = np.arange(len(values))
        for outputs, color, text in ((first, PRIOR, "prior's predictions"), (last, POSTERIOR, label)):
            if outputs is not None:
                _band(axes, place, np.reshape(outputs[name], (len(outputs[name]), -1)), color, f"{text}, 5 to 95 %")
        many = len(values) > 60
        axes.errorbar(
            place,
            values,
            2 * spread,
            fmt="o",
            color=DATA,
            ms=1.5 if many else 3.5,
            elinewidth=0.5 if many else 1,
            zorder=3,
            label="data, two standard deviations",
        )
        axes.set(title=name, xlabel="entry", xlim=(-0.5, len(values) - 0.5))
        axes.title.set_fontsize(10)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if len(values) == 1:
            axes.set(xlabel="", xticks=[])
    _legend(figure)
    figure.suptitle("Data and predictions", fontsize=11)


def _legend(figure: Any) -> None:
    """One for all panels, below them."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8, frameon=False)


def _band(axes: Any, place: np.ndarray, rows: np.ndarray, color: str, label: str) -> None:
    low, middle, high = np.full((3, len(place)), np.nan)
    some = np.isfinite(rows).any(axis=0)  # what was not observed may be NaN in all of them
    low[some], middle[some], high[some] = np.nanquantile(rows[:, some], _BAND, axis=0)
    if len(place) == 1:  # a band of one point is none
        place, low, middle, high = (np.repeat(part, 2) for part in (place, low, middle, high))
        place = place + np.array([-0.3, 0.3])
    axes.fill_between(place, low, high, color=color, alpha=0.3, lw=0, label=label)
    axes.plot(place, middle, color=color, lw=1.2)


def _healthy_outputs(iteration: Iteration) -> dict[str, np.ndarray]:
    return {name: values[iteration.healthy] for name, values in iteration.outputs.items()}


def _pairs(figure: Any, picture: Picture) -> None:
    """Histograms on the diagonal, scatter plots below it, as near as the members now are."""
    chosen = _chosen(picture.prior, _MOST_PAIRS)
    number, names = len(chosen), [picture.prior.names[place] for place in chosen]
    prior, now = _flat(_first(picture))[:, chosen], _flat(picture.current)[:, chosen]
    grid = figure.subplots(number, number, squeeze=False)
    for i in range(number):
        widest, least, most = np.quantile(prior[:, i], [0.005, 0.995]), now[:, i].min(), now[:, i].max()
        low = min(least, max(widest[0], least - 0.75 * (most - least)))
        high = max(most, min(widest[1], most + 0.75 * (most - least)))
        edges = np.linspace(low, high, 25)
        for j in range(number):
            axes = grid[i, j]
            if j > i:
                axes.set_axis_off()
            elif i == j:
                weight = np.full(len(prior), 1 / (len(prior) * (edges[1] - edges[0])))  # part of it is out of sight
                axes.hist(prior[:, i], edges, weights=weight, color=PRIOR, alpha=0.35, label="prior")
                axes.hist(now[:, i], edges, density=True, color=POSTERIOR, alpha=0.7, label="members")
                axes.set(yticks=[], xlim=(low, high))
            else:
                axes.plot(prior[:, j], prior[:, i], ".", color=PRIOR, ms=2, alpha=0.4)
                axes.plot(now[:, j], now[:, i], ".", color=POSTERIOR, ms=4, alpha=0.8)
                axes.sharex(grid[j, j])
                axes.set_ylim(low, high)
            axes.tick_params(labelsize=7, labelleft=j == 0 and i > 0, labelbottom=i == number - 1)
            if i == number - 1:
                axes.set_xlabel(names[j], fontsize=9)
            if j == 0 and i > 0:
                axes.set_ylabel(names[i], fontsize=9)
    _legend(figure)
    _titled(figure, "Pairs of parameters", number, picture.prior.size, "numbers")


def _first(picture: Picture) -> dict[str, np.ndarray]:
    """Draws of the prior, always the same ones."""
    numbers = np.random.default_rng(0)
    return picture.prior.to_physical({name: numbers.normal(size=(1000, n)) for name, n in picture.prior.sizes.items()})
