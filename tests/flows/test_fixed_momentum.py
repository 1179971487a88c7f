"""Momentum as a flow: the measured orders of every statement in `eki_jax.momentum`."""

from __future__ import annotations

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from eki_jax import momentum as m
from eki_jax.kernel.products import direction

STEPS = (128, 256, 512)  # the time interval [0, 1] in steps of 1/128, 1/256 and 1/512
LAMBDA = 0.5
METHODS = pytest.mark.parametrize("nesterov", [False, True], ids=["heavy_ball", "nesterov"])
HEAVY_BALL, NESTEROV = pytest.param(False, id="heavy_ball"), pytest.param(True, id="nesterov")
SLOW_HEAVY_BALL = pytest.param(False, id="heavy_ball", marks=pytest.mark.slow)
SLOW_NESTEROV = pytest.param(True, id="nesterov", marks=pytest.mark.slow)


def loss(u: dict[str, jax.Array]) -> jax.Array:
    """Neither quadratic nor convex everywhere, on a pytree of two leaves."""
    x, y = u["x"], u["y"]
    return jnp.log(jnp.cosh(x[0] - 0.5)) + 0.5 * (y - 0.6 * x[1] ** 2) ** 2 + 0.3 * x[0] ** 2 * x[1] ** 2


def start() -> dict[str, jax.Array]:
    return {"x": jnp.array([1.2, -0.9]), "y": jnp.array(1.5)}


def ensemble_problem():
    """Five particles in two dimensions under a non-linear model; the gradient is the ensemble's direction."""
    ensemble = jnp.array([[1.0, 0.2], [-0.4, 0.9], [0.3, -1.1], [-0.8, -0.5], [0.6, 1.3]])
    forward = jax.vmap(lambda u: jnp.stack([u[0] + 0.3 * u[1] ** 2, jnp.sin(u[1]), u[0] * u[1]]))

    def gradient(particles: jax.Array, targets: jax.Array) -> jax.Array:
        outputs = forward(particles)
        return direction(particles, outputs, outputs - targets)

    return gradient, ensemble, jnp.array([0.4, -0.2, 0.1])


def solve(field, state, args=None, t1: float = 1.0):
    """The end of the flow, to about ten digits."""
    controller = diffrax.PIDController(rtol=1e-10, atol=1e-11)
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(field), diffrax.Tsit5(), 0.0, t1, 1e-3, state, args, stepsize_controller=controller
    )
    return jax.tree.map(lambda leaf: leaf[-1], solution.ys)


