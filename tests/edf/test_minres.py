"""MINRES against scipy's, against LSMR, against explicit Krylov spaces, and where the spaces end."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse.linalg
from jax.flatten_util import ravel_pytree

from eki_jax.edf import minres
from eki_jax.edf.minres import one_step

SIZE = 12


def symmetric(kind: str, rng: np.random.Generator) -> np.ndarray:
    basis, _ = np.linalg.qr(rng.normal(size=(SIZE, SIZE)))
    eigenvalues = {
        "positive": np.linspace(0.5, 4, SIZE),
        "indefinite": np.concatenate([np.linspace(-3, -0.5, SIZE // 2), np.linspace(0.7, 2, SIZE - SIZE // 2)]),
        "singular": np.concatenate([np.zeros(3), np.linspace(-2, 3, SIZE - 3)]),
    }[kind]
    return (basis * eigenvalues) @ basis.T


def every_iterate(matrix: np.ndarray, rhs: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Solutions and reported residual norms after 1, ..., ``count`` iterations, from one compilation."""
    solve = jax.jit(lambda k: minres(lambda v: jnp.asarray(matrix) @ v, jnp.asarray(rhs), k))
    runs = [solve(jnp.asarray(k)) for k in range(1, count + 1)]
    return np.array([x for x, _ in runs]), np.array([info.residual_norm for _, info in runs])


@pytest.mark.parametrize("kind", ["positive", "indefinite", "singular"])
def test_every_iterate_is_scipys(x64: None, kind: str) -> None:
    rng = np.random.default_rng(1)
    matrix = symmetric(kind, rng)
    rhs = matrix @ rng.normal(size=SIZE)  # consistent, also where the matrix is singular
    expected: list[np.ndarray] = []
    record = lambda x: expected.append(x.copy())
    scipy.sparse.linalg.minres(matrix, rhs, rtol=0, maxiter=8, callback=record)
    solutions, residuals = every_iterate(matrix, rhs, 8)
    assert len(expected) == 8
    np.testing.assert_allclose(solutions, expected, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(residuals, np.linalg.norm(rhs - solutions @ matrix, axis=1), rtol=1e-9)


def test_every_iterate_is_that_of_lsmr(x64: None) -> None:
    """Every iterate on the normal equations is that of LSMR."""
    rng = np.random.default_rng(2)
    jacobian, target, damping = rng.normal(size=(20, SIZE)), rng.normal(size=20), 0.3
    stacked = np.vstack([jacobian, np.sqrt(damping) * np.eye(SIZE)])
    padded = np.concatenate([target, np.zeros(SIZE)])
    expected = [
        scipy.sparse.linalg.lsmr(stacked, padded, atol=0, btol=0, conlim=0, maxiter=k)[0] for k in range(1, SIZE)
    ]
    solutions, _ = every_iterate(jacobian.T @ jacobian + damping * np.eye(SIZE), jacobian.T @ target, SIZE - 1)
    np.testing.assert_allclose(solutions, expected, rtol=1e-9, atol=1e-11)


def test_residual_is_least_in_the_krylov_space(x64: None) -> None:
    """The residual is the least over the Krylov space."""
    rng = np.random.default_rng(3)
    matrix, rhs = symmetric("indefinite", rng), rng.normal(size=SIZE)
    krylov = [rhs]
    for _ in range(4):
        krylov.append(matrix @ krylov[-1])
    solutions, _ = every_iterate(matrix, rhs, 5)
    for k in range(1, 6):
        basis, _ = np.linalg.qr(np.array(krylov[:k]).T)
        expected = basis @ np.linalg.lstsq(matrix @ basis, rhs, rcond=None)[0]
        np.testing.assert_allclose(solutions[k - 1], expected, rtol=1e-8, atol=1e-10)


def test_one_step_in_closed_form_is_one_iteration(x64: None) -> None:
    rng = np.random.default_rng(4)
    matrix, rhs = symmetric("indefinite", rng), jnp.asarray(rng.normal(size=SIZE))
    operator = lambda v: jnp.asarray(matrix) @ v
    np.testing.assert_allclose(one_step(operator, rhs), minres(operator, rhs, 1)[0], rtol=1e-12)


def test_unrolled_and_looped_iterations_agree(x64: None) -> None:
    rng = np.random.default_rng(5)
    matrix, rhs = symmetric("indefinite", rng), rng.normal(size=SIZE)
    operator = lambda v: jnp.asarray(matrix) @ v
    unrolled, _ = minres(operator, jnp.asarray(rhs), 3)
    np.testing.assert_allclose(unrolled, every_iterate(matrix, rhs, 3)[0][2], rtol=1e-12)


def test_a_pytree_is_its_flattened_self(x64: None) -> None:
    rng = np.random.default_rng(6)
    matrix, rhs = jnp.asarray(symmetric("indefinite", rng)), jnp.asarray(rng.normal(size=SIZE))
    tree = {"a": rhs[:6].reshape(2, 3), "b": [rhs[6:11], rhs[11]]}
    flat, unravel = ravel_pytree(tree)
    solution, info = minres(lambda v: unravel(matrix @ ravel_pytree(v)[0]), tree, 4)
    expected, expected_info = minres(lambda v: matrix @ v, flat, 4)
    np.testing.assert_allclose(ravel_pytree(solution)[0], expected, rtol=1e-12)
    np.testing.assert_allclose(info.residual_norm, expected_info.residual_norm, rtol=1e-12)
    assert jax.tree.structure(solution) == jax.tree.structure(tree)


@pytest.mark.parametrize("eigenvalue", [-2.0, 3.0])
def test_stops_when_the_krylov_space_is_exhausted(eigenvalue: float) -> None:
    diagonal = jnp.array([eigenvalue, 1.0, 5.0, 7.0])
    rhs = jnp.array([4.0, 0.0, 0.0, 0.0])
    solution, info = minres(lambda v: diagonal * v, rhs, 20)
    np.testing.assert_allclose(solution, rhs / eigenvalue, rtol=1e-6)
    assert int(info.iterations) == 1


def test_iterations_beyond_the_unknowns() -> None:
    """More iterations than unknowns change nothing."""
    rng = np.random.default_rng(7)
    matrix = jnp.asarray(symmetric("positive", rng), jnp.float32)
    rhs = jnp.asarray(rng.normal(size=SIZE), jnp.float32)
    solution, info = minres(lambda v: matrix @ v, rhs, 60)
    np.testing.assert_allclose(matrix @ solution, rhs, atol=2e-5)
    assert int(info.iterations) <= 20


def test_inconsistent_singular_system() -> None:
    """An inconsistent singular system gives a finite least-squares solution."""
    diagonal, rhs = jnp.array([2.0, 0.0, -4.0]), jnp.array([2.0, 3.0, 4.0])
    solution, info = minres(lambda v: diagonal * v, rhs, 10)
    np.testing.assert_allclose(diagonal * solution, [2.0, 0.0, 4.0], atol=1e-4)
    np.testing.assert_allclose(info.residual_norm, 3.0, rtol=1e-4)


def test_zero_gives_zero() -> None:
    """Zero matrix and zero right hand side give zero."""
    for operator, rhs in [(jnp.zeros_like, jnp.ones(3)), (lambda v: 2 * v, jnp.zeros(3))]:
        solution, _ = minres(operator, rhs, 3)
        np.testing.assert_array_equal(solution, jnp.zeros(3))
        np.testing.assert_array_equal(one_step(operator, rhs), jnp.zeros(3))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_keeps_the_type(dtype: jnp.dtype) -> None:
    """Keeps the type and computes scalars in single precision."""
    diagonal = jnp.array([1.0, 2.0, -4.0], dtype)
    solution, info = minres(lambda v: diagonal * v, jnp.array([1.0, 1.0, 1.0], dtype), 3)
    assert solution.dtype == dtype
    assert info.residual_norm.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(solution, np.float32), [1.0, 0.5, -0.25], rtol=0.05)


