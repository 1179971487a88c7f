"""The natural-gradient step is what its formula says, in either space, for every kind of loss."""

from __future__ import annotations

import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eki_jax
from eki_jax import natural
from eki_jax.kernel.linear_algebra import damped_solve
from eki_jax.losses.curvature import curvature
from eki_jax.natural.estimates.span import span_step

CLASSES = 3


def oracle(loss: Any, outputs: Any, targets: Any, damping: float, keep: Any = None) -> np.ndarray:
    """w = (Z H Z^T + lambda I)^-1 Z g, with H and g by automatic differentiation and everything formed, in float64."""
    keep = np.ones(len(outputs), bool) if keep is None else keep
    z = np.asarray(outputs, np.float64)[keep]
    mean = z.mean(axis=0)
    z = (z - mean).reshape(len(z), -1) / np.sqrt(len(z) - 1)
    flat = lambda m: loss(m.reshape(mean.shape), targets)
    g, h = map(np.asarray, jax.jit(lambda m: (jax.grad(flat)(m), jax.hessian(flat)(m)))(mean.ravel()))
    w = np.zeros(len(keep))
    w[keep] = np.linalg.solve(z @ h @ z.T + damping * np.eye(len(z)), z @ g)
    return w


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def sample(key: int, particles: int, samples: int) -> tuple[Any, Any]:
    keys = jax.random.split(jax.random.key(key), 2)
    return jax.random.normal(keys[0], (particles, samples, CLASSES)), jax.random.randint(
        keys[1], (samples,), 0, CLASSES
    )


def step_of(loss: Any, outputs: Any, targets: Any, damping: float, **options: Any) -> Any:
    return jax.jit(functools.partial(span_step, loss, **options))(outputs, targets, damping)


def poisson(z: Any, y: Any) -> Any:
    return jnp.sum(jnp.exp(z) - z * y[..., None])


LOSSES = {
    "softmax": natural.softmax_cross_entropy(),
    "samples": natural.mean_over_samples(poisson),
    "any": lambda z, y: jnp.sum(jnp.logaddexp(z, -z)) + 0.1 * jnp.sum(z * y[:, None]),
    "partly linear": lambda z, y: jnp.sum(z[..., 0] ** 2) + jnp.sum(z[..., 1] * y),
    "linear": lambda z, y: jnp.sum(z * y[:, None]),  # no curvature at all: the gradient is outside of its range
}


@pytest.mark.parametrize(("space", "particles", "samples"), [("ensemble", 9, 2), ("output", 5, 4)])
@pytest.mark.parametrize("name", LOSSES)
def test_weights_are_those_of_the_formula(name: str, space: Any, particles: int, samples: int, x64: None) -> None:
    outputs, targets = sample(1, particles, samples)
    found = step_of(LOSSES[name], outputs, targets, 0.01, space=space)
    np.testing.assert_allclose(found.weights, oracle(LOSSES[name], outputs, targets, 0.01), rtol=1e-6, atol=1e-9)
    assert bool(found.is_convex)
    assert not bool(found.fallback)


@pytest.mark.parametrize("precision", [None, 2.0, "diagonal", "matrix"])
def test_squared_error_in_the_noises_norm(precision: Any, x64: None) -> None:
    outputs, _ = sample(2, 6, 2)
    root = jax.random.normal(jax.random.key(3), (6, 6))
    precision = {"diagonal": jnp.arange(1.0, 7.0).reshape(2, 3), "matrix": np.asarray(root @ root.T)}.get(
        precision, precision
    )
    loss, targets = eki_jax.squared_error(precision), jnp.ones((2, 3))
    for space in ("ensemble", "output"):
        found = step_of(loss, outputs, targets, 0.1, space=space)
        np.testing.assert_allclose(found.weights, oracle(loss, outputs, targets, 0.1), rtol=1e-6, atol=1e-9)


def test_soft_labels_that_do_not_sum_to_one(x64: None) -> None:
    outputs, labels = sample(1, 5, 4)
    soft = jax.nn.one_hot(labels, CLASSES) * 0.7  # then the gradient has a part outside of the Hessian's range
    soft_loss = LOSSES["softmax"]
    for space in ("ensemble", "output"):
        model = step_of(soft_loss, outputs, soft, 0.1, space=space)
        assert bool(jnp.isfinite(model.weights).all())
    assert jnp.allclose(
        step_of(soft_loss, outputs, jax.nn.one_hot(labels, CLASSES), 0.1).weights,
        step_of(soft_loss, outputs, labels, 0.1).weights,
    )