def distance(a, b) -> float:
    return max(float(jnp.abs(x - y).max()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def last(trajectory):
    return jax.tree.map(lambda leaf: leaf[-1], trajectory)


def slope(errors: list[float]) -> float:
    """Order of convergence: the least-squares slope of log error against log step size."""
    return float(np.polyfit(-np.log(STEPS), np.log(errors), 1)[0])


def at_time_one(gradient, params, nesterov: bool, args=None):
    """The iterates at time 1 for every step size: started from rest, and started on the invariant manifold."""

    def run(h):
        velocity = m.manifold_velocity(gradient, h, LAMBDA, nesterov=nesterov)(params, args)
        previous = jax.tree.map(lambda u, v: u - h * v, params, velocity)
        paths = [
            m.iterate(gradient, params, h, LAMBDA, max(STEPS), nesterov=nesterov, previous=before, args=args)
            for before in (None, previous)
        ]
        return jax.tree.map(lambda leaf: leaf[jnp.round(1 / h).astype(int)], paths)

    return jax.jit(jax.vmap(run))(1 / jnp.array(STEPS))


def flows_at_time_one(gradient, params, nesterov: bool, args=None):
    """The flows that `eki_jax.momentum` claims to be close, for every step size; all of them in one solve."""
    slow = m.gradient_flow(gradient, LAMBDA)
    velocities = {
        "matched": m.initial_velocity(gradient, params, LAMBDA, nesterov=nesterov, args=args),
        "unmatched": slow(0.0, params, args),
    }

    def run(h):
        fields = {"limit": slow, "manifold": m.manifold_flow(gradient, h, LAMBDA, nesterov=nesterov)}
        fields |= {name: m.modified_equation(gradient, h, LAMBDA, nesterov=nesterov) for name in velocities}
        state = {"limit": params, "manifold": params} | {name: (params, v) for name, v in velocities.items()}
        return solve(lambda t, y, args: {name: field(t, y[name], args) for name, field in fields.items()}, state, args)

    return jax.jit(jax.vmap(run))(1 / jnp.array(STEPS))


def check_orders(gradient, params, nesterov: bool, args=None) -> None:
    """Gradient flow follows to first order; the modified equation and the flow on the manifold to second."""
    rested, flowing = at_time_one(gradient, params, nesterov, args)
    flows = flows_at_time_one(gradient, params, nesterov, args)

    def order(iterates, flow) -> float:
        return slope([distance(*jax.tree.map(lambda leaf, i=i: leaf[i], (iterates, flow))) for i in range(len(STEPS))])

    assert abs(order(rested, flows["limit"]) - 1) < 0.1
    assert abs(order(flowing, flows["limit"]) - 1) < 0.1
    assert abs(order(rested, flows["matched"][0]) - 2) < 0.1
    assert abs(order(rested, flows["unmatched"][0]) - 1) < 0.1  # the lag of the start is felt for good
    assert abs(order(flowing, flows["manifold"]) - 2) < 0.1


@pytest.mark.parametrize("nesterov", [SLOW_HEAVY_BALL, NESTEROV])
def test_orders_of_the_limit_and_its_corrections(x64, nesterov):
    check_orders(jax.grad(loss), start(), nesterov)


@pytest.mark.parametrize("nesterov", [HEAVY_BALL, SLOW_NESTEROV])
def test_ensemble_direction_obeys_the_same_orders(x64, nesterov):
    """The direction of an ensemble is not a gradient in the joint space; nothing here needs it to be one."""
    gradient, ensemble, targets = ensemble_problem()
    check_orders(gradient, ensemble, nesterov, targets)


def test_limit_is_gradient_flow_in_faster_time():
    """A factor of 0.9 is a learning rate ten times as large."""
    slow, fast = (m.gradient_flow(jax.grad(loss), factor)(0.0, start()) for factor in (0.0, 0.9))
    assert distance(fast, jax.tree.map(lambda g: -10 * g, jax.grad(loss)(start()))) < 1e-4
    assert distance(slow, jax.tree.map(lambda v: v / 10, fast)) < 1e-5


@METHODS
def test_velocity_lands_on_the_manifold(x64, nesterov):
    """(u_n - u_{n-1}) / h differs from the manifold by O(h^2), from -(1 - lambda)^-1 g only by O(h)."""
    gradient = jax.grad(loss)
    errors, leading = [], []
    for n in STEPS:
        path = m.iterate(gradient, start(), 1 / n, LAMBDA, n, nesterov=nesterov)
        velocity = jax.tree.map(lambda leaf, n=n: n * (leaf[-1] - leaf[-2]), path)
        errors.append(distance(velocity, m.manifold_velocity(gradient, 1 / n, LAMBDA, nesterov=nesterov)(last(path))))
        leading.append(distance(velocity, m.gradient_flow(gradient, LAMBDA)(0.0, last(path))))
    assert abs(slope(errors) - 2) < 0.1
    assert abs(slope(leading) - 1) < 0.1


@METHODS
def test_manifold_attracts_by_lambda_a_step(x64, nesterov):
    momentum, h, steps = 0.8, 1e-4, 30
    gradient = jax.grad(loss)
    path = m.iterate(gradient, start(), h, momentum, steps, nesterov=nesterov)
    manifold = jax.vmap(m.manifold_velocity(gradient, h, momentum, nesterov=nesterov))
    velocity = jax.tree.map(lambda leaf: (leaf[1:] - leaf[:-1]) / h, path)
    on_it = manifold(jax.tree.map(lambda leaf: leaf[1:], path))
    gaps = jax.vmap(lambda a, b: optax.tree.norm(optax.tree.sub(a, b)))(velocity, on_it)
    rate = np.exp(np.polyfit(np.arange(steps), np.log(gaps), 1)[0])
    assert abs(rate - momentum) < 0.002


@METHODS
def test_manifold_flow_descends_the_modified_loss(x64, nesterov):
    h, momentum = 0.05, 0.7
    modified = m.modified_loss(loss, h, momentum, nesterov=nesterov)
    field = m.manifold_flow(jax.grad(loss), h, momentum, nesterov=nesterov)
    expected = jax.tree.map(lambda g: -g / (1 - momentum), jax.grad(modified)(start()))
    assert distance(field(0.0, start()), expected) < 1e-12
    alpha = 0.5 * (1 + momentum - 2 * (momentum if nesterov else 0) * (1 - momentum))
    grads = jax.grad(loss)(start())
    square = sum(float((g**2).sum()) for g in jax.tree.leaves(grads))
    assert float(modified(start())) == pytest.approx(float(loss(start())) + h * alpha / 0.3**2 * square / 2, rel=1e-12)


def test_differences_replace_the_derivative(x64):
    """For models that JAX cannot differentiate; the central difference is of second order in its length."""
    gradient, ensemble, targets = ensemble_problem()

    def foreign(u, y):
        return jax.pure_callback(lambda a, b: np.asarray(gradient(a, b)), jax.ShapeDtypeStruct(u.shape, u.dtype), u, y)

    exact = m.manifold_flow(gradient, 0.1, LAMBDA)(0.0, ensemble, targets)
    errors = [
        distance(m.manifold_flow(foreign, 0.1, LAMBDA, difference=1 / n)(0.0, ensemble, targets), exact) for n in STEPS
    ]
    assert abs(slope(errors) - 2) < 0.1
    exact = m.manifold_velocity(gradient, 0.1, LAMBDA)(ensemble, targets)
    assert distance(m.manifold_velocity(foreign, 0.1, LAMBDA, difference=1e-4)(ensemble, targets), exact) < 1e-6


@METHODS
def test_iterates_are_those_of_optax(x64, nesterov):
    """optax holds the extrapolated points of Nesterov's method, u_n + lambda (u_n - u_{n-1})."""
    optimizer = optax.sgd(0.1, LAMBDA, nesterov=nesterov)
    params, state = start(), optimizer.init(start())
    path = m.iterate(jax.grad(loss), start(), 0.1, LAMBDA, 6, nesterov=nesterov)
    lookahead = LAMBDA if nesterov else 0.0
    for n in range(1, 7):
        updates, state = optimizer.update(jax.grad(loss)(params), state)
        params = optax.apply_updates(params, updates)
        expected = jax.tree.map(lambda leaf, n=n: leaf[n] + lookahead * (leaf[n] - leaf[n - 1]), path)
        assert distance(params, expected) < 1e-14


def test_single_precision_stays_single():
    double = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), start())
    path = m.iterate(jax.grad(loss), start(), 0.1, LAMBDA, 3, previous=double)
    fields = (m.gradient_flow(jax.grad(loss), LAMBDA), m.manifold_flow(jax.grad(loss), 0.1, LAMBDA))
    results = [path, *(field(0.0, start()) for field in fields)]
    results.append(m.modified_equation(jax.grad(loss), 0.1, LAMBDA)(0.0, (start(), start())))
    assert {leaf.dtype for leaf in jax.tree.leaves(results)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("momentum", [-0.1, 1.0, float("nan")])
def test_momentum_outside_its_range_is_refused(momentum):
    with pytest.raises(ValueError, match=r"momentum: .*; wanted a number in \[0, 1\)"):
        m.gradient_flow(jax.grad(loss), momentum)
    with pytest.raises(ValueError, match="momentum"):
        m.initial_velocity(jax.grad(loss), start(), momentum)


@pytest.mark.parametrize("step_size", [0.0, -0.1, float("inf")])
@pytest.mark.parametrize("make", [m.modified_equation, m.manifold_flow, m.manifold_velocity, m.modified_loss])
def test_step_size_must_be_positive(make, step_size):
    with pytest.raises(ValueError, match=r"step_size: .*; wanted a finite number > 0"):
        make(jax.grad(loss), step_size, 0.5)


def test_negative_number_of_steps_is_refused():
    with pytest.raises(ValueError, match="steps: -1; wanted"):
        m.iterate(jax.grad(loss), start(), 0.1, 0.5, -1)
