"""``python -m benchmarks deviations``: how near to the gradient each kind of deviations comes, and what it learns by.

Three characters of the text that ``import this`` prints predict the next: 853 predictions in one batch, by an embedding
and two dense layers of 5,728 parameters. The same model and text have published figures of node perturbation.
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import eki_jax
from benchmarks.harness import experiment, figures
from benchmarks.harness.command import Parser, command, folder
from benchmarks.harness.experiment import Experiment
from benchmarks.harness.store import Cells
from benchmarks.harness.tables import machine, markdown
from eki_jax import natural

LOSS = natural.softmax_cross_entropy()
WIDTHS = {"e": (32, 16), "w": (48, 64), "b": (64,), "v": (64, 32), "c": (32,)}
# Scale of the noise: of layers' outputs for noise per sample, of single weights for the others.
SIGMA, SIGMA_OF_WEIGHTS = 0.05, 0.01
# Of what is learned of slopes: 853 predictions in every step are soon enough.
DECAY = 0.9
# So much that the matrix of the outputs does not count, and a step is along the gradient.
DAMPING = 1e6
# Descent by the exact gradient, of rate 1, at whose start and end estimates are compared with it.
TRAINED = 30
# Adam's steps and rate, by the estimates.
STEPS, RATE = 150, 0.03
GRADIENT = "backpropagation"
# What was to be reached: cosines at the start and after training, by particles; the loss is backpropagation's.
GOALS = {("start", 48): 0.95, ("start", 192): 0.999, ("trained", 192): 0.95}


class Preset(NamedTuple):
    """A size of the comparison.

    Attributes:
        particles: numbers of them.
        draws: noises that a cosine is the mean of.
        averages: numbers of estimates whose mean is compared.
        seeds: starts of the runs.
        learned: numbers of particles of the runs, each with the scale of its noise and the kinds that learn so.
        steps: steps of the runs.
    """

    particles: tuple[int, ...]
    draws: int
    averages: tuple[int, ...]
    seeds: tuple[int, ...]
    learned: tuple[tuple[int, float, tuple[str, ...]], ...]
    steps: int = STEPS


_NOISY = ("covariance", "least-squares", "outputs", "answers")
# More particles than numbers that reach a sample behind its layers need no feedback; what is left is the noise's size.
_MANY = (192, 0.003, _NOISY[:2])
PRESETS = {
    "smoke": Preset((4,), 2, (1, 2), (0, 1), ((4, SIGMA, _NOISY),), 3),
    "cpu": Preset((12, 48, 192), 3, (1, 4, 16), (0, 1, 2), ((12, SIGMA, _NOISY), (48, SIGMA, _NOISY), _MANY)),
}
PRESETS["full"] = PRESETS["cpu"]._replace(particles=(12, 48, 192, 768), seeds=(0, 1, 2, 3, 4))


class Kind(NamedTuple):
    """A kind of deviations.

    Attributes:
        label: what it is, in a few words.
        solver: function of the number of particles, the scale of the noise, and an optimizer.
        sigma: scale of the noise in cosines.
    """

    label: str
    solver: Callable[[int, float, Any], eki_jax.Solver]
    sigma: float = SIGMA


def batch() -> tuple[jax.Array, jax.Array]:
    """The characters before each, and each, as numbers."""
    with contextlib.redirect_stdout(io.StringIO()):
        import this
    text = codecs.decode(this.s, "rot13").strip().lower()  # what it prints, the first time alone
    numbers = np.searchsorted(sorted(set(text)), list(text))
    return jnp.asarray(np.stack([numbers[i : i - 3] for i in range(3)], axis=1)), jnp.asarray(numbers[3:])


def forward(params: Any, x: jax.Array) -> jax.Array:
    """Logits of the next character."""
    hidden = jnp.tanh(params["e"][x].reshape(len(x), -1) @ params["w"] + params["b"])
    return hidden @ params["v"] + params["c"]


def start(seed: int) -> Any:
    """Parameters to begin with: matrices from Xavier's distribution, no biases."""
    template = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in WIDTHS.items()}
    drawn = eki_jax.xavier(template).sample(jax.random.key(seed))
    return {name: leaf if leaf.ndim > 1 else 0 * leaf for name, leaf in drawn.items()}


