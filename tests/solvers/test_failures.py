"""Particles whose model fails: reported, and not allowed to take the others with them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import AxisType, PartitionSpec

import eki_jax
from eki_jax import checked, euler, keep_failed, nesterov, raise_failed, redraw_failed, squared_error

RNG = np.random.default_rng(0)
START = RNG.normal(size=(8, 3)).astype(np.float32)
OUTPUTS = (RNG.normal(size=(8, 4)) + START.sum(axis=1, keepdims=True)).astype(np.float32)
TARGETS = jnp.ones(4)
BROKEN = jnp.asarray(OUTPUTS).at[2, 1].set(jnp.nan).at[5].set(jnp.inf)
HEALTHY = np.array([0, 1, 3, 4, 6, 7])


def updated(policy: Any, make: Any = euler, outputs: Any = BROKEN) -> Any:
    solver = make(None, squared_error(), failures=policy)
    return jax.jit(solver.update)(solver.init(jnp.asarray(START)), outputs, TARGETS)


@pytest.mark.parametrize("make", [euler, nesterov])
def test_keep_moves_the_healthy_alone(make: Any) -> None:
    """``keep`` moves the healthy as if the failed were not there."""
    state, info = updated(keep_failed(), make)
    alone = make(None, squared_error())
    wanted, _ = alone.update(alone.init(jnp.asarray(START[HEALTHY])), OUTPUTS[HEALTHY], TARGETS)
    np.testing.assert_allclose(state.position[HEALTHY], wanted.position, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(state.position[np.array([2, 5])], START[[2, 5]])
    assert int(info.failed) == 2
    assert not bool(info.is_finite)
    assert not np.isfinite(info.losses[2])


def test_a_failed_particle_may_itself_be_nan() -> None:
    broken = START.copy()
    broken[2] = np.nan
    solver = euler(None, squared_error())
    state, _ = solver.update(solver.init(jnp.asarray(broken)), BROKEN, TARGETS)
    assert np.isfinite(np.asarray(state.ensemble)[HEALTHY]).all()


def test_redraw_draws_from_the_healthy() -> None:
    """``redraw`` takes the failed from the healthy ones."""
    state, info = updated(redraw_failed(jax.random.key(0)))
    kept, _ = updated(keep_failed())
    np.testing.assert_array_equal(state.ensemble[HEALTHY], kept.ensemble[HEALTHY])
    healthy = np.asarray(kept.ensemble, np.float64)[HEALTHY]
    drawn = np.asarray(state.ensemble, np.float64)[[2, 5]] - healthy.mean(axis=0)
    assert np.isfinite(drawn).all()
    assert np.abs(drawn).min() > 0
    assert int(info.failed) == 2


def test_redrawn_have_the_healthy_covariance() -> None:
    """Redrawn particles have the healthy ones' covariance."""
    rng = np.random.default_rng(1)
    mixing = np.array([[2.0, 0.0], [1.0, 0.3]])
    u = rng.normal(size=(4000, 2)) @ mixing.T + 3
    healthy = np.arange(4000) % 2 == 0
    new = redraw_failed(jax.random.key(1)).apply(jnp.asarray(u, jnp.float32), jnp.asarray(healthy), jnp.array(3), None)
    np.testing.assert_allclose(np.cov(np.asarray(new)[~healthy].T), mixing @ mixing.T, atol=0.25)
    np.testing.assert_allclose(np.asarray(new)[~healthy].mean(axis=0), [3, 3], atol=0.15)


def test_nothing_to_draw_from_keeps_everything() -> None:
    state, info = updated(redraw_failed(jax.random.key(0)), outputs=jnp.full((8, 4), jnp.nan))
    np.testing.assert_array_equal(state.ensemble, START)
    assert int(info.failed) == 8


def test_raise_says_how_many() -> None:
    solver = euler(None, squared_error(), failures=raise_failed())
    update = checked(solver.update)
    state, _ = update(solver.init(jnp.asarray(START)), jnp.asarray(OUTPUTS), TARGETS)
    with pytest.raises(FloatingPointError, match="2 of 8 particles"):
        update(state, BROKEN, TARGETS)
    assert np.isfinite(np.asarray(state.ensemble)).all()  # what was learned is still there


