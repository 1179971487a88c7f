"""The localized estimate of the model's derivative, and the step that it gives."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax

import eki_jax
from eki_jax import natural
from eki_jax.flax import TanhRNN, dense_network, low_rank_forward
from eki_jax.kernel.axes import Axes
from eki_jax.natural.deviations.treatment import few_numbers
from eki_jax.natural.draws import Cloud, Seen
from eki_jax.natural.estimates.localized import Columns, Local, Spanned, estimated_jacobian
from eki_jax.natural.estimates.regressions import (
    FactoredEffect,
    FormedEffect,
    Participants,
    Reach,
    least_squares,
    regressions,
)
from eki_jax.natural.estimates.span import centred

SIGMA = 1e-3
SLOW = pytest.mark.slow
LOSS = natural.softmax_cross_entropy()


def estimate(forward: Any, params: Any, x: Any, particles: int, rank: int = 1, antithetic: bool = False) -> Any:
    deviations = natural.low_rank(rank, 0.5)
    cloud = Cloud(deviations, particles, antithetic)
    sigma, fixed = jnp.asarray(SIGMA), {}

    @jax.jit
    def recorded(params: Any) -> Any:
        drawn = cloud.draw(jax.random.key(0), params)
        here, inputs, matrix_of = cloud.see(forward, params, x)
        rows, healthy, number = centred(cloud.evaluate(forward, params, drawn, sigma, x, None), Axes())
        seen = Seen(here, inputs, matrix_of)
        jacobian = estimated_jacobian(deviations, params, drawn, rows, sigma, seen, healthy, number, Axes())
        leaves, fixed["structure"] = jax.tree.flatten(jacobian)
        fixed["leaves"] = [None if isinstance(leaf, jax.Array) else leaf for leaf in leaves]  # shapes and structures
        return [leaf for leaf in leaves if isinstance(leaf, jax.Array)], here, drawn

    arrays, here, drawn = recorded(params)
    leaves = [arrays.pop(0) if leaf is None else leaf for leaf in fixed["leaves"]]
    return jax.tree.unflatten(fixed["structure"], leaves), here, (cloud, drawn)


def formed(jacobian: Any, params: Any) -> np.ndarray:
    """The Jacobian as a matrix, a column for each parameter, in parameter units (the scale is 0.5)."""
    _, unravel = jax.flatten_util.ravel_pytree(params)
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    return np.asarray(jax.jit(jax.vmap(lambda e: jacobian.times(unravel(e))))(jnp.eye(size)).T) / 0.5


def exact(forward: Any, params: Any, x: Any) -> np.ndarray:
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    return np.asarray(jax.jit(jax.jacobian(lambda p: forward(unravel(p), x).ravel()))(flat))


def network(dtype: Any = jnp.float64) -> tuple[Any, Any, Any]:
    x = jax.random.normal(jax.random.key(4), (6, 9), dtype)
    forward, template = low_rank_forward(dense_network((5, 3), jnp.tanh), x, method="logits")
    params = jax.tree.map(lambda m: m.astype(dtype), eki_jax.xavier(template).sample(jax.random.key(1)))
    return forward, params, x


@pytest.mark.parametrize(("rank", "antithetic"), [(1, False), pytest.param(2, True, marks=pytest.mark.slow)])
def test_it_is_close_with_enough_particles(rank: int, antithetic: bool, x64: None) -> None:
    """It is close where there are more particles than numbers that reach a sample."""
    forward, params, x = network()  # 5 + 3 outputs of layers; their biases reach the same: 8 numbers
    truth = exact(forward, params, x)
    errors = []
    for particles in (12, 20, 80):
        jacobian, here, _ = estimate(forward, params, x, (1 + antithetic) * particles, rank, antithetic)
        np.testing.assert_allclose(here, forward(params, x), rtol=1e-10)
        errors.append(np.linalg.norm(formed(jacobian, params) - truth) / np.linalg.norm(truth))
    assert errors[0] < 0.9  # covariances alone: 1.3 and more
    assert errors[1] < 0.25
    assert errors[2] < 0.05


def test_dense_layers_are_local_and_it_pays(x64: None) -> None:
    forward, params, x = network()
    jacobian, _, (cloud, drawn) = estimate(forward, params, x, 100)
    kinds = dict(zip(["bias0", "kernel0", "bias1", "kernel1"], jacobian.parts, strict=True))
    assert isinstance(kinds["kernel0"], Local)
    assert isinstance(kinds["kernel1"], Local)
    assert isinstance(kinds["bias0"], Local)
    truth = exact(forward, params, x)
    plain = jax.jit(cloud.ensemble)(params, drawn, jnp.asarray(SIGMA))
    rows, *_ = centred(jax.jit(eki_jax.evaluate, static_argnums=0)(forward, plain, x), Axes())
    e = np.stack(
        [jax.flatten_util.ravel_pytree(jax.tree.map(lambda u, m: u[j] - m, plain, params))[0] for j in range(100)]
    )
    unlocalized = np.asarray(rows).T @ e * np.sqrt(99) / 99 / (0.5 * SIGMA) ** 2
    error = lambda found: np.linalg.norm(found - truth) / np.linalg.norm(truth)
    assert error(formed(jacobian, params)) < 0.1 * error(unlocalized)


def test_one_layer_by_hand(x64: None) -> None:
    """A sample's slopes are the least squares fit of its outputs to (x a_j) b_j."""
    x = np.random.default_rng(0).normal(size=(3, 4))
    params = {"w": jnp.zeros((4, 2), jnp.float64)}
    forward = lambda p, x: jnp.sin(x @ p["w"])
    jacobian, _, (_, (factors, _)) = estimate(forward, params, jnp.asarray(x), 20)
    a, b = (np.asarray(f)[:, :, 0] for f in factors["w"])
    z = np.sin(SIGMA * np.einsum("bn,jn,jk->jbk", x, a, b))
    z = z - z.mean(axis=0)
    for sample in range(3):
        design = SIGMA * (a @ x[sample])[:, None] * b
        design = design - design.mean(axis=0)
        slope = np.linalg.lstsq(design, z[:, sample])[0].T
        np.testing.assert_allclose(jacobian.parts[0].slopes[sample, :, 0] / 0.5, slope, rtol=1e-6)
    v, r = jnp.ones((4, 2)), jnp.arange(6.0)
    np.testing.assert_allclose(jnp.vdot(jacobian.times({"w": v}), r), jnp.vdot(jacobian.transposed(r)["w"], v))


