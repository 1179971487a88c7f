"""What is said of each leaf, what a step does with it, and the warnings and errors where that is less than it could."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax

from benchmarks import methods, train
from benchmarks.problems import registry
from eki_jax import natural
from eki_jax.flax import TanhRNN, dense_network, low_rank_forward, small_cnn
from eki_jax.kernel.axes import Axes
from eki_jax.natural import affine, describe, low_rank
from eki_jax.natural.draws import Cloud
from eki_jax.natural.estimates.localized import Local, estimated_jacobian
from eki_jax.natural.estimates.span import centred

X = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)
PARAMS = {"b": jnp.full(3, 0.1), "v": jnp.ones((3, 2)), "w": jnp.cos(jnp.arange(9.0)).reshape(3, 3)}
B, V, W = "['b']", "['v']", "['w']"
LOCAL = {B: "as its layer", V: "local", W: "local"}
PLAIN = {B: "local", V: "local", W: "plain estimate"}


def hidden(p: Any, x: Any) -> Any:
    return jnp.tanh(affine(x, p["w"], p["b"]))


def model(layer: Any) -> Any:
    """A model of the layer and a second matrix."""
    return lambda p, x: layer(p, x) @ p["v"]


@jax.custom_vjp
def own_derivative(p: Any, x: Any) -> Any:
    return hidden(p, x)


own_derivative.defvjp(lambda p, x: (hidden(p, x), None), lambda rest, g: (None, None))

HANDLED = {
    "jit": jax.jit(hidden),
    "jit, parameters from outside": lambda p, x: jax.jit(lambda x: hidden(p, x))(x),
    "checkpoint": jax.checkpoint(hidden),
    "checkpoint of jit": jax.checkpoint(jax.jit(hidden)),
    "custom_vjp": own_derivative,
    "vmap over samples": jax.vmap(hidden, (None, 0)),
    "cast": lambda p, x: hidden(jax.tree.map(lambda q: q.astype(jnp.bfloat16), p), x),
    "transposed": lambda p, x: jnp.tanh(x @ p["w"].T + p["b"]),
    "from the left": jax.vmap(lambda p, x: jnp.tanh(p["w"] @ x + p["b"]), (None, 0)),
    "reshaped": lambda p, x: jnp.tanh(
        (x.reshape(-1, 1, 3) @ p["w"].reshape(3, 1, 3).squeeze(1)).reshape(-1, 3) + p["b"]
    ),
    "twice": lambda p, x: hidden(p, hidden(p, x)),
    "sum": lambda p, x: jnp.tanh(p["b"] + (x @ p["w"] + jnp.ones(3))),
    "scan": lambda p, x: lax.scan(lambda h, _: (hidden(p, h), None), x, None, 3)[0],
    "scan backwards": lambda p, x: lax.scan(lambda h, y: (hidden(p, h + y), h), x, jnp.ones((2, 3)), reverse=True)[0],
    "carried": lambda p, x: lax.scan(lambda c, _: ((c[0], hidden(*c)), None), (p, x), None, 3)[0][1],
    "scan of a function called twice": lambda p, x: lax.scan(
        lambda h, _: ((f := jax.jit(hidden))(p, f(p, h)), None), x, None, 1
    )[0],
    "bias with an axis": lambda p, x: jnp.tanh(affine(x, p["w"], p["b"][None].astype(jnp.float16))),
}
PLAINLY = {
    "scan in a while": (
        lambda p, x: lax.fori_loop(
            0, jnp.array(2), lambda _, x: lax.scan(lambda h, _: (hidden(p, h), None), x, None, 2)[0], x
        ),
        "loop",
    ),
    "turns as many as samples": (
        lambda p, x: lax.scan(lambda h, _: (hidden(p, h), None), x, None, 4)[0],
        "of 4 turns, as many as samples",
    ),
    "while": (
        lambda p, x: lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, hidden(p, c[1])), (0, x))[1],
        r"loop \(while\)",
    ),
    "branch": (lambda p, x: lax.cond(x.sum() > 9, lambda: hidden(p, x), lambda: x), r"branch \(cond\)"),
    "rows": (lambda p, x: p["w"][jnp.arange(len(x)) % 3], "by rows"),
    "both ways": (lambda p, x: hidden(p, x) @ p["w"].T, "as it is and as its transpose"),
    "derivative": (lambda p, x: jax.grad(lambda x: hidden(p, x).sum())(x), "as it is and as its transpose"),
    "halved": (lambda p, x: hidden(jax.tree.map(lambda q: 0.5 * q, p), x), "scaled"),
    "beside another": (lambda p, x: x @ jnp.concatenate([p["w"], p["w"]], axis=1)[:, 1:4], "side by side"),
    "sum of two": (lambda p, x: x @ (p["w"] + p["w"]), "side by side"),
    "unused": (lambda p, x: x, "not multiplied"),
}
# Matrices that are added up, and where.
FORMED = {
    "rounded": (lambda p, x: x @ jnp.round(p["w"]), "computed with before"),
    "norm": (lambda p, x: hidden(p, x) / sum(jnp.sum(q**2) for q in jax.tree.leaves(p)), "computed with before"),
    "changed in a loop": (
        lambda p, x: lax.scan(
            lambda c, _: ((jax.tree.map(lambda q: 0.5 * q, c[0]), hidden(*c)), None), (p, x), None, 3
        )[0][1],
        "inside of scan",
    ),
    "solve": (
        lambda p, x: jax.scipy.sparse.linalg.cg(lambda y: y @ p["w"], x, maxiter=2)[0],
        "inside of custom_linear_solve",
    ),
    "product of two": (lambda p, x: x @ (p["w"] @ p["w"]), "computed with before"),
    "whole numbers": (lambda p, x: x @ p["w"].astype(jnp.int32).astype(jnp.float32), "computed with before"),
    "times an array": (lambda p, x: x @ (p["w"] * jnp.arange(9.0).reshape(3, 3)), "computed with before"),
    "divided by": (lambda p, x: x @ (2 / (1 + p["w"])), "computed with before"),
    "with its transpose": (lambda p, x: x @ (p["w"] + p["w"].T), "computed with before"),
    "beside its transpose": (lambda p, x: x @ jnp.concatenate([p["w"], p["w"].T], axis=1)[:, 1:4], "computed with"),
    "raveled": (lambda p, x: (jnp.tile(x, 3) @ p["w"].ravel())[:, None] * jnp.ones(3), "computed with before"),
    "a slice that it chooses": (
        lambda p, x: x @ lax.dynamic_slice(p["w"], (0, p["w"][0, 0].astype(int)), (3, 3)),
        "computed with before",
    ),
}
LOST = {
    "map over samples": (lambda p, x: lax.map(lambda x: hidden(p, x), x), W, "jax.vmap for a loop over samples"),
    "other axis": (lambda p, x: hidden(p, jnp.ones((7, 3))).sum() + x, W, r"shape \(7, 3\)"),
    "computed bias": (lambda p, x: affine(x, p["w"], 1.5 * p["b"]), B, "the leaf itself as the bias"),
}


def localized(found: natural.Description) -> dict[str, str]:
    return {leaf.name: leaf.localized for leaf in found.leaves}


def step(forward: Any, **options: Any) -> Any:
    """One abstract step of the solver, which is traced and warns."""
    solver = natural.natural_gradient(forward, natural.softmax_cross_entropy(), 8, **options)
    state = solver.init(PARAMS, jax.random.key(0))
    return jax.eval_shape(solver.step, state, (X, jnp.zeros(4, jnp.int32)))


@pytest.mark.parametrize("name", HANDLED)
def test_a_layer_in_a_call_is_handled(name: str) -> None:
    """It is as local as without the call, and no step warns."""
    forward = model(HANDLED[name])
    assert localized(describe(forward, PARAMS, X)) == LOCAL
    step(forward, localized=True)


def test_what_such_a_layer_multiplies_is_found() -> None:
    cloud = Cloud(low_rank(1), 4)
    names = ["jit", "checkpoint of jit", "custom_vjp", "vmap over samples", "sum"]

    layers = (hidden, *(HANDLED[name] for name in names))
    first, *others = [cloud.see(model(layer), PARAMS, X)[:2] for layer in layers]
    np.testing.assert_allclose(first[0], model(hidden)(PARAMS, X), rtol=1e-6)
    np.testing.assert_allclose(first[1][W].rows[:, 0], X, rtol=1e-6)
    np.testing.assert_allclose(first[1][V].rows[:, 0], hidden(PARAMS, X), rtol=1e-6)
    for other in others:
        for matrix in (W, V):
            assert other[1][matrix].roles.side == "left"
            rows = other[1][matrix].rows
            assert rows.shape == first[1][matrix].rows.shape
        np.testing.assert_allclose(other[1][W].rows, first[1][W].rows, rtol=1e-6)


@pytest.mark.parametrize("name", PLAINLY)
def test_what_is_plain_by_its_nature_says_why(name: str) -> None:
    """And does not warn."""
    layer, reason = PLAINLY[name]
    found = describe(model(layer), PARAMS, X)
    assert localized(found) == PLAIN
    (leaf,) = [leaf for leaf in found.leaves if leaf.name == W]
    assert re.search(reason, leaf.reason)
    assert not found.lost
    step(model(layer), localized=True)


@pytest.mark.parametrize("name", LOST)
def test_what_is_lost_is_named_in_a_warning(name: str) -> None:
    layer, leaf, words = LOST[name]
    found = describe(model(layer), PARAMS, X)
    assert [lost.name for lost in found.lost] == [leaf]
    with pytest.warns(natural.LocalityWarning, match=words) as caught:
        step(model(layer), localized=True)
    (warning,) = caught
    assert leaf in str(warning.message)
    assert "describe" in str(warning.message)
    step(model(layer))  # in the span nothing is lost


@pytest.mark.parametrize("name", FORMED)
def test_what_is_added_up_says_where(name: str) -> None:
    layer, reason = FORMED[name]
    found = {leaf.name: leaf for leaf in describe(model(layer), PARAMS, X).leaves}
    assert (found[W].deviation, found[W].localized) == ("formed", "plain estimate")
    assert re.search(reason, found[W].reason)
    assert str(describe(model(layer), PARAMS, X)).splitlines()[-1].startswith("a plain estimate wants more particles")
    step(model(layer), localized=True)


@pytest.mark.parametrize("name", [*HANDLED, *PLAINLY, *FORMED, "map over samples"])
def test_low_rank_equals_the_explicit_ensemble(name: str) -> None:
    """However a model is written, its outputs are those of the particles in full."""
    layer = HANDLED.get(name) or (PLAINLY | FORMED | LOST)[name][0]
    cloud, sigma, forward = Cloud(low_rank(2, 0.5), 5), jnp.asarray(0.3), model(layer)
    drawn = cloud.draw(jax.random.key(0), PARAMS)
    found = cloud.evaluate(forward, PARAMS, drawn, sigma, X, None)
    wanted = jax.vmap(forward, (0, None))(cloud.ensemble(PARAMS, drawn, sigma), X)
    rtol, atol = {"cast": (2e-2, 1e-2), "bias with an axis": (1e-3, 1e-3), "solve": (1e-3, 0)}.get(name, (2e-5, 1e-5))
    np.testing.assert_allclose(found, wanted, rtol=rtol, atol=atol)


ARRANGED = {
    "reversed": lambda w: lax.rev(w, (0, 1)),
    "negated": lambda w: -w,
    "taken from": lambda w: 1 - w,
    "a difference": lambda w: w - jnp.ones((3, 3)),
    "a difference of two": lambda w: w - lax.rev(-w, (0,)),
    "repeated": lambda w: jnp.broadcast_to(w[None], (2, 3, 3))[1],
    "cut": lambda w: w[1:, ::2],
    "cut at a computed place": lambda w: lax.dynamic_slice(w, (jnp.argmax(X[:, 0]) // 4 + 1, 0), (2, 3)),
    "taken apart": lambda w: jnp.concatenate(jnp.split(w, [1], axis=1)[::-1], axis=1),
    "divided": lambda w: w / 3,
}


def test_arranged_matrices_keep_their_factors() -> None:
    """A matrix that is cut, turned or put together is not added up, and gives what the particles in full give."""
    cloud, sigma, params = Cloud(low_rank(2, 0.5), 5), jnp.asarray(0.3), {"w": PARAMS["w"]}
    forward = lambda p, x: {name: x[:, : len(w := change(p["w"]))] @ w for name, change in ARRANGED.items()}
    for change in ARRANGED.values():
        (leaf,) = describe(lambda p, x, change=change: x[:, : len(w := change(p["w"]))] @ w, params, X).leaves
        assert leaf.deviation == "low rank"

    @jax.jit
    def both(key: Any) -> Any:
        drawn = cloud.draw(key, params)
        found = cloud.evaluate(forward, params, drawn, sigma, X, None)
        return found, jax.vmap(forward, (0, None))(cloud.ensemble(params, drawn, sigma), X)

    found, wanted = both(jax.random.key(0))
    for name in ARRANGED:
        np.testing.assert_allclose(found[name], wanted[name], rtol=2e-5, atol=1e-5, err_msg=name)


def test_maps_that_change_nothing_are_allowed() -> None:
    for change in (lambda q: q, lax.stop_gradient, jnp.asarray):
        forward = model(lambda p, x, change=change: hidden(jax.tree.map(change, p), x))
        assert localized(describe(forward, PARAMS, X)) == LOCAL


def test_other_deviations_are_described_too() -> None:
    full = describe(model(hidden), PARAMS, X, natural.full_rank())
    assert {(leaf.deviation, leaf.localized) for leaf in full.leaves} == {("formed", "-")}
    formed = describe(model(hidden), PARAMS, X, low_rank(1, formed=True))
    assert [leaf.deviation for leaf in formed.leaves] == ["plain", "formed", "formed"]
    plain = describe(model(hidden), PARAMS, X, low_rank(1, plain=lambda name: "w" in name))
    assert [leaf.deviation for leaf in plain.leaves] == ["plain", "low rank", "plain"]


def test_the_table_is_aligned() -> None:
    shapes = jax.eval_shape(lambda: PARAMS)
    assert str(describe(model(hidden), shapes, jax.ShapeDtypeStruct((4, 3), jnp.float32))) == "\n".join(
        [
            "leaf   shape   deviation  localized step  why: it",
            "['b']  (3,)    plain      as its layer    is added to the product with ['w']",
            "['v']  (3, 2)  low rank   local           is multiplied once a sample",
            "['w']  (3, 3)  low rank   local           is multiplied once a sample",
        ]
    )


class Lifted(nn.Module):
    """A dense layer inside of one of flax's transformations, and one outside."""

    lift: Any

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.Dense(2)(nn.tanh(self.lift(nn.Dense)(3, name="inner")(x)))