def test_raise_counts_all_devices_particles() -> None:
    """``raise`` counts the particles of all devices."""
    apply = lambda healthy: raise_failed().apply(jnp.zeros(2), healthy, jnp.array(0), "p")
    healthy = jnp.array([[True, False], [True, True]])
    with pytest.raises(FloatingPointError, match="1 of 4 particles"):
        checked(jax.vmap(apply, axis_name="p"))(healthy)


def test_an_overflowing_norm_skips_the_step() -> None:
    state, info = updated(keep_failed(), outputs=jnp.asarray(OUTPUTS) * 1e25)
    np.testing.assert_array_equal(state.ensemble, START)
    assert not bool(info.is_finite)


def test_parts_redraw_as_the_whole_does() -> None:
    """Over a mapped axis, with more columns than parts and with fewer."""
    policy, count = redraw_failed(jax.random.key(0)), jnp.array(2)
    healthy = jnp.ones(8, bool).at[jnp.array([1, 6])].set(False)
    ensemble = {"wide": jax.random.normal(jax.random.key(1), (8, 5)), "narrow": jnp.arange(8.0)}
    apart = lambda tree: jax.tree.map(lambda leaf: leaf.reshape(4, 2, *leaf.shape[1:]), tree)
    body = lambda part, flags: policy.apply(part, flags, count, "p")
    found = jax.jit(jax.vmap(body, axis_name="p"))(apart(ensemble), apart(healthy))
    wanted = jax.jit(lambda: policy.apply(ensemble, healthy, count, None))()
    for name, leaf in found.items():
        np.testing.assert_allclose(leaf.reshape(wanted[name].shape), wanted[name], rtol=1e-5, atol=1e-5)
        assert not np.allclose(wanted[name][1], ensemble[name][1])
        np.testing.assert_array_equal(wanted[name][0], ensemble[name][0])


@pytest.mark.parametrize("policy", [keep_failed(), redraw_failed(jax.random.key(0))], ids=["keep", "redraw"])
def test_devices_agree_with_one(policy: Any) -> None:
    one, one_info = updated(policy)
    solver = euler(None, squared_error(), failures=policy, axis_name="p")
    mesh = jax.make_mesh((4,), ("p",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    p, everywhere = PartitionSpec("p"), PartitionSpec()
    specs = eki_jax.EulerState(p, everywhere), eki_jax.Info(p, *([everywhere] * 8))
    sharded = jax.jit(jax.shard_map(solver.update, mesh=mesh, in_specs=(specs[0], p, everywhere), out_specs=specs))
    state, info = sharded(eki_jax.EulerState(jnp.asarray(START), jnp.zeros((), jnp.int32)), BROKEN, TARGETS)
    np.testing.assert_allclose(state.ensemble, one.ensemble, rtol=1e-4, atol=1e-5)
    assert int(info.failed) == int(one_info.failed) == 2
    np.testing.assert_allclose(info.spread, np.sqrt(oracle.rows(START[HEALTHY]).var(axis=0).sum()), rtol=1e-5)


def test_redrawing_keeps_the_covariance() -> None:
    """Over draws of an ensemble of which two of six fail, its covariance is on average what it was without failures."""
    healthy = jnp.array([True, True, False, True, False, True])

    def variances(key: Any) -> Any:
        first, second = jax.random.split(key)
        ensemble = jax.random.normal(first, (6, 1))
        new = redraw_failed(second).apply(ensemble, healthy, jnp.array(0), None)
        return jnp.stack([ensemble.var(), new.var()])

    before, after = np.asarray(jax.jit(jax.vmap(variances))(jax.random.split(jax.random.key(0), 20_000))).T
    error = np.sqrt((before.var() + after.var()) / len(before))
    assert abs(before.mean() - after.mean()) < 4 * error
