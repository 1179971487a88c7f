"""Particles spread over devices give the numbers of one device, whatever the layout and the driver."""

from __future__ import annotations

import re
from functools import cache, partial
from itertools import product
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import eki_jax
from benchmarks.problems import registry
from benchmarks.scaling import hlo
from eki_jax import kalman, natural, sharding, training
from eki_jax import optax as eki_optax
from eki_jax.checkpoints import Checkpoints
from eki_jax.metrics import classification_accuracy as metrics_of
from eki_jax.optax import ensemble_gradient, value_and_extra_args

DEVICES = (1, 2, 4, 8)
EXACT = tuple(name for name in sharding.COMMUNICATIONS if name != "bf16_sums")
SPREAD, SAME = PartitionSpec("particles"), PartitionSpec()


class Toy(NamedTuple):
    """A small nonlinear problem: two leaves of different sizes, 6 samples."""

    prior: Any
    batch: Any
    loss: Any

    @staticmethod
    def forward(params: Any, x: Any) -> Any:
        return jnp.tanh(x @ params["w"]) @ params["v"]


@pytest.fixture
def toy() -> Toy:
    return make_toy()


def make_toy() -> Toy:
    keys = jax.random.split(jax.random.key(7), 3)
    prior = eki_jax.gaussian({"w": jnp.zeros((5, 9)), "v": jnp.zeros((9,))}, 1.0)
    x, y = jax.random.normal(keys[0], (6, 5)), jax.random.normal(keys[1], (6,))
    return Toy(prior, (x, y), eki_jax.squared_error())


def largest_difference(found: Any, wanted: Any) -> float:
    """Relative to the largest entry of each array."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    return max(float(np.abs(np.asarray(a) - b).max() / max(np.abs(b).max(), 1e-30)) for a, b in map(as_floats, pairs))


def as_floats(pair: Any) -> Any:
    return tuple(np.asarray(one, np.float64) for one in pair)


# --- the layouts ------------------------------------------------------------------------------------------------------


def slow_but(*kept: Any, of: Any) -> list[Any]:
    """Parameters of which all but a few are for the slow run."""
    return [pytest.param(*one, marks=() if one in kept else pytest.mark.slow) for one in of]


@pytest.mark.parametrize(  # outputs: fewer and more than the particles on a device
    ("devices", "outputs"), slow_but((8, 11), of=product(DEVICES, (1, 11)))
)
def test_layouts_give_the_direction_of_one_device(devices: int, outputs: int, x64: None) -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    ensemble = {"w": jax.random.normal(keys[0], (16, 3, 23)), "b": jax.random.normal(keys[0], (16, 5))}
    g, r = (jax.random.normal(key, (16, outputs)) for key in keys[1:])
    mesh = sharding.make_mesh(devices)

    @jax.jit
    def directions(*arguments: Any) -> Any:
        bodies = (partial(eki_jax.direction, axis_name="particles", communication=c) for c in EXACT)
        return [sharding.over_devices(body, mesh, (SPREAD,) * 3)(*arguments) for body in bodies]

    wanted = eki_jax.direction(ensemble, g, r)
    for dtype, tolerance in ((jnp.float64, 1e-10), (jnp.float32, 2e-6)):
        arguments = jax.tree.map(lambda leaf, dtype=dtype: leaf.astype(dtype), (ensemble, g, r))
        for communication, found in zip(EXACT, directions(*arguments), strict=True):
            assert found["w"].dtype == dtype
            assert largest_difference(found, wanted) < tolerance, communication


def test_reduce_scatter_keeps_the_dtype() -> None:
    """Reduce-scatter returns low-precision sums in the ensemble's dtype."""
    ensemble = jax.random.normal(jax.random.key(0), (16, 64)).astype(jnp.bfloat16)
    g, r = jax.random.normal(jax.random.key(1), (2, 16, 4))
    body = partial(eki_jax.direction, axis_name="particles", communication="reduce_scatter")
    step = jax.jit(sharding.over_devices(body, sharding.make_mesh(4), (SPREAD,) * 3))
    assert largest_difference(step(ensemble, g, r), eki_jax.direction(ensemble, g, r)) < 0.02
    assert "bf16[4,16]" in step.lower(ensemble, g, r).as_text("hlo").replace(" ", "")


