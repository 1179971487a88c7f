"""Low-rank deviations, never formed, are exactly the ensemble that they would make if they were."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import eki_jax
from eki_jax import natural
from eki_jax.flax import TanhRNN, dnn4, linen_forward, low_rank_forward, nnx_forward
from eki_jax.natural import LowRankMatrix
from eki_jax.natural.draws import Cloud

J = 4


def explicit(forward: Any, params: Any, x: Any, rank: int = 1, **options: Any) -> tuple[Any, Any, Any, Any]:
    """Outputs with the factors and with the full ensemble built from the same factors, and the cloud."""
    cloud = Cloud(natural.low_rank(rank, **options), J)
    drawn, sigma = cloud.draw(jax.random.key(0), params), jnp.asarray(0.3)
    found = cloud.evaluate(forward, params, drawn, sigma, x, 2)
    return found, jax.jit(cloud.ensemble)(params, drawn, sigma), cloud, drawn


def check_module(module: Any, x: Any, rank: int = 1, method: str | None = None, **options: Any) -> None:
    if isinstance(module, nnx.Module):
        plain, template = nnx_forward(module, method=method or "__call__")
        forward, found_template = low_rank_forward(module, method=method)
    else:
        plain, template = linen_forward(module, x, method=method)
        forward, found_template = low_rank_forward(module, x, method=method)
    assert jax.tree.structure(template) == jax.tree.structure(found_template)
    params = jax.tree.map(lambda m: m.astype(jnp.float64), eki_jax.xavier(template).sample(jax.random.key(1)))
    found, ensemble = jax.jit(lambda p: explicit(forward, p, x, rank, **options)[:2])(params)
    wanted = jax.jit(lambda u: eki_jax.evaluate(plain, u, x, chunk_size=1))(ensemble)
    np.testing.assert_allclose(found, wanted, rtol=1e-8, atol=1e-10)
    assert np.abs(found - found[:1]).max() > 1e-3  # the particles do differ
    np.testing.assert_allclose(forward(params, x), plain(params, x), rtol=1e-10)  # and arrays are taken as well


class Layers(nn.Module):
    """Layers of every kind that can be disturbed, with biases and the scales of norms."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.relu(nn.Conv(4, (3, 3), strides=2)(x))
        x = nn.relu(nn.Conv(6, (3, 3), feature_group_count=2, padding="CIRCULAR")(x))
        x = nn.GroupNorm(num_groups=2)(x).reshape(len(x), -1)
        embed = nn.Embed(7, 5)
        x = nn.LayerNorm()(nn.Dense(5)(x)) + embed(jnp.arange(len(x)) % 7)
        return jnp.concatenate([nn.Dense(3, use_bias=False)(x), embed.attend(x)], axis=1)


class Cells(nn.Module):
    """Recurrent cells of flax's own."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.RNN(nn.LSTMCell(5, param_dtype=jnp.float64))(x)
        return nn.RNN(nn.GRUCell(4, param_dtype=jnp.float64))(x)[:, -1]


IMAGES = np.random.default_rng(0).normal(size=(2, 6, 6, 2))
SEQUENCES = np.random.default_rng(1).normal(size=(2, 3, 4))


@pytest.mark.parametrize("rank", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_linen_layers(rank: int, x64: None) -> None:
    check_module(Layers(), jnp.asarray(IMAGES), rank)


@pytest.mark.slow
def test_recurrent_networks(x64: None) -> None:
    check_module(TanhRNN(units=4, outputs=3), jnp.asarray(SEQUENCES), method="logits")
    check_module(Cells(), jnp.asarray(SEQUENCES), 1)


class Nnx(nnx.Module):
    """The same layers in flax's other API, some of them in a list."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        types = {"param_dtype": jnp.float64, "rngs": rngs}
        self.convolutions = nnx.List(
            [
                nnx.Conv(2, 4, (3, 3), strides=2, **types),
                nnx.Conv(4, 6, (3, 3), feature_group_count=2, padding="CIRCULAR", **types),
            ]
        )
        self.dense = nnx.Linear(54, 5, **types)
        self.norm = nnx.LayerNorm(5, **types)
        self.embed = nnx.Embed(7, 5, **types)

    def __call__(self, x: Any) -> Any:
        for convolution in self.convolutions:
            x = nnx.relu(convolution(x))
        x = self.norm(self.dense(x.reshape(len(x), -1))) + self.embed(jnp.arange(len(x)) % 7)
        return self.embed.attend(x)


