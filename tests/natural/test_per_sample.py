"""Gradients from noise that every sample has of its own: exact where they must be, unbiased, the same on devices."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from devices import check_both_axes
from flax import linen as nn
from jax import lax

import eki_jax
from eki_jax import natural, sharding
from eki_jax.flax import linen_forward
from eki_jax.natural import per_sample

LOSS = natural.softmax_cross_entropy()
SQUARES = natural.mean_over_samples(lambda z, y: 0.5 * jnp.sum((z - y) ** 2))


def network(x64: bool = False) -> tuple[Any, Any, Any]:
    """An embedding, a hidden layer and a last one."""
    dtype = jnp.float64 if x64 else jnp.float32
    k = jax.random.split(jax.random.key(0), 5)
    shapes = {"b": (6,), "c": (4,), "e": (7, 3), "v": (6, 4), "w": (9, 6)}
    params = {n: 0.6 * jax.random.normal(key, shapes[n], dtype) for n, key in zip(shapes, k, strict=True)}
    x = jax.random.randint(k[4], (16, 3), 0, 7)
    forward = lambda p, x: jnp.tanh(p["e"][x].reshape(len(x), -1) @ p["w"] + p["b"]) @ p["v"] + p["c"]
    return forward, params, (x, x[:, 0] % 4)


def flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def cosine(a: Any, b: Any) -> float:
    a, b = flat(a), flat(b)
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def exact(forward: Any, params: Any, batch: Any, loss: Any = LOSS) -> Any:
    return jax.grad(lambda p: jnp.asarray(loss(forward(p, batch[0]), batch[1])))(params)


def estimate(forward: Any, particles: int, sigma: float = 0.01, loss: Any = LOSS, **options: Any) -> Any:
    return jax.jit(
        natural.value_and_natural_direction(forward, loss, particles, sigma, deviations=per_sample(**options))
    )


def test_enough_particles_find_the_gradient(x64: None) -> None:
    """With more particles than numbers that reach a sample, least squares have no noise but that of curvature."""
    forward, params, batch = network(x64=True)
    value, found = estimate(forward, 60, 1e-5, ridge=1e-6)(params, batch, jax.random.key(1))
    wanted = exact(forward, params, batch)
    np.testing.assert_allclose(flat(found), flat(wanted), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(value, LOSS(forward(params, batch[0]), batch[1]))


@pytest.mark.parametrize(
    "options",
    [{}, *(pytest.param(own, marks=pytest.mark.slow) for own in ({"solve": "covariance"}, {"relative": False}))],
    ids=str,
)
def test_an_average_of_many_ends_at_the_gradient(options: dict[str, Any]) -> None:
    """What is left of N estimates falls as one over the root of N: there is no bias that a momentum would collect."""
    forward, params, batch = network()
    wanted, f = flat(exact(forward, params, batch)), estimate(forward, 6, **options)
    keys = jax.random.split(jax.random.key(1), 256)
    found = np.stack([flat(f(params, batch, key)[1]) for key in keys])
    error = lambda n: np.sqrt(np.mean([np.sum((part.mean(0) - wanted) ** 2) for part in np.split(found, 256 // n)]))
    assert cosine(found.mean(0), wanted) > 0.995
    assert error(256) < 1.6 * error(1) / 16


def test_what_is_linear_is_exact() -> None:
    """The last layer's gradient needs no particles; a model of one layer has no noise."""
    forward, params, batch = network()
    found, wanted = estimate(forward, 2)(params, batch, jax.random.key(1))[1], exact(forward, params, batch)
    for name in ("v", "c"):
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-4, atol=1e-6)
    one = {"w": jnp.ones((3, 4)), "b": jnp.zeros(4)}
    x = jax.random.normal(jax.random.key(0), (5, 3))
    linear = lambda p, x: x @ p["w"] + p["b"]
    found = estimate(linear, 2)(one, (x, jnp.arange(5) % 4), jax.random.key(1))[1]
    np.testing.assert_allclose(flat(found), flat(exact(linear, one, (x, jnp.arange(5) % 4))), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("model", ["linear", "tanh"])
def test_parameters_may_be_one_array(model: str) -> None:
    """An array that is no leaf of anything is trained as it is in a dictionary, and described by name."""
    x, labels = jax.random.normal(jax.random.key(0), (5, 3)), jnp.arange(5) % 4
    after = jnp.tanh if model == "tanh" else lambda z: z
    w = jax.random.normal(jax.random.key(1), (3, 4))
    alone = estimate(lambda p, x: after(x @ p), 8)(w, (x, labels), jax.random.key(2))[1]
    named = estimate(lambda p, x: after(x @ p["w"]), 8)({"w": w}, (x, labels), jax.random.key(2))[1]["w"]
    assert float(jnp.abs(alone).max()) > 0
    np.testing.assert_array_equal(alone, named)
    (leaf,) = natural.describe(lambda p, x: after(x @ p), w, x, natural.per_sample()).leaves
    assert (leaf.name, leaf.deviation) == ("params", "per sample")


class Transformer(nn.Module):
    """A stock decoder block with tied embeddings."""

    @nn.compact
    def __call__(self, tokens: Any) -> Any:
        embed = nn.Embed(7, 8)
        x = embed(tokens) + self.param("places", nn.initializers.normal(0.3), (5, 8))
        x += nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x), mask=nn.make_causal_mask(tokens))
        x += nn.Dense(8)(nn.gelu(nn.Dense(12)(nn.LayerNorm()(x))))
        return embed.attend(nn.LayerNorm()(x))


