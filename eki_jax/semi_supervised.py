r"""Semi-supervised learning on a graph: a few labels, and a prior that knows how the nodes hang together.

A function u on the N nodes has the prior :math:`N(0, (L + \tau^2 I)^{-\alpha})`, where L is the graph's Laplacian; its
sign at a node is the node's class. Labels are observed at a few nodes (arXiv:1808.03620, example 2.2 and section 5.5).
The ensemble never needs L itself, only its lowest eigenvectors, so that graphs of 10^5 nodes work::

    laplacian = graph_laplacian(gaussian_affinity(x, width=1.25))
    prior = graph_prior(eigenbasis(laplacian))
    solver = eki_jax.euler(observed_sign, mean_squared_error)
    state = solver.init(eki_jax.sample_ensemble(key, prior, 1000))
    state, info = solver.step(state, (observed_nodes, labels))

Needs scipy (in the extra ``graph``); the core of the library does not import this module.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
import numpy as np

try:
    import scipy.linalg
    import scipy.sparse
    import scipy.sparse.csgraph
    import scipy.sparse.linalg
    import scipy.spatial
except ImportError as error:
    raise ImportError("scipy is not installed: pip install 'eki_jax[graph]'") from error

from eki_jax._checks import NOT_NEGATIVE, POSITIVE, array, is_known, real, whole
from eki_jax._types import Array
from eki_jax.ensembles.priors import Gaussian, gaussian
from eki_jax.losses.outputs import MeanSquaredError

if TYPE_CHECKING:
    from jaxtyping import Float, Int

# Graphs up to this size are decomposed densely, which is exact and takes about a second.
_DENSE_NODES = 3000


class GraphBasis(NamedTuple):
    """The lowest eigenpairs of a graph's Laplacian.

    Attributes:
        eigenvalues: eigenvalues in ascending order, shape (K,).
        vectors: eigenvectors in orthonormal columns, shape (N, K).
        nullity: number of eigenvalues that are zero to rounding: that of the graph's parts between which there are no
            weights, or such as are lost beside the others.
    """

    eigenvalues: np.ndarray
    vectors: np.ndarray
    nullity: int


def gaussian_affinity(x: Any, width: float, neighbours: int | None = None) -> Any:
    r"""Weights ``exp(-|x_i - x_j|^2 / (2 width^2))`` between the nodes.

    Args:
        x: features of the nodes, shape (N, d).
        width: length scale, in the features' units, > 0.
        neighbours: number of nearest nodes among which one of a pair has to find the other; None for all pairs.

    Returns:
        The weights, shape (N, N), symmetric: a NumPy array, or a ``scipy.sparse.csr_array`` with ``neighbours``. A
        node's weight to itself is 1, as the formula says.

    Raises:
        ValueError: ``x`` is not (N, d), ``width`` <= 0, or ``neighbours`` not between 1 and N - 1.

    >>> gaussian_affinity([[0.0], [1.0]], width=1.0).round(3)
    array([[1.   , 0.607],
           [0.607, 1.   ]])
    """
    x = np.asarray(array("x", x), np.float64)
    if not np.all(np.isfinite(x)):
        raise ValueError("x: has values that are not finite; wanted points")
    if x.ndim != 2 or len(x) < 2:
        raise ValueError(f"x: shape {x.shape}; wanted (N, d) with at least two nodes")
    real("width", width, POSITIVE)
    if neighbours is None:
        squares = scipy.spatial.distance.pdist(x, "sqeuclidean")
        return np.exp(-scipy.spatial.distance.squareform(squares) / (2 * width**2))
    neighbours = whole("neighbours", neighbours)
    if neighbours >= len(x):
        raise ValueError(f"neighbours: {neighbours}; wanted 1 to {len(x) - 1} for {len(x)} nodes")
    distances, columns = scipy.spatial.KDTree(x).query(x, neighbours + 1)
    rows = np.repeat(np.arange(len(x)), neighbours + 1)
    weights = np.exp(-(distances.ravel() ** 2) / (2 * width**2))
    directed = scipy.sparse.csr_array((weights, (rows, columns.ravel())), shape=(len(x), len(x)))
    return directed.maximum(directed.T)


def graph_laplacian(weights: Any, *, normalized: bool = True) -> Any:
    r"""The Laplacian of a weighted graph, ``I - D^-1/2 W D^-1/2``, or ``D - W``.

    D is the diagonal of the weights' row sums. The normalized one gives the paper's accuracy of the Fiedler vector.

    Args:
        weights: matrix of affinities, symmetric and not negative, shape (N, N); an array or any ``scipy.sparse``
            matrix.
        normalized: flag; True for the symmetric normalized Laplacian, whose eigenvalues lie in [0, 2].

    Returns:
        L, shape (N, N): a NumPy array, or a ``scipy.sparse.csr_array`` if the weights were sparse.

    Raises:
        ValueError: weights that are not square, not symmetric, negative, not finite, or a node without any weight.

    >>> graph_laplacian([[0.0, 2.0], [2.0, 0.0]])
    array([[ 1., -1.],
           [-1.,  1.]])
    """
    sparse = scipy.sparse.issparse(weights)
    array("weights", weights.data if sparse else weights)
    weights = scipy.sparse.csr_array(weights) if sparse else np.asarray(weights, np.float64)
    if weights.ndim != 2 or weights.shape[0] != weights.shape[1]:
        raise ValueError(f"weights: shape {weights.shape}; wanted (N, N)")
    values = weights.data if sparse else weights
    if not np.all(np.isfinite(values)) or np.any(values < 0):
        raise ValueError("weights: has values that are negative or not finite; wanted affinities >= 0")
    if abs(weights - weights.T).max() > 1e-10 * max(1.0, abs(weights).max()):
        raise ValueError("weights: not symmetric; wanted W = W^T")
    degrees = np.asarray(weights.sum(axis=1)).ravel()
    if np.any(degrees <= 0):
        raise ValueError(f"weights: node {int(np.argmin(degrees))} has no weight to any node; wanted every degree > 0")
    scale = 1 / np.sqrt(degrees) if normalized else np.ones_like(degrees)
    diagonal = np.ones_like(degrees) if normalized else degrees
    if sparse:
        return (scipy.sparse.diags_array(diagonal) - weights.multiply(scale).multiply(scale[:, None])).tocsr()
    return np.diag(diagonal) - scale[:, None] * weights * scale


def eigenbasis(laplacian: Any, modes: int | None = None, *, seed: int = 0) -> GraphBasis:
    """The lowest eigenpairs of a Laplacian.

    Small graphs are decomposed densely. Larger ones go through Lanczos iterations (ARPACK) around a sparse LU
    factorization, which suits graphs of few neighbours.

    Args:
        laplacian: matrix, symmetric and not negative, shape (N, N), dense or sparse.
        modes: number of eigenpairs beyond the null space; None for all, which large graphs do not allow.
        seed: seed of the iterations' first vector.

    Returns:
        A :class:`GraphBasis` with ``nullity + modes`` pairs.

    Raises:
        TypeError: ``laplacian`` is no matrix of real numbers, ``modes`` or ``seed`` no whole number.
        ValueError: a Laplacian that is not finite or not square, ``modes`` out of range, or None for a graph too large
            for all.

    >>> path = graph_laplacian([[0.0, 1.0, 0.0], [1.0, 0.0, 1.0], [0.0, 1.0, 0.0]], normalized=False)
    >>> eigenbasis(path).eigenvalues.round(6).tolist()
    [0.0, 1.0, 3.0]
    """
    numbers = array("laplacian", laplacian.data if scipy.sparse.issparse(laplacian) else laplacian)
    if not np.all(np.isfinite(numbers)):
        raise ValueError("laplacian: has values that are not finite; wanted that of graph_laplacian(weights)")
    modes, seed = modes if modes is None else whole("modes", modes), whole("seed", seed, 0)
    if getattr(laplacian, "ndim", 0) != 2 or laplacian.shape[1] != laplacian.shape[0]:
        raise ValueError(f"laplacian: shape {np.shape(laplacian)}; wanted (N, N)")
    size = laplacian.shape[0]
    if np.abs(laplacian - laplacian.T).max() > 1e-10 * np.abs(laplacian).max() or laplacian.diagonal().min() < 0:
        raise ValueError(
            "laplacian: not symmetric, or with a negative diagonal; wanted that of graph_laplacian(weights)"
        )
    if np.abs(laplacian - scipy.sparse.diags_array(laplacian.diagonal())).max() and laplacian.min() >= 0:
        raise ValueError("laplacian: without a negative number beside the diagonal; wanted graph_laplacian(weights)")
    parts, _ = scipy.sparse.csgraph.connected_components(scipy.sparse.csr_array(laplacian), directed=False)
    if modes is None and size > _DENSE_NODES:
        raise ValueError(f"modes: None for {size} nodes; wanted a number, since all of them would take (N, N) memory")
    wanted = size if modes is None else modes + parts
    if modes is not None and not 1 <= modes <= size - parts:
        raise ValueError(f"modes: {modes}; wanted 1 to {size - parts} beyond the null space of {parts}")
    values, vectors = _lowest(laplacian, wanted, seed)
    # Parts that hang together by weights below the rounding are apart: such an eigenvalue would be rounding alone. That
    # goes by the largest one, at most twice the diagonal, and not by N: those of long chains are small and right.
    zero = 100 * np.finfo(np.float64).eps * 2 * laplacian.diagonal().max()
    while modes is not None and len(values) < (wanted := modes + (null := int(np.sum(values <= zero)))):
        if wanted > size:
            raise ValueError(f"modes: {modes}; wanted 1 to {size - null} beyond the null space of {null}")
        values, vectors = _lowest(laplacian, wanted, seed)
    null = max(int(parts), int(np.sum(values <= zero)))
    values = np.where(np.arange(len(values)) < null, 0.0, values)
    return GraphBasis(values, vectors, null)


def graph_prior(basis: GraphBasis, *, tau: float = 0.0, alpha: float = 1.0) -> Gaussian:
    r"""The prior :math:`N(0, (L + \tau^2 I)^{-\alpha})` of functions on the nodes, restricted to the basis' vectors.

    With ``tau=0`` the null space of L, where the covariance would be infinite, is left out: functions are then
    orthogonal to those constant on every connected part (up to the degrees), as in the paper.

    Args:
        basis: eigenpairs of the Laplacian.
        tau: shift, >= 0.
        alpha: smoothness, > 0.

    Returns:
        A prior whose ``sample(key)`` has shape (N,), for :func:`eki_jax.sample_ensemble`.

    Raises:
        TypeError: ``basis`` is no :class:`GraphBasis`, ``tau`` or ``alpha`` no number.
        ValueError: ``tau`` < 0, ``alpha`` <= 0, or nothing left besides the null space.

    >>> import jax
    >>> laplacian = graph_laplacian(gaussian_affinity([[0.0], [1.0], [5.0]], width=1.0))
    >>> graph_prior(eigenbasis(laplacian)).sample(jax.random.key(0)).shape
    (3,)
    """
    _check_basis(basis)
    real("tau", tau, NOT_NEGATIVE)
    real("alpha", alpha, POSITIVE)
    first = basis.nullity if tau == 0 else 0
    values, vectors = basis.eigenvalues[first:], basis.vectors[:, first:]
    if not len(values):
        raise ValueError("basis: has only the null space, which tau = 0 leaves out; wanted more modes or tau > 0")
    factor = vectors * (values + tau**2) ** (-alpha / 2)
    return gaussian(jnp.zeros(len(factor)), factor=jnp.asarray(factor, jnp.float32))


def observed_value(u: Float[Array, " N"], nodes: Int[Array, " n"]) -> Float[Array, " n"]:
    """Forward map of one particle: the values of ``u`` at the observed nodes.

    Raises:
        TypeError: ``u`` or ``nodes`` are no arrays, ``nodes`` no whole numbers.
        ValueError: nodes out of range (where they are known).

    >>> observed_value(jnp.array([0.5, -2.0, 3.0]), jnp.array([2, 0]))
    Array([3. , 0.5], dtype=float32)
    """
    return u[_checked_nodes(u, nodes)]


def observed_sign(u: Float[Array, " N"], nodes: Int[Array, " n"]) -> Float[Array, " n"]:
    """Forward map of one particle: the classes, +1 or -1, of the observed nodes.

    It has no derivative worth the name, and the method needs none.

    >>> observed_sign(jnp.array([0.5, -2.0, 3.0]), jnp.array([1, 2]))
    Array([-1.,  1.], dtype=float32)
    """
    return jnp.sign(u[_checked_nodes(u, nodes)])


def _checked_nodes(u: Array, nodes: Any) -> Any:
    """``nodes``, which are indices of ``u``; JAX takes what is out of range for the last one."""
    array("u", u)
    nodes = array("nodes", nodes) if hasattr(nodes, "dtype") else np.asarray(array("nodes", nodes))
    if np.ndim(u) != 1 or not jnp.issubdtype(jnp.result_type(nodes), jnp.integer):
        raise TypeError(f"nodes: dtype {jnp.result_type(nodes)} for u of shape {np.shape(u)}; wanted indices of (N,)")
    if is_known(nodes) and np.size(nodes) and not (np.min(nodes) >= 0 and np.max(nodes) < len(u)):
        raise ValueError(f"nodes: {np.min(nodes)} to {np.max(nodes)}; wanted 0 to {len(u) - 1}")
    return nodes


#: The mean of the squared differences over the observed nodes, ``mean_squared_error(outputs, labels)``; a loss for all
#: solvers, which knows its curvature.
mean_squared_error = MeanSquaredError()


def fiedler_vector(basis: GraphBasis) -> Float[np.ndarray, " N"]:
    """The eigenvector of the least eigenvalue above zero: its sign is the classic way to cut a graph in two.

    Raises:
        TypeError: ``basis`` is no :class:`GraphBasis`.
        ValueError: the basis has only the null space.

    >>> u = fiedler_vector(eigenbasis(graph_laplacian(gaussian_affinity([[0.0], [1.0], [9.0], [9.5]], width=3.0))))
    >>> bool(u[0] * u[1] > 0), bool(u[2] * u[3] > 0), bool(u[1] * u[2] > 0)
    (True, True, False)
    """
    _check_basis(basis)
    if len(basis.eigenvalues) <= basis.nullity:
        raise ValueError("basis: has only the null space; wanted at least one mode more")
    return basis.vectors[:, basis.nullity]


def _check_basis(basis: Any) -> None:
    if not isinstance(basis, GraphBasis):
        raise TypeError(f"basis: a {type(basis).__name__}; wanted a GraphBasis, from eigenbasis(laplacian)")


def _lowest(laplacian: Any, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The lowest eigenpairs, of large graphs by Lanczos on ``(L + shift I)^-1``, whose spectrum is wider there."""
    if laplacian.shape[0] <= _DENSE_NODES:
        dense = laplacian.toarray() if scipy.sparse.issparse(laplacian) else laplacian
        return scipy.linalg.eigh(dense, subset_by_index=[0, count - 1])
    shift = 1e-6 * float(abs(laplacian).sum(axis=1).max())
    start = np.random.default_rng(seed).standard_normal(laplacian.shape[0])
    matrix = scipy.sparse.csc_array(laplacian)
    values, vectors = scipy.sparse.linalg.eigsh(matrix, k=count, sigma=-shift, which="LM", v0=start)
    order = np.argsort(values)
    return values[order], vectors[:, order]
