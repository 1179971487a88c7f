"""Graph Laplacians, priors on them, and classes learned from a few labels."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse

import eki_jax
from benchmarks.problems import files, tables
from eki_jax import semi_supervised as ss


def clusters(rng, size=40, distance=6.0, dimension=2):
    """Two clouds of points and their labels."""
    labels = np.repeat([-1, 1], size)
    return rng.standard_normal((2 * size, dimension)) + labels[:, None] * distance / 2, labels


def two_parts():
    """Two triangles that no edge joins."""
    triangle = np.ones((3, 3)) - np.eye(3)
    return np.kron(np.eye(2), triangle)


def test_affinity_equals_its_formula():
    x = np.random.default_rng(0).standard_normal((6, 3))
    weights = ss.gaussian_affinity(x, width=1.25)
    for i in range(6):
        for j in range(6):
            expected = np.exp(-np.sum((x[i] - x[j]) ** 2) / (2 * 1.25**2))
            assert weights[i, j] == pytest.approx(expected, rel=1e-12)


def test_nearest_neighbours_are_symmetric():
    """Nearest neighbours keep their weights both ways."""
    x = np.array([[0.0], [1.0], [3.0], [7.0]])
    weights = ss.gaussian_affinity(x, width=2.0, neighbours=1)
    assert scipy.sparse.issparse(weights)
    dense, full = weights.toarray(), ss.gaussian_affinity(x, width=2.0)
    edges = {(0, 1), (1, 2), (2, 3)}
    for i in range(4):
        for j in range(4):
            kept = i == j or (i, j) in edges or (j, i) in edges
            assert dense[i, j] == pytest.approx(full[i, j] if kept else 0.0)


@pytest.mark.parametrize("normalized", [True, False])
def test_laplacian_equals_its_formula(normalized):
    """The Laplacian equals its formula dense or sparse."""
    weights = ss.gaussian_affinity(np.random.default_rng(1).standard_normal((5, 2)), width=1.0)
    degrees = weights.sum(1)
    expected = np.array(
        [
            [
                (1.0 if normalized else degrees[i]) * (i == j)
                - weights[i, j] / (np.sqrt(degrees[i] * degrees[j]) if normalized else 1.0)
                for j in range(5)
            ]
            for i in range(5)
        ]
    )
    np.testing.assert_allclose(ss.graph_laplacian(weights, normalized=normalized), expected, atol=1e-14)
    sparse = ss.graph_laplacian(scipy.sparse.csr_array(weights), normalized=normalized)
    assert scipy.sparse.issparse(sparse)
    np.testing.assert_allclose(sparse.toarray(), expected, atol=1e-14)


def test_lanczos_gives_the_dense_pairs(monkeypatch):
    """Lanczos gives the pairs of the dense decomposition."""
    x, _ = clusters(np.random.default_rng(2), distance=2.0)
    laplacian = ss.graph_laplacian(ss.gaussian_affinity(x, width=1.0, neighbours=8))
    dense = ss.eigenbasis(laplacian, 6)
    monkeypatch.setattr(ss, "_DENSE_NODES", 10)
    lanczos = ss.eigenbasis(laplacian, 6)
    np.testing.assert_allclose(lanczos.eigenvalues, dense.eigenvalues, atol=1e-6)
    for basis in (dense, lanczos):
        np.testing.assert_allclose(laplacian @ basis.vectors, basis.vectors * basis.eigenvalues, atol=1e-4)
        np.testing.assert_allclose(basis.vectors.T @ basis.vectors, np.eye(7), atol=1e-6)


@pytest.mark.parametrize(("tau", "alpha"), [(0.0, 1.0), (0.0, 2.0), (0.5, 1.0)])
def test_prior_has_the_covariance_of_the_formula(tau, alpha):
    x, _ = clusters(np.random.default_rng(3), size=4, distance=1.0)
    laplacian = ss.graph_laplacian(ss.gaussian_affinity(x, width=1.0))
    factor = np.asarray(ss.graph_prior(ss.eigenbasis(laplacian), tau=tau, alpha=alpha).factor, np.float64)
    shifted = np.linalg.matrix_power(laplacian + tau**2 * np.eye(8), int(alpha))
    expected = np.linalg.pinv(shifted, rcond=1e-10, hermitian=True)
    np.testing.assert_allclose(factor @ factor.T, expected, rtol=1e-3, atol=1e-3 * abs(expected).max())


def two_rings(size, weight):
    """The Laplacian of two rings with one weight between them."""
    ring = scipy.sparse.diags_array([1.0, 1.0], offsets=[1, size - 1], shape=(size, size))
    between = scipy.sparse.coo_array(([weight], ([0], [2 * size - 1])), shape=(2 * size, 2 * size))
    weights = scipy.sparse.block_diag([ring + ring.T] * 2) + between + between.T
    return ss.graph_laplacian(scipy.sparse.csr_array(weights), normalized=False)


@pytest.mark.parametrize("size", [3, 1600])
def test_weights_lost_in_rounding_part(size):
    """Two rings that hang together by a weight below the rounding have two zero eigenvalues, densely and by Lanczos."""
    laplacian = two_rings(size, 1e-25)
    basis = ss.eigenbasis(laplacian, 2)
    assert (basis.nullity, len(basis.eigenvalues)) == (2, 4)
    np.testing.assert_allclose(basis.eigenvalues, [0, 0, *[2 - 2 * np.cos(2 * np.pi / size)] * 2], rtol=1e-6)
    if size == 3:
        with pytest.raises(ValueError, match=r"modes: 5; wanted 1 to 4 beyond the null space of 2"):
            ss.eigenbasis(laplacian, 5)


@pytest.mark.parametrize("size", [3, 1600])
def test_weak_weights_hold_parts_together(size):
    """An eigenvalue is kept as long as it is more than rounding: that of a weak weight w is 2 w / n."""
    basis = ss.eigenbasis(two_rings(size, 1e-9), 2)
    assert basis.nullity == 1
    assert basis.eigenvalues[1] == pytest.approx(2e-9 / size, rel=0.02)


def test_null_spaces_are_left_out():
    """The null space of every connected part is left out."""
    laplacian = ss.graph_laplacian(two_parts(), normalized=False)
    basis = ss.eigenbasis(laplacian)
    assert basis.nullity == 2
    assert basis.eigenvalues[:2].tolist() == [0.0, 0.0]
    draws = eki_jax.sample_ensemble(jax.random.key(0), ss.graph_prior(basis), 50)
    assert float(jnp.abs(draws).max()) > 0.5
    np.testing.assert_allclose(draws[:, :3].sum(1), 0, atol=1e-5)
    np.testing.assert_allclose(draws[:, 3:].sum(1), 0, atol=1e-5)
    with_constants = eki_jax.sample_ensemble(jax.random.key(0), ss.graph_prior(basis, tau=0.5), 50)
    assert float(jnp.abs(with_constants[:, :3].sum(1)).max()) > 1


def test_samples_follow_the_covariance():
    basis = ss.eigenbasis(ss.graph_laplacian([[0.0, 1.0, 0.1], [1.0, 0.0, 1.0], [0.1, 1.0, 0.0]]))
    prior = ss.graph_prior(basis)
    draws = np.asarray(eki_jax.sample_ensemble(jax.random.key(1), prior, 20_000))
    np.testing.assert_allclose(np.cov(draws.T), prior.factor @ prior.factor.T, atol=0.03)


@pytest.mark.parametrize("forward", [ss.observed_sign, ss.observed_value])
def test_two_labels_classify_two_clusters(forward):
    x, labels = clusters(np.random.default_rng(4))
    basis = ss.eigenbasis(ss.graph_laplacian(ss.gaussian_affinity(x, width=1.0)))
    solver = eki_jax.euler(forward, ss.mean_squared_error)
    state = solver.init(eki_jax.sample_ensemble(jax.random.key(0), ss.graph_prior(basis), 100))
    observed = jnp.array([3, 50])
    for _ in range(5):
        state, info = solver.step(state, (observed, jnp.asarray(labels[observed], jnp.float32)))
    assert bool(info.is_finite)
    accuracy = np.mean(np.sign(eki_jax.mean_particle(state.ensemble)) == labels)
    assert accuracy > 0.95
    cut = np.sign(ss.fiedler_vector(basis))
    assert max(np.mean(cut == labels), np.mean(cut == -labels)) > 0.95


def test_mean_squared_error_is_a_mean():
    assert float(ss.mean_squared_error(jnp.array([1.0, 2.0]), jnp.array([0.0, 4.0]))) == 2.5


@pytest.mark.skipif(files.data_folder(None) is None, reason="EKI_JAX_DATA names no folder with the voting records")
def test_fiedler_vector_of_the_votes():
    """The Fiedler vector of the voting records has the paper's accuracy."""
    votes = tables.votes()
    basis = ss.eigenbasis(ss.graph_laplacian(ss.gaussian_affinity(votes.records, width=1.25)), 2)
    cut = np.sign(ss.fiedler_vector(basis))
    right = max(np.sum(cut == votes.labels), np.sum(cut == -votes.labels))
    assert right == 384  # 0.8828 of 435


