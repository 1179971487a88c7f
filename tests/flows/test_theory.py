"""What is proved about ensemble Kalman inversion, with numbers. For linear models unless it says otherwise.

Each test would fail if the field had another sign, lost its 1/J, or if a step size were off by a factor.
"""

from __future__ import annotations

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import sqrtm

import eki_jax
from eki_jax.flows import nesterov_flow, nesterov_start, square_root_flow
from eki_jax.kalman import enkf

NOISE = np.diag([0.5, 1.0, 2.0, 0.8]) + 0.2
PRECISION = np.linalg.inv(NOISE)
A = np.random.default_rng(0).normal(size=(4, 3))
TRUTH = np.array([0.7, -0.4, 1.1])
LOSS = eki_jax.squared_error(PRECISION)
TIMES = np.array([0.3, 1.0, 5.0])


def linear(u, x):
    return x @ u


def ensemble(count: int = 6, size: int = 3) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(count, size))


def solve(field, state, batch, times, start: float = 0.0):
    """The flow at ``times``, to about ten digits."""
    controller = diffrax.PIDController(rtol=1e-11, atol=1e-13)
    return diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        diffrax.Dopri5(),
        start,
        float(times[-1]),
        1e-4,
        state,
        batch,
        saveat=diffrax.SaveAt(ts=jnp.asarray(times)),
        stepsize_controller=controller,
        max_steps=100_000,
    ).ys


def covariance(u: np.ndarray) -> np.ndarray:
    return np.cov(np.asarray(u).T, ddof=0)


def hessian(a: np.ndarray = A) -> np.ndarray:
    return a.T @ PRECISION @ a


def minimiser(targets: np.ndarray) -> np.ndarray:
    return np.linalg.solve(hessian(), A.T @ PRECISION @ targets)


def test_direction_is_the_preconditioned_gradient(x64):
    """C_uG r_j = C(u) grad Phi(u_j), exactly."""
    u, targets = ensemble(), jnp.array([1.0, 0.2, -0.5, 0.3])
    _, d = eki_jax.value_and_direction(linear, LOSS)(jnp.asarray(u), (A, targets))
    gradients = jax.vmap(jax.grad(lambda v: LOSS(linear(v, A), targets)))(jnp.asarray(u))
    np.testing.assert_allclose(d, gradients @ covariance(u), rtol=1e-12)


def test_exact_solution(x64):
    """u_j(t) = u* + (I + 2 t C_0 B)^(-1/2) (u_j(0) - u*) with B = A^T Gamma^-1 A, data not attainable."""
    u, targets = ensemble(), jnp.array([1.0, 0.2, -0.5, 0.3])
    found = solve(eki_jax.vector_field(linear, LOSS), jnp.asarray(u), (A, targets), TIMES)
    best = minimiser(np.asarray(targets))
    for t, at in zip(TIMES, found, strict=True):
        shrink = np.linalg.inv(sqrtm(np.eye(3) + 2 * t * covariance(u) @ hessian()))
        np.testing.assert_allclose(at, best + (u - best) @ shrink.T, atol=1e-9)


def test_exact_solution_with_nesterov_momentum(x64):
    """u_j(t) = u* + (I + t^2 C_0 B / 8)^-1 (u_j(0) - u*): O(1/t^2) where the plain flow has O(t^-1/2).

    Every eigenvector of C_0 B obeys x'' + 3 x' / t = -b x^3, the Lane-Emden equation of index 3 in four dimensions.
    """
    u, targets, t0 = ensemble(), jnp.array([1.0, 0.2, -0.5, 0.3]), 1e-3
    start = nesterov_start(linear, LOSS, jnp.asarray(u), (A, targets), t0)
    times = np.array([0.3, 1.0, 5.0, 50.0])
    found, _ = solve(nesterov_flow(linear, LOSS), start, (A, targets), times, start=t0)
    best = minimiser(np.asarray(targets))
    for t, at in zip(times, found, strict=True):
        shrink = np.linalg.inv(np.eye(3) + t**2 * covariance(u) @ hessian() / 8)
        np.testing.assert_allclose(at, best + (u - best) @ shrink.T, atol=1e-9)


def test_nesterov_iteration_leaves_the_flow(x64):
    """Nesterov's iteration leaves the flow in the end.

    The flow's solution is a separatrix, 8 / (b t^2); after many steps the iteration falls like 1/t instead.
    """
    u = jnp.array([[1.5], [-0.5]])  # mean 0.5, variance 1, so that every u_j - u* is multiplied by one x(t) with b = 1
    solver = eki_jax.nesterov(
        lambda v, x: v, eki_jax.squared_error(), eki_jax.constant_step_size(0.01), eki_jax.su_boyd_candes()
    )
    steps = np.array([100, 2_000, 16_000])

    @jax.jit
    def shrunk(n):
        state = jax.lax.fori_loop(0, n, lambda _, s: solver.step(s, (0.0, jnp.zeros(1)))[0], solver.init(u))
        return state.position[0, 0] / u[0, 0]

    x, t = np.array([float(shrunk(n)) for n in steps]), 0.1 * steps
    np.testing.assert_allclose(x[0], 1 / (1 + t[0] ** 2 / 8), rtol=0.25)
    assert np.all(x[1:] * t[1:] > 5 * 8 / t[1:])
    assert np.all((x[1:] * t[1:] > 0.2) & (x[1:] * t[1:] < 1.5))


