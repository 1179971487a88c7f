"""Models with a random key or a state of their own, through the solvers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eki_jax
from eki_jax import kalman, natural, sharding
from eki_jax.compact import compact_euler
from eki_jax.ensembles.drawing import particle_keys
from eki_jax.solvers.stateful import Inputs
from eki_jax.training import ensemble_method, fit

LOSS = eki_jax.squared_error()
KEY = jax.random.key(5)
X = jax.random.normal(jax.random.key(0), (8, 3))
TARGETS = X @ jnp.array([1.0, -2.0, 3.0])
BATCH = (X, TARGETS)
PRIOR = eki_jax.gaussian(jnp.zeros(3), 1.0)
STATE = {"mean": jnp.zeros(()), "calls": jnp.zeros((), jnp.int32)}


def noisy(params: Any, x: Any, *, key: Any) -> Any:
    return x @ params + 0.3 * jax.random.normal(key, x.shape[:1])


def averaging(params: Any, x: Any, *, state: Any) -> Any:
    outputs = x @ params
    return outputs + state["mean"], {"mean": 0.5 * state["mean"] + 0.5 * outputs.mean(), "calls": state["calls"] + 1}


def both(params: Any, x: Any, *, key: Any, state: Any) -> Any:
    outputs, state = averaging(params, x, state=state)
    return outputs + noisy(0 * params, x, key=key), state


def euler(f: Any, **settings: Any) -> eki_jax.Solver:
    return eki_jax.euler(f, LOSS, **settings)


def ensemble(particles: int = 16) -> Any:
    return eki_jax.sample_ensemble(jax.random.key(1), PRIOR, particles)


def numbers(data: Any) -> tuple[int, ...]:
    return tuple(np.asarray(data).tolist())


def recorded(solver_of: Callable[..., Any], **options: Any) -> tuple[Any, list[Any]]:
    """A solver whose particles' keys are written down, in the order of the particles."""
    seen: list[Any] = []

    def model(params: Any, x: Any, *, key: Any) -> Any:
        data = jax.random.key_data(key)
        jax.debug.callback(lambda which, data: seen.append((round(float(which), 4), numbers(data))), params[0], data)
        return x @ params

    return eki_jax.stateful(solver_of, model, key=KEY, **options), seen


def keys_of_a_step(solver: Any, seen: list[Any], state: Any) -> tuple[Any, dict[float, Any]]:
    seen.clear()
    state, _ = jax.block_until_ready(jax.jit(solver.step)(state, BATCH))
    jax.effects_barrier()
    return state, dict(seen)


def test_a_key_for_every_particle() -> None:
    """Particles have keys of their own, other ones in each step, and the same ones for any chunks."""
    solver, seen = recorded(euler)
    start = solver.init(ensemble())
    state, first = keys_of_a_step(solver, seen, start)
    _, second = keys_of_a_step(solver, seen, state)
    assert len({*first.values()}) == len(first) == 16
    assert not {*first.values()} & {*second.values()}
    chunked, also = recorded(functools.partial(euler, chunk_size=3))
    assert keys_of_a_step(chunked, also, chunked.init(ensemble()))[1] == first


def test_a_common_key() -> None:
    """With common=True all particles of a step have one key, and it changes from step to step."""
    solver, seen = recorded(euler, common=True)
    state, first = keys_of_a_step(solver, seen, solver.init(ensemble()))
    _, second = keys_of_a_step(solver, seen, state)
    assert len(first) == 16
    assert len({*first.values()}) == len({*second.values()}) == 1
    assert {*first.values()} != {*second.values()}


def test_keys_are_not_the_solvers_own() -> None:
    """The keys are none that a solver, which was given the same one, folds the count and a particle's index into."""
    solver, seen = recorded(euler)
    _, found = keys_of_a_step(solver, seen, solver.init(ensemble()))
    its_own = jax.random.key_data(particle_keys(jax.random.fold_in(KEY, 0), 16, None))
    assert not {*found.values()} & {*map(numbers, its_own)}


