"""The kernel against its definition, and the properties that its algebra promises."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, PartitionSpec

from eki_jax import direction, drift_norm
from eki_jax.kernel import products
from eki_jax.kernel.products import Products, cheaper_contraction

# Pytrees (shapes after the particle axis) and outputs; M < J/2, M > J and a rank-3 output among them.
SHAPES = [
    (12, {"w": (3, 4), "b": (4,)}, (2,)),
    (8, [(5,), (), (2, 1, 3)], (2, 3, 2)),
    (40, {"only": (130,)}, (3, 2)),
    (2, (7,), (1,)),
]
CONTRACTIONS = (None, "outputs", "particles")
compiled = jax.jit(direction, static_argnames="contraction")
compiled_norm = jax.jit(drift_norm)
norm_by_particles = jax.jit(lambda *args: Products.of(*args, contraction="particles").norm())


def problem(index: int, seed: int, dtype: Any = np.float64, offset: float = 3.0) -> tuple[Any, Any, Any]:
    size, shapes, output_shape = SHAPES[index]
    rng = np.random.default_rng(seed)
    is_shape = lambda x: isinstance(x, tuple) and all(isinstance(n, int) for n in x)
    draw = lambda shape: jnp.asarray(rng.normal(size=(size, *shape)) + offset, dtype)
    ensemble = jax.tree.map(draw, shapes, is_leaf=is_shape)
    outputs = jnp.asarray(rng.normal(size=(size, *output_shape)) + offset, dtype)
    cotangents = jnp.asarray(rng.normal(size=(size, *output_shape)) - offset / 2, dtype)
    return ensemble, outputs, cotangents


def relative(found: Any, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(oracle.rows(found) - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("contraction", CONTRACTIONS)
@settings(max_examples=12, deadline=None)
@given(index=st.integers(0, len(SHAPES) - 1), seed=st.integers(0, 2**32 - 1))
def test_direction_equals_the_double_loop(contraction: Any, index: int, seed: int) -> None:
    """Direction equals the double loop in float64."""
    with jax.enable_x64(True):
        args = problem(index, seed)
        found = compiled(*args, contraction=contraction)
        assert relative(found, oracle.direction(*args)) < 1e-12
        assert jax.tree.structure(found) == jax.tree.structure(args[0])


@settings(max_examples=12, deadline=None)
@given(index=st.integers(0, len(SHAPES) - 1), seed=st.integers(0, 2**32 - 1))
def test_drift_norm_equals_the_double_loop(index: int, seed: int) -> None:
    """Drift norm equals the double loop in float64."""
    with jax.enable_x64(True):
        args = problem(index, seed)
        wanted = np.linalg.norm(oracle.drift(*args[1:]))
        assert abs(float(compiled_norm(*args[1:])) / wanted - 1) < 1e-12
        assert abs(float(norm_by_particles(*args)) / wanted - 1) < 1e-12


@pytest.mark.parametrize("contraction", CONTRACTIONS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float32", 3e-6), ("bfloat16", 2e-2), ("float16", 2e-3)], ids=["f32", "bf16", "f16"]
)
def test_low_precision_is_as_good_as_its_dtype(contraction: Any, dtype: str, tolerance: float) -> None:
    for index in range(len(SHAPES)):
        args = problem(index, seed=index, dtype=dtype)
        found = compiled(*args, contraction=contraction)
        assert relative(found, oracle.direction(*args)) < tolerance  # the oracle sees the rounded inputs
        assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(dtype)}


def test_float64_in_float64_out(x64: None) -> None:
    assert jax.tree.leaves(direction(*problem(0, 0)))[0].dtype == jnp.float64


def test_column_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    args = problem(2, 5, np.float32)
    wanted = oracle.direction(*args)
    monkeypatch.setattr(products, "block_width", lambda anomalies, ensemble: 32)  # 130 columns: four blocks and a rest
    for contraction in ("outputs", "particles"):
        assert relative(jax.jit(partial(direction, contraction=contraction))(*args), wanted) < 3e-6


def test_a_collapsed_ensemble_keeps_its_digits() -> None:
    """Anomalies of 1e-4 on values of 1: without centring first, float32 would have few digits left."""
    rng = np.random.default_rng(0)
    u = jnp.asarray(1 + 1e-4 * rng.normal(size=(50, 6)), jnp.float32)
    g = jnp.asarray(1 + 1e-4 * rng.normal(size=(50, 4)), jnp.float32)
    r = jnp.asarray(rng.normal(size=(50, 4)), jnp.float32)
    for contraction in ("outputs", "particles"):
        assert relative(compiled(u, g, r, contraction=contraction), oracle.direction(u, g, r)) < 1e-3


def test_drift_norm_survives_cancellation() -> None:
    """Residuals orthogonal to the anomalies: the sum over the M x M matrices cancels in float32."""
    rng = np.random.default_rng(1)
    basis = np.linalg.qr(rng.normal(size=(8, 8)))[0]
    g = jnp.asarray(rng.normal(size=(64, 4)) @ basis[:4], jnp.float32)
    r = jnp.asarray(rng.normal(size=(64, 4)) @ basis[4:] + 1e-5 * rng.normal(size=(64, 8)), jnp.float32)
    wanted = np.linalg.norm(oracle.drift(g, r))
    z = np.asarray(g, np.float32) - np.asarray(g, np.float32).mean(axis=0)
    naive = np.sum((z.T @ z) * (np.asarray(r).T @ np.asarray(r)))
    assert abs(np.sqrt(max(naive, 0)) / wanted - 1) > 0.05  # the problem is as hard as it claims
    assert abs(float(drift_norm(g, r)) / wanted - 1) < 0.01


def test_linear_model_preconditions_the_gradient(x64: None) -> None:
    """A linear model gives the covariance times the gradient."""
    rng = np.random.default_rng(2)
    u, a, r = rng.normal(size=(9, 4)), rng.normal(size=(6, 4)), rng.normal(size=(9, 6))
    covariance = np.cov(u.T, bias=True)
    found = direction(jnp.asarray(u), jnp.asarray(u @ a.T), jnp.asarray(r))
    np.testing.assert_allclose(found, r @ a @ covariance, rtol=1e-12)


def test_the_direction_stays_in_the_span(x64: None) -> None:
    """The direction stays in the span of the anomalies."""
    rng = np.random.default_rng(3)
    u = rng.normal(size=(4, 11)) + 2
    found = direction(jnp.asarray(u), jnp.asarray(rng.normal(size=(4, 5))), jnp.asarray(rng.normal(size=(4, 5))))
    anomalies = u - u.mean(axis=0)
    inside = anomalies.T @ np.linalg.lstsq(anomalies.T, np.asarray(found).T, rcond=None)[0]
    np.testing.assert_allclose(inside.T, found, atol=1e-12)


def test_permuting_particles_permutes_the_result() -> None:
    args = problem(0, 4, np.float32)
    order = np.random.default_rng(5).permutation(12)
    shuffled = compiled(*(jax.tree.map(lambda leaf: leaf[order], arg) for arg in args))
    np.testing.assert_allclose(oracle.rows(shuffled), oracle.rows(compiled(*args))[order], rtol=1e-4, atol=1e-5)


def test_a_pytree_equals_its_flattened_self(x64: None) -> None:
    ensemble, outputs, cotangents = problem(1, 6)
    flat = jnp.asarray(oracle.rows(ensemble))
    wanted = oracle.rows(direction(ensemble, outputs, cotangents))
    np.testing.assert_allclose(direction(flat, outputs, cotangents), wanted, rtol=1e-12)


def test_outputs_may_be_a_pytree(x64: None) -> None:
    ensemble, outputs, cotangents = problem(1, 7)
    split = lambda array: {"first": array[:, :1], "rest": array[:, 1:]}
    found = direction(ensemble, split(outputs), split(cotangents))
    np.testing.assert_allclose(oracle.rows(found), oracle.direction(ensemble, outputs, cotangents), rtol=1e-11)


def test_vmap_and_scan() -> None:
    args = [problem(0, seed, np.float32) for seed in (1, 2)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *args)
    mapped = jax.vmap(direction)(*stacked)
    _, scanned = jax.lax.scan(lambda c, a: (c, direction(*a)), None, stacked)
    for index, one in enumerate(args):
        wanted = oracle.direction(*one)
        for found in (mapped, scanned):
            assert relative(jax.tree.map(lambda leaf, i=index: leaf[i], found), wanted) < 3e-6


@pytest.mark.parametrize("devices", [2, 8])
@pytest.mark.parametrize("contraction", CONTRACTIONS)
def test_mapped_axes_equal_one_device(devices: int, contraction: Any) -> None:
    args = problem(1, 8, np.float32)

    def both(ensemble: Any, outputs: Any, cotangents: Any) -> tuple[Any, Any]:
        found = direction(ensemble, outputs, cotangents, axis_name="p", contraction=contraction)
        return found, drift_norm(outputs, cotangents, axis_name="p")

    split = jax.tree.map(lambda leaf: leaf.reshape(devices, -1, *leaf.shape[1:]), args)
    join = lambda tree: jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), tree)
    mesh = jax.make_mesh((devices,), ("p",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
    spec = PartitionSpec("p")
    shard_mapped = jax.shard_map(both, mesh=mesh, in_specs=spec, out_specs=(spec, PartitionSpec()))
    results = {
        "vmap": jax.jit(jax.vmap(both, axis_name="p"))(*split),
        "pmap": jax.pmap(both, axis_name="p")(*split),
        "shard_map": jax.jit(shard_mapped)(*args),
    }
    norm = np.linalg.norm(oracle.drift(*args[1:]))
    for name, (found, found_norm) in results.items():
        whole = found if name == "shard_map" else join(found)
        assert relative(whole, oracle.direction(*args)) < 3e-6, name
        np.testing.assert_allclose(found_norm, np.broadcast_to(norm, np.shape(found_norm)), rtol=1e-5)


def test_the_cheaper_contraction() -> None:
    """The cheaper contraction is the one with fewer operations."""
    for size, outputs, parameters in [(2000, 600, 7850), (100, 600, 7850), (500, 250, 10), (500, 300, 10**6)]:
        through = {
            "outputs": 4 * size * outputs * parameters,
            "particles": 2 * size**2 * (outputs + parameters),
        }
        assert cheaper_contraction(size, outputs, parameters) == min(through, key=through.__getitem__)


@pytest.mark.parametrize("part", [0, 1, 2], ids=["parameters", "outputs", "cotangents"])
def test_a_nan_particle_takes_no_part(part: int) -> None:
    """Its direction is zero, those of the others are as if it were not there."""
    arguments = list(problem(0, 9, np.float32))
    rest = jnp.array([j for j in range(len(arguments[1])) if j != 3])
    wanted = oracle.rows(direction(*(jax.tree.map(lambda leaf: leaf[rest], tree) for tree in arguments)))
    arguments[part] = jax.tree.map(lambda leaf: leaf.at[3].set(jnp.nan), arguments[part])
    found = oracle.rows(direction(*arguments))
    np.testing.assert_allclose(found[rest], wanted, rtol=1e-3, atol=1e-5)
    assert (found[3] == 0).all()


ONE = jnp.ones((4, 2))


@pytest.mark.parametrize(
    ("error", "words", "args"),
    [
        (ValueError, r"ensemble\['b'\].*leading axis 3.*4 particles", ({"a": ONE, "b": jnp.ones((3, 2))}, ONE, ONE)),
        (ValueError, "J = 1.*at least 2", (ONE[:1], ONE[:1], ONE[:1])),
        (ValueError, r"outputs: leading axis 3.*4 particles", (ONE, ONE[:3], ONE[:3])),
        (ValueError, r"cotangents: shape \(4, 3\).*\(4, 2\)", (ONE, ONE, jnp.ones((4, 3)))),
        (ValueError, "cotangents: structure", (ONE, ONE, {"a": ONE})),
        (TypeError, r"ensemble\['n'\].*int32", ({"n": jnp.ones((4, 2), jnp.int32)}, ONE, ONE)),
        (ValueError, "ensemble: has no arrays", ({}, ONE, ONE)),
        (ValueError, "is a scalar", (jnp.ones(()), ONE, ONE)),
    ],
)
def test_bad_input_is_named(error: type[Exception], words: str, args: Any) -> None:
    with pytest.raises(error, match=words):
        direction(*args)


def test_an_unknown_contraction_is_named() -> None:
    with pytest.raises(ValueError, match="contraction: 'sideways'"):
        direction(ONE, ONE, ONE, contraction="sideways")  # type: ignore[arg-type]
