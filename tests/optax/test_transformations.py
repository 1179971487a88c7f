"""The transformations against the core, against their formulas, and over devices; what is raised on bad input."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from jax.sharding import AxisType, PartitionSpec
from sklearn.datasets import load_digits

from eki_jax import (
    Solver,
    cross_entropy,
    euler,
    frobenius_step_size,
    gaussian,
    nesterov,
    perturb,
    sample_ensemble,
    squared_error,
    su_boyd_candes,
    value_and_direction,
    xavier,
)
from eki_jax.optax import (
    ScaleByNesterovState,
    add_prior_noise,
    add_tikhonov,
    eki,
    ensemble_gradient,
    from_solver,
    meki,
    per_particle,
    scale_by_drift_norm,
    scale_by_nesterov,
    value_and_extra_args,
)


@pytest.fixture
def compilations() -> Iterator[list[str]]:
    """A list that grows by one whenever XLA compiles a program."""
    found: list[str] = []

    def listen(event: str, seconds: float, **rest: Any) -> None:
        if "backend_compile" in event:
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    jax.jit(lambda x: x + 1)(0)
    assert len(found) == 1
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


STEPS, BATCH, PARTICLES = 100, 200, 50
LINEAR = lambda u, x: x @ u


# The digits: a softmax regression and the paper's step, for a hundred steps.


def classifier(params: Any, x: jax.Array) -> jax.Array:
    return jax.nn.softmax(x @ params["kernel"] + params["bias"])


def digits(dtype: Any) -> tuple[Any, Any]:
    images, labels = load_digits(return_X_y=True)
    images = (images - images.mean()) / images.std()
    rng = np.random.default_rng(0)
    picked = np.stack([rng.choice(len(images), BATCH, replace=False) for _ in range(STEPS)])
    prior = xavier({"kernel": jnp.zeros((64, 10), dtype), "bias": jnp.zeros(10, dtype)})
    return sample_ensemble(jax.random.key(0), prior, PARTICLES), (jnp.asarray(images[picked], dtype), labels[picked])


def optax_step(tx: optax.GradientTransformation, f: Callable[..., Any], carry: Any, batch: Any) -> Any:
    params, state = carry
    _, extra = f(params, batch)
    updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params, **extra)
    return optax.apply_updates(params, updates), state


def pair(name: str, h0: float) -> tuple[Solver, optax.GradientTransformation]:
    loss, step_size = cross_entropy(), frobenius_step_size(h0, 0.5)
    if name == "eki":
        return euler(classifier, loss, step_size), eki(h0, 0.5)
    momentum = {"meki": 0.9, "meki_schedule": su_boyd_candes()}[name]
    return nesterov(classifier, loss, step_size, momentum), meki(h0, 0.5, momentum)


def relative(found: Any, wanted: Any) -> Any:
    square = lambda tree: sum(jnp.sum(leaf * leaf) for leaf in jax.tree.leaves(tree))
    return jnp.sqrt(square(jax.tree.map(jnp.subtract, found, wanted)) / square(wanted))


def trajectories(name: str, dtype: Any, h0: float = 2.0) -> tuple[Any, Any]:
    """The core's ensemble and optax's after all steps, each from a program of its own."""
    ensemble, batches = digits(dtype)
    solver, tx = pair(name, h0)
    one = partial(optax_step, tx, value_and_extra_args(classifier, cross_entropy()))
    core = jax.jit(lambda state: jax.lax.scan(solver.step, state, batches)[0])(solver.init(ensemble))
    other = jax.jit(lambda carry: jax.lax.scan(lambda c, b: (one(c, b), None), carry, batches)[0])
    return core.ensemble, other((ensemble, tx.init(ensemble)))[0]


@pytest.mark.parametrize("name", ["eki", "meki", pytest.param("meki_schedule", marks=pytest.mark.slow)])
def test_a_chain_follows_the_core_in_double(name: str, x64: None, optimized: None) -> None:
    """A chain follows the core on digits in double precision."""
    core, params = trajectories(name, jnp.float64)
    assert relative(params, core) < 1e-12


@pytest.mark.parametrize("name", ["eki", "meki"])
def test_a_chain_follows_the_core_in_single(name: str, optimized: None) -> None:
    """A chain follows the core on digits in single precision.

    With h0 = 2, momentum 0.9 and this few particles trajectories part: both must round alike, step for step.
    """
    core, params = trajectories(name, jnp.float32)
    assert relative(params, core) < 1e-6


def test_a_varying_momentum_is_exact() -> None:
    """A momentum that varies is exact where an injected trace is not."""
    schedule, gradients, rate = su_boyd_candes(), [3.0, -1.0, 2.0, 5.0], 0.1
    u, v = 1.0, 1.0
    for n, g in enumerate(gradients):
        new = v - rate * g
        u, v = new, new + schedule(n) * (new - u)
    injected = optax.inject_hyperparams(optax.trace, static_args="nesterov")

    def last(tx: optax.GradientTransformation) -> float:
        tx, params = optax.chain(tx, optax.scale(-rate)), jnp.float32(1.0)
        state = tx.init(params)
        for g in gradients:
            updates, state = tx.update(jnp.float32(g), state, params)
            params = optax.apply_updates(params, updates)
        return float(params)

    assert last(scale_by_nesterov(schedule)) == pytest.approx(float(v), abs=1e-6)
    assert abs(last(injected(decay=schedule, nesterov=True)) - v) > 1e-2
    assert last(scale_by_nesterov(0.7)) == pytest.approx(last(optax.trace(0.7, nesterov=True)), abs=1e-6)


# The formulas, each against dense algebra.


def small(seed: int = 0, size: int = 5, parameters: int = 3, data: int = 4) -> tuple[jax.Array, tuple[Any, Any]]:
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape) + 0.5)
    return draw(size, parameters), (draw(data, parameters), draw(data))


def test_the_drift_norms_step_is_the_papers(x64: None) -> None:
    ensemble, batch = small()
    _, extra = value_and_extra_args(LINEAR, squared_error())(ensemble, batch)
    updates, _ = scale_by_drift_norm(1.5, 0.25).update(ensemble, optax.EmptyState(), **extra)
    d = oracle.drift(extra["outputs"], extra["cotangents"])
    np.testing.assert_allclose(updates, ensemble * 5 * 1.5 / (np.sqrt((d**2).sum()) + 0.25), rtol=1e-12)


def tikhonov_factors() -> Iterator[tuple[str, Any, np.ndarray]]:
    rng = np.random.default_rng(3)
    wide = rng.normal(size=(3, 5))
    yield "number", 0.5, 0.25 * np.eye(3)
    yield "deviations", np.array([0.5, 1.0, 2.0]), np.diag([0.25, 1.0, 4.0])
    yield "matrix", wide, wide @ wide.T


@pytest.mark.parametrize(("factor", "covariance"), [pytest.param(*case[1:], id=case[0]) for case in tikhonov_factors()])
@pytest.mark.parametrize("size", [2, 20])  # either order of the products
def test_tikhonovs_term(factor: Any, covariance: np.ndarray, size: int, x64: None) -> None:
    """Tikhonov's term is the covariance times the prior's precision."""
    ensemble, _ = small(size=size)
    mean = np.array([1.0, -1.0, 0.5])
    tx = add_tikhonov(gaussian(jnp.asarray(mean), factor=factor), 0.3)
    updates, _ = tx.update(2 * ensemble, tx.init(ensemble), ensemble)
    u = np.asarray(ensemble)
    c = np.cov(u.T, bias=True)
    wanted = 2 * u + 0.3 * (u - mean) @ np.linalg.inv(covariance) @ c
    np.testing.assert_allclose(updates, wanted, rtol=1e-11)


def test_tikhonovs_term_spans_all_leaves(x64: None) -> None:
    """Tikhonov's term spans all leaves of the ensemble."""
    u, _ = small(size=7)
    tree = {"b": u[:, 0], "w": u[:, 1:]}
    mean, deviations = {"b": jnp.array(0.5), "w": jnp.array([1.0, 2.0])}, {"b": 2.0, "w": np.array([0.5, 3.0])}
    tx = add_tikhonov(gaussian(mean, deviations))
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, tree), tx.init(tree), tree)
    wanted = (np.asarray(u) - [0.5, 1, 2]) / np.square([2.0, 0.5, 3.0]) @ np.cov(np.asarray(u).T, bias=True)
    np.testing.assert_allclose(oracle.rows(updates), wanted, rtol=1e-12)


