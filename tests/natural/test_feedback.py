"""Slopes that are predicted by what earlier steps found: what is learned, what is kept, what is the same on devices."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from eki_jax import natural
from eki_jax.kernel.axes import Axis
from eki_jax.natural import per_sample
from eki_jax.natural.estimates.feedback import (
    LARGEST,
    Features,
    Learned,
    Ways,
    predicted,
    several,
    updated,
    updated_ways,
    weighted,
    weights,
)

LOSS = natural.softmax_cross_entropy()
X = jax.random.normal(jax.random.key(0), (64, 5))
BATCH = (X, jnp.argmax(jnp.tanh(X @ jax.random.normal(jax.random.key(1), (5, 4))), axis=1))
SHAPES = {"b": (12,), "c": (4,), "u": (12, 12), "v": (12, 4), "w": (5, 12)}
PARAMS = {
    name: 0.5 * jax.random.normal(key, shape)
    for (name, shape), key in zip(SHAPES.items(), jax.random.split(jax.random.key(2), 5), strict=True)
}


def forward(p: Any, x: Any) -> jax.Array:
    return jnp.tanh(jnp.tanh(x @ p["w"] + p["b"]) @ p["u"]) @ p["v"] + p["c"]


learned_feedback = partial(natural.learned_feedback, answers=False)  # which have tests of their own
FEEDBACK = learned_feedback(X)


def solver(feedback: Any = FEEDBACK, particles: int = 4, rate: float = 0.05, **own: Any) -> Any:
    settings = {"optimizer": optax.sgd(rate, momentum=0.9), **own}
    return natural.natural_gradient(
        forward, LOSS, particles, 0.01, deviations=per_sample(feedback=feedback), **settings
    )


def trained(steps: int = 40, **own: Any) -> Any:
    method = solver(**own)
    step = jax.jit(method.step)
    state = method.init(PARAMS, jax.random.key(3))
    for _ in range(steps):
        state, info = step(state, BATCH)
        assert int(info.reason) == 0
    return state


def flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def directions(state: Any, number: int, **own: Any) -> np.ndarray:
    """Estimates of the gradient at a state, each with a key of its own."""
    method = solver(optimizer=optax.sgd(1.0), **own)

    def one(key: jax.Array) -> Any:
        new, _ = method.step(state._replace(key=jax.random.key_data(key), inner=method.init(PARAMS, key).inner), BATCH)
        return jax.tree.map(jnp.subtract, state.position, new.position)

    found = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(7), number))
    return np.concatenate([np.asarray(leaf).reshape(number, -1) for leaf in jax.tree.leaves(found)], axis=1)


def gradient(params: Any) -> np.ndarray:
    return flat(jax.grad(lambda p: LOSS(forward(p, X), BATCH[1]))(params))


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def test_few_particles_come_near_the_gradient() -> None:
    """Four particles for 24 numbers, two hidden layers: much nearer than without, on average over keys."""
    state = trained()
    wanted = gradient(state.position)
    near = np.mean([cosine(found, wanted) for found in directions(state, 16)])
    far = np.mean([cosine(found, wanted) for found in directions(state._replace(memory=None), 16, feedback=None)])
    assert near > 0.75
    assert near > far + 0.2


def test_unbiased_estimates_end_at_the_gradient() -> None:
    """The average of many at one state; what else is kept to the prediction has less noise and a bias."""
    unbiased = learned_feedback(X, unbiased=True)
    state = trained(feedback=unbiased)
    wanted = gradient(state.position)
    found, kept = directions(state, 512, feedback=unbiased), directions(state, 512)
    assert cosine(found.mean(0), wanted) > 0.99
    assert np.linalg.norm(found.mean(0) - wanted) < 3 * np.sqrt(np.sum(found.var(0)) / 512)
    assert np.sum(kept.var(0)) < 0.3 * np.sum(found.var(0))


def test_more_is_added_where_errors_cancel() -> None:
    """As many particles more as samples cancel: from the prediction's part of one to all that the noise finds."""
    state = trained(8)
    (first, second) = state.memory.ways.values()  # of both hidden layers
    assert first.gram.shape == second.gram.shape == (2, 2)
    assert float(jnp.trace(first.gram)) > 0
    of = lambda **options: directions(state, 4, feedback=learned_feedback(X, **options))
    kept, some, nearly, unbiased = of(), of(averaged=10), of(averaged=1e6), of(unbiased=True)
    added = [np.linalg.norm(rows - kept) for rows in (some, nearly, unbiased)]
    assert 0.05 * added[2] < added[0] < 0.9 * added[2]
    np.testing.assert_allclose(nearly, unbiased, rtol=1e-3, atol=1e-4 * np.abs(unbiased).max())
    np.testing.assert_array_equal(of(averaged=1), kept)