def _of_weights(deviations: Any, estimate: Any) -> Callable[[int, float, Any], eki_jax.Solver]:
    def make(particles: int, sigma: float, optimizer: Any) -> eki_jax.Solver:
        # A direction is divided by lambda / sigma^2, which is undone.
        undone = optax.chain(optax.scale(DAMPING / sigma**2), optimizer)
        settings: Any = {"deviations": deviations, "estimate": estimate, "optimizer": undone}
        return natural.natural_gradient(forward, LOSS, particles, sigma, DAMPING, **settings)

    return make


def _per_sample(solve: Any = "least squares", **feedback: Any) -> Callable[[int, float, Any], eki_jax.Solver]:
    def make(particles: int, sigma: float, optimizer: Any) -> eki_jax.Solver:
        learned = natural.learned_feedback(batch()[0], DECAY, unbiased=True, **feedback) if feedback else None
        deviations = natural.per_sample(solve, feedback=learned)
        return natural.natural_gradient(forward, LOSS, particles, sigma, deviations=deviations, optimizer=optimizer)

    return make


KINDS = {
    "span": Kind("full rank, in the span", _of_weights(natural.full_rank(1.0), natural.span()), SIGMA_OF_WEIGHTS),
    "localized": Kind(
        "low rank, localized", _of_weights(natural.low_rank(1, 1.0), natural.localized()), SIGMA_OF_WEIGHTS
    ),
    "covariance": Kind("noise per sample, covariance", _per_sample("covariance")),
    "least-squares": Kind("noise per sample, least squares", _per_sample()),
    "outputs": Kind("noise per sample, feedback of the outputs", _per_sample(answers=False)),
    "answers": Kind("noise per sample, answers of the layers behind", _per_sample(answers=True)),
}


@command("deviations")
def main(argv: list[str]) -> int:
    """Run the command line; 2 for what the user can mend."""
    arguments = parser().parse_args(argv)
    return experiment.run(DEVIATIONS, arguments, DEVIATIONS.path(arguments.preset, arguments.out))


def parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="python -m benchmarks deviations",
        description="On a model of characters, cosines of the gradient that each kind of deviations estimates with the "
        "exact one, of single estimates and of means of many, and the loss after training by it. What is finished is "
        "kept and not repeated, so an interrupted command goes on. The last line on standard output is one JSON "
        "object.",
    )
    parser.add_preset(choices=tuple(PRESETS), help="size (default: cpu)")
    parser.add_argument(
        "--kind", metavar="K", nargs="+", choices=tuple(KINDS), help=f"only these of {', '.join(KINDS)}"
    )
    parser.add_argument("--out", metavar="DIR", type=folder, help="folder for numbers, picture, table")
    parser.add_draw()
    return parser


def measure(arguments: argparse.Namespace, path: Path) -> None:
    """Run what is missing of what is asked for."""
    preset = PRESETS[arguments.preset]
    line = f"python -m benchmarks deviations --preset {arguments.preset}"
    cells = Cells(
        path,
        {"experiment": "deviations", "preset": arguments.preset, "command": line},
        keep=True,
        part=bool(arguments.kind),
    )
    kinds = arguments.kind or list(KINDS)
    for name in kinds:
        for size in preset.particles:
            own: dict[str, Any] = {"kind": name, "particles": size, "draws": preset.draws}
            own |= {"sigma": KINDS[name].sigma, "averages": preset.averages, "trained": TRAINED}
            cells.get(f"cosines, {name}, {size}", own, partial(_cosines, **own))
    runs: list[tuple[str, int | None, float | None]] = [(GRADIENT, None, None)]
    runs += [(name, size, sigma) for size, sigma, of in preset.learned for name in of if name in kinds]
    for name, particles, sigma in runs:
        own = {"kind": name, "particles": particles, "sigma": sigma}
        own |= {"seeds": preset.seeds, "steps": preset.steps, "rate": RATE}
        at = "" if particles is None else f", {particles}"
        cells.get(f"loss, {name}{at}", own, partial(_losses, **own))
    cells.finish()


def exact(params: Any, data: Any) -> Any:
    """The gradient."""
    return jax.grad(lambda p: LOSS(forward(p, data[0]), data[1]))(params)


