"""What outputs say about actions: probabilities, entropies, divergences, Fisher matrices, by their definitions."""

from __future__ import annotations

from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from eki_jax import policy

LOGITS = jax.random.normal(jax.random.key(0), (3, 4))
MOMENTS = jax.random.normal(jax.random.key(1), (3, 2)), 0.5 * jax.random.normal(jax.random.key(2), (3, 2))
CASES: dict[str, tuple[Any, Any]] = {
    "categorical": (policy.categorical(), LOGITS),
    "normal": (policy.normal(), MOMENTS),
}


@pytest.mark.parametrize("name", CASES)
def test_fisher_is_the_divergences_hessian(name: str) -> None:
    """The factor's square is the second derivative of the divergence from the outputs, at the outputs."""
    distribution, outputs = CASES[name]
    flat, unravel = jax.flatten_util.ravel_pytree(outputs)
    wanted = jax.hessian(lambda z: jnp.sum(distribution.divergence(outputs, unravel(z))))(flat)
    factor = distribution.fisher(outputs).times(jnp.eye(flat.size))
    np.testing.assert_allclose(factor @ factor.T, wanted, atol=2e-5)


@pytest.mark.parametrize("name", CASES)
def test_fisher_solves_for_scores(name: str) -> None:
    """S gamma is the score for every action: it lies in the range of the factor."""
    distribution, outputs = CASES[name]
    actions = distribution.sample(jax.random.key(3), outputs)
    score = jax.grad(lambda z: jnp.sum(distribution.log_prob(z, actions)))(outputs)
    score = jax.flatten_util.ravel_pytree(score)[0]
    factor = distribution.fisher(outputs)
    gamma = factor.solve(score)
    rows = factor.times(jnp.eye(score.size))
    np.testing.assert_allclose(rows @ gamma, score, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_moments_of_many_draws(name: str) -> None:
    """The mean of minus the log-probability of many draws is the entropy, and of log-ratios the divergence."""
    distribution, outputs = CASES[name]
    others = jax.tree.map(lambda leaf: leaf[::-1], outputs)
    keys = jax.random.split(jax.random.key(4), 20_000)
    draws = jax.vmap(lambda key: distribution.sample(key, outputs))(keys)
    logs = jax.vmap(lambda actions: distribution.log_prob(outputs, actions))(draws)
    other = jax.vmap(lambda actions: distribution.log_prob(others, actions))(draws)
    np.testing.assert_allclose(-logs.mean(0), distribution.entropy(outputs), atol=0.03)
    np.testing.assert_allclose((logs - other).mean(0), distribution.divergence(outputs, others), rtol=0.05, atol=0.03)


def test_densities_are_scipys() -> None:
    """Log-probabilities and likeliest actions are those of the textbook."""
    mean, log_scale = MOMENTS
    actions = mean + 0.3
    wanted = scipy.stats.norm.logpdf(actions, mean, np.exp(log_scale)).sum(axis=1)
    np.testing.assert_allclose(policy.normal().log_prob(MOMENTS, actions), wanted, rtol=1e-5)
    np.testing.assert_array_equal(policy.normal().mode(MOMENTS), mean)
    np.testing.assert_array_equal(policy.categorical().mode(LOGITS), np.argmax(LOGITS, axis=1))
    taken = policy.categorical().log_prob(LOGITS, jnp.array([0, 3, 1]))
    np.testing.assert_allclose(jnp.exp(taken), jax.nn.softmax(LOGITS)[np.arange(3), [0, 3, 1]], rtol=1e-5)


def test_several_choices_a_sample() -> None:
    """With an axis more each sample makes independent choices, whose logarithms add up."""
    outputs = jax.random.normal(jax.random.key(5), (3, 2, 4))
    distribution = policy.categorical()
    actions = distribution.sample(jax.random.key(6), outputs)
    assert actions.shape == (3, 2)
    each = [distribution.log_prob(outputs[:, i], actions[:, i]) for i in range(2)]
    np.testing.assert_allclose(distribution.log_prob(outputs, actions), sum(each), rtol=1e-5)
    rows = distribution.fisher(outputs).times(jnp.eye(outputs.size))
    blocks = (rows @ rows.T).reshape(6, 4, 6, 4)
    assert float(jnp.abs(blocks[0, :, 1]).max()) == 0


def test_an_action_without_probability() -> None:
    """Logits of minus infinity count nothing in entropy and divergence; an action that there is not is NaN."""
    outputs = jnp.array([[0.0, 0.0, -jnp.inf]])
    distribution = policy.categorical()
    np.testing.assert_allclose(distribution.entropy(outputs), np.log(2), rtol=1e-6)
    np.testing.assert_allclose(distribution.divergence(outputs, outputs), 0, atol=1e-6)
    assert np.isnan(distribution.log_prob(outputs, jnp.array([3]))).all()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: policy.categorical().log_prob(LOGITS, jnp.zeros(3)), "actions: .*float32; wanted integers"),
        (lambda: policy.categorical().log_prob(LOGITS, jnp.zeros(2, int)), r"actions: shape \(2,\)"),
        (lambda: policy.categorical().mode(jnp.zeros(3)), r"outputs: .*wanted logits of shape \(B"),
        (lambda: policy.normal().mode(jnp.zeros((3, 2))), "outputs: .*wanted a pair"),
        (lambda: policy.normal().mode((jnp.zeros((3, 2)), jnp.zeros(2))), "outputs: .*of one shape"),
        (lambda: policy.normal().log_prob(MOMENTS, jnp.zeros(3)), r"actions: shape \(3,\); wanted that of the means"),
    ],
)
def test_what_does_not_fit_is_named(call: Any, words: str) -> None:
    """Outputs and actions of other shapes are errors that name them."""
    with pytest.raises(ValueError, match=words):
        call()