def test_outputs_are_those_of_the_keys() -> None:
    """A step is that of the outputs which the model has with the keys that the documentation promises."""
    solver = eki_jax.stateful(euler, noisy, key=KEY)
    start = solver.init(ensemble())
    state, info = solver.step(start, BATCH)
    step_key = jax.random.fold_in(jax.random.wrap_key_data(start.key), 0)
    keys = jax.vmap(functools.partial(jax.random.fold_in, step_key))(jnp.arange(16))
    outputs = jax.vmap(lambda p, k: noisy(p, X, key=k))(start.inner.ensemble, keys)
    wanted, told = euler(None).update(euler(None).init(ensemble()), outputs, TARGETS)
    np.testing.assert_allclose(state.inner.ensemble, wanted.ensemble, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(info.loss, told.loss, rtol=1e-5)
    assert not hasattr(info, "refreshed")


SOLVERS = {
    "euler": euler,
    "compact": lambda f, **s: compact_euler(f, LOSS, **s),
    "etki": lambda f, **s: kalman.etki(f, 1.0, 0.3, **s),
    "sparse": lambda f, **s: kalman.sparse(f, 1.0, 0.3, penalty=0.1, **s),
    "aldi": lambda f, **s: kalman.aldi(f, 1.0, prior=PRIOR, key=KEY, **s),
}


@pytest.mark.parametrize(
    "name", [name if name == "euler" else pytest.param(name, marks=pytest.mark.slow) for name in SOLVERS]
)
def test_eight_devices_equal_one(name: str) -> None:
    """Keys of the particles' own and the state of the mean do not depend on the devices."""
    made = lambda **s: eki_jax.stateful(lambda f: SOLVERS[name](f, **s), both, key=KEY, state=STATE)
    one, many = made(), sharding.shard_solver(made(axis_name="particles"), sharding.make_mesh(8))

    def run(solver: Any) -> Any:
        state = solver.init(ensemble())
        state, infos = jax.lax.scan(lambda state, _: solver.step(state, BATCH), state, length=3)
        return solver.estimate(state), state.model_state, infos.loss

    tolerance = 2e-2 if name == "compact" else 1e-4
    found, wanted = jax.jit(functools.partial(run, many))(), jax.jit(functools.partial(run, one))()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), found, wanted)
    assert int(found[1]["calls"]) == 3


def test_the_state_is_refreshed_at_the_mean() -> None:
    """After a step the state is what a call at the new estimate with the step's batch and key returns."""
    solver = eki_jax.stateful(euler, both, key=KEY, state=STATE)
    start = solver.init(ensemble())
    state, info = solver.step(start, BATCH)
    _, wanted = averaging(solver.estimate(state), X, state=STATE)
    np.testing.assert_allclose(state.model_state["mean"], wanted["mean"], rtol=1e-5)
    assert (int(state.model_state["calls"]), bool(info.refreshed), solver.passes(16)) == (1, True, 17)
    # ... and the next step's particles see it.
    after, _ = solver.step(state, BATCH)
    elsewhere, _ = solver.step(state._replace(model_state=STATE), BATCH)
    assert not np.allclose(after.inner.ensemble, elsewhere.inner.ensemble, atol=1e-3)


def test_a_refused_step_changes_nothing() -> None:
    """Neither the state nor the key moves, so that the same step is taken again."""
    solver = eki_jax.stateful(euler, both, key=KEY, state=STATE)
    start = solver.init(ensemble())
    state, info = solver.step(start, (X, TARGETS.at[0].set(jnp.nan)))
    assert (bool(info.moved), bool(info.refreshed)) == (False, False)
    jax.tree.map(np.testing.assert_array_equal, state, start)


def test_a_state_not_finite_is_not_kept() -> None:
    """What the mean's call returns is dropped where it is not finite, and the info says so; the step itself stands."""

    def broken(params: Any, x: Any, *, state: Any) -> Any:
        outputs, state = averaging(params, x, state=state)
        return outputs, state | {"mean": jnp.where(state["calls"] == 2, jnp.nan, state["mean"])}

    solver = eki_jax.stateful(euler, broken, state=STATE)
    first, _ = solver.step(solver.init(ensemble()), BATCH)
    second, info = solver.step(first, BATCH)
    assert (bool(info.moved), bool(info.refreshed), int(second.count)) == (True, False, 2)
    jax.tree.map(np.testing.assert_array_equal, second.model_state, first.model_state)


def test_ask_and_tell_keeps_the_state() -> None:
    """Outputs that come from elsewhere move the particles alone; the info has the same flags as a step's."""
    solver = eki_jax.stateful(euler, averaging, state=STATE)
    start = solver.init(ensemble())
    state, info = solver.update(start, jnp.zeros((16, 8)), TARGETS)
    assert (int(state.count), bool(info.moved), bool(info.refreshed)) == (1, True, False)
    jax.tree.map(np.testing.assert_array_equal, state.model_state, STATE)
    assert type(info) is type(solver.step(start, BATCH)[1])


