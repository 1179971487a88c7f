"""A table of solvers by a table of properties: what holds for one solver holds for all.

A new solver is one line in ``SOLVERS``. A cell that cannot hold is one line in ``REFUSED``, with the words of the error
that says why, and a line of the table in ``docs/design.md``; any other cell that fails is a defect.
"""

from __future__ import annotations

import functools
import pickle
import re
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eki_jax
from eki_jax import kalman, natural, sharding
from eki_jax.checkpoints import Checkpoints
from eki_jax.compact import compact_euler
from eki_jax.online import learn_stream, online
from eki_jax.optax import from_solver
from eki_jax.training import ensemble_method, epoch

ROOT = Path(__file__).parents[2]
J, KEY = 16, jax.random.key(0)
LOSS = eki_jax.squared_error()
TEMPLATE = {"w": jnp.zeros((3, 2), jnp.float32), "b": jnp.zeros(2, jnp.float32)}
PRIOR = eki_jax.gaussian(TEMPLATE, 1.0)
X = jax.random.normal(jax.random.key(1), (6, 3), jnp.float32)
TARGETS = jnp.tanh(X @ jax.random.normal(jax.random.key(2), (3, 2), jnp.float32) + 0.5)
BATCH = (X, TARGETS)


def forward(params: Any, x: Any) -> Any:
    return jnp.tanh(natural.affine(x, params["w"], params["b"]))


@functools.cache
def recipe() -> Callable[..., eki_jax.Solver]:
    """The discretization that CONTRIBUTING.md shows, as a reader would copy it into a file."""
    section = (ROOT / "CONTRIBUTING.md").read_text().split("## How to add a discretization")[1].split("\n## ")[0]
    module = types.ModuleType("recipe")
    sys.modules["recipe"] = module  # where pickle looks for the state's class
    exec(re.findall(r"```python\n(.*?)```", section, re.S)[0], module.__dict__)
    return module.averaged_euler


def mean_loss(state: Any, outputs: Any) -> Any:
    """The mean of the particles' losses."""
    return jax.vmap(LOSS, in_axes=(0, None))(outputs, TARGETS).mean()


class Row(NamedTuple):
    """A line of the table.

    Attributes:
        make: function of a model and of the settings that a test adds.
        around_a_mean: flag, True where ``init`` takes one particle and a key.
        ends: flag, True where three steps lead to the end.
        particles: number of particles.
        draws: flag, True where a step draws random numbers, which differ in double precision.
        loss: function of a state and its particles' outputs: the loss that the next step reports.
        alike: name of a row that stands on the same code: all of that row's cells are in the quick run, of this one's
            those of ``QUICK``; the others are slow.
    """

    make: Callable[..., eki_jax.Solver]
    around_a_mean: bool = False
    ends: bool = False
    particles: int = J
    draws: bool = False
    loss: Callable[[Any, Any], Any] = mean_loss
    alike: str | None = None


def natural_row(loss: Callable[[Any, Any], Any], **own: Any) -> Row:
    make = lambda f, **s: natural.natural_gradient(f, LOSS, **{"particles": J, "damping": 1e-2, **own, **s})
    return Row(make, around_a_mean=True, loss=loss)


def keyed(f: Callable[[Any, Any], Any] | None) -> Callable[..., Any] | None:
    """A model with a key and a state whose outputs are those of ``f``, so that it can be held against the table."""

    def model(params: Any, x: Any, *, key: Any, state: Any) -> Any:
        outputs = f(params, x) + state["shift"][None]
        outputs += 0 * jax.random.normal(key, (), outputs.dtype)
        return outputs, {"shift": 0 * outputs.mean(axis=0)}

    return None if f is None else model


def stateful(f: Callable[[Any, Any], Any] | None, **settings: Any) -> eki_jax.Solver:
    make = lambda g: eki_jax.euler(g, LOSS, STEP, **settings)
    return eki_jax.stateful(make, keyed(f), key=KEY, state=SHIFT)