def _cosines(kind: str, particles: int, draws: int, averages: list[int], sigma: float, trained: int) -> dict[str, Any]:
    """Of single estimates at the start and after descent, and of means of several, at the start."""
    data, solver = batch(), KINDS[kind].solver(particles, sigma, optax.sgd(1.0))
    params = start(0)
    state = solver.init(params, jax.random.key(1))

    @jax.jit
    def estimates(state: Any, keys: Any) -> Any:
        def one(key: Any) -> Any:
            after = solver.step(state._replace(key=key), data)[0]
            return jax.tree.map(jnp.subtract, state.position, after.position)

        return jax.lax.map(one, keys)

    @jax.jit
    def descended(state: Any) -> Any:
        """Along the exact gradient, whatever the estimates are: what is learned on the way is kept."""

        def one(_: Any, state: Any) -> Any:
            position = jax.tree.map(jnp.subtract, state.position, exact(state.position, data))
            return solver.step(state, data)[0]._replace(position=position)

        return jax.lax.fori_loop(0, trained, one, state)

    keys = jax.vmap(jax.random.key_data)(jax.random.split(jax.random.key(2), max(averages)))
    found, gradient = estimates(state, keys), exact(params, data)

    def of_means(count: int) -> list[float]:
        means = jax.tree.map(lambda leaf: leaf.reshape(-1, count, *leaf.shape[1:]).mean(axis=1), found)
        return _cosines_with(means, gradient)

    state = descended(state)
    trained_cosines = _cosines_with(estimates(state, keys[:draws]), exact(state.position, data))
    return {
        "start": _cosines_with(found, gradient)[:draws],
        "trained": trained_cosines,
        "of_means": [float(np.mean(of_means(count))) for count in averages],
    }


def _cosines_with(many: Any, one: Any) -> list[float]:
    """The cosines of several trees, along the leaves' first axis, with one."""
    rows = np.concatenate([np.reshape(leaf, (len(leaf), -1)) for leaf in jax.tree.leaves(many)], axis=1)
    wanted = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(one)])
    return (rows @ wanted / (np.linalg.norm(rows, axis=1) * np.linalg.norm(wanted))).tolist()


def _losses(
    kind: str, particles: int | None, sigma: float | None, seeds: list[int], steps: int, rate: float
) -> dict[str, list[float]]:
    """The losses at the end of training, of each seed."""
    data, adam = batch(), optax.adam(rate)

    def by_gradient(state: Any) -> Any:
        updates, inner = adam.update(exact(state[0], data), state[1])
        return optax.apply_updates(state[0], updates), inner

    begin: Callable[[Any, Any], Any] = lambda params, key: (params, adam.init(params))
    step, position = by_gradient, lambda state: state[0]
    if particles is not None and sigma is not None:
        solver = KINDS[kind].solver(particles, sigma, adam)
        begin, step, position = solver.init, lambda state: solver.step(state, data)[0], lambda state: state.position
    trained = jax.jit(lambda state: jax.lax.fori_loop(0, steps, lambda _, state: step(state), state))
    found = []
    for seed in seeds:
        params = position(trained(begin(start(seed), jax.random.key(len(seeds) + seed))))
        found.append(float(LOSS(forward(params, data[0]), data[1])))
    return {"losses": found}


def _particles(cells: dict[tuple[str, int | None], Any]) -> list[int]:
    """The numbers of particles, in order."""
    return sorted({particles for _, particles in cells if particles is not None})


def _of(found: dict[str, Any], what: str) -> dict[tuple[str, int | None], dict[str, Any]]:
    """The cells of cosines or losses, by kind and number of particles."""
    cells = {name: cell for name, cell in found["cells"].items() if name.startswith(what)}
    return {(cell["settings"]["kind"], cell["settings"]["particles"]): cell for cell in cells.values()}