def test_tikhonovs_term_leads_to_the_mode(x64: None) -> None:
    """With Tikhonov's term the ensemble ends at the posterior's mode."""
    ensemble, (a, y) = small(size=8, data=2)  # two data for three parameters: without a prior there is no one answer
    prior = gaussian(jnp.array([1.0, -1.0, 0.5]), 0.7)
    f = value_and_extra_args(LINEAR, squared_error())
    tx = optax.chain(ensemble_gradient(), add_tikhonov(prior), scale_by_drift_norm(0.5, 1e-6), optax.scale(-1.0))

    @jax.jit
    def run(params: Any) -> Any:
        carry = (params, tx.init(params))
        return jax.lax.fori_loop(0, 4000, lambda _, c: optax_step(tx, f, c, (a, y)), carry)[0]

    hessian = a.T @ a + jnp.eye(3) / 0.49
    mode = jnp.linalg.solve(hessian, a.T @ y + prior.mean / 0.49)
    best_fit = jnp.linalg.pinv(a) @ y
    assert jnp.abs(run(ensemble).mean(axis=0) - mode).max() < 1e-3 < jnp.abs(best_fit - mode).max()


def test_weight_decay_pulls_the_ensemble_to_zero() -> None:
    ensemble, batch = small(size=8)
    gradient = value_and_direction(LINEAR, squared_error())

    def end(decay: float) -> float:
        tx = optax.chain(optax.add_decayed_weights(decay), optax.scale(-0.01))

        def step(_: int, carry: Any) -> Any:
            updates, state = tx.update(gradient(carry[0], batch)[1], carry[1], carry[0])
            return optax.apply_updates(carry[0], updates), state

        return float(jnp.linalg.norm(jax.lax.fori_loop(0, 200, step, (ensemble, tx.init(ensemble)))[0].mean(axis=0)))

    assert end(1.0) < 0.7 * end(0.0)