SHIFT = {"shift": jnp.zeros(2, jnp.float32)}
STEP = eki_jax.frobenius_step_size(0.5)
NOISE = 0.5
NEAR = kalman.taper({"w": np.tile([0.0, 1.0], (3, 1)), "b": np.array([0.0, 1.0])}, 0.2, 2.0)
GROWTH = kalman.multiplicative_inflation(1.02)
of_misfits = lambda state, outputs: mean_loss(state, outputs) / NOISE
at_mean_output = lambda state, outputs: LOSS(outputs.mean(axis=0), TARGETS)
at_mean = lambda state, outputs: LOSS(forward(state.position, X), TARGETS)
of_misfit_at_mean = lambda state, outputs: at_mean(state, outputs) / NOISE

#: Three hundred programs run once or twice: to compile them without optimizations halves the time of the table.
compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

#: One line a solver.
SOLVERS: dict[str, Row] = {
    "euler": Row(lambda f, **s: eki_jax.euler(f, LOSS, STEP, **s)),
    "nesterov": Row(lambda f, **s: eki_jax.nesterov(f, LOSS, STEP, 0.5, **s)),
    "heavy_ball": Row(lambda f, **s: eki_jax.heavy_ball(f, LOSS, STEP, 0.5, **s), alike="euler"),
    "compact_euler": Row(lambda f, **s: compact_euler(f, LOSS, STEP, **s), alike="euler"),
    "stateful": Row(stateful, alike="euler"),
    "recipe": Row(lambda f, **s: recipe()(f, LOSS, STEP, **s), alike="euler"),
    "enkf": Row(lambda f, **s: kalman.enkf(f, NOISE, 0.3, **s), loss=of_misfits),
    "enkf_tempered": Row(
        lambda f, **s: kalman.enkf(f, NOISE, kalman.tempered(3), key=KEY, **s),
        ends=True,
        draws=True,
        loss=of_misfits,
        alike="enkf",
    ),
    "aldi": Row(
        lambda f, **s: kalman.aldi(f, NOISE, **{"prior": PRIOR, "key": KEY, **s}),
        draws=True,
        loss=of_misfits,
        alike="etki",
    ),
    "accelerated": Row(
        lambda f, **s: kalman.accelerated(kalman.etki(f, NOISE, 0.3, **s)), loss=of_misfits, alike="etki"
    ),
    "sparse": Row(lambda f, **s: kalman.sparse(f, NOISE, 0.3, **{"penalty": 0.2, **s}), loss=of_misfits, alike="etki"),
    "uki": Row(
        lambda f, **s: kalman.uki(f, NOISE, kalman.tempered(3), **{"prior": PRIOR, "particles": 24, **s}),
        around_a_mean=True,
        ends=True,
        particles=24,
        loss=of_misfit_at_mean,
    ),
    "etki": Row(lambda f, **s: kalman.etki(f, NOISE, 0.3, **s), loss=of_misfits),
    "etki_local": Row(
        lambda f, **s: kalman.etki(f, NOISE, 0.3, **{"localization": NEAR, "inflation": GROWTH, **s}),
        loss=of_misfits,
        alike="etki",
    ),
    "natural_full": natural_row(at_mean_output, deviations=natural.full_rank(1.0))._replace(alike="natural_low"),
    "natural_low": natural_row(at_mean_output, averaging=0.5),
    "natural_per_sample": natural_row(
        at_mean,
        deviations=natural.per_sample(feedback=natural.learned_feedback(X)),
        optimizer=optax.sgd(0.1, momentum=0.5),
    )._replace(alike="natural_low"),
    "natural_localized": natural_row(at_mean, estimate=natural.localized(4))._replace(alike="natural_low"),
    "natural_adaptive": natural_row(at_mean_output, damping=natural.adaptive_damping(1e-2))._replace(
        alike="natural_low"
    ),
}
AROUND_A_MEAN = [name for name, row in SOLVERS.items() if row.around_a_mean]

