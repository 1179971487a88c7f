"""Calls of the Kalman family: square-root steps, unscented and Langevin ones, and what they are localized, inflated
and regularized by. Their oracles are Kalman's formulas in NumPy's float64.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from fuzz.calls import (
    BATCH,
    ENS,
    FN,
    KEY,
    KEYED,
    OUT,
    POS,
    SQUARES,
    Call,
    Refused,
    U,
    X,
    Y,
    linear,
    made,
    masked,
    steps,
    told,
)
from fuzz.changes import ANY, RIGHT, Change, const, numbers, put, strings
from fuzz.changes import ROLES as PLAIN

import eki_jax
from eki_jax import kalman

P, M = U.shape[1], len(Y)
GAMMA = 0.5

# Replacements.


def functions(value: float) -> list[Change]:
    """Functions that return what they should not, and some that return a right value."""

    def of(result: Callable[[], Any]) -> Callable[..., Any]:
        return lambda *args: result()

    return [
        const("a function of none", lambda: value),
        const("a function of too many", lambda a, b, c, d, e, f: value),
        const("a function to NaN", of(lambda: float("nan"))),
        const("a function to NaN of JAX", of(lambda: jnp.array(jnp.nan))),
        const("a function to infinity", of(lambda: float("inf"))),
        const("a function to text", of(lambda: "text")),
        const("a function to None", of(lambda: None)),
        const("a function to complex", of(lambda: 0.5 + 1j)),
        const("a function to an array", of(lambda: np.ones(3, np.float32))),
        const("a function to -1", of(lambda: -1.0)),
        const("a function to -1 of JAX", of(lambda: jnp.array(-1.0))),
        const("control: a function", of(lambda: value), *RIGHT),
        const("control: a function to JAX", of(lambda: jnp.asarray(value)), *RIGHT),
    ]


def gaussians(v: Any, **settings: Any) -> Any:
    return eki_jax.gaussian(v.mean, **settings)


coordinates = [
    const("a string", "text"),
    const("None", None),
    const("a dictionary", {"a": np.ones(3, np.float32)}),
    const("an object", object()),
    Change("one less", lambda v: np.array(v)[:-1]),
    Change("of two dimensions", lambda v: np.stack([v, v], axis=-1)),
    Change("complex", lambda v: np.array(v) + 1j),
    Change("strings", lambda v: np.full(np.shape(v), "a")),
    Change("objects", lambda v: np.array(v, object)),
    Change("NaN", put(np.nan)),
    Change("infinity", put(np.inf)),
    Change("control: JAX", jnp.asarray, RIGHT),
    Change("control: double", lambda v: np.asarray(v, np.float64), RIGHT),
    Change("control: a column", lambda v: np.array(v)[:, None], RIGHT),
    Change("control", lambda v: v, RIGHT),
]
ROLES: dict[str, list[Change]] = {
    "schedule": [*PLAIN["positive"], *functions(0.5)],
    "law": [*(change for change in PLAIN["function of three"] if change.name != "a number"), *functions(0.5)],
    "momentum": [*PLAIN["share or none"], *functions(0.5)],
    "flag": [
        *strings,
        const("a number", 1),
        const("an array", np.ones(3, bool)),
        const("a flag of NumPy", np.bool_(True), "clear error", "right"),
        Change("control", lambda v: v, RIGHT),
    ],
    "gaussian": [
        *PLAIN["prior"],
        Change("with a function", lambda v: gaussians(v, factor=lambda key: jnp.zeros_like(v.mean))),
        Change("without a spread", lambda v: gaussians(v, scale=0.0)),
        Change("of no rank", lambda v: gaussians(v, factor=jnp.zeros((v.mean.size, 1)))),
        const("a solver", eki_jax.euler(None, SQUARES)),
        Change("control: a factor", lambda v: gaussians(v, factor=jnp.eye(v.mean.size)), RIGHT),
        Change("control: a covariance", lambda v: gaussians(v, covariance=1.0), RIGHT),
    ],
    "weights": [
        *(change for change in strings if change.name != "None"),
        const("a number", 1.0),
        Change("negative", put(-0.5)),
        Change("above one", put(1.5)),
        Change("NaN", put(np.nan)),
        Change("infinity", put(np.inf)),
        Change("complex", lambda v: v + 1j),
        Change("strings", lambda v: np.full(np.shape(v), "a")),
        Change("objects", lambda v: np.array(v, object)),
        Change("transposed", lambda v: v.T),
        Change("an output less", lambda v: v[:, 1:]),
        const("not called", kalman.correlation_taper),
        const("an inflation", kalman.multiplicative_inflation(1.1)),
        const("with no function", kalman.Localization("taper")),
        const("with a function of one", kalman.Localization(lambda ensemble: None)),
        Change("control: JAX", jnp.asarray, RIGHT),
        Change("control: double", lambda v: np.asarray(v, np.float64), RIGHT),
        Change("control", lambda v: v, RIGHT),
    ],
    "inflation": [
        *(change for change in strings if change.name != "None"),
        const("a number", 1.1),
        const("not called", kalman.multiplicative_inflation),
        const("a localization", kalman.correlation_taper()),
        const("with no function", kalman.Inflation("more")),
        const("with a function of one", kalman.Inflation(lambda ensemble: ensemble)),
        Change("control", lambda v: v, RIGHT),
    ],
    "low-rank diagonal": [
        *numbers,
        const("0", 0.0),
        const("another size", np.ones(3, np.float32)),
        const("a matrix", np.eye(M, dtype=np.float32)),
        const("flags", np.ones(M, bool)),
        const("strings", np.full(M, "a")),
        const("control: variances", np.full(M, GAMMA, np.float32), *RIGHT),
    ],
    "low-rank factor": [
        *strings,
        const("a number", 1.0),
        const("a flag", True),
        Change("a vector", lambda v: v[:, 0]),
        Change("an output less", lambda v: v[1:]),
        Change("complex", lambda v: v + 1j),
        Change("strings", lambda v: np.full(np.shape(v), "a")),
        Change("objects", lambda v: np.array(v, object)),
        Change("flags", lambda v: v > 0),
        Change("NaN", put(np.nan)),
        Change("infinity", put(np.inf)),
        Change("control: JAX", jnp.asarray, RIGHT),
        Change("control: double", lambda v: np.asarray(v, np.float64), RIGHT),
        Change("control", lambda v: v, RIGHT),
    ],
    "noise of parts": [
        *PLAIN["covariance"],
        const("of other outputs", {"flow": 0.5}),
        const("a part of text", {"flow": "text", "heat": 0.5}),
        const("a part that is a flag", {"flow": True, "heat": 0.5}),
        const("a part that is none", {"flow": None, "heat": 0.5}),
        const("a part of NaN", {"flow": np.nan, "heat": 0.5}),
        const("a part that is negative", {"flow": -0.5, "heat": 0.5}),
        const("a part of low rank with a flag", {"flow": kalman.LowRankNoise(True, np.ones((2, 1))), "heat": 0.5}),
        const("low rank with a flag", kalman.LowRankNoise(True, np.ones((M, 1), np.float32))),
        const("low rank with a dictionary", kalman.LowRankNoise({"a": 1.0}, np.ones((M, 1), np.float32))),
        const("control: of parts", {"flow": np.full(2, GAMMA), "heat": GAMMA * np.eye(3)}, *RIGHT),
        const("control: low rank", kalman.LowRankNoise(GAMMA, np.zeros((M, 1))), *RIGHT),
    ],
    "coordinates": coordinates,
    "period": [
        *(change for change in numbers if change.name != "None"),
        const("0", 0.0),
        const("lengths of NaN", np.array([np.nan])),
        const("a length of 0", np.array([0.0])),
        Change("control: lengths", lambda v: np.array([v]), RIGHT),
    ],
    "distance": [
        const("a number", 3),
        const("a string", "f"),
        const("an array", np.ones((4, 3), np.float32)),
        const("of another number of arguments", lambda a, b, c, d, e: 0.0),
        const("to a number", lambda place, places: 1.0),
        const("to text", lambda place, places: "far"),
        Change("control", lambda v: v, RIGHT),
    ],
    "sees": [
        *strings,
        const("a number", 3),
        const("a list", ["flow"]),
        const("to text", {"a": "flow", "b": ["heat"]}),
        const("to a number", {"a": 1, "b": ["heat"]}),
        const("to None", {"a": None, "b": ["heat"]}),
        const("to numbers", {"a": [1], "b": ["heat"]}),
        const("another output", {"a": ["flow", "wind"], "b": ["heat"]}),
        const("another parameter", {"a": ["flow"], "b": ["heat"], "c": ["heat"]}),
        const("a parameter less", {"a": ["flow"]}),
        Change("control: tuples", lambda v: {name: tuple(seen) for name, seen in v.items()}, RIGHT),
        Change("control: sets", lambda v: {name: set(seen) for name, seen in v.items()}, RIGHT),
        Change("control", lambda v: v, RIGHT),
    ],
    "penalty": [
        *(change for change in numbers if change.name != "an array"),
        const("another length", np.ones(7, np.float32)),
        const("weights of NaN", np.array([1.0, np.nan, 1.0])),
        const("negative weights", np.array([1.0, -1.0, 1.0])),
        const("strings", np.array(["a", "b", "c"])),
        const("flags", np.ones(3, bool)),
        Change("control: weights", lambda v: np.full(P, v, np.float32), RIGHT),
    ],
    "maker": [
        const("a string", "euler"),
        const("None", None),
        const("a number", 3),
        const("made", eki_jax.euler(None, SQUARES)),
        const("of other arguments", lambda forward: None),
        const("to a number", lambda *args, **settings: 3),
        Change("control", lambda v: v, RIGHT),
    ],
    "replaceable": [
        *PLAIN["solver"],
        const("of its own particles", kalman.uki(None, GAMMA, prior=eki_jax.gaussian(jnp.zeros(3), 1.0))),
    ],
    "samples": [
        *strings,
        const("a number", 1.0),
        Change("one of them", lambda v: v[:1]),
        Change("a row", lambda v: v[0]),
        Change("of three axes", lambda v: v[None]),
        Change("complex", lambda v: v + 1j),
        Change("strings", lambda v: np.full(np.shape(v), "a")),
        Change("objects", lambda v: np.array(v, object)),
        Change("flags", lambda v: v > 0),
        Change("NaN", put(np.nan)),
        Change("infinity", put(np.inf)),
        Change("an output that never varies", lambda v: v * [0.0, 1.0]),
        const("nothing", np.zeros((0, 2))),
        Change("control: a list", lambda v: v.tolist(), RIGHT),
        Change("control: JAX", jnp.asarray, RIGHT),
        Change("control", lambda v: v, RIGHT),
    ],
    "step sizes": [
        *strings,
        const("nothing", []),
        const("another sum", [0.5, 0.6]),
        const("negative", [1.5, -0.5]),
        const("zero", [1.0, 0.0]),
        const("NaN", [0.5, float("nan")]),
        const("infinity", [0.5, float("inf")]),
        const("complex", [0.5 + 0j, 0.5 + 1j]),
        const("complex of NumPy", np.array([0.5 + 0j, 0.5 + 1j])),
        const("strings in it", ["a", "b"]),
        const("flags", [True]),
        const("a table", np.full((2, 2), 0.25)),
        const("lists in it", [[0.5], [0.5]]),
        const("half a step", 0.5),
        Change("control: a tuple", tuple, RIGHT),
        Change("control: NumPy", np.array, RIGHT),
        Change("control: JAX", jnp.asarray, RIGHT),
        Change("control", lambda v: v, RIGHT),
    ],
    "distances": [
        *strings,
        Change("complex", lambda v: v + 1j),
        Change("strings", lambda v: np.full(np.shape(v), "a")),
        Change("NaN", put(np.nan), ANY),
        Change("infinity", put(np.inf), ANY),
        Change("control: JAX", jnp.asarray, RIGHT),
        Change("control: double", lambda v: np.asarray(v, np.float64), RIGHT),
        Change("control: a list", lambda v: v.tolist(), RIGHT),
        Change("control", lambda v: v, RIGHT),
    ],
}
ROLES["gaussian or none"] = [change for change in ROLES["gaussian"] if change.name != "None"]
#: Roles of numbers, none of which may be NaN.
SETTINGS = ["schedule", "momentum", "low-rank diagonal", "noise of parts", "period", "penalty", "step sizes"]

# What is right.


def etki_by_hand(
    ensemble: Any,
    outputs: Any,
    targets: Any,
    noise_covariance: Any = GAMMA,
    step_size: Any = 1.0,
    weights: Callable[..., Any] | None = None,
    factor: Any = 1.0,
    **rest: Any,
) -> Any:
    """The square-root step, each parameter by itself where ``weights`` of deviations and anomalies are given."""
    r = np.asarray(outputs, np.float64) - np.asarray(targets, np.float64)
    r[~np.isfinite(np.asarray(ensemble, np.float64)).all(1)] = np.nan
    u, z, r, good, n = masked(ensemble, np.where(np.isfinite(r), outputs, np.nan), r)
    gamma = np.asarray(noise_covariance, np.float64)
    gamma = gamma if gamma.ndim == 2 else gamma * np.eye(z.shape[1])
    lower, h = np.linalg.inv(np.linalg.cholesky(gamma)), float(step_size)
    new = np.asarray(ensemble, np.float64).copy()
    for p in range(u.shape[1]):
        root = np.ones(z.shape[1]) if weights is None else np.sqrt(weights(p, u[:, p], z, n))
        white, mean = (root * z) @ lower.T, (root * r.sum(0) / n) @ lower.T
        values, vectors = np.linalg.eigh(h / n * white @ white.T)
        values, turned = np.maximum(values, 0), vectors.T @ u[:, p]
        shrunk, gain = vectors @ (turned / np.sqrt(1 + values)), h / n * (vectors @ (turned / (1 + values))) @ white
        middle = np.where(good, new[:, p], 0).sum() / n - gain @ mean
        new[:, p] = np.where(good, middle + float(factor) * shrunk, new[:, p])
    return new, (~good).sum()


def gaspari_cohn_by_hand(distance: Any) -> Any:
    """Equation 4.10 with c = 1/2, in the distance over c."""
    z = 2 * np.clip(np.asarray(distance, np.float64), 0, 1)
    near = -(z**5) / 4 + z**4 / 2 + 5 * z**3 / 8 - 5 * z**2 / 3 + 1
    with np.errstate(divide="ignore"):
        far = z**5 / 12 - z**4 / 2 + 5 * z**3 / 8 + 5 * z**2 / 3 - 5 * z + 4 - 2 / (3 * z)
    return np.where(np.isnan(z), z, np.where(z <= 1, near, np.maximum(far, 0)))


def by_distance(parameter_coordinates: Any, output_coordinates: Any, radius: Any, period: Any, **rest: Any) -> Any:
    own, others = (np.asarray(c, np.float64).ravel() for c in (parameter_coordinates, output_coordinates))
    length = float(np.ravel(period)[0])

    def weights(p: int, *_: Any) -> Any:
        away = np.abs(own[p] - others) % length
        return gaspari_cohn_by_hand(np.minimum(away, length - away) / float(radius))

    return etki_by_hand(**rest, weights=weights)


def by_correlation(cut: Any, **rest: Any) -> Any:
    def weights(p: int, u: Any, z: Any, n: int) -> Any:
        norms = np.linalg.norm(u) * np.linalg.norm(z, axis=0)
        correlations = np.divide(u @ z, norms, out=np.zeros(z.shape[1]), where=norms > 0)
        return gaspari_cohn_by_hand((1 - np.abs(correlations)) / (1 - min(float(cut) / np.sqrt(n - 1), 0.999)))

    return etki_by_hand(**rest, weights=weights)


def uki_by_hand(params: Any, batch: Any, noise_covariance: Any, step_size: Any, prior: Any, **rest: Any) -> Any:
    """Kalman's update of the prior's covariance at the first mean; for a linear model the unscented step is that."""
    x, y = (np.asarray(part, np.float64) for part in batch)
    m, factor = np.asarray(params, np.float64), np.asarray(prior.factor, np.float64)
    factor = factor if factor.ndim == 2 else factor * np.eye(len(m))
    c = factor @ factor.T
    gain = c @ x.T @ np.linalg.inv(x @ c @ x.T + float(noise_covariance) / float(step_size) * np.eye(len(y)))
    return m + gain @ (y - x @ m), 0


def low_rank_by_hand(diagonal: Any, factor: Any, **rest: Any) -> Any:
    f = np.asarray(factor, np.float64)
    return etki_by_hand(**rest, noise_covariance=np.asarray(diagonal, np.float64) * np.eye(len(f)) + f @ f.T)


def ledoit_wolf_by_hand(samples: Any) -> Any:
    """Ledoit and Wolf's formulas for the samples over their standard deviations."""
    x = np.asarray(samples, np.float64)
    x = x - x.mean(0)
    sd = x.std(0, ddof=1)
    x = x / sd
    s = x.T @ x / len(x)
    mu = np.trace(s) / len(s)
    d2 = ((s - mu * np.eye(len(s))) ** 2).sum()
    b2 = min(sum(((np.outer(row, row) - s) ** 2).sum() for row in x) / len(x) ** 2, d2)
    r = x.T @ x / (len(x) - 1)
    return sd * ((1 - b2 / d2) * r + b2 / d2 * np.eye(len(s))) * sd[:, None]