@pytest.mark.parametrize("devices", [2, 8])
def test_sums_in_bfloat16(devices: int) -> None:
    """Rounded once on their way, whatever the number of devices; float32 where they are added, and bfloat16 crosses."""
    keys = jax.random.split(jax.random.key(0), 3)
    arrays = [jax.random.normal(key, (16, width)) for key, width in zip(keys, (640, 24, 24), strict=True)]
    body = partial(eki_jax.direction, axis_name="particles", communication="bf16_sums")
    step = jax.jit(sharding.over_devices(body, sharding.make_mesh(devices), (SPREAD,) * 3))
    found, wanted = step(*arrays), eki_jax.direction(*arrays)
    assert 2.0**-11 < np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < 2.0**-8
    lines = step.lower(*arrays).as_text("hlo").splitlines()
    sent = [line.split(" = ")[1].split("[")[0] for line in lines if re.search(r"all-(to-all|gather)\(", line)]
    assert sent[:2] == ["bf16", "bf16"]
    assert "reduce-scatter" not in "".join(lines)


def test_products_in_bfloat16_send_it() -> None:
    """Where particles are many, and by themselves."""
    body = lambda precision: partial(eki_jax.direction, axis_name="particles", precision=precision)
    arrays = [jax.ShapeDtypeStruct((4096, width), jnp.float32) for width in (640, 24, 24)]

    def program(body: Any) -> str:
        return jax.jit(sharding.over_devices(body, sharding.make_mesh(8), (SPREAD,) * 3)).lower(*arrays).as_text()

    forced = partial(eki_jax.direction, axis_name="particles", communication="bf16_sums", precision="bf16")
    assert program(body("bf16")) == program(forced)
    assert "all_to_all" not in program(body("highest"))


def solver_run(make: Any, state: Any, batch: Any, key: Any, prior: Any, axis_name: str | None, noise: str) -> Any:
    """Two steps, with the paper's noise after each (MEKI(R)) and a redraw after the first (EKI(R))."""
    solver = make(axis_name=axis_name)
    for count in range(2):
        state, info = solver.step(state, batch)
        step_key = jax.random.fold_in(key, count)
        if "step" in noise:
            noisy = eki_jax.perturb(step_key, state.ensemble, prior, 0.01, axis_name=axis_name)
            state = state._replace(ensemble=noisy)
        if "epoch" in noise and count == 0:
            drawn = eki_jax.resample_around_mean(step_key, state.position, prior, scale=0.1, axis_name=axis_name)
            state = solver.init(drawn)._replace(count=state.count)
    return state, info


def optax_run(make: Any, ensemble: Any, opt_state: Any, batch: Any, axis_name: str | None, communication: Any) -> Any:
    tx, field = (
        make(axis_name=axis_name, communication=communication),
        value_and_extra_args(Toy.forward, make_toy().loss),
    )
    for _ in range(2):
        _, extra = field(ensemble, batch)
        zeros = jax.tree.map(jnp.zeros_like, ensemble)
        updates, opt_state = tx.update(zeros, opt_state, ensemble, **extra)
        ensemble = optax.apply_updates(ensemble, updates)
    return ensemble, opt_state


def with_adam(**options: Any) -> Any:
    return optax.chain(ensemble_gradient(**options), optax.adam(0.05))


METHODS = {
    "euler": (eki_jax.euler, ""),
    "nesterov": (eki_jax.nesterov, ""),
    "EKI(R)": (eki_jax.euler, "epoch"),
    "MEKI(R)": (eki_jax.nesterov, "epoch step"),
}
TRANSFORMS = {"optax.meki": eki_optax.meki, "optax.adam": with_adam}