_HAS_NONE = "particles of a natural gradient are a mean and a key"
_INSIDE, _MODEL = "sees inside of the model", "adaptive, which evaluates the model"
#: (property, solver) -> the words of the TypeError that says why it cannot hold.
REFUSED: dict[tuple[str, str], str] = {
    **{("with_ensemble", name): _HAS_NONE for name in AROUND_A_MEAN},
    ("with_ensemble", "uki"): "points of an unscented step are a mean and the root of a covariance",
    ("precision", "uki"): "is no setting of this solver",
    **{("method_with_redraw", name): "resample: True" for name in AROUND_A_MEAN},
    **{("method_with_step_noise", name): "step_noise: True" for name in AROUND_A_MEAN},
    **{("optax", name): "value_and_natural_direction" for name in AROUND_A_MEAN},
    **{("targets_per_particle", name): "targets_axis: 0; is no setting" for name in AROUND_A_MEAN},
    **{(prop, "natural_localized"): _INSIDE for prop in ("ask_and_tell", "online")},
    **{(prop, "natural_per_sample"): "noise inside of the model" for prop in ("ask_and_tell", "online")},
    ("precision", "natural_localized"): "which a localized step does not",
    **{(prop, "natural_adaptive"): _MODEL for prop in ("ask_and_tell", "online")},
}


class Run(NamedTuple):
    """A solver, compiled once for all of its cells, and where three steps lead it."""

    name: str
    row: Row
    solver: eki_jax.Solver
    init: Callable[[Any], Any]
    step: Callable[[Any, Any], Any]
    start: Any
    states: list[Any]
    infos: list[Any]


@functools.cache
def particles(seed: int = 0) -> Any:
    """An ensemble, drawn once: an eager draw would be compiled anew for every cell."""
    return compiled(lambda key: eki_jax.sample_ensemble(key, PRIOR, J))(jax.random.key(seed))


@functools.cache
def mean() -> Any:
    return compiled(PRIOR.sample)(KEY)


def started(row: Row, solver: eki_jax.Solver, key: Any) -> Any:
    if row.around_a_mean:
        return solver.init(PRIOR.sample(key), key)
    return solver.init(eki_jax.sample_ensemble(key, PRIOR, J))


@functools.cache
def run(name: str) -> Run:
    row = SOLVERS[name]
    solver = row.make(forward)
    init, step = compiled(functools.partial(started, row, solver)), compiled(solver.step)
    start = init(KEY)
    states, infos = [start], []
    for _ in range(3):
        state, info = step(states[-1], BATCH)
        states.append(state)
        infos.append(info)
    return Run(name, row, solver, init, step, start, states, infos)


def close(a: Any, b: Any, tolerance: float = 2e-4) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        np.testing.assert_allclose(
            np.asarray(one, np.float64), np.asarray(other, np.float64), rtol=tolerance, atol=tolerance
        )


def walk(solver: eki_jax.Solver, state: Any, steps: int = 2) -> tuple[Any, Any]:
    """The estimate after some steps, and every step's loss."""

    def body(state: Any, _: None) -> tuple[Any, Any]:
        state, info = solver.step(state, BATCH)
        return state, info.loss

    state, losses = jax.lax.scan(body, state, length=steps)
    return solver.estimate(state), losses


def init(r: Run, tmp_path: Path) -> None:
    """A state ends with the count of steps, int32, and holds the particles that it was given."""
    assert (int(r.start.count), r.start.count.dtype) == (0, jnp.int32)
    shapes = jax.tree.map(jnp.shape, r.solver.ensemble(r.start))
    assert shapes == {"w": (r.row.particles, 3, 2), "b": (r.row.particles, 2)}
    if not r.row.around_a_mean:
        ensemble = particles()
        close(r.solver.ensemble(r.start), ensemble, 1e-2 if "deviations" in r.start._fields else 1e-6)
        with pytest.raises(ValueError, match="J = 1 particle"):
            r.solver.init(jax.tree.map(lambda leaf: leaf[:1], ensemble))


