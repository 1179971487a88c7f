"""Malformed input to every public callable: an error that names it, a refusal that says why, or the right result.

A case is a call with one argument replaced. What comes back is one of ``KINDS``; only the first three are as they
should be, and of the obscure errors from inside at most one in a hundred is let pass. Results that are accepted are
compared with those of the same call in float64, and those of the kernel and of single steps with NumPy's own.

``python -m pytest tests/fuzz -m slow -s`` runs the fixed set of cases and prints the table.
"""

from __future__ import annotations

import collections
import contextlib
import io
import random
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

import eki_jax
import eki_jax.optax as eki_optax
from eki_jax import edf, flows, kalman, losses, natural, online, semi_supervised, sharding, training
from eki_jax.compact import compact_euler

KINDS = ("clear error", "refused", "right", "wrong", "poisoned", "NaN setting", "imaginary part", "obscure error")
GOOD = KINDS[:3]
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
        oracle: function of the arguments in NumPy's float64 that gives what is right, or None.
    """

    call: Callable[..., Any]
    valid: dict[str, tuple[str, Any]]
    oracle: Callable[..., Any] | None = None


def steps(make: Callable[..., eki_jax.Solver], *, around: bool = False) -> Callable[..., Any]:
    """A call that makes a solver and takes one step, by ``step`` or, with outputs, by ``update``."""

    def call(**arguments: Any) -> Any:
        start = [arguments.pop(name) for name in ("params", "key0", "ensemble") if name in arguments]
        told = "outputs" in arguments
        batch, outputs = arguments.pop("batch", None), arguments.pop("outputs", None)
        targets = arguments.pop("targets", None)
        solver = make(**arguments)
        state = solver.init(*start)
        new, info = solver.update(state, outputs, targets) if told else solver.step(state, batch)
        if int(info.reason):
            same = jax.tree.map(lambda a, b: np.array_equal(a, b, equal_nan=True), _plain(new), _plain(state))
            assert all(jax.tree.leaves(same)), "a refused step changed its state"
            raise Refused(eki_jax.Reason(int(info.reason)))
        return solver.ensemble(new) if not around else new.position, info.failed

    return call


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
    return lambda ensemble, batch, **settings: make(linear, SQUARES, **settings)(0.0, ensemble, batch)


def two(make: Callable[..., Any]) -> Callable[..., Any]:
    return lambda ensemble, velocity, batch, **rest: make(linear, SQUARES, **rest)(0.5, (ensemble, velocity), batch)


def chain(make: Callable[..., Any]) -> Callable[..., Any]:
    def call(ensemble: Any, outputs: Any, cotangents: Any, **settings: Any) -> Any:
        tx = make(**settings)
        zeros = jax.tree.map(jnp.zeros_like, U)
        return tx.update(zeros, tx.init(ensemble), ensemble, outputs=outputs, cotangents=cotangents)[0]

    return call


def fitted(**data: Any) -> Any:
    prior = eki_jax.gaussian(jnp.zeros(3), 1.0)
    solver = eki_jax.euler(classes, eki_jax.cross_entropy())
    method = training.ensemble_method(solver, classes, prior, 4)
    with contextlib.redirect_stderr(io.StringIO()):
        options = {"batch_size": 5, "epochs": 1, "key": KEY} | {
            k: data.pop(k) for k in list(data) if k not in ("train_x", "labels")
        }
        pair = (data["train_x"], data["labels"])
        return training.fit(method, pair, (X, LABELS), progress=False, **options).history[0]["train_loss"]


def told_stream(**a: Any) -> Any:
    learner = online.online(a["cell"], eki_jax.euler(None, SQUARES))
    return online.learn_stream(learner, learner.init(a["ensemble"], ()), (a["xs"], a["targets"]))[1]


cell = lambda p, carry, x: (carry, x * p[:1])
PRIOR = eki_jax.gaussian(jnp.zeros(3), 1.0)
WEIGHTS = semi_supervised.gaussian_affinity(X[:, :2], 1.0)
kernel_options = {"contraction": ("choice", "outputs"), "precision": ("precision", None)}


def stepped_edf(tx: Any) -> Any:
    params, objective = jnp.zeros(3, jnp.float32), edf.Objective(linear, SQUARES)
    gradient = jnp.asarray(X.T @ -Y)
    return tx.update(gradient, tx.init(params), params, objective=objective, batch=(X, Y))[0]


CALLS: dict[str, Call] = {
    "direction": Call(
        eki_jax.direction, {"ensemble": ENS, "outputs": OUT, "cotangents": COT, **kernel_options}, direction_by_hand
    ),
    "drift_norm": Call(eki_jax.drift_norm, {"outputs": OUT, "cotangents": COT}, norm_by_hand),
    "ensemble_size": Call(eki_jax.ensemble_size, {"ensemble": ENS}),
    "evaluate": Call(
        eki_jax.evaluate, {"forward": FN, "ensemble": ("any ensemble", U), "x": ("x", X), "chunk_size": ("chunk", 2)}
    ),
    "value_and_direction": Call(
        lambda forward, loss, ensemble, batch, **s: eki_jax.value_and_direction(forward, loss, **s)(ensemble, batch)[1],
        {"forward": FN, "loss": LOSS, "ensemble": ENS, "batch": BATCH, "chunk_size": ("chunk", 2)},
    ),
    "vector_field": Call(flow(eki_jax.vector_field), {"ensemble": ENS, "batch": BATCH, "chunk_size": ("chunk", 2)}),
    "square_root_flow": Call(flow(flows.square_root_flow), {"ensemble": ENS, "batch": BATCH}),
    "nesterov_flow": Call(two(flows.nesterov_flow), {"ensemble": ENS, "velocity": ("like", 0 * U), "batch": BATCH}),
    "heavy_ball_flow": Call(
        two(flows.heavy_ball_flow), {"ensemble": ENS, "velocity": ("like", 0 * U), "batch": BATCH, "friction": POS}
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
    "nesterov": Call(
        steps(eki_jax.nesterov), {"forward": FN, "loss": LOSS, "momentum": OPEN, "ensemble": ENS, "batch": BATCH}
    ),
    "heavy_ball": Call(
        steps(eki_jax.heavy_ball), {"forward": FN, "loss": LOSS, "momentum": OPEN, "ensemble": ENS, "batch": BATCH}
    ),
    "compact_euler": Call(steps(partial(compact_euler, None, SQUARES, eki_jax.frobenius_step_size(0.5))), told),
    "frobenius_step_size": Call(
        lambda h0, eps: eki_jax.frobenius_step_size(h0, eps)(3.0, 4, 0), {"h0": POS, "eps": ("not negative", 0.5)}
    ),
    "constant_step_size": Call(lambda step_size: eki_jax.constant_step_size(step_size)(3.0, 4, 0), {"step_size": POS}),
    "enkf": Call(
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
    "enkf, told": Call(
        steps(partial(kalman.enkf, None)), {**told, "noise_covariance": ("covariance", 0.5)}, kalman_by_hand
    ),
    "tempered": Call(lambda steps: kalman.tempered(steps)(None, 1, 0.0, 0), {"steps": ("whole", 4)}),
    "data_misfit_controller": Call(
        lambda **s: kalman.data_misfit_controller(**s)(jnp.array([1.0, 2.0, 4.0]), 4, 0.0, 0),
        {"ddof": ("choice", 1), "tolerance": ("share", 0.1)},
    ),
    "natural_gradient": Call(
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
    "natural, low rank": Call(
        steps(partial(natural.natural_gradient, particles=6), around=True),
        {"forward": FN, "loss": LOSS, **natural_start},
    ),
    "value_and_natural_direction": Call(
        lambda forward, sigma, damping, params, batch, key: natural.value_and_natural_direction(
            forward, SQUARES, 6, sigma, damping, full
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
    "adaptive_damping": Call(
        lambda **s: natural.adaptive_damping(**s).next(jnp.array(1.0), jnp.array(0.9)),
        {"initial": ("positive", 1e-3), "decrease": ("positive", 0.9), "increase": ("positive", 1.5)},
    ),
    "low_rank": Call(natural.low_rank, {"rank": ("whole", 1)}),
    "full_rank": Call(natural.full_rank, {"scale": ("deviations", 0.5)}),
    "localized": Call(natural.localized, {"iterations": ("whole", 4)}),
    "span": Call(natural.span, {"space": ("choice", "output")}),
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
    "softmax_cross_entropy": Call(
        lambda outputs, targets: losses.softmax_cross_entropy()(outputs, targets),
        {"outputs": ("row", RNG.normal(size=(5, 3)).astype(np.float32)), "targets": ("labels", LABELS)},
    ),
    "mean_over_samples": Call(
        lambda fn, outputs, targets: losses.mean_over_samples(fn)(outputs, targets),
        {"fn": ("function", lambda z, y: (z - y) ** 2), "outputs": ("row", Z[0]), "targets": ("targets", Y)},
    ),
    "value_and_cotangents": Call(
        lambda loss, outputs, targets: losses.value_and_cotangents(loss, outputs, targets)[1],
        {"loss": LOSS, "outputs": OUT, "targets": ("targets", Y)},
    ),
    "gaussian": Call(
        lambda mean, scale: eki_jax.gaussian(mean, scale).sample(KEY),
        {"mean": ("mean", np.zeros(3, np.float32)), "scale": ("scale", 1.0)},
    ),
    "xavier": Call(
        lambda template: eki_jax.xavier(template).sample(KEY), {"template": ("row", np.zeros((3, 2), np.float32))}
    ),
    "sample_ensemble": Call(
        lambda key, particles: eki_jax.sample_ensemble(key, PRIOR, particles), {"key": KEYED, "particles": ("whole", 4)}
    ),
    "resample_around_mean": Call(
        lambda key, ensemble, particles, scale: eki_jax.resample_around_mean(
            key, ensemble, PRIOR, particles, scale=scale
        ),
        {"key": KEYED, "ensemble": ENS, "particles": ("whole or none", 4), "scale": ("not negative", 1.0)},
    ),
    "perturb": Call(
        lambda key, ensemble, scale: eki_jax.perturb(key, ensemble, PRIOR, scale),
        {"key": KEYED, "ensemble": ENS, "scale": ("not negative", 1.0)},
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
    ),
    "redraw_failed": Call(
        lambda key, ensemble: eki_jax.redraw_failed(key).apply(
            ensemble, jnp.array([True, False, True, True]), jnp.array(0), None
        ),
        {"key": KEYED, "ensemble": ENS},
    ),
    "classification_accuracy": Call(
        lambda forward, ensemble, x, labels: training.classification_accuracy(forward, ensemble, x, labels).mean,
        {"forward": ("function", classes), "ensemble": ENS, "x": ("x", X), "labels": ("labels", LABELS)},
    ),
    "fit": Call(
        fitted,
        {
            "train_x": ("x", X),
            "labels": ("labels", LABELS),
            "batch_size": ("whole", 5),
            "epochs": ("whole", 1),
            "key": KEYED,
            "most_refusals": ("whole", 3),
        },
    ),
    "learn_stream": Call(
        told_stream,
        {
            "cell": ("function", cell),
            "ensemble": ENS,
            "xs": ("x", np.ones((3, 1), np.float32)),
            "targets": ("targets", np.ones((3, 1), np.float32)),
        },
    ),
    "optax.eki": Call(
        chain(eki_optax.eki),
        {"h0": POS, "eps": ("not negative", 0.5), "ensemble": ENS, "outputs": OUT, "cotangents": COT},
    ),
    "optax.meki": Call(
        chain(eki_optax.meki), {"h0": POS, "momentum": OPEN, "ensemble": ENS, "outputs": OUT, "cotangents": COT}
    ),
    "optax.ensemble_gradient": Call(
        chain(eki_optax.ensemble_gradient), {"ensemble": ENS, "outputs": OUT, "cotangents": COT, **kernel_options}
    ),
    "optax.add_tikhonov": Call(
        lambda weight, ensemble: eki_optax.add_tikhonov(PRIOR, weight).update(0 * U, optax.EmptyState(), ensemble)[0],
        {"weight": ("not negative", 1.0), "ensemble": ENS},
    ),
    "edf.edf_g": Call(lambda learning_rate: stepped_edf(edf.edf_g(learning_rate)), {"learning_rate": POS}),
    "graph_laplacian": Call(semi_supervised.graph_laplacian, {"weights": ("affinity", WEIGHTS)}),
    "gaussian_affinity": Call(semi_supervised.gaussian_affinity, {"x": ("points", X[:, :2]), "width": POS}),
    "observed_value": Call(
        lambda u, nodes: semi_supervised.observed_value(u, nodes),
        {"u": ("row", U[0]), "nodes": ("nodes", np.array([0, 2]))},
    ),
    "nearest_sizes": Call(sharding.nearest_sizes, {"size": ("whole", 10), "devices": ("whole", 4)}),
}


class Change(NamedTuple):
    """A replacement of a valid value.

    Attributes:
        name: words for it.
        make: function of the valid value that gives the other one.
        wanted: kinds of results that are as they should be; controls are to be right.
    """

    name: str
    make: Callable[[Any], Any]
    wanted: tuple[str, ...] = ("clear error", "refused")


def const(name: str, value: Any, *wanted: str) -> Change:
    return Change(name, lambda valid: value, wanted or ("clear error", "refused"))


RIGHT = ("right",)
ANY = GOOD
strings = [
    const("a string", "text"),
    const("None", None),
    const("a dictionary", {"a": 1.0}),
    const("an object", object()),
]
numbers = [
    *strings,
    const("NaN", float("nan")),
    const("NaN of NumPy", np.float32("nan")),
    const("NaN of JAX", jnp.array(jnp.nan)),
    const("infinity", float("inf")),
    const("minus infinity", float("-inf")),
    const("an array", np.ones(3, np.float32)),
    const("a column", np.ones((4, 1), np.float32)),
    const("complex", 0.5 + 1j),
    const("complex of NumPy", np.complex64(0.5 + 1j)),
    const("-1", -1.0),
    const("-1 of NumPy", np.float32(-1)),
    const("-1 of JAX", jnp.array(-1.0)),
    const("a flag", True),
    Change("control: NumPy", np.float32, RIGHT),
    Change("control: JAX", lambda v: jnp.asarray(v, jnp.float32), RIGHT),
    Change("control: NumPy double", np.float64, RIGHT),
    Change("control", lambda v: v, RIGHT),
]
rows_of = lambda make: lambda v: make(np.array(v))


def put(value: Any, row: int = 1) -> Callable[[Any], Any]:
    def change(valid: Any) -> Any:
        new = np.array(valid)
        new[row] = value
        return new

    return change


arrays = [
    *strings,
    const("a scalar", np.float32(1.0)),
    Change("complex", lambda v: np.array(v) + 0.5j),
    Change("strings", lambda v: np.full(np.shape(v), "a")),
    Change("one row", lambda v: np.array(v)[:1]),
    Change("a row less", lambda v: np.array(v)[:-1], ("clear error", "refused")),
    const("nothing", np.zeros((0, 3), np.float32)),
    Change("a list of strings", lambda v: ["a"] * len(v)),
    Change("objects", lambda v: np.array(v, object)),
    Change("NaN in one", put(np.nan), ANY),
    Change("infinity in one", put(np.inf), ANY),
    Change("huge in one", put(1e19), ANY),
    Change("1e38 in one", put(1e38), ANY),
    Change("all NaN", lambda v: np.full_like(v, np.nan), ANY),
    Change("all huge", lambda v: np.full_like(v, 1e19) * np.sign(v), ANY),
    Change("control: double", lambda v: np.asarray(v, np.float64), RIGHT),
    Change("control: JAX", jnp.asarray, RIGHT),
    Change("control", lambda v: v, RIGHT),
]
whole = [
    *strings,
    const("2.5", 2.5),
    const("2.5 of NumPy", np.float32(2.5)),
    const("NaN", float("nan")),
    const("-1", -1),
    const("0", 0),
    const("complex", 2 + 1j),
    const("an array", np.array([2, 3])),
    const("infinity", float("inf")),
    const("a flag", True),
    Change("control: NumPy", np.int64, RIGHT),
    Change("control: JAX", jnp.asarray, RIGHT),
    Change("control", lambda v: v, RIGHT),
]
ROLES: dict[str, list[Change]] = {
    "positive": [*numbers, const("0", 0.0)],
    "not negative": numbers,
    "share": [*numbers, const("1", 1.0), const("1 of JAX", jnp.array(1.0))],
    "above one": [change for change in [*numbers, const("1", 1.0)] if change.name != "None"],
    "whole": whole,
    "key or none": [],
    "positive or none": [],
    "share or none": [],
    "any ensemble": [],
    "not negative or none": [],
    "whole or none": [],
    "scale": [],
    "mean": [],
    "deviations": [],
    "params or zero": [],
    "chunk": [change for change in whole if change.name != "None"],
    "key": [
        const("a seed", 0),
        const("None", None),
        const("a string", "key"),
        const("floats", np.zeros(2, np.float32)),
        Change("two keys", jax.random.split),
        const("numbers", np.array([0, 1])),
        const("a dictionary", {}),
        Change("control: raw", jax.random.key_data, RIGHT),
        const("control: rbg", jax.random.key(0, impl="rbg"), "right"),
        Change("control", lambda v: v, RIGHT),
    ],
    "ensemble": [
        *arrays,
        Change("integers", lambda v: np.array(v, np.int32)),
        Change("flags", lambda v: np.array(v) > 0),
    ],
    "outputs": [change for change in arrays if change.name != "nothing"]
    + [Change("another J", lambda v: np.concatenate([v, v]))],
    "cotangents": [change for change in arrays if change.name != "nothing"] + [Change("of one", lambda v: v[0])],
    "like": [
        const("one of them", U[0]),
        const("a column", U[:, :1]),
        const("None", None),
        const("a string", "a"),
        Change("control", lambda v: v, RIGHT),
    ],
    "row": [
        *strings,
        Change("complex", lambda v: np.array(v) + 0.5j),
        Change("strings", lambda v: np.full(np.shape(v), "a")),
        Change("NaN", lambda v: np.full_like(v, np.nan), ANY),
        Change("control: JAX", jnp.asarray, RIGHT),
        Change("control", lambda v: v, RIGHT),
    ],
    "params": [
        *strings,
        Change("complex", lambda v: np.array(v) + 0.5j),
        Change("integers", lambda v: np.array(v, np.int32)),
        Change("NaN", put(np.nan)),
        Change("infinity", put(np.inf)),
        Change("control", lambda v: v, RIGHT),
        Change("control: JAX", jnp.asarray, RIGHT),
    ],
    "x": [
        const("a string", "text"),
        const("an object", object()),
        Change("strings", lambda v: np.full(np.shape(v), "a")),
        Change("NaN", put(np.nan), ANY),
        Change("control: JAX", jnp.asarray, RIGHT),
        Change("control", lambda v: v, RIGHT),
    ],
    "targets": [
        *strings,
        Change("complex", lambda v: np.array(v) + 0.5j),
        Change("another shape", lambda v: np.array(v)[:-1]),
        Change("a column", lambda v: np.array(v).reshape(-1, 1) if np.ndim(v) == 1 else np.array(v)[None]),
        Change("NaN", put(np.nan), ANY),
        Change("all NaN", lambda v: np.full_like(v, np.nan), ANY),
        Change("strings", lambda v: np.full(np.shape(v), "a")),
        Change("control: JAX", jnp.asarray, RIGHT),
        Change("control", lambda v: v, RIGHT),
    ],
    "labels": [
        *strings,
        Change("out of range", put(7)),
        Change("negative", put(-1)),
        Change("halves", lambda v: np.array(v) + 0.5),
        Change("NaN", lambda v: np.array(v) * np.float32("nan")),
        Change("a label less", lambda v: np.array(v)[:-1]),
        Change("complex", lambda v: np.array(v) + 1j),
        Change("control: JAX", jnp.asarray, RIGHT),
        Change("control", lambda v: v, RIGHT),
        Change("control: small", lambda v: np.array(v, np.int8), RIGHT),
    ],
    "losses": [
        *strings,
        Change("all NaN", lambda v: np.full_like(v, np.nan)),
        Change("a loss less", lambda v: np.array(v)[:-1]),
        const("a scalar", 1.0),
        Change("complex", lambda v: np.array(v) + 1j),
        Change("control", lambda v: v, RIGHT),
        Change("control: one NaN", put(np.nan, 0), RIGHT),
    ],
    "batch": [
        const("a number", 3.0),
        const("None", None),
        const("a string", "ab"),
        Change("one part", lambda v: (v[0],)),
        Change("three parts", lambda v: (*v, 0)),
        Change("an array", lambda v: v[0]),
        Change("other samples", lambda v: (v[0], v[1][:-1])),
        Change("NaN targets", lambda v: (v[0], v[1] * np.nan), ANY),
        Change("complex targets", lambda v: (v[0], v[1] + 1j)),
        Change("string inputs", lambda v: ("a", v[1])),
        Change("control: a list", list, RIGHT),
        Change("control", lambda v: v, RIGHT),
        Change("control: JAX", lambda v: jax.tree.map(jnp.asarray, v), RIGHT),
    ],
    "function": [
        const("a number", 3),
        const("a string", "f"),
        const("an array", U),
        const("not called", eki_jax.squared_error),
        Change("control", lambda v: v, RIGHT),
    ],
    "policy": [
        const("a string", "keep"),
        const("not called", eki_jax.keep_failed),
        const("None", None),
        Change("control", lambda v: v, RIGHT),
    ],
    "choice": [
        const("another", "both"),
        const("a number", 3.5),
        const("an array", U),
        const("a dictionary", {}),
        Change("control", lambda v: v, RIGHT),
    ],
    "precision": [
        const("another", "exact"),
        const("a number", 3.5),
        const("control: highest", "highest", "right"),
        Change("control", lambda v: v, RIGHT),
    ],
    "covariance": [
        *(c for c in numbers if c.name not in ("an array", "a column")),
        const("0", 0.0),
        const("a matrix that is none", np.array([[1.0, 2.0], [0.0, 1.0]])),
        const("indefinite", np.diag([1.0, -1.0, 1.0, 1.0, 1.0])),
        const("another size", np.ones(3, np.float32)),
    ],
    "affinity": [
        *strings,
        Change("not symmetric", lambda v: np.triu(v)),
        Change("negative", lambda v: -np.array(v)),
        Change("NaN", put(np.nan)),
        Change("complex", lambda v: v + 1j),
        Change("control", lambda v: v, RIGHT),
    ],
    "points": [
        *strings,
        Change("complex", lambda v: v + 1j),
        Change("NaN", put(np.nan)),
        Change("control", lambda v: v, RIGHT),
    ],
    "nodes": [
        *strings,
        const("out of range", np.array([7])),
        const("negative", np.array([-7])),
        const("halves", np.array([0.5])),
        Change("control", lambda v: v, RIGHT),
    ],
}


for _role in ("key", "positive", "share", "not negative", "whole"):
    ROLES[f"{_role} or none"] = [change for change in ROLES[_role] if change.name != "None"]
ROLES["any ensemble"] = [change for change in ROLES["ensemble"] if change.name not in ("integers", "flags")]


ROLES["deviations"] = [c for c in ROLES["positive"] if c.name not in ("a dictionary", "an array", "a column")]
ROLES["mean"] = [change for change in ROLES["row"] if change.name != "a dictionary"]
ROLES["scale"] = [change for change in ROLES["not negative"] if change.name != "an array"]
ROLES["params or zero"] = [
    change._replace(wanted=ANY) if change.name in ("NaN", "infinity") else change for change in ROLES["params"]
]


class Case(NamedTuple):
    """A call, the argument that is replaced, and by what; or two of them."""

    call: str
    argument: str
    change: Change
    second: tuple[str, Change] | None = None


def every_case() -> Iterator[Case]:
    for name, call in CALLS.items():
        for argument, (role, _) in call.valid.items():
            for change in ROLES[role]:
                yield Case(name, argument, change)


CASES = list(every_case())


def pairs(number: int) -> Iterator[Case]:
    """Calls with two arguments replaced by what is to be refused, drawn once and for all."""
    draw = random.Random(0)
    names = [name for name, call in CALLS.items() if len(call.valid) > 1]
    refused = lambda role: [change for change in ROLES[role] if change.wanted == ("clear error", "refused")]
    while number:
        call = CALLS[name := draw.choice(names)]
        (one, (role, _)), (other, (other_role, _)) = draw.sample(list(call.valid.items()), 2)
        if refused(role) and refused(other_role):
            number -= 1
            yield Case(name, one, draw.choice(refused(role)), (other, draw.choice(refused(other_role))))


def classified(case: Case, wider: bool = False) -> tuple[str, str]:
    """The kind of what comes back, one of ``KINDS``, and words for it."""
    call = CALLS[case.call]
    arguments = {name: value for name, (_, value) in call.valid.items()}
    role, valid = call.valid[case.argument]
    arguments[case.argument] = case.change.make(valid)
    named = [case.argument]
    if case.second is not None:
        other, change = case.second
        arguments[other] = change.make(call.valid[other][1])
        named.append(other)
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            result = call.call(**arguments)
        if any("steps were refused" in str(one.message) for one in told):
            return "refused", str(told[0].message)
    except (Refused, eki_jax.StepRefused) as error:
        return "refused", str(error)
    except (TypeError, ValueError) as error:
        text = str(error)
        roles = [call.valid[name][0] for name in named]
        names = [*named, *(alias for name in [*named, *roles] for alias in ALIASES.get(name, ()))]
        clear = any(f"{name}:" in text or f"{name}[" in text or f"{name} " in text for name in names) and (
            "wanted" in text or "unexpected" in text
        )
        return ("clear error" if clear else "obscure error"), f"{type(error).__name__}: {text[:120]}"
    except Exception as error:
        return "obscure error", f"{type(error).__name__}: {str(error)[:120]}"
    if "complex" in case.change.name or "imaginary" in case.change.name:
        return "imaginary part", "accepted"
    if role.removesuffix(" or none") in (
        "positive",
        "not negative",
        "share",
        "above one",
        "covariance",
        "whole",
        "chunk",
    ) and any(word in case.change.name for word in ("NaN", "infinity")):
        return "NaN setting", "accepted"
    if "right" not in case.change.wanted and not fewer_is_fine(case):
        return "wrong", f"accepted: {str(result)[:80]}"
    return judged(case, call, arguments, result)


def judged(case: Case, call: Call, arguments: dict[str, Any], result: Any) -> tuple[str, str]:
    """Whether an accepted result is right: as by hand or in float64, and no row spoiled by another's.

    A huge particle may have taken part, where float32 bears it, or have been left out as one of NaN is.
    """
    leaves = arrays_of(result)
    if case.call.startswith("optax.") and all((leaf == 0).all() for leaf in leaves):
        return "refused", "updates of zero, which a chain has no other word for"
    spoiled = "in one" in case.change.name
    huge = "huge" in case.change.name or "1e38" in case.change.name
    if spoiled and not huge:
        for leaf in leaves:
            if leaf.ndim and len(leaf) == J and not np.isfinite(np.delete(leaf, 1, axis=0)).all():
                return "poisoned", str(leaf)[:80]
    ways = [arguments]
    if huge and spoiled:
        ways.append(arguments | {case.argument: put(np.nan)(arguments[case.argument])})
    found = [compared(case, leaves, way, spoiled, huge) for way in ways]
    return next((one for one in found if one[0] == "right"), found[-1])


def arrays_of(result: Any) -> list[np.ndarray]:
    is_key = lambda leaf: hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(result) if not is_key(leaf) and not callable(leaf)]


def compared(case: Case, leaves: list[np.ndarray], arguments: Any, spoiled: bool, huge: bool) -> tuple[str, str]:
    """The result against that by hand, or that of the same call in float64."""
    call = CALLS[case.call]
    if call.oracle is not None:
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wanted: Any = call.oracle(**arguments)
    else:
        with jax.enable_x64(True), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                wanted = call.call(**{name: _wide(value) for name, value in arguments.items()})
            except (Refused, eki_jax.StepRefused) as error:
                return ("right", "refused in float64 too") if spoiled else ("wrong", f"float64 refuses: {error}")
    random_numbers = any(role.startswith("key") for role, _ in call.valid.values())
    random_numbers |= case.call in ("gaussian", "xavier", "perturb_data")
    for found, right in zip(leaves, arrays_of(wanted), strict=False):
        if found.shape != right.shape:
            return "wrong", f"shape {found.shape}, right is {right.shape}"
        if random_numbers or not np.issubdtype(found.dtype, np.floating):
            continue  # float64 draws other numbers
        a, b = np.atleast_1d(np.asarray(found, np.float64)), np.atleast_1d(np.asarray(right, np.float64))
        if spoiled and found.ndim and len(a) == J:
            a, b = np.delete(a, 1, axis=0), np.delete(b, 1, axis=0)
        if huge and not np.isfinite(a).all():
            continue  # beyond float32, and seen to be
        loose = 2e-2 if case.call == "compact_euler" else 2e-3
        scale = np.abs(b[np.isfinite(b)]).max(initial=1e-6)
        if not np.allclose(a, b, rtol=loose, atol=loose * scale, equal_nan=True):
            return "wrong", f"{np.ravel(a)[:4]} for {np.ravel(b)[:4]}"
    return "right", ""


def _wide(value: Any) -> Any:
    return jax.tree.map(
        lambda leaf: (
            np.asarray(leaf, np.float64)
            if isinstance(leaf, np.ndarray | jax.Array) and jnp.issubdtype(leaf.dtype, jnp.floating)
            else leaf
        ),
        value,
        is_leaf=callable,
    )


#: What an argument is called where it arrives.
ALIASES: dict[str, tuple[str, ...]] = {
    "ensemble": ("ensemble", "velocity", "losses", "params", "parameters", "stacked ensemble", "outputs", "particles"),
    "batch": ("batch", "targets", "x", "outputs"),
    "key0": ("key",),
    "train_x": ("train", "x", "inputs"),
    "labels": ("labels", "targets", "train"),
    "xs": ("samples", "x", "outputs"),
    "targets": ("targets", "samples", "mean", "loss"),
    "cell": ("cell", "forward"),
    "outputs": ("outputs", "targets", "cotangents"),
    "cotangents": ("cotangents", "outputs"),
    "factor": ("factor", "scale", "scale, factor, covariance"),
    "velocity": ("velocity", "state"),
    "fn": ("fn", "sample_loss"),
    "u": ("u", "nodes"),
    "nodes": ("nodes", "u"),
    "scale": ("scale", "scale, factor, covariance"),
    "learning_rate": ("learning_rate", "rate"),
    "x": ("x", "inputs", "outputs", "template"),
}


def table(results: dict[str, collections.Counter[str]]) -> str:
    total = collections.Counter[str]()
    for counts in results.values():
        total.update(counts)
    return "\n".join(f"{kind:16} {total[kind]:6}" for kind in KINDS)


def fewer_is_fine(case: Case) -> bool:
    """Whether the replaced ensemble is one of another J and nothing else has a J."""
    told = {"outputs", "losses", "velocity", "cotangents"} & set(CALLS[case.call].valid)
    if case.call == "value_and_cotangents":
        return case.argument == "outputs" and case.change.name in ("a row less", "one row", "another J")
    names = ("a row less",)
    if case.call in ("evaluate", "ensemble_outputs", "perturb"):
        names = ("a row less", "one row", *["nothing"] * (case.call == "evaluate"))
    return case.argument == "ensemble" and case.change.name in names and not told


def unexpected(case: Case, kind: str) -> bool:
    """Whether a kind is not as it should be: what is wanted to be refused may be refused in any way."""
    if kind == "right":
        return "right" not in case.change.wanted and not fewer_is_fine(case)
    return kind not in GOOD or case.change.wanted == RIGHT


@seed(0)
@settings(
    max_examples=200, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
)
@given(st.sampled_from([case for case in CASES if not case.call.startswith(("fit", "natural", "value_and_natural"))]))
def test_a_sample_of_malformed_calls(case: Case) -> None:
    kind, words = classified(case)
    assert not unexpected(case, kind), f"{case.call}({case.argument} = {case.change.name}): {kind}: {words}"


@pytest.mark.slow
def test_the_fixed_set() -> None:
    """Every call with every argument replaced by everything of its role, and pairs of them: at least 4,000 cases."""
    results: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    bad, number = [], 0
    for case in [*CASES, *pairs(1400)]:
        kind, words = classified(case)
        results[case.call][kind] += 1
        number += 1
        if unexpected(case, kind):
            bad.append(f"{kind}: {case.call}({case.argument} = {case.change.name}): {words}")
        if number % 300 == 0:
            jax.clear_caches()
    print(f"\n{number} cases\n{table(results)}\n" + "\n".join(bad))
    total = collections.Counter[str]()
    for counts in results.values():
        total.update(counts)
    assert all(total[kind] == 0 for kind in KINDS[3:7]), bad
    assert total["obscure error"] <= number / 100