def test_prior_noise_has_the_papers_covariance(x64: None) -> None:
    factor = jnp.array([[2.0, 0.0], [1.0, 0.5]])
    prior = gaussian(jnp.array([5.0, 5.0]), factor=factor)
    ensemble = jnp.zeros((20_000, 2))
    extra = {"outputs": jnp.zeros((20_000, 1)).at[0].set(1.0), "cotangents": jnp.zeros((20_000, 1)).at[0].set(3.0)}
    norm = 3 * np.sqrt((1 - 1 / 20_000) ** 2 + 19_999 / 20_000**2)
    tx = add_prior_noise(prior, jax.random.key(0), h0=2.0, eps=0.5)
    first, state = tx.update(ensemble, tx.init(ensemble), **extra)
    second, _ = tx.update(ensemble, state, **extra)
    wanted = np.sqrt(2 / (norm + 0.5)) * np.asarray(factor @ factor.T)
    for noise in (first, second):
        np.testing.assert_allclose(np.cov(noise.T), wanted, rtol=0.05, atol=0.02)
        assert np.abs(noise.mean(axis=0)).max() < 0.05
    assert abs(np.corrcoef(first[:, 0], second[:, 0])[0, 1]) < 0.03


def test_meki_with_a_prior_disturbs_momenta(x64: None) -> None:
    """MEKI with a prior is Nesterov with disturbed momenta."""
    ensemble, batch = small(size=6)
    prior, key = gaussian(jnp.zeros(3), 0.1), jax.random.key(3)
    solver, tx = nesterov(LINEAR, squared_error(), momentum=0.8), meki(momentum=0.8, prior=prior, key=key)
    f, state, carry = (
        value_and_extra_args(LINEAR, squared_error()),
        solver.init(ensemble),
        (ensemble, tx.init(ensemble)),
    )

    def disturbed(state: Any, n: int) -> Any:
        state, info = solver.step(state, batch)
        scale = -((1.0 / (info.drift_norm + 0.5)) ** 0.25)  # updates descend: the noise's sign is turned
        return state.with_ensemble(perturb(jax.random.fold_in(key, n), state.ensemble, prior, scale))

    both = jax.jit(lambda state, carry, n: (disturbed(state, n), optax_step(tx, f, carry, batch)))
    for n in range(5):
        state, carry = both(state, carry, n)
        assert relative(carry[0], state.ensemble) < 1e-12
        ahead = next(part for part in carry[1] if isinstance(part, ScaleByNesterovState)).momentum
        assert relative(carry[0] + ahead, state.position) < 1e-12