@pytest.mark.parametrize("places", [1, 2])
def test_large_deviations_hide_no_other_leaf(places: int, x64: None) -> None:
    """A leaf whose deviations are large does not hide the others.

    Few iterations find the same whatever the units of the leaves are.
    """
    keys = jax.random.split(jax.random.key(0), 5)
    outputs, inputs = jax.random.normal(keys[0], (2, 3, 40)), jnp.ones((2, places, 1))
    outputs = all_of(40).centred(outputs)
    left = jax.random.normal(keys[1], (1, 1, 40)), jax.random.normal(keys[2], (1, 1, 40))
    right = jax.random.normal(keys[3], (1, 40, 4)), jax.random.normal(keys[4], (1, 40, 5))
    reaches = [Reach(inputs, *pair) for pair in zip(left, right, strict=True)]
    (first, second), rest = least_squares(outputs, reaches, all_of(40), 3)
    found, left_over = least_squares(outputs, [reaches[0]._replace(left=1000 * left[0]), reaches[1]], all_of(40), 3)
    np.testing.assert_allclose(1000 * found[0], first, rtol=1e-9)
    np.testing.assert_allclose(found[1], second, rtol=1e-9)
    np.testing.assert_allclose(left_over, rest, rtol=1e-9)


def test_both_forms_of_an_effect_are_the_same(x64: None) -> None:
    """Both forms of what reaches a sample are the same.

    By its factors where it does so in one place, formed where in many.
    """
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = (1, 4), (4, 2, 6), (2, 6, 3), (1, 1, 6), (1, 6, 3)
    x, left, right, *vector = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))
    reach = Reach(x[None], left, right, tuple(vector))
    factored, formed = reach.of_sample(x), reach.of_sample(jnp.concatenate([x, 2 * x]))
    assert isinstance(factored, FactoredEffect)
    assert isinstance(formed, FormedEffect)
    numbers = jnp.einsum("n,nrj,rjk->kj", x[0], left, right) + vector[0][0, 0] * vector[1][0].T
    np.testing.assert_allclose(formed.numbers[0], numbers, rtol=1e-12)
    slopes, outputs = jnp.arange(6.0).reshape(2, 1, 3), jnp.arange(12.0).reshape(2, 6)
    one = FormedEffect(numbers[None])
    np.testing.assert_allclose(factored.times(slopes), one.times(slopes), rtol=1e-12)
    np.testing.assert_allclose(factored.transposed(outputs), one.transposed(outputs), rtol=1e-12)


def all_of(particles: int) -> Participants:
    return Participants(jnp.ones(particles), jnp.asarray(float(particles)))


def kinds_of(jacobian: Any, params: Any) -> dict[str, Any]:
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    return dict(zip(names, jacobian.parts, strict=True))


def test_a_bias_has_the_slopes_of_its_layer(x64: None) -> None:
    """In flax's layers, and in those of one's own, however they are written: half the unknowns."""
    forward, params, x = network()
    parts = kinds_of(estimate(forward, params, x, 12)[0], params)
    for layer in ("['Dense_0']", "['Dense_1']"):
        np.testing.assert_array_equal(parts[f"{layer}['bias']"].slopes, parts[f"{layer}['kernel']"].slopes)

    def own(layer: Any) -> Any:
        return lambda p, x: layer(jnp.tanh(layer(x, p["w"], p["a"])), p["v"], p["b"])

    renamed = dict(zip("awbv", jax.tree.leaves(params), strict=True))
    truth = exact(own(natural.affine), renamed, x)
    error = lambda layer: np.linalg.norm(formed(estimate(own(layer), renamed, x, 12)[0], renamed) - truth)
    hidden = lambda x, w, b: x @ w + b[jnp.arange(len(b))]  # a vector that is looked up is none that is added
    for layer in (natural.affine, lambda x, w, b: x @ w + b, jax.vmap(lambda x, w, b: b + w.T @ x, (0, None, None))):
        assert error(layer) < 0.75 * error(hidden)
        np.testing.assert_allclose(own(layer)(renamed, x), forward(params, x), rtol=1e-12)


