"""The discrete Kalman step: against double loops, in both spaces, and its limit of short steps."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

import eki_jax
from eki_jax.kalman import KalmanState, LowRankNoise, cheaper_space, data_misfit_controller, enkf, etki, tempered

J, M = 6, 4
TARGETS = jnp.array([0.5, -0.3, 0.2, 1.0])
FACTOR = np.array([[1.0, 0.2], [0.3, -0.4], [0.0, 0.8], [0.5, 0.5]])
COVARIANCES = {
    "scalar": 0.7,
    "diagonal": np.array([0.5, 1.0, 2.0, 0.25]),
    "dense": 0.3 * np.eye(M) + FACTOR @ FACTOR.T,
    "low_rank": LowRankNoise(np.array([0.5, 1.0, 2.0, 0.25]), FACTOR),
}
MATRIX = np.array([[1.0, 0.5], [-0.3, 0.8], [0.4, 0.1], [0.9, -1.2]])
SPACES = ("output", "ensemble")


def model(u, x):
    """Non-linear, from a pytree of 3 parameters to 4 outputs."""
    w, b = u["w"], u["b"]
    return jnp.stack([w[0] * x + b, jnp.sin(w[1]) + x, w[0] * w[1], jnp.tanh(b - w[1])])


def particles():
    draws = np.random.default_rng(3).normal(size=(J, 3))
    return {"w": jnp.asarray(draws[:, :2]), "b": jnp.asarray(draws[:, 2])}


def run(solver):
    """One step from the particles."""
    return jax.jit(lambda u: solver.step(solver.init(u), (0.8, TARGETS)))(particles())


def dense(kind: str) -> np.ndarray:
    value = COVARIANCES[kind]
    if isinstance(value, LowRankNoise):
        return np.diag(value.diagonal) + value.factor @ value.factor.T
    return np.asarray(value) if np.ndim(value) == 2 else np.diag(np.broadcast_to(value, M))


def oracle(u: np.ndarray, outputs: np.ndarray, gamma: np.ndarray, h: float) -> np.ndarray:
    """u + C_uw (C_ww + Gamma / h)^-1 (y - G(u)) by sums over particles, with 1/J."""
    du, dg = u - u.mean(0), outputs - outputs.mean(0)
    c_uw = sum(np.outer(a, b) for a, b in zip(du, dg, strict=True)) / len(u)
    c_ww = sum(np.outer(b, b) for b in dg) / len(u)
    return np.array(
        [a + c_uw @ np.linalg.inv(c_ww + gamma / h) @ (TARGETS - g) for a, g in zip(u, outputs, strict=True)]
    )


def flat(ensemble) -> np.ndarray:
    return np.column_stack([np.asarray(ensemble["w"]), np.asarray(ensemble["b"])])


def test_step_is_the_formula(x64):
    """For every kind of covariance and in both spaces."""
    outputs = np.asarray(jax.vmap(model, in_axes=(0, None))(particles(), 0.8))
    cases = {
        (kind, space): enkf(model, COVARIANCES[kind], 0.3, space=space) for kind in COVARIANCES for space in SPACES
    }
    steps = jax.jit(lambda u: {str(c): solver.step(solver.init(u), (0.8, TARGETS)) for c, solver in cases.items()})
    residuals = np.asarray(TARGETS) - outputs
    for case, (state, info) in steps(particles()).items():
        kind = next(kind for kind in COVARIANCES if f"'{kind}'" in case)
        expected = oracle(flat(particles()), outputs, dense(kind), 0.3)
        np.testing.assert_allclose(flat(state.ensemble), expected, rtol=1e-12, atol=1e-13, err_msg=case)
        misfits = 0.5 * np.einsum("jm,mn,jn->j", residuals, np.linalg.inv(dense(kind)), residuals)
        np.testing.assert_allclose(info.losses, misfits, rtol=1e-12, err_msg=case)
        dg = outputs - outputs.mean(0)
        drift = dg @ np.linalg.inv(0.3 * dg.T @ dg / J + dense(kind)) @ residuals.T
        np.testing.assert_allclose(info.drift_norm, np.linalg.norm(drift), rtol=1e-11, err_msg=case)
        np.testing.assert_allclose(info.spread, np.sqrt(flat(particles()).var(0).sum()), rtol=1e-12)
        assert (float(info.step_size), float(state.time), int(state.count)) == (0.3, 0.3, 1)
        assert bool(info.is_finite)


def test_perturbed_data_have_their_covariance(x64):
    """Perturbed data have the covariance Gamma / h.

    What the perturbation adds to a particle is K xi, xi ~ N(0, Gamma / h), independent from one to the next.
    """
    count, h = 10_000, 0.25
    u = np.random.default_rng(0).normal(size=(count, 2))
    few = u[:25]  # in the space of the ensemble: as many draws from a few particles, again and again
    keys = jax.random.split(jax.random.key(1), count // len(few))

    def added(u, covariance, space, key):
        ends = [
            enkf(None, covariance, h, space=space, key=k).update(_state(u), u @ MATRIX.T, TARGETS)[0].ensemble
            for k in (key, None)
        ]
        return ends[0] - ends[1]

    @jax.jit
    def all_draws(u, few):
        draws = {kind: added(u, covariance, "output", keys[0]) for kind, covariance in COVARIANCES.items()}
        again = jax.lax.map(lambda key: added(few, COVARIANCES["dense"], "ensemble", key), keys)
        return draws | {"few": again.reshape(count, 2)}

    for name, draws in all_draws(u, few).items():
        c = np.cov((few if name == "few" else u).T, ddof=0)
        gamma = dense("dense" if name == "few" else name)
        gain = c @ MATRIX.T @ np.linalg.inv(MATRIX @ c @ MATRIX.T + gamma / h)
        expected = gain @ gamma @ gain.T / h
        np.testing.assert_allclose(np.cov(np.asarray(draws).T), expected, atol=0.05 * expected.max(), err_msg=name)
        np.testing.assert_allclose(np.mean(draws, axis=0), 0, atol=5 * np.sqrt(expected.max() / count))


def _state(ensemble):
    return enkf(None, 1.0).init(ensemble)


def test_a_perturbed_step_gives_the_posterior(x64):
    """Perturbed linear step gives the posterior.

    With perturbed data the ensemble's covariance is Kalman's (I - K A) C; without, (I - K A) C (I - K A)^T.
    """
    u = np.random.default_rng(0).normal(size=(40_000, 2))
    c = np.cov(u.T, ddof=0)
    gain = c @ MATRIX.T @ np.linalg.inv(MATRIX @ c @ MATRIX.T + dense("dense"))
    shrink = np.eye(2) - gain @ MATRIX
    posterior = {"perturbed": shrink @ c, "plain": shrink @ c @ shrink.T}
    keys = {"perturbed": jax.random.key(0), "plain": None}
    solvers = {name: enkf(lambda v, x: x @ v, COVARIANCES["dense"], key=key) for name, key in keys.items()}
    ends = jax.jit(lambda u: {n: o.step(o.init(u), (MATRIX, TARGETS))[0].ensemble for n, o in solvers.items()})(u)
    for name, end in ends.items():
        np.testing.assert_allclose(np.cov(np.asarray(end).T, ddof=0), posterior[name], atol=0.01)
        mean = u.mean(0) + gain @ (np.asarray(TARGETS) - MATRIX @ u.mean(0))
        np.testing.assert_allclose(np.mean(end, axis=0), mean, atol=0.01)
    assert np.abs(posterior["perturbed"] - posterior["plain"]).max() > 0.1


def test_noise_differs_between_particles():
    """The particles' noise differs and depends on the step."""
    solver = enkf(model, 0.7, 0.3, key=jax.random.key(0))
    same = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[:1], leaf.shape).at[0].add(1.0), particles())
    state = solver.init(same)
    step = jax.jit(solver.step)
    first, _ = step(state, (0.8, TARGETS))
    assert len(np.unique(np.asarray(first.ensemble["b"]).round(6))) == J
    later, _ = step(state._replace(count=state.count + 1), (0.8, TARGETS))
    assert np.abs(flat(first.ensemble) - flat(later.ensemble)).max() > 1e-3


