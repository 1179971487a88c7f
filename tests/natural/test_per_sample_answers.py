"""Slopes from those of the layers behind: what lies between is asked, and noise says how right it is."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from devices import check_both_axes
from flax import linen as nn
from jax import lax

from eki_jax import natural
from eki_jax.flax import TanhRNN, linen_forward
from eki_jax.kernel.axes import Axis
from eki_jax.kernel.interpreter import Disturber, Tagged, interpreted
from eki_jax.natural import learned_feedback, per_sample
from eki_jax.natural.estimates.answers import Answer, Between, Source
from eki_jax.natural.estimates.predicting import Asking, Rule, what_answers
from eki_jax.natural.estimates.undisturbed import Undisturbed

SAMPLES, PLACES, WIDTH = 24, 5, 8
NEXT = np.roll(np.eye(WIDTH), 1, axis=1)
SQUARES = natural.mean_over_samples(lambda z, y: 0.5 * jnp.sum((z - y) ** 2))
SLOW = partial(pytest.param, marks=pytest.mark.slow)


class Block(nn.Module):
    """Attention and layers of its own to each place, added to a stream."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        kind = x.dtype
        y = nn.LayerNorm(param_dtype=kind)(nn.Dense(WIDTH, param_dtype=kind)(x))
        x = x + nn.MultiHeadDotProductAttention(2, param_dtype=kind)(y, mask=nn.make_causal_mask(x[..., 0]))
        x = x + nn.Dense(WIDTH, param_dtype=kind)(nn.gelu(nn.Dense(3 * WIDTH, param_dtype=kind)(x)))
        return nn.Dense(3, param_dtype=kind)(nn.LayerNorm(param_dtype=kind)(x))


class Images(nn.Module):
    """Convolutions, and a dense layer that reads them in one row."""

    pool: Any = lambda x: x

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = self.pool(nn.relu(nn.Conv(4, (3, 3), param_dtype=x.dtype)(x)))
        x = nn.swish(self.pool(nn.Conv(3, (3, 3), strides=(1, 2), padding="VALID", param_dtype=x.dtype)(x)))
        return nn.Dense(3, param_dtype=x.dtype)(x.reshape(len(x), -1))


class Normalised(nn.Module):
    """Convolutions, each before a normalisation with a scale, an activation and windows."""

    norms: tuple[Any, ...]

    @nn.compact
    def __call__(self, x: Any) -> Any:
        for norm in self.norms:
            x = norm(param_dtype=x.dtype)(nn.Conv(4, (3, 3), param_dtype=x.dtype)(x))
            x = nn.max_pool(nn.swish(x), (2, 2), (2, 2))
        return nn.Dense(3, param_dtype=x.dtype)(x.reshape(len(x), -1))


def dilated(x: Any) -> Any:
    """The largest of windows of images with holes and edges, whose channels come first."""
    ends, holes = ((0, 0), (0, 0), (1, 1), (0, 1)), (1, 1, 2, 1)
    images = x.transpose(0, 3, 1, 2)
    found = lax.reduce_window(images, -jnp.inf, lax.max, (1, 1, 2, 2), (1, 1, 2, 1), ends, base_dilation=holes)
    return found.transpose(0, 2, 3, 1)


def standardized(x: Any) -> Any:
    """The largest of windows of what an activation makes of channels that are standardized."""
    x = jax.nn.standardize(jnp.sin(x + jnp.arange(x.shape[-1])))
    return nn.max_pool(jnp.tanh(x), (2, 2), (2, 2))


def dense(p: Any, x: Any) -> Any:
    """Two branches that are added, a scale, and a softmax between matrices."""
    y = jnp.tanh(x @ p["a"] + p["bias"]) @ p["b"] + jnp.sin(x @ p["c"])
    return jax.nn.softmax(p["scale"] * y) @ p["d"]


def turned(p: Any, x: Any) -> Any:
    """A fixed matrix behind the activation: a change of a unit acts on the next."""
    return jnp.tanh(x @ p["a"]) @ NEXT @ p["d"]


def arranged(p: Any, x: Any) -> Any:
    """Units in another order behind the activation, and samples last."""
    return (p["d"].T @ jnp.tanh(x @ p["a"])[:, ::-1].T).T