class NnxRecurrent(nnx.Module):
    """A recurrent cell in nnx."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.rnn = nnx.RNN(nnx.SimpleCell(4, 5, dtype=jnp.float64, param_dtype=jnp.float64, rngs=rngs), rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.rnn(x)[:, -1]


def test_nnx_layers(x64: None) -> None:
    module = Nnx(nnx.Rngs(0))
    check_module(module, jnp.asarray(IMAGES), 2)
    assert type(module.embed) is nnx.Embed  # the caller's module is as it was


@pytest.mark.slow
def test_nnx_recurrent_networks(x64: None) -> None:
    check_module(NnxRecurrent(nnx.Rngs(0)), jnp.asarray(SEQUENCES))


class Unusual(nn.Module):
    """Matrices that no usual layer holds: one of its own, and the kernels of attention."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.Dense(4)(x)
        x = nn.MultiHeadDotProductAttention(2)(x @ self.param("mixing", nn.initializers.ones, (4, 4)))
        return nn.DenseGeneral((3, 2), axis=(-2, -1))(x.reshape(*x.shape[:-1], 2, 2))


@pytest.mark.parametrize("kind", ["linen", "masked", "nnx"])
def test_any_layer_takes_its_factors(kind: str, x64: None) -> None:
    """With none of them named ``plain``."""
    x = jnp.ones((2, 4, 2))
    module: Any = {
        "linen": Unusual(),
        "masked": nn.Conv(3, (2,), mask=jnp.ones((2, 2, 3))),
        "nnx": nnx.LinearGeneral(2, (3, 2), use_bias=False, rngs=nnx.Rngs(0)),
    }[kind]
    check_module(module, x)
    check_module(module, x, plain=lambda name: "kernel" in name)


def test_plain_pytrees_need_no_adapter(x64: None) -> None:
    keys = jax.random.split(jax.random.key(2), 4)
    params = {
        "embedding": jax.random.normal(keys[0], (5, 3)),
        "w": jax.random.normal(keys[1], (3, 4)),
        "v": jax.random.normal(keys[2], (2, 4)),
        "b": jnp.zeros(4),
        "gain": jnp.ones(()),
    }

    def forward(p: Any, index: Any) -> Any:
        x = jnp.tanh(p["gain"] * (p["embedding"][index] @ p["w"] + p["b"]))
        x = x @ p["v"].T + (p["v"] @ x.T).T
        return jnp.einsum("bn,nk->bk", x, p["v"]) + p["w"][0, 1] * p["w"][1:, ::2].sum(0).repeat(2)

    for rank in (1, 2):
        found, ensemble, _, _ = explicit(forward, params, jnp.array([0, 3, 4]), rank)
        wanted = eki_jax.evaluate(forward, ensemble, jnp.array([0, 3, 4]))
        np.testing.assert_allclose(found, wanted, rtol=1e-9)


def test_matrices_can_be_formed(x64: None) -> None:
    """Matrices can be formed for models that do other things."""
    params = {"w": jax.random.normal(jax.random.key(2), (3, 4))}
    rounded = lambda p, x: x @ jnp.round(4 * p["w"]) / 4
    found, ensemble, _, _ = explicit(rounded, params, jnp.ones((2, 3)), formed=True)
    np.testing.assert_allclose(found, eki_jax.evaluate(rounded, ensemble, jnp.ones((2, 3))), rtol=1e-9)