def test_covariance_and_mean_on_the_span(x64):
    """C(t)^-1 = C(0)^-1 + 2 t A^T Gamma^-1 A on the span of 3 particles in 5 dimensions; the mean's ODE is linear."""
    a = np.random.default_rng(4).normal(size=(4, 5))
    u, targets = ensemble(3, 5), jnp.array([1.0, 0.2, -0.5, 0.3])
    found = np.asarray(solve(eki_jax.vector_field(linear, LOSS), jnp.asarray(u), (a, targets), TIMES))
    basis = np.linalg.svd(u - u.mean(0), full_matrices=False)[2][:2].T
    reduced = np.linalg.inv(basis.T @ covariance(u) @ basis)
    for t, at in zip(TIMES, found, strict=True):
        expected = reduced + 2 * t * basis.T @ hessian(a) @ basis
        np.testing.assert_allclose(np.linalg.inv(basis.T @ covariance(at) @ basis), expected, rtol=1e-8)

    def mean_field(t, mean, targets):
        c = basis @ jnp.linalg.inv(reduced + 2 * t * basis.T @ hessian(a) @ basis) @ basis.T
        return -c @ a.T @ PRECISION @ (a @ mean - targets)

    np.testing.assert_allclose(found.mean(1), solve(mean_field, jnp.asarray(u.mean(0)), targets, TIMES), atol=1e-9)


@pytest.mark.parametrize(
    "noise", [pytest.param(False, id="attainable", marks=pytest.mark.slow), pytest.param(True, id="noisy")]
)
def test_residuals_along_and_across_the_span(x64, noise):
    """Residuals along the span vanish and across it stay.

    A r = A r_par + A r_perp: |A r_par|^2 = O(1/t), so |A r_par| = O(t^-1/2); A r_perp does not move.
    """
    a = np.random.default_rng(4).normal(size=(4, 5))
    u = ensemble(3, 5)
    targets = a @ np.arange(5.0) / 5 + (np.array([0.3, -0.2, 0.1, 0.4]) if noise else 0)
    times = np.array([0.5, 1e3, 1e4, 1e5])
    found = np.asarray(solve(eki_jax.vector_field(linear, LOSS), jnp.asarray(u), (a, jnp.asarray(targets)), times))
    white = np.linalg.cholesky(PRECISION).T  # orthogonal in the noise's inner product
    residuals = (np.concatenate([u[None], found]) @ a.T - targets) @ white.T
    span = np.linalg.svd((u - u.mean(0)) @ a.T @ white.T, full_matrices=False)[2][:2]
    along = residuals @ span.T @ span
    across = residuals - along
    assert np.linalg.norm(across[0]) > 0.5
    np.testing.assert_allclose(across, np.broadcast_to(across[:1], across.shape), atol=1e-9)
    np.testing.assert_allclose(across, np.broadcast_to(across[:, :1], across.shape), atol=1e-9)  # one for all particles
    norms = np.linalg.norm(along, axis=-1)
    slopes = np.polyfit(np.log(times[1:]), np.log(norms[2:]), 1)[0]
    np.testing.assert_allclose(slopes, -0.5, atol=0.01)


def test_square_root_mean_vanishes_like_1_over_t(x64):
    """The mean of the square-root flow vanishes like 1/t.

    There the mean is the Kalman-Bucy filter's, and |A r_par| of the mean is O(1/t).
    """
    times = np.array([1e3, 1e4, 1e5])
    found = solve(square_root_flow(linear, LOSS), jnp.asarray(ensemble()), (A, jnp.asarray(A @ TRUTH)), times)
    norms = np.linalg.norm((np.asarray(found).mean(1) - TRUTH) @ A.T, axis=-1)
    np.testing.assert_allclose(np.polyfit(np.log(times), np.log(norms), 1)[0], -1, atol=0.01)


def test_square_root_flow_is_kalmans_update(x64):
    """The square-root flow is the finite ensemble's Kalman update.

    At t = 1, mean and covariance (with 1/J) are those of Bayes' rule; at time t those for the noise Gamma / t.
    """
    u, targets = ensemble(), np.array([1.0, 0.2, -0.5, 0.3])
    found = solve(square_root_flow(linear, LOSS), jnp.asarray(u), (A, jnp.asarray(targets)), TIMES)
    assert 1.0 in TIMES
    for t, at in zip(TIMES, found, strict=True):
        c = covariance(u)
        gain = c @ A.T @ np.linalg.inv(A @ c @ A.T + NOISE / t)
        np.testing.assert_allclose(at.mean(0), u.mean(0) + gain @ (targets - A @ u.mean(0)), atol=1e-10)
        np.testing.assert_allclose(covariance(at), c - gain @ A @ c, atol=1e-10)
        best, shrink = minimiser(targets), np.linalg.inv(np.eye(3) + t * c @ hessian())
        np.testing.assert_allclose(at.mean(0), best + shrink @ (u.mean(0) - best), atol=1e-10)
        np.testing.assert_allclose(np.linalg.inv(covariance(at)), np.linalg.inv(c) + t * hessian(), rtol=1e-8)


