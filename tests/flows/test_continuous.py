"""The fields in an ODE solver: explicit, adaptive, dense output and events; the flows with momentum; bad input."""

from __future__ import annotations

import subprocess
import sys

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optimistix
import pytest
from jax.experimental import checkify

import eki_jax
from eki_jax import momentum
from eki_jax.flows import guarded, heavy_ball_flow, nesterov_flow, nesterov_start, square_root_flow

TARGETS = jnp.array([0.4, -0.2, 0.1])
BATCH = (0.3, TARGETS)
SQUARED = eki_jax.squared_error()


def model(u, x):
    return jnp.stack([u["a"] + x * u["b"] ** 2, jnp.sin(u["b"]), u["a"] * u["b"]])


def probabilities(u, x):
    return jax.nn.softmax(model(u, x))


def huber(outputs, targets):
    """A loss of the user's own."""
    return jnp.sum(jnp.sqrt(1 + (outputs - targets) ** 2) - 1)


def ensemble():
    return {"a": jnp.array([1.0, -0.4, 0.3, -0.8, 0.6]), "b": jnp.array([0.2, 0.9, -1.1, -0.5, 1.3])}


def rest(u):
    return u, jax.tree.map(jnp.zeros_like, u)


def solve(field, state, batch=BATCH, t1=1.0, t0=0.0, saveat=None, solver=None, rtol=1e-9, **kwargs):
    return diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        diffrax.Tsit5() if solver is None else solver,
        jnp.asarray(t0),  # arrays, so that another time is not another compilation
        jnp.asarray(t1),
        1e-3,
        state,
        batch,
        saveat=diffrax.SaveAt(t1=True) if saveat is None else saveat,
        stepsize_controller=diffrax.PIDController(rtol=rtol, atol=rtol / 10),
        **kwargs,
    )


def end(solution):
    return jax.tree.map(lambda leaf: leaf[-1], solution.ys)


