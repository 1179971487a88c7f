"""Credit by place where a model mixes places by products: what acts elsewhere is disturbed behind them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from eki_jax import natural
from eki_jax.flax import linen_forward
from eki_jax.natural import per_sample
from eki_jax.natural.estimates.undisturbed import Undisturbed

SAMPLES, PLACES, WIDTH, HEADS = 3, 4, 6, 2
SQUARES = natural.mean_over_samples(lambda z, y: 0.5 * jnp.sum((z - y) ** 2))
EARLIER = np.tril(np.ones((PLACES, PLACES)))


class Stock(nn.Module):
    """A library's attention."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        mask = nn.make_causal_mask(x[..., 0])
        return jnp.tanh(nn.MultiHeadDotProductAttention(HEADS, param_dtype=x.dtype)(x, mask=mask))


def by_hand(p: Any, x: Any) -> Any:
    """Attention as others write it: heads before places, keys transposed, scores scaled after their product."""
    heads = lambda y: y.reshape(*y.shape[:2], HEADS, -1).transpose(0, 2, 1, 3)
    q, k, v = (heads(x @ p[name] + p[f"{name}_bias"]) for name in ("q", "k", "v"))
    scores = q @ jnp.swapaxes(0.7 * k, -1, -2) / np.sqrt(WIDTH // HEADS)
    weights = jax.nn.softmax(jnp.where(EARLIER == 1, scores, -jnp.inf))
    return jnp.tanh((weights @ v).transpose(0, 2, 1, 3).reshape(x.shape))


def keys_first(p: Any, x: Any) -> Any:
    """Scores with the axis of the keys before that of the queries."""
    scores = jnp.einsum("btc,bsc->bts", x @ p["k"] + p["k_bias"], x @ p["q"])
    weights = jax.nn.softmax(jnp.where(EARLIER.T == 1, scores, -jnp.inf), axis=1)
    return jnp.tanh(jnp.einsum("bts,btc->bsc", weights, 0.5 * (x @ p["v"])))


def averages(p: Any, x: Any) -> Any:
    """Means of what came before, of all places' own outputs."""
    return jnp.tanh(jnp.einsum("st,btc->bsc", EARLIER, -(x @ p["v"] + p["v_bias"])) @ p["k"])


class Blocks(nn.Module):
    """A transformer of two blocks on tokens."""

    @nn.compact
    def __call__(self, tokens: Any) -> Any:
        kind = jnp.float64
        x = nn.Embed(5, WIDTH, param_dtype=kind)(tokens)
        for _ in range(2):
            y = nn.LayerNorm(param_dtype=kind)(x)
            x = x + nn.MultiHeadDotProductAttention(HEADS, param_dtype=kind)(y, mask=nn.make_causal_mask(tokens))
            x = x + nn.Dense(WIDTH, param_dtype=kind)(jnp.tanh(nn.Dense(WIDTH, param_dtype=kind)(x)))
        return nn.Dense(WIDTH, param_dtype=kind)(nn.LayerNorm(param_dtype=kind)(x))


def case(name: str) -> tuple[Any, Any, Any]:
    k = jax.random.split(jax.random.key(0), 8)
    x, y = (jax.random.normal(key, (SAMPLES, PLACES, WIDTH), jnp.float64) for key in k[:2])
    if name in ("stock", "blocks"):
        x = jax.random.randint(k[0], (SAMPLES, PLACES), 0, 5) if name == "blocks" else x
        forward, params = linen_forward(Blocks() if name == "blocks" else Stock(), x)
    else:
        forward = {"by hand": by_hand, "keys first": keys_first, "averages": averages}[name]
        params = {n: jnp.zeros((WIDTH, WIDTH), jnp.float64) for n in "qkv"}
        params |= {f"{n}_bias": jnp.zeros(WIDTH, jnp.float64) for n in "qkv"}
    leaves, structure = jax.tree.flatten(params)
    drawn = [0.6 * jax.random.normal(jax.random.fold_in(k[2], i), m.shape, m.dtype) for i, m in enumerate(leaves)]
    return forward, structure.unflatten(drawn), (x, y)


def gradient(forward: Any, params: Any, batch: Any) -> Any:
    return jax.grad(lambda p: SQUARES(forward(p, batch[0]), batch[1]))(params)


def flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


@pytest.mark.parametrize("name", ["stock", "by hand", "keys first", "averages"])
def test_keys_and_values_are_credited_at_once(name: str, x64: None) -> None:
    """Their slopes are those of backpropagation, though no place is credited with another's loss."""
    forward, params, batch = case(name)
    deviations = per_sample(causal=True, discount=0, ridge=1e-7)
    found = jax.jit(natural.value_and_natural_direction(forward, SQUARES, 60, 1e-6, deviations=deviations))
    found = found(params, batch, jax.random.key(1))[1]
    wanted = gradient(forward, params, batch)
    for (path, mine), true in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(mine, true, rtol=1e-3, atol=2e-6, err_msg=jax.tree_util.keystr(path))


def estimates(particles: int, number: int, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """Many estimates of the gradient of two blocks, each credited with its own place's loss, and the gradient."""
    forward, params, batch = case("blocks")
    deviations = per_sample(causal=True, discount=0, **options)
    f = jax.jit(natural.value_and_natural_direction(forward, SQUARES, particles, 1e-6, deviations=deviations))
    found = [flat(f(params, batch, key)[1]) for key in jax.random.split(jax.random.key(1), number)]
    return np.stack(found), flat(gradient(forward, params, batch))


@pytest.mark.parametrize("solve", ["least squares", "covariance"])
def test_what_acts_through_others_is_credited(solve: Any, x64: None) -> None:
    """What lies before attention acts on later places through keys and values: an average ends at the gradient."""
    found, wanted = estimates(100, 36, solve=solve)
    error = lambda rows: np.sqrt(np.mean(np.sum((rows - wanted) ** 2, axis=-1)))
    assert error(found.mean(0)) < 1.5 * error(found) / 6


@pytest.mark.slow
def test_without_it_a_bias_is_left(x64: None) -> None:
    """A place's own loss alone says nothing of keys and values."""
    (found, wanted), (without, _) = estimates(100, 16), estimates(100, 16, mixing=False)
    error = lambda rows: np.linalg.norm(rows.mean(0) - wanted)
    assert error(without) > 1.8 * error(found)


def test_what_others_ask_is_no_credit(x64: None) -> None:
    """Once slopes behind a product are known, what other places change of it is taken off: noise of fewer numbers."""
    found, wanted = estimates(160, 8)
    assert np.sqrt(np.mean(np.sum((found - wanted) ** 2, axis=-1))) < 0.15 * np.linalg.norm(wanted)


def test_few_particles_do_no_harm(x64: None) -> None:
    """Slopes that are mostly noise explain little of what places take, so that little is given."""
    (found, wanted), (without, _) = estimates(12, 12), estimates(12, 12, mixing=False)
    error = lambda rows: np.sqrt(np.mean(np.sum((rows - wanted) ** 2, axis=-1)))
    assert error(found) < 1.2 * error(without)


def test_mixing_is_the_same_on_devices(x64: None) -> None:
    """Particles or samples over devices: slopes behind a product are those of all particles."""
    forward, params, (x, y) = case("blocks")
    batch = (jnp.concatenate([x, x[:1]]), jnp.concatenate([y, y[:1]]))
    settings = {"deviations": per_sample(causal=True, discount=0)}
    value, direction = natural.value_and_natural_direction(forward, SQUARES, 8, 0.01, **settings)(
        params, batch, jax.random.key(1)
    )
    for axes in ({"axis_name": "particles"}, {"batch_axis_name": "batch"}):
        name = next(iter(axes.values()))
        f = natural.value_and_natural_direction(forward, SQUARES, 8, 0.01, **settings, **axes)
        split = jax.tree.map(lambda leaf: leaf.reshape(4, -1, *leaf.shape[1:]), batch) if name == "batch" else batch
        own = 0 if name == "batch" else None
        mapped = jax.vmap(f, in_axes=(None, own, None), axis_name=name, axis_size=4)
        values, found = mapped(params, split, jax.random.key(1))
        np.testing.assert_allclose(values, jnp.full(4, value))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a[3], b, rtol=1e-6, atol=1e-9), found, direction)