@pytest.mark.slow
def test_a_graph_of_a_hundred_thousand_nodes():
    x, labels = clusters(np.random.default_rng(5), size=50_000, distance=5.0)
    basis = ss.eigenbasis(ss.graph_laplacian(ss.gaussian_affinity(x, width=0.3, neighbours=10)), 4)
    solver = eki_jax.euler(ss.observed_sign, ss.mean_squared_error)
    state = solver.init(eki_jax.sample_ensemble(jax.random.key(0), ss.graph_prior(basis), 50))
    observed = jnp.asarray(np.linspace(0, len(x) - 1, 40).astype(int))
    for _ in range(5):
        state, _ = solver.step(state, (observed, jnp.asarray(labels, jnp.float32)[observed]))
    assert np.mean(np.sign(eki_jax.mean_particle(state.ensemble)) == labels) > 0.9


PATH = [[0.0, 1.0, 0.0], [1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ss.gaussian_affinity(np.ones(3), 1.0), r"x: shape \(3,\)"),
        (lambda: ss.gaussian_affinity(np.ones((3, 1)), 0.0), r"width: 0.0; wanted a finite number > 0"),
        (lambda: ss.gaussian_affinity(np.ones((3, 1)), 1.0, 3), r"neighbours: 3; wanted 1 to 2"),
        (lambda: ss.graph_laplacian(np.ones((2, 3))), r"weights: shape \(2, 3\)"),
        (lambda: ss.graph_laplacian([[0.0, -1.0], [-1.0, 0.0]]), r"weights: has values that are negative"),
        (lambda: ss.graph_laplacian([[0.0, np.nan], [np.nan, 0.0]]), r"weights: has values .* not finite"),
        (lambda: ss.graph_laplacian([[0.0, 1.0], [2.0, 0.0]]), r"weights: not symmetric"),
        (lambda: ss.graph_laplacian([[1.0, 0.0], [0.0, 0.0]]), r"weights: node 1 has no weight"),
        (lambda: ss.gaussian_affinity([[0.0], [np.inf]], 1.0), r"x: has values that are not finite"),
        (lambda: ss.eigenbasis(np.ones((2, 3))), r"laplacian: shape \(2, 3\)"),
        (lambda: ss.eigenbasis([[np.nan]]), r"laplacian: has values that are not finite"),
        (lambda: ss.eigenbasis(np.array([[1.0, -1.0], [0.0, 1.0]])), r"laplacian: not symmetric"),
        (lambda: ss.eigenbasis(np.array(PATH)), r"laplacian: without a negative number"),
        (lambda: ss.observed_value(np.ones(3), [3]), r"nodes: 3 to 3; wanted 0 to 2"),
        (lambda: ss.eigenbasis(ss.graph_laplacian(PATH), 3), r"modes: 3; wanted 1 to 2 beyond the null space of 1"),
        (lambda: ss.eigenbasis(scipy.sparse.eye_array(4000).tocsr()), r"modes: None for 4000 nodes"),
        (lambda: ss.graph_prior(ss.eigenbasis(ss.graph_laplacian(PATH)), tau=-1), r"tau: -1"),
        (lambda: ss.graph_prior(ss.eigenbasis(ss.graph_laplacian(PATH)), alpha=0), r"alpha: 0"),
        (lambda: ss.graph_prior(ss.GraphBasis(np.zeros(1), np.ones((3, 1)), 1)), r"basis: has only the null space"),
        (lambda: ss.fiedler_vector(ss.GraphBasis(np.zeros(1), np.ones((3, 1)), 1)), r"basis: has only the null"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
