"""How near to the exact gradient estimates from noise come, on a character model, and how well it learns by them.

Three characters of the text that ``import this`` prints predict the next: 853 predictions in one batch, 5,728
parameters.
"""

from __future__ import annotations

import codecs
import contextlib
import functools
import io
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import eki_jax
from eki_jax import natural

LOSS = natural.softmax_cross_entropy()
# Of what is learned of slopes: 853 predictions in every step are soon enough.
DECAY = 0.9
SEEDS = 3
WIDTHS = {"e": (32, 16), "w": (48, 64), "b": (64,), "v": (64, 32), "c": (32,)}


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


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables; arguments are other numbers of particles, and with a point another scale of the noise.

    192 particles take a quarter of an hour.
    """
    arguments = sys.argv[1:] if argv is None else argv
    sizes = [int(text) for text in arguments if "." not in text] or [12, 48]
    sigma = next((float(text) for text in arguments if "." in text), 0.05)
    data = batch()
    exact = jax.jit(jax.grad(lambda p: LOSS(forward(p, data[0]), data[1])))
    feedback = functools.partial(natural.learned_feedback, data[0], DECAY, unbiased=True)
    ways = {
        "covariance": natural.per_sample("covariance"),
        "least squares": natural.per_sample(),
        "feedback of the outputs": natural.per_sample(feedback=feedback(answers=False)),
        "answers of the layers behind": natural.per_sample(feedback=feedback()),
    }
    print("cosine to the exact gradient: at the start, after 30 steps of its own")
    for particles in sizes:
        for name, deviations in ways.items():
            solver = _solver(particles, sigma, deviations, optax.sgd(1.0))
            state = solver.init(_start(0), jax.random.key(1))
            cosines = [_cosine_at(state, solver, data, exact)]
            state = _trained(state, solver, data, 30)
            cosines.append(_cosine_at(state, solver, data, exact))
            print(f"{cosines[0]:.4f}  {cosines[1]:.4f}  {particles:4d} particles, {name}", flush=True)
    print(f"loss after 150 steps of Adam, rate 0.03: mean of {SEEDS} seeds, and standard deviation")
    adam = optax.adam(0.03)
    for particles in sizes:
        for name, deviations in ways.items():
            solver, found = _solver(particles, sigma, deviations, adam), []
            for seed in range(SEEDS):
                state = solver.init(_start(seed), jax.random.key(SEEDS + seed))
                found.append(_loss(_trained(state, solver, data, 150).position, data))
            print(f"{_spread(found)}  {particles:4d} particles, {name}", flush=True)
    found = []
    for seed in range(SEEDS):
        params = _start(seed)
        inner = adam.init(params)
        for _ in range(150):
            updates, inner = adam.update(exact(params), inner)
            params = optax.apply_updates(params, updates)
        found.append(_loss(params, data))
    print(f"{_spread(found)}  backpropagation")


def _start(seed: int) -> Any:
    """Parameters to begin with: matrices from Xavier's distribution, no biases."""
    template = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in WIDTHS.items()}
    start = eki_jax.xavier(template).sample(jax.random.key(seed))
    return {name: leaf if leaf.ndim > 1 else 0 * leaf for name, leaf in start.items()}


def _loss(params: Any, data: Any) -> float:
    return float(LOSS(forward(params, data[0]), data[1]))


def _spread(values: list[float]) -> str:
    return f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}"


def _solver(particles: int, sigma: float, deviations: Any, optimizer: Any) -> eki_jax.Solver:
    return natural.natural_gradient(forward, LOSS, particles, sigma, deviations=deviations, optimizer=optimizer)


def _trained(state: Any, solver: eki_jax.Solver, data: Any, steps: int) -> Any:
    return jax.jit(lambda state: jax.lax.fori_loop(0, steps, lambda _, s: solver.step(s, data)[0], state))(state)


def _cosine_at(state: Any, solver: eki_jax.Solver, data: Any, exact: Any) -> float:
    """Cosine of the next step, of a solver whose optimizer is plain descent, with the gradient."""
    after = jax.jit(solver.step)(state, data)[0]
    return _cosine(jax.tree.map(jnp.subtract, state.position, after.position), exact(state.position))


def _cosine(a: Any, b: Any) -> float:
    a, b = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in (a, b))
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


if __name__ == "__main__":
    main()
