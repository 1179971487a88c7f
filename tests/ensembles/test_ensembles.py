"""Priors, and the ensembles drawn from them."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from eki_jax import (
    best_particle,
    ensemble_outputs,
    gaussian,
    mean_particle,
    perturb,
    perturb_data,
    resample_around_mean,
    sample_ensemble,
    xavier,
)

KEY = jax.random.key(0)


def variance(factor: Any) -> float:
    return round(float(factor) ** 2, 6)


def test_xavier_on_the_layers_of_a_network() -> None:
    shape = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.float32)
    template = {
        "Dense_0": {"kernel": shape(784, 100), "bias": shape(100)},
        "Conv_0": {"kernel": shape(3, 3, 16, 32), "bias": shape(32)},
        "cell": {"kernel_h": shape(32, 32), "kernel_x": shape(28, 32), "bias_h": shape(32), "bias_x": shape(32)},
        "Norm_0": {"scale": shape(16), "bias": shape(16)},
        "Embed_0": {"embedding": shape(50, 8)},
    }
    prior = xavier(template)
    found = jax.tree.map(variance, prior.factor)
    wanted = {
        "Dense_0": {"kernel": 2 / 884, "bias": 2 / 884},
        "Conv_0": {"kernel": 2 / 48, "bias": 2 / 48},  # channels: the window does not count
        "cell": {"kernel_h": 2 / 64, "kernel_x": 2 / 60, "bias_h": 2 / 64, "bias_x": 2 / 60},
        "Norm_0": {"scale": 1 / 16, "bias": 1 / 16},
        "Embed_0": {"embedding": 2 / 58},
    }
    assert found == jax.tree.map(lambda value: round(value, 6), wanted)
    with_window = jax.tree.map(variance, xavier(template, window=True).factor)
    assert with_window == found | {"Conv_0": dict.fromkeys(("kernel", "bias"), round(2 / (9 * 48), 6))}
    assert set(np.unique(prior.mean["Norm_0"]["scale"])) == {1.0}
    assert not any(np.any(prior.mean["Dense_0"][name]) for name in ("kernel", "bias"))


def test_draws_have_the_priors_moments() -> None:
    ensemble = sample_ensemble(KEY, xavier({"kernel": jnp.zeros((30, 20)), "bias": jnp.zeros(20)}), 400)
    for leaf in jax.tree.leaves(ensemble):
        assert leaf.shape[0] == 400
        np.testing.assert_allclose(np.var(leaf), 2 / 50, rtol=0.05)
        np.testing.assert_allclose(np.mean(leaf), 0, atol=0.01)


@pytest.mark.parametrize("kind", ["number", "deviations", "matrix", "function"])
def test_gaussian_factors(kind: str) -> None:
    root = np.array([[2.0, 0.0], [1.0, 0.5]])
    factor, covariance = {
        "number": (3.0, 9 * np.eye(2)),
        "deviations": (jnp.array([1.0, 3.0]), np.diag([1.0, 9.0])),
        "matrix": (jnp.asarray(root, jnp.float32), root @ root.T),
        "function": (lambda key: jnp.asarray(root, jnp.float32) @ jax.random.normal(key, (2,)), root @ root.T),
    }[kind]
    draws = sample_ensemble(KEY, gaussian(jnp.array([5.0, -5.0]), factor=factor), 5000)
    np.testing.assert_allclose(np.cov(np.asarray(draws).T), covariance, atol=0.4)
    np.testing.assert_allclose(np.mean(draws, axis=0), [5, -5], atol=0.2)


def test_resampling_restores_the_spread() -> None:
    """Resampling keeps the mean and restores the spread."""
    u = {"w": jnp.full((10, 3), 2.0).at[:, 0].add(jnp.arange(10.0))}
    prior = gaussian({"w": jnp.full(3, 100.0)}, 0.5)  # the prior's own mean plays no part
    new = resample_around_mean(KEY, u, prior, particles=4000)["w"]
    assert new.shape == (4000, 3)
    np.testing.assert_allclose(np.mean(new, axis=0), [6.5, 2, 2], atol=0.05)
    np.testing.assert_allclose(np.std(new, axis=0), 0.5, rtol=0.05)
    assert resample_around_mean(KEY, u, prior)["w"].shape == (10, 3)


def test_perturb_adds_scaled_noise() -> None:
    u = jnp.ones((5000, 2))
    noise = np.asarray(perturb(KEY, u, gaussian(jnp.full(2, 50.0), 2.0), scale=0.25)) - 1
    np.testing.assert_allclose(noise.std(axis=0), 0.5, rtol=0.05)
    np.testing.assert_allclose(noise.mean(axis=0), 0, atol=0.03)


def test_perturbed_data_differs_between_particles() -> None:
    noisy = perturb_data(KEY, jnp.array([1.0, 2.0]), 0.1, 3000)
    np.testing.assert_allclose(noisy.mean(axis=0), [1, 2], atol=0.01)
    np.testing.assert_allclose(noisy.std(axis=0), 0.1, rtol=0.06)


def test_numbers_depend_on_the_index_alone() -> None:
    """A particle's numbers depend on its index alone."""
    prior = gaussian({"a": jnp.zeros(3), "b": jnp.zeros((2, 2))}, 1.0)
    few, many = sample_ensemble(KEY, prior, 4), sample_ensemble(KEY, prior, 16)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[:4]), few, many)