def check_method(name: str, communication: Any, devices: int, driver: Any) -> None:
    toy, key, mesh = make_toy(), jax.random.key(5), sharding.make_mesh(devices)
    ensemble = eki_jax.sample_ensemble(jax.random.key(1), toy.prior, 16)
    if name in TRANSFORMS:
        make = TRANSFORMS[name]
        init = make(axis_name="particles").init
        state = make().init(ensemble)
        specs = sharding.result_specs(init, mesh, (SPREAD,), ensemble)
        body = partial(optax_run, make, axis_name="particles", communication=communication)
        wanted = jax.jit(partial(optax_run, make, axis_name=None, communication=None))(ensemble, state, toy.batch)
        found = jax.jit(sharding.over_devices(body, mesh, (SPREAD, specs, SAME), driver=driver))(
            ensemble, state, toy.batch
        )
    else:
        method, noise = METHODS[name]
        make = partial(method, toy.forward, toy.loss, communication=communication)
        state = method(None, toy.loss).init(ensemble)
        specs = sharding.result_specs(method(None, toy.loss, axis_name="particles").init, mesh, (SPREAD,), ensemble)
        body = partial(solver_run, make, prior=toy.prior, axis_name="particles", noise=noise)
        wanted = jax.jit(partial(solver_run, make, prior=toy.prior, axis_name=None, noise=noise))(state, toy.batch, key)
        found = jax.jit(sharding.over_devices(body, mesh, (specs, SAME, SAME), driver=driver))(state, toy.batch, key)
    tolerance = 1e-10 if jax.config.jax_enable_x64 else 2e-4  # two steps of a nonlinear model amplify the rounding
    assert largest_difference(found, wanted) < tolerance


PAIRS = list(zip([*METHODS, *TRANSFORMS], [*EXACT, None], strict=True))


@pytest.mark.parametrize(("name", "communication"), slow_but(PAIRS[0], PAIRS[3], PAIRS[4], of=PAIRS))
def test_methods_on_eight_are_those_of_one(name: str, communication: Any, x64: None) -> None:
    """Methods on eight devices are those of one."""
    check_method(name, communication, 8, "shard_map")


@pytest.mark.slow
@pytest.mark.parametrize("devices", DEVICES)
@pytest.mark.parametrize("communication", EXACT)
@pytest.mark.parametrize("name", [*METHODS, *TRANSFORMS])
def test_every_method_in_every_layout(name: str, communication: Any, devices: int, x64: None) -> None:
    check_method(name, communication, devices, "shard_map")


@pytest.mark.slow
@pytest.mark.parametrize("devices", DEVICES)
@pytest.mark.parametrize("name", [*METHODS, *TRANSFORMS])
def test_every_method_in_single_precision(name: str, devices: int) -> None:
    check_method(name, "all_reduce", devices, "shard_map")


@pytest.mark.parametrize("driver", slow_but(("jit",), of=[("pmap",), ("jit",)]))
def test_drivers_give_the_same_numbers(driver: Any, x64: None) -> None:
    check_method("MEKI(R)", "all_reduce", 4, driver)


# --- solvers, states, one device --------------------------------------------------------------------------------------


@pytest.mark.parametrize("driver", sharding.DRIVERS)
def test_a_sharded_solver_is_called_like_others(driver: Any, toy: Toy) -> None:
    """A sharded solver is called like any other."""
    mesh = sharding.make_mesh(4)
    single = eki_jax.nesterov(toy.forward, toy.loss)
    solver = eki_jax.nesterov(toy.forward, toy.loss, axis_name="particles", chunk_size=1)
    solver = sharding.shard_solver(solver, mesh, driver=driver)
    ensemble = jax.jit(lambda key: sharding.sample_ensemble(key, toy.prior, 8, mesh, driver=driver))(jax.random.key(0))
    state, info = jax.jit(solver.step)(jax.jit(solver.init)(ensemble), toy.batch)
    wanted = single.step(single.init(eki_jax.sample_ensemble(jax.random.key(0), toy.prior, 8)), toy.batch)
    assert isinstance(state, eki_jax.NesterovState)
    assert largest_difference((state, info), wanted) < 1e-5
    for leaf in jax.tree.leaves((state.ensemble, state.position, info.losses)):
        assert leaf.addressable_shards[0].data.shape[0] == 2
    assert state.count.sharding.is_fully_replicated


