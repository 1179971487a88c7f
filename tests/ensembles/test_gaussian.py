"""The Gaussian prior takes what a person has, each under its own name."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eki_jax import gaussian, sample_ensemble

KEY = jax.random.key(0)
ROOT = np.array([[2.0, 0.0], [1.0, 0.5]])


def moments(prior: Any) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of many draws of a one-leaf prior, of the flattened leaf."""
    draws = np.asarray(sample_ensemble(KEY, prior, 4000)).reshape(4000, -1)
    return draws.mean(axis=0), np.cov(draws.T)


@pytest.mark.parametrize(
    ("covariance", "wanted"),
    [
        pytest.param(4.0, 4 * np.eye(2), id="number"),
        pytest.param(jnp.array([1.0, 9.0]), np.diag([1.0, 9.0]), id="variances"),
        pytest.param(ROOT @ ROOT.T, ROOT @ ROOT.T, id="matrix"),
        pytest.param([[1.0, 2.0], [2.0, 4.0]], [[1, 2], [2, 4]], id="singular"),
    ],
)
def test_covariance_is_that_of_the_draws(covariance: Any, wanted: Any) -> None:
    """A number is a variance, an array of the leaf's shape are variances, a matrix is the covariance itself."""
    mean, found = moments(gaussian(jnp.array([5.0, -5.0]), covariance=covariance))
    np.testing.assert_allclose(mean, [5, -5], atol=0.2)
    np.testing.assert_allclose(found, wanted, atol=0.4)


@pytest.mark.parametrize("compiled", [False, True])
def test_the_matrix_is_factored_once(x64: None, compiled: bool) -> None:
    """F F^T is the covariance to rounding, compiled or not, and F is stored, not the covariance."""
    covariance = np.random.default_rng(0).standard_normal((6, 9))
    covariance = covariance @ covariance.T
    factor = lambda matrix: gaussian(jnp.zeros((2, 3)), covariance=matrix).factor
    found = (jax.jit(factor) if compiled else factor)(covariance)
    assert found.shape == (6, 6)
    np.testing.assert_allclose(found @ found.T, covariance, rtol=1e-12, atol=1e-12)


def test_scale_factor_and_covariance_agree() -> None:
    """Standard deviations, the diagonal factor and variances are one prior with the same draws."""
    mean, deviations = jnp.array([1.0, 2.0]), jnp.array([0.5, 3.0])
    draws = gaussian(mean, deviations).sample(KEY)
    for same in (gaussian(mean, factor=deviations), gaussian(mean, covariance=deviations**2)):
        np.testing.assert_allclose(same.sample(KEY), draws, rtol=1e-6)
    np.testing.assert_array_equal(gaussian(mean, scale=deviations).sample(KEY), draws)


@pytest.mark.parametrize("name", ["scale", "factor", "covariance"])
def test_one_value_serves_all_leaves(name: str) -> None:
    prior = gaussian({"w": jnp.zeros((2, 2)), "b": jnp.zeros(())}, **{name: 4.0})
    wanted = 2.0 if name == "covariance" else 4.0
    assert jax.tree.map(float, prior.factor) == {"w": wanted, "b": wanted}


@pytest.mark.parametrize("shape", [(2, 2), (3, 1), (1, 1)])
def test_leaf_shaped_arrays_go_by_entry(shape: tuple[int, int]) -> None:
    """An array of the leaf's shape are standard deviations or variances of its entries, though it is a matrix."""
    values = jnp.arange(1.0, 1 + np.prod(shape)).reshape(shape)
    noise = gaussian(jnp.zeros(shape), 1.0).noise(KEY)
    np.testing.assert_allclose(gaussian(jnp.zeros(shape), values).noise(KEY), values * noise, rtol=1e-6)
    found = gaussian(jnp.zeros(shape), covariance=values).noise(KEY)
    np.testing.assert_allclose(found, jnp.sqrt(values) * noise, rtol=1e-6)


def test_rank_one_covariance_of_a_column() -> None:
    """A covariance of rank one for a leaf (n, 1) is not taken for standard deviations of its entries."""
    noise = gaussian(jnp.zeros((3, 1)), covariance=np.ones((3, 3))).noise(KEY)
    np.testing.assert_allclose(noise, jnp.broadcast_to(noise[0], (3, 1)), atol=1e-6)
    assert float(jnp.abs(noise).max()) > 1e-3


@pytest.mark.parametrize("matrix", [ROOT, np.ones((2, 1)), np.ones((2, 5))])
def test_positional_matrices_are_refused(matrix: np.ndarray) -> None:
    """The error names both arguments of which the matrix may be one, and the leaf."""
    with pytest.raises(ValueError, match=r"scale\['w'\]: shape .*factor= of shape \(2, rank\), or covariance= of"):
        gaussian({"w": jnp.zeros(2)}, {"w": matrix})


@pytest.mark.parametrize(
    ("error", "words", "arguments"),
    [
        (TypeError, "scale, factor, covariance: none given; wanted one", {}),
        (TypeError, "scale and covariance given; wanted one", {"scale": 1.0, "covariance": 1.0}),
        (TypeError, "scale: a function; wanted standard deviations, or the function as factor=", {"scale": jnp.ones}),
        (TypeError, "covariance: a function; wanted numbers", {"covariance": jnp.ones}),
        (ValueError, r"factor: shape \(3, 2\) for a leaf of shape \(2,\)", {"factor": np.ones((3, 2))}),
        (ValueError, r"covariance: shape \(2, 3\).*a \(2, 2\) matrix", {"covariance": np.ones((2, 3))}),
        (ValueError, "covariance: -1 is the least variance", {"covariance": -1.0}),
        (ValueError, "covariance: -1 is the least variance", {"covariance": jnp.array([2.0, -1.0])}),
        (ValueError, "covariance: has values that are not finite", {"covariance": np.full((2, 2), np.nan)}),
        (ValueError, "covariance: a matrix that is not symmetric", {"covariance": ROOT}),
        (ValueError, "covariance: -1 is the least eigenvalue", {"covariance": np.array([[0.0, 1.0], [1.0, 0.0]])}),
    ],
)
def test_bad_noise_is_named(error: type[Exception], words: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(error, match=words):
        gaussian(jnp.zeros(2), **arguments)


def test_rounding_is_no_fault() -> None:
    """A singular covariance computed in single precision passes, though its eigenvalues are not quite >= 0."""
    wide = jnp.asarray(np.random.default_rng(1).standard_normal((30, 4)), jnp.float32)
    covariance = wide @ wide.T
    found = gaussian(jnp.zeros(30), covariance=covariance).factor
    np.testing.assert_allclose(found @ found.T, covariance, atol=1e-4)