# Calls.


def two_steps(ensemble: Any, outputs: Any, targets: Any, **settings: Any) -> Any:
    """The particles ahead after two steps, of which the second has a momentum."""
    solver = made(kalman.accelerated, **settings)
    state = solver.init(ensemble)
    for _ in range(2):
        state, info = solver.update(state, outputs, targets)
        if int(info.reason):
            raise Refused(eki_jax.Reason(int(info.reason)))
    return solver.ensemble(state), info.failed


def two_steps_by_hand(ensemble: Any, momentum: Any, **told: Any) -> Any:
    behind = ahead = np.asarray(ensemble, np.float64)
    for _ in range(2):
        reached, failed = etki_by_hand(ahead, **told)
        factor = 0.5 if callable(momentum) else float(momentum)
        stayed = (reached == ahead).all(1)[:, None]
        ahead, behind = np.where(stayed, reached, reached + factor * (reached - behind)), reached
    return ahead, failed


def local(localization: Any, ensemble: Any, outputs: Any, targets: Any) -> Any:
    """A localized step."""
    return etki(ensemble=ensemble, outputs=outputs, targets=targets, noise_covariance=GAMMA, localization=localization)


def parted(rows: Any, names: tuple[str, str], at: int) -> Any:
    """An array as two; anything else is both of them."""
    is_array = isinstance(rows, np.ndarray | jnp.ndarray) and rows.ndim
    return dict(zip(names, (rows[..., :at], rows[..., at:]) if is_array else (rows, rows), strict=True))