def test_update_takes_outputs_from_elsewhere(toy: Toy) -> None:
    """Update takes outputs that were made elsewhere."""
    solver = sharding.shard_solver(eki_jax.euler(None, toy.loss, axis_name="particles"), sharding.make_mesh(2))
    ensemble = eki_jax.sample_ensemble(jax.random.key(0), toy.prior, 8)
    outputs = eki_jax.evaluate(toy.forward, ensemble, toy.batch[0])
    state, _ = jax.jit(solver.update)(solver.init(ensemble), outputs, toy.batch[1])
    single = eki_jax.euler(toy.forward, toy.loss)
    assert largest_difference(state, single.step(single.init(ensemble), toy.batch)[0]) < 1e-5


SOLVERS_OF_AN_AXIS: dict[str, Any] = {
    "euler": lambda f, loss, **axis: eki_jax.euler(f, loss, **axis),
    "enkf": lambda f, loss, **axis: kalman.enkf(f, 1.0, **axis),
    "natural": lambda f, loss, **axis: natural.natural_gradient(f, loss, 8, **axis),
}


@pytest.mark.parametrize("driver", sharding.DRIVERS)
@pytest.mark.parametrize("name", SOLVERS_OF_AN_AXIS)
def test_a_solver_without_an_axis_is_named(name: str, driver: Any, toy: Toy) -> None:
    """Its devices would each take a step of their own, under pmap without a word."""
    mesh, make = sharding.make_mesh(4), SOLVERS_OF_AN_AXIS[name]
    key = jax.random.key(0)
    start = (toy.prior.sample(key), key) if name == "natural" else (eki_jax.sample_ensemble(key, toy.prior, 8),)
    with pytest.raises(
        ValueError, match=r"solver: made without axis_name.*; wanted one made with axis_name='particles'"
    ):
        sharding.shard_solver(make(toy.forward, toy.loss), mesh, driver=driver).init(*start)
    sharding.shard_solver(make(toy.forward, toy.loss, axis_name="particles"), mesh, driver=driver).init(*start)


@pytest.mark.parametrize("driver", sharding.DRIVERS)
def test_a_method_without_an_axis_is_named(driver: Any, toy: Toy) -> None:
    """Without one anywhere, or with a solver without one."""
    mesh, key = sharding.make_mesh(4), jax.random.key(0)
    alone, spread = ({}, {"axis_name": "particles"})
    make = lambda inner, outer: sharding.shard_method(
        training.ensemble_method(eki_jax.euler(toy.forward, toy.loss, **inner), toy.forward, toy.prior, 8, **outer),
        mesh,
        driver=driver,
    )
    with pytest.raises(ValueError, match="method: made without axis_name"):
        make(alone, alone)
    method = make(alone, spread)
    with pytest.raises(ValueError, match="method: its solver: made without axis_name"):
        method.step(method.init(key), key, toy.batch)


@pytest.mark.parametrize(("driver", "communication"), [("shard_map", "all_to_all"), ("jit", None)])
def test_one_device_needs_no_special_case(driver: Any, communication: Any, toy: Toy) -> None:
    solver = eki_jax.euler(toy.forward, toy.loss, axis_name="particles", communication=communication)
    solver = sharding.shard_solver(solver, sharding.make_mesh(1), driver=driver)
    ensemble = eki_jax.sample_ensemble(jax.random.key(0), toy.prior, 7)
    state, _ = jax.jit(solver.step)(solver.init(ensemble), toy.batch)
    single = eki_jax.euler(toy.forward, toy.loss)
    assert largest_difference(state, single.step(single.init(ensemble), toy.batch)[0]) < 1e-5


