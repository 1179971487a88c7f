"""Models evaluated in bfloat16: which products are, what stays as it is, and what it costs."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.custom_batching import sequential_vmap
from jax.extend.core import jaxprs_in_params
from solvers import test_battery as battery

import eki_jax
from eki_jax.flax import TanhRNN, cnn_mnist, dense_network, linen_forward
from eki_jax.kernel.interpreter import narrowed


def products(fn: Any, *args: Any) -> list[tuple[str, ...]]:
    """The dtypes of every product's factors and result in a function's trace."""

    def of(jaxpr: Any) -> list[tuple[str, ...]]:
        found = []
        for eqn in jaxpr.eqns:
            if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
                found.append(tuple(str(var.aval.dtype) for var in (*eqn.invars, *eqn.outvars)))
            for inner in jaxprs_in_params(eqn.params):
                found += of(inner)
        return found

    return of(jax.make_jaxpr(fn)(*args).jaxpr)


NARROW = ("bfloat16", "bfloat16", "float32")
A = jnp.asarray(np.random.default_rng(0).normal(size=(4, 4)), jnp.float32)


@jax.custom_jvp
def with_a_rule(a: jax.Array) -> jax.Array:
    return a @ a


with_a_rule.defjvp(lambda primals, tangents: (with_a_rule(*primals), 0 * tangents[0]))

PLACES = {
    "call": jax.jit(lambda a: jnp.tanh(a @ a)),
    "custom": with_a_rule,
    "checkpoint": jax.checkpoint(lambda a: a @ a),
    "mapped": jax.vmap(sequential_vmap(lambda row: row @ A)),
    "scan": lambda a: jax.lax.scan(lambda c, row: (jnp.tanh(c + row @ a), row), a[0], a)[0],
    "while": lambda a: jax.lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, jnp.tanh(c[1] @ a)), (0, a))[1],
    "branch": lambda a: jax.lax.cond(a[0, 0] > 0, lambda: a @ a, lambda: a.T @ a),
    "convolution": lambda a: jax.lax.conv(a[None, None], a[None, None, :2, :2], (1, 1), "SAME"),
}


@pytest.mark.parametrize("place", PLACES)
def test_products_are_narrow_wherever_they_are(place: str) -> None:
    """Their factors are bfloat16 and their sums float32; the values are near, and not the same."""
    fn = PLACES[place]
    found = products(narrowed(fn), A)
    assert found == [NARROW] * len(products(fn, A)) != []
    exact, near = fn(A), narrowed(fn)(A)
    assert near.dtype == exact.dtype == jnp.float32
    assert 1e-5 < float(jnp.linalg.norm(near - exact) / jnp.linalg.norm(exact)) < 2e-2


KEPT = {
    "highest": lambda a: jnp.matmul(a, a, precision="highest"),
    "whole": lambda a: (1000 * a).astype(jnp.int32) @ (1000 * a).astype(jnp.int32),
    "no_product": lambda a: jnp.sum(a * a, axis=0) + 1e-9,
}


@pytest.mark.parametrize("kept", KEPT)
def test_all_else_stays_as_it_is(kept: str) -> None:
    """Products whose precision is named, those of whole numbers, and what multiplies one by one."""
    np.testing.assert_array_equal(narrowed(KEPT[kept])(A), KEPT[kept](A))


def test_products_keep_the_dtype_they_had() -> None:
    """Whatever goes in, a product's result has the dtype that it had."""
    with jax.enable_x64(True):
        for dtype in (jnp.float64, jnp.float16, jnp.bfloat16):
            found = narrowed(lambda a: a @ a)(A.astype(dtype))
            assert found.dtype == dtype
    assert products(narrowed(lambda a: a @ a), A.astype(jnp.float16)) == [NARROW]


MODELS = {
    "dense": (dense_network((8, 3)), (5, 7)),
    "cnn": (cnn_mnist(), (2, 28, 28, 1)),
    "rnn": (TanhRNN(), (2, 4, 28)),
}


@pytest.mark.parametrize("model", MODELS)
def test_flax_networks_in_bfloat16(model: str) -> None:
    """Every product of a network is narrow; the probabilities are float32, and sum to 1 as closely as before."""
    module, shape = MODELS[model]
    x = jax.random.normal(jax.random.key(1), shape)
    forward, template = linen_forward(module, x)
    ensemble = eki_jax.sample_ensemble(jax.random.key(0), eki_jax.xavier(template), 4)
    evaluated = lambda precision: lambda e, x: eki_jax.evaluate(forward, e, x, chunk_size=2, precision=precision)
    assert set(products(evaluated("bf16"), ensemble, x)) == {NARROW}
    assert set(products(evaluated(None), ensemble, x)) == {("float32",) * 3}
    outputs = evaluated("bf16")(ensemble, x)
    assert outputs.dtype == jnp.float32
    np.testing.assert_allclose(outputs.sum(axis=-1), 1, atol=1e-6)


@pytest.mark.parametrize("name", battery.SOLVERS)
def test_steps_in_bfloat16(name: str) -> None:
    """A step multiplies in bfloat16 in the model too, and its state and what it reports stay what they are."""
    row = battery.SOLVERS[name]
    if ("precision", name) in battery.REFUSED or name == "natural_per_sample":
        with pytest.raises(TypeError, match="precision: 'bf16'"):
            row.make(battery.forward, precision="bf16")
        return
    solver, exact = (row.make(battery.forward, precision=precision) for precision in ("bf16", None))
    state = jax.eval_shape(lambda key: battery.started(row, exact, key), battery.KEY)
    dtypes = lambda solver: jax.tree.map(lambda leaf: leaf.dtype, jax.eval_shape(solver.step, state, battery.BATCH))
    assert dtypes(solver) == dtypes(exact)
    # The model's own products, of one particle at least: the others are told by what they share with the exact step.
    model = products(lambda s: eki_jax.evaluate(battery.forward, exact.ensemble(s), battery.X), state)
    count = lambda solver: products(solver.step, state, battery.BATCH).count(NARROW)
    assert count(solver) >= len(model) > count(exact) == 0


def test_a_step_in_bfloat16_is_near() -> None:
    """Three steps lead within a hundredth of where they lead in float32, and not to the same bits."""
    r = battery.run("euler")
    solver, state = r.row.make(battery.forward, precision="bf16"), r.start
    for _ in range(3):
        state, _ = battery.compiled(solver.step)(state, battery.BATCH)
    flat = lambda ensemble: jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(ensemble)])
    moved = lambda state: flat(state[0]) - flat(r.start[0])
    exact = moved(r.states[3])
    assert 1e-5 < float(jnp.linalg.norm(moved(state) - exact) / jnp.linalg.norm(exact)) < 1e-2


def test_an_unknown_precision_names_others() -> None:
    """In every call that takes one."""
    known = "precision: 'half'; wanted None, 'bf16', or what jax.numpy.matmul takes"
    for call in (
        lambda: eki_jax.evaluate(battery.forward, battery.particles(), battery.X, precision="half"),
        lambda: eki_jax.value_and_direction(battery.forward, battery.LOSS, precision="half"),
        lambda: eki_jax.euler(battery.forward, battery.LOSS, precision="half"),
        lambda: eki_jax.optax.value_and_extra_args(battery.forward, battery.LOSS, precision="half"),
    ):
        with pytest.raises(ValueError, match=known):
            call()