def table(found: dict[str, Any]) -> str:
    """The cosines, a line a kind, with what was to be reached; and the losses."""
    cosines = _of(found, "cosines")
    sizes = _particles(cosines)
    columns = [(when, particles) for when in ("start", "trained") for particles in sizes]
    said = {"start": "at the start", "trained": f"after {TRAINED} steps"}
    rows = []
    for kind in KINDS:
        cells = [cosines.get((kind, particles)) for _, particles in columns]
        if any(cells):
            each = zip(columns, cells, strict=True)
            rows.append(
                [
                    KINDS[kind].label,
                    *("–" if cell is None else f"{np.mean(cell['found'][when]):.4f}" for (when, _), cell in each),
                ]
            )
    rows.append(["*goal*", *(f"*{GOALS[column]:g}*" if column in GOALS else "" for column in columns)])
    header = ["cosine to the gradient", *(f"{particles} particles {said[when]}" for when, particles in columns)]
    return "\n\n".join([markdown(header, rows), _loss_table(found), _footer(found)])


def _loss_table(found: dict[str, Any]) -> str:
    losses = _of(found, "loss")
    sizes = _particles(losses)
    rows = []
    for kind in [*KINDS, GRADIENT]:
        of = [losses.get((kind, None if kind == GRADIENT else particles)) for particles in sizes]
        if any(of):
            label = GRADIENT if kind == GRADIENT else KINDS[kind].label
            rows.append([label, *("–" if cell is None else _spread(cell["found"]["losses"]) for cell in of)])
    noise = {cell["settings"]["particles"]: cell["settings"]["sigma"] for cell in losses.values()}
    header = ["loss after training", *(f"{size} particles, sigma {noise[size]:g}" for size in sizes)]
    return markdown(header, rows)


def _spread(values: list[float]) -> str:
    return f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else f"{values[0]:.4f}"


def _footer(found: dict[str, Any]) -> str:
    settings = next(iter(_of(found, "loss").values()))["settings"]
    return (
        "A model of 5,728 parameters that reads three characters, 853 times. Cosines are means over draws of the "
        f"noise, after {TRAINED} steps of descent by the gradient too, on which what is learned goes along. Losses are "
        f"after {settings['steps']} steps of Adam with a rate of {settings['rate']:g}: mean of "
        f"{len(settings['seeds'])} seeds, and standard deviation. `{found['command']}`, "
        f"{machine(found['environment'])}."
    )


def draw(found: dict[str, Any], path: Path) -> None:
    """Cosines against particles, at the start and after descent; and what means of many estimates leave of one."""
    cosines = _of(found, "cosines")
    figure, axes = figures.panels(1, 3, (13.2, 4.0))
    every = _particles(cosines)
    for kind, entry in KINDS.items():
        mine = {particles: cell for (name, particles), cell in cosines.items() if name == kind and particles}
        if not mine:
            continue
        sizes = sorted(mine)
        for axis, when in zip(axes[0], ("start", "trained"), strict=False):
            values = [np.array(mine[particles]["found"][when]) for particles in sizes]
            edges = ([float(f(v)) for v in values] for f in (np.min, np.mean, np.max))
            figures.band(axis, sizes, *edges, marks="o-", label=entry.label)
        of_means = mine[sizes[0]]
        lost = 1 - np.array(of_means["found"]["of_means"])
        axes[0, 2].loglog(of_means["settings"]["averages"], lost, "o-", label=entry.label)
    for axis, title in zip(axes[0], ("at the start", f"after {TRAINED} steps of descent"), strict=False):
        axis.set(xscale="log", xlabel="particles", ylabel="cosine to the gradient", title=title, ylim=(0, 1.02))
        axis.set_xticks(every)
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.minorticks_off()
    words = f"estimates by {every[0]} particles in the mean"
    axes[0, 2].set(xlabel=words, ylabel="1 - cosine", title="means of several estimates, at the start")
    axes[0, 2].xaxis.set_major_formatter("{x:.0f}")
    title = "mean of the draws, and their range" if len(every) > 1 else ""
    figures.legend_below(figure, axes[0], title)
    figures.save(figure, path)


DEVIATIONS = Experiment(
    "deviations",
    "How near to the gradient each kind of deviations comes",
    "deviations_{preset}",
    measure,
    table,
    draw,
    says=lambda found: {
        "cosines": {
            f"{kind} {particles}": float(np.mean(cell["found"]["start"]))
            for (kind, particles), cell in _of(found, "cosines").items()
        }
    },
    sections={"deviations.md#cosines": table},
    needs=("matplotlib",),
)