@pytest.mark.slow
def test_outputs_may_be_a_dictionary(x64: None) -> None:
    """Each sample's numbers are those of all leaves: the estimate is that of the leaves side by side."""
    x = jax.random.normal(jax.random.key(0), (5, 4))
    params = {"v": jnp.ones((3, 2)), "w": jax.random.normal(jax.random.key(1), (4, 3))}
    both = lambda p, x: jnp.concatenate([(h := jnp.tanh(x @ p["w"])), h @ p["v"]], axis=1)
    cut = lambda z: {"hidden": z[:, :3], "out": z[:, 3:].reshape(5, 2, 1)}
    apart = lambda p, x: cut(both(p, x))
    squares = lambda z, y: sum(
        jnp.sum((a - b) ** 2) for a, b in zip(jax.tree.leaves(z), jax.tree.leaves(y), strict=True)
    )
    options = {"particles": 8, "localized": True, "damping": 0.1}
    one = natural.value_and_natural_direction(both, squares, **options)
    two = natural.value_and_natural_direction(apart, squares, **options)
    y, key = jax.random.normal(jax.random.key(2), (5, 5)), jax.random.key(3)
    wanted = one(params, (x, y), key)
    found = two(params, (x, cut(y)), key)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), found, wanted)
    refused = pytest.raises(ValueError, match="samples as the first axis of all")
    with pytest.warns(natural.LocalityWarning), refused:
        natural.value_and_natural_direction(lambda p, x: (both(p, x), x.sum() * p["v"]), squares, **options)(
            params, (x, (y, y[:3, :2])), key
        )


def test_a_shared_vector_is_no_layers_bias(x64: None) -> None:
    """A vector that two matrices share is no layer's bias."""
    x = jax.random.normal(jax.random.key(0), (3, 4))
    params = {"b": jnp.zeros(2), "v": jnp.ones((4, 2)), "w": jnp.ones((4, 2))}
    forward = lambda p, x: natural.affine(x, p["w"], p["b"]) - 3 * natural.affine(x + 1, p["v"], p["b"])
    jacobian, *_ = estimate(forward, params, x, 60)
    np.testing.assert_allclose(formed(jacobian, params), exact(forward, params, x), atol=1e-3)


def joined(p: Any, x: Any) -> Any:
    """What the layers of ``BIASES`` multiply by."""
    return jnp.tensordot(x, p["w"], 1)


BIASES = {
    "in order": (lambda p, x: joined(p, x) + p["bias"], (4, 3, 3), (3, 3), "as its layer"),
    "both reshaped": (
        lambda p, x: joined(p, x).reshape(5, 3, 6) + p["bias"].reshape(2, 3).ravel(),
        (4, 2, 3),
        (6,),
        "as its layer",
    ),
    "both transposed": (
        lambda p, x: joined(p, x).transpose(0, 1, 3, 2) + p["bias"].T,
        (4, 3, 3),
        (3, 3),
        "as its layer",
    ),
    "experts": (lambda p, x: jnp.einsum("btj,tjk->btk", x, p["w"]) + p["bias"], (3, 4, 2), (3, 2), "as its layer"),
    "product transposed": (lambda p, x: joined(p, x).transpose(0, 1, 3, 2) + p["bias"], (4, 3, 3), (3, 3), "local"),
    "bias transposed": (lambda p, x: joined(p, x) + p["bias"].T, (4, 3, 3), (3, 3), "local"),
    "product transposed, then flat": (
        lambda p, x: joined(p, x).transpose(0, 1, 3, 2).reshape(5, 3, 6) + p["bias"],
        (4, 2, 3),
        (6,),
        "local",
    ),
    "along the places": (lambda p, x: joined(p, x) + p["bias"][:, None], (4, 3), (3,), "local"),
    "one number": (lambda p, x: joined(p, x) + p["bias"], (4, 3), (), "local"),
}


def biased(name: str) -> tuple[Any, Any, Any]:
    """The model, its parameters and inputs."""
    layer, of_w, of_bias, _ = BIASES[name]
    params = {"bias": jnp.arange(float(math.prod(of_bias))).reshape(of_bias), "w": jnp.ones(of_w)}
    # No two numbers reach an output alike.
    forward = lambda p, x: (z := layer(p, x).reshape(5, -1)) * jnp.cos(jnp.arange(float(z.shape[1])))
    return forward, params, jax.random.normal(jax.random.key(0), (5, 3, 4), float)