@pytest.mark.parametrize("space", SPACES)
def test_short_steps_are_the_vector_field(x64, space):
    """(step - u) / h differs from the field by O(h), and tempered steps from the flow by O(h)."""
    field = eki_jax.vector_field(model, eki_jax.squared_error(np.linalg.inv(dense("dense"))))
    velocity = flat(jax.jit(field)(0.0, particles(), (0.8, TARGETS)))
    sizes = np.array([2.0**-k for k in (9, 10, 11)])

    @jax.jit
    @jax.vmap
    def step(h):
        solver = enkf(model, COVARIANCES["dense"], h, space=space)
        return solver.step(solver.init(particles()), (0.8, TARGETS))[0].ensemble

    ends = step(sizes)
    moved = [flat(jax.tree.map(lambda leaf, i=i: leaf[i], ends)) - flat(particles()) for i in range(3)]
    errors = [np.abs(change / h - velocity).max() for change, h in zip(moved, sizes, strict=True)]
    assert abs(np.polyfit(np.log(sizes), np.log(errors), 1)[0] - 1) < 0.05
    assert errors[-1] < 0.02 * np.abs(velocity).max()


def test_tempered_steps_converge_to_the_flow(x64):
    """Tempered steps converge to the flow with order one."""
    import diffrax

    field = eki_jax.vector_field(model, eki_jax.squared_error(1 / COVARIANCES["diagonal"]))
    controller = diffrax.PIDController(rtol=1e-9, atol=1e-10)
    flow = diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        diffrax.Tsit5(),
        0.0,
        1.0,
        0.01,
        particles(),
        (0.8, TARGETS),
        stepsize_controller=controller,
    )
    end = flat(jax.tree.map(lambda leaf: leaf[-1], flow.ys))
    steps = np.array([64, 128, 256])

    @jax.jit
    def tempered_end(n):
        solver = enkf(model, COVARIANCES["diagonal"], 1 / n)
        return jax.lax.fori_loop(0, n, lambda _, s: solver.step(s, (0.8, TARGETS))[0], solver.init(particles()))

    states = [tempered_end(n) for n in steps]
    assert all(abs(float(state.time) - 1) < 1e-12 for state in states)
    errors = [np.abs(flat(state.ensemble) - end).max() for state in states]
    assert abs(np.polyfit(-np.log(steps), np.log(errors), 1)[0] - 1) < 0.05