def step(r: Run, tmp_path: Path) -> None:
    """Steps count, and lower the loss; without a model they say what to do."""
    assert [int(state.count) for state in r.states] == [0, 1, 2, 3]
    assert float(r.infos[2].loss) < float(r.infos[0].loss)
    with pytest.raises(TypeError, match="forward: None"):
        r.row.make(None).step(r.start, BATCH)


def ask_and_tell(r: Run, tmp_path: Path) -> None:
    """Outputs that came from elsewhere lead where a step leads."""

    def tell(state: Any) -> Any:
        outputs = eki_jax.evaluate(forward, r.solver.ensemble(state), X)
        return r.row.make(None).update(state, outputs, TARGETS)

    state, info = compiled(tell)(r.start)
    close(state, r.states[1])
    close(info.loss, r.infos[0].loss)
    with pytest.raises(ValueError, match=f"outputs: leading axis 5.*{r.row.particles} particles"):
        r.solver.update(r.start, jnp.zeros((5, 6, 2)), TARGETS)


def estimate(r: Run, tmp_path: Path) -> None:
    """One particle to predict with: the mean of the positions, or the mean that the particles are around."""
    found = compiled(r.solver.estimate)(r.states[3])
    assert jax.tree.map(jnp.shape, found) == {"w": (3, 2), "b": (2,)}
    if r.row.around_a_mean:
        average = getattr(r.states[3], "average", None)
        wanted = r.states[3].position if average is None else average
    else:
        wanted = jax.tree.map(lambda leaf: leaf.mean(axis=0), r.states[3].position)
    close(found, wanted, 2e-3 if "deviations" in r.start._fields else 1e-5)


def with_ensemble(r: Run, tmp_path: Path) -> None:
    """Other particles take the place of the old ones, and the count goes on."""
    other = particles(9)
    state = r.solver.with_ensemble(r.states[2], other)
    close(r.solver.ensemble(state), other, 1e-2 if "deviations" in state._fields else 1e-5)
    assert jax.tree.structure(state) == jax.tree.structure(r.states[2])
    assert int(state.count) == 2


def info_fields(r: Run, tmp_path: Path) -> None:
    """Every info has the loss, whether all was finite, how many failed, and whether and why not the step was taken."""
    info = r.infos[0]
    kinds = {"loss": jnp.floating, "is_finite": jnp.bool_, "failed": jnp.integer, "moved": jnp.bool_}
    kinds |= {"reason": jnp.integer}
    for name, kind in kinds.items():
        value = getattr(info, name)
        assert value.shape == ()
        assert jnp.issubdtype(value.dtype, kind), name
    assert (bool(info.is_finite), int(info.failed), bool(info.moved), int(info.reason)) == (True, 0, True, 0)
    outputs = jax.vmap(forward, in_axes=(0, None))(r.solver.ensemble(r.start), X)
    np.testing.assert_allclose(info.loss, r.row.loss(r.start, outputs), rtol=1e-2)


