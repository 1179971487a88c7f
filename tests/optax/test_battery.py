"""Every transformation and every composition with optax over one table of problems, both ways into optax."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from eki_jax import direction, gaussian, losses, value_and_direction
from eki_jax.optax import (
    add_prior_noise,
    add_tikhonov,
    eki,
    ensemble_gradient,
    meki,
    per_particle,
    scale_by_drift_norm,
    scale_by_nesterov,
    value_and_extra_args,
)

J = 6
# Compiling is most of what these tests do.
QUICK = {"xla_backend_optimization_level": 0}

# One particle's parameters, in every form a model may choose: an array, nested containers, a scalar, a rank of four.
PROBLEMS = {
    "array": jnp.zeros(3),
    "scalars": {"a": jnp.zeros(()), "b": jnp.zeros(())},
    "nested": {"a": [jnp.zeros((2, 3)), (jnp.zeros(()),)], "b": {"kernel": jnp.zeros((1, 2, 1, 2))}},
}


def forward(params: Any, x: jax.Array) -> jax.Array:
    flat = jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(params)]).astype(x.dtype)
    return jnp.tanh(x[:, : flat.size] @ flat)


def setup(name: str, dtype: Any = jnp.float32) -> tuple[Any, Any]:
    """An ensemble and three batches, asymmetric in everything."""
    rng = np.random.default_rng(7)
    draw = lambda leaf: jnp.asarray(rng.normal(size=(J, *leaf.shape)) + 0.3, dtype)
    ensemble = jax.tree.map(draw, PROBLEMS[name])
    batches = (jnp.asarray(rng.normal(size=(3, 5, 11)), dtype), jnp.asarray(rng.normal(size=(3, 5)), dtype))
    return ensemble, batches


def prior_like(ensemble: Any) -> Any:
    return gaussian(jax.tree.map(lambda leaf: jnp.full(leaf.shape[1:], 0.25, leaf.dtype), ensemble), 0.5)


def by_size(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: "large" if leaf.ndim > 2 else "small", tree)


def is_large(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.ndim > 2, tree)


# A factory of a transformation that takes the direction as it would take a gradient.
TRANSFORMATIONS: dict[str, Callable[[Any], optax.GradientTransformation]] = {
    "drift_norm": lambda u: optax.chain(scale_by_drift_norm(0.5, 0.5), optax.scale(-1.0)),
    "nesterov": lambda u: optax.chain(scale_by_nesterov(0.5), optax.scale(-0.1)),
    "nesterov_schedule": lambda u: optax.chain(scale_by_nesterov(lambda n: n / (n + 3)), optax.scale(-0.1)),
    "meki_r": lambda u: scale_by_nesterov(0.9, noise=add_prior_noise(prior_like(u), jax.random.key(0))),
    "tikhonov": lambda u: optax.chain(add_tikhonov(prior_like(u), 0.1), optax.scale(-0.1)),
    "drift_norm_trace": lambda u: optax.chain(scale_by_drift_norm(2.0, 0.5), optax.trace(0.9), optax.scale(-1.0)),
    "sgd": lambda u: optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": lambda u: optax.adam(0.1),
    "clip": lambda u: optax.chain(optax.clip(0.01), optax.scale(-1.0)),
    "weight_decay": lambda u: optax.chain(optax.add_decayed_weights(0.1), optax.scale(-0.1)),
    "schedule": lambda u: optax.sgd(optax.cosine_decay_schedule(0.1, 10)),
    "masked": lambda u: optax.masked(optax.adam(0.1), is_large),
    "masked_prior": lambda u: optax.masked(add_prior_noise(prior_like(u), jax.random.key(0)), is_large),
    "masked_tikhonov": lambda u: optax.masked(add_tikhonov(prior_like(u), 0.1), is_large),
    "partition": lambda u: optax.partition({"large": optax.adam(0.1), "small": scale_by_nesterov(0.5)}, by_size),
    "multi_steps": lambda u: optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation(),
    "apply_if_finite": lambda u: optax.apply_if_finite(optax.adam(0.1), 3),
    "inject_hyperparams": lambda u: optax.inject_hyperparams(meki_tail)(
        h0=lambda n: 1.0 + n, momentum=lambda n: n / (n + 3)
    ),
    "named_chain": lambda u: optax.named_chain(("step", scale_by_drift_norm()), ("descend", optax.scale(-1.0))),
    "per_particle_clip": lambda u: per_particle(optax.clip_by_global_norm(0.01)),
    "per_particle_lamb": lambda u: per_particle(optax.lamb(0.1)),
    "per_particle_adafactor": lambda u: per_particle(optax.adafactor(0.1)),
    "per_particle_polyak": lambda u: per_particle(optax.polyak_sgd(), mapped=("value",)),
    "per_particle_muon": lambda u: per_particle(optax.contrib.muon(0.1)),
}

WHOLE_CHAINS = {
    "eki": lambda u: eki(),
    "meki": lambda u: meki(momentum=lambda n: n / (n + 3)),
    "eki_noise": lambda u: eki(prior=prior_like(u), key=jax.random.key(1)),
    "meki_noise": lambda u: meki(prior=prior_like(u), key=jax.random.key(1)),
}


def meki_tail(h0: float, momentum: float) -> optax.GradientTransformation:
    return optax.chain(scale_by_drift_norm(h0, 0.5), scale_by_nesterov(momentum), optax.scale(-1.0))


def run(tx: optax.GradientTransformation, ensemble: Any, batches: Any, gradient: Callable[[Any, Any], Any]) -> Any:
    """Three steps of ``tx`` in a scan, each behind a condition, so that dtypes and structure must stay."""
    tx, extra_args = optax.with_extra_args_support(tx), value_and_extra_args(forward, losses.squared_error())
    traces = []

    def step(carry: Any, batch: Any) -> Any:
        params, state = carry

        def update() -> Any:
            values, extra = extra_args(params, batch)
            updates, new = tx.update(gradient(params, batch), state, params, value=values, unknown=1, **extra)
            return optax.apply_updates(params, updates), new

        return jax.lax.cond(batch[0][0, 0] > -jnp.inf, update, lambda: carry), None

    @partial(jax.jit, compiler_options=QUICK)
    def steps(params: Any, state: Any, xs: Any) -> Any:
        traces.append(1)
        return jax.lax.scan(step, (params, state), xs)[0]

    state = tx.init(ensemble)
    first = steps(ensemble, state, batches)
    steps(*first, batches)
    assert len(traces) == 1, "compiled again on the second call"
    assert jax.tree.map(lambda a: (a.shape, a.dtype), first) == jax.tree.map(
        lambda a: (a.shape, a.dtype), (ensemble, jax.tree.map(jnp.asarray, state))
    )
    mapped = optax.tree.map_params(tx, lambda leaf: leaf, state)
    assert jax.tree.structure(mapped) == jax.tree.structure(state)
    return first[0]


def directions(params: Any, batch: Any) -> Any:
    return value_and_direction(forward, losses.squared_error())(params, batch)[1]


def zeros(params: Any, batch: Any) -> Any:
    return jax.tree.map(jnp.zeros_like, params)


def moved(new: Any, old: Any) -> bool:
    return any(bool(jnp.any(a != b)) for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True))


# The quick run has optax's own on one problem, and on two what is ours or hides leaves from ours.
SLOW = ("per_particle_lamb", "per_particle_adafactor", "per_particle_muon")
OURS = ("drift_norm", "nesterov", "tikhonov", "masked_prior", "masked_tikhonov")
CASES = [
    pytest.param(
        problem,
        name,
        marks=[pytest.mark.slow] * (name in SLOW or not (problem == "nested" or (problem == "array" and name in OURS))),
    )
    for problem in PROBLEMS
    for name in TRANSFORMATIONS
]


@pytest.mark.parametrize(("problem", "name"), CASES)
def test_both_ways_in_agree(name: str, problem: str) -> None:
    """A transformation takes the direction as a gradient, and both ways in agree."""
    ensemble, batches = setup(problem)
    tx = TRANSFORMATIONS[name](ensemble)
    as_gradient = run(tx, ensemble, batches, directions)
    in_chain = run(optax.chain(ensemble_gradient(), tx), ensemble, batches, zeros)
    for a, b in zip(jax.tree.leaves(as_gradient), jax.tree.leaves(in_chain), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(as_gradient))
    assert moved(as_gradient, ensemble)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("eki", "bfloat16"),
        ("meki", "float64"),
        ("meki", "float16"),
        ("eki_noise", "float64"),
        ("meki_noise", "bfloat16"),
    ],
)
def test_the_chains_keep_every_dtype(name: str, dtype: str) -> None:
    with jax.enable_x64(dtype == "float64"):
        ensemble, batches = setup("nested", jnp.dtype(dtype))
        new = run(WHOLE_CHAINS[name](ensemble), ensemble, batches, zeros)
        assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(new))
        assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(new))
        assert moved(new, ensemble)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_ensemble_gradient_is_the_kernel(problem: str) -> None:
    ensemble, (xs, ys) = setup(problem)
    _, extra = value_and_extra_args(forward, losses.squared_error())(ensemble, (xs[0], ys[0]))
    tx = ensemble_gradient()
    found, state = tx.update(zeros(ensemble, None), tx.init(ensemble), ensemble, unknown="ignored", **extra)
    wanted = direction(ensemble, extra["outputs"], extra["cotangents"])
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), found, wanted)
    assert state == optax.EmptyState()