@pytest.mark.parametrize("devices", [2, 8])
def test_devices_draw_what_one_device_draws(devices: int, optimized: None) -> None:
    prior = gaussian(jnp.zeros(3), 1.0)
    start = sample_ensemble(KEY, prior, 16)
    mesh = jax.make_mesh((devices,), ("p",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
    spec = PartitionSpec("p")

    def everything(u: Any, axis_name: str | None) -> Any:
        return (
            sample_ensemble(KEY, prior, 16, axis_name=axis_name),
            resample_around_mean(KEY, u, prior, 32, axis_name=axis_name),
            perturb(KEY, u, prior, 0.5, axis_name=axis_name),
        )

    sharded = jax.shard_map(lambda u: everything(u, "p"), mesh=mesh, in_specs=spec, out_specs=spec)
    found, wanted = jax.jit(sharded)(start), everything(start, None)
    np.testing.assert_array_equal(found[0], wanted[0])
    np.testing.assert_allclose(found[1], wanted[1], rtol=1e-6, atol=1e-7)  # its mean is summed in another order
    np.testing.assert_allclose(found[2], wanted[2], rtol=1e-6, atol=1e-7)


def test_predictions() -> None:
    u = {"w": jnp.array([[0.0], [1.0], [5.0]])}
    assert float(mean_particle(u)["w"][0]) == 2.0
    assert float(best_particle(u, jnp.array([3.0, jnp.nan, 2.0]))["w"][0]) == 5.0
    squares = ensemble_outputs(lambda p, x: (p["w"] * x) ** 2, u, 2.0)
    np.testing.assert_allclose(squares, [4 * (0 + 1 + 25) / 3], rtol=1e-6)


def test_predictions_on_devices() -> None:
    u, losses = jnp.arange(8.0).reshape(8, 1) ** 2, jnp.array([5.0, 4.0, 3.0, 0.5, 2.0, 1.0, 9.0, 7.0])
    mesh = jax.make_mesh((4,), ("p",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    p = PartitionSpec("p")

    def predict(u: Any, losses: Any) -> Any:
        outputs = ensemble_outputs(lambda v, x: v * x, u, 2.0, axis_name="p")
        return mean_particle(u, axis_name="p"), best_particle(u, losses, axis_name="p"), outputs

    predict = jax.jit(jax.shard_map(predict, mesh=mesh, in_specs=p, out_specs=PartitionSpec()))
    mean, best, outputs = predict(u, losses)
    assert (float(mean[0]), float(best[0]), float(outputs[0])) == (17.5, 9.0, 35.0)


@pytest.mark.parametrize(
    ("error", "words", "call"),
    [
        (
            ValueError,
            "particles: 1; wanted a whole number, at least 2",
            lambda: sample_ensemble(KEY, gaussian(jnp.zeros(2), 1.0), 1),
        ),
        (
            ValueError,
            "particles: 0",
            lambda: resample_around_mean(KEY, jnp.ones((3, 2)), gaussian(jnp.zeros(2), 1.0), 0),
        ),
        (ValueError, r"scale\['a'\]: shape \(3,\)", lambda: gaussian({"a": jnp.zeros(2)}, {"a": jnp.ones(3)})),
        (ValueError, "scale: its structure", lambda: gaussian({"a": jnp.zeros(2)}, {"b": jnp.ones(2)})),
        (TypeError, "targets: dtype int32", lambda: perturb_data(KEY, jnp.array([0, 1]), 0.1, 4)),
        (ValueError, "mean: has no arrays", lambda: gaussian({}, 1.0)),
        (TypeError, "scale: 'wide'; wanted numbers", lambda: gaussian(jnp.zeros(2), "wide")),
        (TypeError, r"scale\['a'\]: .*wanted standard dev", lambda: gaussian({"a": jnp.zeros(2)}, {"a": {"b": 1.0}})),
        (ValueError, r"draws .*\(3,\)", lambda: gaussian(jnp.zeros(2), factor=lambda key: jnp.zeros(3))),
        (TypeError, r"template\['a'\]: 1.0; wanted an array", lambda: xavier({"a": 1.0})),
        (TypeError, "template.*int32", lambda: xavier({"n": jnp.zeros(2, jnp.int32)})),
        (ValueError, "template: has no arrays", lambda: xavier({})),
        (ValueError, r"losses: shape \(2,\).*3 particles", lambda: best_particle(jnp.ones((3, 1)), jnp.ones(2))),
    ],
)
def test_bad_input_is_named(error: type[Exception], words: str, call: Any) -> None:
    with pytest.raises(error, match=words):
        call()


def test_indivisible_particles_name_the_nearest() -> None:
    """Numbers of particles that do not divide among the devices are refused, and the nearest named."""
    mesh = jax.make_mesh((8,), ("p",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec("p")
    draw = jax.shard_map(
        lambda: sample_ensemble(KEY, gaussian(jnp.zeros(2), 1.0), 30, axis_name="p"),
        mesh=mesh,
        in_specs=(),
        out_specs=spec,
    )
    with pytest.raises(ValueError, match="30 on 8 devices; wanted a multiple of 8, such as 32"):
        draw()


def test_chunked_draws_equal_one_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    from eki_jax.ensembles import drawing

    prior = gaussian({"w": jnp.zeros((7, 3))}, 1.0)
    whole = sample_ensemble(KEY, prior, 10)
    monkeypatch.setattr(drawing, "_DRAW_BYTES", 3 * math.prod((7, 3)) * 4)
    jax.tree.map(np.testing.assert_array_equal, sample_ensemble(KEY, prior, 10), whole)