def distance(a, b) -> float:
    return max(float(jnp.abs(x - y).max()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def order(sizes, errors) -> float:
    return float(np.polyfit(np.log(sizes), np.log(errors), 1)[0])


@pytest.mark.parametrize(
    ("solver", "expected"),
    [
        pytest.param(diffrax.Euler(), 1, id="euler"),
        pytest.param(diffrax.Midpoint(), 2, id="midpoint", marks=pytest.mark.slow),
    ],
)
def test_explicit_solvers_have_their_order(x64, solver, expected):
    """Explicit solvers converge with their order.

    diffrax's Euler steps of the field are the library's own with a constant step size.
    """
    field = eki_jax.vector_field(model, SQUARED)
    exact = end(solve(field, ensemble(), rtol=1e-11))
    steps, errors = (32, 64, 128), []
    for n in steps:
        found = diffrax.diffeqsolve(diffrax.ODETerm(field), solver, 0.0, 1.0, jnp.asarray(1 / n), ensemble(), BATCH)
        errors.append(distance(end(found), exact))
    assert abs(order(1 / np.array(steps), errors) - expected) < 0.1
    if expected == 1:
        own = eki_jax.euler(model, SQUARED, eki_jax.constant_step_size(1 / 32))
        state = jax.lax.fori_loop(0, 32, lambda _, s: own.step(s, BATCH)[0], own.init(ensemble()))
        assert abs(distance(state.ensemble, exact) - errors[0]) < 1e-12


@pytest.mark.parametrize(
    ("forward", "loss"),
    [
        pytest.param(model, SQUARED, id="squared_error", marks=pytest.mark.slow),
        pytest.param(probabilities, eki_jax.cross_entropy(), id="cross_entropy"),
        pytest.param(model, huber, id="own", marks=pytest.mark.slow),
    ],
)
def test_adaptive_solve_with_dense_output(x64, forward, loss):
    """For any loss the losses fall, the interpolant passes through a finer solve, and its slope is the field."""
    batch = (0.3, jnp.array([0.0, 1.0, 0.0]))
    field = eki_jax.vector_field(forward, loss)
    solution = solve(field, ensemble(), batch, t1=4.0, saveat=diffrax.SaveAt(ts=jnp.linspace(0, 4, 9), dense=True))
    losses = jax.vmap(lambda u: eki_jax.value_and_direction(forward, loss)(u, batch)[0].mean())(solution.ys)
    assert np.all(np.diff(losses) < 0)
    at = solution.evaluate(1.7)
    assert distance(at, end(solve(field, ensemble(), batch, t1=1.7, rtol=1e-11))) < 1e-5
    assert distance(solution.derivative(1.7), field(1.7, at, batch)) < 1e-3


def test_event_stops_the_flow_at_a_loss(x64):
    """Located by a root finder: the mean loss there is the threshold, to the tolerance asked for."""
    of_batch = eki_jax.value_and_direction(model, SQUARED)
    event = diffrax.Event(
        lambda t, y, args, **kwargs: of_batch(y, args)[0].mean() - 0.2, root_finder=optimistix.Newton(1e-8, 1e-8)
    )
    solution = solve(eki_jax.vector_field(model, SQUARED), ensemble(), t1=100.0, event=event)
    assert solution.result == diffrax.RESULTS.event_occurred
    assert abs(float(of_batch(end(solution), BATCH)[0].mean()) - 0.2) < 1e-7
    assert 0 < float(solution.ts[0]) < 100


def test_nesterov_flow_is_the_limit(x64):
    """The Nesterov flow is the limit of the slides' iteration.

    Step dt and momentum n / (n + 3): the flow at time n sqrt(dt), to first order in sqrt(dt).
    """
    field, t0 = nesterov_flow(model, SQUARED), 1e-3
    start = nesterov_start(model, SQUARED, ensemble(), BATCH, t0)
    exact, _ = end(solve(field, start, t0=t0, t1=2.0, rtol=1e-10))
    steps = np.array([100, 200, 400])

    @jax.jit
    def iterate(n):
        size = eki_jax.constant_step_size((2.0 / n) ** 2)
        solver = eki_jax.nesterov(model, SQUARED, size, eki_jax.su_boyd_candes())
        return jax.lax.fori_loop(0, n, lambda _, s: solver.step(s, BATCH)[0], solver.init(ensemble())).position

    errors = [distance(iterate(n), exact) for n in steps]
    assert abs(order(1 / steps, errors) - 1) < 0.1
    assert errors[-1] < 0.01


def test_heavy_ball_flow_is_the_limit(x64):
    """The heavy-ball flow is the limit of its iteration.

    Momentum 1 - friction sqrt(dt): the flow at time n sqrt(dt), to first order in sqrt(dt).
    """
    exact, _ = end(solve(heavy_ball_flow(model, SQUARED, 1.5), rest(ensemble()), t1=2.0, rtol=1e-10))
    gradient = lambda u: eki_jax.value_and_direction(model, SQUARED)(u, BATCH)[1]
    steps = np.array([100, 200, 400])

    @jax.jit
    @jax.vmap
    def iterate(n):
        path = momentum.iterate(gradient, ensemble(), (2.0 / n) ** 2, 1 - 1.5 * 2.0 / n, 400)
        return jax.tree.map(lambda leaf: leaf[n], path)

    ends = iterate(steps)
    errors = [max(float(jnp.abs(ends[k][i] - exact[k]).max()) for k in exact) for i in range(3)]
    assert abs(order(1 / steps, errors) - 1) < 0.1
    assert errors[-1] < 0.01


@pytest.mark.parametrize("friction", [3.0, pytest.param(5.0, marks=pytest.mark.slow)])
def test_nesterov_start_is_of_fourth_order(x64, friction):
    """The start of the Nesterov flow is of fourth order.

    Beginning at t0 in place of 0 moves the end by O(t0^4); with the wrong constants it would be O(t0^2).
    """
    field = nesterov_flow(model, SQUARED, friction=friction)

    def finish(t0):
        start = nesterov_start(model, SQUARED, ensemble(), BATCH, t0, friction=friction)
        return end(solve(field, start, t0=t0, t1=1.0, rtol=1e-12))[0]

    starts = jnp.array([0.2, 0.1, 0.05, 0.002])
    ends = jax.jit(jax.vmap(finish))(starts)
    errors = [max(float(jnp.abs(leaf[i] - leaf[-1]).max()) for leaf in jax.tree.leaves(ends)) for i in range(3)]
    assert abs(order(starts[:3], errors) - 4) < 0.15
    assert errors[-1] < 1e-6


def test_square_root_flow_takes_any_loss(x64):
    """Written out for cross-entropy with integer labels."""
    loss = eki_jax.cross_entropy()
    field = jax.jit(square_root_flow(lambda u, x: probabilities(u, x)[None], loss))
    batch = (0.3, jnp.array([2]))
    outputs = jax.vmap(lambda u: probabilities(u, 0.3))(ensemble())
    anomalies = outputs - outputs.mean(0)
    cotangents = jnp.zeros_like(outputs).at[:, 2].set(-1 / (0.5 * (outputs[:, 2] + outputs[:, 2].mean()) + 0.005))
    weights = cotangents @ anomalies.T / 5
    expected = jax.tree.map(lambda leaf: -weights @ leaf, ensemble())
    assert distance(field(0.0, ensemble(), batch), expected) < 1e-12


def test_particles_may_be_spread_over_an_axis(x64):
    """Every flow, and the start of one, then makes the same of them."""
    loss, batch = eki_jax.cross_entropy(), (0.3, jnp.array([2]))
    forward = lambda u, x: probabilities(u, x)[None]

    def everything(u, axis_name=None):
        options = {"axis_name": axis_name}
        start = nesterov_start(forward, loss, u, batch, 0.2, **options)
        return [
            square_root_flow(forward, loss, **options)(0.0, u, batch),
            nesterov_flow(forward, loss, **options)(0.2, start, batch),
            heavy_ball_flow(forward, loss, 2.0, **options)(0.2, start, batch),
        ]

    four = jax.tree.map(lambda leaf: leaf[:4], ensemble())
    shards = jax.tree.map(lambda leaf: leaf.reshape(2, 2), four)
    found = jax.jit(jax.vmap(lambda u: everything(u, "particles"), axis_name="particles"))(shards)
    assert distance(jax.tree.map(jnp.ravel, found), jax.jit(everything)(four)) < 1e-12


def test_fields_keep_the_dtypes():
    state = rest(ensemble())
    for field in (nesterov_flow(model, SQUARED), heavy_ball_flow(model, SQUARED, 1.0)):
        assert {leaf.dtype for leaf in jax.tree.leaves(jax.jit(field)(0.5, state, BATCH))} == {jnp.dtype(jnp.float32)}
    start = nesterov_start(model, SQUARED, ensemble(), BATCH, 0.1)
    assert {leaf.dtype for leaf in jax.tree.leaves(start)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("t", [0.0, -1.0, float("nan")])
def test_time_zero_is_an_error(t):
    """Time zero in the Nesterov flow is an error."""
    with pytest.raises(
        ValueError, match=r"t: .*; wanted a time > 0, because the friction is 3.0/t; see nesterov_start"
    ):
        nesterov_flow(model, SQUARED)(t, rest(ensemble()), BATCH)
    with pytest.raises(ValueError, match=r"t: .*; wanted a finite number > 0"):
        nesterov_start(model, SQUARED, ensemble(), BATCH, t)


def test_compiled_time_zero_is_an_error():
    """Time zero in a compiled Nesterov flow is an error.

    Traced, the time cannot be looked at; the field is NaN there and the guard says so, with the time.
    """
    field = nesterov_flow(model, SQUARED)
    derivative = jax.jit(field)(0.0, rest(ensemble()), BATCH)
    assert all(bool(jnp.isnan(leaf).all()) for leaf in jax.tree.leaves(derivative[1]))

    @eki_jax.checked
    def run(state):
        return end(solve(guarded(field, [0.0, 1.0]), state, throw=False, max_steps=16, rtol=1e-4))

    with pytest.raises(FloatingPointError, match=r"the field is not finite at t = 0\.0"):
        run(rest(ensemble()))


def test_guard_reports_a_non_finite_field():
    """The guard reports a field that turns non-finite and is silent otherwise. A model that overflows after a while."""
    field = lambda t, u, batch: jax.tree.map(lambda leaf: jnp.where(t > 0.5, jnp.inf, -leaf), u)

    def run(t1):
        return eki_jax.checked(
            lambda u: end(solve(guarded(field, [0.0, t1]), u, t1=t1, throw=False, max_steps=64, rtol=1e-4))
        )(ensemble())

    assert distance(run(0.4), jax.tree.map(lambda leaf: leaf * jnp.exp(-0.4), ensemble())) < 1e-3
    with pytest.raises(FloatingPointError, match=r"the field is not finite at t = 0\.[5-9]"):
        run(1.0)
    with pytest.raises(checkify.JaxRuntimeError, match=r"the field is not finite at t = 0\.75"):
        guarded(field, [0.0, 1.0])(0.75, ensemble(), BATCH)


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ([1.0, 0.0], "goes from 1.0 back to 0.0"),
        ([0.0, 0.5, 0.5], "goes from 0.5 back to 0.5"),
        ([0.0, np.inf], "wanted finite times"),
        ([0.0], "wanted two times or more"),
        (0.0, "wanted two times or more"),
    ],
)
def test_times_that_go_backwards_are_refused(times, message):
    with pytest.raises(ValueError, match=f"times: .*{message}"):
        guarded(eki_jax.vector_field(model, SQUARED), times)


@pytest.mark.parametrize("friction", [0.0, -1.0, float("inf")])
def test_friction_must_be_positive(friction):
    for make in (
        lambda: nesterov_flow(model, SQUARED, friction=friction),
        lambda: heavy_ball_flow(model, SQUARED, friction),
        lambda: nesterov_start(model, SQUARED, ensemble(), BATCH, 0.1, friction=friction),
    ):
        with pytest.raises(ValueError, match="friction: "):
            make()


def test_nothing_of_this_imports_an_ode_solver():
    """The fields are plain functions; diffrax and what it brings belong to an extra."""
    code = "import sys, eki_jax.flows, eki_jax.kalman, eki_jax.momentum; print({'diffrax', 'optax'} & {*sys.modules})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (found.returncode, found.stdout.strip()) == (0, "set()"), found.stderr