def failures(r: Run, tmp_path: Path) -> None:
    """A particle whose outputs are not finite is counted, and what the others do stays finite."""
    first = r.solver.ensemble(r.start)["b"][:, 0]
    fails = jnp.sort(first)[-1]  # one particle's, and not where the others go
    broken = lambda p, x: jnp.where(jnp.abs(p["b"][0] - fails) < 1e-4, jnp.nan, forward(p, x))
    number: int | None = 1
    if bool(jnp.all(first == fails)):  # they differ in what their layers return: those fail that return the most
        most = forward(mean(), X)[:, 0].max() + 1e-3
        broken = lambda p, x: jnp.where((z := forward(p, x))[:, :1] > most, jnp.nan, z)
        number = None
    if jax.config.jax_debug_nans and getattr(r.infos[0], "losses", None) is not None:
        # What the switch is for: the particle's loss that a step reports is NaN.
        with pytest.raises(FloatingPointError, match="nan"):
            r.row.make(broken).step(r.start, BATCH)
        return
    state, info = compiled(r.row.make(broken).step)(r.start, BATCH)
    assert (bool(info.is_finite), bool(info.moved)) == (False, True)
    assert int(info.failed) == number if number else 1 <= int(info.failed) < r.row.particles - 1
    assert bool(jnp.isfinite(info.loss))
    for leaf in jax.tree.leaves((r.solver.estimate(state), r.solver.ensemble(state))):
        assert bool(jnp.isfinite(leaf).all())
    assert int(state.count) == 1
    recovered, info = r.step(state, BATCH)
    assert (int(info.failed), bool(info.is_finite)) == (0, True)
    assert float(r.step(recovered, BATCH)[1].loss) < float(r.infos[0].loss)


def mapped_axis(r: Run, tmp_path: Path) -> None:
    """Over a mapped axis the particles of four devices are those of one."""
    solver = r.row.make(forward, axis_name="devices")

    def from_start(start: Any) -> Any:
        return walk(solver, solver.init(*start) if r.row.around_a_mean else solver.init(start))

    if r.row.around_a_mean:
        start, axes = (mean(), KEY), None
    else:
        whole = particles()
        start, axes = jax.tree.map(lambda leaf: leaf.reshape(4, 4, *leaf.shape[1:]), whole), 0
    found = compiled(jax.vmap(from_start, in_axes=(axes,), axis_name="devices", axis_size=4))(start)
    for device in (0, 3):
        found_there = jax.tree.map(lambda leaf, device=device: leaf[device], found)
        close(found_there, (r.solver.estimate(r.states[2]), jnp.stack([info.loss for info in r.infos[:2]])))


def sharded(r: Run, tmp_path: Path, driver: str = "shard_map") -> None:
    """Spread over eight devices it is what it is on one, in all of its functions."""
    solver = r.row.make(forward, axis_name="particles")
    solver = sharding.shard_solver(solver, sharding.make_mesh(8), driver=driver)

    def all_of_it(solver: eki_jax.Solver, key: Any) -> dict[str, Any]:
        start = started(r.row, solver, key)
        state, info = solver.step(start, BATCH)
        found = {"start": start, "estimate": solver.estimate(state), "ensemble": solver.ensemble(state)}
        found |= {"loss": info.loss, "failed": info.failed, "moved": info.moved, "done": solver.done(state)}
        if not r.row.around_a_mean:
            outputs = jax.vmap(forward, in_axes=(0, None))(solver.ensemble(start), X)
            told, _ = solver.update(start, outputs, TARGETS)
            found |= {"told": solver.estimate(told), "back": solver.with_ensemble(state, solver.ensemble(start))}
        return found

    compact = "deviations" in r.start._fields  # rounded to bfloat16
    close(
        compiled(functools.partial(all_of_it, solver))(KEY),
        compiled(functools.partial(all_of_it, r.solver))(KEY),
        1e-2 if compact else 2e-4,
    )
    assert solver.passes(r.row.particles) == r.solver.passes(r.row.particles)


#: Compiled once for the cells of both.
both = {"chunk_size": 5, "precision": jax.lax.Precision.HIGHEST}


@functools.cache
def varied(name: str, **settings: Any) -> tuple[Any, str]:
    """Two steps with other settings, and the program that takes them."""
    r = run(name)
    solver = r.row.make(forward, **settings)
    traced = compiled(functools.partial(walk, solver)).trace(r.start)
    return traced.lower().compile()(r.start), str(traced.jaxpr)