def transformer() -> tuple[Any, Any, Any]:
    tokens = jax.random.randint(jax.random.key(5), (6, 5), 0, 7)
    forward, template = linen_forward(Transformer(), tokens)
    params = eki_jax.xavier(template).sample(jax.random.key(6))
    return forward, params, (tokens, tokens)


def test_layers_in_bfloat16_are_refused() -> None:
    """Their least squares had no solution, and no step moved."""
    forward, params, batch = network()
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    with pytest.raises(TypeError, match=r"a layer in bfloat16, with \['e'\].*wanted parameters and inputs in float32"):
        jax.eval_shape(estimate(forward, 4), narrow, batch, jax.random.key(1))


@pytest.mark.slow
def test_a_transformer_and_credit_per_token() -> None:
    """Every leaf of a stock block is found; what comes before a token is no noise for it."""
    forward, params, batch = transformer()
    loss = natural.mean_over_samples(lambda z, y: -jax.nn.log_softmax(z)[jnp.arange(5), y].mean())
    wanted, key = exact(forward, params, batch, loss), jax.random.key(1)
    found = estimate(forward, 500, loss=loss)(params, batch, key)[1]
    assert cosine(found, wanted) > 0.88
    for leaf, true in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        # The keys' biases move all scores of a query alike, and have no gradient.
        assert float(jnp.linalg.norm(true)) < 1e-6 or cosine([leaf], [true]) > 0.4

    def mean_cosine(*, causal: bool) -> float:
        f = estimate(forward, 200, loss=loss, solve="covariance", causal=causal)
        keys = jax.random.split(jax.random.key(2), 8)
        return float(np.mean([cosine(f(params, batch, key)[1], wanted) for key in keys]))

    assert mean_cosine(causal=True) > mean_cosine(causal=False) + 0.02


@pytest.mark.slow
def test_leaves_in_loops_in_loops_are_wholes() -> None:
    """Their plain estimate ends at the gradient too."""
    params = {"w": jnp.eye(3) * 0.7, "v": jnp.arange(6.0).reshape(3, 2) % 4, "u": jnp.ones(4)}
    once = lambda p, h: lax.fori_loop(0, 1, lambda _, h: jnp.tanh(h @ p["w"]), h)
    forward = lambda p, x: lax.scan(lambda h, _: (once(p, h), None), x, None, 3)[0] @ p["v"]
    x = jax.random.normal(jax.random.key(0), (6, 3))
    batch = (x, jnp.arange(6) % 2)
    wanted = exact(forward, params, batch)
    f = estimate(forward, 32)
    found = [f(params, batch, key)[1] for key in jax.random.split(jax.random.key(1), 64)]
    mean = jax.tree.map(lambda *leaves: sum(leaves) / 64, *found)
    np.testing.assert_allclose(mean["v"], wanted["v"], rtol=1e-4, atol=1e-6)
    assert cosine(mean["w"], wanted["w"]) > 0.97
    np.testing.assert_array_equal(mean["u"], 0)  # is not used