def curved(u, x):
    """Not linear, three parameters to four positive outputs."""
    return jax.nn.softmax(x @ jnp.tanh(u) + 0.1 * u[0] * u[1])


def solvers(forward, loss):
    """What moves an ensemble without noise, and how far: (initial state, function to the ensemble) for each."""
    dt = eki_jax.constant_step_size(0.2)
    euler, nesterov = eki_jax.euler(forward, loss, dt), eki_jax.nesterov(forward, loss, dt, 0.8)
    kalman = enkf(forward, 0.5, 0.3)

    def steps(solver):
        return lambda u, batch: jax.lax.fori_loop(0, 5, lambda _, s: solver.step(s, batch)[0], solver.init(u)).position

    fields = {"field": eki_jax.vector_field(forward, loss), "square_root": square_root_flow(forward, loss)}
    maps = {name: lambda u, batch, f=f: f(0.0, u, batch) + u for name, f in fields.items()}
    return maps | {"euler": steps(euler), "nesterov": steps(nesterov), "kalman": steps(kalman)}


@pytest.mark.parametrize("name", ["field", "square_root", "euler", "nesterov", "kalman"])
def test_subspace_property_and_affine_invariance(x64, name):
    """Particles stay in the affine span of the first; and u -> M u + b commutes with everything. Any model and loss."""
    u, batch = ensemble(), (A, jnp.array([0.0, 1.0, 0.0, 0.0]))
    loss = eki_jax.squared_error() if name == "kalman" else eki_jax.cross_entropy()
    matrix, shift = np.random.default_rng(2).normal(size=(3, 3)), np.array([3.0, -1.0, 2.0])
    inverse = np.linalg.inv(matrix)
    moved = jax.jit(solvers(curved, loss)[name])(jnp.asarray(u), batch)
    assert np.abs(moved - u).max() > 1e-3

    there = solvers(lambda v, x: curved(inverse @ (v - shift), x), loss)[name]
    mapped = jax.jit(there)(jnp.asarray(u @ matrix.T + shift), batch)
    np.testing.assert_allclose(mapped, moved @ matrix.T + shift, atol=1e-9)

    few = u[:3]  # a plane in three dimensions
    normal = np.linalg.svd(few - few.mean(0))[2][2]
    left = (np.asarray(jax.jit(solvers(curved, loss)[name])(jnp.asarray(few), batch)) - few.mean(0)) @ normal
    np.testing.assert_allclose(left, 0, atol=1e-12)


def test_proposition_one(x64):
    """For one sample, |y - G|_1 = 2 (1 - G_k) and |grad L|_1 = 1 / G_k rank every set of models alike."""
    points = np.random.default_rng(0).dirichlet(np.ones(5), size=200)
    label = jnp.eye(5)[2]
    distances = np.abs(label - points).sum(1)
    gradients = np.asarray(jax.vmap(jax.grad(eki_jax.cross_entropy(0.0)), (0, None))(points, label))
    np.testing.assert_allclose(distances, 2 * (1 - points[:, 2]), rtol=1e-12)
    np.testing.assert_allclose(np.abs(gradients).sum(1), 1 / points[:, 2], rtol=1e-12)
    np.testing.assert_array_equal(np.argsort(distances), np.argsort(np.abs(gradients).sum(1)))


def test_proposition_one_for_several_samples(x64):
    """Proposition one for several samples needs independent outputs.

    Where the samples' outputs can be chosen independently the minimisers agree; in general they need not.
    """
    loss, labels = eki_jax.cross_entropy(0.0), jnp.eye(3)[jnp.array([0, 2])]

    def norms(models):
        gradients = jax.vmap(jax.grad(loss), (0, None))(models, labels)
        return np.abs(np.asarray(labels - models)).sum((1, 2)), np.abs(np.asarray(gradients)).sum((1, 2))

    points = np.random.default_rng(0).dirichlet(np.ones(3), size=(2, 30))
    every = np.stack([np.stack([a, b]) for a in points[0] for b in points[1]])
    distances, gradients = norms(jnp.asarray(every))
    assert np.argmin(distances) == np.argmin(gradients)
    one_sided = [[0.9, 0.05, 0.05], [0.45, 0.45, 0.1]]  # sure of one sample, wrong on the other
    undecided = [[0.49, 0.26, 0.25], [0.26, 0.25, 0.49]]
    distances, gradients = norms(jnp.array([one_sided, undecided]))
    assert np.argmin(distances) == 0
    assert np.argmin(gradients) == 1