def test_the_smaller_space_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    module = sys.modules["eki_jax.natural.estimates.span"]  # its name is also that of a function
    monkeypatch.setattr(module, "damped_solve", lambda m, r, d: (sizes.append(len(m)), damped_solve(m, r, d))[1])
    for particles, samples in ((5, 4), (30, 2)):
        outputs, targets = sample(1, particles, samples)
        step_of(LOSSES["softmax"], outputs, targets, 0.1)
    assert sizes == [5, 6]


def test_without_cholesky_it_is_the_same(x64: None) -> None:
    """Without Cholesky the solution is the same."""
    q, _ = np.linalg.qr(jax.random.normal(jax.random.key(0), (6, 6)))
    matrix = (q * np.array([1.0, 0.5, 0.1, 0.0, 0.0, -1e-9])) @ q.T  # not quite positive, as rounding leaves it
    right = np.arange(6.0)
    x, failed = jax.jit(damped_solve)(matrix, right, 1e-10)
    assert bool(failed)
    wanted = q @ ((q.T @ right) / (np.array([1.0, 0.5, 0.1, 0.0, 0.0, 0.0]) + 1e-10))
    np.testing.assert_allclose(x, wanted, rtol=1e-5)
    x, failed = jax.jit(damped_solve)(matrix, right, 0.1)
    assert not bool(failed)
    np.testing.assert_allclose((matrix + 0.1 * np.eye(6)) @ x, right, rtol=1e-8, atol=1e-12)


@jax.jit
def linear_problem() -> tuple[Any, Any, Any]:
    keys = jax.random.split(jax.random.key(5), 3)
    a, truth = jax.random.normal(keys[0], (7, 4)), jax.random.normal(keys[1], (4,))
    return a, a @ truth + 0.1 * jax.random.normal(keys[2], (7,)), truth


def test_damping_one_is_kalmans_update(x64: None) -> None:
    """Damping one is the Kalman update of the mean."""
    a, y, _ = linear_problem()
    solver = natural.natural_gradient(
        lambda u, x: x @ u, eki_jax.squared_error(25.0), 12, sigma=0.5, damping=1.0, deviations=natural.full_rank(1.0)
    )
    state = solver.init(jnp.ones(4), jax.random.key(0))
    u = jax.jit(solver.ensemble)(state)
    c = jnp.cov(u.T)
    gain = c @ a.T @ jnp.linalg.inv(a @ c @ a.T + jnp.eye(7) / 25.0)
    moved, _ = jax.jit(solver.step)(state, (a, y))
    # g is taken at the mean of the outputs, that is at the particles' mean
    np.testing.assert_allclose(moved.position, state.position + gain @ (y - a @ u.mean(axis=0)), rtol=1e-6)


def test_transformed_deviations_are_posterior(x64: None) -> None:
    """Transformed deviations have the posterior's covariance."""
    a, y, _ = linear_problem()
    make = lambda **options: natural.natural_gradient(
        lambda u, x: x @ u, eki_jax.squared_error(25.0), 12, sigma=0.5, damping=1.0, square_root=True, **options
    )
    solver = make(deviations=natural.full_rank(1.0), antithetic=True)
    state = solver.init(jnp.ones(4), jax.random.key(0))
    precision = jnp.linalg.inv(jnp.cov(jax.jit(solver.ensemble)(state).T))
    for _ in range(2):  # every step sees the data once more
        state, _ = jax.jit(solver.step)(state, (a, y))
        precision = precision + 25.0 * a.T @ a
        np.testing.assert_allclose(
            jnp.cov(jax.jit(solver.ensemble)(state).T), jnp.linalg.inv(precision), rtol=1e-5, atol=1e-9
        )
    with pytest.raises(ValueError, match="square_root: True wants full_rank"):
        make()


def test_many_deviations_give_newtons_step(x64: None) -> None:
    """Many deviations give the damped Newton step."""
    a, y, _ = linear_problem()
    solver = natural.natural_gradient(
        lambda u, x: x @ u, eki_jax.squared_error(), 40, damping=1e-9, deviations=natural.full_rank()
    )
    start = solver.init(jnp.zeros(4), jax.random.key(0))
    state, _ = jax.jit(solver.step)(start, (a, y))
    # expanded at the mean of the particles, which is off m by their number's square root
    centre = jax.jit(solver.ensemble)(start).mean(axis=0)
    np.testing.assert_allclose(state.position + centre, jnp.linalg.lstsq(a, y)[0], rtol=1e-4)