def test_credit_reaches_what_is_asked_alone(x64: None) -> None:
    """Of a block's keys and values what lies before them has credit, its own queries and all behind it have none."""
    forward, params, (x, _) = case("blocks")
    seen = Undisturbed.of(forward, params, x, per_sample(causal=True))
    name = lambda u: min(leaf for leaf, _ in seen.points[u].pulls)
    found = {name(u): {name(m) for m in products} for u, products in seen.asked_by().items()}
    leaf = lambda block, kind: f"['MultiHeadDotProductAttention_{block}']['{kind}']['bias']"
    first, second = ({leaf(block, kind) for kind in ("key", "value")} for block in (0, 1))
    assert found["['Embed_0']['embedding']"] == first | second
    assert found[leaf(0, "query")] == found[leaf(0, "key")] == second
    assert found[leaf(1, "query")] == found[leaf(1, "value")] == set()


def test_another_product_for_one_is_an_error(x64: None) -> None:
    """Where the noise of one sample would have no place to go."""
    _, params, batch = case("averages")
    sums = lambda p, x: jnp.tanh(jnp.cumsum(-(x @ p["v"] + p["v_bias"]), axis=1) @ p["k"])
    forward = lambda p, x: averages(p, x) if len(x) > 1 else sums(p, x)
    estimate = natural.value_and_natural_direction(forward, SQUARES, 4, deviations=per_sample(causal=True))
    with pytest.raises(
        ValueError, match=r"\['v'\].*wanted a model that does the same .* or per_sample\(mixing=False\)"
    ):
        jax.eval_shape(estimate, params, batch, jax.random.key(1))


def test_points_lie_at_the_places_that_ask(x64: None) -> None:
    """Of the keys at a query's scores, of the values at what it reads, whichever axis is which."""
    forward, params, (x, _) = case("keys first")
    seen = Undisturbed.of(forward, params, x, per_sample(causal=True))
    leaves = {number: {name for name, _ in point.pulls} for number, point in seen.points.items()}
    shapes = {", ".join(sorted(leaves[number])): point.shape for number, point in seen.points.items()}
    assert shapes == {
        "['k'], ['k_bias']": (SAMPLES, PLACES, PLACES),
        "['q']": (SAMPLES, PLACES, WIDTH),
        "['v']": (SAMPLES, PLACES, WIDTH),
    }
    said = {leaf.name: leaf.reason for leaf in natural.describe(forward, params, x, per_sample(causal=True)).leaves}
    assert {name for name, reason in said.items() if "behind a product that mixes places" in reason} == {
        "['k']",
        "['k_bias']",
        "['v']",
    }
    p = params
    scores = jnp.einsum("btc,bsc->bst", x @ p["k"] + p["k_bias"], x @ p["q"])
    (keys,) = (number for number, names in leaves.items() if "['k']" in names)
    np.testing.assert_allclose(seen.points[keys].value, scores)
    (values,) = (number for number, names in leaves.items() if "['v']" in names)
    weights = jax.nn.softmax(jnp.where(EARLIER == 1, scores, -jnp.inf), axis=2)
    np.testing.assert_allclose(seen.points[values].value, weights @ (0.5 * (x @ p["v"])), atol=1e-12)
