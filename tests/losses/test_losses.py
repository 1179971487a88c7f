"""Losses, and the gradients with respect to the outputs that drive the method."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eki_jax import losses

RNG = np.random.default_rng(0)
PROBABILITIES = jnp.asarray(RNG.dirichlet(np.ones(4), size=(3, 5)), jnp.float32)  # 3 particles, 5 samples, 4 classes
LABELS = jnp.array([0, 3, 1, 1, 2])


def test_cross_entropy_has_the_papers_gradient() -> None:
    """-y / (G + delta), a mean over the batch: one-hot by definition, integer labels the same."""
    one_hot = jax.nn.one_hot(LABELS, 4)
    wanted = -one_hot / (PROBABILITIES + 0.005) / 5
    for targets in (one_hot, LABELS):
        values, cotangents = losses.value_and_cotangents(losses.cross_entropy(), PROBABILITIES, targets)
        np.testing.assert_allclose(cotangents, wanted, rtol=1e-5)
        np.testing.assert_allclose(
            values, -np.sum(one_hot * np.log(PROBABILITIES + 0.005), axis=-1).mean(axis=-1), rtol=1e-5
        )


def test_soft_labels() -> None:
    soft = jnp.asarray(RNG.dirichlet(np.ones(4), size=5), jnp.float32)
    loss = losses.cross_entropy(delta=0.1)
    entries, reduced = losses.supported_outputs(loss, PROBABILITIES, soft)
    assert entries is PROBABILITIES
    assert reduced is loss
    _, cotangents = losses.value_and_cotangents(loss, PROBABILITIES, soft)
    np.testing.assert_allclose(cotangents, -soft / (PROBABILITIES + 0.1) / 5, rtol=1e-5)


def test_integer_labels_need_one_entry_a_sample() -> None:
    loss = losses.cross_entropy()
    entries, reduced = losses.supported_outputs(loss, PROBABILITIES, LABELS)
    assert entries.shape == (3, 5)
    full, full_cotangents = losses.value_and_cotangents(loss, PROBABILITIES, LABELS)
    values, cotangents = losses.value_and_cotangents(reduced, entries, LABELS)
    np.testing.assert_allclose(values, full, rtol=1e-6)
    chosen = np.take_along_axis(np.asarray(full_cotangents), np.asarray(LABELS)[None, :, None], axis=2)[..., 0]
    np.testing.assert_allclose(cotangents, chosen, rtol=1e-6)


@pytest.mark.parametrize("precision", [None, 4.0, np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), "full"])
def test_squared_error_gradient(precision: Any) -> None:
    """The gradient of the squared error is the weighted residual."""
    outputs, targets = RNG.normal(size=(2, 2, 3)), RNG.normal(size=(2, 3))
    residual = outputs - targets
    if isinstance(precision, str):
        root = RNG.normal(size=(6, 6))
        precision = root @ root.T
        wanted = (residual.reshape(2, 6) @ precision).reshape(2, 2, 3)
    else:
        wanted = residual * (1.0 if precision is None else precision)
    values, cotangents = losses.value_and_cotangents(
        losses.squared_error(precision), jnp.asarray(outputs, jnp.float32), jnp.asarray(targets, jnp.float32)
    )
    np.testing.assert_allclose(cotangents, wanted, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(values, 0.5 * np.sum(residual * wanted, axis=(1, 2)), rtol=1e-4)


def test_a_users_loss_is_differentiated() -> None:
    """A user's loss is differentiated in the outputs alone."""
    huber = lambda outputs, targets: jnp.sum(
        jnp.where(jnp.abs(outputs - targets) < 1, 0.5 * (outputs - targets) ** 2, 7)
    )
    _, cotangents = losses.value_and_cotangents(huber, jnp.array([[0.5, 3.0], [-0.25, 0.0]]), jnp.zeros(2))
    np.testing.assert_allclose(cotangents, [[0.5, 0.0], [-0.25, 0.0]])


def test_targets_of_their_own_for_every_particle() -> None:
    targets = jnp.array([[1.0], [5.0]])
    _, cotangents = losses.value_and_cotangents(
        losses.squared_error(), jnp.array([[2.0], [2.0]]), targets, targets_axis=0
    )
    np.testing.assert_allclose(cotangents, [[1.0], [-3.0]])


def test_low_precision_keeps_its_dtype() -> None:
    """Low precision probabilities keep their dtype."""
    values, cotangents = losses.value_and_cotangents(losses.cross_entropy(), PROBABILITIES.astype(jnp.bfloat16), LABELS)
    assert cotangents.dtype == jnp.bfloat16
    assert values.dtype == jnp.float32


@pytest.mark.parametrize(
    ("words", "call"),
    [
        ("delta: -1", lambda: losses.cross_entropy(-1)),
        ("labels from 0 to 4; wanted 0 to 3", lambda: losses.cross_entropy()(PROBABILITIES[0], jnp.arange(5))),
        ("labels from -1", lambda: losses.cross_entropy()(PROBABILITIES[0], LABELS - 1)),
        ("targets: shape", lambda: losses.cross_entropy()(PROBABILITIES[0], LABELS[:3])),
        ("targets: shape", lambda: losses.cross_entropy()(PROBABILITIES[0], jnp.ones((5, 3)))),
        ("targets: shape", lambda: losses.squared_error()(jnp.ones(3), jnp.ones(4))),
        ("precision: least value -2", lambda: losses.squared_error(-2.0)),
        ("precision: has values that are not finite", lambda: losses.squared_error(np.array([1.0, np.inf]))),
        ("precision: shape", lambda: losses.squared_error(np.ones(3))(jnp.ones(2), jnp.ones(2))),
        ("not symmetric", lambda: losses.squared_error(np.array([[1.0, 2], [0, 1]]))(jnp.ones(2), jnp.ones(2))),
        ("loss: returned shape", lambda: losses.value_and_cotangents(lambda o, t: o, jnp.ones((2, 3)), 0.0)),
    ],
)
def test_bad_input_is_named(words: str, call: Any) -> None:
    with pytest.raises(ValueError, match=words):
        call()


def test_a_traced_label_out_of_range_is_nan() -> None:
    """A traced label out of range reads NaN, not another class."""
    value = jax.jit(losses.cross_entropy())(PROBABILITIES[0], jnp.array([0, 1, 4, 1, 0]))
    assert jnp.isnan(value)
    assert jnp.isnan(jax.jit(losses.cross_entropy())(PROBABILITIES[0], jnp.array([0, 1, -1, 1, 0])))


def test_a_matrix_may_be_an_array_of_jax() -> None:
    """The matrix's symmetry is looked at by NumPy, so that a compiled function may do it too."""
    matrix = jnp.array([[2.0, 1.0], [1.0, 3.0]])
    value = jax.jit(losses.squared_error(matrix))(jnp.array([1.0, 2.0]), jnp.zeros(2))
    assert float(value) == 0.5 * (2 + 4 + 12)
    with pytest.raises(ValueError, match="not symmetric"):
        jax.jit(losses.squared_error(matrix.at[0, 1].set(5.0)))(jnp.ones(2), jnp.zeros(2))