@jax.jit
def parameters_and_batch() -> tuple[Any, Any]:
    params = {"w": 0.3 * jax.random.normal(jax.random.key(3), (5, CLASSES)), "b": jnp.zeros(CLASSES)}
    x = jax.random.normal(jax.random.key(4), (20, 5))
    return params, (x, jnp.argmax(x[:, :CLASSES], axis=1))


def classifier() -> tuple[Any, Any, Any]:
    return (lambda p, x: x @ p["w"] + p["b"]), *parameters_and_batch()


@pytest.mark.parametrize("deviations", [natural.full_rank(), natural.low_rank(1), natural.low_rank(2, 0.3)])
def test_it_learns(deviations: Any) -> None:
    forward, params, batch = classifier()
    solver = natural.natural_gradient(forward, natural.softmax_cross_entropy(), 16, deviations=deviations)
    state = solver.init(params, jax.random.key(0))
    step = jax.jit(solver.step)
    losses = []
    for _ in range(30):
        state, info = step(state, batch)
        losses.append(float(info.loss))
        assert bool(info.is_finite)
    assert losses[-1] < 0.1 * losses[0]


def test_ask_and_tell_is_a_step() -> None:
    forward, params, batch = classifier()
    make = lambda f: natural.natural_gradient(f, natural.softmax_cross_entropy(), 16)
    state = make(forward).init(params, jax.random.key(0))
    outputs = eki_jax.evaluate(forward, jax.jit(make(None).ensemble)(state), batch[0])
    told, info = jax.jit(make(None).update)(state, outputs, batch[1])
    stepped, wanted = jax.jit(make(forward).step)(state, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), told.position, stepped.position)
    np.testing.assert_allclose(info.loss, wanted.loss, rtol=1e-5)
    assert int(told.count) == 1
    with pytest.raises(TypeError, match="forward: None"):
        make(None).step(state, batch)
    with pytest.raises(ValueError, match=r"outputs: leading axis 3.*16 particles"):
        make(None).update(state, outputs[:3], batch[1])


def test_antithetic_pairs_are_opposite() -> None:
    """Antithetic pairs are opposite and need even numbers."""
    forward, params, batch = classifier()
    loss = natural.softmax_cross_entropy()
    solver = natural.natural_gradient(forward, loss, 6, antithetic=True)
    u = jax.jit(solver.ensemble)(solver.init(params, jax.random.key(0)))["w"] - params["w"]
    np.testing.assert_allclose(u[::2], -u[1::2], atol=1e-6)
    assert jnp.abs(u[0] - u[2]).max() > 1e-3
    state, _ = jax.jit(solver.step)(solver.init(params, jax.random.key(0)), batch)
    assert natural.softmax_cross_entropy()(forward(state.position, batch[0]), batch[1]) < loss(
        forward(params, batch[0]), batch[1]
    )
    with pytest.raises(ValueError, match="wanted an even number"):
        natural.natural_gradient(forward, loss, 5, antithetic=True)


def test_deviations_are_fresh_when_due() -> None:
    """Deviations are fresh when they are said to be."""
    forward, params, _ = classifier()
    solver = natural.natural_gradient(forward, natural.softmax_cross_entropy(), 4, redraw_every=2)
    state = solver.init(params, jax.random.key(0))
    u = [jax.jit(solver.ensemble)(state._replace(count=jnp.asarray(n)))["w"] for n in range(3)]
    assert bool((u[0] == u[1]).all())
    assert bool((u[1] != u[2]).any())


def test_schedules_follow_the_count() -> None:
    forward, params, batch = classifier()
    solver = natural.natural_gradient(
        forward,
        natural.softmax_cross_entropy(),
        8,
        sigma=lambda n: 0.1 / (1 + n),
        damping=lambda n: 1e-3 * 0.5**n,
        learning_rate=lambda n: jnp.where(n == 0, 1e-12, 1.0),
    )
    state = solver.init(params, jax.random.key(0))
    first, info = jax.jit(solver.step)(state, batch)
    np.testing.assert_allclose(first.position["w"], params["w"], atol=1e-7)
    _, later = jax.jit(solver.step)(first, batch)
    np.testing.assert_allclose(
        [info.sigma, later.sigma, info.damping, later.damping], [0.1, 0.05, 1e-3, 5e-4], rtol=1e-6
    )


def test_a_wrong_schedule_moves_nothing() -> None:
    """What a schedule may not give moves nothing."""
    forward, params, batch = classifier()
    for wrong in ({"sigma": lambda n: -0.1 + n}, {"damping": lambda n: 0.0 * n}):
        solver = natural.natural_gradient(forward, natural.softmax_cross_entropy(), 8, **wrong)
        state, info = jax.jit(solver.step)(solver.init(params, jax.random.key(0)), batch)
        assert not bool(info.is_finite)
        assert bool((state.position["w"] == params["w"]).all())