def test_the_cheaper_space_is_chosen():
    """The cheaper space is chosen and low-rank noise is never formed."""
    many, few = 300, 5
    u = jax.random.normal(jax.random.key(0), (few, 3))
    weights = jax.random.normal(jax.random.key(1), (many, 3))
    noise = LowRankNoise(0.5, jax.random.normal(jax.random.key(2), (many, 4)))

    def shapes(space, covariance):
        solver = enkf(lambda v, x: x @ v, covariance, space=space)
        jaxpr = jax.make_jaxpr(lambda u: solver.step(solver.init(u), (weights, jnp.zeros(many)))[0].ensemble)(u)
        return {v.aval.shape for v in _variables(jaxpr.jaxpr)}

    assert (many, many) not in shapes(None, noise)
    assert (many, many) in shapes("output", noise)
    solver = enkf(lambda v, x: x @ v, 0.5)
    jaxpr = jax.make_jaxpr(lambda v: solver.step(solver.init(v), (weights[:few], jnp.zeros(few)))[0].ensemble)(
        jnp.ones((many, 3))
    )
    taken = {
        v.aval.shape for equation in jaxpr.jaxpr.eqns if equation.primitive.name != "cond" for v in equation.outvars
    }
    assert (many, many) not in taken  # the norm of D has a fallback that forms it
    assert cheaper_space(100, 100, 10) == "output"
    assert cheaper_space(100, 1000, 10) == "ensemble"
    assert cheaper_space(100, 150, 10) == "ensemble"


def _variables(jaxpr):
    for equation in jaxpr.eqns:
        yield from equation.outvars
        for values in equation.params.values():
            for value in values if isinstance(values, tuple) else (values,):
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    yield from _variables(inner)


