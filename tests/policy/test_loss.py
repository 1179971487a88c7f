"""The policy's loss, and that a natural step on it is the natural policy gradient."""

from __future__ import annotations

from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

from eki_jax import natural, policy
from eki_jax.losses.curvature import curvature

STATES, FEATURES, ACTIONS = 12, 3, 4
X = jax.random.normal(jax.random.key(0), (STATES, FEATURES))
ADVANTAGES = jax.random.normal(jax.random.key(1), (STATES,))


def linear(params: Any, x: Any) -> Any:
    return x @ params["w"] + params["b"]


def gaussian(params: Any, x: Any) -> Any:
    mean = x @ params["w"] + params["b"]
    return mean, jnp.broadcast_to(params["log_scale"], mean.shape)


def case(name: str) -> tuple[Any, Any, Any, Any]:
    """A policy that is linear in its parameters, its distribution, parameters and what it visited."""
    w, b = 0.5 * jax.random.normal(jax.random.key(2), (FEATURES, ACTIONS)), jnp.zeros(ACTIONS)
    forward, distribution, params = linear, policy.categorical(), {"w": w, "b": b}
    if name == "normal":
        forward, distribution, params = gaussian, policy.normal(), params | {"log_scale": jnp.full(ACTIONS, -0.3)}

    @jax.jit
    def act(params: Any) -> policy.Visited:
        outputs = forward(params, X)
        actions = distribution.sample(jax.random.key(3), outputs)
        return policy.Visited(actions, ADVANTAGES, distribution.log_prob(outputs, actions))

    return forward, distribution, params, act(params)


def exact_step(forward: Any, distribution: Any, params: Any, visited: Any, precision: Any) -> np.ndarray:
    """(F + precision)^-1 g with scores and Fisher matrix of the parameters, by differentiating the policy."""
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    log_probs = lambda u: distribution.log_prob(forward(unravel(u), X), visited.actions)
    score = lambda u: -jnp.mean(jax.jacobian(log_probs)(u) * visited.advantages[:, None], axis=0)
    divergence = lambda u: jnp.mean(distribution.divergence(forward(unravel(flat), X), forward(unravel(u), X)))
    g, fisher = jax.jit(lambda u: (score(u), jax.hessian(divergence)(u)))(flat)
    return np.linalg.solve(np.asarray(fisher, np.float64) + precision, np.asarray(g, np.float64))


@pytest.mark.parametrize("name", ["categorical", "normal"])
def test_a_step_is_the_natural_policy_gradient(name: str) -> None:
    """With more particles than parameters the ensemble's step is the exact one, which differentiates the policy.

    Damping is that of the particles' covariance C: the step is ``(F + lambda C^-1)^-1 g``.
    """
    forward, distribution, params, visited = case(name)
    damping = 1e-4
    solver = natural.natural_gradient(
        forward,
        policy.policy_loss(distribution),
        60,
        0.05,
        damping,
        natural.full_rank(),
        antithetic=True,
        loss_limit=None,
    )
    state = jax.jit(solver.init)(params, jax.random.key(4))
    flat = jax.jit(lambda tree: jax.flatten_util.ravel_pytree(tree)[0])
    particles = jax.jit(jax.vmap(flat))(solver.ensemble(state))
    after, _ = solver.step(state, (X, visited))
    found = flat(params) - flat(after.position)
    covariance = np.cov(np.asarray(particles, np.float64).T)
    wanted = exact_step(forward, distribution, params, visited, damping * np.linalg.inv(covariance))
    np.testing.assert_allclose(found, wanted, atol=2e-3 * np.abs(wanted).max())
    gradient = flat(jax.jit(jax.grad(lambda p: policy.policy_loss(distribution)(forward(p, X), visited)))(params))
    cosine = gradient @ wanted / np.linalg.norm(gradient) / np.linalg.norm(wanted)
    assert cosine < 0.98  # so the test can tell the natural direction from the gradient


def test_the_trust_region_holds() -> None:
    """The divergence of the policies before and after a step is half of the constraint, to second order."""
    forward, distribution, params, visited = case("categorical")
    limit = 1e-3
    solver = natural.natural_gradient(
        forward, policy.policy_loss(distribution), 400, 0.05, 1e-8, natural.full_rank(), norm_constraint=2 * limit
    )
    state, info = solver.step(jax.jit(solver.init)(params, jax.random.key(5)), (X, visited))
    assert bool(info.moved)
    moved = distribution.divergence(forward(params, X), forward(state.position, X))
    np.testing.assert_allclose(jnp.mean(moved), limit, rtol=0.15)


