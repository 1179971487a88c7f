"""Learning from a stream, one sample at a time."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eki_jax
from eki_jax.flax import TanhRNN, linen_forward
from eki_jax.online import learn_stream, online, predict_stream

UNITS = 3


def network(units=UNITS):
    module = TanhRNN(units=units, layers=1, outputs=1)
    return linen_forward(module, jnp.zeros(units), jnp.zeros(1), method="step")


def stream(length=6):
    values = 0.5 + 0.4 * jnp.sin(0.7 * jnp.arange(length + 1.0))[:, None]
    return values[:-1], values[1:]


def test_a_pass_equals_the_formulas(x64):
    """A pass equals the formulas particle by particle.

    Two loops, of samples and of particles, with the paper's step written out.
    """
    cell, template = network()
    template = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float64), template)
    ensemble = eki_jax.sample_ensemble(jax.random.key(0), eki_jax.xavier(template), 4)
    learner = online(cell, eki_jax.euler(None, eki_jax.squared_error()))
    xs, ys = (values.astype(jnp.float64) for values in stream())
    state, predictions = learn_stream(learner, learner.init(ensemble, jnp.zeros(UNITS)), (xs, ys))

    particles = [jax.tree.map(lambda leaf, j=j: np.asarray(leaf[j]), ensemble) for j in range(4)]
    hidden = [np.zeros(UNITS)] * 4
    for t, (x, y) in enumerate(zip(np.asarray(xs), np.asarray(ys), strict=True)):
        outputs = np.zeros((4, 1))
        for j, u in enumerate(particles):
            layer = u["cell"]["layer_0"]
            drive = x @ layer["input"]["kernel"] + layer["input"]["bias"]
            hidden[j] = np.tanh(hidden[j] @ layer["recurrent"]["kernel"] + layer["recurrent"]["bias"] + drive)
            outputs[j] = hidden[j] @ u["output"]["kernel"] + u["output"]["bias"]
        np.testing.assert_allclose(predictions[t], outputs.mean(0), rtol=1e-10)
        drift = (outputs - y) @ (outputs - outputs.mean(0)).T  # D[j, k]
        h = 1.0 / (np.linalg.norm(drift) + 0.5)
        moved = []
        for j, u in enumerate(particles):
            pull = jax.tree.map(lambda *leaves, j=j: sum(drift[j, k] * leaves[k] for k in range(4)), *particles)
            moved.append(jax.tree.map(lambda leaf, d: leaf - h * d, u, pull))
        particles = moved
    for j in range(4):
        jax.tree.map(
            lambda leaf, expected, j=j: np.testing.assert_allclose(leaf[j], expected, rtol=1e-8, atol=1e-12),
            state.solver.ensemble,
            particles[j],
        )
        np.testing.assert_allclose(state.carry[j], hidden[j], rtol=1e-8)


def test_a_stream_in_two_parts():
    """A stream in two parts equals the whole stream."""
    cell, template = network()
    ensemble = eki_jax.sample_ensemble(jax.random.key(0), eki_jax.xavier(template), 4)
    learner = online(cell, eki_jax.euler(None, eki_jax.squared_error()))
    xs, ys = stream(8)
    run = jax.jit(lambda state, samples: learn_stream(learner, state, samples))
    start = learner.init(ensemble, jnp.zeros(UNITS))
    whole, predictions = run(start, (xs, ys))
    middle, first = run(start, (xs[:4], ys[:4]))
    parts, second = run(middle, (xs[4:], ys[4:]))
    np.testing.assert_allclose(jnp.concatenate([first, second]), predictions, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), parts, whole)


def test_prediction_without_learning():
    """Prediction without learning follows the same recurrence."""
    cell, template = network()
    ensemble = eki_jax.sample_ensemble(jax.random.key(0), eki_jax.xavier(template), 4)
    params = eki_jax.mean_particle(ensemble)
    xs, _ = stream()
    carry, outputs = predict_stream(cell, params, jnp.zeros(UNITS), xs)
    hidden = jnp.zeros(UNITS)
    for t in range(len(xs)):
        hidden, output = cell(params, hidden, xs[t])
        np.testing.assert_allclose(outputs[t], output, rtol=1e-5)
    np.testing.assert_allclose(carry, hidden, rtol=1e-5)


def test_it_learns_to_follow_a_sine():
    cell, template = network(8)
    ensemble = eki_jax.sample_ensemble(jax.random.key(1), eki_jax.xavier(template), 12)
    learner = online(cell, eki_jax.euler(None, eki_jax.squared_error()))
    xs, ys = stream(2000)
    _, predictions = jax.jit(lambda s: learn_stream(learner, s, (xs, ys)))(learner.init(ensemble, jnp.zeros(8)))
    squares = (predictions - ys) ** 2
    persistence = jnp.mean((xs[-500:] - ys[-500:]) ** 2)
    assert jnp.mean(squares[-500:]) < 0.2 * persistence
    assert jnp.mean(squares[-500:]) < 0.2 * jnp.mean(squares[:50])


def test_momentum_works_too():
    cell, template = network()
    ensemble = eki_jax.sample_ensemble(jax.random.key(0), eki_jax.xavier(template), 4)
    learner = online(cell, eki_jax.nesterov(None, eki_jax.squared_error(), momentum=0.5))
    state, outputs, info = learner.step(learner.init(ensemble, jnp.zeros(UNITS)), (jnp.ones(1), jnp.ones(1)))
    assert outputs.shape == (4, 1)
    assert bool(info.is_finite)
    assert state.carry.shape == (4, UNITS)


def test_lengths_that_disagree_are_named():
    learner = online(lambda u, carry, x: (carry, u * x), eki_jax.euler(None, eki_jax.squared_error()))
    state = learner.init(jnp.ones((3, 1)), ())
    with pytest.raises(ValueError, match=r"samples: leading axes \[\(4,\), \(5,\)\]"):
        learn_stream(learner, state, (jnp.ones((5, 1)), jnp.ones((4, 1))))


@pytest.mark.slow
def test_twenty_thousand_samples_a_second():
    """More than twenty thousand samples a second.

    Twelve particles of the paper's network, in seconds of this process's own time (a pass uses one core).
    """
    cell, template = network(32)
    ensemble = eki_jax.sample_ensemble(jax.random.key(0), eki_jax.xavier(template), 12)
    learner = online(cell, eki_jax.euler(None, eki_jax.squared_error()))
    xs, ys = stream(30_000)
    run = jax.jit(lambda state: learn_stream(learner, state, (xs, ys)))
    state = learner.init(ensemble, jnp.zeros(32))
    jax.block_until_ready(run(state))
    started = time.process_time()
    jax.block_until_ready(run(state))
    assert 30_000 / (time.process_time() - started) > 20_000