@pytest.mark.parametrize("is_rounded", [False, True])
def test_it_is_the_same_on_devices(is_rounded: bool) -> None:
    """Particles and samples over eight devices: the noise is that of one, and so are slopes of rounded weights."""
    plain, params, batch = network()
    forward = (lambda p, x: plain(jax.tree.map(lambda w: jnp.round(8 * w) / 8, p), x)) if is_rounded else plain
    wanted, direction = estimate(forward, 8)(params, batch, jax.random.key(1))
    for axes in ({"axis_name": "particles"}, {"batch_axis_name": "batch"}):
        name = next(iter(axes.values()))
        f = natural.value_and_natural_direction(forward, LOSS, 8, 0.01, deviations=per_sample(), **axes)
        split = jax.tree.map(lambda leaf: leaf.reshape(8, -1, *leaf.shape[1:]), batch) if name == "batch" else batch
        mapped = jax.vmap(f, in_axes=(None, 0 if name == "batch" else None, None), axis_name=name, axis_size=8)
        value, found = mapped(params, split, jax.random.key(1))
        np.testing.assert_allclose(value, jnp.full(8, wanted), rtol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a[3], b, rtol=2e-3, atol=1e-5), found, direction)


@pytest.mark.slow
def test_a_solver_and_an_optimizer_train() -> None:
    forward, params, batch = network()
    solver = natural.natural_gradient(forward, LOSS, 12, 0.05, deviations=per_sample(), learning_rate=1.0)
    state = solver.init(params, jax.random.key(2))
    step = jax.jit(solver.step)
    for _ in range(60):
        state, info = step(state, batch)
    assert float(LOSS(forward(state.position, batch[0]), batch[1])) < 0.2
    assert (bool(info.moved), int(info.failed)) == (True, 0)
    mesh = sharding.make_mesh(4)
    make = lambda axis: natural.natural_gradient(forward, LOSS, 12, 0.05, deviations=per_sample(), axis_name=axis)
    spread = sharding.shard_solver(make("particles"), mesh)
    one, many = make(None).init(params, jax.random.key(2)), spread.init(params, jax.random.key(2))
    one, many = make(None).step(one, batch)[0], spread.step(many, batch)[0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-5), many.position, one.position)


def test_a_failed_particle_takes_no_part() -> None:
    """Its noise is zero in every sample's regression, and it is counted."""
    forward, params, batch = network()
    rough = lambda p, x: jnp.where((z := forward(p, x))[:, :1] > 2, jnp.nan, z)
    solver = natural.natural_gradient(rough, LOSS, 40, 1.0, deviations=per_sample(), loss_limit=None)
    state, info = solver.step(solver.init(params, jax.random.key(2)), batch)
    assert 0 < int(info.failed) < 30
    assert bool(info.moved)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(state.position))


