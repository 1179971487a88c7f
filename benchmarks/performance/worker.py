"""One measurement of this library, or of plain JAX: ``python -m benchmarks.performance.worker JSON``."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks.performance import networks
from benchmarks.performance.peers.linear import problem as linear_problem
from benchmarks.performance.peers.timing import measure, resident, serve
from eki_jax import direction, euler, losses, natural, nesterov, priors
from eki_jax.ensembles import sample_ensemble
from eki_jax.kalman import enkf


def main(task: dict[str, Any]) -> dict[str, Any]:
    """Run the task's kind, with the matrix-product rate measured before and after it in the same process."""
    kinds = {
        "step": step,
        "plain": plain,
        "natural": natural_step,
        "single": single,
        "linear": linear,
        "kernel": kernel,
    }
    kind = kinds[task["kind"]]
    before = matmul_rate(task.get("dtype"))
    result = kind(task)
    after = matmul_rate(task.get("dtype"))
    return {**result, "matmul_rate": max(before[0], after[0]), "matmul_processor_rate": max(before[1], after[1])}


def matmul_rate(dtype: str | None = None, size: int = 2048) -> tuple[float, float]:
    """Operations a second of a square product, by wall clock and by processor time: medians of ten or more."""
    square = jax.random.normal(jax.random.key(0), (size, size), jnp.dtype(dtype or "float32"))
    product = jax.jit(lambda a: jnp.matmul(a, a, preferred_element_type=jnp.float32))
    times = measure(lambda: product(square).block_until_ready(), 10)
    return 2 * size**3 / times["median"], 2 * size**3 / times["processor_median"]


def step(task: dict[str, Any]) -> dict[str, Any]:
    """A donated step of ``euler`` or ``nesterov`` on a network."""
    forward, template, batch = networks.build(task["network"])
    make = {"euler": euler, "nesterov": nesterov}[task.get("solver", "euler")]
    solver = make(forward, losses.cross_entropy(), precision=task.get("precision"))
    prior, size = priors.xavier(template), task["J"]
    draw = jax.jit(lambda key: solver.init(sample_ensemble(key, prior, size)))
    return _compiled_steps(task, solver.step, draw, batch)


def natural_step(task: dict[str, Any]) -> dict[str, Any]:
    """A donated step of the natural gradient, with full-rank deviations or with rank-1 ones."""
    forward, template, batch = networks.build_logits(task["network"])
    prior = priors.xavier(template)
    deviations = natural.full_rank(prior) if task["deviations"] == "full rank" else natural.low_rank(1, prior)
    solver = natural.natural_gradient(
        forward, natural.softmax_cross_entropy(), task["J"], 0.1, 1e-4, deviations, localized=task["localized"]
    )
    draw = jax.jit(lambda key: solver.init(prior.sample(key), key))
    return _compiled_steps(task, solver.step, draw, batch)


def single(task: dict[str, Any]) -> dict[str, Any]:
    """A donated step of one network's parameters: noise per sample, backpropagation, or a forward pass alone."""
    forward, template, batch = networks.build_logits(task["network"])
    loss, optimizer = natural.softmax_cross_entropy(), optax.sgd(0.1, momentum=0.9)
    draw = priors.xavier(template).sample
    if task["what"] == "per sample":
        deviations = natural.per_sample(feedback=natural.learned_feedback(batch[0]))
        solver = natural.natural_gradient(
            forward, loss, task["J"], sigma=0.05, deviations=deviations, optimizer=optimizer
        )
        return _compiled_steps(task, solver.step, jax.jit(lambda key: solver.init(draw(key), key)), batch)

    of = lambda params, batch: loss(forward(params, batch[0]), batch[1])

    def descend(state: Any, batch: Any) -> tuple[Any, Any]:
        params, inner = state
        value, gradient = jax.value_and_grad(of)(params, batch)
        updates, inner = optimizer.update(gradient, inner, params)
        return (optax.apply_updates(params, updates), inner), value

    def predict(state: Any, batch: Any) -> tuple[Any, Any]:
        return state, of(state[0], batch)

    def start(key: Any) -> Any:
        params = draw(key)
        return params, optimizer.init(params)

    one = {"backpropagation": descend, "forward pass": predict}[task["what"]]
    return _compiled_steps(task, one, jax.jit(start), batch)


