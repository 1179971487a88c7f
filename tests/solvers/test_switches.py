"""The solvers under JAX's switches: strict promotion, guards against transfers and leaks, no compiler, keys, meshes."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from solvers import test_battery as battery

import eki_jax
from eki_jax import natural, sharding
from eki_jax.training import ensemble_method, fit

ROOT = Path(__file__).parents[2]
SWITCHES: dict[str, dict[str, Any]] = {
    "strict": {
        "jax_numpy_dtype_promotion": "strict",
        "jax_numpy_rank_promotion": "raise",
        "jax_transfer_guard": "disallow",
    },
    "debug_nans": {"jax_debug_nans": True},
    "leaks": {"jax_check_tracer_leaks": True},
    "disable_jit": {"jax_disable_jit": True},
}


@contextlib.contextmanager
def switched(name: str) -> Iterator[None]:
    before = {option: getattr(jax.config, option) for option in SWITCHES[name]}
    try:
        for option, value in SWITCHES[name].items():
            jax.config.update(option, value)
        yield
    finally:
        for option, value in before.items():
            jax.config.update(option, value)


@pytest.mark.parametrize("switch", ["strict", *(pytest.param(n, marks=pytest.mark.slow) for n in list(SWITCHES)[1:])])
@pytest.mark.parametrize("solver", battery.SOLVERS)
def test_a_step_under_a_switch(solver: str, switch: str) -> None:
    """All functions of a solver, called as they are."""
    row = battery.SOLVERS[solver]
    start = (battery.mean(), battery.KEY) if row.around_a_mean else (battery.particles(),)
    jax.block_until_ready(battery.BATCH)
    with switched(switch):
        made = row.make(battery.forward)
        state, info = made.step(made.init(*start), battery.BATCH)
        found = jax.block_until_ready((info.moved, made.estimate(state), made.ensemble(state), made.done(state)))
    assert bool(found[0])
    wanted = battery.run(solver)
    battery.close(found[1], wanted.solver.estimate(wanted.states[1]), 2e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment",
    [
        {"JAX_NUMPY_DTYPE_PROMOTION": "strict", "JAX_NUMPY_RANK_PROMOTION": "raise"},
        {"JAX_DEBUG_NANS": "1"},
        {"JAX_CHECK_TRACER_LEAKS": "1"},
        {"JAX_ENABLE_X64": "1"},
        {"PYTHONOPTIMIZE": "1"},
    ],
    ids=lambda environment: next(iter(environment)).lower(),
)
def test_the_battery_under_a_switch(environment: dict[str, str]) -> None:
    """The whole table in a process of its own; pytest says that ``-O`` takes the assertions out of its own plugins."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/solvers/test_battery.py"]
    command += ["-W", "ignore::pytest.PytestConfigWarning"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg", "threefry2x32", None])
def test_keys_of_every_implementation(impl: str | None) -> None:
    """New style and raw: the same ensemble on one device and on eight, and steps that draw."""
    key = jax.random.PRNGKey(0) if impl is None else jax.random.key(0, impl=impl)
    prior = eki_jax.gaussian(jnp.zeros(3), 1.0)
    one = eki_jax.sample_ensemble(key, prior, 16)
    many = sharding.sample_ensemble(key, prior, 16, sharding.make_mesh(8))
    np.testing.assert_allclose(one, many, rtol=1e-6)
    x = jax.random.normal(jax.random.key(1), (6, 3))
    batch = (x, x @ jnp.ones(3))
    around = natural.natural_gradient(lambda p, x: x @ p, eki_jax.squared_error(), 8)
    assert bool(around.step(around.init(jnp.zeros(3), key), batch)[1].moved)
    kalman = eki_jax.kalman.enkf(lambda p, x: x @ p, 1.0, key=key, failures=eki_jax.redraw_failed(key))
    assert bool(kalman.step(kalman.init(one), batch)[1].moved)


@pytest.mark.parametrize("driver", sharding.DRIVERS)
def test_meshes_of_explicit_axes_are_refused(driver: Any) -> None:
    """In one check, that says what is wanted; so is a mesh that jax.set_mesh left in a driver's way."""
    solver = eki_jax.euler(lambda p, x: x @ p, eki_jax.squared_error(), axis_name="particles")
    start, batch = jnp.arange(48.0).reshape(16, 3), (jnp.ones((2, 3)), jnp.ones(2))
    explicit = jax.make_mesh((8,), ("particles",), axis_types=(AxisType.Explicit,))
    with pytest.raises(ValueError, match=r"mesh: axes .*Explicit.*wanted Auto ones"):
        sharding.shard_solver(solver, explicit, driver=driver).init(start)
    auto = sharding.make_mesh(8)
    spread = sharding.shard_solver(solver, auto, driver=driver)
    with jax.set_mesh(auto):
        if driver == "pmap":
            with pytest.raises(ValueError, match=r"driver: 'pmap' under jax\.set_mesh"):
                spread.init(start)
        else:
            assert bool(spread.step(spread.init(start), batch)[1].moved)
    plain = eki_jax.euler(lambda p, x: x @ p, eki_jax.squared_error())
    with jax.set_mesh(explicit):
        assert bool(plain.step(plain.init(start), batch)[1].moved)
    with pytest.raises(ValueError, match="ensemble: over a mesh of Explicit axes"):
        plain.init(jax.device_put(start, NamedSharding(explicit, PartitionSpec("particles"))))


@pytest.mark.slow
def test_training_without_implicit_transfers() -> None:
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(20, 3)).astype(np.float32), rng.integers(0, 3, 20)
    forward = lambda p, x: jax.nn.softmax(x @ p)
    solver = eki_jax.euler(forward, eki_jax.cross_entropy())
    method = ensemble_method(solver, forward, eki_jax.gaussian(jnp.zeros((3, 3)), 1.0), 8)
    key = jax.random.key(0)
    with jax.transfer_guard("disallow"):
        result = fit(method, (x, labels), (x, labels), batch_size=5, epochs=2, key=key, progress=False)
    assert len(result.history) == 2


def test_donating_leaves_the_callers_parameters() -> None:
    """The first state of a natural gradient has buffers of its own."""
    params, x = {"w": jnp.ones(3)}, jnp.ones((2, 3))
    solver = natural.natural_gradient(lambda p, x: x @ p["w"], eki_jax.squared_error(), 4)
    state = solver.init(params, jax.random.key(0))
    jax.jit(solver.step, donate_argnums=0)(state, (x, jnp.zeros(2)))
    assert not params["w"].is_deleted()