@pytest.mark.parametrize("common", [True, False])
def test_around_a_mean(common: bool) -> None:
    """A natural gradient learns with a key and a state; its init takes parameters and a key of its own."""
    make = lambda f: natural.natural_gradient(f, LOSS, 16, damping=1e-3)
    solver = eki_jax.stateful(make, both, key=KEY, state=STATE, common=common)
    state = solver.init(jnp.zeros(3), jax.random.key(2))
    state, infos = jax.lax.scan(lambda s, _: solver.step(s, BATCH), state, length=5)
    assert float(infos.loss[-1]) < 0.1 * float(infos.loss[0])
    assert int(state.model_state["calls"]) == 5


@pytest.mark.parametrize("batched", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_mean_on_eight_devices(batched: bool) -> None:
    """Particles around a mean have keys by their index on all devices, in chunks too."""
    chunk: Any = {"chunk_size": 1} if batched else {}
    make = lambda f, **s: natural.natural_gradient(f, LOSS, 16, damping=1e-3, **s)
    solvers = [
        eki_jax.stateful(make, both, key=KEY, state=STATE),
        sharding.shard_solver(
            eki_jax.stateful(lambda f: make(f, axis_name="particles", **chunk), both, key=KEY, state=STATE),
            sharding.make_mesh(8),
        ),
    ]
    found = []
    for solver in solvers:
        step, state = jax.jit(solver.step), solver.init(jnp.zeros(3), jax.random.key(2))
        for _ in range(3):
            state, info = step(state, BATCH)
        found.append((solver.estimate(state), state.model_state, info.loss))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), *found)


def test_a_model_that_is_hidden_is_refused() -> None:
    """A model in a model would give all particles one key; that is an error, and with common=True it is meant."""
    hidden = lambda f: euler(lambda params, x: f(params, x))
    solver = eki_jax.stateful(hidden, noisy, key=KEY)
    with pytest.raises(TypeError, match=r"does not tell the model which particle.*common=True"):
        solver.step(solver.init(ensemble()), BATCH)
    solver = eki_jax.stateful(hidden, noisy, key=KEY, common=True)
    assert bool(solver.step(solver.init(ensemble()), BATCH)[1].moved)


@pytest.mark.parametrize("driver", ["shard_map", "jit"])
@pytest.mark.parametrize("common", [True, False])
def test_shares_of_samples_have_their_keys(common: bool, driver: Any) -> None:
    """Devices that share the samples give each share numbers of its own, which the documentation promises."""
    make = lambda f: euler(sharding.shard_samples(f), axis_name="particles")
    one = eki_jax.stateful(make, noisy, key=KEY, common=common)
    solver = sharding.shard_solver(one, sharding.make_mesh(2, 2), driver=driver)
    start = solver.init(ensemble(4))
    _, info = jax.jit(solver.step)(start, BATCH)
    of_step = jax.random.fold_in(jax.random.wrap_key_data(start.key), 0)

    def outputs(particle: Any, index: int) -> Any:
        shares = [jax.random.fold_in(of_step, share) for share in range(2)]
        keys = shares if common else [jax.random.fold_in(share, index) for share in shares]
        return jnp.concatenate([noisy(particle, x, key=key) for x, key in zip((X[:4], X[4:]), keys, strict=True)])

    wanted = [LOSS(outputs(particle, index), TARGETS) for index, particle in enumerate(start.inner.ensemble)]
    np.testing.assert_allclose(info.losses, jnp.stack(wanted), rtol=1e-5)


@pytest.mark.slow
def test_a_mean_learns_on_shares_of_samples() -> None:
    """Natural steps with a key, particles and samples over devices."""
    loss = natural.mean_over_samples(lambda z, y: (z - y) ** 2)
    make = lambda f: natural.natural_gradient(
        f, loss, 16, damping=1e-3, axis_name="particles", batch_axis_name="batch", loss_limit=None
    )
    solver = eki_jax.stateful(make, noisy, key=KEY, common=True)
    solver = sharding.shard_solver(solver, sharding.make_mesh(4, 2), spread_targets=True)
    state, step = solver.init(jnp.zeros(3), jax.random.key(2)), jax.jit(solver.step)
    for _ in range(6):
        state, info = step(state, BATCH)
        assert bool(info.moved)
    assert float(LOSS(X @ solver.estimate(state), TARGETS)) < 0.1 * float(LOSS(0 * TARGETS, TARGETS))


