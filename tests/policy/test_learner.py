"""Learners: what they collect, that they learn, that they say what they refuse, and that runs go on."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from policy.lines import LENGTH, LINE, forward, value

import eki_jax
from eki_jax import natural, policy

CHOICES = policy.categorical()
ZERO, CRITIC = jnp.zeros((2, 2)), jnp.zeros(3)


@functools.cache
def trust_region(**settings: Any) -> Any:
    return policy.natural_policy_gradient(LINE, forward, CHOICES, value, particles=16, copies=16, steps=32, **settings)


@functools.cache
def clipped() -> Any:
    return policy.clipped_policy_gradient(
        LINE, forward, CHOICES, value, optax.adam(0.05), copies=16, steps=32, batches=4
    )


@functools.cache
def plain() -> Any:
    return policy.natural_policy_gradient(LINE, forward, CHOICES, particles=16, copies=16, steps=32)


LEARNERS = {"trust region": trust_region, "clipped": clipped, "no critic": plain}


def run(agent: Any, iterations: int, key: int = 0) -> Any:
    critic = None if agent is plain() else CRITIC
    state = agent.init(ZERO, critic, jax.random.key(key))
    return jax.jit(lambda state: jax.lax.scan(lambda s, _: agent.step(s), state, length=iterations))(state)


@pytest.mark.parametrize("name", LEARNERS)
def test_a_learner_finds_the_best_policy(name: str) -> None:
    """After some iterations the point is pushed to where it is to be, nearly as well as can be."""
    agent = LEARNERS[name]()
    state, info = run(agent, 20)
    greedy = policy.evaluate(LINE, forward, CHOICES, agent.estimate(state), jax.random.key(1), 200)
    best = policy.play(LINE, lambda x, _: jnp.asarray(x[:, 0] < 0, int), jax.random.split(jax.random.key(1), 200))[0]
    start = policy.evaluate(LINE, forward, CHOICES, ZERO, jax.random.key(1), 200, greedy=False)
    lost = float((best.returns.mean() - greedy.returns.mean()) / (best.returns.mean() - start.returns.mean()))
    assert lost < 0.1
    assert bool(info.moved.all())
    assert int(state.episodes) == int(info.episodes.sum()) > 0
    if name == "no critic":
        assert np.isnan(info.explained).all()
    else:
        assert float(info.explained[-1]) > 0.1


def test_the_trust_region_bounds_the_policy() -> None:
    """No step moves the policy further than one and a half times the divergence that is allowed."""
    for divergence in (0.003, 0.03):
        _, info = run(trust_region(divergence=divergence), 10)
        assert float(info.divergence.max()) <= 1.5 * divergence * (1 + 1e-3)
        assert float(info.divergence.max()) > 0.1 * divergence


def test_a_learner_limits_what_it_measures() -> None:
    """A scale that shrinks moves further than the second-order model says; the learner's own limit holds."""

    def answer(key: Any, state: Any, action: Any) -> policy.Step:
        return policy.Step(state, jnp.zeros(1), -jnp.sum(action**2), jnp.array(True), jnp.array(False), jnp.zeros(1))

    once = policy.Environment("once", lambda key: (jnp.zeros(()), jnp.zeros(1)), answer, (1,), None, (1,), 1)
    forward = lambda params, x: (jnp.zeros((len(x), 1)), jnp.broadcast_to(params["log_scale"], (len(x), 1)))
    settings = {"particles": 20, "deviations": natural.full_rank(), "damping": 1e-8, "copies": 64, "steps": 16}
    agent = policy.natural_policy_gradient(once, forward, policy.normal(), divergence=0.42, **settings)
    state, info = jax.jit(agent.step)(agent.init({"log_scale": jnp.zeros(1)}, None, jax.random.key(0)))
    assert bool(info.moved)
    assert 0 < float(info.divergence) <= 1.5 * 0.42
    assert float(state.actor.position["log_scale"][0]) < 0


def test_what_is_collected_fits_together() -> None:
    """Rows follow each other: the next observation is the one acted on, unless an episode ended in between."""
    running = policy.start(LINE, jax.random.key(0), 5)
    path, after = policy.collect(LINE, forward, CHOICES, ZERO, running, jax.random.key(1), 30)
    assert path.rewards.shape == (30, 5)
    goes_on = ~np.asarray(path.ended[:-1])
    assert 0 < goes_on.sum() < goes_on.size
    following, acted = np.asarray(path.next_observations[:-1]), np.asarray(path.observations[1:])
    np.testing.assert_array_equal(following[goes_on], acted[goes_on])
    assert (following[~goes_on] != acted[~goes_on]).any(axis=-1).all()
    np.testing.assert_allclose(path.rewards, -np.abs(path.next_observations[..., 0]))
    np.testing.assert_array_equal(path.log_probs, np.full((30, 5), np.log(0.5), np.float32))
    assert not np.asarray(path.terminated & (path.lengths == LENGTH) & (np.abs(path.rewards) <= 2)).any()
    sums, lengths = np.zeros(5), np.zeros(5, int)
    for t in range(30):
        sums, lengths = sums + path.rewards[t], lengths + 1
        np.testing.assert_allclose(path.returns[t], sums, rtol=1e-5)
        np.testing.assert_array_equal(path.lengths[t], lengths)
        sums, lengths = np.where(path.ended[t], 0, sums), np.where(path.ended[t], 0, lengths)
    np.testing.assert_allclose(after.returns, sums, rtol=1e-5)