@pytest.mark.parametrize(
    ("rhs", "iterations", "error", "words"),
    [
        (jnp.ones(2), 0, ValueError, "iterations: 0; wanted a whole number, at least 1"),
        (jnp.ones(2), 1.5, TypeError, "iterations: 1.5; wanted a whole number"),
        (jnp.ones(2), jnp.ones(()), TypeError, "iterations: .*; wanted a whole number"),
        (jnp.ones(2, jnp.int32), 1, TypeError, "rhs: dtype int32; wanted a floating-point dtype"),
        ({}, 1, ValueError, "rhs: {}, which has no arrays; wanted one at least"),
    ],
)
def test_bad_input_is_named(rhs: object, iterations: object, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        minres(lambda v: v, rhs, iterations)


@pytest.mark.parametrize("iterations", [1, 3])
def test_no_zero_for_what_is_not_finite(iterations: int) -> None:
    """A solution of zero would look like one: of a gradient of NaN it made a step that moved nothing and counted."""
    diagonal = jnp.array([3.0, -2.0])
    solution, _ = minres(lambda v: diagonal * v, jnp.array([jnp.nan, 1.0]), iterations)
    assert np.isnan(solution).all()
    assert np.isnan(one_step(lambda v: diagonal * v, jnp.array([jnp.nan, 1.0]))).all()
    assert (one_step(lambda v: 0 * v, jnp.array([1.0, 1.0])) == 0).all()