@pytest.mark.parametrize(
    "tx", [optax.clip_by_global_norm(0.1), optax.lamb(0.1), optax.adafactor(0.1), optax.contrib.muon(0.1)]
)
def test_per_particle_is_a_loop_over_particles(
    tx: optax.GradientTransformation,
) -> None:
    """Per particle is a loop over particles and the bare transformation is not."""
    rng = np.random.default_rng(0)
    draw = lambda: {"w": jnp.asarray(rng.normal(size=(3, 4, 2)), jnp.float32)}
    ensemble, d = draw(), draw()
    one = lambda tree, j: jax.tree.map(lambda leaf: leaf[j], tree)

    @partial(jax.jit, static_argnums=0)
    def update(tx: Any, u: Any, g: Any) -> Any:
        return tx.update(g, tx.init(u), u)[0]["w"]

    wanted = np.stack([update(tx, one(ensemble, j), one(d, j)) for j in range(3)])
    np.testing.assert_allclose(update(per_particle(tx), ensemble, d), wanted, rtol=1e-4, atol=1e-6)
    assert np.abs(update(tx, ensemble, d) - wanted).max() > 1e-3


# Over devices.


def chains(axis_name: str | None) -> dict[str, optax.GradientTransformation]:
    prior, key = gaussian(jnp.zeros(3), 0.1), jax.random.key(3)
    tikhonov = optax.chain(
        ensemble_gradient(axis_name=axis_name), add_tikhonov(prior, axis_name=axis_name), optax.scale(-0.1)
    )
    return {"meki_noise": meki(prior=prior, key=key, axis_name=axis_name), "tikhonov": tikhonov}


def two_steps(tx: optax.GradientTransformation, params: Any, state: Any, batch: Any) -> Any:
    f = value_and_extra_args(LINEAR, squared_error())
    return optax_step(tx, f, optax_step(tx, f, (params, state), batch), batch)