def plain(task: dict[str, Any]) -> dict[str, Any]:
    """The step as the paper states it, in plain JAX: D in R^{J x J}, the gradient of all one-hot outputs."""
    forward, template, (x, labels) = networks.build(task["network"])
    prior, size = priors.xavier(template), task["J"]
    one_hot = jax.nn.one_hot(labels, 10)

    def one(ensemble: Any, batch: Any) -> tuple[Any, Any]:
        outputs = jax.vmap(forward, in_axes=(0, None))(ensemble, batch[0])
        cotangents = (-batch[1] / (outputs + 0.005) / len(batch[0])).reshape(size, -1)
        outputs = outputs.reshape(size, -1)
        d = (outputs - outputs.mean(0)) @ cotangents.T
        h = 2.0 / (jnp.linalg.norm(d) + 0.5)
        return jax.tree.map(lambda u: u - h * (d.T @ u.reshape(size, -1)).reshape(u.shape), ensemble), h

    return _compiled_steps(task, one, jax.jit(lambda key: sample_ensemble(key, prior, size)), (x, one_hot))


def _compiled_steps(
    task: dict[str, Any], one: Callable[..., Any], draw: Callable[..., Any], batch: Any
) -> dict[str, Any]:
    key = jax.random.key(0)
    shapes = jax.eval_shape(draw, key)
    start = time.perf_counter(), time.process_time()
    compiled = jax.jit(one, donate_argnums=0).lower(shapes, batch).compile()
    compile_seconds = time.perf_counter() - start[0]
    compile_processor = time.process_time() - start[1]
    baseline = resident()
    state = [jax.block_until_ready(draw(key))]

    def run() -> None:
        state[0] = jax.block_until_ready(compiled(state[0], batch)[0])

    result = measure(run, task["repeats"], baseline)
    memory = compiled.memory_analysis()
    return {
        **result,
        "compile_seconds": compile_seconds,
        "compile_processor_seconds": compile_processor,
        "state_bytes": sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes)),
        "compiler_temporary_bytes": memory.temp_size_in_bytes,
    }


def linear(task: dict[str, Any]) -> dict[str, Any]:
    """One assimilation of the linear problem: the Kalman step (as the other libraries do), or an Euler step."""
    baseline = resident()
    ensemble, index, weights, data = map(jnp.array, linear_problem(task))  # copies: JAX cannot donate NumPy's memory
    forward = lambda u, x: x * u[index]
    if task["method"] == "kalman":
        solver = enkf(forward, jnp.ones(len(data)), key=jax.random.key(0))
    else:
        solver = euler(forward, losses.squared_error())
    compiled = jax.jit(solver.step, donate_argnums=0)
    state = [solver.init(ensemble)]
    del ensemble

    def run() -> None:
        state[0] = jax.block_until_ready(compiled(state[0], (weights, data))[0])

    return {**measure(run, task["repeats"], baseline), "mean": float(state[0].ensemble[:, index[0]].mean())}


def kernel(task: dict[str, Any]) -> dict[str, Any]:
    """The kernel by itself, ``u - dt direction(u)`` in place, by a forced order of the products."""
    keys = jax.random.split(jax.random.key(0), 3)
    u = jax.random.normal(keys[0], (task["J"], task["P"]))
    z, r = (jax.random.normal(key, (task["J"], task["M"])) for key in keys[1:])
    one = lambda u, z, r: jax.tree.map(
        lambda a, d: a - 1e-6 * d, u, direction(u, z, r, contraction=task["contraction"])
    )
    compiled = jax.jit(one, donate_argnums=0)
    state = [u]
    del u

    def run() -> None:
        state[0] = compiled(state[0], z, r).block_until_ready()

    return measure(run, task["repeats"])


if __name__ == "__main__":
    serve(main)