@pytest.mark.parametrize("driver", ["shard_map", "jit"])
def test_a_batch_axis_shards_the_samples(driver: Any, toy: Toy) -> None:
    mesh = sharding.make_mesh(particles=2, batch=3)
    seen = []

    def forward(params: Any, x: Any) -> Any:
        seen.append(x.shape)
        return toy.forward(params, x)

    solver = eki_jax.euler(sharding.shard_samples(forward), toy.loss, axis_name="particles")
    solver = sharding.shard_solver(solver, mesh, driver=driver)
    ensemble = eki_jax.sample_ensemble(jax.random.key(0), toy.prior, 8)
    state, info = jax.jit(solver.step)(solver.init(ensemble), toy.batch)
    single = eki_jax.euler(toy.forward, toy.loss)
    assert seen[-1] == (2, 5)  # of 6 samples
    assert largest_difference((state, info), single.step(single.init(ensemble), toy.batch)) < 1e-5


# --- random numbers, growing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("driver", "devices"), [("shard_map", 2), ("shard_map", 8), ("pmap", 8), ("jit", 8)])
def test_random_numbers_do_not_depend_on_devices(driver: Any, devices: int, toy: Toy) -> None:
    """Random numbers do not depend on the number of devices."""
    mesh, key = sharding.make_mesh(devices), jax.random.key(3)
    drawn = jax.jit(lambda key: sharding.sample_ensemble(key, toy.prior, 16, mesh, driver=driver))(key)
    for found, wanted in zip(*map(jax.tree.leaves, (drawn, eki_jax.sample_ensemble(key, toy.prior, 16))), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)  # two programs round differently


@pytest.mark.parametrize("driver", ["shard_map", "jit"])
def test_an_ensemble_grows_where_it_is(driver: Any, toy: Toy) -> None:
    mesh, key = sharding.make_mesh(4), jax.random.key(3)
    ensemble = eki_jax.sample_ensemble(jax.random.key(0), toy.prior, 8)
    grow = jax.jit(lambda u: sharding.resample_around_mean(key, u, toy.prior, mesh, 12, scale=0.5, driver=driver))
    grown = grow(sharding.place(ensemble, mesh, SPREAD))
    assert largest_difference(grown, eki_jax.resample_around_mean(key, ensemble, toy.prior, 12, scale=0.5)) < 1e-5
    assert jax.tree.leaves(grown)[0].addressable_shards[0].data.shape[0] == 3


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda toy, mesh: sharding.sample_ensemble(jax.random.key(0), toy.prior, 10, mesh), "J = 10 .* 8 or 12"),
        (lambda toy, mesh: sharding.place(jnp.zeros((3, 2)), mesh, SPREAD), "J = 3 particles on 4 devices; .*: 4"),
        (
            lambda toy, mesh: sharding.over_devices(jnp.sin, mesh, (SPREAD,))(jnp.zeros((6, 2))),
            "J = 6 particles .* 4 or 8",
        ),
        (
            lambda toy, mesh: sharding.over_devices(jnp.sin, mesh, (SAME,), driver="pjit"),
            "driver: 'pjit'; wanted 'shard_map', 'pmap' or 'jit'",
        ),
        (
            lambda toy, mesh: sharding.over_devices(jnp.sin, sharding.make_mesh(2, 2), (SAME,), driver="pmap"),
            "'shard_map' or",
        ),
        (lambda toy, mesh: sharding.make_mesh(9), "devices: 8 for particles x batch = 9 x 1"),
        (lambda toy, mesh: sharding.make_mesh(0), "wanted a whole number, at least 1"),
        (lambda toy, mesh: sharding.step_cost("tree", 8, 4, 100, 2), "communication: 'tree'"),
        (lambda toy, mesh: eki_jax.direction(*jnp.ones((3, 4, 2)), communication="tree"), "communication: 'tree'"),
    ],
)
def test_bad_input_is_named(call: Any, message: str, toy: Toy) -> None:
    with pytest.raises(ValueError, match=message):
        call(toy, sharding.make_mesh(4))


# --- what moves -------------------------------------------------------------------------------------------------------