@pytest.mark.parametrize("how", ["vmap", "shard_map", pytest.param("pmap", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["meki_noise", "tikhonov"])
def test_particles_over_a_mapped_axis(name: str, how: str) -> None:
    """Particles may be spread over a mapped axis."""
    ensemble, batch = small(size=8)
    tx = chains(None)[name]
    wanted, _ = jax.jit(partial(two_steps, tx))(ensemble, tx.init(ensemble), batch)
    tx = chains("particles")[name]
    state = tx.init(ensemble)
    if how == "shard_map":
        mesh = jax.make_mesh((4,), ("particles",), axis_types=(AxisType.Auto,))
        spec = PartitionSpec("particles")
        specs = optax.tree.map_params(
            tx, lambda _, spec: spec, state, spec, transform_non_params=lambda _: PartitionSpec()
        )
        body = partial(two_steps, tx)
        mapped = jax.shard_map(body, mesh=mesh, in_specs=(spec, specs, PartitionSpec()), out_specs=(spec, specs))
        found, _ = jax.jit(mapped)(ensemble, state, batch)
    else:
        split = ensemble.reshape(4, 2, 3)
        mapper = partial(jax.vmap if how == "vmap" else jax.pmap, axis_name="particles", in_axes=(0, None))
        mapped = mapper(lambda u, b: two_steps(tx, u, tx.init(u), b)[0])
        found = (jax.jit(mapped) if how == "vmap" else mapped)(split, batch).reshape(8, 3)
    np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=1e-5)


# Bad input.


def good() -> dict[str, Any]:
    ensemble, batch = small()
    _, extra = value_and_extra_args(LINEAR, squared_error())(ensemble, batch)
    return {"updates": jnp.zeros_like(ensemble), "params": ensemble, **extra}


def update_with(tx: optax.GradientTransformation, **changes: Any) -> Any:
    kwargs = {**good(), **changes}
    return tx.update(kwargs.pop("updates"), tx.init(good()["params"]), kwargs.pop("params"), **kwargs)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"outputs": None}, TypeError, "no outputs; wanted update.*value_and_extra_args"),
        ({"cotangents": None}, TypeError, "no cotangents"),
        ({"outputs": None, "cotangents": None}, TypeError, "no outputs and no cotangents"),
        ({"params": None}, ValueError, "no params; wanted the ensemble"),
        ({"outputs": jnp.zeros((4, 4)), "cotangents": jnp.zeros((4, 4))}, ValueError, "leading axis 4, but .* J = 5"),
        ({"cotangents": jnp.zeros((5, 3))}, ValueError, "cotangents: shaped like the parameters"),
        ({"cotangents": jnp.zeros((5, 2))}, ValueError, "cotangents: shape"),
        ({"updates": jnp.ones((5, 3))}, ValueError, "updates: not zero.*leave ensemble_gradient out"),
        ({"updates": jnp.zeros(3)}, ValueError, "not the gradient of one particle"),
        ({"params": {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}}, ValueError, "not a stacked ensemble.*sample_ensemble"),
        ({"params": jnp.ones((5, 3), jnp.int32)}, TypeError, "floating-point"),
    ],
)
def test_bad_input_is_named_and_the_way_out_said(changes: Any, error: type[Exception], message: str) -> None:
    update_with(ensemble_gradient())
    with pytest.raises(error, match=message):
        update_with(ensemble_gradient(), **changes)


@pytest.mark.parametrize(
    "make", [scale_by_drift_norm, partial(add_prior_noise, gaussian(jnp.zeros(3), 1.0), jax.random.key(0))]
)
def test_others_name_what_is_missing_too(make: Any) -> None:
    """The other transformations name what is missing too."""
    with pytest.raises(TypeError, match="no outputs"):
        update_with(make(), outputs=None)
    with pytest.raises(ValueError, match="J = 5"):
        update_with(make(), outputs=jnp.zeros((4, 4)), cotangents=jnp.zeros((4, 4)))
    with pytest.raises(ValueError, match="h0: -1"):
        make(h0=-1.0)
    with pytest.raises(ValueError, match="eps: -1"):
        make(eps=-1.0)


def test_required_arguments_are_keyword_only() -> None:
    """Required extra arguments are keyword only and others are taken."""
    kinds = inspect.signature(ensemble_gradient().update).parameters
    assert kinds["outputs"].kind is kinds["cotangents"].kind is inspect.Parameter.KEYWORD_ONLY
    assert kinds["extra"].kind is inspect.Parameter.VAR_KEYWORD
    assert isinstance(ensemble_gradient(), optax.GradientTransformationExtraArgs)