def recurrent(p: Any, x: Any) -> Any:
    """The state passes through what hands it on to other units."""
    body = lambda h, row: (jnp.tanh(h @ p["b"] + row @ p["a"]) @ NEXT, None)
    return jax.lax.scan(body, jnp.zeros((len(x), WIDTH), x.dtype), jnp.moveaxis(x, 1, 0))[0] @ p["d"]


def scanned(p: Any, x: Any) -> Any:
    """Layers of one leaf, which lie one behind the other."""
    layer = lambda h, own: (h + jnp.tanh(h @ own[0].T + own[1]), None)
    return jax.lax.scan(layer, x @ p["a"], (p["layers"], p["biases"]))[0] @ p["d"]


def nested(p: Any, x: Any) -> Any:
    """A loop between the layers of a loop."""

    def body(h: Any, row: Any) -> Any:
        again = lambda h, _: (jnp.tanh(h), None)
        return jax.lax.scan(again, h @ p["b"] + row @ p["a"], None, length=2)[0], None

    return jax.lax.scan(body, jnp.zeros((len(x), WIDTH), x.dtype), jnp.moveaxis(x, 1, 0))[0] @ p["d"]


def gated(p: Any, x: Any) -> Any:
    """A softmax that rows are multiplied by: more is read than there is to move."""
    return times(jax.nn.softmax(x @ p["a"]), x) @ p["rows"]


def choosing(p: Any, x: Any) -> Any:
    """The same with the choice of the largest, which has no derivative."""
    return times(jax.nn.one_hot(jnp.argmax(x @ p["a"], axis=1), WIDTH, dtype=x.dtype), x) @ p["rows"]


def times(gates: Any, x: Any) -> Any:
    """The rows by each gate, side by side."""
    return (gates[:, :, None] * x[:, None]).reshape(len(x), -1)


def summed(p: Any, x: Any) -> Any:
    """Products that are added, each of what another layer returned."""
    h, k = jnp.tanh(x @ p["a"]), jnp.sin(x @ p["c"])
    return (jnp.tanh(h @ p["b"] + k @ p["e"]) + h) @ p["d"] / 2


class Sequence(nn.Module):
    """Recurrent layers between an embedding of the inputs and the outputs."""

    cell: Any
    layers: int = 1
    end: Any = "last"
    reverse: bool = False

    @nn.compact
    def __call__(self, x: Any) -> Any:
        kinds = {"dtype": x.dtype, "param_dtype": x.dtype}
        x = jnp.sin(nn.Dense(WIDTH, **kinds)(x))
        zeros = lambda key, shape, kind: jnp.zeros(shape, x.dtype)
        for _ in range(self.layers):
            x = nn.RNN(self.cell(WIDTH, carry_init=zeros, **kinds), reverse=self.reverse, keep_order=True)(x)
        return nn.Dense(3, **kinds)({"last": x[:, -1], "mean": x.mean(axis=1), "all": x}[self.end])


RECURRENT = {
    "tanh": Sequence(nn.SimpleCell),
    "LSTM": Sequence(nn.LSTMCell),
    "LSTM of one product": Sequence(nn.OptimizedLSTMCell),
    "GRU, two layers": Sequence(nn.GRUCell, 2, "mean"),
    "outputs at every turn": Sequence(nn.MGUCell, 1, "all"),
    "backwards": Sequence(nn.SimpleCell, 2, "mean", reverse=True),
    "stacked": TanhRNN(WIDTH, 2, 3, stacked=True),
    "composed": TanhRNN(WIDTH, 2, 3),
}