def chunks(r: Run, tmp_path: Path) -> None:
    """Evaluating a few particles at a time changes nothing."""
    found, program = varied(r.name, **(both if ("precision", r.name) not in REFUSED else {"chunk_size": 5}))
    close(found, (r.solver.estimate(r.states[2]), jnp.stack([info.loss for info in r.infos[:2]])), 1e-3)
    lengths = {r.row.particles // 4, r.row.particles // 5}  # of 16 particles: four at a time, or five and a rest
    assert any(f"length={length}" in program for length in lengths)


def precision(r: Run, tmp_path: Path) -> None:
    """The precision of the products is a setting; the highest changes little in float32."""
    found, program = varied(r.name, **both)
    close(found, (r.solver.estimate(r.states[2]), jnp.stack([info.loss for info in r.infos[:2]])), 1e-3)
    assert "HIGHEST" in program


def targets_per_particle(r: Run, tmp_path: Path) -> None:
    """Targets of each particle's own, all alike, are the common targets."""
    own = jnp.broadcast_to(TARGETS, (J, *TARGETS.shape))
    state, info = compiled(r.row.make(forward, targets_axis=0).step)(r.start, (X, own))
    close(state, r.states[1])
    close(info.loss, r.infos[0].loss)
    apart = own.at[0].add(5.0)
    moved, _ = compiled(r.row.make(forward, targets_axis=0).step)(r.start, (X, apart))
    assert not np.allclose(r.solver.estimate(moved)["w"], r.solver.estimate(state)["w"], atol=1e-3)


def method(r: Run, tmp_path: Path, **options: Any) -> None:
    """The training loop takes it: an epoch of two batches, its metrics, its accuracy and its passes."""
    labels = jnp.argmax(TARGETS, axis=-1)
    size = r.row.particles
    made = ensemble_method(r.solver, forward, PRIOR, size, **options)
    state, metrics = compiled(epoch(made, 3))(made.init(KEY), KEY, X, TARGETS)
    assert {"train_loss", "failed", "is_finite", "moved"} <= set(metrics)
    assert all(values.shape == (2,) and bool(jnp.isfinite(values).all()) for values in metrics.values())
    assert int(state.count) == 2
    assert made.passes(size) == r.solver.passes(size)
    share = compiled(made.accuracy)(state, X, labels).mean
    np.testing.assert_allclose(share, jnp.mean(jnp.argmax(forward(made.estimate(state), X), axis=-1) == labels))
    if made.redraw is not None:
        redrawn = made.redraw(state, jax.random.key(4), 24)
        assert int(redrawn.count) == 2
        assert r.solver.ensemble(redrawn)["w"].shape == (24, 3, 2)
        if "time" in state._fields:
            assert float(redrawn.time) == float(state.time) > 0


def method_with_redraw(r: Run, tmp_path: Path) -> None:
    """EKI(R): redrawn around its mean, to another size, with the count (and the time) going on."""
    method(r, tmp_path, resample=True)


def method_with_step_noise(r: Run, tmp_path: Path) -> None:
    """MEKI(R): noise after every step."""
    method(r, tmp_path, step_noise=True)


def online_learning(r: Run, tmp_path: Path) -> None:
    """One step a sample, each particle with a recurrent state of its own."""
    cell = lambda p, carry, x: (0.5 * carry + x, forward(p, (x + 0 * carry)[None])[0])
    learner = online(cell, r.row.make(None))
    start = (mean(), KEY) if r.row.around_a_mean else (particles(),)
    state = learner.init(*start, jnp.zeros(3))
    assert state.carry.shape == (r.row.particles, 3)
    state, predictions = compiled(functools.partial(learn_stream, learner))(state, BATCH)
    assert predictions.shape == TARGETS.shape
    assert bool(jnp.isfinite(predictions).all())
    assert int(state.solver.count) == (3 if r.row.ends else len(X))


def optax_chain(r: Run, tmp_path: Path) -> None:
    """As a gradient transformation it takes the solver's own steps."""
    tx = from_solver(r.row.make(None))
    params = particles()
    state, zeros = tx.init(params), jax.tree.map(jnp.zeros_like, params)

    def two_updates(params: Any, state: Any) -> Any:
        for _ in range(2):
            outputs = eki_jax.evaluate(forward, params, X)
            updates, state = tx.update(zeros, state, params, outputs=outputs, targets=TARGETS)
            params = optax.apply_updates(params, updates)
        return params

    found = compiled(two_updates)(params, state)
    close(found, r.solver.ensemble(r.states[2]), 1e-2 if "deviations" in r.start._fields else 2e-4)


def compiles_once(r: Run, tmp_path: Path) -> None:
    """A compiled step is traced once, whatever the state's values."""
    traces = []

    def counted(params: Any, x: Any) -> Any:
        traces.append(1)
        return forward(params, x)

    stepped = compiled(r.row.make(counted).step)
    state, _ = stepped(r.start, BATCH)
    once = len(traces)
    for _ in range(2):
        state, _ = stepped(state, BATCH)
    assert len(traces) == once > 0
    close(state, r.states[3])


def scan(r: Run, tmp_path: Path) -> None:
    """In a scan its states keep their structure and dtypes, and its steps are the same."""
    state, infos = compiled(lambda s: jax.lax.scan(lambda s, _: r.solver.step(s, BATCH), s, length=3))(r.start)
    close(state, r.states[3])
    close(infos.loss, jnp.stack([info.loss for info in r.infos]))


def donation(r: Run, tmp_path: Path) -> None:
    """A donated state is used up, without a warning, and the step is the same."""
    state = jax.tree.map(jnp.copy, r.start)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, _ = compiled(r.solver.step, donate_argnums=0)(state, BATCH)
    close(found, r.states[1])
    leaves = state.position if r.row.around_a_mean else state[0]
    kept = jax.config.jax_debug_nans  # that switch keeps arguments, to run a step again operation by operation
    assert all(leaf.is_deleted() != kept for leaf in jax.tree.leaves(leaves))


def vmap_over_seeds(r: Run, tmp_path: Path) -> None:
    """Runs from several seeds at once are the runs one by one."""

    from_seed = lambda key: walk(r.solver, started(r.row, r.solver, key))
    found = compiled(jax.vmap(from_seed))(jnp.stack([KEY, jax.random.key(5)]))
    losses = jnp.stack([info.loss for info in r.infos[:2]])
    close(jax.tree.map(lambda leaf: leaf[0], found), (r.solver.estimate(r.states[2]), losses))
    assert not np.allclose(found[0]["w"][0], found[0]["w"][1], atol=1e-3)


def float64(r: Run, tmp_path: Path) -> None:
    """Double precision in, double precision throughout, and close to single."""
    with jax.enable_x64(True):
        wide = lambda tree: jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), tree)
        state = r.solver.init(wide(mean()), KEY) if r.row.around_a_mean else r.solver.init(wide(particles()))
        before = jax.tree.map(lambda leaf: leaf.dtype, state)
        state, info = compiled(r.solver.step)(state, wide(BATCH))
        assert jax.tree.map(lambda leaf: leaf.dtype, state) == before
        found = r.solver.estimate(state)
        assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {np.dtype(np.float64)}
        assert info.loss.dtype == np.float64
        if not (r.row.around_a_mean or r.row.draws):  # those draw in float64 too, which gives other random numbers
            for name, value in r.solver.estimate(r.states[1]).items():
                np.testing.assert_allclose(found[name], value, rtol=5e-3, atol=5e-3)


