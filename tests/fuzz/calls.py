"""Calls of the core's public callables with valid arguments, each in a role that says what it is replaced by.

A call is named by the path of what it calls, within ``eki_jax``; what comes after a comma tells calls of one from each
other. Those of the packages that need an extra stand in ``extras.py``.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import eki_jax
from eki_jax import compact, flows, kalman, losses, natural, online, solvers, step_sizes, training
from eki_jax import momentum as fixed_momentum
from eki_jax.metrics import particle_accuracy

J = 4
RNG = np.random.default_rng(0)
U = RNG.normal(size=(J, 3)).astype(np.float32)
X = RNG.normal(size=(5, 3)).astype(np.float32)
Y = RNG.normal(size=5).astype(np.float32)
Z = U @ X.T
R = Z - Y
LABELS = np.array([0, 2, 1, 1, 0])
KEY = jax.random.key(0)


def linear(p: Any, x: Any) -> Any:
    return x @ p


def classes(p: Any, x: Any) -> Any:
    return jax.nn.softmax(jnp.stack([x @ p, x[:, 0], x[:, 1]], axis=-1))


class Call(NamedTuple):
    """A public callable as a function of named arguments, with their valid values.

    Attributes:
        call: function of the arguments.
        valid: valid arguments by their names, each with its role.
        oracle: function of the arguments in NumPy's float64 that gives what is right, or None for the same call in
            float64.
        tolerance: largest difference from what is right, relative to the largest number.
        is_random: flag, True where results hold random numbers, which float64 draws anew: their shapes are compared.
        fine: names of replacements that this call rightly takes, by argument.
    """

    call: Callable[..., Any]
    valid: dict[str, tuple[str, Any]]
    oracle: Callable[..., Any] | None = None
    tolerance: float = 2e-3
    is_random: bool = False
    fine: Mapping[str, tuple[str, ...]] = MappingProxyType({})


MADE: dict[Any, tuple[Any, Any]] = {}


def made(make: Callable[..., Any], **settings: Any) -> Any:
    """What ``make`` makes, once for the very same settings: what it compiled then serves several cases."""
    key = (make, *((name, id(value)) for name, value in settings.items()))
    if len(MADE) > 100:
        MADE.clear()
    if key not in MADE:
        MADE[key] = make(**settings), settings  # which stay alive, so that no other object gets their id
    return MADE[key][0]


def steps(make: Callable[..., eki_jax.Solver], *, around: bool = False) -> Callable[..., Any]:
    """A call that makes a solver and takes one step, by ``step`` or, with outputs, by ``update``."""

    def call(**arguments: Any) -> Any:
        start = [arguments.pop(name) for name in ("params", "key0", "ensemble") if name in arguments]
        told = "outputs" in arguments
        batch, outputs = arguments.pop("batch", None), arguments.pop("outputs", None)
        targets = arguments.pop("targets", None)
        solver = made(make, **arguments)
        state = solver.init(*start)
        new, info = solver.update(state, outputs, targets) if told else solver.step(state, batch)
        if int(info.reason):
            same = jax.tree.map(lambda a, b: np.array_equal(a, b, equal_nan=True), _plain(new), _plain(state))
            assert all(jax.tree.leaves(same)), "a refused step changed its state"
            raise Refused(eki_jax.Reason(int(info.reason)))
        return solver.ensemble(new) if not around else new.position, info.failed

    return call


def of_noise(key: Any, common: Any) -> eki_jax.Solver:
    """A solver of a model with noise from a key, and with a state where there is no key."""
    make = lambda f: eki_jax.euler(f, SQUARES, eki_jax.frobenius_step_size(0.5))
    if key is None:
        model = lambda p, x, *, state: (linear(p, x), state)
        return eki_jax.stateful(make, model, state={"calls": jnp.zeros(())}, common=common)
    noise = lambda p, x, *, key: linear(p, x) + jax.random.normal(key)
    return eki_jax.stateful(make, noise, key=key, common=common)


class Refused(Exception):
    """A step that was refused and said why."""


def _plain(state: Any) -> Any:
    return jax.tree.map(np.asarray, state)


def masked(ensemble: Any, outputs: Any, cotangents: Any) -> tuple[np.ndarray, ...]:
    u, z, r = (np.asarray(a, np.float64).reshape(len(ensemble), -1) for a in (ensemble, outputs, cotangents))
    good = np.isfinite(u).all(1) & np.isfinite(z).all(1) & np.isfinite(r).all(1)
    u, z, r = (np.where(good[:, None], a, 0) for a in (u, z, r))
    n = max(good.sum(), 1)
    centre = lambda a: np.where(good[:, None], a - a.sum(0) / n, 0)
    return centre(u), centre(z), r, good, n


def direction_by_hand(ensemble: Any, outputs: Any, cotangents: Any, **rest: Any) -> Any:
    u, z, r, _, n = masked(ensemble, outputs, cotangents)
    if n < 2:
        return np.zeros(np.shape(ensemble))
    return (r @ z.T @ u / n).reshape(np.shape(ensemble))


def norm_by_hand(outputs: Any, cotangents: Any, **rest: Any) -> Any:
    _, z, r, _, _ = masked(outputs, outputs, cotangents)
    return np.linalg.norm(r @ z.T)


def euler_by_hand(ensemble: Any, outputs: Any, targets: Any, h0: Any = 0.5, **rest: Any) -> Any:
    r = np.asarray(outputs, np.float64) - np.asarray(targets, np.float64)
    bad = ~np.isfinite(np.asarray(ensemble)).all(1)
    r[bad] = np.nan
    d = direction_by_hand(ensemble, outputs, r)
    size = np.isfinite(r).all(1).sum()
    return np.asarray(ensemble, np.float64) - size * float(h0) / (norm_by_hand(outputs, r) + 0.5) * d, (
        ~np.isfinite(r).all(1)
    ).sum()


def kalman_by_hand(ensemble: Any, outputs: Any, targets: Any, noise_covariance: Any = 0.5, **rest: Any) -> Any:
    r = np.asarray(outputs, np.float64) - np.asarray(targets, np.float64)
    r[~np.isfinite(np.asarray(ensemble)).all(1)] = np.nan
    u, z, r, good, n = masked(ensemble, np.where(np.isfinite(r), outputs, np.nan), r)
    gamma = float(noise_covariance) * np.eye(z.shape[1])
    gain = u.T @ z / n @ np.linalg.pinv(z.T @ z / n + gamma, hermitian=True)
    return np.asarray(ensemble, np.float64) - r @ gain.T, (~good).sum()


def mean_by_hand(ensemble: Any, **rest: Any) -> Any:
    u = np.asarray(ensemble, np.float64)
    good = np.isfinite(u).all(1)
    return u[good].mean(0) if good.any() else np.full(u.shape[1], np.nan)


ENS, OUT, COT = ("ensemble", U), ("outputs", Z), ("cotangents", R)
BATCH, FN, LOSS = ("batch", (X, Y)), ("function", linear), ("function", eki_jax.squared_error())
POS, OPEN, KEYED = ("positive", 0.5), ("share", 0.5), ("key", KEY)
SQUARES = eki_jax.squared_error()
told = {"ensemble": ENS, "outputs": OUT, "targets": ("targets", Y)}
natural_start = {"params": ("params", np.zeros(3, np.float32)), "key0": KEYED, "batch": BATCH}
full = natural.full_rank(1.0)


def flow(make: Callable[..., Any]) -> Callable[..., Any]:
    """The value of a vector field."""
    return lambda ensemble, batch, **settings: made(make, forward=linear, loss=SQUARES, **settings)(
        0.0, ensemble, batch
    )


def two(make: Callable[..., Any]) -> Callable[..., Any]:
    """The value of a vector field of ensembles and velocities."""
    return lambda ensemble, velocity, batch, **settings: made(make, forward=linear, loss=SQUARES, **settings)(
        0.5, (ensemble, velocity), batch
    )


def fitted(**data: Any) -> Any:
    method = data.pop("method")
    with contextlib.redirect_stderr(io.StringIO()):
        options = {"batch_size": 5, "epochs": 1, "key": KEY} | {
            k: data.pop(k) for k in list(data) if k not in ("train_x", "labels")
        }
        pair = (data["train_x"], data["labels"])
        return training.fit(method, pair, (X, LABELS), progress=False, **options).history[0]["train_loss"]


TOLD = eki_jax.euler(None, SQUARES)


def one_sample(ensemble: Any, x: Any, target: Any, **settings: Any) -> Any:
    learner = made(online.online, **settings)
    return learner.step(learner.init(ensemble, ()), (x, target))[1]


def told_stream(**a: Any) -> Any:
    learner = made(online.online, cell=a["cell"], solver=TOLD)
    return online.learn_stream(learner, learner.init(a["ensemble"], ()), (a["xs"], a["targets"]))[1]


cell = lambda p, carry, x: (carry, x * p[:1])
PRIOR = eki_jax.gaussian(jnp.zeros(3), 1.0)
kernel_options = {"contraction": ("choice", "outputs"), "precision": ("precision", None)}


PARAMS = ("array", np.array([1.0, -2.0, 0.5], np.float32))
SLOPES = np.array([1.0, 2.0, 3.0], np.float32)
GRADIENT = ("function of one", lambda u: u * SLOPES.astype(jnp.result_type(u)))
PRIORED = ("prior", PRIOR)
EULER = eki_jax.euler(classes, eki_jax.cross_entropy())
METHOD = training.ensemble_method(EULER, classes, PRIOR, 4)
momenta = {"step_size": ("positive", 0.1), "momentum": OPEN}

low_rank = {
    "mean": ("matrices", np.ones((3, 2), np.float32)),
    "left": ("matrices", SLOPES[:, None]),
    "right": ("matrices", SLOPES[:2, None]),
}


class Counted(NamedTuple):
    """State of a discretization that is made here."""

    ensemble: Any
    count: Any


def by_hand_momentum(
    gradient: Any, params: Any, step_size: Any, momentum: Any, steps: Any, previous: Any = None, **rest: Any
) -> Any:
    u = [np.asarray(params if previous is None else previous, np.float64), np.asarray(params, np.float64)]
    for _ in range(int(steps)):
        u.append(u[-1] + float(momentum) * (u[-1] - u[-2]) - float(step_size) * SLOPES * u[-1])
    return np.stack(u[1:])


def low_rank_by_hand(mean: Any, left: Any, right: Any, x: Any, **rest: Any) -> Any:
    mean, left, right, x = (np.asarray(a, np.float64) for a in (mean, left, right, x))
    return x @ (mean + left @ right.T)


def drawn(make: Callable[..., Any]) -> Callable[..., Any]:
    """Draws from a prior that a function makes."""
    return lambda **settings: make(**settings).sample(KEY)


def discretized(ensemble: Any, batch: Any, start: Any, move: Any, **settings: Any) -> Any:
    return steps(eki_jax.discretization)(
        forward=linear, loss=SQUARES, start=start, move=move, **settings, ensemble=ensemble, batch=batch
    )


def selected(loss: Any, outputs: Any, targets: Any) -> Any:
    select, of_entries = losses.support_of(loss, targets)
    return of_entries(select(outputs, targets), targets)


def one_epoch(method: Any, batch_size: Any, key: Any, x: Any, targets: Any) -> Any:
    run = made(training.epoch, method=method, batch_size=batch_size)
    metrics = run(METHOD.init(KEY), key, x, targets)[1]
    if any(metrics["reason"]):
        raise Refused(metrics["reason"])
    return metrics["train_loss"]


CORE: dict[str, Call] = {
    "direction": Call(
        eki_jax.direction, {"ensemble": ENS, "outputs": OUT, "cotangents": COT, **kernel_options}, direction_by_hand
    ),
    "drift_norm": Call(eki_jax.drift_norm, {"outputs": OUT, "cotangents": COT}, norm_by_hand),
    "ensemble_size": Call(eki_jax.ensemble_size, {"ensemble": ENS}),
    "evaluate": Call(
        eki_jax.evaluate,
        {"forward": FN, "ensemble": ("any ensemble", U), "x": ("x", X), "chunk_size": ("chunk", 2)},
        fine={"ensemble": ("one row", "nothing")},
    ),
    "value_and_direction": Call(
        lambda ensemble, batch, **s: made(eki_jax.value_and_direction, **s)(ensemble, batch)[1],
        {"forward": FN, "loss": LOSS, "ensemble": ENS, "batch": BATCH, "chunk_size": ("chunk", 2)},
    ),
    "vector_field": Call(flow(eki_jax.vector_field), {"ensemble": ENS, "batch": BATCH, "chunk_size": ("chunk", 2)}),
    "flows.nesterov_start": Call(
        lambda ensemble, batch, t, **s: flows.nesterov_start(linear, SQUARES, ensemble, batch, t, **s),
        {"ensemble": ENS, "batch": BATCH, "t": POS, "friction": POS, "chunk_size": ("chunk", 2)},
    ),
    "flows.guarded": Call(
        lambda field, times, state: flows.guarded(field, times)(0.5, state, None),
        {
            "field": ("function of three", lambda t, u, batch: -u),
            "times": ("times", [0.0, 1.0]),
            "state": ("inputs", U),
        },
    ),
    "flows.square_root_flow": Call(flow(flows.square_root_flow), {"ensemble": ENS, "batch": BATCH}),
    "flows.nesterov_flow": Call(
        two(flows.nesterov_flow), {"ensemble": ENS, "velocity": ("like", 0 * U), "batch": BATCH}
    ),
    "flows.heavy_ball_flow": Call(
        two(flows.heavy_ball_flow), {"ensemble": ENS, "velocity": ("like", 0 * U), "batch": BATCH, "friction": POS}
    ),
    "momentum.inertia": Call(
        fixed_momentum.inertia, {"momentum": OPEN}, lambda momentum: 0.5 * (1 + np.asarray(momentum, np.float64))
    ),
    "momentum.iterate": Call(
        fixed_momentum.iterate,
        {
            "gradient": GRADIENT,
            "params": PARAMS,
            **momenta,
            "steps": ("count", 3),
            "previous": ("array or none", np.array([1.0, -1.0, 1.0], np.float32)),
        },
        by_hand_momentum,
    ),
    "momentum.gradient_flow": Call(
        lambda gradient, momentum, params: fixed_momentum.gradient_flow(gradient, momentum)(0.0, params),
        {"gradient": GRADIENT, "momentum": OPEN, "params": PARAMS},
    ),
    "momentum.modified_equation": Call(
        lambda params, velocity, **s: fixed_momentum.modified_equation(**s)(0.0, (params, velocity)),
        {"gradient": GRADIENT, **momenta, "params": PARAMS, "velocity": PARAMS},
    ),
    "momentum.initial_velocity": Call(
        fixed_momentum.initial_velocity, {"gradient": GRADIENT, "params": PARAMS, "momentum": OPEN}
    ),
    "momentum.manifold_flow": Call(
        lambda params, **s: fixed_momentum.manifold_flow(**s)(0.0, params),
        {"gradient": GRADIENT, **momenta, "params": PARAMS, "difference": ("positive or none", 0.1)},
    ),
    "momentum.manifold_velocity": Call(
        lambda params, **s: fixed_momentum.manifold_velocity(**s)(params),
        {"gradient": GRADIENT, **momenta, "params": PARAMS, "difference": ("positive or none", 0.1)},
    ),
    "momentum.modified_loss": Call(
        lambda params, **s: fixed_momentum.modified_loss(**s)(params),
        {"loss": ("function of one", lambda u: jnp.sum(u**2)), **momenta, "params": PARAMS},
    ),
    "discretization": Call(
        discretized,
        {
            "ensemble": ENS,
            "batch": BATCH,
            "start": ("function of one", lambda u: Counted(u, jnp.zeros((), jnp.int32))),
            "move": ("function", lambda dt, count: lambda d, u: (u - dt.astype(d.dtype) * d,)),
            "step_size": ("function of three", eki_jax.constant_step_size(0.1)),
        },
    ),
    "checked": Call(
        lambda fn, x: eki_jax.checked(fn)(x),
        {"fn": ("function of one", lambda x: 2 * x), "x": ("rows", U)},
        fine={"x": ("complex",)},
    ),
    "euler": Call(
        steps(eki_jax.euler),
        {
            "forward": FN,
            "loss": LOSS,
            "step_size": ("function", eki_jax.frobenius_step_size(0.5)),
            "ensemble": ENS,
            "batch": BATCH,
            "chunk_size": ("chunk", 2),
            "outlier_cut": ("above one", 1e6),
            "targets_axis": ("choice", None),
            **kernel_options,
            "failures": ("policy", eki_jax.keep_failed()),
        },
    ),
    "euler, told": Call(
        steps(lambda h0: eki_jax.euler(None, SQUARES, eki_jax.frobenius_step_size(h0))),
        {**told, "h0": POS},
        euler_by_hand,
    ),
    "stateful": Call(
        steps(of_noise),
        {"key": ("key or none", KEY), "common": ("choice", True), "ensemble": ENS, "batch": BATCH},
        is_random=True,
    ),
    "nesterov": Call(
        steps(eki_jax.nesterov), {"forward": FN, "loss": LOSS, "momentum": OPEN, "ensemble": ENS, "batch": BATCH}
    ),
    "heavy_ball": Call(
        steps(eki_jax.heavy_ball), {"forward": FN, "loss": LOSS, "momentum": OPEN, "ensemble": ENS, "batch": BATCH}
    ),
    "solvers.compact_euler": Call(
        steps(partial(solvers.compact_euler, None, SQUARES, eki_jax.frobenius_step_size(0.5))), told, tolerance=2e-2
    ),
    "compact.compact": Call(
        lambda ensemble, dtype: compact.compact(ensemble, dtype),
        {"ensemble": ENS, "dtype": ("dtype", jnp.bfloat16)},
        tolerance=2e-2,
    ),
    "compact.expand": Call(
        lambda stored: compact.expand(
            compact.CompactEnsemble(*stored) if isinstance(stored, tuple) and len(stored) == 2 else stored
        ),
        {"stored": ("state", (np.ones((1, 3), np.float32), U))},
        fine={"stored": ("parts that differ",)},
    ),
    "frobenius_step_size": Call(
        lambda h0, eps: eki_jax.frobenius_step_size(h0, eps)(3.0, 4, 0), {"h0": POS, "eps": ("not negative", 0.5)}
    ),
    "constant_step_size": Call(lambda step_size: eki_jax.constant_step_size(step_size)(3.0, 4, 0), {"step_size": POS}),
    "step_sizes.momentum_schedule": Call(
        lambda momentum: step_sizes.momentum_schedule(momentum)(jnp.array(3)), {"momentum": OPEN}
    ),
    "kalman.enkf": Call(
        steps(kalman.enkf),
        {
            "forward": FN,
            "noise_covariance": ("covariance", 0.5),
            "step_size": POS,
            "key": ("key or none", KEY),
            "space": ("choice", "output"),
            "ensemble": ENS,
            "batch": BATCH,
            "chunk_size": ("chunk", 2),
        },
    ),
    "kalman.enkf, told": Call(
        steps(partial(kalman.enkf, None)), {**told, "noise_covariance": ("covariance", 0.5)}, kalman_by_hand
    ),
    "kalman.tempered": Call(lambda steps: kalman.tempered(steps)(None, 1, 0.0, 0), {"steps": ("whole", 4)}),
    "kalman.data_misfit_controller": Call(
        lambda **s: kalman.data_misfit_controller(**s)(jnp.array([1.0, 2.0, 4.0]), 4, 0.0, 0),
        {"ddof": ("choice", 1), "tolerance": ("share", 0.1), "most_steps": ("whole or none", 9)},
    ),
    "natural.natural_gradient": Call(
        steps(partial(natural.natural_gradient, deviations=full), around=True),
        {
            "forward": FN,
            "loss": LOSS,
            "particles": ("whole", 6),
            "sigma": POS,
            "damping": POS,
            "learning_rate": POS,
            "averaging": ("share or none", 0.5),
            "norm_constraint": ("positive or none", 0.5),
            "outlier_cut": ("above one", 1e6),
            "loss_limit": ("above one", 5.0),
            "redraw_every": ("whole", 2),
            "chunk_size": ("chunk", 2),
            "space": ("choice", "output"),
            **natural_start,
        },
    ),
    "natural.natural_gradient, low rank": Call(
        steps(partial(natural.natural_gradient, particles=6), around=True),
        {"forward": FN, "loss": LOSS, **natural_start},
    ),
    "natural.value_and_natural_direction": Call(
        lambda params, batch, key, **s: made(
            natural.value_and_natural_direction, loss=SQUARES, particles=6, deviations=full, **s
        )(params, batch, key)[1],
        {
            "forward": FN,
            "sigma": POS,
            "damping": POS,
            "params": ("params or zero", np.zeros(3, np.float32)),
            "batch": BATCH,
            "key": KEYED,
        },
    ),
    "natural.adaptive_damping": Call(
        lambda **s: natural.adaptive_damping(**s).next(jnp.array(1.0), jnp.array(0.9)),
        {
            "initial": ("positive", 1e-3),
            "decrease": ("positive", 0.9),
            "increase": ("positive", 1.5),
            "low": ("finite", 0.25),
            "high": ("positive", 0.75),
            "least": ("positive", 1e-8),
            "most": ("positive", 1e4),
        },
    ),
    "natural.low_rank": Call(
        lambda mean, plain, **s: natural.low_rank(plain=plain, **s).draw(KEY, {"w": mean})["w"],
        {
            "rank": ("whole", 1),
            "scale": ("deviations", 0.5),
            "plain": ("function of one or none", lambda name: False),
            "mean": ("matrix", np.zeros((3, 2), np.float32)),
        },
        is_random=True,
    ),
    "natural.affine": Call(
        natural.affine,
        {
            "x": ("matrices", X),
            "w": ("matrices", np.ones((3, 2), np.float32)),
            "bias": ("vector", np.ones(2, np.float32)),
        },
        lambda x, w, bias: np.asarray(x, np.float64) @ w + bias,
        fine={"x": ("integers", "another shape"), "w": ("integers",)},
    ),
    "natural.LowRankMatrix": Call(
        lambda mean, left, right, x: natural.LowRankMatrix(mean, left, right).__rmatmul__(x),
        {**low_rank, "x": ("x", X)},
        low_rank_by_hand,
    ),
    "natural.low_rank_call": Call(
        lambda forward, mean, left, right, x: natural.low_rank_call(
            forward, {"w": natural.LowRankMatrix(mean, left, right)}, x
        ),
        {"forward": ("function", lambda p, x: x @ p["w"]), **low_rank, "x": ("x", X)},
        low_rank_by_hand,
    ),
    "natural.per_sample": Call(
        natural.per_sample,
        {
            "solve": ("choice", "covariance"),
            "ridge": ("not negative", 0.01),
            "relative": ("flag", True),
            "causal": ("flag", True),
            "discount": ("from 0 to 1", 1.0),
        },
    ),
    "natural.learned_feedback": Call(
        natural.learned_feedback,
        {
            "example": ("rows", np.zeros((3, 2), np.float32)),
            "decay": ("share", 0.9),
            "bins": ("whole", 4),
            "unbiased": ("flag", False),
            "averaged": ("at least one", 2.0),
            "answers": ("flag", True),
            "balanced": ("flag", False),
        },
        fine={"example": ("complex",)},  # of which the shapes alone are used
    ),
    "natural.describe": Call(
        lambda forward, params, x, deviations: len(natural.describe(forward, {"w": params}, x, deviations).leaves),
        {
            "forward": ("function", lambda p, x: x @ p["w"]),
            "params": ("matrix", np.zeros((3, 2), np.float32)),
            "x": ("rows", X),
            "deviations": ("objects", natural.low_rank(1)),
        },
        fine={"x": ("complex",)},
    ),
    "natural.curvature": Call(
        lambda loss, outputs, targets: natural.curvature(loss, outputs, targets).gradient,
        {"loss": LOSS, "outputs": ("row", Z[0]), "targets": ("targets", Y)},
        lambda loss, outputs, targets: np.asarray(outputs, np.float64) - targets,
    ),
    "natural.full_rank": Call(natural.full_rank, {"scale": ("deviations", 0.5)}),
    "natural.localized": Call(natural.localized, {"iterations": ("whole", 4)}),
    "natural.span": Call(natural.span, {"space": ("choice", "output")}),
    "squared_error": Call(
        lambda precision, outputs, targets: eki_jax.squared_error(precision)(outputs, targets),
        {"precision": ("not negative or none", 2.0), "outputs": ("row", Z[0]), "targets": ("targets", Y)},
    ),
    "cross_entropy": Call(
        lambda delta, outputs, targets: eki_jax.cross_entropy(delta)(outputs, targets),
        {
            "delta": ("not negative", 0.1),
            "outputs": ("row", np.full((5, 3), 1 / 3, np.float32)),
            "targets": ("labels", LABELS),
        },
    ),
    "losses.softmax_cross_entropy": Call(
        lambda outputs, targets: losses.softmax_cross_entropy()(outputs, targets),
        {"outputs": ("row", RNG.normal(size=(5, 3)).astype(np.float32)), "targets": ("labels", LABELS)},
    ),
    "losses.mean_over_samples": Call(
        lambda fn, outputs, targets: losses.mean_over_samples(fn)(outputs, targets),
        {"fn": ("function", lambda z, y: (z - y) ** 2), "outputs": ("row", Z[0]), "targets": ("targets", Y)},
    ),
    "losses.value_and_cotangents": Call(
        lambda loss, outputs, targets: losses.value_and_cotangents(loss, outputs, targets)[1],
        {"loss": LOSS, "outputs": OUT, "targets": ("targets", Y)},
        fine={"outputs": ("a row less", "one row", "another J")},
    ),
    "losses.check_loss": Call(
        lambda **s: losses.check_loss(**s) is None,
        {"loss": LOSS, "outputs": ("row", Z[0]), "targets": ("targets", Y), "tolerance": ("positive", 1e-3)},
    ),
    "losses.support_of": Call(
        selected,
        {
            "loss": ("function", eki_jax.cross_entropy()),
            "outputs": ("row", np.full((5, 3), 1 / 3, np.float32)),
            "targets": ("labels", LABELS),
        },
    ),
    "losses.supported_outputs": Call(
        lambda loss, outputs, targets: losses.supported_outputs(loss, outputs, targets)[0],
        {
            "loss": ("function", eki_jax.cross_entropy()),
            "outputs": ("outputs", RNG.uniform(size=(4, 5, 3)).astype(np.float32)),
            "targets": ("labels", LABELS),
        },
        fine={
            "outputs": ("a row less", "one row", "another J"),
            "targets": ("None", "halves", "NaN", "complex"),  # it does not look at them
        },
    ),
    "gaussian": Call(
        lambda mean, scale: eki_jax.gaussian(mean, scale).sample(KEY),
        {"mean": ("mean", np.zeros(3, np.float32)), "scale": ("scale", 1.0)},
        is_random=True,
    ),
    "gaussian, factor": Call(
        lambda mean, factor: eki_jax.gaussian(mean, factor=factor).sample(KEY),
        {"mean": ("mean", np.zeros(3, np.float32)), "factor": ("factor", np.eye(3, 2, dtype=np.float32))},
        is_random=True,
    ),
    "gaussian, covariance": Call(
        lambda mean, covariance: eki_jax.gaussian(mean, covariance=covariance).sample(KEY),
        {"mean": ("mean", np.zeros(3, np.float32)), "covariance": ("prior covariance", np.eye(3, dtype=np.float32))},
        is_random=True,
    ),
    "xavier": Call(drawn(eki_jax.xavier), {"template": ("row", np.zeros((3, 2), np.float32))}, is_random=True),
    "sample_ensemble": Call(
        eki_jax.sample_ensemble,
        {"key": KEYED, "prior": PRIORED, "particles": ("whole", 4)},
        fine={"prior": ("of another shape", "of a dictionary")},
    ),
    "resample_around_mean": Call(
        eki_jax.resample_around_mean,
        {
            "key": KEYED,
            "ensemble": ENS,
            "prior": PRIORED,
            "particles": ("whole or none", 4),
            "scale": ("not negative", 1.0),
        },
    ),
    "perturb": Call(
        eki_jax.perturb,
        {"key": KEYED, "ensemble": ENS, "prior": PRIORED, "scale": ("not negative", 1.0)},
        fine={"ensemble": ("one row",)},
    ),
    "perturb_data": Call(
        lambda key, targets, factor, particles: eki_jax.perturb_data(key, targets, factor, particles),
        {"key": KEYED, "targets": ("mean", Y), "factor": ("not negative", 1.0), "particles": ("whole", 4)},
    ),
    "mean_particle": Call(eki_jax.mean_particle, {"ensemble": ENS}, mean_by_hand),
    "best_particle": Call(
        eki_jax.best_particle, {"ensemble": ENS, "losses": ("losses", np.arange(4.0, dtype=np.float32))}
    ),
    "ensemble_outputs": Call(
        eki_jax.ensemble_outputs,
        {"forward": FN, "ensemble": ("any ensemble", U), "x": ("x", X), "chunk_size": ("chunk", 2)},
        fine={"ensemble": ("one row",)},
    ),
    "redraw_failed": Call(
        lambda key, ensemble: eki_jax.redraw_failed(key).apply(
            ensemble, jnp.array([True, False, True, True]), jnp.array(0), None
        ),
        {"key": KEYED, "ensemble": ENS},
    ),
    "training.classification_accuracy": Call(
        lambda forward, ensemble, x, labels: training.classification_accuracy(forward, ensemble, x, labels).mean,
        {"forward": ("function", classes), "ensemble": ENS, "x": ("x", X), "labels": ("labels", LABELS)},
    ),
    "metrics.particle_accuracy": Call(
        lambda forward, params, x, labels: particle_accuracy(forward, params, x, labels).mean,
        {
            "forward": ("function", classes),
            "params": PARAMS,
            "x": ("x", X),
            "labels": ("labels", LABELS),
        },
        fine={"params": ("integers",)},
    ),
    "training.check_data": Call(
        training.check_data, {"x": ("x", X), "targets": ("labels of any kind", LABELS), "batch_size": ("whole", 5)}
    ),
    "training.check_labels": Call(
        lambda **s: training.check_labels(**s) is None,
        {
            "forward": ("function", classes),
            "template": ("mean", np.zeros(3, np.float32)),
            "x": ("x", X),
            "labels": ("labels", LABELS),
        },
    ),
    "training.ensemble_method": Call(
        lambda key, **s: training.ensemble_method(**s).init(key).ensemble,
        {
            "key": KEYED,
            "solver": ("solver", EULER),
            "forward": ("function", classes),
            "prior": PRIORED,
            "particles": ("whole", 4),
        },
        is_random=True,
        fine={"prior": ("of another shape", "of a dictionary")},
    ),
    "training.epoch": Call(
        one_epoch,
        {
            "method": ("method", METHOD),
            "batch_size": ("whole", 5),
            "key": ("key of few", KEY),
            "x": ("x", X),
            "targets": ("labels", LABELS),
        },
    ),
    "training.abstract": Call(
        lambda fn, x: jnp.zeros(training.abstract(fn, x).shape),
        {"fn": ("function of one", lambda x: 2 * x), "x": ("rows", U)},
        fine={"x": ("complex",)},
    ),
    "training.fit": Call(
        fitted,
        {
            "method": ("method", METHOD),
            "train_x": ("x", X),
            "labels": ("labels", LABELS),
            "batch_size": ("whole", 5),
            "epochs": ("whole", 1),
            "key": KEYED,
            "most_refusals": ("whole", 3),
        },
    ),
    "online.learn_stream": Call(
        told_stream,
        {
            "cell": ("function", cell),
            "ensemble": ENS,
            "xs": ("x", np.ones((3, 1), np.float32)),
            "targets": ("targets", np.ones((3, 1), np.float32)),
        },
    ),
    "online.online": Call(
        one_sample,
        {
            "cell": ("function of three", cell),
            "solver": ("solver", TOLD),
            "ensemble": ENS,
            "x": ("x", np.ones(2, np.float32)),
            "target": ("targets", np.ones(2, np.float32)),
        },
    ),
    "online.predict_stream": Call(
        lambda cell, params, carry, xs: online.predict_stream(cell, params, carry, xs)[1],
        {
            "cell": ("function of three", cell),
            "params": PARAMS,
            "carry": ("inputs", np.zeros(1, np.float32)),
            "xs": ("x", np.ones((3, 1), np.float32)),
        },
        fine={"carry": ("None", "complex"), "params": ("integers",)},
    ),
}