def in_parts(call: Callable[..., Any]) -> Callable[..., Any]:
    """A call with outputs and data of two names, and an ensemble of two."""

    def run(ensemble: Any, outputs: Any, targets: Any, **settings: Any) -> Any:
        new, failed = call(
            ensemble=parted(ensemble, ("a", "b"), 1),
            outputs=parted(outputs, ("flow", "heat"), 2),
            targets=parted(targets, ("flow", "heat"), 2),
            **settings,
        )
        return jnp.concatenate([new["a"], new["b"]], axis=1), failed

    return run


def by_names(sees: Any, **rest: Any) -> Any:
    """Each block of parameters by itself, with the outputs that it sees."""
    mask = np.array([["flow" in sees[name]] * 2 + ["heat" in sees[name]] * 3 for name in ("a", "b", "b")], float)
    return etki_by_hand(**rest, weights=lambda p, *_: mask[p])


def of_data(values: Any, noise_covariance: Any, **rest: Any) -> Any:
    return steps(partial(kalman.etki, None))(
        noise_covariance=None, **rest, targets=kalman.Data(values, noise_covariance)
    )


etki = steps(partial(kalman.etki, None))
noisy = {"noise_covariance": ("covariance", GAMMA)}
PRIOR = eki_jax.gaussian(jnp.zeros(P), 1.0)
ONE = U[:, :1]  # one parameter, so that four particles are enough for ALDI
PLACES = np.array([0.0, 1.0, 2.0], np.float32), np.array([0.0, 0.5, 1.0, 1.5, 2.5], np.float32)
FACTOR = np.array([[1.0], [0.5], [0.0], [-0.5], [1.0]], np.float32)