def test_nothing_learned_predicts_nothing() -> None:
    """The first step with feedback is that without, where estimates are to have no bias."""
    states = [
        solver(feedback=feedback).init(PARAMS, jax.random.key(3))
        for feedback in (learned_feedback(X, unbiased=True), None)
    ]
    first, plain = (
        solver(feedback=feedback).step(state, BATCH)[0].position
        for feedback, state in zip((learned_feedback(X, unbiased=True), None), states, strict=True)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), first, plain)


@pytest.mark.parametrize("noise", [0.0, 3.0])
def test_what_is_learned_is_the_map_back(noise: float) -> None:
    """A matrix and a factor for each range, from slopes with noise; and nothing from noise alone."""
    k = jax.random.split(jax.random.key(0), 300)
    back, sharp = jax.random.normal(k[0], (4, 6)), lambda y: jnp.where(y > 0, 1.5, 0.2)
    learned = blind = Learned.nothing(4, 6, 8)
    for key in k[1:]:
        a, b, c = jax.random.split(key, 3)
        g, y = jax.random.normal(a, (50, 4)), jax.random.normal(b, (50, 6))
        features = Features.of(g, y, 8, Axis())
        truth = (g @ back) * sharp(y)
        error = noise * jax.random.normal(c, truth.shape)
        unknowns = max(noise**2, 0.1)
        found, of_blind = (predicted(part, features, unknowns) for part in (learned, blind))
        learned = updated(learned, features, found, found.slopes, truth + error, 0.99, Axis())
        blind = updated(blind, features, of_blind, of_blind.slopes, error, 0.99, Axis())
    found = predicted(learned, features, unknowns).slopes
    assert cosine(np.ravel(found), np.ravel(truth)) > 0.99
    np.testing.assert_allclose(jnp.linalg.norm(found), jnp.linalg.norm(truth), rtol=0.1)
    assert float(jnp.linalg.norm(predicted(blind, features, unknowns).slopes)) < 0.05 * (1e-9 + jnp.linalg.norm(error))


def test_layers_share_what_they_learned() -> None:
    """A layer with much noise takes the way back of one with the same slopes and little, and none that is unrelated."""
    k = jax.random.split(jax.random.key(0), 100)
    backs = [jax.random.normal(key, (4, 6)) for key in k[:2]]
    backs = [backs[0], 0.5 * backs[0], backs[1]]
    layers, ways = [Learned.nothing(4, 6, 8)] * 3, [Ways.nothing(3, None)] * 3

    @jax.jit
    def step(key: jax.Array, layers: Any, ways: Any) -> Any:
        a, *b = jax.random.split(key, 4)
        g = jax.random.normal(a, (50, 4))
        features = Features.of(g, jnp.ones((50, 6)), 8, Axis())
        alone = [predicted(learned, features, 100.0) for learned in layers]
        each = several(ways[0], layers[0], features, alone, None)
        found = [weighted(weights(*own, jnp.zeros(())), each) for own in zip(ways, layers, strict=True)]
        truths = [g @ back for back in backs]
        noise = zip(truths, b, (0.1, 30, 0.1), strict=True)
        slopes = [truth + size * jax.random.normal(key, truth.shape) for truth, key, size in noise]
        rows = zip(layers, alone, found, slopes, strict=True)
        layers = [updated(learned, features, *own, 0.99, Axis()) for learned, *own in rows]
        ways = [updated_ways(own, features, each, None, s, 0.99, Axis()) for own, s in zip(ways, slopes, strict=True)]
        return layers, ways, alone, found, truths

    for key in k[2:]:
        layers, ways, alone, found, truths = step(key, layers, ways)
    near = [cosine(np.ravel(part), np.ravel(truth)) for part, truth in zip(found, truths, strict=True)]
    assert min(near) > 0.98
    assert cosine(np.ravel(alone[1].slopes), np.ravel(truths[1])) < 0.9
    np.testing.assert_allclose(jnp.linalg.norm(found[1]), jnp.linalg.norm(truths[1]), rtol=0.25)