def test_spaces_agree_in_single_precision():
    """Noise a thousand times smaller than the spread of the outputs."""
    single = jax.tree.map(jnp.float32, particles())
    solvers = [enkf(model, 1e-3, space=space) for space in SPACES]
    ends = jax.jit(lambda u: [solver.step(solver.init(u), (0.8, TARGETS))[0].ensemble for solver in solvers])(single)
    np.testing.assert_allclose(flat(ends[0]), flat(ends[1]), rtol=2e-3, atol=2e-3)
    assert ends[0]["w"].dtype == jnp.float32


@pytest.mark.parametrize("ddof", [0, 1])
def test_data_misfit_controller_is_its_formula(x64, ddof):
    misfits = jnp.array([3.0, 8.0, 20.0, 5.0])
    controller = data_misfit_controller(ddof=ddof)
    values = np.asarray(misfits)
    expected = max(2 / (2 * values.mean()), np.sqrt(2 / (2 * values.var(ddof=ddof))))
    assert float(controller(misfits, 2, 0.0, 0)) == pytest.approx(expected, rel=1e-12)
    assert float(controller(misfits, 200, 0.3, 0)) == pytest.approx(0.7, rel=1e-12)  # clipped
    alike = jnp.full(4, 50.0)  # no spread: the second term would be infinite
    assert float(controller(alike, 2, 0.6, 0)) == pytest.approx(0.4, rel=1e-12)
    assert float(controller(misfits.at[0].set(jnp.nan), 2, 0.0, 0)) == pytest.approx(
        max(1 / values[1:].mean(), np.sqrt(1 / values[1:].var(ddof=ddof))), rel=1e-12
    )


def test_data_misfit_controller_leaves_no_sliver(x64):
    misfits = jnp.array([10.0, 30.0])  # wants 0.1
    controller = data_misfit_controller(tolerance=1e-3)
    assert float(controller(misfits, 4, 0.9 - 5e-4, 0)) == pytest.approx(0.1 + 5e-4, rel=1e-12)
    assert float(controller(misfits, 4, 0.9 - 2e-3, 0)) == pytest.approx(0.1, rel=1e-12)
    assert float(controller(misfits, 4, 1 - 5e-4, 0)) == 0.0
    assert float(controller(misfits, 4, 1.2, 0)) == 0.0


@pytest.mark.parametrize("key", [None, 5])
def test_controlled_steps_sum_to_one(key):
    """Controlled steps sum to one and then stop."""
    solver = enkf(model, 0.02, data_misfit_controller(), key=None if key is None else jax.random.key(key))
    state, sizes = solver.init(particles()), []
    step = jax.jit(solver.step)
    for _ in range(60):
        before = state
        state, info = step(state, (0.8, TARGETS))
        sizes.append(float(info.step_size))
        if sizes[-1] == 0:
            break
    assert 3 <= len(sizes) < 60
    assert abs(sum(sizes) - 1) < 1e-6
    np.testing.assert_array_equal(flat(state.ensemble), flat(before.ensemble))
    assert bool(info.is_finite)


def test_tempered_sequences():
    """By the time, so that a step that was refused is taken again."""
    schedule = tempered([0.25, 0.25, 0.5])
    assert [float(schedule(None, 1, time, 0)) for time in (0.0, 0.25, 0.5, 1.0)] == [0.25, 0.25, 0.5, 0.0]
    assert [round(float(tempered(4)(None, 1, time, 7)), 6) for time in (0.0, 0.75, 1.0)] == [0.25, 0.25, 0.0]


@pytest.mark.parametrize("space", SPACES)
def test_a_failed_particle_takes_no_part(space):
    solver = enkf(None, COVARIANCES["diagonal"], 0.3, space=space)
    outputs = jax.vmap(model, in_axes=(0, None))(particles(), 0.8)
    state, info = jax.jit(solver.update)(solver.init(particles()), outputs.at[2, 1].set(jnp.nan), TARGETS)
    rest = jnp.array([0, 1, 3, 4, 5])
    fewer = jax.tree.map(lambda leaf: leaf[rest], particles())
    expected, _ = jax.jit(solver.update)(solver.init(fewer), outputs[rest], TARGETS)
    np.testing.assert_allclose(flat(state.ensemble)[rest], flat(expected.ensemble), rtol=2e-5, atol=1e-6)
    np.testing.assert_array_equal(flat(state.ensemble)[2], flat(particles())[2])
    assert (int(info.failed), bool(info.is_finite)) == (1, False)