def test_a_divergent_step_is_shortened() -> None:
    """Where the second-order model allows too much, as for a scale that shrinks, the loss itself sets the limit."""
    forward = lambda params, x: (jnp.zeros((len(x), 1)), jnp.broadcast_to(params["log_scale"], (len(x), 1)))
    params, distribution = {"log_scale": jnp.zeros(1)}, policy.normal()
    outputs, actions = forward(params, X), jnp.zeros((STATES, 1))
    visited = policy.Visited(actions, jnp.full(STATES, 10.0), distribution.log_prob(outputs, actions), outputs)
    moved = {}
    for limit in (None, 1.5):
        loss = policy.policy_loss(distribution, divergence=limit)
        solver = natural.natural_gradient(forward, loss, 20, 0.05, 1e-8, natural.full_rank(), norm_constraint=2.0)
        state, info = solver.step(jax.jit(solver.init)(params, jax.random.key(5)), (X, visited))
        assert bool(info.moved)
        moved[limit] = float(jnp.mean(distribution.divergence(outputs, forward(state.position, X)))), float(info.share)
    assert moved[None][0] > 2
    assert moved[None][1] == 1
    assert 0 < moved[1.5][0] <= 1.5
    assert moved[1.5][1] < 1
    with pytest.raises(ValueError, match=r"targets.outputs: None; wanted the outputs of the policy that acted"):
        policy.policy_loss(distribution, divergence=1.5)(outputs, visited._replace(outputs=None))


@pytest.mark.parametrize("name", ["categorical", "normal"])
def test_curvature_is_fishers(name: str) -> None:
    """The gradient is minus advantages times scores, and the matrix is Fisher's, whatever the advantages' signs."""
    forward, distribution, params, visited = case(name)
    outputs, loss = forward(params, X), policy.policy_loss(distribution)

    @jax.jit
    def compared(outputs: Any) -> Any:
        model = curvature(loss, outputs, visited)
        root = model.times_factor(jnp.eye(model.gradient.size))
        score = jax.grad(lambda z: jnp.mean(distribution.log_prob(z, visited.actions) * ADVANTAGES))(outputs)
        exact = distribution.fisher(outputs).times(jnp.eye(model.gradient.size))
        gradients = model.gradient, -jax.flatten_util.ravel_pytree(score)[0], root @ model.coordinates + model.remainder
        return gradients, (root @ root.T, exact @ exact.T / STATES)

    (found, wanted, of_factor), (matrix, fisher) = compared(outputs)
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    np.testing.assert_allclose(of_factor, found, atol=1e-6)
    np.testing.assert_allclose(matrix, fisher, atol=1e-6)


def test_a_certain_policy_keeps_its_gradient() -> None:
    """An action that the policy thought impossible has a gradient all the same, in the remainder."""
    outputs = jnp.array([[40.0, 0.0, 0.0]])
    visited = policy.Visited(jnp.array([1]), jnp.array([2.0]), jax.nn.log_softmax(outputs)[0, 1:2])

    @jax.jit
    def gradient(outputs: Any) -> Any:
        model = curvature(policy.policy_loss(policy.categorical()), outputs, visited)
        return model.times_factor(jnp.eye(3)) @ model.coordinates + model.remainder

    np.testing.assert_allclose(gradient(outputs), [2.0, -2.0, 0.0], atol=1e-5)


def test_clipping_stops_at_the_ratio() -> None:
    """Beyond the clip a better action gains nothing more, and a worse one still loses."""
    loss = policy.policy_loss(policy.categorical(), clip=0.2)
    outputs = jnp.array([[2.0, 0.0], [2.0, 0.0]])
    visited = policy.Visited(jnp.array([0, 0]), jnp.array([1.0, -1.0]), jnp.log(jnp.array([0.5, 0.5])))
    share = 1 / (1 + np.exp(-2.0))
    np.testing.assert_allclose(jax.jit(loss.per_sample)(outputs, visited), [-1.2, share / 0.5], rtol=1e-5)
    gradient = jax.jit(jax.grad(loss))(outputs, visited)
    assert float(jnp.abs(gradient[0]).max()) == 0
    assert float(jnp.abs(gradient[1]).max()) > 0


def test_entropy_pulls_to_the_middle() -> None:
    """With an entropy bonus alone a step makes the policy less certain."""
    forward, distribution, params, visited = case("categorical")
    params = jax.tree.map(lambda leaf: 4 * leaf, params)
    loss = policy.policy_loss(distribution, entropy=1.0)
    visited = visited._replace(advantages=jnp.zeros(STATES))
    solver = natural.natural_gradient(forward, loss, 100, 0.05, 1e-6, natural.full_rank(), norm_constraint=0.1)
    state, _ = solver.step(jax.jit(solver.init)(params, jax.random.key(6)), (X, visited))
    entropy = lambda p: float(jnp.mean(distribution.entropy(forward(p, X))))
    assert entropy(state.position) > entropy(params) + 0.05


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: policy.policy_loss(None), TypeError, "distribution: None, which has no sample"),
        (lambda: policy.policy_loss(policy.categorical), TypeError, "distribution: "),
        (lambda: policy.policy_loss(policy.categorical(), clip=0), ValueError, "clip: 0; wanted a number in"),
        (lambda: policy.policy_loss(policy.categorical(), entropy=-1.0), ValueError, "entropy: -1.0"),
        (
            lambda: policy.policy_loss(policy.categorical())(
                jnp.zeros((2, 3)), policy.Visited(jnp.zeros(2, int), jnp.zeros(3), jnp.zeros(2))
            ),
            ValueError,
            r"targets.advantages: shape \(3,\); wanted \(2,\)",
        ),
    ],
)
def test_what_a_loss_refuses(call: Any, error: Any, words: str) -> None:
    """Settings out of range and targets that do not fit are errors that name them."""
    with pytest.raises(error, match=words):
        call()