PARAMETERS, OUTPUTS = 8192, 24


@cache
def compiled_step(J: int, communication: Any, driver: Any = "shard_map", devices: int = 8) -> Any:
    mesh = sharding.make_mesh(devices)

    def forward(params: Any, x: Any) -> Any:
        return jnp.sum(x @ params.reshape(64, 128), axis=-1)

    solver = eki_jax.euler(
        forward, eki_jax.squared_error(), axis_name="particles", communication=communication, chunk_size=4
    )
    spread = NamedSharding(mesh, SPREAD)
    ensemble = jax.ShapeDtypeStruct((J, PARAMETERS), jnp.float32, sharding=spread)
    state = eki_jax.EulerState(ensemble, jax.ShapeDtypeStruct((), jnp.int32))
    step = jax.jit(sharding.shard_solver(solver, mesh, driver=driver).step, donate_argnums=0)
    return step.lower(state, (jnp.ones((OUTPUTS, 64)), jnp.ones(OUTPUTS))).compile()


def test_the_all_reduce_of_256_and_4096() -> None:
    """The all-reduce moves as much for 256 particles as for 4096."""
    moved = {}
    for J in (256, 4096):
        program = hlo.read(compiled_step(J, "all_reduce").as_text(), 8)
        moved[J] = sum(one.numbers * one.times for one in program.collectives if one.kind == "all-reduce")
        others = sum(one.numbers * one.times for one in program.collectives if one.kind != "all-reduce")
        # lower order: means of parameters and outputs, two M x M matrices or all outputs for the norm, scalars
        lower = PARAMETERS + 2 * OUTPUTS + 2 * OUTPUTS**2 + 100
        assert OUTPUTS * PARAMETERS <= moved[J] <= OUTPUTS * PARAMETERS + lower
        assert others <= J * (OUTPUTS + 3)  # three numbers of every particle, for the medians
    assert abs(moved[4096] - moved[256]) <= 2 * OUTPUTS**2


@pytest.mark.parametrize("communication", sharding.COMMUNICATIONS)
def test_the_cost_model_counts_the_program(communication: Any) -> None:
    """The cost model counts what the compiled program does."""
    program = hlo.read(compiled_step(256, communication).as_text(), 8)
    cost = sharding.step_cost(communication, 256, OUTPUTS, PARAMETERS, 8, forward_flops=2 * OUTPUTS * PARAMETERS)
    assert program.flops == pytest.approx(cost.flops, rel=0.03)
    sent = cost.sent * (2 if communication == "bf16_sums" else 1)  # which a processor's compiler makes float32
    assert program.sent == pytest.approx(sent, rel=0.08)  # the mean of the parameters is not in the model


@pytest.mark.parametrize("driver", slow_but(("shard_map",), ("jit",), of=[(one,) for one in sharding.DRIVERS]))
def test_no_driver_gathers_the_ensemble(driver: Any) -> None:
    compiled = compiled_step(256, "all_reduce", driver)
    program = hlo.read(compiled.as_text(), 8)
    gathered = [one for one in program.collectives if one.kind != "all-reduce"]
    assert sum(one.numbers * one.times for one in gathered) <= 256 * (OUTPUTS + 8)
    assert max(one.numbers for one in program.collectives) < 256 * PARAMETERS / 8


def test_the_gather_holds_blocks_alone() -> None:
    """The gather never holds more than blocks of it."""
    program = hlo.read(compiled_step(256, "gather").as_text(), 8)
    assert max(one.numbers for one in program.collectives) < 256 * PARAMETERS / 8


def test_the_reader_counts_loops_and_branches() -> None:
    def scanned(a: Any) -> Any:
        def body(carry: Any, _: None) -> Any:
            return carry @ a, None

        return jax.lax.scan(body, a, None, length=5)[0]

    def branching(a: Any, flag: Any) -> Any:
        return jax.lax.cond(flag, lambda: a @ a, lambda: a)

    a = jnp.ones((64, 64))
    assert hlo.read(jax.jit(scanned).lower(a).compile().as_text(), 1).flops == 5 * 2 * 64**3
    assert hlo.read(jax.jit(branching).lower(a, True).compile().as_text(), 1).flops == 2 * 64**3