@pytest.mark.parametrize("space", SPACES)
def test_spread_over_devices_it_is_the_same_step(x64, space):
    """Whatever is random or adaptive included."""
    options = {"space": space, "key": jax.random.key(7)}
    single = enkf(model, COVARIANCES["dense"], data_misfit_controller(), **options)
    state, info = run(single)
    spread = enkf(model, COVARIANCES["dense"], data_misfit_controller(), axis_name="particles", **options)
    devices, own, common = jax.devices()[:3], PartitionSpec("particles"), PartitionSpec()
    mesh = jax.make_mesh((3,), ("particles",), devices=devices, axis_types=(AxisType.Auto,))
    specs = (
        KalmanState(own, common, common),
        eki_jax.Info(own, *[common] * 8),
    )  # of the rest every device has the same
    step = jax.shard_map(
        lambda shard: spread.step(spread.init(shard), (0.8, TARGETS)), mesh=mesh, in_specs=own, out_specs=specs
    )
    new, found = jax.jit(step)(particles())
    np.testing.assert_allclose(flat(new.ensemble), flat(state.ensemble), rtol=1e-10, atol=1e-12)
    for name in ("losses", "step_size", "drift_norm", "spread", "failed"):
        np.testing.assert_allclose(getattr(found, name), getattr(info, name), rtol=1e-10, err_msg=name)


def test_the_covariance_may_be_traced():
    """So that it can be an argument of a compiled function."""

    def ends(covariances, u):
        solvers = {kind: enkf(model, covariance, 0.3) for kind, covariance in covariances.items()}
        return {kind: solver.step(solver.init(u), (0.8, TARGETS))[0].ensemble for kind, solver in solvers.items()}

    traced = jax.jit(ends)(COVARIANCES, particles())
    for kind, concrete in jax.jit(lambda u: ends(COVARIANCES, u))(particles()).items():
        np.testing.assert_allclose(flat(traced[kind]), flat(concrete), rtol=1e-5, atol=1e-6, err_msg=kind)


def test_ask_and_tell_is_the_step():
    """Ask and tell is the step and pytrees of outputs are flattened."""
    solver = enkf(model, COVARIANCES["diagonal"])
    stepped, _ = run(solver)
    outputs = jax.vmap(model, in_axes=(0, None))(particles(), 0.8)
    halves = {"a": outputs[:, :1], "b": outputs[:, 1:]}
    told, _ = jax.jit(solver.update)(solver.init(particles()), halves, {"a": TARGETS[:1], "b": TARGETS[1:]})
    np.testing.assert_allclose(flat(stepped.ensemble), flat(told.ensemble), rtol=1e-5, atol=1e-6)  # two programs round
    assert told.position is told.ensemble
    with pytest.raises(TypeError, match="forward: None"):
        enkf(None, 1.0).step(solver.init(particles()), (0.8, TARGETS))


SINGULAR = {
    "variance": (np.array([1.0, 0.0, 1.0, 1.0]), "singular, least variance 0.0"),
    "negative": (-1.0, "singular, least variance -1.0"),
    "rank": (FACTOR @ FACTOR.T, "singular, eigenvalues of the correlations from"),
    "indefinite": (np.diag([1.0, 1.0, 1.0, -0.5]), "singular, least variance -0.5"),
    "low_rank": (LowRankNoise(0.0, FACTOR), "singular, least diagonal 0.0"),
    "asymmetric": (np.eye(M) + np.eye(M, k=1), "not symmetric"),
    "nan": (np.array([1.0, np.nan, 1.0, 1.0]), "not finite"),
    "nan_factor": (LowRankNoise(1.0, np.full((M, 2), np.inf)), "not finite"),
    "oblong": (FACTOR, "wanted a number, "),
    "mismatch": (LowRankNoise(np.ones(3), FACTOR), "diagonal of shape"),
}