@pytest.mark.parametrize("name", BIASES)
def test_a_bias_that_lies_otherwise_is_alone(name: str) -> None:
    """A bias has its layer's slopes only where each of its numbers is added to the output that has that number."""
    described = natural.describe(*biased(name))
    bias, matrix = described.leaves
    assert (bias.localized, matrix.localized) == (BIASES[name][3], "local")
    assert ("lie otherwise" in bias.reason) == (bias.localized == "local")
    assert not described.lost


@SLOW
@pytest.mark.parametrize("name", BIASES)
def test_biases_in_any_order_are_found(name: str, x64: None) -> None:
    forward, params, x = biased(name)
    size = params["bias"].size
    truth = exact(forward, params, x)[:, :size]
    found = formed(estimate(forward, params, x, 2000)[0], params)[:, :size]
    assert np.linalg.norm(found - truth) < 0.25 * np.linalg.norm(truth)


def dense(h: Any, layer: Any) -> Any:
    """One layer of a stack, as a scan's body."""
    return jnp.tanh(jnp.einsum("...j,jk->...k", h, layer["w"]) + layer["bias"]), None


def experts(h: Any, layer: Any) -> Any:
    """One of several matrices."""
    return jnp.tanh(jnp.einsum("bej,ejk->bek", h, layer["w"]) + layer["bias"]), None


def recurrent(h: Any, layer: Any) -> Any:
    """One over the places of a sample."""
    step = lambda carry, row: ((carry := jnp.tanh(carry + row @ layer["w"] + layer["bias"])), carry)
    return jnp.moveaxis(lax.scan(step, jnp.zeros((5, 3)), jnp.moveaxis(h, 1, 0))[1], 0, 1), None


def backwards(p: Any, x: Any) -> Any:
    """What all layers give."""
    return jnp.moveaxis(lax.scan(lambda h, layer: (dense(h, layer)[0],) * 2, x, p, reverse=True)[1], 0, 1)


STACKS = {
    "one behind the other": (lambda p, x: lax.scan(dense, x, p)[0], (4, 3, 3), (4, 3)),
    "backwards": (backwards, (4, 3, 3), (4, 3)),
    "along the last axis": (
        lambda p, x: lax.scan(dense, x, {**p, "w": jnp.moveaxis(p["w"], -1, 0)})[0],
        (3, 3, 4),
        (4, 3),
    ),
    "in rows": (lambda p, x: lax.scan(lambda h, row: lax.scan(dense, h, row), x, p)[0], (2, 2, 3, 3), (2, 2, 3)),
    "of experts": (lambda p, x: lax.scan(experts, x, p)[0], (4, 2, 3, 3), (4, 2, 3)),
    "of recurrent layers": (lambda p, x: lax.scan(recurrent, x, p)[0], (4, 3, 3), (4, 3)),
}


def stacked(name: str) -> tuple[Any, Any, Any]:
    """The model, its parameters and inputs."""
    forward, of_w, of_bias = STACKS[name]
    keys = jax.random.split(jax.random.key(2), 3)
    params = {"bias": jax.random.normal(keys[0], of_bias), "w": 0.7 * jax.random.normal(keys[1], of_w)}
    return forward, params, jax.random.normal(keys[2], (5, 2, 3))


@pytest.mark.parametrize("name", STACKS)
def test_layers_in_a_scan_are_local(name: str) -> None:
    """Layers whose matrices are one array, of which a loop takes one a turn, are matrices side by side."""
    bias, matrix = natural.describe(*stacked(name)).leaves
    assert (matrix.deviation, matrix.localized) == ("low rank", "local")
    assert bias.localized == ("local" if name == "of recurrent layers" else "as its layer")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n == "of experts" else SLOW) for n in STACKS])
def test_their_derivative_is_found(name: str, x64: None) -> None:
    """Turn by turn, with its transpose."""
    forward, params, x = stacked(name)
    jacobian, *_ = estimate(forward, params, x, 300)
    truth = exact(forward, params, x)
    assert np.linalg.norm(formed(jacobian, params) - truth) < 0.2 * np.linalg.norm(truth)
    v, r = jax.tree.map(jnp.cos, params), jnp.arange(float(len(truth)))
    back = sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(jacobian.transposed(r)), jax.tree.leaves(v), strict=True))
    np.testing.assert_allclose(jnp.vdot(jacobian.times(v), r), back, rtol=1e-9)


def test_places_that_see_the_same_are_solved(x64: None) -> None:
    """Inputs that are multiples of one another leave few unknowns; what rounding puts in does not grow."""
    keys = jax.random.split(jax.random.key(0), 4)
    inputs = jax.random.normal(keys[0], (2, 3, 1)) * jnp.ones(4)
    outputs = all_of(200).centred(jax.random.normal(keys[1], (2, 5, 200)))
    reach = Reach(inputs, jax.random.normal(keys[2], (4, 1, 200)), jax.random.normal(keys[3], (1, 200, 3)))
    slopes, rest = least_squares(outputs, [reach], all_of(200), 3)
    for iterations in (8, 30):
        again, left = least_squares(outputs, [reach], all_of(200), iterations)
        np.testing.assert_allclose(left, rest, atol=1e-9)
        np.testing.assert_allclose(again[0], slopes[0], atol=1e-6)