# --- the choice -------------------------------------------------------------------------------------------------------


def test_the_choice_follows_the_particles() -> None:
    """The choice follows the particles on a device."""
    choose = partial(sharding.choose_communication, outputs=600, parameters=573_910, devices=8)
    assert choose(16_000) == "all_reduce"  # 2000 particles a device, 600 outputs
    assert choose(2_000) == "all_to_all"
    assert choose(16_000, itemsize=2) == "reduce_scatter"  # the way back is half as long in bfloat16
    assert choose(16_000, rounded=True) == "bf16_sums"
    assert choose(128_000, devices=64, rounded=True) == "all_reduce"  # exchanges between hosts send more


def test_the_all_reduce_ignores_the_ensemble() -> None:
    """Communication of the all-reduce does not depend on the ensemble."""
    costs = [sharding.step_cost("all_reduce", J, 600, 573_910, 8) for J in (256, 4096)]
    assert costs[0].sent == costs[1].sent == 2 * 7 / 8 * 600 * 573_910 * 4
    assert costs[1].flops == 16 * costs[0].flops


def test_the_cheapest_layout_is_the_default() -> None:
    mesh = sharding.make_mesh(8)

    def program(J: int, M: int, communication: Any) -> str:
        body = partial(eki_jax.direction, axis_name="particles", communication=communication)
        arrays = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((J, 65536), (J, M), (J, M)))
        return jax.jit(sharding.over_devices(body, mesh, (SPREAD,) * 3)).lower(*arrays).as_text()

    for J, M in ((16, 4), (16, 600), (4096, 100)):
        chosen = sharding.choose_communication(J, M, 65536, 8)
        assert program(J, M, None) == program(J, M, chosen)
    assert program(4096, 100, None) != program(4096, 100, "ring")


# --- training ---------------------------------------------------------------------------------------------------------


def digits_method(devices: int, driver: Any, J: Any = 32, resample: bool = False) -> Any:
    problem = registry.get("digits-dnn")
    solver = eki_jax.euler(problem.forward, problem.loss, axis_name="particles", communication="all_reduce")
    prior = eki_jax.xavier(problem.template)
    method = training.ensemble_method(
        solver, problem.forward, prior, J, axis_name="particles", resample=resample, step_noise=resample
    )
    return problem, sharding.shard_method(method, sharding.make_mesh(devices), driver=driver)


def test_a_sharded_method_is_that_of_one_device() -> None:
    """A step, the accuracy of all and of each, and a redraw to another size."""
    forward = lambda p, x: jax.nn.softmax(x @ p)
    x, labels = jax.random.normal(jax.random.key(3), (6, 3)), jnp.arange(6) % 3

    def run(method: Any) -> Any:
        key = jax.random.key(0)
        state, metrics = method.step(method.init(key), key, (x, labels))
        found = method.accuracy(state, x, labels)
        return state, metrics, found, method.redraw(state, key, 16), method.estimate(state)

    def make(**axis: Any) -> Any:
        solver = eki_jax.euler(forward, eki_jax.cross_entropy(), **axis)
        return training.ensemble_method(
            solver, forward, eki_jax.gaussian(jnp.zeros((3, 3)), 1.0), 8, resample=True, **axis
        )

    spread = sharding.shard_method(make(axis_name="particles"), sharding.make_mesh(4))
    found, wanted = jax.jit(lambda: run(spread))(), jax.jit(lambda: run(make()))()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, wanted)
    assert found[3].ensemble.shape == (16, 3, 3)


