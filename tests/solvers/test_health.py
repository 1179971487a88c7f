"""One bad particle does not reach the others, and is seen; a step that is refused says why and uses up nothing."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import eki_jax
from eki_jax import Reason, kalman, natural, sharding
from eki_jax.compact import compact_euler
from eki_jax.flows import square_root_flow
from eki_jax.online import learn_stream, online
from eki_jax.training import classification_accuracy, ensemble_method, fit

J = 16
LOSS = eki_jax.squared_error()
START = jax.random.normal(jax.random.key(0), (J, 3))
X = jax.random.normal(jax.random.key(1), (5, 3))
TARGETS = X @ jnp.array([1.0, -2.0, 0.5])
BATCH = (X, TARGETS)
STEP = eki_jax.frobenius_step_size(0.5)


def forward(params: Any, x: Any) -> Any:
    """A model that does not use its third parameter for anything that shows."""
    return x[:, :2] @ params[:2] + 0 * jnp.tanh(jnp.where(jnp.isfinite(params[2]), params[2], 0))


Make = Callable[..., eki_jax.Solver]
ENSEMBLES: dict[str, Make] = {
    "euler": lambda f, **s: eki_jax.euler(f, LOSS, STEP, **s),
    "nesterov": lambda f, **s: eki_jax.nesterov(f, LOSS, STEP, 0.5, **s),
    "heavy_ball": lambda f, **s: eki_jax.heavy_ball(f, LOSS, STEP, 0.5, **s),
    "compact_euler": lambda f, **s: compact_euler(f, LOSS, STEP, **s),
    "enkf": lambda f, **s: kalman.enkf(f, 1.0, 0.5, **s),
    "enkf_perturbed": lambda f, **s: kalman.enkf(f, 1.0, kalman.tempered(4), key=jax.random.key(3), **s),
}
NATURAL: dict[str, Make] = {
    "full": lambda f, **s: natural.natural_gradient(f, LOSS, J, damping=0.1, deviations=natural.full_rank(1.0), **s),
    "low": lambda f, **s: natural.natural_gradient(f, LOSS, J, damping=0.1, **s),
    "localized": lambda f, **s: natural.natural_gradient(f, LOSS, J, damping=0.1, localized=True, **s),
}


def without(particle: int) -> Any:
    return jnp.array([j for j in range(J) if j != particle])


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("name", ENSEMBLES)
def test_a_parameter_that_does_not_show(name: str, bad: float) -> None:
    """NaN in a parameter that no output shows: that particle has failed, and no other moves by it."""
    solver = ENSEMBLES[name](forward)
    state, info = solver.step(solver.init(START.at[4, 2].set(bad)), BATCH)
    assert (int(info.failed), bool(info.is_finite), bool(info.moved), int(info.reason)) == (1, False, True, 0)
    found = solver.ensemble(state)[without(4)]
    assert bool(jnp.isfinite(found).all())
    assert bool(jnp.isfinite(solver.estimate(state)).all())
    if name != "enkf_perturbed":  # whose draws belong to the particles' indices
        alone, _ = solver.step(solver.init(START[without(4)]), BATCH)
        tolerance = 1e-2 if name == "compact_euler" else 1e-5
        np.testing.assert_allclose(found, solver.ensemble(alone), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("size", [1e5, 1e10, 1e19, 1e30])
@pytest.mark.parametrize("name", ENSEMBLES)
def test_an_outlier_counts_as_failed(name: str, size: float) -> None:
    """One finite but huge particle: the others go on as if it were not there."""
    outputs = jax.vmap(forward, in_axes=(0, None))(START, X)
    solver = ENSEMBLES[name](None)
    state, info = solver.update(solver.init(START), outputs.at[7].multiply(size), TARGETS)
    assert (int(info.failed), bool(info.is_finite), bool(info.moved)) == (1, False, True)
    assert bool((solver.ensemble(state)[7] == solver.ensemble(solver.init(START))[7]).all()) or name == "compact_euler"
    assert float(jnp.abs(solver.ensemble(state)[without(7)] - START[without(7)]).max()) > 1e-3
    assert bool(jnp.isfinite(info.loss))


def test_the_cut_can_be_moved_and_left_out() -> None:
    outputs = jax.vmap(forward, in_axes=(0, None))(START, X).at[7].multiply(300.0)
    counted = {
        cut: int(
            eki_jax.euler(None, LOSS, STEP, outlier_cut=cut)
            .update(eki_jax.euler(None, LOSS).init(START), outputs, TARGETS)[1]
            .failed
        )
        for cut in (1e3, 1e6, None)
    }
    assert counted == {1e3: 1, 1e6: 0, None: 0}
    with pytest.raises(ValueError, match=r"outlier_cut: 0\.5; wanted a finite number > 1, or None"):
        eki_jax.euler(None, LOSS, outlier_cut=0.5)


def test_the_median_is_of_all_devices() -> None:
    """Two particles a device: no device could tell which of its own is the outlier."""
    outputs = jax.vmap(forward, in_axes=(0, None))(START, X).at[7].multiply(1e19)
    one = kalman.enkf(None, 1.0, 0.5)
    wanted, info = one.update(one.init(START), outputs, TARGETS)
    many = sharding.shard_solver(kalman.enkf(None, 1.0, 0.5, axis_name="particles"), sharding.make_mesh(8))
    state, found = many.update(many.init(START), outputs, TARGETS)
    assert (int(found.failed), bool(found.moved)) == (int(info.failed), bool(info.moved)) == (1, True)
    np.testing.assert_allclose(state.ensemble, wanted.ensemble, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [1e5, 1e10, 1e19])
@pytest.mark.parametrize("name", NATURAL)
def test_natural_steps_leave_outliers_out(name: str, size: float) -> None:
    plain = NATURAL[name](forward)
    state = plain.init(jnp.zeros(3), jax.random.key(2))
    last = plain.ensemble(state)[-1, 0]
    with_outlier = lambda p, x: forward(p, x) * jnp.where(jnp.abs(p[0] - last) < 1e-6, size, 1.0)
    found, info = NATURAL[name](with_outlier).step(state, BATCH)
    wanted, _ = plain.step(state, BATCH)
    assert int(info.failed) == 1
    assert bool(info.moved)
    np.testing.assert_allclose(found.position, wanted.position, atol=0.5)
    assert bool(jnp.isfinite(info.loss))


@pytest.mark.parametrize("name", NATURAL)
def test_a_mean_that_is_not_finite(name: str) -> None:
    solver = NATURAL[name](forward)
    state = solver.init(jnp.array([0.0, 0.0, jnp.nan]), jax.random.key(2))
    after, info = solver.step(state, BATCH)
    assert Reason(int(info.reason)) is Reason.PARAMETERS
    assert (bool(info.moved), bool(info.is_finite), int(after.count)) == (False, False, 0)


def refused(solver: eki_jax.Solver, state: Any, batch: Any, reason: Reason) -> None:
    after, info = solver.step(state, batch)
    assert (bool(info.moved), bool(info.is_finite), Reason(int(info.reason))) == (False, False, reason)
    jax.tree.map(np.testing.assert_array_equal, after, state)  # neither count nor time nor particles
    with pytest.raises(eki_jax.StepRefused, match=reason.name) as error:
        eki_jax.checked(solver.step)(state, batch)
    assert error.value.reason is reason
    assert reason.remedy in str(error.value)


@pytest.mark.parametrize("name", ENSEMBLES)
def test_fewer_than_two_are_refused(name: str) -> None:
    """All outputs NaN; one survivor of sixteen."""
    for least in (jnp.inf, float(START[:, 0].max()) - 1e-3):
        solver = ENSEMBLES[name](lambda p, x, least=least: jnp.where(p[0] < least, jnp.nan, forward(p, x)))
        refused(solver, solver.init(START), BATCH, Reason.FEW_PARTICLES)


@pytest.mark.parametrize("name", [*ENSEMBLES, *NATURAL])
def test_nan_in_the_data_is_named(name: str) -> None:
    solver = {**ENSEMBLES, **NATURAL}[name](forward)
    state = solver.init(jnp.zeros(3), jax.random.key(0)) if name in NATURAL else solver.init(START)
    refused(solver, state, (X, TARGETS.at[1].set(jnp.nan)), Reason.TARGETS)


def test_after_the_end_nothing_happens() -> None:
    """Tempering ends at exactly 1, for every number of steps, and says so."""
    for steps in (1, 10, 94):
        solver = kalman.enkf(lambda u, x: u, 1.0, kalman.tempered(steps))

        def more(carry: Any, solver: eki_jax.Solver = solver) -> Any:
            state, _ = carry
            return solver.step(state, (None, jnp.ones(2)))

        start = solver.init(jnp.array([[0.0, 1.0], [2.0, 0.5], [1.0, 1.0]]))
        begun = solver.step(start, (None, jnp.ones(2)))
        state, info = jax.lax.while_loop(lambda carry: carry[0].time < 1, more, begun)
        assert (float(state.time), bool(solver.done(state)), int(state.count)) == (1.0, True, steps)
        after, info = solver.step(state, (None, jnp.ones(2)))
        assert (Reason(int(info.reason)), bool(info.moved), bool(info.is_finite)) == (Reason.ENDED, False, True)
        jax.tree.map(np.testing.assert_array_equal, after, state)


def test_a_refused_step_is_taken_again() -> None:
    """Tempering goes on with the step that was refused, not with the next one."""
    solver = kalman.enkf(None, 1.0, kalman.tempered([0.2, 0.8]))
    outputs = START[:, :2]
    state, _ = solver.update(solver.init(START), jnp.full((J, 2), jnp.nan), jnp.ones(2))
    state, info = solver.update(state, outputs, jnp.ones(2))
    np.testing.assert_allclose(info.step_size, 0.2)
    state, _ = solver.update(state, outputs * jnp.nan, jnp.ones(2))
    state, info = solver.update(state, outputs, jnp.ones(2))
    assert (round(float(info.step_size), 6), float(state.time)) == (0.8, 1.0)


def test_a_natural_step_is_shortened() -> None:
    """To the first quarter of a quarter that does not raise the loss; what is reported is of the step that was made."""
    model = lambda p, x: jnp.exp(p)
    batch = (None, jnp.full(2, jnp.exp(2.5)))
    make = lambda limit: natural.natural_gradient(
        model, LOSS, 40, 0.01, 1e-9, natural.full_rank(1.0), loss_limit=limit, averaging=0.5
    )
    start = make(None).init(jnp.zeros(2), jax.random.key(0))
    whole, unlimited = make(None).step(start, batch)
    state, info = make(1.1).step(start, batch)
    value = lambda state: float(LOSS(model(state.position, None), batch[1]))
    assert value(whole) > 1e3 * value(start)
    assert (float(unlimited.share), float(info.share), bool(info.moved)) == (1.0, 0.25, True)
    np.testing.assert_allclose(state.position, whole.position / 4, rtol=1e-5)
    np.testing.assert_allclose(state.average, state.position)
    np.testing.assert_allclose(info.measured, value(start) - value(state), rtol=1e-4)
    assert 0 < float(info.predicted) < float(unlimited.predicted)
    generous, info = make(1e9).step(start, batch)
    assert float(info.share) == 1.0
    np.testing.assert_allclose(generous.position, whole.position)


def test_a_natural_step_that_raises_the_loss() -> None:
    """A step of which even a 256th is too long is refused, and an adaptive lambda grows until one is taken."""
    model = lambda p, x: jnp.exp(3 * p)
    batch = (None, jnp.full(2, jnp.exp(4.5)))
    settings = {"sigma": 0.01, "deviations": natural.full_rank(1.0), "learning_rate": 1e4}
    solver = natural.natural_gradient(model, LOSS, 40, damping=1e-6, **settings)
    refused(solver, solver.init(jnp.zeros(2), jax.random.key(0)), batch, Reason.LOSS_ROSE)
    unlimited = natural.natural_gradient(model, LOSS, 40, damping=1e-6, loss_limit=None, **settings)
    state, info = unlimited.step(unlimited.init(jnp.zeros(2), jax.random.key(0)), batch)
    assert bool(info.moved)
    adaptive = natural.natural_gradient(
        model, LOSS, 40, damping=natural.adaptive_damping(1e-6, increase=10.0, most=1e12), **settings
    )
    state = adaptive.init(jnp.zeros(2), jax.random.key(0))
    start = float(LOSS(model(state.position, None), batch[1]))
    flags = []
    for _ in range(40):
        state, info = adaptive.step(state, batch)
        flags.append(bool(info.moved))
        assert float(LOSS(model(state.position, None), batch[1])) <= 5 * start
    assert not flags[0]
    assert any(flags)
    assert int(state.count) == sum(flags)
    assert float(LOSS(model(state.position, None), batch[1])) < start


@pytest.mark.parametrize("value", [-0.1, jnp.nan, jnp.inf])
@pytest.mark.parametrize(
    "setting", ["step_size", "momentum", "h0", "sigma", "damping", "learning_rate", "norm", "averaging"]
)
def test_settings_out_of_range(setting: str, value: float) -> None:
    """From Python, NumPy and JAX, from a schedule and traced: an error where it is known, a refusal where it is not."""
    full = {"deviations": natural.full_rank(1.0)}
    make: Callable[[Any], eki_jax.Solver] = {
        "step_size": lambda v: eki_jax.euler(forward, LOSS, eki_jax.constant_step_size(v)),
        "h0": lambda v: eki_jax.euler(forward, LOSS, eki_jax.frobenius_step_size(v)),
        "momentum": lambda v: eki_jax.nesterov(forward, LOSS, STEP, v),
        "sigma": lambda v: natural.natural_gradient(forward, LOSS, J, v, **full),
        "damping": lambda v: natural.natural_gradient(forward, LOSS, J, 0.1, v, **full),
        "learning_rate": lambda v: natural.natural_gradient(forward, LOSS, J, learning_rate=v, **full),
        "norm": lambda v: natural.natural_gradient(forward, LOSS, J, norm_constraint=v, **full),
        "averaging": lambda v: natural.natural_gradient(forward, LOSS, J, averaging=v, **full),
    }[setting]
    for known in (float(value), np.float32(value), jnp.asarray(value)):
        with pytest.raises(ValueError, match=f"{setting}.*: .*wanted"):
            make(known)
    around = setting not in ("step_size", "h0", "momentum")

    def stepped(v: Any) -> Any:
        solver = make((lambda count: v) if setting in ("step_size", "momentum", "sigma", "averaging") else v)
        state = solver.init(jnp.zeros(3), jax.random.key(0)) if around else solver.init(START)
        after, info = solver.step(state, BATCH)
        return info.reason, after.count

    reason, count = jax.jit(stepped)(value)
    assert (Reason(int(reason)), int(count)) == (Reason.SETTING, 0)


def test_predictions_leave_failed_particles_out() -> None:
    """Means, draws, averages of outputs, streams and accuracies, of an ensemble with one NaN particle."""
    broken = START.at[3].set(jnp.nan)
    rest = START[without(3)]
    np.testing.assert_allclose(eki_jax.mean_particle(broken), rest.mean(axis=0), rtol=1e-5)
    average = eki_jax.ensemble_outputs(forward, broken, X)
    np.testing.assert_allclose(average, eki_jax.ensemble_outputs(forward, rest, X), rtol=1e-4, atol=1e-5)
    drawn = eki_jax.resample_around_mean(jax.random.key(0), broken, eki_jax.gaussian(jnp.zeros(3), 1e-6), 4)
    np.testing.assert_allclose(drawn, jnp.broadcast_to(rest.mean(axis=0), (4, 3)), atol=1e-4)
    redrawn = eki_jax.redraw_failed(jax.random.key(0)).apply(
        broken, jnp.ones(J, bool).at[5].set(False), jnp.array(0), None
    )
    assert bool(jnp.isfinite(redrawn[without(3)]).all())
    learner = online(lambda p, carry, x: (carry, x * p[:1]), eki_jax.euler(None, LOSS, STEP))
    _, predictions = learn_stream(learner, learner.init(broken, ()), (jnp.ones((2, 1)), jnp.ones((2, 1))))
    assert bool(jnp.isfinite(predictions).all())
    with pytest.raises(ValueError, match="losses: none is finite"):
        eki_jax.best_particle(START, jnp.full(J, jnp.nan))
    assert bool(jnp.isnan(jax.jit(eki_jax.best_particle)(START, jnp.full(J, jnp.nan))).all())


def test_devices_predict_without_them_too() -> None:
    broken = START.at[3].set(jnp.nan)
    mesh = jax.make_mesh((4,), ("p",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    spec = jax.sharding.PartitionSpec
    mean = jax.shard_map(
        lambda u: (eki_jax.mean_particle(u, axis_name="p"), eki_jax.ensemble_outputs(forward, u, X, axis_name="p")),
        mesh=mesh,
        in_specs=spec("p"),
        out_specs=spec(),
    )
    found = jax.jit(mean)(broken)
    wanted = START[without(3)].mean(axis=0), eki_jax.ensemble_outputs(forward, START[without(3)], X)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, wanted)


def test_the_flows_show_a_failed_particle() -> None:
    """Its own row is NaN and no other: a solver of ODEs sees it, and no more is lost."""
    broken = START.at[3, 0].set(jnp.nan)
    for make in (eki_jax.vector_field, square_root_flow):
        found = make(forward, LOSS)(0.0, broken, BATCH)
        wanted = make(forward, LOSS)(0.0, START[without(3)], BATCH)
        np.testing.assert_allclose(found[without(3)], wanted, rtol=1e-4, atol=1e-5)
        assert bool(jnp.isnan(found[3]).all())
        assert bool(jnp.isnan(make(forward, LOSS)(0.0, jnp.full_like(START, jnp.nan), BATCH)).all())
    losses, d = eki_jax.value_and_direction(forward, LOSS)(broken, BATCH)
    assert bool((d[3] == 0).all())
    assert bool(jnp.isfinite(d).all())
    assert bool(jnp.isnan(losses[3]))


@pytest.mark.parametrize("particles", [2, 3, 4])
def test_small_ensembles_lose_their_span_in_sight(particles: int) -> None:
    """Two to four particles of six parameters: the spread that a step reports falls as the flow's does, to the digit.

    For the identity each variance v along an axis of the span becomes ``v / (1 + 2 v t)`` and the mean's distance m
    there ``m / sqrt(1 + 2 v t)``. Off the span nothing moves: the loss stays, and the spread has told why.
    """
    start, dt, steps = jax.random.normal(jax.random.key(0), (particles, 6)), 0.01, 500
    solver = eki_jax.euler(lambda u, x: u, LOSS, eki_jax.constant_step_size(dt))

    def one(state: Any, _: Any) -> Any:
        after, info = solver.step(state, (None, jnp.zeros(6)))
        return after, (info.spread, info.loss, state.ensemble)

    _, (spread, loss, ensembles) = jax.jit(lambda state: jax.lax.scan(one, state, length=steps))(solver.init(start))
    found = np.asarray(ensembles, np.float64)
    np.testing.assert_allclose(spread, np.sqrt(found.var(axis=1).sum(axis=1)), rtol=1e-5)

    mean = np.asarray(start, np.float64).mean(axis=0)
    _, deviations, axes = np.linalg.svd((np.asarray(start, np.float64) - mean) / particles**0.5, full_matrices=False)
    variances, axes = deviations[: particles - 1] ** 2, axes[: particles - 1]
    shrunk = 1 + 2 * variances * dt * np.arange(steps)[:, None]
    wanted = (variances / shrunk).sum(axis=1)
    np.testing.assert_allclose(spread, np.sqrt(wanted), rtol=0.02)
    assert 0.1 < spread[-1] / spread[0] < 0.35
    off = mean @ mean - ((axes @ mean) ** 2).sum()
    np.testing.assert_allclose(loss, 0.5 * (((axes @ mean) ** 2 / shrunk).sum(axis=1) + off + wanted), rtol=0.02)
    assert loss[-1] > 0.5 * off > 0.1


def test_the_page_has_every_reason() -> None:
    """The table of docs/failures.md is the enumeration."""
    page = (Path(__file__).parents[2] / "docs/failures.md").read_text()
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \| (.*) \|$", page, re.M)
    assert rows == [(str(int(reason)), reason.name, reason.remedy) for reason in Reason]


def test_fit_stops_after_three_refusals(tmp_path: Path) -> None:
    """With the reason and the remedy, and what was learned before on disk; single ones are a warning."""
    x, labels = np.asarray(START[:, :2]), np.arange(16) % 3
    calm = lambda p, x: jax.nn.softmax(x @ p["w"])
    prior = eki_jax.gaussian({"w": jnp.zeros((2, 3))}, 1.0)
    key = jax.random.key(0)

    def trained(loss: Any, **options: Any) -> Any:
        solver = eki_jax.euler(calm, loss)
        method = ensemble_method(solver, calm, prior, 8)
        return fit(method, (x, labels), (x, labels), batch_size=4, epochs=2, key=key, progress=False, **options)

    failing = lambda outputs, targets: jnp.sum(outputs) * jnp.nan
    with pytest.raises(eki_jax.StepRefused, match=r"3 steps in a row were refused.*FEW_PARTICLES.*look at the model"):
        trained(failing, directory=tmp_path / "run")
    assert (tmp_path / "run/metrics.jsonl").read_text().count('"refused": 4') == 1
    assert any((tmp_path / "run/checkpoints").iterdir())
    # two of eight steps, never three in a row
    sometimes = lambda outputs, targets: (
        jnp.mean(outputs**2) * jnp.where(jnp.any(targets == 2) & jnp.all(targets != 0), jnp.nan, 1)
    )
    with pytest.warns(RuntimeWarning, match=r"of 8 steps were refused, the last for FEW_PARTICLES"):
        result = trained(sometimes, most_refusals=8)
    assert 0 < sum(row["refused"] for row in result.history) < 8
    method = ensemble_method(eki_jax.euler(calm, eki_jax.cross_entropy()), calm, prior, 8)
    with pytest.raises(ValueError, match="train: labels from 0 to 7"):
        fit(method, (x, np.where(labels == 2, 7, labels)), (x, labels), batch_size=4, epochs=1, key=key, progress=False)


def test_accuracy_of_nan_outputs_is_zero() -> None:
    """NaN is not class 0, and labels that are none are refused."""
    forward = lambda p, x: jnp.stack([p * x, 1 - p * x], axis=-1)
    x, labels = jnp.ones(4), jnp.zeros(4, jnp.int32)
    found = classification_accuracy(forward, jnp.array([2.0, jnp.nan, 3.0]), x, labels)
    np.testing.assert_array_equal(found.particles, [1.0, 0.0, 1.0])
    assert float(found.ensemble) == 1.0
    assert float(classification_accuracy(forward, jnp.full(3, jnp.nan), x, labels).ensemble) == 0.0
    for wrong, error in ((labels + 7, ValueError), (labels - 1, ValueError), (labels + 0.5, TypeError)):
        with pytest.raises(error, match="labels: "):
            classification_accuracy(forward, jnp.array([2.0, 3.0]), x, wrong)


def test_a_state_of_another_solver_is_named() -> None:
    nesterov, kalman_step = ENSEMBLES["nesterov"](forward), ENSEMBLES["enkf"](forward)
    with pytest.raises(TypeError, match="state: a NesterovState; wanted the KalmanState that enkf's init makes"):
        kalman_step.step(nesterov.init(START), BATCH)
    with pytest.raises(TypeError, match="state: a KalmanState; wanted the NesterovState that nesterov's init makes"):
        nesterov.step(kalman_step.init(START), BATCH)


def test_a_collapsed_spread_has_a_slope() -> None:
    solver = eki_jax.euler(lambda u, x: u, LOSS)
    spread = lambda scale: solver.step(solver.init(scale * START), (None, jnp.zeros(3)))[1].spread
    assert float(jax.grad(spread)(0.0)) == 0.0


def test_posterior_deviations_are_centred() -> None:
    """With ``square_root`` the mean of a linear problem is exact at any number of particles."""
    solver = natural.natural_gradient(lambda p, x: x @ p, LOSS, 20, 1.0, 1.0, natural.full_rank(1.0), square_root=True)
    state, _ = solver.step(solver.init(jnp.zeros(3), jax.random.key(0)), BATCH)
    ensemble = solver.ensemble(solver.init(jnp.zeros(3), jax.random.key(0)))
    np.testing.assert_allclose(ensemble.mean(axis=0), 0, atol=1e-6)
    prior = np.cov(np.asarray(ensemble, np.float64).T)
    matrix = np.asarray(X, np.float64)
    wanted = np.linalg.solve(np.linalg.inv(prior) + matrix.T @ matrix, matrix.T @ np.asarray(TARGETS))
    np.testing.assert_allclose(state.position, wanted, rtol=1e-3, atol=1e-4)