def case(name: str, kind: Any = "float64") -> tuple[Any, Any, Any]:
    k = jax.random.split(jax.random.key(0), 4)
    pools = {
        "images": lambda x: x,
        "pooled": lambda x: nn.max_pool(x, (2, 2), (2, 2)),
        "overlapping": lambda x: nn.max_pool(x, (3, 2), (2, 1), padding="SAME"),
        "averaged": lambda x: nn.avg_pool(x, (2, 1), (1, 2)),
        "dilated": dilated,
        "standardized": standardized,
        "multiplied": lambda x: nn.max_pool(x[..., ::2] * x[..., 1::2], (2, 2), (2, 2)),
    }
    norms = {"normalised": (nn.LayerNorm, nn.RMSNorm), "grouped": (partial(nn.GroupNorm, 2), nn.InstanceNorm)}
    images = {name: Images(pool) for name, pool in pools.items()}
    images |= {name: Normalised(kinds) for name, kinds in norms.items()}
    modules = {"attention": Block()} | images | RECURRENT
    sequences = ("attention", "recurrent", "nested", *RECURRENT)
    rows = (PLACES, WIDTH) if name in sequences else (12, 12, 2) if name in images else (WIDTH,)
    x = jax.random.normal(k[0], (SAMPLES, *rows), kind)
    if name in modules:
        options = {"method": "logits"} if isinstance(modules[name], TanhRNN) else {}
        forward, params = linen_forward(modules[name], x, **options)
    else:
        own = {
            "turned": (turned, "ad"),
            "arranged": (arranged, "ad"),
            "recurrent": (recurrent, "abd"),
            "nested": (nested, "abd"),
        }
        own |= {"dense": (dense, ("a", "b", "c", "d", "bias", "scale")), "summed": (summed, "abcde")}
        own |= {"scanned": (scanned, ("a", "d", "layers", "biases"))}
        own |= {"gated": (gated, ("a", "rows")), "choosing": (choosing, ("a", "rows"))}
        forward, names = own[name]
        params = {n: jnp.zeros((WIDTH, 3 if n == "d" else WIDTH), kind) for n in "abcde"}
        params |= {"bias": jnp.zeros(WIDTH, kind), "scale": jnp.zeros(WIDTH, kind)}
        params |= {"rows": jnp.zeros((WIDTH**2, 3), kind)}
        params |= {"layers": jnp.zeros((4, WIDTH, WIDTH), kind), "biases": jnp.zeros((4, WIDTH), kind)}
        params = {n: params[n] for n in names}
    leaves, structure = jax.tree.flatten(params)
    drawn = [0.6 * jax.random.normal(jax.random.fold_in(k[1], i), m.shape, m.dtype) for i, m in enumerate(leaves)]
    params = structure.unflatten(drawn)
    return forward, params, (x, jax.random.normal(k[2], forward(params, x).shape, kind))


def seen(name: str) -> tuple[Undisturbed, dict[int, Any]]:
    """What lies at the points, and the exact slopes there: the gradient in noise that is added."""
    forward, params, batch = case(name)
    deviations = per_sample(causal=name == "attention", feedback=learned_feedback(batch[0]))
    found = Undisturbed.of(forward, params, batch[0], deviations)

    def loss(added: dict[int, Any]) -> Any:
        noise = lambda number, shape, dtype: added.get(number, 0)
        disturber = Disturber(found.axis_of, noise, samples=found.mixes, moves=found.moves)
        leaves = [Tagged(value, leaf=leaf) for leaf, value in found.leaves.items()]
        return SQUARES(interpreted(forward, params, leaves, (batch[0],), disturber), batch[1])

    return found, jax.grad(loss)({u: jnp.zeros(point.shape) for u, point in found.points.items()})


def answers(name: str) -> dict[int, tuple[Answer, Any]]:
    """By layers that something answers to, the answer to the exact slopes of those behind, and the exact slopes.

    Of a loop's turns, each to the answers to those behind it.
    """
    found, exact = seen(name)
    batch = case(name)[2]
    deviations = per_sample(relative=False, feedback=learned_feedback(batch[0]))
    setup: Any = SimpleNamespace(cloud=SimpleNamespace(deviations=deviations), axes=SimpleNamespace(batch=Axis()))
    size = jnp.asarray(1e-6)  # smaller than what lies between two pixels of a window
    outputs = [jax.grad(SQUARES)(found.outputs, batch[1])]
    answered = what_answers(found)
    asking = Asking(found, setup, size, dict(exact), outputs, answered)

    def rule(u: int) -> Rule:
        turns = len(exact[u])
        own = jnp.zeros_like(exact[u]) if u in answered else exact[u]
        return Rule(own, jnp.ones(turns), jnp.zeros_like(exact[u]))

    every = {u: asking.answer(u, rule) for u in reversed(found.noisy)}
    assert {u for u, answer in every.items() if answer is not None} == answered
    return {u: (every[u], exact[u]) for u in sorted(answered)}