@pytest.mark.parametrize("case", SINGULAR)
def test_covariances_that_are_none_are_refused(case):
    covariance, message = SINGULAR[case]
    with pytest.raises(ValueError, match=f"noise_covariance.*: .*{message}"):
        enkf(model, covariance)


def test_a_covariance_of_another_size_is_refused():
    for covariance in (np.ones(3), np.eye(3), LowRankNoise(1.0, FACTOR[:3])):
        solver = enkf(model, covariance)
        with pytest.raises(ValueError, match="noise_covariance: of 3 outputs, but a particle has 4"):
            solver.step(solver.init(particles()), (0.8, TARGETS))


@pytest.mark.parametrize(
    ("covariance", "name"),
    [
        (True, "noise_covariance: True; wanted real numbers"),
        (np.ones(M, bool), "noise_covariance: an array of shape"),
        (LowRankNoise(True, FACTOR), "noise_covariance.diagonal: True"),
        (LowRankNoise({"a": 1.0}, FACTOR), "noise_covariance.diagonal: {'a': 1.0}"),
        (LowRankNoise(1.0, None), "noise_covariance.factor: None"),
        ({"a": True, "b": 1.0}, r"noise_covariance['a']: True"),
    ],
)
def test_covariances_of_no_numbers(covariance, name):
    with pytest.raises(TypeError, match=re.escape(name)):
        enkf(model, covariance)


def test_schedules_of_too_few_arguments():
    """An array of JAX is a list of step sizes; a function that cannot be called with the misfits is named."""
    assert float(tempered(jnp.array([0.25, 0.75]))(None, 1, 0.25, 0)) == 0.75
    with pytest.raises(TypeError, match=r"step_size: .*does not take 4 arguments; wanted a step size, or a function"):
        enkf(model, 1.0, lambda count: 0.1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: enkf(model, 1.0, 0.0), "step_size: 0.0"),
        (lambda: enkf(model, 1.0, -0.5), "step_size: -0.5"),
        (lambda: enkf(model, 1.0, space="outputs"), "space: 'outputs'"),
        (lambda: tempered(0), "steps: 0"),
        (lambda: tempered([0.5, 0.6]), "sum to 1.1"),
        (lambda: tempered([1.5, -0.5]), "positive step sizes"),
        (lambda: data_misfit_controller(ddof=2), "ddof: 2"),
        (lambda: data_misfit_controller(tolerance=-1e-3), "tolerance: -0.001"),
    ],
)
def test_bad_options_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_targets_of_another_shape_are_refused():
    solver = enkf(model, 1.0)
    with pytest.raises(ValueError, match="targets: shape"):
        solver.step(solver.init(particles()), (0.8, TARGETS[:3]))


@pytest.mark.parametrize("localization", [None, np.ones((1, 1))])
def test_data_of_its_own_are_no_spread_of_outputs(x64, localization):
    """Perturbed data that are given lead to the posterior that perturbed data which are drawn do.

    For u ~ N(0, 1), an output u, data 1 and Gamma = 1 the posterior is N(1/2, 1/2); the data's own spread is none of
    the outputs'.
    """
    rng = np.random.default_rng(0)
    u, data = rng.normal(size=(400, 1)), 1 + rng.normal(size=(400, 1))
    for centred in (u, data):
        centred -= centred.mean()
    data += 1
    solver = enkf(lambda u, x: u, 1.0, targets_axis=0, localization=localization)
    state, _ = solver.step(solver.init(jnp.asarray(u)), (0.0, jnp.asarray(data)))
    gain = u.var() / (u.var() + 1)
    np.testing.assert_allclose(state.ensemble, u + gain * (data - u), atol=1e-12)
    whole = etki(lambda u, x: u, 1.0, targets_axis=0, localization=localization)
    state, _ = whole.step(whole.init(jnp.asarray(u)), (0.0, jnp.asarray(data)))
    np.testing.assert_allclose(state.ensemble.mean(), gain, atol=1e-12)
    np.testing.assert_allclose(state.ensemble.var(), (1 - gain) * u.var(), atol=1e-12)
