"""Strong and weak scaling on the devices that exist, and the rates of the machine they belong to."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

import eki_jax
from benchmarks.scaling import hlo
from eki_jax import natural, sharding
from eki_jax.flax import dense_network, linen_forward


class Workload(NamedTuple):
    """A dense classifier on random images: the arithmetic of training, without the data.

    Attributes:
        forward: of one particle.
        template: shapes of one particle's parameters.
        batch: ``(x, labels)``.
        parameters: P.
        outputs: M, the samples of a batch (one probability of each matters).
        classes: outputs of a sample.
        forward_flops: operations of one particle's forward pass.
    """

    forward: Callable[..., Any]
    template: Any
    batch: Any
    parameters: int
    outputs: int
    classes: int
    forward_flops: float


class Row(NamedTuple):
    """One measurement; times are medians over steps.

    Attributes:
        scaling: ``"strong"`` (J fixed) or ``"weak"`` (J per device fixed); of the natural gradient the samples are so.
        communication: the layout, or ``"natural"``.
        devices: n.
        particles: J on all devices together; on each of them for the natural gradient.
        samples: samples of a batch, on all devices together.
        seconds: per step.
        speedup: particles times samples a second, over those of one device with the same layout.
        efficiency: the speed-up over n.
        memory: bytes of one device at the peak, as the compiler planned them.
        flops: of one device, from the compiled text.
        sent: bytes that leave a device, from the compiled text.
        collectives: communications a step, from the compiled text.
        predicted_sent: bytes by the cost model.
        predicted_seconds: by the cost model with the machine's measured rates.
    """

    scaling: str
    communication: str
    devices: int
    particles: int
    samples: int
    seconds: float
    speedup: float
    efficiency: float
    memory: int
    flops: float
    sent: float
    collectives: int
    predicted_sent: float
    predicted_seconds: float


def dense_workload(inputs: int, widths: tuple[int, ...], samples: int) -> Workload:
    """A dense network of these widths on ``samples`` random images of ``inputs`` pixels."""
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], (samples, inputs))
    labels = jax.random.randint(keys[1], (samples,), 0, widths[-1])
    forward, template = linen_forward(dense_network(widths), x)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(template))
    sizes = parameters, samples, widths[-1]
    return Workload(forward, template, (x, labels), *sizes, forward_flops(forward, template, x))


def forward_flops(forward: Callable[..., Any], template: Any, x: Any) -> float:
    """Operations of one forward pass, as XLA counts them before it optimizes."""
    return float(jax.jit(forward).lower(template, x).cost_analysis()["flops"])


def measure(
    problem: Workload,
    scaling: str,
    communication: sharding.Communication,
    devices: int,
    particles: int,
    machine: sharding.Machine,
    steps: int,
) -> Row:
    """Compile and run a step of :func:`eki_jax.euler`; ``speedup`` and ``efficiency`` are left to :func:`compared`."""
    mesh = sharding.make_mesh(devices)
    solver = eki_jax.euler(problem.forward, eki_jax.cross_entropy(), axis_name="particles", communication=communication)
    solver = sharding.shard_solver(solver, mesh)
    prior = eki_jax.xavier(problem.template)
    draw = jax.jit(lambda key: solver.init(sharding.sample_ensemble(key, prior, particles, mesh)))
    state, batch = draw(jax.random.key(1)), sharding.place(problem.batch, mesh)
    cost = sharding.step_cost(
        communication, particles, problem.outputs, problem.parameters, devices,
        machine=machine, forward_flops=problem.forward_flops,
    )  # fmt: skip
    row = _run(solver, state, batch, steps, devices, cost)
    return row._replace(scaling=scaling, communication=communication, particles=particles, samples=problem.outputs)


def measure_natural(
    problem: Workload, scaling: str, devices: int, particles: int, machine: sharding.Machine, steps: int
) -> Row:
    """The same of :func:`eki_jax.natural.natural_gradient`, all of whose particles are on every device."""
    mesh, loss = sharding.make_mesh(1, devices), natural.softmax_cross_entropy()
    axes = {"axis_name": "particles"} | ({"batch_axis_name": "batch"} if devices > 1 else {})
    solver = natural.natural_gradient(problem.forward, loss, particles, space="ensemble", **axes)
    solver = sharding.shard_solver(solver, mesh, spread_targets=True)
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), problem.template)
    state = sharding.place(solver.init(params, jax.random.key(1)), mesh)
    batch = sharding.place(problem.batch, mesh, sharding.batch_specs(mesh)[0])
    cost = sharding.natural_step_cost(
        particles, problem.outputs, problem.classes, problem.parameters, devices,
        machine=machine, forward_flops=problem.forward_flops,
    )  # fmt: skip
    row = _run(solver, state, batch, steps, devices, cost)
    return row._replace(scaling=scaling, communication="natural", particles=particles, samples=problem.outputs)


def _run(solver: Any, state: Any, batch: Any, steps: int, devices: int, cost: sharding.Cost) -> Row:
    """Compile and run a step: what it takes, and what the model says."""
    compiled = jax.jit(solver.step, donate_argnums=0).lower(state, batch).compile()
    program, plan = hlo.read(compiled.as_text(), devices), compiled.memory_analysis()
    memory = plan.argument_size_in_bytes + plan.output_size_in_bytes + plan.temp_size_in_bytes
    return Row(
        scaling="",
        communication="",
        devices=devices,
        particles=0,
        samples=0,
        seconds=_median_seconds(compiled, state, batch, steps),
        speedup=0.0,
        efficiency=0.0,
        memory=memory - plan.alias_size_in_bytes,
        flops=program.flops,
        sent=program.sent,
        collectives=sum(one.times for one in program.collectives),
        predicted_sent=cost.sent,
        predicted_seconds=cost.seconds,
    )


def compared(rows: list[Row]) -> list[Row]:
    """The rows with their speed-up over one device of the same scaling and layout."""
    alone = {(row.scaling, row.communication): row for row in rows if row.devices == 1}

    def one(row: Row) -> Row:
        base = alone[row.scaling, row.communication]
        work = row.particles * row.samples / (base.particles * base.samples)
        speedup = work * base.seconds / row.seconds
        return row._replace(speedup=speedup, efficiency=speedup / row.devices)

    return [one(row) for row in rows]


def machine_at_hand(devices: int, problem: Workload, particles: int) -> sharding.Machine:
    """Rates of one of ``devices`` devices while all of them work: its matrix products, and an all-reduce.

    Latency and bandwidth come from an all-reduce of one number and one of M x P / 8 numbers, each the fastest of seven.
    """
    mesh = sharding.make_mesh(devices)
    everywhere, spread = PartitionSpec(), PartitionSpec("particles")
    shape = (particles, problem.outputs, max(64, problem.parameters // 8))
    left, right = jnp.ones((devices, shape[1], shape[0])), jnp.ones((devices, shape[0], shape[2]))
    product = jax.jit(jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(spread, spread), out_specs=spread))
    arrays = [jax.device_put(array, NamedSharding(mesh, spread)) for array in (left, right)]
    seconds = _seconds(product, *arrays)
    flops = 2 * shape[0] * shape[1] * shape[2] / seconds
    if devices == 1:
        return sharding.Machine(flops, sharding.Link(float("inf"), 0.0), sharding.Link(float("inf"), 0.0), 1)
    total = jax.jit(
        jax.shard_map(lambda a: jax.lax.psum(a, "particles"), mesh=mesh, in_specs=spread, out_specs=everywhere)
    )
    small = _seconds(total, jax.device_put(jnp.ones((devices, 1)), NamedSharding(mesh, spread)))
    count = shape[1] * shape[2]
    large = _seconds(total, jax.device_put(jnp.ones((devices, count)), NamedSharding(mesh, spread)))
    sent = 2 * (devices - 1) / devices * 4 * count
    rounds = 2 * max(1, (devices - 1).bit_length())
    link = sharding.Link(sent / max(large - small, large / 2), small / rounds)
    return sharding.Machine(flops, link, link, devices)


def _median_seconds(step: Any, state: Any, batch: Any, steps: int) -> float:
    seconds = []
    for _ in range(steps + 1):
        started = time.perf_counter()
        state, info = step(state, batch)
        jax.block_until_ready((state, info))
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def _seconds(fn: Any, *args: Any, repeats: int = 7) -> float:
    jax.block_until_ready(fn(*args))
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(fn(*args))
        seconds.append(time.perf_counter() - started)
    return min(seconds)