class Convolutions(nn.Module):
    """Convolutions whose kernels have more rows than a sample has pixels."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.Conv(3, (3, 3), strides=2, padding="SAME")(x)
        return nn.Conv(2, (2, 1), padding="CIRCULAR", kernel_dilation=(1, 2))(x).reshape(len(x), -1)


class NnxConvolution(nnx.Module):
    def __init__(self, rngs: Any) -> None:
        self.layer = nnx.Conv(2, 3, (3, 3), strides=2, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.layer(x).reshape(len(x), -1)


@pytest.mark.parametrize("module", [Convolutions(), NnxConvolution(nnx.Rngs(0))], ids=["linen", "nnx"])
def test_convolutions_are_local_to_their_pixels(module: Any, x64: None) -> None:
    """With more particles than numbers that reach a sample, a linear network's derivative is found."""
    x = jax.random.normal(jax.random.key(4), (3, 4, 4, 2), jnp.float64)
    forward, template = low_rank_forward(module, x)
    params = jax.tree.map(lambda m: m.astype(jnp.float64), eki_jax.xavier(template).sample(jax.random.key(1)))
    jacobian, *_ = estimate(forward, params, x, 200)  # 4 pixels of 3 and 2 channels
    assert {type(part) for part in jacobian.parts} == {Local}
    truth = exact(forward, params, x)
    assert np.linalg.norm(formed(jacobian, params) - truth) < 0.05 * np.linalg.norm(truth)
    v, r = jax.tree.map(lambda m: jnp.cos(jnp.arange(m.size).reshape(m.shape)), params), jnp.arange(float(len(truth)))
    back = sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(jacobian.transposed(r)), jax.tree.leaves(v), strict=True))
    np.testing.assert_allclose(jnp.vdot(jacobian.times(v), r), back, rtol=1e-9)


def convolution(spec: str, out: str = "NHWC", **options: Any) -> Any:
    """A linear model of one convolution."""
    numbers = (out, spec, out)

    def forward(p: Any, x: Any) -> Any:
        settings = {"window_strides": (1, 1), "padding": "VALID"} | options
        return lax.conv_general_dilated(x, p["w"], dimension_numbers=numbers, **settings).reshape(len(x), -1)

    return forward


# Models that are linear in one array, its shape and the inputs': where outputs lie in the kernel, what is strided,
# dilated, grouped, and which axes are summed over. Then the kind of the deviations.
LINEAR = {
    "strides": (convolution("HWIO", window_strides=(2, 2)), (3, 3, 2, 3), (4, 6, 6, 2), "low rank"),
    "dilated": (convolution("OIHW", "NCHW", rhs_dilation=(2, 2)), (3, 2, 3, 3), (4, 2, 6, 6), "low rank"),
    "transposed": (
        convolution("OIHW", "NCHW", lhs_dilation=(2, 2), window_strides=(2, 3), padding=((1, 1), (2, 0))),
        (2, 4, 3, 3),
        (4, 4, 3, 3),
        "low rank",
    ),
    "few outputs": (
        convolution("HWIO", lhs_dilation=(2, 2), padding=((0, 0), (1, 2))),
        (4, 4, 3, 2),
        (4, 3, 3, 3),
        "low rank",
    ),
    "one output": (convolution("OIHW", "NCHW"), (1, 2, 3, 3), (4, 2, 5, 5), "low rank"),
    "groups": (convolution("HWIO", feature_group_count=2), (3, 3, 2, 4), (4, 4, 4, 4), "low rank"),
    "depthwise": (convolution("HWIO", feature_group_count=4), (3, 3, 1, 8), (4, 4, 4, 4), "low rank"),
    "kernel as it is not cut": (
        convolution("OIHW", "NCHW", window_strides=(2, 2)),
        (2, 3, 3, 2),
        (4, 3, 5, 4),
        "formed",
    ),
    "two axes to two": (lambda p, x: jnp.einsum("aij,ijkl->akl", x, p["w"]), (5, 3, 2, 4), (4, 5, 3), "low rank"),
    "two axes, others between": (
        lambda p, x: jnp.einsum("aij,ikjl->akl", x, p["w"]),
        (5, 2, 3, 4),
        (4, 5, 3),
        "low rank",
    ),
    "a matrix for each": (lambda p, x: jnp.einsum("aej,ejk->aek", x, p["w"]), (3, 5, 4), (4, 3, 5), "low rank"),
    "several of one input": (lambda p, x: jnp.einsum("aj,ejk->aek", x, p["w"]), (3, 5, 4), (4, 5), "low rank"),
}


def linear(name: str) -> tuple[Any, Any, Any, str]:
    """The model, its parameters, inputs and the kind of its deviations."""
    forward, shape, of_x, kind = LINEAR[name]
    params = {"w": jax.random.normal(jax.random.key(0), shape, float)}
    return forward, params, jax.random.normal(jax.random.key(1), of_x, float), kind