def test_layers_that_predict_the_same() -> None:
    """Without noise their products are a singular matrix; their sum is right all the same."""
    nothing, features = Learned.nothing(4, 6, 8), Features(jnp.zeros((50, 4)), jnp.zeros((50, 6), int), (50, 6))
    whole = jax.random.normal(jax.random.key(0), (50, 6))
    same = [predicted(nothing, features, 1.0)._replace(whole=whole)] * 3
    each = several(Ways.nothing(3, None), nothing, features, same, None)
    ways = updated_ways(Ways.nothing(3, None), features, each, None, whole, 0.99, Axis())
    np.testing.assert_allclose(weighted(weights(ways, nothing, jnp.zeros(())), each), whole, rtol=1e-3)


def test_balanced_small_gradients_count_as_well() -> None:
    """Where one sample of a hundred has a gradient a hundred times as large, with noise in proportion."""
    keys = jax.random.split(jax.random.key(5), 4)
    samples, back = 2000, jax.random.normal(keys[0], (4, 6))
    size = jnp.where(jnp.arange(samples) % 100 == 0, 1.0, 0.01)[:, None]
    g, y = size * jax.random.normal(keys[1], (samples, 4)), jax.random.normal(keys[2], (samples, 6))
    slopes = g @ back + 3 * size * jax.random.normal(keys[3], (samples, 6))

    def error(balanced: bool) -> float:
        features, learned = Features.of(g, y, 1, Axis(), balanced=balanced), Learned.nothing(4, 6, 1)
        for _ in range(3):
            prediction = predicted(learned, features, 1.0)
            learned = updated(learned, features, prediction, prediction.slopes, slopes, 0.9, Axis())
        wrong = predicted(learned, features, 1.0).whole - g @ back
        return float(jnp.linalg.norm(wrong) / jnp.linalg.norm(g @ back))

    assert error(True) < 0.5 * error(False)


def test_slopes_out_of_proportion_count_less() -> None:
    """One sample's, as of a loop that drives turns apart; those of all others count as they did, to the bit."""
    keys = jax.random.split(jax.random.key(6), 3)
    g, y = jax.random.normal(keys[0], (200, 4)), jax.random.normal(keys[1], (200, 6))
    slopes = (g @ jax.random.normal(keys[2], (4, 6))).at[7].multiply(1e6)
    features = Features.of(g, y, 1, Axis(), balanced=True)
    less = features.in_proportion(slopes, Axis())
    np.testing.assert_array_equal(np.delete(less.factors, 7, axis=0), np.delete(features.factors, 7, axis=0))
    squares = np.sum(np.square(less.counted(slopes)), axis=1)
    assert 10 < squares[7] / np.median(squares) < 2000  # else 1e12
    none = Features.of(g, y, 1, Axis())
    assert none.in_proportion(slopes, Axis()) is none
    zero = features.in_proportion(0 * slopes, Axis())
    np.testing.assert_array_equal(zero.factors, features.factors)