KALMAN: dict[str, Call] = {
    "kalman.etki": Call(
        steps(kalman.etki),
        {
            "forward": FN,
            **noisy,
            "step_size": POS,
            "space": ("choice", "output"),
            "ensemble": ENS,
            "batch": BATCH,
            "chunk_size": ("chunk", 2),
            "outlier_cut": ("above one", 1e6),
            "targets_axis": ("choice", None),
            "precision": ("precision", None),
            "failures": ("policy", eki_jax.keep_failed()),
        },
    ),
    "kalman.etki, told": Call(etki, {**told, **noisy, "step_size": POS}, etki_by_hand),
    "kalman.etki, among particles": Call(partial(etki, space="ensemble"), {**told, **noisy}, etki_by_hand),
    "kalman.etki, of parts": Call(
        in_parts(etki),
        {**told, "noise_covariance": ("noise of parts", GAMMA)},
        lambda noise_covariance, **rest: etki_by_hand(**rest),
    ),
    "kalman.etki, schedule": Call(
        partial(etki, noise_covariance=GAMMA),
        {**told, "step_size": ("schedule", 0.5)},
        lambda step_size, **rest: etki_by_hand(**rest, step_size=0.5),
    ),
    "kalman.etki, weights": Call(
        partial(etki, noise_covariance=GAMMA),
        {**told, "localization": ("weights", np.linspace(0, 1, P * M, dtype=np.float32).reshape(P, M))},
        lambda localization, **rest: etki_by_hand(
            **rest, weights=lambda p, *_: np.asarray(localization, np.float64)[p]
        ),
    ),
    "kalman.etki, prior and inflation": Call(
        partial(etki, noise_covariance=GAMMA),
        {
            **told,
            "prior": ("gaussian or none", PRIOR),
            "inflation": ("inflation", kalman.multiplicative_inflation(1.1)),
        },
    ),
    "kalman.Data": Call(
        of_data,
        {"ensemble": ENS, "outputs": OUT, "values": ("targets", Y), **noisy},
        lambda values, **rest: etki_by_hand(**rest, targets=values),
    ),
    "kalman.LowRankNoise": Call(
        lambda diagonal, factor, **rest: etki(**rest, noise_covariance=kalman.LowRankNoise(diagonal, factor)),
        {**told, "diagonal": ("low-rank diagonal", GAMMA), "factor": ("low-rank factor", FACTOR)},
        low_rank_by_hand,
    ),
    "kalman.uki": Call(
        steps(kalman.uki, around=True),
        {
            "forward": FN,
            **noisy,
            "step_size": POS,
            "prior": ("gaussian", PRIOR),
            "form": ("choice", "transform"),
            "particles": ("whole or none", 8),
            "params": ("params", np.array([0.5, 0.0, -0.5], np.float32)),
            "key0": KEYED,
            "batch": BATCH,
            "chunk_size": ("chunk", 2),
            "outlier_cut": ("above one", 1e6),
        },
        uki_by_hand,
        fine={"prior": ("without a spread", "of no rank")},
    ),
    "kalman.uki, imposed": Call(
        steps(partial(kalman.uki, linear, form="covariance"), around=True),
        {
            **noisy,
            "step_size": POS,
            "prior": ("gaussian", PRIOR),
            "impose_prior": ("flag", True),
            "params": ("params", np.zeros(3, np.float32)),
            "key0": KEYED,
            "batch": BATCH,
        },
    ),
    "kalman.aldi": Call(
        steps(kalman.aldi),
        {
            "forward": FN,
            **noisy,
            "step_size": POS,
            "prior": ("gaussian", eki_jax.gaussian(jnp.zeros(1), 1.0)),
            "key": KEYED,
            "correction": ("flag", True),
            "ensemble": ("ensemble", ONE),
            "batch": ("batch", (X[:, :1], Y)),
            "chunk_size": ("chunk", 2),
        },
    ),
    "kalman.aldi, told": Call(
        steps(partial(kalman.aldi, None, GAMMA, prior=eki_jax.gaussian(jnp.zeros(1), 1.0), key=KEY)),
        {
            "ensemble": ("ensemble", ONE),
            "outputs": OUT,
            "targets": ("targets", Y),
            "step_size": ("law", lambda norm, J, count: 0.5),
        },
        is_random=True,
    ),
    "kalman.sparse": Call(
        steps(kalman.sparse),
        {
            "forward": FN,
            **noisy,
            "step_size": POS,
            "penalty": ("penalty", 0.5),
            "threshold": ("not negative", 0.0),
            "method": ("choice", "etki"),
            "prior": ("gaussian or none", PRIOR),
            "ensemble": ENS,
            "batch": BATCH,
        },
    ),
    "kalman.sparse, enkf": Call(
        steps(partial(kalman.sparse, None, GAMMA, penalty=0.5, method="enkf")),
        {**told, "key": ("key or none", KEY)},
    ),
    "kalman.accelerated": Call(
        two_steps,
        {
            "solver": ("replaceable", kalman.etki(None, GAMMA)),
            "momentum": ("momentum", 0.5),
            "restart": ("flag", False),
            **told,
        },
        lambda solver, restart, **rest: two_steps_by_hand(**rest),
    ),
    "kalman.tikhonov": Call(
        steps(kalman.tikhonov),
        {
            "solver": ("maker", eki_jax.euler),
            "forward": FN,
            "loss": ("function", SQUARES),
            "prior": ("gaussian", PRIOR),
            "weight": ("not negative", 0.5),
            "ensemble": ENS,
            "batch": BATCH,
        },
    ),
    "kalman.tikhonov, etki": Call(
        steps(kalman.tikhonov),
        {
            "solver": ("maker", kalman.etki),
            "forward": FN,
            "loss": ("covariance", GAMMA),
            "prior": ("gaussian", PRIOR),
            "weight": ("not negative", 1.0),
            "ensemble": ENS,
            "batch": BATCH,
        },
    ),
    "kalman.taper": Call(
        lambda ensemble, outputs, targets, **s: local(kalman.taper(**s), ensemble, outputs, targets),
        {
            **told,
            "parameter_coordinates": ("coordinates", PLACES[0]),
            "output_coordinates": ("coordinates", PLACES[1]),
            "radius": POS,
            "period": ("period", 2.0),
        },
        by_distance,
    ),
    "kalman.taper, distance": Call(
        lambda distance, **a: local(kalman.taper(*PLACES, 1.5, distance=distance), **a),
        {**told, "distance": ("distance", lambda place, places: jnp.abs(places - place)[:, 0])},
        lambda distance, **rest: by_distance(*PLACES, 1.5, 1e9, **rest),
    ),
    "kalman.gaspari_cohn": Call(
        kalman.gaspari_cohn,
        {"distance": ("distances", np.linspace(-0.5, 2, 11).astype(np.float32))},
        gaspari_cohn_by_hand,
    ),
    "kalman.update_groups": Call(
        lambda sees, **a: in_parts(partial(local, kalman.update_groups(sees)))(**a),
        {**told, "sees": ("sees", {"a": ["flow"], "b": ["flow", "heat"]})},
        by_names,
    ),
    "kalman.correlation_taper": Call(
        lambda cut, **a: local(kalman.correlation_taper(cut=cut), **a),
        {**told, "cut": ("positive", 0.1)},
        by_correlation,
    ),
    "kalman.multiplicative_inflation": Call(
        lambda factor, **a: etki(**a, noise_covariance=GAMMA, inflation=kalman.multiplicative_inflation(factor)),
        {**told, "factor": ("positive or none", 1.5)},
        etki_by_hand,
    ),
    "kalman.additive_inflation": Call(
        lambda ensemble, outputs, targets, **s: etki(
            ensemble=ensemble,
            outputs=outputs,
            targets=targets,
            noise_covariance=GAMMA,
            inflation=kalman.additive_inflation(**s),
        ),
        {**told, "key": KEYED, "prior": ("prior", PRIOR), "scale": ("not negative", 0.1)},
    ),
    "kalman.shrinkage_covariance": Call(
        kalman.shrinkage_covariance,
        {"samples": ("samples", np.random.default_rng(1).normal(size=(9, 2)) * [1.0, 10.0])},
        ledoit_wolf_by_hand,
        tolerance=1e-6,
    ),
    "kalman.cheaper_space": Call(
        lambda **s: {"output": 0, "ensemble": 1}[kalman.cheaper_space(**s)],
        {"ensemble_size": ("count", 50), "outputs": ("count", 2000), "parameters": ("count", 100)},
        lambda **s: 1,
    ),
    "kalman.tempered, sizes": Call(
        lambda steps: kalman.tempered(steps)(None, 1, 0.25, 0),
        {"steps": ("step sizes", [0.25, 0.5, 0.25])},
        lambda steps: 0.5,
    ),
}