@pytest.mark.parametrize("name", LINEAR)
def test_products_along_any_axes_are_local(name: str, x64: None) -> None:
    """With more particles than numbers that reach a sample, the derivative is found; the transpose is the transpose."""
    forward, params, x, kind = linear(name)
    (leaf,) = natural.describe(forward, params, x).leaves
    assert (leaf.deviation, leaf.localized) == (kind, "local")
    jacobian, *_ = estimate(forward, params, x, 200)
    size, shape = params["w"].size, params["w"].shape
    columns = lax.map(lambda e: forward({"w": e.reshape(shape)}, x).ravel(), jnp.eye(size))  # of a linear model
    truth = np.asarray(columns).T
    assert np.linalg.norm(formed(jacobian, params) - truth) < 0.05 * np.linalg.norm(truth)
    v, r = {"w": jnp.cos(jnp.arange(float(truth.shape[1]))).reshape(params["w"].shape)}, jnp.arange(float(len(truth)))
    np.testing.assert_allclose(jnp.vdot(jacobian.times(v), r), jnp.vdot(jacobian.transposed(r)["w"], v["w"]), rtol=1e-9)


@pytest.mark.parametrize(("name", "rank"), [*((name, 1) for name in LINEAR), ("groups", 2), ("transposed", 2)])
def test_along_any_axes_low_rank_is_explicit(name: str, rank: int) -> None:
    forward, params, x, _ = linear(name)
    cloud, sigma = Cloud(natural.low_rank(rank, 0.5), 5), jnp.asarray(0.3)
    drawn = cloud.draw(jax.random.key(0), params)
    found = cloud.evaluate(forward, params, drawn, sigma, x, None)
    wanted = jax.vmap(forward, (0, None))(cloud.ensemble(params, drawn, sigma), x)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_what_is_explained_is_no_noise(x64: None) -> None:
    """What dense layers explain is no noise for the others.

    A leaf's plain estimate is made from what the regressions leave; convolutions do not explain it away.
    """
    keys = jax.random.split(jax.random.key(0), 6)
    dense = Reach(jnp.ones((2, 1, 1)), jax.random.normal(keys[0], (1, 1, 60)), jax.random.normal(keys[1], (1, 60, 4)))
    pixels = jax.random.normal(keys[2], (2, 50, 1))
    conv = Reach(pixels, jax.random.normal(keys[3], (1, 1, 60)), jax.random.normal(keys[4], (1, 60, 3)))
    slopes = jax.random.normal(keys[5], (2, 3, 1, 4))
    explained = jnp.stack([dense.of_sample(x).times(v) for x, v in zip(dense.inputs, slopes, strict=True)])
    explained, other = map(all_of(60).centred, (explained, jnp.sin(jnp.arange(60.0)) * jnp.ones((2, 3, 1))))
    (_, found), rest = regressions(explained + other, [conv, dense], all_of(60))
    (_, _), without = regressions(other, [conv, dense], all_of(60))
    np.testing.assert_allclose(rest, without, atol=1e-3)
    assert np.linalg.norm(rest) > 0.9 * np.linalg.norm(other)  # 150 numbers of the convolution would explain it all
    np.testing.assert_allclose(found - regressions(other, [conv, dense], all_of(60))[0][1], slopes, atol=1e-3)