def checkpoint(r: Run, tmp_path: Path) -> None:
    """A checkpoint brings a state back bit for bit."""
    checkpoints = Checkpoints(tmp_path / "run", {"solver": "battery"})
    checkpoints.save(1, r.states[2], notes={"epoch": 1})
    restored, _ = checkpoints.restore(lambda notes: r.states[2])
    checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, restored, r.states[2])
    close(r.step(restored, BATCH)[0], r.states[3], 0)


def pickled(r: Run, tmp_path: Path) -> None:
    """A pickled state goes on where it was."""
    restored = pickle.loads(pickle.dumps(jax.device_get(r.states[2])))
    assert type(restored) is type(r.states[2])
    close(r.step(restored, BATCH)[0], r.states[3], 0)


def done(r: Run, tmp_path: Path) -> None:
    """Only a method with an end is ever done, and then it is."""
    flags = [r.solver.done(state) for state in r.states]
    assert all(flag.shape == () and flag.dtype == bool for flag in flags)
    assert [bool(flag) for flag in flags] == [False, False, False, r.row.ends]


def passes(r: Run, tmp_path: Path) -> None:
    """Its passes are as many as samples that the model really sees in a step."""
    seen = []

    def counted(params: Any, x: Any) -> Any:
        return jax.pure_callback(lambda rows: (seen.append(len(rows)), rows)[1], x, x, vmap_method="sequential")

    model = lambda p, x: forward(p, counted(p, x + 0 * jnp.sum(p["b"])))
    jax.block_until_ready(compiled(r.row.make(model).step)(r.start, BATCH))
    assert r.solver.passes(r.row.particles) * len(X) == sum(seen)