def test_what_it_cannot_do_is_refused() -> None:
    forward, params, batch = network()
    solver = natural.natural_gradient(forward, LOSS, 8, deviations=per_sample())
    state = solver.init(params, jax.random.key(0))
    jax.tree.map(
        lambda rows, m: np.testing.assert_array_equal(rows, jnp.stack([m] * 8)), solver.ensemble(state), params
    )
    with pytest.raises(TypeError, match="noise inside of the model"):
        solver.update(state, jnp.zeros((8, 16, 4)), batch[1])
    with pytest.raises(ValueError, match=r"x: shapes .* samples as the first axis"):
        solver.step(state, ((batch[0], jnp.ones(3)), batch[1]))
    more = lambda p, x: forward(p, x) + (p["c"] if len(x) > 1 else 0)
    with pytest.raises(ValueError, match="forward: has 6 layers for 16 samples and 5 for one"):
        estimate(more, 4)(params, batch, jax.random.key(1))
    for options, error, words in [
        ({"norm_constraint": 1.0}, TypeError, "norm_constraint: .* direction is a gradient"),
        ({"estimate": natural.span()}, ValueError, "per_sample"),
        ({"localized": True}, ValueError, "localized"),
    ]:
        with pytest.raises(error, match=words):
            natural.natural_gradient(forward, LOSS, 8, deviations=per_sample(), **options)
    with pytest.raises(ValueError, match=r"gradient\(\) with other deviations"):
        natural.natural_gradient(forward, LOSS, 8, estimate=natural.gradient())
    for bad, error in [
        ({"solve": "both"}, ValueError),
        ({"ridge": -1}, ValueError),
        ({"causal": 1}, TypeError),
        ({"mixing": "yes"}, TypeError),
        ({"discount": 0.5}, ValueError),
        ({"discount": 1.5, "causal": True}, ValueError),
    ]:
        with pytest.raises(error, match=next(iter(bad))):
            per_sample(**bad)


def test_describe_says_what_each_leaf_gets() -> None:
    forward, params, batch = network()
    found = natural.describe(forward, params, batch[0], per_sample())
    assert [leaf.deviation for leaf in found.leaves] == ["per sample"] * 5
    assert [leaf.name for leaf in found.leaves if "last layer" in leaf.reason] == ["['c']", "['v']"]


AWKWARD = {
    "added twice": lambda p, x: jnp.tanh((x @ p["w"] + p["b"]) + p["b"]) @ p["v"],
    "an output and more": lambda p, x: {"a": (h := x @ p["w"] + p["b"]), "b": jnp.tanh(h) @ p["v"]},
    "an output twice": lambda p, x: (z := jnp.tanh(x @ p["w"] + p["b"]) @ p["v"], z),
    "transposed output": lambda p, x: (jnp.tanh(x) @ p["w"]).reshape(len(x), 2, 2).transpose(0, 2, 1) * 1.0,
    "transposed as it is": lambda p, x: (jnp.tanh(x) @ p["w"]).reshape(len(x), 2, 2).transpose(0, 2, 1),
    "mapped": jax.vmap(lambda p, x: p["v"].T @ jnp.tanh(p["w"].T @ x + p["b"]), (None, 0)),
    "subtracted": lambda p, x: (x @ p["w"] - p["b"]) @ p["v"],
    "behind functions": lambda p, x: jnp.tanh(x @ jnp.exp(0.3 * p["w"]) * (1 + p["b"])) @ (-p["v"] / 2),
    "behind two paths": lambda p, x: jnp.tanh(x @ (p["w"] * jnp.tanh(p["w"])) + jax.nn.softplus(p["b"])) @ p["v"],
    "turned, and behind one": lambda p, x: jnp.tanh(x @ jnp.sin(p["w"].T).T + p["b"]) @ jnp.sinh(p["v"]),
    "a copy and a function": lambda p, x: jnp.tanh(x @ p["w"] + x @ jnp.sin(p["w"]) + p["b"]) @ p["v"],
}


@pytest.mark.parametrize("samples", [4, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 7))])
@pytest.mark.parametrize("name", AWKWARD)
def test_awkward_models_have_their_gradient(name: str, samples: int, x64: None) -> None:
    """With more particles than numbers: of four samples, as many as features, too."""
    forward = AWKWARD[name]
    k = jax.random.split(jax.random.key(0), 4)
    shapes = {"b": (4,), "v": (4, 2), "w": (3, 4)}
    params = {n: jax.random.normal(key, shapes[n], jnp.float64) for n, key in zip(shapes, k, strict=False)}
    x = jax.random.normal(k[3], (samples, 3), jnp.float64)
    loss = lambda z, y: sum(
        jnp.sum(jnp.sin(jnp.arange(leaf.size).reshape(leaf.shape) + leaf)) for leaf in jax.tree.leaves(z)
    )
    found = estimate(forward, 40, 1e-5, loss=loss, ridge=1e-6)(params, (x, x), jax.random.key(1))[1]
    wanted = exact(forward, params, (x, x), loss)
    said = {leaf.reason for leaf in natural.describe(forward, params, x, per_sample()).leaves}
    assert not any("as a whole" in reason for reason in said)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-4), found, wanted)


