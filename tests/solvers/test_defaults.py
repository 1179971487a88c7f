"""Solvers with their defaults lower the loss on a battery of least squares, linear and mildly not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eki_jax
from eki_jax.compact import compact_euler

LOSS = eki_jax.squared_error()
KINDS = ("linear", "quadratic", "exponential", "sine", "outputs times 10", "outputs over 100")
CONDITIONS = jnp.array([1.0, 1e3, 1e6])
SOLVERS: dict[str, Callable[..., eki_jax.Solver]] = {
    "euler": eki_jax.euler,
    "nesterov": eki_jax.nesterov,
    "heavy_ball": eki_jax.heavy_ball,
    "compact_euler": compact_euler,
}


def problem(kind: Any, parameters: int, outputs: int, condition: Any, key: Any) -> tuple[Any, Any]:
    """A model of so many parameters, its data with a tenth of noise; ``kind`` may be traced."""
    keys, rank = jax.random.split(key, 4), min(parameters, outputs)
    left = jnp.linalg.qr(jax.random.normal(keys[0], (outputs, outputs)))[0][:, :rank]
    right = jnp.linalg.qr(jax.random.normal(keys[1], (parameters, parameters)))[0][:, :rank]
    matrix = (left * jnp.exp(jnp.linspace(0.0, -0.5 * jnp.log(condition), rank))) @ right.T

    def forward(u: Any, x: Any) -> Any:
        z = matrix @ u
        values = [z, z + 0.1 * z**2, jnp.exp(0.3 * z), z + 0.3 * jnp.sin(2 * z), 10 * z, 0.01 * z]
        return jnp.select([kind == i for i in range(len(values))], values)

    exact = forward(jax.random.normal(keys[2], (parameters,)), None)
    return forward, exact + 0.1 * jnp.std(exact) * jax.random.normal(keys[3], exact.shape)


def losses_of(make: Any, parameters: int, outputs: int, particles: int, steps: int, *case: Any) -> Any:
    """The mean losses before every step and after the last, and whether all steps were taken."""
    kind, condition, key = case
    forward, data = problem(kind, parameters, outputs, condition, jax.random.fold_in(key, 0))
    solver = make(forward, LOSS)
    start = solver.init(jax.random.normal(jax.random.fold_in(key, 1), (particles, parameters)))

    def body(state: Any, _: Any) -> Any:
        state, info = solver.step(state, (None, data))
        return state, (info.loss, info.moved)

    _, (losses, moved) = jax.lax.scan(body, start, length=steps + 1)
    return losses, moved.all()


def run(make: Any, shape: tuple[int, int, int], steps: int, seeds: int, kinds: Any, conditions: Any) -> Any:
    one = lambda *case: losses_of(make, *shape, steps, *case)
    over_seeds = jax.vmap(one, (None, None, 0))
    over_conditions = jax.vmap(over_seeds, (None, 0, None))
    over_all = jax.jit(jax.vmap(over_conditions, (0, None, None)))
    return over_all(kinds, conditions, jax.random.split(jax.random.key(0), seeds))


@pytest.mark.parametrize("name", SOLVERS)
def test_defaults_lower_the_loss(name: str) -> None:
    # Of outputs so small that steps are short, bfloat16 deviations show rounding alone.
    kinds = jnp.arange(len(KINDS) - (name == "compact_euler"))
    losses, moved = run(SOLVERS[name], (2, 5, 8), 30, 2, kinds, CONDITIONS)
    assert bool(moved.all())
    assert bool((losses[..., -1] < losses[..., 0]).all())


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 1, 5), (2, 3, 5), (2, 2, 20), (10, 20, 20), (50, 60, 5), (20, 25, 200)])
@pytest.mark.parametrize("name", SOLVERS)
def test_defaults_lower_every_loss(name: str, shape: tuple[int, int, int]) -> None:
    """1 to 50 parameters, conditions 1 to 1e6, 5 to 200 particles, five seeds: no run ends above its start."""
    kinds = jnp.arange(len(KINDS) - (name == "compact_euler"))
    losses, moved = run(SOLVERS[name], shape, 50, 5, kinds, CONDITIONS)
    ratio = np.asarray(losses[..., -1] / losses[..., 0])
    assert bool(moved.all())
    assert (ratio < 1).all(), ratio.max()
    assert float((losses.max(axis=-1) / losses[..., 0]).max()) < 1.1


def test_the_papers_step_is_beyond_the_edge() -> None:
    """With h0 = 2 and momentum 0.9 least squares diverges, which the shorter default mends."""
    paper = lambda forward, loss: eki_jax.nesterov(forward, loss, eki_jax.paper_step_size())
    conditions = CONDITIONS[:1]
    losses, _ = run(paper, (2, 5, 8), 30, 2, jnp.arange(1), conditions)
    assert float(losses[..., -1].max()) > float(losses[..., 0].max())
