"""EDF-G and EDF-H against the paper's update written out with dense matrices, and as good optax citizens."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from eki_jax import edf

SCALE = jnp.array([[1.0, 0.3, 0.0], [0.2, 2.0, 0.5], [0.0, 0.4, 3.0], [1.0, 1.0, 1.0]])
BATCH = (SCALE, jnp.array([1.0, -1.0, 0.5, 2.0]))


def nonlinear(w: jax.Array, x: jax.Array) -> jax.Array:
    return x @ w + 0.3 * jnp.sin(x @ w)


def quartic(outputs: jax.Array, y: jax.Array) -> jax.Array:
    """Convex in the outputs, with a Hessian that is not constant."""
    return jnp.mean((outputs - y) ** 2 / 2 + (outputs - y) ** 4 / 12)


OBJECTIVE = edf.Objective(nonlinear, quartic)
START = jnp.array([0.5, -0.7, 0.9])


def dense(kind: str, w: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """The gradient, and G or H as an explicit matrix."""
    x, y = BATCH
    loss = lambda w: quartic(nonlinear(w, x), y)
    if kind == "h":
        return np.asarray(jax.grad(loss)(w)), np.asarray(jax.hessian(loss)(w))
    jacobian = jax.jacobian(lambda w: nonlinear(w, x))(w)
    output_hessian = jax.hessian(lambda outputs: quartic(outputs, y))(nonlinear(w, x))
    return np.asarray(jax.grad(loss)(w)), np.asarray(jacobian.T @ output_hessian @ jacobian)


def krylov_solution(matrix: np.ndarray, rhs: np.ndarray, order: int) -> np.ndarray:
    basis, _ = np.linalg.qr(np.array([np.linalg.matrix_power(matrix, k) @ rhs for k in range(order)]).T)
    return basis @ np.linalg.lstsq(matrix @ basis, rhs, rcond=None)[0]


def run(optimizer: optax.GradientTransformationExtraArgs, params: jax.Array, steps: int) -> list[jax.Array]:
    """Parameters after every step."""
    state, path = optimizer.init(params), []

    @jax.jit
    def step(params: jax.Array, state: edf.EdfState) -> tuple[jax.Array, edf.EdfState]:
        gradient = OBJECTIVE.value_and_grad(params, BATCH)[1]
        updates, state = optimizer.update(gradient, state, params, objective=OBJECTIVE, batch=BATCH)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
        path.append(params)
    return path


@pytest.mark.parametrize("kind", ["g", "h"])
@pytest.mark.parametrize(("order", "damping"), [(1, None), (1, (0.7, 1.0)), (2, None), (3, (0.2, 0.5))])
def test_a_step_is_the_papers(x64: None, kind: str, order: int, damping: tuple[float, float] | None) -> None:
    params = START.astype(jnp.float64)
    optimizer = {"g": edf.edf_g, "h": edf.edf_h}[kind](0.6, order, damping)
    gradient, matrix = dense(kind, params)
    if damping is not None:
        matrix = matrix + damping[0] * np.linalg.norm(gradient) ** damping[1] * np.eye(3)
    expected = -0.6 * krylov_solution(matrix, gradient, order)
    update = jax.jit(lambda *arguments: optimizer.update(*arguments, objective=OBJECTIVE, batch=BATCH))
    updates, state = update(jnp.asarray(gradient), optimizer.init(params), params)
    np.testing.assert_allclose(updates, expected, rtol=1e-6)
    assert int(state.count) == 1


def test_heavy_ball_is_its_recurrence() -> None:
    """m <- kappa m + P, w <- w - eta m, with P measured from plain steps of rate 1."""
    path = run(edf.edf_g(0.4, 2, None, edf.heavy_ball(0.7)), START, 4)
    velocity, w = np.zeros(3), np.asarray(START)
    for found in path:
        projection = np.asarray(w) - np.asarray(run(edf.edf_g(1.0, 2, None), jnp.asarray(w, jnp.float32), 1)[0])
        velocity = 0.7 * velocity + projection
        w = w - 0.4 * velocity
        np.testing.assert_allclose(found, w, rtol=1e-4, atol=1e-5)


def test_nesterov_is_its_recurrence() -> None:
    """w_(n+1) = y_n - eta P(y_n); y_(n+1) = w_(n+1) + n / (n + 3) (w_(n+1) - w_n); the optimizer holds y."""
    path = run(edf.edf_g(0.4, 1, None, edf.nesterov(3.0)), START, 5)
    w = y = np.asarray(START)
    for n, found in enumerate(path):
        following = y + 0.4 * (np.asarray(run(edf.edf_g(1.0, 1, None), jnp.asarray(y, jnp.float32), 1)[0]) - y)
        y = following + n / (n + 3) * (following - w)
        w = following
        np.testing.assert_allclose(found, y, rtol=1e-4, atol=1e-5)


def test_full_order_converges() -> None:
    """The full order converges where the gradient vanishes."""
    for optimizer in (edf.edf_g(1.0, 3, (1.0, 1.0)), edf.edf_h(1.0, 3, (1.0, 1.0))):
        final = run(optimizer, START, 30)[-1]
        assert float(jnp.linalg.norm(OBJECTIVE.value_and_grad(final, BATCH)[1])) < 1e-5


def test_learning_rate_may_be_a_schedule() -> None:
    optimizer = edf.edf_g(lambda count: jnp.where(count < 1, 0.5, 0.0))
    first, second = run(optimizer, START, 2)
    assert float(jnp.linalg.norm(first - START)) > 0.01
    np.testing.assert_array_equal(first, second)


def test_in_slices_it_is_the_same_step() -> None:
    gradient = OBJECTIVE.value_and_grad(START, BATCH)[1]
    optimizer = edf.edf_g(1.0, 3)
    state = optimizer.init(START)
    whole, _ = optimizer.update(gradient, state, START, objective=OBJECTIVE, batch=BATCH)
    sliced = edf.Objective(nonlinear, quartic, chunk_size=3)
    parts, _ = optimizer.update(gradient, state, START, objective=sliced, batch=BATCH)
    np.testing.assert_allclose(parts, whole, rtol=1e-5)


@pytest.mark.parametrize("make", [edf.edf_g, edf.edf_h])
def test_no_matrix_is_formed(make: object) -> None:
    size = 2048
    objective = edf.Objective(lambda w, x: jnp.tanh(x @ w), lambda outputs, y: jnp.mean((outputs - y) ** 2))
    optimizer = make(1.0, 5, acceleration=edf.nesterov())
    like = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    update = lambda g, s, w, batch: optimizer.update(g, s, w, objective=objective, batch=batch)
    state = jax.eval_shape(optimizer.init, like(size))
    compiled = jax.jit(update).lower(like(size), state, like(size), (like(4, size), like(4))).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 100 * 4 * size  # vectors; a matrix is 2048 of them


def test_a_zero_gradient_moves_nothing() -> None:
    for order in (1, 3):
        optimizer = edf.edf_g(1.0, order, (1.0, 1.0))
        updates, _ = optimizer.update(jnp.zeros(3), optimizer.init(START), START, objective=OBJECTIVE, batch=BATCH)
        np.testing.assert_array_equal(updates, jnp.zeros(3))


def test_composes_with_optax_under_scan() -> None:
    """chain with clipping, apply_if_finite around it, one compiled scan, extra arguments of others ignored."""
    optimizer = optax.apply_if_finite(
        optax.chain(optax.clip_by_global_norm(1.0), edf.edf_g(0.5, 2, acceleration=edf.nesterov())), 3
    )

    def step(carry: tuple, _: None) -> tuple[tuple, jax.Array]:
        params, state = carry
        value, gradient = OBJECTIVE.value_and_grad(params, BATCH)
        updates, state = optimizer.update(
            gradient, state, params, objective=OBJECTIVE, batch=BATCH, value=value, unknown="ignored"
        )
        return (optax.apply_updates(params, updates), state), value

    carry = (START, optimizer.init(START))
    _, values = jax.jit(lambda carry: jax.lax.scan(step, carry, None, length=25))(carry)
    assert float(values[-1]) < 0.2 * float(values[0])


def test_parameters_keep_their_types() -> None:
    half = START.astype(jnp.bfloat16)
    for acceleration in (None, edf.heavy_ball(), edf.nesterov()):
        for order in (1, 2):
            optimizer = edf.edf_g(0.5, order, acceleration=acceleration)
            state = optimizer.init(half)
            updates, new = optimizer.update(half, state, half, objective=OBJECTIVE, batch=BATCH)
            assert updates.dtype == jnp.bfloat16
            assert jax.tree.map(jnp.result_type, new) == jax.tree.map(jnp.result_type, state)


def test_trains_linen_and_nnx_models() -> None:
    """Trains a Linen model with batch statistics and an NNX model."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(32, 4)), jnp.float32)
    labels = (x[:, 0] * x[:, 1] > 0).astype(jnp.int32)
    loss = lambda outputs, y: optax.softmax_cross_entropy_with_integer_labels(outputs, y).mean()
    linen = nn.Sequential([nn.Dense(8), nn.BatchNorm(use_running_average=False), nn.tanh, nn.Dense(2)])
    variables = linen.init(jax.random.key(0), x)
    forward = lambda params, x: linen.apply({**variables, "params": params}, x, mutable=["batch_stats"])[0]
    graph, state = nnx.split(
        nnx.Sequential(nnx.Linear(4, 8, rngs=nnx.Rngs(0)), nnx.tanh, nnx.Linear(8, 2, rngs=nnx.Rngs(1)))
    )
    models = [(forward, variables["params"]), (lambda state, x: nnx.merge(graph, state)(x), state)]
    for model, params in models:
        objective = edf.Objective(model, loss)
        optimizer = edf.edf_g(1.0, 4, (0.1, 1.0))

        def step(carry: tuple, _: None, objective: edf.Objective = objective, optimizer=optimizer) -> tuple:
            params, state = carry
            value, gradient = objective.value_and_grad(params, (x, labels))
            updates, state = optimizer.update(gradient, state, params, objective=objective, batch=(x, labels))
            return (optax.apply_updates(params, updates), state), value

        carry = (params, optimizer.init(params))
        _, values = jax.jit(lambda carry, step=step: jax.lax.scan(step, carry, None, length=30))(carry)
        assert float(values[-1]) < 0.3 * float(values[0])