def test_runs_go_on_where_they_were() -> None:
    """Ten iterations are five and five, bit for bit: everything random is in the state."""
    agent = trust_region()
    once, _ = run(agent, 4)
    half, _ = run(agent, 2)
    step = jax.jit(lambda state: jax.lax.scan(lambda s, _: agent.step(s), state, length=2))
    twice, _ = step(jax.tree.map(jnp.asarray, jax.tree.map(np.asarray, half)))
    jax.tree.map(np.testing.assert_array_equal, once, twice)


def test_seeds_are_mapped() -> None:
    """Several seeds at once are as good as one after another."""
    agent = plain()
    keys = jax.random.split(jax.random.key(2), 2)
    both = jax.vmap(lambda key: agent.init(ZERO, None, key))(keys)
    together, _ = jax.jit(jax.vmap(agent.step))(both)
    alone, _ = jax.jit(agent.step)(agent.init(ZERO, None, keys[1]))
    np.testing.assert_allclose(together.actor.position[1], alone.actor.position, atol=1e-4)
    assert jnp.max(jnp.abs(together.actor.position[0] - alone.actor.position)) > 1e-3


def test_refused_steps_are_counted() -> None:
    """A critic that is not finite spoils the advantages; the policy stays, and the reason is there."""
    agent = trust_region()
    state = agent.init(ZERO, jnp.full(3, jnp.nan), jax.random.key(0))
    after, info = jax.jit(agent.step)(state)
    assert (bool(info.moved), int(info.refused), int(info.critic_refused)) == (False, 1, 5)
    assert eki_jax.Reason(int(info.reason)) == eki_jax.Reason.TARGETS
    assert eki_jax.Reason(int(info.critic_reason)) != 0
    np.testing.assert_array_equal(after.actor.position, ZERO)
    np.testing.assert_array_equal(after.scale, state.scale)  # another critic would go on from there


def test_a_whole_episode_is_played_once() -> None:
    """What follows an episode's end does not count, and its rewards by time add up to its return."""
    keys = jax.random.split(jax.random.key(3), 20)
    push = lambda x, key: jnp.ones(len(x), int)
    episodes, rewards = policy.play(LINE, push, keys, parts=4)
    assert rewards.shape == (20, 4)
    np.testing.assert_allclose(rewards.sum(axis=1), episodes.returns, rtol=1e-6)
    places = jax.vmap(lambda key: reset_place(key))(keys)
    wanted = []
    for place in np.asarray(places):
        total, count = 0.0, 0
        while count < LENGTH:
            place, count = place + 0.25, count + 1
            total -= abs(place)
            if abs(place) > 2:
                break
        wanted.append((total, count))
    np.testing.assert_allclose(episodes.returns, [total for total, _ in wanted], rtol=1e-5)
    np.testing.assert_array_equal(episodes.lengths, [count for _, count in wanted])
    assert int(episodes.lengths.min()) < LENGTH


def reset_place(key: Any) -> Any:
    return LINE.reset(key)[1][0]


def test_playing_ends_with_the_last_episode() -> None:
    """A limit that no episode comes near costs nothing; one that is no multiple of a block is kept to."""
    keys = jax.random.split(jax.random.key(3), 20)
    push = lambda x, key: jnp.ones(len(x), int)
    endless = LINE._replace(most_steps=10**8)  # hours, if all of them were taken
    np.testing.assert_array_equal(policy.play(endless, push, keys)[0], policy.play(LINE, push, keys)[0])
    many = jax.vmap(lambda limit: policy.play(endless, lambda x, _: jnp.asarray(x[:, 0] < limit, int), keys)[0])
    assert int(many(jnp.array([-9.0, 0.0, 9.0])).lengths.max()) == LENGTH
    never = jnp.array(False)
    goes_on = lambda key, state, action: LINE.step(key, state, action)._replace(terminated=never, truncated=never)
    for limit in (1, 16, 37):
        episodes, rewards = policy.play(endless._replace(step=goes_on), push, keys, limit, parts=3)
        np.testing.assert_array_equal(episodes.lengths, limit)
        np.testing.assert_allclose(rewards.sum(axis=1), episodes.returns, rtol=1e-6)


