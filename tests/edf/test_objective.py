"""The matrix products against explicit matrices, and the sums over slices against the whole batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from eki_jax.edf import Objective

SAMPLES, INPUTS, HIDDEN, CLASSES = 7, 3, 4, 3


def network(params: dict, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["first"] + params["bias"]) @ params["second"]


def cross_entropy(outputs: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(outputs, labels).mean()


def total_squared_error(outputs: jax.Array, labels: jax.Array) -> jax.Array:
    return 0.5 * jnp.sum((outputs - jax.nn.one_hot(labels, CLASSES)) ** 2)


def problem() -> tuple[dict, tuple[jax.Array, jax.Array], dict]:
    rng = np.random.default_rng(0)
    shapes = {"first": (INPUTS, HIDDEN), "bias": (HIDDEN,), "second": (HIDDEN, CLASSES)}
    draw = lambda: {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}
    batch = (jnp.asarray(rng.normal(size=(SAMPLES, INPUTS))), jnp.asarray(rng.integers(0, CLASSES, SAMPLES)))
    return draw(), batch, draw()


def explicit_matrices(params: dict, batch: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """G from the Jacobian and the paper's output Hessian (diag(p) - p p^T) / n, and H from jax.hessian."""
    flat, unravel = ravel_pytree(params)
    outputs = lambda vector: network(unravel(vector), batch[0]).ravel()
    jacobian = jax.jacobian(outputs)(flat)
    blocks = [(jnp.diag(p) - jnp.outer(p, p)) / SAMPLES for p in jax.nn.softmax(network(params, batch[0]))]
    hessian = jax.hessian(lambda vector: cross_entropy(network(unravel(vector), batch[0]), batch[1]))(flat)
    return jacobian.T @ jax.scipy.linalg.block_diag(*blocks) @ jacobian, hessian


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_products_are_those_of_matrices(x64: None, chunk_size: int | None) -> None:
    """Products are those of the explicit matrices."""
    params, batch, vector = problem()
    objective = Objective(network, cross_entropy, chunk_size=chunk_size)
    flat = np.asarray(ravel_pytree(vector)[0])
    gauss_newton, hessian = jax.jit(explicit_matrices)(params, batch)
    assert np.abs(gauss_newton - hessian).max() > 0.01
    for matrix, product_of in [(gauss_newton, objective.gauss_newton), (hessian, objective.hessian)]:
        product = jax.jit(lambda p, b, v, product_of=product_of: ravel_pytree(product_of(p, b)(v))[0])
        np.testing.assert_allclose(product(params, batch, vector), matrix @ flat, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(("loss", "reduction"), [(cross_entropy, "mean"), (total_squared_error, "sum")])
@pytest.mark.parametrize("chunk_size", [1, 3, 7])
def test_slices_add_up_to_the_batch(x64: None, loss: object, reduction: str, chunk_size: int) -> None:
    params, batch, _ = problem()
    whole = Objective(network, loss).value_and_grad(params, batch)
    sliced = Objective(network, loss, chunk_size, reduction).value_and_grad(params, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14), sliced, whole)
    value = Objective(network, loss, chunk_size, reduction).value(params, batch)
    np.testing.assert_allclose(value, whole[0], rtol=1e-12)


def test_memory_follows_the_slice() -> None:
    """Memory follows the slice and not the batch."""
    params = {"first": jnp.ones((8, 64)), "bias": jnp.ones(64), "second": jnp.ones((64, 3))}

    def peak(samples: int, chunk_size: int | None) -> int:
        objective = Objective(network, cross_entropy, chunk_size)
        product = lambda params, batch, vector: objective.gauss_newton(params, batch)(vector)
        batch = (jax.ShapeDtypeStruct((samples, 8), jnp.float32), jax.ShapeDtypeStruct((samples,), jnp.int32))
        return jax.jit(product).lower(params, batch, params).compile().memory_analysis().temp_size_in_bytes

    whole, sliced = peak(4096, None), peak(4096, 128)
    assert whole > 4096 * 64 * 4  # at least one hidden layer of the whole batch
    assert sliced < whole / 4


def test_types_of_the_parameters_are_kept() -> None:
    params, batch, vector = jax.tree.map(
        lambda leaf: leaf.astype(jnp.bfloat16) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, problem()
    )
    for chunk_size in (None, 3):
        objective = Objective(network, cross_entropy, chunk_size)
        both = lambda p, b, v, o=objective: (o.value_and_grad(p, b)[1], o.gauss_newton(p, b)(v))
        results = jax.eval_shape(both, params, batch, vector)
        assert {leaf.dtype for leaf in jax.tree.leaves(results)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"chunk_size": 0}, "chunk_size: 0; wanted a whole number, at least 1, or None for the whole batch"),
        ({"chunk_size": 2.0}, "chunk_size: 2.0; wanted a whole number"),
        ({"reduction": "max"}, "reduction: 'max'; wanted 'mean', 'sum' or None"),
        ({"forward": 3}, "forward: 3; wanted a model"),
    ],
)
def test_bad_options_are_named(options: dict, words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        Objective(**{"forward": network, "loss": cross_entropy} | options)


def test_bad_losses_and_batches_are_named() -> None:
    params, batch, _ = problem()
    with pytest.raises(ValueError, match=r"loss: returned shape \(7,\); wanted a scalar"):
        Objective(network, optax.softmax_cross_entropy_with_integer_labels).value(params, batch)
    with pytest.raises(ValueError, match=r"batch: leading axes \[\(6,\), \(7,\)\]"):
        Objective(network, cross_entropy, chunk_size=2).value(params, (batch[0], batch[1][:6]))