@pytest.mark.parametrize(
    "name",
    [
        "dense",
        "summed",
        "scanned",
        "arranged",
        "gated",
        "images",
        "attention",
        "pooled",
        "overlapping",
        "averaged",
        "dilated",
        "standardized",
        "normalised",
        *RECURRENT,
    ],
)
def test_answers_are_the_slopes(name: str, x64: None) -> None:
    """At every layer: of activations, a softmax, a normalisation, windows, turns, and between layers of all kinds."""
    found = answers(name)
    assert {*found} == {*seen(name)[0].noisy}
    for answer, exact in found.values():
        assert float(jnp.linalg.norm(exact)) > 1e-4
        np.testing.assert_allclose(answer.slopes, exact, rtol=1e-4, atol=1e-6)


def test_groups_are_normalised(x64: None) -> None:
    """What is normalised has its slopes, also where nothing answers to the scale, by which groups are multiplied."""
    for answer, exact in answers("grouped").values():
        np.testing.assert_allclose(answer.slopes, exact, rtol=1e-4, atol=1e-6)
    found, _ = seen("grouped")
    assert {found.points[u].pulls[0][0] for u in found.noisy if u not in what_answers(found)} == {
        "['GroupNorm_0']['scale']",
        "['InstanceNorm_0']['scale']",
    }


def test_windows_with_holes(x64: None) -> None:
    """The largest of pixels that lie apart: as of that of images that are moved against each other."""
    holes: Any = {"padding": "VALID", "window_dilation": (1, 1, 2)}
    pool = lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (1, 1, 3), (1, 1, 1), **holes)
    moved = lambda x: jnp.maximum(jnp.maximum(x[..., :3], x[..., 2:5]), x[..., 4:])
    check_asked(pool, moved)


def test_sums_of_all_before_are_asked(x64: None) -> None:
    """Between activations: as many numbers, but none of one alone; largest of all before have no answer."""
    total = lambda x: jnp.tanh(jnp.cumsum(jnp.sin(x), axis=2))
    check_asked(total, total)
    x = jnp.ones((2, 3))
    assert not Between.of({}, {}, {0: Source.of(x)}, lambda held: [lax.cummax(jnp.sin(held[0]))]).behind(0)


def check_asked(forward: Any, differentiable: Any) -> None:
    """The answer of what lies before one array that is read is the derivative of the same function."""
    x = jax.random.normal(jax.random.key(0), (2, 5, 7))
    read, back = jax.vjp(differentiable, x)
    asked = jax.random.normal(jax.random.key(1), read.shape)
    ((_, way),) = Between.of({}, {}, {0: Source.of(x)}, lambda held: [forward(held[0])]).behind(0)
    np.testing.assert_allclose(way(asked, jnp.asarray(1e-6), Axis()).slopes, back(asked)[0], atol=1e-8)


def test_a_choice_is_asked(x64: None) -> None:
    """What it would be worth to choose each: the gradient in the choice, as if it were any numbers."""
    _, p, (x, y) = case("choosing")
    chosen = jax.nn.one_hot(jnp.argmax(x @ p["a"], axis=1), WIDTH, dtype=x.dtype)
    worth = jax.grad(lambda gates: SQUARES(times(gates, x) @ p["rows"], y))(chosen)
    ((answer, exact),) = answers("choosing").values()
    np.testing.assert_allclose(answer.asked, worth, rtol=1e-10)
    np.testing.assert_array_equal(answer.slopes, exact)  # nothing, between the places where it jumps


@pytest.mark.parametrize("name", ["turned", "recurrent"])
def test_what_turns_units_answers_elsewhere(name: str, x64: None) -> None:
    """The answer is what a change would do, which is not what changes do here."""
    ((answer, exact),) = answers(name).values()
    assert not np.allclose(answer.slopes, exact, rtol=0.1)


@pytest.mark.parametrize("name", ["multiplied", "nested"])
def test_what_nothing_answers_to(name: str, x64: None) -> None:
    """Between a convolution and what reads products of its channels pooled, and between loops in loops."""
    found, _ = seen(name)
    assert min(found.noisy) not in what_answers(found)


def trained(
    name: str, steps: int, particles: int = 4, discount: float = 1.0, **options: Any
) -> tuple[Any, Any, np.ndarray]:
    """The solver's state after some steps, its next estimates of the gradient, and the gradient."""
    forward, params, batch = case(name, "float32")
    feedback = learned_feedback(batch[0], 0.99, **options)
    deviations = per_sample(feedback=feedback, causal=name == "attention", discount=discount)
    settings: Any = {"deviations": deviations, "optimizer": optax.sgd(1e-4)}
    solver = natural.natural_gradient(forward, SQUARES, particles, 0.01, **settings)
    state, step = solver.init(params, jax.random.key(3)), jax.jit(solver.step)
    for _ in range(steps):
        state, info = step(state, batch)
        assert bool(info.moved)
    moved = [step(state._replace(key=jax.random.key_data(jax.random.key(i))), batch)[0].position for i in range(16)]
    found = [flat(jax.tree.map(lambda a, b: (a - b) / 1e-4, state.position, position)) for position in moved]
    return state, np.stack(found), flat(jax.grad(lambda p: SQUARES(forward(p, batch[0]), batch[1]))(state.position))


def flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def cosines(found: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    return found @ wanted / np.linalg.norm(found, axis=1) / np.linalg.norm(wanted)


@pytest.mark.parametrize("name", ["dense", "pooled", "stacked", SLOW("attention"), SLOW("LSTM")])
def test_few_particles_find_the_gradient(name: str) -> None:
    """Four particles for up to hundreds of numbers, by what few steps learned."""
    _, found, wanted = trained(name, 60)
    near, far = cosines(found, wanted), cosines(trained(name, 60, answers=False)[1], wanted)
    assert near.min() > 0.95
    assert near.mean() > far.mean() + 0.01


def test_errors_do_not_grow_from_layer_to_layer() -> None:
    """In the first steps each layer's own sums say little of how right answers are."""
    for steps in (2, 3):
        _, found, wanted = trained("attention", steps, 16, 0.0)
        assert np.linalg.norm(found, axis=1).max() < 3 * np.linalg.norm(wanted)  # else millions in the third


def test_wrong_answers_do_no_harm() -> None:
    """Noise says that they are wrong: estimates are as near as without, and without bias where that is asked for."""
    state, found, wanted = trained("turned", 100, unbiased=True)
    _, without, own = trained("turned", 100, unbiased=True, answers=False)
    assert cosines(found, wanted).mean() > cosines(without, own).mean() - 0.05
    error = np.linalg.norm(found.mean(0) - wanted)
    assert error < 2 * np.sqrt(found.var(0).sum() / len(found))
    (ways,) = state.memory.ways.values()
    assert ways.cross.shape == (3,)


def test_models_that_do_not_answer_work_as_before() -> None:
    """Where nothing answers to any layer, not a number is another."""
    np.testing.assert_array_equal(trained("nested", 5)[1], trained("nested", 5, answers=False)[1])


def test_passes_that_answers_take_are_counted() -> None:
    """One more than without: slopes go through all matrices behind."""
    forward, _, batch = case("dense", "float32")
    count = lambda answers: natural.natural_gradient(
        forward, SQUARES, 4, 0.01, deviations=per_sample(feedback=learned_feedback(batch[0], answers=answers))
    ).passes(4)
    assert count(True) == count(False) + 1


@pytest.mark.parametrize("name", ["summed", SLOW("stacked"), SLOW("LSTM")])
def test_answers_are_the_same_on_devices(name: str) -> None:
    """In ``jax.shard_map``, turns of loops too: where steps lead and what is learned are those of one device."""
    forward, params, batch = case(name, "float32")
    deviations = per_sample(feedback=learned_feedback(batch[0]))
    make = lambda **axes: natural.natural_gradient(
        forward, SQUARES, 8, 0.01, deviations=deviations, optimizer=optax.sgd(0.05), **axes
    )
    one = check_both_axes(make, params, batch, 3, ("position",), 5e-3)
    assert {ways.cross.shape for ways in one.memory.ways.values()} == {(3,)}


def test_describe_says_what_answers() -> None:
    """By leaves, of layers in loops too; and nothing of it where answers are not asked for."""
    said = lambda name, **options: {
        leaf.name: leaf.reason
        for forward, params, (x, _) in [case(name, "float32")]
        for leaf in natural.describe(forward, params, x, per_sample(feedback=learned_feedback(x, **options))).leaves
    }
    found = said("LSTM")
    inner = [reason for name, reason in found.items() if "LSTMCell" in name]
    assert len(inner) == 12
    assert all(reason.endswith("; what lies behind answers to it") for reason in inner)
    assert not any("answers" in reason for reason in said("LSTM", answers=False).values())
    assert said("images")["['Conv_0']['kernel']"].endswith("; what lies behind answers to it")
    assert said("multiplied")["['Conv_0']['kernel']"].endswith("; nothing behind answers to it")