@pytest.mark.slow
def test_drivers_give_the_same_curve() -> None:
    """Drivers give the same training curve on digits."""
    curves = {}
    for driver in sharding.DRIVERS:
        problem, method = digits_method(8, driver, J=64)
        run = jax.jit(training.epoch(method, 100), donate_argnums=0)
        state, metrics = run(jax.jit(method.init)(jax.random.key(0)), jax.random.key(1), *problem.train)
        curves[driver] = np.asarray(metrics["train_loss"])
        assert jax.tree.leaves(state.ensemble)[0].addressable_shards[0].data.shape[0] == 8
    np.testing.assert_allclose(curves["pmap"], curves["shard_map"], rtol=2e-3)
    np.testing.assert_allclose(curves["jit"], curves["shard_map"], rtol=2e-3)
    assert curves["shard_map"][-1] < 0.9 * curves["shard_map"][0]
    accuracy = jax.jit(method.accuracy)(state, *problem.test)
    single = metrics_of(problem.forward, jax.device_get(state.position), *problem.test)
    assert largest_difference(accuracy, single) < 0.02


@pytest.mark.slow
def test_a_growing_run_resumes_on_other_devices(tmp_path: Any) -> None:
    """A run that grows and is resumed on other devices goes on as if alone."""
    histories = {}
    for name, first, second in (("one", 1, 1), ("many", 8, 2)):
        for devices, epochs in ((first, 2), (second, 3)):
            problem, method = digits_method(devices, "shard_map", lambda epoch: 16 * (epoch + 1), resample=True)
            result = training.fit(
                method,
                problem.train,
                problem.test,
                batch_size=400,
                epochs=epochs,
                key=jax.random.key(0),
                directory=tmp_path / name,
                resume=epochs == 3,
                progress=False,
            )
        histories[name] = [row["train_loss"] for row in result.history]
    assert len(histories["many"]) == 3
    np.testing.assert_allclose(histories["many"], histories["one"], rtol=1e-2)


def test_a_checkpoint_of_eight_resumes_on_two(tmp_path: Any, toy: Toy) -> None:
    """A checkpoint of eight devices is resumed on two."""
    solver = eki_jax.nesterov(toy.forward, toy.loss, axis_name="particles")
    many, few = (sharding.shard_solver(solver, sharding.make_mesh(devices)) for devices in (8, 2))
    ensemble = eki_jax.sample_ensemble(jax.random.key(0), toy.prior, 8)
    state, _ = jax.jit(many.step)(many.init(ensemble), toy.batch)
    saved = Checkpoints(tmp_path, {})
    saved.save(1, state)
    restored, _ = saved.restore(lambda notes: sharding.abstract(few.init, ensemble))
    saved.close()
    for found, wanted in zip(*map(jax.tree.leaves, (restored, state)), strict=True):
        np.testing.assert_array_equal(found, wanted)
    assert restored.ensemble["w"].addressable_shards[0].data.shape[0] == 4
    assert len(restored.ensemble["w"].sharding.device_set) == 2
    wanted_state, _ = jax.jit(many.step)(state, toy.batch)
    assert largest_difference(jax.jit(few.step)(restored, toy.batch)[0], wanted_state) < 1e-4


def test_predictions_are_those_of_one_device(toy: Toy) -> None:
    ensemble = eki_jax.sample_ensemble(jax.random.key(0), toy.prior, 16)
    losses = jax.random.uniform(jax.random.key(1), (16,)).at[3].set(jnp.nan)
    mesh = sharding.make_mesh(8)

    def predict(ensemble: Any, losses: Any, x: Any, axis_name: str | None) -> Any:
        mean = eki_jax.mean_particle(ensemble, axis_name=axis_name)
        best = eki_jax.best_particle(ensemble, losses, axis_name=axis_name)
        return mean, best, eki_jax.ensemble_outputs(toy.forward, ensemble, x, axis_name=axis_name, chunk_size=1)

    wanted = predict(ensemble, losses, toy.batch[0], None)
    body = partial(predict, axis_name="particles")
    for driver in ("shard_map", "jit"):
        spread = sharding.over_devices(body, mesh, (SPREAD, SPREAD, SAME), driver=driver)
        assert largest_difference(jax.jit(spread)(ensemble, losses, toy.batch[0]), wanted) < 1e-5