def test_a_place_is_predicted_by_its_own_outputs() -> None:
    """With outputs at the same places as the layer, one map is shared; its features are those of the place."""
    g, y = jnp.arange(24.0).reshape(2, 3, 4), jnp.ones((2, 3, 5))
    features = Features.of(g, y, 8, Axis())
    np.testing.assert_array_equal(features.g, g.reshape(6, 4))
    assert features.ranges.shape == (6, 5)
    pooled = Features.of(g[:, 0], y, 8, Axis())
    assert (pooled.g.shape, pooled.ranges.shape) == ((2, 4), (2, 15))


@pytest.mark.parametrize("answers", [False, True])
def test_memory_is_the_same_on_devices(answers: bool) -> None:
    """Particles or samples over eight devices learn what one learns."""
    feedback = learned_feedback(X, answers=answers)
    wanted = trained(8, particles=8, feedback=feedback)
    for name, split in (("axis_name", False), ("batch_axis_name", True)):
        method = solver(particles=8, feedback=feedback, **{name: "devices"})
        data = jax.tree.map(lambda leaf: leaf.reshape(8, -1, *leaf.shape[1:]), BATCH) if split else BATCH
        state = method.init(PARAMS, jax.random.key(3))
        step = jax.jit(jax.vmap(method.step, (0, 0 if split else None), axis_name="devices", axis_size=8))
        state = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (8, *leaf.shape)), state)
        for _ in range(8):
            state, _ = step(state, data)
        for part in ("memory", "position"):
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a[3], b, rtol=0.02, atol=2e-4),
                getattr(state, part),
                getattr(wanted, part),
            )


def test_a_refused_step_learns_nothing() -> None:
    """Neither memory nor the optimizer's state moves."""
    state = trained(3)
    new, info = solver().step(state, (X.at[0].set(jnp.nan), BATCH[1]))
    assert not bool(info.moved)
    jax.tree.map(np.testing.assert_array_equal, new, state)


def test_an_optimizer_is_optaxs_own() -> None:
    """The solver's steps are those of a loop by hand."""
    by_solver = trained(5, feedback=None)
    f = natural.value_and_natural_direction(forward, LOSS, 4, 0.01, deviations=per_sample())
    tx = optax.sgd(0.05, momentum=0.9)
    params, inner = PARAMS, tx.init(PARAMS)
    for count in range(5):
        updates, inner = tx.update(f(params, BATCH, jax.random.fold_in(jax.random.key(3), count))[1], inner)
        params = optax.apply_updates(params, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), by_solver.position, params)


def test_what_feedback_cannot_do_is_refused() -> None:
    for bad, error in [
        ({"example": None}, ValueError),
        ({"decay": 1.0}, ValueError),
        ({"bins": 0}, ValueError),
        ({"unbiased": 1}, TypeError),
    ]:
        with pytest.raises(error, match=next(iter(bad))):
            learned_feedback(**{"example": X, **bad})
    with pytest.raises(TypeError, match=r"feedback: 0\.99; wanted learned_feedback"):
        per_sample(feedback=0.99)
    with pytest.raises(TypeError, match=r"learns from step to step; wanted natural_gradient"):
        natural.value_and_natural_direction(forward, LOSS, deviations=per_sample(feedback=learned_feedback(X)))
    wide = lambda p, x: jnp.tanh(x @ p["w"]) @ jnp.ones((12, LARGEST + 1))
    with pytest.raises(ValueError, match=r"4097 outputs of a sample; wanted at most 4096"):
        natural.natural_gradient(wide, LOSS, deviations=per_sample(feedback=learned_feedback(X))).init(
            {"w": PARAMS["w"]}, jax.random.key(0)
        )
    for own, words in [
        ({"learning_rate": 1.0}, "learning_rate: .* an optimizer, which has its own"),
        ({"damping": natural.adaptive_damping(1.0)}, "adaptive with an optimizer"),
        ({"optimizer": 0.1}, "optimizer"),
    ]:
        with pytest.raises(TypeError, match=words):
            solver(**own)
