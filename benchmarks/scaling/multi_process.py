"""Train ``digits-dnn`` with the particles spread over the devices of several processes.

Start it once for each process with the same arguments but ``--process``; see ``docs/scaling.md``.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

import eki_jax
from benchmarks.problems import registry as problems
from benchmarks.reporting import print_result
from eki_jax import sharding, training
from eki_jax.checkpoints import Checkpoints

_LOST = "lost another process in the middle of a step; start all of them again with --resume"


def main(argv: list[str] | None = None) -> int:
    """Train, save after every epoch, and print the accuracies from process 0."""
    arguments = _parser().parse_args(argv)
    _join(arguments)
    try:
        _train(arguments)
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        # An orderly exit would first wait for the lost process, and then abort.
        print(f"process {jax.process_index()}: {_LOST}\n{error}", file=sys.stderr, flush=True)
        os._exit(1)
    return 0


def _train(arguments: argparse.Namespace) -> None:
    mesh = sharding.make_mesh()
    problem = problems.get("digits-dnn")
    method = sharding.shard_method(_method(problem, arguments.particles), mesh, driver=arguments.driver)
    train, test = sharding.place((problem.train, problem.test), mesh)
    key = sharding.place(jax.random.key(arguments.seed), mesh)
    run = jax.jit(training.epoch(method, arguments.batch_size), donate_argnums=0)
    measure = jax.jit(method.accuracy)
    checkpoints = Checkpoints(arguments.directory, {"particles": arguments.particles}) if arguments.directory else None
    state, curve = _start(method, key, checkpoints, arguments.resume)
    for epoch in range(len(curve), arguments.epochs):
        state, metrics = run(state, jax.random.fold_in(key, epoch), *train)
        curve.append(round(float(measure(state, *test).mean), 6))
        if checkpoints:
            checkpoints.save(epoch + 1, state, curve)
        _report(epoch=epoch + 1, accuracy=curve[-1], loss=float(np.mean(jax.device_get(metrics["train_loss"]))))
    if checkpoints:
        checkpoints.close()
    _report(devices=mesh.size, processes=jax.process_count(), curve=curve)


def _method(problem: problems.Problem, particles: int) -> training.Method:
    solver = eki_jax.euler(problem.forward, problem.loss, eki_jax.paper_step_size(), axis_name="particles")
    prior = eki_jax.xavier(problem.template)
    return training.ensemble_method(solver, problem.forward, prior, particles, axis_name="particles")


def _start(method: training.Method, key: Any, checkpoints: Checkpoints | None, resume: bool) -> tuple[Any, list[float]]:
    if not (resume and checkpoints and checkpoints.latest):
        return jax.jit(method.init)(key), []
    return checkpoints.restore(lambda notes: sharding.abstract(method.init, key))


def _join(arguments: argparse.Namespace) -> None:
    """Find the other processes: from the arguments, or as the cluster's environment says."""
    if arguments.processes == 1 and not arguments.cluster:
        return
    if jax.config.jax_platforms == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    where = (arguments.coordinator, arguments.processes, arguments.process)
    jax.distributed.initialize(
        *(() if arguments.cluster else where),
        heartbeat_timeout_seconds=arguments.heartbeat_timeout,
        shutdown_timeout_seconds=arguments.heartbeat_timeout,
    )


def _report(**values: Any) -> None:
    if jax.process_index() == 0:
        print_result({"time": time.time(), **values})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling.multi_process", description=__doc__)
    parser.add_argument("--coordinator", default="localhost:9911", help="host:port of process 0")
    parser.add_argument("--processes", type=int, default=1, help="how many there are")
    parser.add_argument("--process", type=int, default=0, help="which this is, from 0")
    parser.add_argument("--cluster", action="store_true", help="on SLURM, Kubernetes or a TPU pod: find all that out")
    parser.add_argument("--heartbeat-timeout", type=int, default=30, help="seconds until a silent process is lost")
    parser.add_argument("--particles", type=int, default=128, help="J on all devices together")
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--driver", choices=("shard_map", "jit"), default="shard_map")
    parser.add_argument("--directory", type=Path, help="keep a checkpoint of every epoch here")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint if there is one")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