def test_violations_are_summed_until_the_end() -> None:
    """How far limits were exceeded stands behind the rewards, the last place included and nothing that follows."""
    keys, push = jax.random.split(jax.random.key(3), 20), lambda x, key: jnp.ones(len(x), int)
    beyond = lambda x: jnp.stack([jnp.maximum(x[:, 0] - 1, 0), jnp.maximum(-x[:, 0] - 0.5, 0)], axis=1)
    _, rewards = policy.play(LINE, push, keys, parts=2, violations=beyond)
    _, plain = policy.play(LINE, push, keys, parts=2)
    np.testing.assert_array_equal(rewards[:, :2], plain)
    wanted = []
    for place in np.asarray(jax.vmap(reset_place)(keys)):
        path = place + 0.25 * np.arange(1, LENGTH + 1)
        path = path[: 1 + np.argmax(path > 2)] if (path > 2).any() else path
        wanted.append([np.maximum(path - 1, 0).sum(), np.maximum(-path - 0.5, 0).sum()])
    np.testing.assert_allclose(rewards[:, 2:], wanted, rtol=1e-4, atol=1e-5)
    assert (np.array(wanted) > 0).any(axis=0).all()
    model = policy.episodes(LINE, forward, CHOICES, parts=2, violations=beyond)
    assert model(ZERO, keys).shape == (20, 4)
    with pytest.raises(ValueError, match=r"violations: gives shape \(20,\) for 20 episodes; wanted \(20, C\)"):
        policy.play(LINE, push, keys, violations=lambda x: x[:, 0])


def test_episodes_are_a_model_for_any_solver() -> None:
    """Ensemble Kalman inversion improves the return with nothing but rewards by time."""
    model = policy.episodes(LINE, forward, CHOICES, parts=4)
    solver = eki_jax.euler(model, eki_jax.squared_error())
    prior = eki_jax.gaussian(ZERO, 1.0)
    state = solver.init(eki_jax.sample_ensemble(jax.random.key(4), prior, 50))
    keys = jax.random.split(jax.random.key(5), 16)
    step = jax.jit(solver.step)
    first = None
    for _ in range(10):
        state, info = step(state, (keys, jnp.zeros((16, 4))))
        first = info.loss if first is None else first
    assert bool(info.moved)
    assert float(info.loss) < 0.7 * float(first)


def test_any_solver_may_act() -> None:
    """A learner takes what has init, step and estimate; here a localized natural gradient."""
    loss = policy.policy_loss(CHOICES)
    solver = natural.natural_gradient(
        forward, loss, 16, 0.1, 1e-4, estimate=natural.localized(), norm_constraint=0.02, loss_limit=None
    )
    agent = policy.learner(LINE, CHOICES, policy.Part(forward, solver, epochs=2, batches=2), copies=8, steps=16)
    state, info = jax.jit(agent.step)(agent.init(ZERO, None, jax.random.key(0)))
    assert bool(info.moved)
    assert float(jnp.abs(state.actor.position).max()) > 0


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: policy.learner(None, CHOICES, None), TypeError, "environment: None; wanted an Environment"),
        (lambda: policy.learner(LINE, 3, None), TypeError, "distribution: 3"),
        (
            lambda: policy.learner(LINE, CHOICES, policy.Part(forward, None)),
            TypeError,
            "actor.solver: None, which has no init",
        ),
        (
            lambda: policy.learner(LINE, CHOICES, trust_part(batches=7)),
            ValueError,
            "actor.batches: 7; wanted a divisor of the 2048 states",
        ),
        (lambda: plain().init(ZERO, CRITIC, jax.random.key(0)), TypeError, "critic_params: "),
        (lambda: policy.natural_policy_gradient(LINE, forward, CHOICES, divergence=-1), ValueError, "divergence: -1"),
        (
            lambda: policy.clipped_policy_gradient(LINE, forward, CHOICES, value, None),
            TypeError,
            "optimizer: None, which has no init",
        ),
        (
            lambda: policy.clipped_policy_gradient(LINE, forward, CHOICES, value, optax.adam(1.0), batches=5),
            ValueError,
            "batches: 5; wanted a divisor of the 2048 states",
        ),
        (lambda: policy.start(LINE, 3, 5), TypeError, "key: 3"),
        (lambda: policy.play(LINE, None, jax.random.split(jax.random.key(0), 2)), TypeError, "choose: None"),
        (lambda: policy.play(LINE, forward, jax.random.key(0)), TypeError, "keys: "),
        (
            lambda: policy.play(LINE, forward, jax.random.split(jax.random.key(0), 2), violations=1),
            TypeError,
            "violations: 1",
        ),
        (lambda: policy.play(LINE, forward, jnp.zeros(3)), TypeError, "keys: "),
    ],
)
def test_what_learners_refuse(call: Any, error: Any, words: str) -> None:
    """Arguments of another kind are errors that name them."""
    with pytest.raises(error, match=words):
        call()


def trust_part(**settings: Any) -> policy.Part:
    return policy.Part(forward, natural.natural_gradient(forward, policy.policy_loss(CHOICES), 16), **settings)
