"""Every step of the battery becomes a program for GPUs and TPUs, which takes none: it is lowered, not compiled.

What the library chooses by the kind of processor is chosen as there. Matrices are so large that no factorization is a
single instruction (on TPUs those of more than 256 rows are loops).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from jax import export
from solvers import test_battery as battery

from eki_jax import sharding
from eki_jax.optax import eki, ensemble_gradient, meki, value_and_extra_args

#: What ``jax.default_backend`` says there, and what exporting calls it.
PLATFORMS = {"gpu": "cuda", "tpu": "tpu"}
SAMPLES, PARTICLES = 152, 264  # 304 outputs: fewer particles, so that particles' matrices are taken


def shapes(tree: Any, rows: int | None = None) -> Any:
    """One array's shape a leaf, with a leading axis of ``rows`` if there is a number."""
    front = () if rows is None else (rows,)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((*front, *leaf.shape), leaf.dtype), tree)


BATCH = tuple(jax.ShapeDtypeStruct((SAMPLES, *leaf.shape[1:]), leaf.dtype) for leaf in battery.BATCH)
ENSEMBLE = shapes(battery.TEMPLATE, PARTICLES)


def lowered(
    monkeypatch: pytest.MonkeyPatch, backends: tuple[str, ...], make: Callable[[], tuple[Any, ...]]
) -> export.Exported:
    """A function and the shapes that it takes, as ``make`` has them on the last of the backends, lowered for all."""
    monkeypatch.setattr(jax, "default_backend", lambda: backends[-1])
    fn, *args = make()
    found = export.export(jax.jit(fn), platforms=[PLATFORMS[backend] for backend in backends])(*args)
    assert found.platforms == tuple(PLATFORMS[backend] for backend in backends)
    assert not any(leaf.dtype == jnp.float64 for leaf in found.out_avals)
    return found


def step_of(name: str, devices: int = 1) -> tuple[Any, ...]:
    """A row's step, and the shapes of its arguments."""
    row = battery.SOLVERS[name]
    settings: dict[str, Any] = {"axis_name": "particles"} if devices > 1 else {}
    if row.around_a_mean and row.particles == battery.J:  # not of an unscented step, whose number is the parameters'
        settings["particles"] = PARTICLES
    solver = row.make(battery.forward, **settings)
    if devices > 1:
        solver = sharding.shard_solver(solver, sharding.make_mesh(devices))
    start = (shapes(battery.TEMPLATE), shapes(battery.KEY)) if row.around_a_mean else (ENSEMBLE,)
    return solver.step, jax.eval_shape(solver.init, *start), BATCH


@pytest.mark.parametrize("name", battery.SOLVERS)
def test_steps_lower(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step on one device, in single precision."""
    assert lowered(monkeypatch, tuple(PLATFORMS), lambda: step_of(name)).nr_devices == 1


def sharded_case(name: str, backend: str) -> Any:
    """Quick are those of the code that others stand on, where the compiler has most to do itself."""
    quick = backend == "tpu" and battery.SOLVERS[name].alike is None
    return pytest.param(name, backend, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize(("name", "backend"), [sharded_case(n, b) for n in battery.SOLVERS for b in PLATFORMS])
def test_sharded_steps_lower(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step over eight devices, and what they send to each other."""
    found = lowered(monkeypatch, (backend,), lambda: step_of(name, 8))
    assert found.nr_devices == 8
    assert any(word in found.mlir_module() for word in ("all_reduce", "all_gather", "all_to_all"))


@pytest.mark.parametrize(
    "make", [lambda: eki(), lambda: meki(), lambda: optax.chain(ensemble_gradient(), optax.adam(0.1))]
)
def test_optax_updates_lower(make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """An update of a chain with optax, the evaluation of the model included."""
    tx, extra_args = optax.with_extra_args_support(make()), value_and_extra_args(battery.forward, battery.LOSS)

    def update(params: Any, state: Any, batch: Any) -> Any:
        value, extra = extra_args(params, batch)
        updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params, value=value, **extra)
        return optax.apply_updates(params, updates), state

    lowered(monkeypatch, tuple(PLATFORMS), lambda: (update, ENSEMBLE, jax.eval_shape(tx.init, ENSEMBLE), BATCH))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name != "etki")) for name in battery.SOLVERS]
)
def test_what_tpus_run_is_the_same(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over devices JAX does not check there what varies; the numbers are those of one device all the same."""
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    battery.sharded(battery.run(name), tmp_path)