class NnxLifted(nnx.Module):
    def __init__(self, lift: Any) -> None:
        self.inner, self.outer = nnx.Linear(3, 3, rngs=nnx.Rngs(0)), nnx.Linear(3, 2, rngs=nnx.Rngs(1))
        self.lift = lift

    def __call__(self, x: Any) -> Any:
        return self.outer(self.lift(lambda layer, x: jnp.tanh(layer(x)))(self.inner, x))


class Stacked(nn.Module):
    """Three layers in one scan, their matrices in one leaf."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        layer = lambda dense, x, _: (nn.tanh(dense(x)), None)
        layers = nn.scan(layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return nn.Dense(2)(layers(nn.Dense(3, name="stack"), x, None)[0])


def lowered(module: Any, x: Any = X, **options: Any) -> tuple[Any, Any]:
    return low_rank_forward(module, x, **options)


@pytest.mark.parametrize(
    "module",
    [
        dense_network((3, 2)),
        Lifted(nn.jit),
        Lifted(nn.remat),
        NnxLifted(lambda f: f),
        NnxLifted(nnx.jit),
        NnxLifted(nnx.remat),
    ],
    ids=["linen", "nn.jit", "nn.remat", "nnx", "nnx.jit", "nnx.remat"],
)
def test_dense_layers_of_flax_are_local(module: Any) -> None:
    forward, template = lowered(module)
    found = localized(describe(forward, template, X))
    assert found == {name: "as its layer" if "bias" in name else "local" for name in found}
    assert len(found) == 4


def test_layers_stacked_for_a_scan_are_sliced() -> None:
    """Each turn of the loop has its own slice of one factor, and the other as it is."""
    forward, template = lowered(Stacked())
    found = describe(forward, template, X)
    assert {leaf.deviation for leaf in found.leaves if "kernel" in leaf.name} == {"low rank"}
    params = jax.tree.map(lambda s: jax.random.normal(jax.random.key(1), s.shape), template)
    cloud, sigma = Cloud(low_rank(1), 5), jnp.asarray(0.5)
    drawn = cloud.draw(jax.random.key(0), params)
    wanted = jax.vmap(forward, (0, None))(cloud.ensemble(params, drawn, sigma), X)
    np.testing.assert_allclose(cloud.evaluate(forward, params, drawn, sigma, X, None), wanted, rtol=1e-4, atol=1e-5)


def test_a_convolutional_network_of_flax() -> None:
    x = jax.ShapeDtypeStruct((5, 28, 28, 1), jnp.float32)
    forward, template = lowered(small_cnn(), x, method="logits")
    for each in (forward, jax.checkpoint(forward)):
        first, kernel, _, second, *_ = describe(each, template, x).leaves
        assert (first.localized, kernel.localized, kernel.places) == ("local", "plain estimate", 24 * 24)
        assert kernel.reason == "is multiplied at 576 places of a sample: 4608 numbers, worth it up to 200"
        assert (second.name, second.localized, second.places) == ("['Conv_1']['kernel']", "local", 64)
    images = jax.vmap(lambda p, x: forward(p, x[None])[0], (None, 0))
    assert describe(images, template, x) == describe(forward, template, x)


def test_one_image_has_no_axis_of_samples() -> None:
    """A convolution of images one by one is local under ``vmap`` only."""
    x = jnp.ones((3, 4, 4, 2))
    forward, template = lowered(nn.Conv(3, (3, 3), strides=2), x)
    one = lambda p, x: forward(p, x[0])
    (lost,) = describe(one, template, x).lost
    assert lost.name == "['kernel']"
    assert not describe(jax.vmap(forward, (None, 0)), template, x).lost


def test_a_recurrent_network_is_local() -> None:
    """A matrix is multiplied once a time step, and a loop around another has the turns of both."""
    x = jnp.ones((5, 3, 4))
    forward, template = lowered(TanhRNN(units=4, outputs=3), x, method="logits")
    found = describe(forward, template, x)
    assert {leaf.localized for leaf in found.leaves} == {"local", "as its layer"}
    assert {leaf.places for leaf in found.leaves if "kernel" in leaf.name} == {1, 3}
    long = jnp.ones((5, 9, 4))  # more numbers than the matrix has
    assert "at 9 places of a sample: 36 numbers, worth it up to 16" in str(describe(forward, template, long))
    inner = lambda p: lambda h, _: (hidden(p, h), None)
    nested = model(lambda p, x: lax.scan(lambda h, _: lax.scan(inner(p), h, None, 3), x, None, 1)[0])
    assert localized(describe(nested, PARAMS, X)) == LOCAL


def test_rows_of_a_loop_are_those_of_its_turns() -> None:
    """Those of the same layers in line, the time steps one after the other."""
    looped = model(HANDLED["scan"])
    inline = model(lambda p, x: hidden(p, hidden(p, hidden(p, x))))
    cloud = Cloud(low_rank(1), 4)
    found, wanted = (jax.jit(lambda p, f=f: cloud.see(f, p, X).met[W].rows)(PARAMS) for f in (looped, inline))
    assert found.shape == (4, 3, 3)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


@pytest.mark.parametrize("name", ["jit", "scan", "rows", "computed bias"])
@pytest.mark.filterwarnings("ignore::eki_jax.natural.LocalityWarning")
def test_the_estimate_does_what_is_said(name: str) -> None:
    layer = HANDLED.get(name) or (PLAINLY | LOST)[name][0]
    forward, deviations = model(layer), low_rank(1, 0.5)
    cloud, sigma, kinds = Cloud(deviations, 12), jnp.asarray(0.1), []
    shared: dict[str, str] = {}

    def traced(p: Any) -> None:
        drawn = cloud.draw(jax.random.key(0), p)
        seen = cloud.see(forward, p, X)
        rows, healthy, number = centred(cloud.evaluate(forward, p, drawn, sigma, X, None), Axes())
        jacobian = estimated_jacobian(deviations, p, drawn, rows, sigma, seen, healthy, number, Axes())
        kinds.extend(isinstance(part, Local) for part in jacobian.parts)
        shared.update(seen.matrix_of)

    jax.eval_shape(traced, PARAMS)
    said = describe(forward, PARAMS, X).leaves
    assert kinds == [leaf.localized != "plain estimate" for leaf in said]
    assert shared == {leaf.name: leaf.layer for leaf in said if leaf.localized == "as its layer"}


def test_the_training_command_prints_it_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Any
) -> None:
    def stop(*args: Any, **options: Any) -> Any:
        raise ValueError("here")

    monkeypatch.setattr(train, "fit", stop)
    for number, (method, quiet) in enumerate(
        [("natural-eki-lowrank", []), ("natural-eki-lowrank", ["--quiet"]), ("natural-eki", [])]
    ):
        assert train.main(["--method", method, "--out", str(tmp_path / str(number)), *quiet]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.count("localized step") == int(number == 0)
    problem = registry.get("digits-dnn")
    wanted = describe(problem.logits, problem.template, problem.train[0][:7])
    assert methods.describe("natural-eki-lowrank", problem, 7) == wanted