@pytest.mark.parametrize("make", [edf.edf_g, edf.edf_h])
@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"krylov_order": 0}, ValueError, "krylov_order: 0; wanted a whole number, at least 1"),
        ({"krylov_order": 1.5}, TypeError, "krylov_order: 1.5; wanted a whole number, at least 1"),
        ({"damping": (1.0, -1.0)}, ValueError, r"damping\[1\]: -1.0; wanted a finite number >= 0"),
        ({"damping": 1.0}, TypeError, r"damping: 1.0; wanted a pair \(a, b\), or None"),
        ({"acceleration": 0.9}, TypeError, r"acceleration: 0.9; wanted None, heavy_ball\(...\) or nesterov\(...\)"),
    ],
)
def test_bad_options_are_named(make: object, options: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make(1.0, **options)


def test_bad_calls_and_accelerations_are_named() -> None:
    optimizer = edf.edf_g(1.0)
    state = optimizer.init(START)
    with pytest.raises(TypeError, match="objective: None; wanted it as a keyword"):
        optimizer.update(START, state, START, batch=BATCH)
    with pytest.raises(TypeError, match="batch: None; wanted it as a keyword"):
        optimizer.update(START, state, START, objective=OBJECTIVE)
    with pytest.raises(ValueError, match="params: None; wanted the point"):
        optimizer.update(START, state, objective=OBJECTIVE, batch=BATCH)
    with pytest.raises(ValueError, match=r"momentum: 1.0; wanted a number in \[0, 1\)"):
        edf.heavy_ball(1.0)
    with pytest.raises(ValueError, match="friction: 0; wanted a finite number > 0"):
        edf.nesterov(0)