def test_init_wants_stacked_parameters() -> None:
    """Init says so if the parameters are not stacked."""
    for make in (ensemble_gradient, eki, lambda: per_particle(optax.sgd(0.1))):
        with pytest.raises(ValueError, match="not a stacked ensemble"):
            make().init({"w": jnp.ones((3, 2)), "b": jnp.ones(2)})


@pytest.mark.parametrize(
    ("factor", "message"),
    [
        (lambda key: jnp.zeros(3), "a function can be drawn from but not inverted"),
        (np.ones((3, 2)), "rank 2 at most"),
        (np.ones((3, 4)), "singular"),
        (0.0, "standard deviation of zero"),
        (np.array([1.0, 0.0, 1.0]), "standard deviation of zero"),
    ],
)
def test_a_singular_prior_is_refused(factor: Any, message: str) -> None:
    """A prior that cannot be inverted is refused."""
    with pytest.raises(ValueError, match=message):
        add_tikhonov(gaussian(jnp.zeros(3), factor=factor))


def test_priors_that_do_not_fit_are_refused() -> None:
    with pytest.raises(TypeError, match="wanted a Gaussian"):
        add_tikhonov(object())  # type: ignore[arg-type]
    other = gaussian({"w": jnp.zeros(3)}, 1.0)
    with pytest.raises(ValueError, match="prior: does not fit the parameters"):
        update_with(add_tikhonov(other))
    with pytest.raises(ValueError, match="prior: does not fit the parameters"):
        update_with(add_prior_noise(other, jax.random.key(0)))
    with pytest.raises(ValueError, match=r"does not fit the parameters: \(2,\) where a particle has \(3,\)"):
        update_with(add_tikhonov(gaussian(jnp.zeros(2), 1.0)))
    for wrong in ({"prior": other}, {"key": jax.random.key(0)}):
        with pytest.raises(TypeError, match="both a prior and a key"):
            meki(**wrong)
    with pytest.raises(ValueError, match="momentum"):
        meki(momentum=1.0)


WIDE = 2000  # parameters: at this many the kernel walks over a leaf in blocks, a loop
WIDE_PRIOR = gaussian({"a": jnp.zeros(WIDE), "b": jnp.zeros(3)}, 0.1)


@pytest.mark.parametrize(
    "chain",
    [
        eki(prior=WIDE_PRIOR, key=jax.random.key(3)),
        meki(prior=WIDE_PRIOR, key=jax.random.key(3)),
        optax.chain(ensemble_gradient(), add_tikhonov(WIDE_PRIOR, 1e-3), per_particle(optax.clip_by_global_norm(1.0))),
        optax.inject_hyperparams(eki)(h0=lambda count: 1 / (1 + count)),
        optax.partition({"train": meki(), "keep": optax.set_to_zero()}, {"a": "train", "b": "keep"}),
        from_solver(nesterov(None, squared_error())),
    ],
    ids=["eki", "meki", "tikhonov", "inject_hyperparams", "partition", "from_solver"],
)
def test_eager_updates_compile_once(chain: Any, compilations: list[str]) -> None:
    """An update that is called as it is, is compiled in its first calls and never again."""
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"a": jax.random.normal(keys[0], (4, WIDE)), "b": jax.random.normal(keys[1], (4, 3))}
    batch = jax.random.normal(keys[2], (2, WIDE)) / WIDE**0.5, jnp.ones(2)
    evaluated = value_and_extra_args(lambda u, x: x @ u["a"], squared_error(), chunk_size=1)
    zeros, state, found = jax.tree.map(jnp.zeros_like, params), chain.init(params), []
    for _ in range(4):
        compilations.clear()
        _, extra = evaluated(params, batch)
        updates, state = chain.update(zeros, state, params, targets=batch[1], **extra)
        params = optax.apply_updates(params, updates)
        found.append(len(compilations))
    assert found[2:] == [0, 0]
    assert float(jnp.abs(updates["a"]).max()) > 0