def test_what_is_computed_first_is_whole() -> None:
    """Of all of a leaf's numbers; and has no other number among the layers for one sample than for many."""
    forward = lambda p, x: jnp.tanh(x @ p["w"] + jax.nn.softmax(p["b"]).cumsum()[None]) @ p["v"]
    params = {"b": jnp.ones(4), "v": jnp.ones((4, 2)), "w": jnp.ones((3, 4))}
    found = natural.describe(forward, params, jnp.ones((5, 3)), per_sample())
    assert [leaf.deviation for leaf in found.leaves] == ["plain", "per sample", "per sample"]
    varied = lambda p, x: x @ p["w"] if len(x) > 1 else x @ p["w"] @ p["v"] @ p["v"].T
    with pytest.raises(ValueError, match=r"for 5 samples and .* for one"):
        natural.describe(varied, params, jnp.ones((5, 3)), per_sample())


ALL_OF_A_LEAF = {
    "a sum": lambda p, x: jnp.tanh(x @ p["w"] + jnp.sum(p["b"])) @ p["v"],
    "a scale of another": lambda p, x: jnp.tanh(x @ (p["w"] / jnp.max(jnp.abs(p["b"])))) @ p["v"],
    "a scale and more": lambda p, x: jnp.tanh(x @ p["w"] + p["b"] / jnp.max(p["b"])) @ p["v"] + jnp.max(p["b"]),
}


@pytest.mark.parametrize("name", ALL_OF_A_LEAF)
def test_all_of_a_leaf_is_no_constant(name: str) -> None:
    """Unless it scales that leaf alone."""
    params = {"b": jnp.arange(1.0, 5.0), "v": jnp.ones((4, 2)), "w": jnp.ones((3, 4))}
    leaves = natural.describe(ALL_OF_A_LEAF[name], params, jnp.ones((5, 3)), per_sample()).leaves
    assert next(leaf.deviation for leaf in leaves if leaf.name == "['b']") == "plain"
    assert next(leaf.deviation for leaf in leaves if leaf.name == "['v']") == "per sample"


def test_rounded_weights_have_slopes() -> None:
    """Of a step of 1/8, whose derivative is zero: all weights have one of about 1, but those beyond the range."""
    rounded = lambda w: jnp.clip(jnp.round(8 * w), -16, 15).astype(jnp.int8).astype(jnp.float32) / 8
    keys = jax.random.split(jax.random.key(0), 3)
    w, x = jax.random.normal(keys[0], (30, 20)).at[0, 0].set(5.0), jax.random.normal(keys[1], (40, 30))
    targets = jax.random.normal(keys[2], (40, 20))
    forward, plain = lambda p, x: x @ rounded(p["w"]), lambda p, x: x @ p["w"]
    found = estimate(forward, 8, 0.1, loss=SQUARES)({"w": w}, (x, targets), jax.random.key(1))[1]["w"]
    wanted = exact(plain, {"w": rounded(w)}, (x, targets), SQUARES)["w"]  # the layer's, exact as the last one's is
    assert float(found[0, 0]) == 0
    rest = jnp.abs(w) < 1
    ratio = found[rest] / wanted[rest]
    assert float(jnp.abs(jnp.mean(ratio) - 1)) < 0.05
    assert float(jnp.max(jnp.abs(ratio - 1))) < 0.6