def test_the_average_forgets_the_start() -> None:
    """The average of the iterates forgets the start."""
    forward, params, batch = classifier()
    solver = natural.natural_gradient(forward, natural.softmax_cross_entropy(), 8, averaging=0.8)
    state = solver.init(jax.tree.map(jnp.copy, params), jax.random.key(0))
    seen, step = [], jax.jit(solver.step, donate_argnums=0)
    for _ in range(4):
        state, _ = step(state, batch)
        seen.append(np.asarray(state.position["w"]).copy())
    weights = 0.8 ** np.arange(3, -1, -1)
    wanted = sum(w * m for w, m in zip(weights / weights.sum(), seen, strict=True))
    np.testing.assert_allclose(state.average["w"], wanted, rtol=1e-5, atol=1e-6)
    mean = natural.natural_gradient(forward, natural.softmax_cross_entropy(), 8, averaging=lambda n: n / (n + 1))
    state = mean.init(params, jax.random.key(0))
    for _ in range(4):
        state, _ = jax.jit(mean.step)(state, batch)
    np.testing.assert_allclose(state.average["w"], sum(seen) / 4, rtol=1e-3, atol=1e-4)


def test_damping_adapts() -> None:
    """Damping adapts to how well the loss was predicted."""
    forward, params, batch = classifier()
    rule = natural.adaptive_damping(1e-2, decrease=0.5, increase=4.0)
    make = lambda rate: natural.natural_gradient(
        forward, natural.softmax_cross_entropy(), 16, damping=rule, learning_rate=rate, loss_limit=None
    )
    good, info = jax.jit(make(0.1).step)(
        make(0.1).init(params, jax.random.key(0)), batch
    )  # a short step: the model holds
    loss = lambda p: natural.softmax_cross_entropy()(forward(p, batch[0]), batch[1])
    np.testing.assert_allclose(info.measured, loss(params) - loss(good.position), rtol=1e-3)
    np.testing.assert_allclose(info.measured, info.predicted, rtol=0.2)
    assert float(good.damping) == pytest.approx(5e-3)
    bad, info = jax.jit(make(30.0).step)(make(30.0).init(params, jax.random.key(0)), batch)  # far beyond
    assert float(info.measured) < 0.25 * abs(float(info.predicted))
    assert float(bad.damping) == pytest.approx(4e-2)
    with pytest.raises(TypeError, match="adaptive, which evaluates the model"):
        make(1.0).update(make(1.0).init(params, jax.random.key(0)), jnp.zeros((16, 20, CLASSES)), batch[1])


def test_failed_particles_are_dropped(x64: None) -> None:
    """Particles that fail are dropped and counted."""
    outputs, targets = sample(1, 6, 4)
    broken = outputs.at[2, 0, 1].set(jnp.nan).at[4, 3, 0].set(jnp.inf)
    keep = np.array([True, True, False, True, False, True])
    for space in ("ensemble", "output"):
        found = step_of(LOSSES["softmax"], broken, targets, 0.01, space=space)
        np.testing.assert_allclose(
            found.weights, oracle(LOSSES["softmax"], outputs, targets, 0.01, keep), rtol=1e-6, atol=1e-9
        )
        assert int(found.healthy) == 4
    _, params, batch = classifier()
    rough = lambda p, x: jnp.sqrt(p["b"][0] + 0.02) * 0 + x @ p["w"]
    solver = natural.natural_gradient(rough, natural.softmax_cross_entropy(), 16)
    state, info = jax.jit(solver.step)(solver.init(params, jax.random.key(0)), batch)
    assert 0 < int(info.failed) < 16
    assert not bool(info.is_finite)
    assert bool(jnp.isfinite(state.position["w"]).all())
    assert bool((state.position["w"] != params["w"]).any())


def test_when_all_fail_the_mean_stays() -> None:
    _, params, batch = classifier()
    solver = natural.natural_gradient(lambda p, x: jnp.nan * (x @ p["w"]), natural.softmax_cross_entropy(), 4)
    state, info = jax.jit(solver.step)(solver.init(params, jax.random.key(0)), batch)
    assert int(info.failed) == 4
    assert bool((state.position["w"] == params["w"]).all())