#: One line a property.
PROPERTIES: dict[str, Callable[[Run, Path], None]] = {
    "init": init,
    "step": step,
    "ask_and_tell": ask_and_tell,
    "estimate": estimate,
    "with_ensemble": with_ensemble,
    "info": info_fields,
    "failures": failures,
    "mapped_axis": mapped_axis,
    "sharded": sharded,
    "chunks": chunks,
    "precision": precision,
    "targets_per_particle": targets_per_particle,
    "method": method,
    "method_with_redraw": method_with_redraw,
    "method_with_step_noise": method_with_step_noise,
    "online": online_learning,
    "optax": optax_chain,
    "compiles_once": compiles_once,
    "scan": scan,
    "donation": donation,
    "vmap_over_seeds": vmap_over_seeds,
    "float64": float64,
    "checkpoint": checkpoint,
    "pickle": pickled,
    "done": done,
    "passes": passes,
}


#: What rows that stand on another's code show in the quick run.
QUICK = (
    "init",
    "step",
    "ask_and_tell",
    "estimate",
    "with_ensemble",
    "info",
    "failures",
    "sharded",
    "done",
)


def cell(solver: str, prop: str) -> Any:
    """A cell of the table as a parameter of the test."""
    quick = SOLVERS[solver].alike is None or prop in QUICK or (prop, solver) in REFUSED
    return pytest.param(solver, prop, marks=() if quick else pytest.mark.slow, id=f"{solver}-{prop}")


@pytest.mark.parametrize(("solver", "prop"), [cell(solver, prop) for solver in SOLVERS for prop in PROPERTIES])
def test_cell(solver: str, prop: str, tmp_path: Path) -> None:
    """The property holds for the solver, or is refused by the error that the table of refusals promises."""
    words = REFUSED.get((prop, solver))
    if words is None:
        PROPERTIES[prop](run(solver), tmp_path)
    else:
        with pytest.raises(TypeError, match=re.escape(words)):
            PROPERTIES[prop](run(solver), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("driver", ["pmap", "jit"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_other_drivers(solver: str, driver: str, tmp_path: Path) -> None:
    """Spread by the other drivers it is what it is on one device."""
    sharded(run(solver), tmp_path, driver)


def test_refusals_are_documented() -> None:
    """The table in docs/design.md names each property that some solvers are refused, and how many they are."""
    page = (ROOT / "docs/design.md").read_text().split("## Cells that cannot hold")[1].split("\n## ")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", page, re.M))
    wanted: dict[str, set[str]] = {}
    for prop, solver in REFUSED:
        wanted.setdefault(prop, set()).add(solver)
    assert {prop: set(re.findall(r"`(\w+)`", solvers)) for prop, solvers in rows.items()} == wanted