def test_a_state_of_shares_is_refused() -> None:
    """Devices that share the samples would each see a part of the statistics."""
    make = lambda f: euler(f, axis_name="particles")
    solver = sharding.shard_solver(eki_jax.stateful(make, averaging, state=STATE), sharding.make_mesh(4, 2))
    with pytest.raises(ValueError, match=r"state: .* spread over 2 devices.*make_mesh\(\)"):
        solver.step(solver.init(ensemble()), BATCH)


def test_it_may_be_accelerated() -> None:
    """Momentum around a model with a key and a state is momentum in the model's solver."""
    around = kalman.accelerated(eki_jax.stateful(euler, both, key=KEY, state=STATE))
    inside = eki_jax.stateful(lambda f: kalman.accelerated(euler(f)), both, key=KEY, state=STATE)
    found = []
    for solver in (around, inside):
        state, step = solver.init(ensemble()), jax.jit(solver.step)
        for _ in range(3):
            state, info = step(state, BATCH)
        assert int(state.count) == 3
        model_state = (state.inner if solver is around else state).model_state
        found.append((solver.ensemble(state), solver.estimate(state), model_state, info._asdict()))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), *found)
    refused = kalman.accelerated(
        eki_jax.stateful(euler, both, key=KEY, state=STATE), lambda k: jnp.where(k < 1, 0.5, 2.0)
    )
    state, first = refused.step(refused.init(ensemble()), BATCH)
    after, info = refused.step(state, BATCH)
    assert (bool(first.refreshed), bool(info.refreshed), bool(info.moved)) == (True, False, False)
    jax.tree.map(np.testing.assert_array_equal, after, state)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"forward": noisy}, TypeError, "key, state: None; wanted one of them"),
        ({"forward": noisy, "key": 3}, TypeError, "key: 3; wanted one JAX random key"),
        ({"forward": lambda p, x: x, "key": KEY}, TypeError, r"2 arguments and key=; wanted a model, forward\(params"),
        ({"forward": noisy, "state": STATE}, TypeError, "does not take 2 arguments and state="),
        ({"forward": averaging, "state": {"a": "b"}}, TypeError, r"state\['a'\]: 'b'"),
        ({"forward": averaging, "state": STATE, "common": 1}, TypeError, "common: 1; wanted True or False"),
        ({"forward": averaging, "state": STATE, "make": lambda f: f}, TypeError, "make: returned: .*wanted a solver"),
        ({"forward": averaging, "state": STATE, "make": 3}, TypeError, "make: 3; wanted a function of a model"),
    ],
)
def test_bad_arguments(arguments: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        eki_jax.stateful(**{"make": euler, **arguments})


@pytest.mark.parametrize(
    ("model", "error", "words"),
    [
        (lambda p, x, *, state: x @ p, TypeError, r"forward: returned: .*; wanted a pair \(outputs, state\)"),
        (lambda p, x, *, state: (x @ p, {"mean": state["mean"]}), ValueError, "its new state: structure"),
        (lambda p, x, *, state: (x @ p, state | {"mean": x}), ValueError, r"state\['mean'\]: shape \(8, 3\)"),
        (
            lambda p, x, *, state: (x @ p, state | {"calls": x[0, 0]}),
            TypeError,
            r"\['calls'\]: dtype float32, but .*int32",
        ),
    ],
)
def test_bad_models(model: Any, error: type[Exception], words: str) -> None:
    solver = eki_jax.stateful(euler, model, state=STATE)
    with pytest.raises(error, match=words):
        solver.step(solver.init(ensemble()), BATCH)


def test_no_model_for_a_step() -> None:
    solver = eki_jax.stateful(euler, None, key=KEY)
    with pytest.raises(TypeError, match="forward: None; wanted a model for step"):
        solver.step(solver.init(ensemble()), BATCH)


def test_the_inputs_are_whole() -> None:
    """A solver that looks at its inputs finds the key's data, which any checkpoint can hold, beside x."""
    found = []
    make = lambda f: euler(lambda params, inputs: (found.append(inputs), f(params, inputs))[1])
    solver = eki_jax.stateful(make, both, key=KEY, state=STATE, common=True)
    solver.step(solver.init(ensemble()), BATCH)
    assert isinstance(found[0], Inputs)
    assert (found[0].x.shape, found[0].key.dtype, found[0].key.shape) == ((8, 3), jnp.uint32, (2,))


LABELS = (TARGETS > 0).astype(jnp.int32)
TEMPLATE = {"w": jnp.zeros((3, 2))}


def classifier(params: Any, x: Any, *, state: Any) -> Any:
    """Logits; the state is a bias that no parameter moves."""
    return x @ params["w"] + state["bias"], {"bias": state["bias"] + 1.0, "of": state["of"] + x.shape[0]}


FIRST = {"bias": jnp.array([0.0, 0.0]), "of": jnp.zeros(2, jnp.int32)}


def classifying(axis_name: str | None = None) -> eki_jax.Solver:
    make = lambda f: eki_jax.euler(f, eki_jax.natural.softmax_cross_entropy(), axis_name=axis_name)
    return eki_jax.stateful(make, classifier, state=FIRST)


def test_accuracy_has_the_models_state() -> None:
    """What predicts is given the state that was learned, for every accuracy, and its own changes are dropped."""
    always = lambda params, x, *, state: (0 * (x @ params["w"]) + state["bias"] * jnp.array([0.0, 1.0]), None)
    prior = eki_jax.gaussian(TEMPLATE, 1.0)
    method = ensemble_method(classifying(), always, prior, 8)
    state = method.init(KEY)
    ones = jnp.ones(8, jnp.int32)
    assert float(method.accuracy(state, X, ones).mean) == 0.0
    state, metrics = method.step(state, KEY, (X, LABELS))
    assert float(metrics["refreshed"]) == 1
    found = method.accuracy(state, X, ones)
    assert (float(found.mean), float(found.best), float(found.ensemble)) == (1.0, 1.0, 1.0)
    plain = ensemble_method(classifying(), lambda params, x: x @ params["w"], prior, 8)
    assert 0 <= float(plain.accuracy(state, X, LABELS).mean) <= 1


def test_redrawing_keeps_the_models_state() -> None:
    method = ensemble_method(classifying(), classifier, eki_jax.gaussian(TEMPLATE, 1.0), 8, resample=True)
    state, _ = method.step(method.init(KEY), KEY, (X, LABELS))
    redrawn = method.redraw(state, jax.random.key(3), 12)
    assert (int(redrawn.count), redrawn.inner.ensemble["w"].shape) == (1, (12, 3, 2))
    jax.tree.map(np.testing.assert_array_equal, redrawn.model_state, state.model_state)


def test_a_model_with_a_state_wants_one() -> None:
    """A model that takes a state for a solver whose model has none is named, by the check of a run's data too."""
    solver = eki_jax.euler(lambda params, x: x @ params["w"], eki_jax.natural.softmax_cross_entropy())
    method = ensemble_method(solver, classifier, eki_jax.gaussian(TEMPLATE, 1.0), 8)
    for call in (lambda: method.accuracy(method.init(KEY), X, LABELS), lambda: method.check(X, LABELS, "train")):
        with pytest.raises(TypeError, match="forward: takes a state, but the solver's model has none"):
            call()


def test_a_model_may_call_its_inputs_state() -> None:
    """An argument named state that stands in the place of x is x."""
    solver = eki_jax.euler(lambda u, state: state @ u["w"], eki_jax.natural.softmax_cross_entropy())
    method = ensemble_method(solver, lambda u, state: state @ u["w"], eki_jax.gaussian(TEMPLATE, 1.0), 8)
    assert 0 <= float(method.accuracy(method.init(KEY), X, LABELS).mean) <= 1


@pytest.mark.slow
def test_fit_resumes_with_the_models_state(tmp_path: Any) -> None:
    """A run with a state, sharded or not, is the same whether it was interrupted by a checkpoint or not."""
    prior = eki_jax.gaussian(TEMPLATE, 1.0)
    settings: Any = {"batch_size": 4, "key": KEY, "progress": False}
    data = ((X, LABELS), (X, LABELS))
    method = ensemble_method(classifying(), classifier, prior, 8, resample=True)
    whole = fit(method, *data, epochs=4, **settings)
    fit(method, *data, epochs=2, directory=tmp_path, **settings)
    resumed = fit(method, *data, epochs=4, directory=tmp_path, resume=True, **settings)
    jax.tree.map(np.testing.assert_array_equal, resumed.state, whole.state)
    np.testing.assert_array_equal(whole.state.model_state["of"], 4 * 2 * 4)
    assert whole.history[-1]["forward_passes"] == 9 * 4 * 8
    many = sharding.shard_method(
        ensemble_method(classifying("particles"), classifier, prior, 8, resample=True, axis_name="particles"),
        sharding.make_mesh(8),
    )
    spread = fit(many, *data, epochs=4, **settings)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, jax.device_get(spread.state), jax.device_get(whole.state))