@pytest.mark.parametrize("rank", [1, 3])
def test_a_step_is_that_of_the_explicit_ensemble(rank: int, x64: None) -> None:
    """The update A^T diag(w) B is the sum over the particles that ``ensemble`` forms."""
    params = {"w": jax.random.normal(jax.random.key(2), (5, 3)), "b": jnp.zeros(3), "k": jnp.ones((2, 2, 3, 4))}
    params = jax.tree.map(lambda m: m.astype(jnp.float64), params)
    cloud = Cloud(natural.low_rank(rank, 0.5), 6, antithetic=True)
    drawn, weights = cloud.draw(jax.random.key(0), params), jax.random.normal(jax.random.key(1), (6,))
    u = jax.jit(cloud.ensemble)(params, drawn, jnp.asarray(1.0))
    wanted = jax.tree.map(lambda e, m: jnp.tensordot(weights, e - m, axes=1), u, params)
    found = cloud.combine(params, drawn, weights)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), found, wanted)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_deviations_have_their_scale_and_rank(rank: int) -> None:
    """Deviations have the scale and rank they should."""
    params = {"w": jnp.zeros((40, 30)), "bias": jnp.zeros(30)}
    cloud = Cloud(natural.low_rank(rank, 0.5), 200)
    e = jax.jit(cloud.ensemble)(params, cloud.draw(jax.random.key(0), params), jnp.asarray(1.0))
    assert jnp.std(e["w"]) == pytest.approx(0.5, rel=0.05)
    assert jnp.std(e["bias"]) == pytest.approx(0.5, rel=0.05)
    assert int(jnp.linalg.matrix_rank(e["w"][0])) == rank
    # by default, Xavier's
    e = Cloud(natural.low_rank(rank), 200)
    e = jax.jit(e.ensemble)(params, e.draw(jax.random.key(0), params), jnp.asarray(1.0))
    assert jnp.std(e["w"]) == pytest.approx((2 / 70) ** 0.5, rel=0.05)


def test_a_matrix_is_what_it_says() -> None:
    w = LowRankMatrix(jnp.zeros((2, 3)), jnp.ones((2, 1)), jnp.ones((3, 1)), name="w")
    assert (w.shape, w.ndim, w.dtype) == ((2, 3), 2, jnp.float32)
    assert len(jax.tree.leaves(w)) == 3
    np.testing.assert_allclose(w @ jnp.ones(3), w.dense() @ jnp.ones(3))
    with pytest.raises(TypeError, match="has 3 axes"):
        _ = LowRankMatrix(jnp.zeros((2, 2, 3)), jnp.ones((2, 2, 1)), jnp.ones((3, 1))).T
    with pytest.raises(TypeError, match="mapped over"):
        LowRankMatrix(jnp.zeros((2, 3)), jnp.ones((5, 2, 1)), jnp.ones((3, 1))).dense()


@pytest.mark.slow
def test_the_ensemble_never_exists() -> None:
    """A step with 1,000 particles of 573,910 parameters, which are 2.3 GB, is compiled for a tenth of that."""
    forward, template = low_rank_forward(dnn4(), jnp.zeros((1, 784)), method="logits")
    taken = {}
    for name, deviations in (("low", natural.low_rank(1)), ("full", natural.full_rank())):
        solver = natural.natural_gradient(forward, natural.softmax_cross_entropy(), 1000, deviations=deviations)
        state = jax.eval_shape(solver.init, template_of_arrays(template), jax.random.key(0))
        batch = (jax.ShapeDtypeStruct((1000, 784), jnp.float32), jax.ShapeDtypeStruct((1000,), jnp.int32))
        taken[name] = jax.jit(solver.step).lower(state, batch).compile().memory_analysis().temp_size_in_bytes
    assert taken["low"] < 0.5e9 < 2.2e9 < taken["full"]


def template_of_arrays(template: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), template)


@pytest.mark.parametrize(
    ("scale", "error", "message"),
    [
        ("glorot", ValueError, "scale: 'glorot'; wanted 'xavier', numbers, or a prior"),
        ({}, TypeError, r"scale: {}; wanted numbers > 0"),
        (-1.0, ValueError, r"scale: -1\.0"),
        ({"w": np.array([1.0, 0.0])}, ValueError, r"scale\['w'\]: numbers that are not finite and > 0"),
        ({"other": 1.0}, ValueError, "scale: its structure does not fit the parameters'"),
    ],
)
def test_a_scale_that_does_not_fit_is_named(scale: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        natural.low_rank(1, scale).scales({"w": jnp.ones((2, 2))})
