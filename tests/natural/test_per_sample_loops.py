"""Noise of every sample's own at every turn of a loop: recurrent networks, scanned layers, and sums of layers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax import lax

from eki_jax import natural
from eki_jax.flax import linen_forward
from eki_jax.natural import learned_feedback, per_sample
from eki_jax.natural.estimates.undisturbed import Undisturbed

LOSS = natural.softmax_cross_entropy()
SAMPLES, TURNS, UNITS, CLASSES = 6, 4, 3, 4


def cell(p: Any, h: Any, x: Any) -> Any:
    return jnp.tanh(h @ p["recurrent"] + x @ p["inputs"] + p["bias"])


def last(p: Any, x: Any) -> Any:
    start = jnp.zeros((len(x), UNITS), x.dtype)
    return lax.scan(lambda h, x: (cell(p, h, x), None), start, jnp.swapaxes(x, 0, 1))[0] @ p["out"]


def backwards(p: Any, x: Any) -> Any:
    start = jnp.zeros((len(x), UNITS), x.dtype)
    step = lambda h, x: (cell(p, h, x), None)
    return lax.scan(step, start, jnp.swapaxes(x, 0, 1), reverse=True)[0] @ p["out"]


def all_places(p: Any, x: Any) -> Any:
    start = jnp.zeros((len(x), UNITS), x.dtype)
    step = lambda h, x: 2 * (cell(p, h, x),)
    return jnp.swapaxes(lax.scan(step, start, jnp.swapaxes(x, 0, 1))[1], 0, 1) @ p["out"]


def layers(p: Any, x: Any) -> Any:
    """Layers that lie one behind the other in one leaf, transposed."""
    hidden = lambda h, own: (jnp.tanh(h @ own[0].T * own[1]), None)
    return lax.scan(hidden, x[:, 0] @ p["inputs"], (p["deep"], p["scales"]))[0] @ p["out"]


def lookups(p: Any, x: Any) -> Any:
    step = lambda h, t: (jnp.tanh(h @ p["recurrent"] - p["rows"][t]), None)
    return lax.scan(step, jnp.zeros((len(x), UNITS), x.dtype), jnp.argmax(x, axis=2).T)[0] @ p["out"]


def sums(p: Any, x: Any) -> Any:
    """A difference of two layers, one of which is in another shape before."""
    of_all = (x.reshape(len(x), -1) @ p["wide"]).reshape(len(x), UNITS)
    return jnp.tanh(of_all - x[:, 0] @ p["inputs"] + p["bias"]) @ p["out"]


def joined(p: Any, x: Any) -> Any:
    """Matrices side by side and one behind the other, biases in parts, as cells with gates have them."""
    matrix = jnp.concatenate([p["recurrent"], p["inputs"]])
    bias = jnp.concatenate([p["bias"], jnp.zeros(UNITS, x.dtype)])

    def step(h: Any, x: Any) -> Any:
        new, gate = jnp.split(jnp.concatenate([h, x], axis=1) @ jnp.concatenate([matrix, matrix], axis=1) + bias, 2, 1)
        return jax.nn.sigmoid(gate) * jnp.tanh(new + x @ jnp.split(p["wide"], TURNS)[1]), None

    return lax.scan(step, jnp.zeros((len(x), UNITS), x.dtype), jnp.swapaxes(x, 0, 1))[0] @ p["out"]


def taken_away(p: Any, x: Any) -> Any:
    """A layer that is subtracted from a bias, in the middle and at the end."""
    hidden = jnp.tanh(p["bias"] - x[:, 0] @ p["inputs"])
    return p["scales"].reshape(-1)[:CLASSES] - hidden @ p["out"]


MODELS = {f.__name__: f for f in (last, backwards, all_places, layers, lookups, sums, joined, taken_away)}


def params(dtype: Any = jnp.float32) -> Any:
    shapes = {
        "bias": (UNITS,),
        "deep": (TURNS, UNITS, UNITS),
        "inputs": (2, UNITS),
        "out": (UNITS, CLASSES),
        "recurrent": (UNITS, UNITS),
        "rows": (2, UNITS),
        "scales": (TURNS, UNITS),
        "wide": (2 * TURNS, UNITS),
    }
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return {name: jax.random.normal(key, shapes[name], dtype) for name, key in zip(shapes, keys, strict=True)}


def batch(model: str, dtype: Any = jnp.float32) -> Any:
    x = jax.random.normal(jax.random.key(1), (SAMPLES, TURNS, 2), dtype)
    labels = jnp.arange(SAMPLES) % CLASSES
    return x, jnp.tile(labels[:, None], (1, TURNS)) if model == "all_places" else labels


def exact(model: str, p: Any, batch: Any) -> Any:
    return exact_of(MODELS[model], p, batch)


def exact_of(forward: Any, p: Any, batch: Any) -> Any:
    return jax.grad(lambda p: jnp.asarray(LOSS(forward(p, batch[0]), batch[1])))(p)


def estimate(forward: Any, particles: int, sigma: float = 0.01, **options: Any) -> Any:
    deviations = per_sample(**options)
    return jax.jit(natural.value_and_natural_direction(forward, LOSS, particles, sigma, deviations=deviations))


@pytest.mark.parametrize("model", list(MODELS))
def test_enough_particles_find_the_gradient(model: str, x64: None) -> None:
    """With more particles than numbers that reach a sample at all turns, there is no noise but that of curvature."""
    p, data = params(jnp.float64), batch(model, jnp.float64)
    found = estimate(MODELS[model], 60, 1e-6, ridge=1e-7)(p, data, jax.random.key(2))[1]
    for (name, wanted), mine in zip(exact(model, p, data).items(), found.values(), strict=True):
        np.testing.assert_allclose(mine, wanted, rtol=1e-3, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("model", list(MODELS))
def test_describe_says_so(model: str) -> None:
    """Every leaf that is used has noise of its own, whether in a loop or not."""
    found = natural.describe(MODELS[model], params(), batch(model)[0], per_sample())
    used = {leaf.name: leaf.deviation for leaf in found.leaves if leaf.reason != "is not used"}
    assert set(used.values()) == {"per sample"}
    assert len(used) == {"lookups": 3, "joined": 5}.get(model, 4)


def test_layers_that_are_added_share_noise() -> None:
    """The products with the state and the input and the bias are one point: three times the numbers would hide it."""
    seen = Undisturbed.of(last, params(), batch("last")[0], per_sample())
    (hidden,) = seen.noisy
    point = seen.points[hidden]
    assert (point.shape, point.axis) == ((TURNS, SAMPLES, UNITS), 1)
    assert {name for name, _ in point.pulls} == {"['recurrent']", "['inputs']", "['bias']"}
    start, p, values = jnp.zeros((SAMPLES, UNITS)), params(), []
    for turn in range(TURNS):
        values.append(start @ p["recurrent"] + batch("last")[0][:, turn] @ p["inputs"] + p["bias"])
        start = jnp.tanh(values[-1])
    np.testing.assert_allclose(point.value, np.stack(values), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(point.size, np.sqrt(np.mean((np.stack(values) - p["bias"]) ** 2)), rtol=1e-5)


def test_credit_by_place() -> None:
    """The noise of a turn explains what comes at it and later alone, so that it has less to explain."""
    p, data = params(), batch("all_places")
    wanted = np.concatenate([np.ravel(leaf) for leaf in exact("all_places", p, data).values()])

    def error(causal: bool) -> float:
        f = estimate(all_places, 4, solve="covariance", causal=causal)
        keys = jax.random.split(jax.random.key(3), 40)
        found = [np.concatenate([np.ravel(leaf) for leaf in f(p, data, key)[1].values()]) for key in keys]
        mean = np.mean(found, axis=0)
        assert mean @ wanted > 0.9 * np.linalg.norm(mean) * np.linalg.norm(wanted)
        return float(np.mean(np.sum((np.stack(found) - wanted) ** 2, axis=1)))

    assert error(causal=True) < 0.8 * error(causal=False)


def test_whole_leaves_have_credit_of_all_places() -> None:
    """A leaf in a branch is disturbed as a whole, at all places at once: credit by place changes nothing for it."""
    branch = lambda p, x: jnp.tanh(x @ p["inputs"]) @ p["out"]
    forward = lambda p, x: lax.cond(x[0, 0, 0] < 9, branch, branch, p, x)
    data = batch("all_places")
    found = [
        estimate(forward, 4, solve="covariance", **options)(params(), data, jax.random.key(3))[1]
        for options in ({}, {"causal": True}, {"causal": True, "discount": 0})
    ]
    assert np.linalg.norm(found[0]["out"]) > 0
    for others in found[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found[0], others)


@pytest.mark.slow
def test_discounted_credit() -> None:
    """Without credit for later places the gradient is that of a state which is taken as it is; halves are between."""
    p, data = params(), batch("all_places")

    def cut(p: Any, x: Any) -> Any:
        start = jnp.zeros((len(x), UNITS), x.dtype)
        step = lambda h, x: (cell(p, h, x), cell(p, lax.stop_gradient(h), x))
        return jnp.swapaxes(lax.scan(step, start, jnp.swapaxes(x, 0, 1))[1], 0, 1) @ p["out"]

    flat = lambda found: np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(found)])
    near, far = (flat(exact_of(f, p, data)) for f in (cut, all_places))
    cosine = lambda a, b: a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    assert cosine(near, far) < 0.95
    f = {discount: estimate(all_places, 1600, causal=True, discount=discount) for discount in (0, 0.5, 1)}
    found = {discount: flat(f[discount](p, data, jax.random.key(3))[1]) for discount in f}
    assert cosine(found[0], near) > 0.999
    assert cosine(found[1], far) > 0.99
    assert cosine(found[0], far) < cosine(found[0.5], far) < cosine(found[1], far)


def test_what_is_deeper_is_disturbed_as_a_whole() -> None:
    """A loop in a loop, a loop with a condition, a branch, a leaf that is carried: the plain estimate."""
    w = {"w": jnp.eye(3)}
    once = lambda p, h: jnp.tanh(h @ p["w"])
    nested = lambda p, h: lax.scan(lambda h, _: (once(p, h), None), h, None, 2)[0]
    forwards = {
        "a loop in a loop": lambda p, x: lax.scan(lambda h, _: (nested(p, h), None), x, None, 3)[0],
        "a condition": lambda p, x: lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, once(p, c[1])), (0, x))[1],
        "a branch": lambda p, x: lax.cond(x[0, 0] > 0, lambda: once(p, x), lambda: x),
        "carried": lambda p, x: lax.scan(
            lambda c, _: ((c[0] * 0.9, once({"w": c[0]}, c[1])), None), (p["w"], x), None, 3
        )[0][1],
    }
    for name, forward in forwards.items():
        (leaf,) = natural.describe(forward, w, jnp.ones((4, 3)), per_sample()).leaves
        assert (leaf.deviation, "as a whole" in leaf.reason) == ("plain", True), name
    behind = lambda p, x: lax.scan(lambda h, _: (jnp.tanh(nested(p, h) @ p["v"]), None), x, None, 3)[0]
    found = natural.describe(behind, w | {"v": jnp.eye(3)}, jnp.ones((4, 3)), per_sample()).leaves
    assert {leaf.name: leaf.deviation for leaf in found} == {"['v']": "per sample", "['w']": "plain"}


def test_a_product_before_the_loop(x64: None) -> None:
    """A leaf that is added at every turn to what was computed before the loop is a layer at every turn."""
    p, data = params(jnp.float64), batch("last", jnp.float64)

    def forward(p: Any, x: Any) -> Any:
        before = x[:, 0] @ p["inputs"]
        turn = lambda h, _: (jnp.tanh((before + p["bias"]) + h), None)
        return lax.scan(turn, jnp.zeros_like(before), None, TURNS)[0] @ p["out"]

    found = estimate(forward, 40, 1e-5, ridge=1e-7)(p, data, jax.random.key(2))[1]
    wanted = jax.grad(lambda p: jnp.asarray(LOSS(forward(p, data[0]), data[1])))(p)
    for name in ("bias", "inputs", "out"):
        np.testing.assert_allclose(found[name], wanted[name], rtol=2e-3, atol=2e-5, err_msg=name)


def directions(model: str, state: Any, make: Any, data: Any) -> np.ndarray:
    """Estimates of the gradient at a state, each with a key of its own."""
    solver = make(optax.sgd(1.0))

    def one(key: jax.Array) -> Any:
        begun = state._replace(key=jax.random.key_data(key), inner=solver.init(state.position, key).inner)
        new, _ = solver.step(begun, data)
        return jnp.concatenate(
            [jnp.ravel(a - b) for a, b in zip(state.position.values(), new.position.values(), strict=True)]
        )

    return np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(7), 16)))


@pytest.mark.parametrize("model", ["last", "all_places"])
def test_feedback_learns_the_way_back_in_time(model: str) -> None:
    """With what it has learned of a recurrent network, three particles come nearer to the gradient."""
    p, data = params(), batch(model)
    wanted = np.concatenate([np.ravel(leaf) for leaf in exact(model, p, data).values()])

    def near(feedback: Any) -> float:
        deviations = per_sample(feedback=feedback, causal=model == "all_places")
        make = lambda optimizer: natural.natural_gradient(
            MODELS[model], LOSS, 3, 0.01, deviations=deviations, optimizer=optimizer
        )
        solver = make(optax.sgd(0.0))  # learns of the model where it stands
        state = jax.lax.fori_loop(
            0, 100, lambda _, state: solver.step(state, data)[0], solver.init(p, jax.random.key(4))
        )
        found = directions(model, state, make, data)
        return float(np.mean(found @ wanted / (np.linalg.norm(found, axis=1) * np.linalg.norm(wanted))))

    assert near(learned_feedback(data[0])) > near(None) + 0.02


@pytest.mark.parametrize("kind", ["lstm", "gru", "scanned"])
def test_flax_cells(kind: str) -> None:
    """Cells of flax under its scans: all leaves have noise, and the estimate comes near the gradient."""
    x, labels = jax.random.normal(jax.random.key(5), (8, 5, 3)), jnp.arange(8) % 3

    class Block(nn.Module):
        @nn.compact
        def __call__(self, h: Any, _: Any) -> Any:
            return jnp.tanh(nn.Dense(4)(h)), None

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            if kind == "scanned":
                blocks = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
                return nn.Dense(3)(blocks()(nn.Dense(4)(x[:, 0]), None)[0])
            unit = nn.OptimizedLSTMCell(4) if kind == "lstm" else nn.GRUCell(4)
            return nn.Dense(3)(nn.RNN(unit)(x)[:, -1])

    module = Model()
    forward, _ = linen_forward(module, x)
    p = module.init(jax.random.key(6), x)["params"]
    found = natural.describe(forward, p, x, per_sample())
    assert {leaf.deviation for leaf in found.leaves} == {"per sample"}
    f = estimate(forward, 250, 1e-2)
    wanted = jax.grad(lambda p: jnp.asarray(LOSS(forward(p, x), labels)))(p)
    mine = f(p, (x, labels), jax.random.key(7))[1]
    a, b = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in (mine, wanted))
    assert a @ b > 0.98 * np.linalg.norm(a) * np.linalg.norm(b)


@pytest.mark.parametrize("axis", ["particles", "batch"])
def test_devices_have_the_same_noise(axis: str) -> None:
    """Particles or samples over two devices: the estimate is that of one."""
    p, (x, labels) = params(), batch("last")
    wanted = estimate(last, 8)(p, (x, labels), jax.random.key(2))[1]
    names = {"axis_name": axis} if axis == "particles" else {"batch_axis_name": axis}
    f = natural.value_and_natural_direction(last, LOSS, 8, 0.01, deviations=per_sample(), **names)
    data = (x, labels)
    if axis == "batch":
        data = jax.tree.map(lambda leaf: leaf.reshape(2, -1, *leaf.shape[1:]), data)
    mapped = jax.vmap(f, in_axes=(None, 0 if axis == "batch" else None, None), axis_name=axis, axis_size=2)
    found = mapped(p, data, jax.random.key(2))[1]
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name][0], value, rtol=1e-4, atol=1e-6, err_msg=name)
