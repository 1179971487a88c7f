"""Figure 14: one-step-ahead prediction of a time series, learned online, one sample at a time.

What the paper leaves open, and what is taken here:

* The number of passes over the training part: 20 for EKI. OGD makes 80, the same number of forward passes if a
  gradient counts for three. The table's "first" and "final" are the first and the last pass.
* The loss of a sample is the squared error itself, without a factor of one half; step size and prior are the paper's,
  biases drawn like the weights.
* The particles are redrawn around their mean between passes (EKI(R), which the paper uses "unless stated otherwise"),
  with noise of 1/2, 1/4, 1/6, ... of the prior's standard deviation after the passes: the slides scale this noise by
  a function of the epoch. Without any redrawing the median over six seeds was 5 % worse for the temperatures and 20 %
  worse for the sunspots; with noise that does not decay twelve particles never settled.
* The hidden state starts every pass at zero; on the test part, which follows the training part without a gap, it goes
  on from where the last pass left it (the mean over the particles).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import eki_jax
from benchmarks.harness.figures import band, legend, panels, save
from benchmarks.paper.common import Found, row, skipped, timed
from benchmarks.paper.experiments import title
from benchmarks.problems.files import MissingFile
from benchmarks.problems.tables import Series
from eki_jax.flax import TanhRNN, linen_forward
from eki_jax.online import learn_stream, online, predict_stream

UNITS, PARTICLES, RATE, NOISE = 32, 12, 1e-3, 0.5
SHOWN = 150  # samples of the test part in the picture
OGD_PASSES = PARTICLES // 3  # for every pass of EKI


class Settings(NamedTuple):
    """The size of a run."""

    seeds: int
    passes: int
    samples: int | None  # of the training part; None for all


PRESETS = {"smoke": Settings(2, 2, 200), "cpu": Settings(20, 20, None), "full": Settings(20, 20, None)}


class Learned(NamedTuple):
    """What one seed leaves behind.

    Attributes:
        curve: test error after every pass, of the mean particle.
        best: test error after every pass, of the best particle.
        fit: predictions over the test part after the last pass.
    """

    curve: jax.Array
    best: jax.Array
    fit: jax.Array


def measure_series(load: Any, paper: dict[str, float], preset: str, data: Path | None, seed: int) -> Found:
    """EKI and OGD over the same seeds."""
    settings = PRESETS[preset]
    try:
        series = load(data)
    except MissingFile as error:
        rows = [skipped(name.split("_")[0], name.split("_")[1], value, error.reason) for name, value in paper.items()]
        return Found({"rows": rows})
    series = series._replace(train_x=series.train_x[: settings.samples], train_y=series.train_y[: settings.samples])
    keys = jax.random.split(jax.random.key(seed), settings.seeds)
    eki, seconds = timed(learn_by_eki, series, settings, keys)
    ogd, ogd_seconds = timed(learn_by_ogd, series, settings, keys)
    samples = settings.seeds * len(series.train_x)
    rows, numbers = [], {}
    for name, learned, passes in (("ogd", ogd, 3), ("eki", eki, PARTICLES)):
        for moment, index in (("first", 0), ("final", -1)):
            values = learned.curve[:, index]
            numbers |= {f"{name}_{moment}": np.median(values), f"{name}_{moment}_best_seed": values.min()}
            note = f"{learned.curve.shape[1]} passes"
            rows.append(row(name.upper(), f"test error, {moment} pass", paper[f"{name}_{moment}"], values, note))
        numbers[f"{name}_forward_passes"] = passes * learned.curve.shape[1] * len(series.train_x)
    rows.append(row("EKI, best particle", "test error, final pass", None, eki.best[:, -1]))
    numbers |= {
        "eki_final_best_particle": np.median(eki.best[:, -1]),
        "eki_samples_a_second": samples * eki.curve.shape[1] / seconds,
        "ogd_samples_a_second": samples * ogd.curve.shape[1] / ogd_seconds,
        "persistence_error": np.mean((series.test_x - series.test_y) ** 2),
    }
    details = {
        "settings": settings._asdict() | {"units": UNITS, "particles": PARTICLES, "ogd_rate": RATE, "noise": NOISE},
        "curves": {"eki": eki.curve, "ogd": ogd.curve, "eki_best_particle": eki.best},
        "shown": shown(series, {"OGD": ogd, "EKI": eki}),
    }
    return Found(numbers | {"rows": rows}, details)


def shown(series: Series, methods: dict[str, Learned]) -> dict[str, np.ndarray]:
    """The beginning of the test part as it was measured, and as each method's median seed predicts it."""
    scale = lambda values: series.minimum + (series.maximum - series.minimum) * values[:SHOWN]
    middle = lambda learned: np.argsort(learned.curve[:, -1])[len(learned.curve) // 2]
    fits = {name: scale(learned.fit[middle(learned)]) for name, learned in methods.items()}
    return {"series": scale(series.test_y[:, 0]), **fits}


def network() -> tuple[Any, Any]:
    """The one-layer network as a cell of one sample, and the shapes of its parameters."""
    module = TanhRNN(units=UNITS, layers=1, outputs=1)
    return linen_forward(module, jnp.zeros(UNITS), jnp.zeros(1), method="step")


def learn_by_eki(series: Series, settings: Settings, keys: jax.Array) -> Learned:
    """Twelve particles for every key; arrays with a leading axis of the keys."""
    cell, template = network()
    prior = eki_jax.xavier(template)
    learner = online(cell, eki_jax.euler(None, squared_error, eki_jax.paper_step_size()))
    samples = (jnp.asarray(series.train_x), jnp.asarray(series.train_y))
    zero = jnp.zeros(UNITS)

    def one(key: jax.Array) -> Learned:
        start_key, noise_key = jax.random.split(key)

        def one_pass(ensemble: Any, inputs: tuple[jax.Array, jax.Array]) -> tuple[Any, tuple[jax.Array, ...]]:
            noise_key, number = inputs
            state, _ = learn_stream(learner, learner.init(ensemble, zero), samples)
            ensemble, hidden = state.solver.ensemble, state.carry
            error, fit = _test(cell, eki_jax.mean_particle(ensemble), hidden.mean(0), series)
            best = jax.vmap(lambda u, h: _test(cell, u, h, series)[0])(ensemble, hidden).min()
            redrawn = eki_jax.resample_around_mean(noise_key, ensemble, prior, scale=NOISE / (1 + number))
            return redrawn, (error, best, fit)

        ensemble = eki_jax.sample_ensemble(start_key, prior, PARTICLES)
        numbers = (jax.random.split(noise_key, settings.passes), jnp.arange(settings.passes))
        _, (curve, best, fits) = jax.lax.scan(one_pass, ensemble, numbers)
        return Learned(curve, best, fits[-1])

    return jax.jit(lambda keys: jax.lax.map(one, keys))(keys)


def learn_by_ogd(series: Series, settings: Settings, keys: jax.Array) -> Learned:
    """Online gradient descent from one draw of the prior; the derivative of one step, the hidden state held fixed."""
    cell, template = network()
    prior = eki_jax.xavier(template)
    transformation = optax.sgd(RATE)
    samples = (jnp.asarray(series.train_x), jnp.asarray(series.train_y))

    def loss(params: Any, hidden: jax.Array, x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        hidden, output = cell(params, hidden, x)
        return squared_error(output, y), hidden

    def step(carry: tuple[Any, Any, jax.Array], sample: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
        params, inner, hidden = carry
        gradients, hidden = jax.grad(loss, has_aux=True)(params, hidden, *sample)
        updates, inner = transformation.update(gradients, inner, params)
        return (optax.apply_updates(params, updates), inner, hidden), None

    def one(key: jax.Array) -> Learned:
        def one_pass(params: Any, _: None) -> tuple[Any, tuple[jax.Array, jax.Array]]:
            start = (params, transformation.init(params), jnp.zeros(UNITS))
            (params, _inner, hidden), _ = jax.lax.scan(step, start, samples)
            return params, _test(cell, params, hidden, series)

        _, (curve, fits) = jax.lax.scan(one_pass, prior.sample(key), None, length=OGD_PASSES * settings.passes)
        return Learned(curve, curve, fits[-1])

    return jax.jit(lambda keys: jax.lax.map(one, keys))(keys)


def squared_error(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """The squared distance, without a factor of one half."""
    return jnp.sum((outputs - targets) ** 2)


def _test(cell: Any, params: Any, hidden: jax.Array, series: Series) -> tuple[jax.Array, jax.Array]:
    _, outputs = predict_stream(cell, params, hidden, jnp.asarray(series.test_x))
    return jnp.mean((outputs - series.test_y) ** 2), outputs[:, 0]


def draw(result: dict[str, Any], path: Path) -> None:
    """Test errors after every pass; and what each method predicts, of whose samples all would hide each other."""
    figure, ((errors, *fits),) = panels(1, 3, (13, 3.6), width_ratios=(1, 1.3, 1.3))
    for name, color, axis in zip(("OGD", "EKI"), ("tab:orange", "tab:blue"), fits, strict=True):
        curve = np.array(result["curves"][name.lower()])
        quantiles = np.quantile(curve, [0.1, 0.5, 0.9], axis=0)
        band(errors, np.arange(1, curve.shape[1] + 1), *quantiles, color=color, label=name)
        last = "test error, final pass"
        (paper,) = (row["paper"] for row in result["rows"] if (row["name"], row["quantity"]) == (name, last))
        errors.axhline(paper, color=color, linestyle=":")
        axis.plot(result["shown"][name], color=color, linewidth=2.5, alpha=0.7)
        axis.plot(result["shown"]["series"], color="0.15", linewidth=0.8)
        axis.plot([], [], color="0.15", linewidth=0.8, label="series")
        axis.plot([], [], color=color, linewidth=2.5, alpha=0.7, label=f"{name}, median seed")
        axis.set(title=f"{name} on the test part, first {len(result['shown'][name])} samples", xlabel="sample")
        legend(axis)
    errors.set(xlabel="pass over the training part", ylabel="test error", xscale="log", yscale="log")
    errors.set_title("Median, 10 % to 90 % of the seeds")
    legend(errors, "dotted: the paper's final error")
    figure.suptitle(title(result["experiment"]), fontsize=10)
    save(figure, path)