@pytest.mark.parametrize("localized", [False, True])
def test_a_step_is_no_longer_than_it_may(localized: bool, x64: None) -> None:
    """Its squared norm in the outputs' curvature is held; a shorter one is left alone."""
    params = {"w": 2 * jax.random.normal(jax.random.key(0), (4, 3), jnp.float64)}
    batch = jax.random.normal(jax.random.key(1), (8, 4), jnp.float64), jnp.arange(8) % 3
    forward, loss = (lambda p, x: x @ p["w"]), natural.softmax_cross_entropy()

    def step(norm_constraint: float | None) -> Any:
        options = {"localized": localized, "norm_constraint": norm_constraint}
        f = natural.value_and_natural_direction(forward, loss, 40, 1e-3, 1e-9, **options)
        return jax.jit(f)(params, batch, jax.random.key(2))[1]["w"]

    def squared_norm(ascent: Any) -> float:
        z, moved = forward(params, batch[0]), batch[0] @ ascent
        return float(jnp.vdot(moved, jax.jvp(lambda z: jax.grad(loss)(z, batch[1]), (z,), (moved,))[1]))

    whole = step(None)
    length = squared_norm(whole)
    np.testing.assert_allclose(step(2 * length), whole, rtol=1e-12)
    short = step(length / 9)
    np.testing.assert_allclose(short, whole / 3, rtol=0.02)
    np.testing.assert_allclose(squared_norm(short), length / 9, rtol=0.04)


def test_a_loss_that_is_not_convex_is_refused() -> None:
    _, params, batch = classifier()
    solver = natural.natural_gradient(lambda p, x: x @ p["w"], lambda z, y: -jnp.sum(z**2), 4)
    state = solver.init(params, jax.random.key(0))
    moved, info = solver.step(state, batch)
    assert eki_jax.Reason(int(info.reason)) is eki_jax.Reason.NOT_CONVEX
    assert not bool(info.is_finite)
    assert bool((moved.position["w"] == params["w"]).all())


def test_a_loss_of_many_outputs_says_its_sum() -> None:
    """A loss over many outputs has to say what it sums."""
    with pytest.raises(ValueError, match=r"mean_over_samples\(fn\)"):
        curvature(lambda z, y: jnp.sum(z**2), jnp.zeros(5000), None)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"particles": 1}, "particles: 1; wanted a whole number, at least 2"),
        ({"sigma": 0.0}, "sigma: 0.0; wanted a finite number > 0"),
        ({"sigma": -1.0}, "sigma: -1.0"),
        ({"damping": 0.0}, "damping: 0.0; wanted a finite number > 0"),
        ({"damping": float("nan")}, "damping: nan"),
        ({"learning_rate": 0.0}, "learning_rate: 0.0"),
        ({"redraw_every": 0}, "redraw_every: 0"),
        ({"averaging": 1.0}, "averaging: 1.0"),
        ({"norm_constraint": 0.0}, "norm_constraint: 0.0; wanted a finite number > 0"),
        ({"norm_constraint": float("nan")}, "norm_constraint: nan"),
    ],
)
def test_settings_out_of_range_are_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        natural.natural_gradient(lambda p, x: x, natural.softmax_cross_entropy(), **wrong)


def test_other_bad_input_is_named() -> None:
    loss = natural.softmax_cross_entropy()
    with pytest.raises(TypeError, match="loss: 3"):
        natural.natural_gradient(None, 3)
    with pytest.raises(ValueError, match="rank: 0; wanted a whole number, at least 1"):
        natural.low_rank(0)
    with pytest.raises(TypeError, match=r"rank: 1\.5"):
        natural.low_rank(1.5)
    with pytest.raises(ValueError, match="scale: -1"):
        natural.full_rank(-1.0)
    with pytest.raises(ValueError, match=r"rank: 4, but the leaf \['w'\] of shape \(5, 3\) has at most 3"):
        natural.natural_gradient(None, loss, deviations=natural.low_rank(4)).init(
            {"w": jnp.zeros((5, 3))}, jax.random.key(0)
        )
    with pytest.raises(TypeError, match=r"params\['n'\]: dtype int32"):
        natural.natural_gradient(None, loss).init({"n": jnp.arange(3)}, jax.random.key(0))
    with pytest.raises(ValueError, match="targets: shape"):
        loss(jnp.zeros((2, 3)), jnp.zeros((2, 2)))
    with pytest.raises(ValueError, match=r"initial: 0\.0; wanted a finite number > 0"):
        natural.adaptive_damping(0.0)
    with pytest.raises(ValueError, match="initial, least, most"):
        natural.adaptive_damping(1.0, least=2.0)
    assert bool(
        jnp.isnan(jax.jit(loss)(jnp.zeros((2, 3)), jnp.array([0, 3])))
    )  # a label out of range is no other class