@pytest.mark.parametrize("function", ["sign", "scaled"])
def test_functions_of_a_leaf_are_described(function: str) -> None:
    """A scale that is computed from the leaf counts as a constant, and that is said."""

    def scaled(w: jax.Array) -> jax.Array:
        step = jnp.max(jnp.abs(w), axis=0, keepdims=True) / 7
        return jnp.round(w / step) * step

    of = {"sign": jnp.sign, "scaled": scaled}[function]
    params = {"b": jnp.ones(4), "v": jnp.ones((4, 2)), "w": jax.random.normal(jax.random.key(0), (3, 4))}
    forward = lambda p, x: jnp.tanh(x @ of(p["w"]) + p["b"]) @ p["v"]
    leaves = natural.describe(forward, params, jnp.ones((5, 3)), per_sample()).leaves
    assert [leaf.deviation for leaf in leaves] == ["per sample"] * 3
    reasons = {leaf.name: leaf.reason for leaf in leaves}
    assert ["found by differences" in reasons[name] for name in ("['b']", "['v']", "['w']")] == [False, False, True]
    assert ("scale for a constant" in reasons["['w']"]) == (function == "scaled")
    found = estimate(forward, 8, 0.1, loss=SQUARES)(params, (jnp.ones((5, 3)), jnp.ones((5, 2))), jax.random.key(1))[1]
    assert bool(jnp.all(jnp.isfinite(found["w"])))
    assert bool(jnp.any(found["w"] != 0))


def test_a_function_inside_of_a_loop_has_slopes() -> None:
    """A recurrent network whose matrix is rounded at every turn; with a number of the turn in it, it is a whole."""

    def recurrent(p: Any, x: jax.Array, steps: float = 8, number: float = 0) -> jax.Array:
        def turn(h: jax.Array, row: Any) -> tuple[jax.Array, None]:
            x, i = row
            u = jnp.round(steps * p["u"] + (number * i if number else 0)) / steps if steps else p["u"]
            return jnp.tanh(x @ p["w"] + h @ u), None

        turns = jnp.arange(x.shape[1], dtype=x.dtype)
        return jax.lax.scan(turn, jnp.zeros((len(x), 4)), (x.swapaxes(0, 1), turns))[0] @ p["v"]

    keys = jax.random.split(jax.random.key(0), 4)
    shapes = {"u": (4, 4), "v": (4, 2), "w": (3, 4)}
    params = {n: jax.random.normal(key, shapes[n]) for n, key in zip(shapes, keys, strict=False)}
    batch = jax.random.normal(keys[3], (50, 6, 3)), jnp.ones((50, 2))
    said = lambda forward: natural.describe(forward, params, batch[0], per_sample()).leaves
    kinds = lambda forward: [leaf.deviation for leaf in said(forward)]
    assert kinds(recurrent) == ["per sample"] * 3
    assert kinds(lambda p, x: recurrent(p, x, number=0.1)) == ["plain", "per sample", "per sample"]
    found = estimate(recurrent, 100, 0.01, loss=SQUARES)(params, batch, jax.random.key(1))[1]["u"]
    at = {**params, "u": jnp.round(8 * params["u"]) / 8}
    wanted = exact(lambda p, x: recurrent(p, x, steps=0), at, batch, SQUARES)["u"]
    assert cosine(found, wanted) > 0.97


@pytest.mark.parametrize(("is_rounded", "learns"), [(True, True), pytest.param(False, False, marks=pytest.mark.slow)])
def test_both_axes_of_devices(is_rounded: bool, learns: bool) -> None:
    """In ``jax.shard_map``: where steps lead and what is learned are those of one device, not a multiple of them."""
    plain, params, batch = network()
    forward = (lambda p, x: plain(jax.tree.map(lambda w: jnp.round(8 * w) / 8, p), x)) if is_rounded else plain
    deviations = per_sample(feedback=natural.learned_feedback(batch[0][:1]) if learns else None)
    make = lambda **axes: natural.natural_gradient(forward, LOSS, 8, 0.05, deviations=deviations, **axes)
    check_both_axes(make, params, batch, 2, ("position", "memory"), 2e-3)


def test_a_batch_without_samples_is_refused() -> None:
    """By name, before anything is indexed."""
    forward, params, (x, labels) = network()
    solver = natural.natural_gradient(forward, LOSS, 4, 0.05, deviations=per_sample())
    with pytest.raises(ValueError, match=r"x: has no samples, with per_sample\(\.\.\.\); wanted one at least"):
        solver.step(solver.init(params, jax.random.key(0)), (x[:0], labels[:0]))