class Mixed(nn.Module):
    """A convolution, a matrix of absolute values, a dense layer that is used twice, and one that is used once."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.tanh(nn.Conv(2, (2,))(x)).reshape(len(x), -1)
        x = nn.tanh(x @ jnp.abs(self.param("mix", nn.initializers.normal(0.3), (x.shape[1], 6), x.dtype)))
        twice = nn.Dense(6)
        return nn.Dense(3)(nn.tanh(twice(nn.tanh(twice(x)))))


@pytest.mark.slow
def test_other_leaves_keep_the_plain_estimate(x64: None) -> None:
    """What is used otherwise than to multiply has a covariance; what multiplies twice is local at both places."""
    x = jax.random.normal(jax.random.key(4), (5, 6, 2), jnp.float64)
    forward, template = low_rank_forward(Mixed(), x)
    params = jax.tree.map(lambda m: m.astype(jnp.float64), eki_jax.xavier(template).sample(jax.random.key(1)))
    jacobian, _, _ = estimate(forward, params, x, 60)
    kinds = kinds_of(jacobian, params)
    assert isinstance(kinds["['Conv_0']['kernel']"], Columns)  # 6 pixels reach more than the kernel's 3 x 2 numbers
    assert isinstance(kinds["['mix']"], Spanned)
    assert isinstance(kinds["['Dense_0']['kernel']"], Local)
    assert isinstance(kinds["['Dense_1']['kernel']"], Local)
    many, _, _ = estimate(forward, params, x, 6000)
    truth = exact(forward, params, x)
    assert np.linalg.norm(formed(many, params) - truth) < 0.25 * np.linalg.norm(truth)
    for j in (jacobian, many):  # the transpose is the transpose
        v, r = jax.tree.map(lambda m: jnp.cos(jnp.arange(m.size).reshape(m.shape)), params), jnp.arange(15.0)
        back = sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(j.transposed(r)), jax.tree.leaves(v), strict=True))
        np.testing.assert_allclose(jnp.vdot(j.times(v), r), back, rtol=1e-9)


@pytest.mark.slow
def test_recurrent_layers_are_local_in_time(x64: None) -> None:
    """Their derivative is closer than without what is known of the time steps, and the step learns."""
    x = jax.random.normal(jax.random.key(4), (5, 3, 4), float)
    forward, template = low_rank_forward(TanhRNN(units=4, outputs=3), x, method="logits")
    params = jax.tree.map(lambda m: m.astype(float), eki_jax.xavier(template).sample(jax.random.key(1)))
    truth = exact(forward, params, x)
    branch = lambda p, x: lax.cond(x.sum() < jnp.inf, lambda: forward(p, x), lambda: jnp.zeros((5, 3)))
    error = lambda f: np.linalg.norm(formed(estimate(f, params, x, 150)[0], params) - truth) / np.linalg.norm(truth)
    assert error(forward) < 0.5 * error(branch)
    solver = natural.natural_gradient(forward, LOSS, 40, damping=1e-3, localized=True)
    state = solver.init(params, jax.random.key(0))
    for _ in range(6):
        state, info = jax.jit(solver.step)(state, (x, jnp.arange(5) % 3))
    assert bool(info.is_finite)
    assert float(LOSS(forward(state.position, x), jnp.arange(5) % 3)) < 0.7 * float(
        LOSS(forward(params, x), jnp.arange(5) % 3)
    )


def test_the_step_solves_the_damped_system(x64: None) -> None:
    forward, params, x = network()
    y = jnp.arange(6) % 3
    options = {"sigma": SIGMA, "damping": 0.02 * SIGMA**2, "deviations": natural.low_rank(1, 0.5)}
    f = natural.value_and_natural_direction(forward, LOSS, 50, **options, localized=True, iterations=200)
    value, direction = jax.jit(f)(params, (x, y), jax.random.key(0))
    np.testing.assert_allclose(value, LOSS(forward(params, x), y))
    jacobian = 0.5 * formed(estimate(forward, params, x, 50)[0], params)
    z = forward(params, x).ravel()
    of_flat = lambda z: LOSS(z.reshape(6, 3), y)
    h, g = np.asarray(jax.hessian(of_flat)(z)), np.asarray(jax.grad(of_flat)(z))
    wanted = 0.5 * np.linalg.solve(jacobian.T @ h @ jacobian + 0.02 * np.eye(jacobian.shape[1]), jacobian.T @ g)
    np.testing.assert_allclose(jax.flatten_util.ravel_pytree(direction)[0], wanted, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_with_many_particles_both_estimates_agree(x64: None) -> None:
    forward, params, x = network()
    batch = (x, jnp.arange(6) % 3)
    directions = [
        jax.jit(
            natural.value_and_natural_direction(
                forward,
                LOSS,
                3000,
                SIGMA,
                0.1 * SIGMA**2,
                natural.low_rank(1, 0.5),
                estimate=kind,
            )
        )(params, batch, jax.random.key(0))[1]
        for kind in (natural.span(), natural.localized(100))
    ]
    a, b = (jax.flatten_util.ravel_pytree(d)[0] for d in directions)
    assert float(jnp.linalg.norm(a - b)) < 0.3 * float(jnp.linalg.norm(b))


def test_failed_particles_are_dropped() -> None:
    """One that fails in the hidden layer has no finite products with the next matrix either."""
    keys = jax.random.split(jax.random.key(1), 3)
    params = {"w": jax.random.normal(keys[0], (9, 5)) / 3, "v": jax.random.normal(keys[1], (5, 3)), "b": jnp.zeros(5)}
    x = jax.random.normal(keys[2], (6, 9))
    rough = lambda p, x: (jnp.tanh(x @ p["w"] + p["b"]) + 0 * jnp.sqrt(p["b"][0] + 0.02)) @ p["v"]
    settings = {"localized": True, "averaging": 0.5, "loss_limit": None}  # the mean may fail where it goes
    solver = natural.natural_gradient(rough, LOSS, 40, **settings)
    state, info = jax.jit(solver.step)(solver.init(params, jax.random.key(0)), (x, jnp.arange(6) % 3))
    assert 0 < int(info.failed) < 40
    assert float(info.predicted) > 0
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(state.position))
    assert bool((state.position["v"] != params["v"]).any())


@pytest.mark.filterwarnings("ignore::eki_jax.natural.LocalityWarning")  # of a vector that is doubled
def test_failed_particles_are_not_regressed(x64: None) -> None:
    """Failed particles do not enter the regression.

    A linear model's derivative is found from those that are left, of matrices and of vectors.
    """
    x = jax.random.normal(jax.random.key(0), (3, 4))
    params = {"b": jnp.zeros(2, jnp.float64), "c": jnp.zeros(2, jnp.float64), "w": jnp.ones((4, 2), jnp.float64)}
    linear = lambda p, x: x @ p["w"] + p["b"] + 2 * p["c"]
    rough = lambda p, x: linear(p, x) + 0 * jnp.sqrt(p["b"][0] + p["c"][1] + SIGMA)  # fails where both are negative
    jacobian, *_ = estimate(rough, params, x, 600)
    np.testing.assert_allclose(formed(jacobian, params), exact(linear, params, x), atol=1e-3)


def test_its_direction_drives_any_optimizer() -> None:
    forward, params, x = network(jnp.float32)
    batch = (x, jnp.arange(6) % 3)
    f = jax.jit(natural.value_and_natural_direction(forward, LOSS, 40, localized=True))
    for tx in (optax.adam(0.05), optax.chain(optax.add_decayed_weights(1e-3), optax.sgd(0.3, momentum=0.5))):
        u, state = params, tx.init(params)
        for count in range(15):
            value, direction = f(u, batch, jax.random.fold_in(jax.random.key(0), count), count)
            updates, state = tx.update(direction, state, u)
            u = optax.apply_updates(u, updates)
        assert float(value) < 0.3 * float(LOSS(forward(params, batch[0]), batch[1]))


def test_bad_settings_are_named() -> None:
    make = lambda **options: natural.natural_gradient(lambda p, x: x @ p, LOSS, 4, localized=True, **options)
    with pytest.raises(ValueError, match=r"localized: True with deviations of full rank"):
        make(deviations=natural.full_rank())
    with pytest.raises(ValueError, match="iterations: 0"):
        make(iterations=0)
    solver = make()
    with pytest.raises(TypeError, match="sees inside of the model"):
        solver.update(solver.init(jnp.ones((3, 2)), jax.random.key(0)), jnp.zeros((4, 5, 2)), jnp.zeros(5, jnp.int32))
    assert solver.passes(4) == 7


@pytest.mark.slow
def test_a_step_can_be_differentiated(x64: None) -> None:
    """In the parameters and in its settings, against central differences; settings are rounded to single precision."""
    keys = jax.random.split(jax.random.key(0), 4)
    x, y = jax.random.normal(keys[0], (6, 3)), jax.random.normal(keys[1], (6, 2))
    params = {"w": jax.random.normal(keys[2], (3, 2)) / 2, "b": jnp.full(2, 0.1)}
    towards = jax.tree.map(jnp.cos, params)
    forward, loss = lambda p, x: jnp.tanh(x @ p["w"] + p["b"]), eki_jax.squared_error()

    def after(settings: dict[str, Any]) -> Any:
        u = jax.tree.map(lambda leaf, t: leaf + settings["along"] * t, params, towards)
        chosen = {name: value for name, value in settings.items() if name != "along"}
        solver = natural.natural_gradient(forward, loss, 12, localized=True, loss_limit=None, **chosen)
        state, info = solver.step(solver.init(u, keys[3]), (x, y))
        return loss(forward(state.position, x), y), info.moved

    at = {"along": 0.0, "sigma": 0.3, "damping": 0.02, "learning_rate": 0.7, "norm_constraint": 0.05}
    value_and_grad = jax.jit(jax.value_and_grad(after, has_aux=True))
    (_, moved), slopes = value_and_grad(at)
    assert bool(moved)
    for name, slope in slopes.items():
        step = 1e-6 if name == "along" else 1e-3 * at[name]
        up, down = (value_and_grad(at | {name: at[name] + sign * step})[0][0] for sign in (1, -1))
        np.testing.assert_allclose(slope, (up - down) / (2 * step), rtol=1e-6 if name == "along" else 1e-3)
        assert abs(float(slope)) > 1e-3


@pytest.mark.parametrize(("x64", "dtype"), [(False, jnp.bfloat16), (True, jnp.float32)])
def test_the_parameters_keep_their_dtype(x64: bool, dtype: Any) -> None:
    """Also where nothing reaches a sample in few numbers: one matrix, multiplied twice."""
    with jax.enable_x64(x64):
        x, params = jnp.ones((6, 5), dtype), {"w": jnp.full((5, 3), 0.1, dtype)}
        for forward, extra in ((lambda p, x: x @ p["w"] + (2 * x) @ p["w"], {}), (lambda p, x: x @ p["w"] + p["b"], 3)):
            u = params | ({"b": jnp.zeros(extra, dtype)} if extra else {})
            solver = natural.natural_gradient(forward, LOSS, 8, localized=True)
            narrow = pytest.warns(UserWarning, match="keeps 7 bits") if dtype == jnp.bfloat16 else nullcontext()
            with narrow:
                start = solver.init(u, jax.random.key(1))
            state, info = jax.jit(solver.step)(start, (x, jnp.arange(6) % 3))
            assert bool(info.is_finite)
            assert jax.tree.map(lambda leaf: leaf.dtype, state.position) == jax.tree.map(lambda leaf: leaf.dtype, u)


@pytest.mark.parametrize(
    ("rows", "places", "told"), [(100, 1, True), (100, 64, True), (100, 65, False), (10, 11, False)]
)
def test_a_convolution_of_few_numbers_is_local(rows: int, places: int, told: bool) -> None:
    """A convolution is local where it gives a sample few numbers."""
    assert few_numbers(64 * rows, places, 64) == told
