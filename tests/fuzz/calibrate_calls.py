"""Calls of the front door for simulators: priors, a calibration, its file and picture, and what runs members.

The simulator is linear, so that the posterior is known whatever the members are.
"""

from __future__ import annotations

import concurrent.futures
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import scipy.special
import scipy.stats
from fuzz.calls import KEY, Call, X, Y
from fuzz.changes import ANY, RIGHT, Change, const, numbers, put, strings
from fuzz.changes import ROLES as PLAIN

import eki_jax
from eki_jax import calibrate, kalman

Z = np.array([-1.0, 0.0, 2.0])
PRIOR = {"a": calibrate.normal(1.0, 2.0), "b": calibrate.normal(np.array([0.0, 1.0]), np.array([1.0, 0.5]))}
MEAN, SD, NOISE = np.array([1.0, 0.0, 1.0]), np.array([2.0, 1.0, 0.5]), 0.5
J = 8
ROWS = np.random.default_rng(3).normal(size=(J, len(Y)))
RESULTS = [{"x": row} for row in ROWS]
DRAWS = np.random.default_rng(4).gamma(3.0, size=20)

# Replacements.

names = [
    const("a string", "text"),
    const("None", None),
    const("a number", 3),
    const("an object", object()),
    const("an array", np.ones(3, np.float32)),
    const("a list", ["a", 1]),
    const("nothing", {}),
]


def put_in(value: Any, row: int = 1) -> Callable[[Any], Any]:
    """A list with another value in one place."""
    return lambda valid: [value if i == row else part for i, part in enumerate(valid)]


class Frozen:
    """A distribution with what it is made with."""

    def __init__(self, **functions: Any) -> None:
        self.__dict__.update(functions)


paths = [
    const("None", None),
    const("a number", 3),
    const("an array", np.ones(3)),
    const("an object", object()),
    Change("control: text", str, RIGHT),
    Change("control", lambda v: v, RIGHT),
]
array_of_one = [change for change in numbers if change.name not in ("an array", "a column")]
ROLES: dict[str, list[Change]] = {
    "number or numbers": [
        *(change for change in array_of_one if not change.name.startswith("-1")),
        const("strings", np.array(["a", "b"])),
        const("numbers and NaN", np.array([0.5, np.nan])),
        Change("control: of no axis", np.asarray, RIGHT),
    ],
    "positive or positives": [
        *array_of_one,
        const("0", 0.0),
        const("strings", np.array(["a", "b"])),
        const("numbers and NaN", np.array([0.5, np.nan])),
        const("numbers and 0", np.array([0.5, 0.0])),
        Change("control: of no axis", np.asarray, RIGHT),
    ],
    "shape": [
        const("a string", "text"),
        const("an object", object()),
        const("a dictionary", {"a": 1}),
        const("2.5", 2.5),
        const("halves", (2.5,)),
        const("-1", -1),
        const("negative", (-1,)),
        const("0", 0),
        const("a flag", True),
        const("flags in it", (True,)),
        const("strings in it", ("a",)),
        const("NaN", float("nan")),
        const("complex", 1j),
        Change("control: a list", list, RIGHT),
        Change("control: a number", lambda v: v[0], RIGHT),
        Change("control: NumPy", lambda v: np.int64(v[0]), RIGHT),
        Change("control", lambda v: v, RIGHT),
    ],
    "members of a group": [
        *names,
        const("a number in it", {"a": 1.0, "b": calibrate.normal(0.0, 1.0)}),
        const("not called", {"a": calibrate.normal, "b": calibrate.normal(0.0, 1.0)}),
        const("a group in it", {"a": calibrate.correlated({"c": calibrate.normal(0, 1)}, 1.0), "b": PRIOR["a"]}),
        Change("control", lambda v: v, RIGHT),
    ],
    "correlation": [
        *array_of_one,
        const("1", 1.0),
        const("1.5", 1.5),
        const("another size", np.eye(3)),
        const("a vector", np.ones(2)),
        const("not symmetric", np.array([[1.0, 0.5], [0.4, 1.0]])),
        const("another diagonal", np.array([[2.0, 0.5], [0.5, 2.0]])),
        const("a matrix of NaN", np.array([[1.0, np.nan], [np.nan, 1.0]])),
        const("strings", np.array([["a", "b"], ["b", "a"]])),
        Change("control: a matrix", lambda v: np.array([[1.0, v], [v, 1.0]]), RIGHT),
    ],
    "draws": [
        *strings,
        const("a number", 1.0),
        const("nothing", np.zeros(0)),
        const("an empty dictionary", {}),
        Change("nine of them", lambda v: v[:9]),
        Change("all the same", np.ones_like),
        Change("complex", lambda v: v + 1j),
        Change("strings", lambda v: np.full(np.shape(v), "a")),
        Change("objects", lambda v: np.array(v, object)),
        Change("NaN", put(np.nan)),
        Change("infinity", put(np.inf)),
        Change("numbers of draws that differ", lambda v: {"a": v, "b": v[1:]}),
        Change("control: a list", lambda v: v.tolist(), RIGHT),
        Change("control: JAX", jnp.asarray, RIGHT),
        Change("control", lambda v: v, RIGHT),
    ],
    "bound": [
        *(change for change in numbers if not change.name.startswith("-1") and change.name != "None"),
        const("amid the draws", 3.0),
        const("of NumPy amid the draws", np.float32(3)),
        const("minus a flag", False),
    ],
    "distribution": [
        *strings,
        const("a number", 3),
        const("not frozen", scipy.stats.gamma),
        const("to NaN", Frozen(ppf=lambda p: np.full(np.shape(p), np.nan))),
        const("to text", Frozen(ppf=lambda p: "text")),
        const("to complex", Frozen(ppf=lambda p: np.asarray(p) + 1j)),
        const("of no function", Frozen(ppf=3)),
        const("draws of NaN", Frozen(rvs=lambda size, random_state: np.full(size, np.nan))),
        const("draws of text", Frozen(rvs=lambda size, random_state: "text")),
        Change("control", lambda v: v, RIGHT),
    ],
    "drawn distribution": [
        *strings,
        const("a number", 3),
        const("draws of NaN", Frozen(rvs=lambda size, random_state: np.full(size, np.nan))),
        const("draws of text", Frozen(rvs=lambda size, random_state: "text")),
        const("draws of None", Frozen(rvs=lambda size, random_state: None)),
        const("no function", Frozen(rvs=3)),
        const("of other arguments", Frozen(rvs=lambda: 1.0)),
        Change("control", lambda v: v, RIGHT),
    ],
    "priors": [
        *names,
        Change("a number in it", lambda v: v | {"a": 1.0}),
        Change("None in it", lambda v: v | {"a": None}),
        Change("not called", lambda v: v | {"a": calibrate.normal}),
        Change("a Gaussian in it", lambda v: v | {"a": eki_jax.gaussian(jnp.zeros(1), 1.0)}),
        Change("a number for a name", lambda v: v | {3: calibrate.normal(0.0, 1.0)}),
        Change("no name", lambda v: v | {"": calibrate.normal(0.0, 1.0)}),
        Change("a name twice", lambda v: v | {"c": calibrate.correlated({"a": v["a"]}, 1.0)}),
        Change("control", lambda v: v, RIGHT),
    ],
    "latent values": [
        *names,
        Change("a name less", lambda v: {"a": v["a"]}),
        Change("a name more", lambda v: v | {"c": v["a"]}),
        Change("a number in it", lambda v: v | {"a": 1.0}),
        Change("None in it", lambda v: v | {"a": None}),
        Change("a vector in it", lambda v: v | {"a": v["a"][:, 0]}),
        Change("another size", lambda v: v | {"a": np.ones((3, 2))}),
        Change("other numbers of rows", lambda v: v | {"a": np.ones((4, 1))}),
        Change("complex", lambda v: v | {"a": v["a"] + 1j}),
        Change("strings", lambda v: v | {"a": np.full(np.shape(v["a"]), "a")}),
        Change("control: JAX", lambda v: {name: jnp.asarray(part) for name, part in v.items()}, RIGHT),
        Change("control: lists", lambda v: {name: part.tolist() for name, part in v.items()}, RIGHT),
        Change("control", lambda v: v, RIGHT),
    ],
    "probability": [*numbers, const("0", 0.0), const("1", 1.0)],
    "probabilities": [
        *strings,
        const("a number", 0.5),
        const("NaN", [0.5, float("nan")]),
        const("negative", [0.5, -0.1]),
        const("above one", [0.5, 1.5]),
        const("complex", [0.5, 0.5 + 1j]),
        const("strings in it", ["a"]),
        const("flags", [True, False]),
        const("a table", np.full((2, 2), 0.5)),
        Change("control: NumPy", np.array, RIGHT),
        Change("control: JAX", jnp.asarray, RIGHT),
        Change("control: a tuple", tuple, RIGHT),
        Change("control", lambda v: v, RIGHT),
    ],
    "data": [
        *names,
        Change("None in it", lambda v: {"x": None}),
        Change("text in it", lambda v: {"x": "text"}),
        Change("a dictionary in it", lambda v: {"x": {"y": 1.0}}),
        Change("a number for a name", lambda v: {3: v["x"]}),
        Change("another name", lambda v: {"z": v["x"]}),
        Change("another shape", lambda v: {"x": v["x"][:-1]}),
        Change("complex", lambda v: {"x": v["x"] + 1j}),
        Change("strings", lambda v: {"x": np.full(np.shape(v["x"]), "a")}),
        Change("objects", lambda v: {"x": np.array(v["x"], object)}),
        Change("no numbers", lambda v: {"x": np.zeros(0)}),
        Change("infinity", lambda v: {"x": put(np.inf)(v["x"])}),
        Change("all NaN", lambda v: {"x": np.full_like(v["x"], np.nan)}),
        Change("control: NaN", lambda v: {"x": put(np.nan)(v["x"])}, RIGHT),
        Change("control: masked", lambda v: {"x": np.ma.masked_array(v["x"], np.arange(len(v["x"])) == 2)}, RIGHT),
        Change("control: a list", lambda v: {"x": v["x"].tolist()}, RIGHT),
        Change("control: JAX", lambda v: {"x": jnp.asarray(v["x"])}, RIGHT),
        Change("control", lambda v: v, RIGHT),
    ],
    "noise": [
        *(change for change in numbers if change.name not in ("an array", "a column")),
        const("0", 0.0),
        const("nothing", {}),
        const("another name", {"z": 0.5}),
        const("text by name", {"x": "text"}),
        const("None by name", {"x": None}),
        const("a flag by name", {"x": True}),
        const("NaN by name", {"x": float("nan")}),
        const("complex by name", {"x": 0.5 + 1j}),
        const("a dictionary by name", {"x": {"y": 1.0}}),
        const("another size", np.ones(3)),
        const("not symmetric", np.eye(5) + np.triu(np.ones((5, 5)), 1)),
        const("indefinite", np.diag([1.0, -1.0, 1.0, 1.0, 1.0])),
        const("flags", np.ones(5, bool)),
        const("low rank of a flag", kalman.LowRankNoise(True, np.ones((5, 1)))),
        const("low rank of a dictionary", kalman.LowRankNoise({"a": 1.0}, np.ones((5, 1)))),
        const("low rank of None", kalman.LowRankNoise(0.5, None)),
        const("low rank of NaN", kalman.LowRankNoise(float("nan"), np.ones((5, 1)))),
        const("low rank of complex numbers", kalman.LowRankNoise(0.5, np.ones((5, 1)) * 1j)),
        const("low rank of another size", kalman.LowRankNoise(0.5, np.ones((3, 1)))),
        Change("control: by name", lambda v: {"x": v}, RIGHT),
        Change("control: variances", lambda v: np.full(5, v), RIGHT),
        Change("control: a matrix", lambda v: v * np.eye(5), RIGHT),
        Change("control: low rank", lambda v: kalman.LowRankNoise(v, np.zeros((5, 1))), RIGHT),
    ],
    "method name": [
        const("another", "uki"),
        const("None", None),
        const("a number", 3),
        const("a dictionary", {"a": 1}),
        const("an array", np.ones(3)),
        const("a solver", kalman.etki(None, 1.0)),
        const("a function to a number", lambda noise: 3),
        const("a function to None", lambda noise: None),
        const("of another number of arguments", lambda a, b, c: None),
        const("a method that wants a model", lambda noise: kalman.etki),
        const("control: a function", lambda noise: kalman.etki(None, noise, kalman.tempered(2)), *RIGHT),
        Change("control", lambda v: v, RIGHT),
    ],
    "localization": [
        *(change for change in strings if change.name != "None"),
        const("a number", 1.0),
        const("not called", kalman.correlation_taper),
        const("an inflation", kalman.multiplicative_inflation(1.1)),
        const("of another shape", np.ones((2, 2))),
        const("of other names", kalman.update_groups({"c": ["x"]})),
        const("of other outputs", kalman.update_groups({"a": ["z"], "b": ["x"]})),
        const("control: by names", kalman.update_groups({"a": ["x"], "b": ["x"]}), *RIGHT),
        Change("control", lambda v: v, RIGHT),
    ],
    "inflation of members": [
        *(change for change in strings if change.name != "None"),
        const("a number", 1.1),
        const("not called", kalman.multiplicative_inflation),
        const("a localization", kalman.correlation_taper()),
        Change("control", lambda v: v, RIGHT),
    ],
    "results": [
        const("a string", "text"),
        const("None", None),
        const("a number", 3),
        const("an object", object()),
        const("an array", ROWS),
        const("a dictionary", {"x": ROWS}),
        const("nothing", []),
        Change("one less", lambda v: v[:-1]),
        Change("one more", lambda v: [*v, v[0]]),
        Change("all None", lambda v: [None] * len(v)),
        Change("all of NaN", lambda v: [{"x": np.full(5, np.nan)}] * len(v)),
        Change("all but one failed", lambda v: [v[0], *[None] * (len(v) - 1)]),
        Change("text", put_in("text")),
        Change("a list", put_in([1.0] * 5)),
        Change("a number that is one", put_in(1.0)),
        Change("another name", put_in({"z": ROWS[1]})),
        Change("a name more", put_in({"x": ROWS[1], "z": ROWS[1]})),
        Change("another shape", put_in({"x": ROWS[1][:-1]})),
        Change("complex", put_in({"x": ROWS[1] + 1j})),
        Change("strings", put_in({"x": ["a"] * 5})),
        Change("None for an array", put_in({"x": None})),
        Change("a dictionary for an array", put_in({"x": {"y": 1.0}})),
        Change("None in one", put_in(None), ANY),
        Change("NaN in one", put_in(float("nan")), ANY),
        Change("an error in one", put_in(RuntimeError("blew up")), ANY),
        Change("a member that failed in one", put_in(calibrate.MemberFailed("blew up")), ANY),
        Change("numbers and NaN in one", put_in({"x": put(np.nan)(ROWS[1])}), ANY),
        Change("infinity in one", put_in({"x": put(np.inf)(ROWS[1])}), ANY),
        Change("huge in one", put_in({"x": put(1e19)(ROWS[1])}), ANY),
        Change("1e300 in one", put_in({"x": put(1e300)(ROWS[1])}), ANY),
        Change("control: a tuple", tuple, RIGHT),
        Change("control: JAX", lambda v: [{"x": jnp.asarray(one["x"])} for one in v], RIGHT),
        Change("control: lists", lambda v: [{"x": one["x"].tolist()} for one in v], RIGHT),
        Change("control", lambda v: v, RIGHT),
    ],
    "predictions": [
        const("a string", "text"),
        const("a number", 3),
        const("an object", object()),
        const("an array", ROWS),
        const("a dictionary", {"x": ROWS}),
        const("nothing", []),
        Change("all None", lambda v: [None] * len(v)),
        Change("text", put_in("text")),
        Change("another name", put_in({"z": ROWS[1]})),
        Change("another shape", put_in({"x": ROWS[1][:-1]})),
        Change("complex", put_in({"x": ROWS[1] + 1j})),
        Change("control: None in one", put_in(None), RIGHT),
        Change("control", lambda v: v, RIGHT),
    ],
    "new file": [*paths, const("a folder", tempfile.gettempdir()), const("in no folder", "/no/such/folder/run.npz")],
    "file": [
        *paths,
        const("a folder", tempfile.gettempdir()),
        const("no file", "no/such/file.npz"),
        const("a text", __file__),
    ],
    "more priors": [
        *names[:6],
        Change("without it", lambda v: {}),
        Change("another", lambda v: {"c": v["a"]}),
        Change("one too many", lambda v: v | {"b": v["a"]}),
        Change("a number in it", lambda v: {"a": 1.0}),
        Change("of another shape", lambda v: {"a": calibrate.normal(0.0, 1.0, shape=(2,))}),
        Change("control", lambda v: v, RIGHT),
    ],
    "members": [
        const("a string", "text"),
        const("None", None),
        const("a number", 3),
        const("an object", object()),
        const("a dictionary", {"depth": 4.0}),
        const("an array", np.ones(3)),
        Change("a number in it", lambda v: [3.0, *v]),
        Change("None in it", lambda v: [None, *v]),
        Change("control: a tuple", tuple, RIGHT),
        Change("control", lambda v: v, RIGHT),
    ],
    "kept members": [
        Change("text", lambda v: [{"depth": "deep"}]),
        Change("None", lambda v: [{"depth": None}]),
        Change("complex", lambda v: [{"depth": 1j}]),
        Change("objects", lambda v: [{"depth": object()}]),
        Change("a number for a name", lambda v: [{3: 1.0}, {"depth": 1.0, 3: 1.0}]),
        Change("control: NumPy", lambda v: [{"depth": np.float64(one["depth"])} for one in v], RIGHT),
        Change("control: JAX", lambda v: [{"depth": jnp.asarray(one["depth"])} for one in v], RIGHT),
        Change("control", lambda v: v, RIGHT),
    ],
    "executor": [
        const("a string", "threads"),
        const("a number", 2),
        const("a function", map),
        const("not made", concurrent.futures.ThreadPoolExecutor),
        const("control: none", None, *RIGHT),
        Change("control", lambda v: v, RIGHT),
    ],
    "flag or none": [
        *(change for change in strings if change.name != "None"),
        const("a number", 1),
        const("an array", np.ones(3, bool)),
        const("control: none", None, *RIGHT),
        Change("control", lambda v: v, RIGHT),
    ],
    "kept folder": [change for change in PLAIN["folder"] if change.name != "None"],
}
#: Roles of numbers, none of which may be NaN.
SETTINGS = ["number or numbers", "positive or positives", "shape", "correlation", "bound", "probability", "noise"]

# Priors.


def of_prior(make: Callable[..., Any]) -> Callable[..., Any]:
    """A prior's values at latent ones, and its moments by quadrature."""

    def call(**settings: Any) -> Any:
        prior = make(**settings)
        return np.stack([prior.transform(np.full(prior.shape, z)) for z in Z]), *prior.moments()

    return call


def normal_by_hand(mean: Any, sd: Any, shape: Any) -> Any:
    m, s = float(mean), float(sd)
    return np.repeat(m + s * Z[:, None], 2, axis=1), np.full(2, m), np.full(2, s)


def lognormal_by_hand(mean: Any, sd: Any, low: Any = 0.0) -> Any:
    m, s = float(mean) - float(low), float(sd)
    sigma = np.sqrt(np.log(1 + (s / m) ** 2))
    return float(low) + m * np.exp(sigma * Z - sigma**2 / 2), float(mean), s


def uniform_by_hand(low: Any, high: Any) -> Any:
    width = float(high) - float(low)
    return float(low) + width * scipy.special.ndtr(Z), float(low) + width / 2, width / np.sqrt(12)


def physical(entries: Any, latent: Any) -> Any:
    """Physical values and, from these, the latent ones once more."""
    prior = calibrate.joint(entries)
    values = prior.to_physical(latent)
    return values["a"], values["b"], prior.to_latent(values)["a"]


def physical_by_hand(entries: Any, latent: Any) -> Any:
    a, b = (np.asarray(latent[name], np.float64) for name in ("a", "b"))
    return 1 + 2 * a[:, 0], np.array([0.0, 1.0]) + np.array([1.0, 0.5]) * b, a


def copula(**settings: Any) -> Any:
    """The joint values of a group of two."""
    prior = calibrate.joint({"pair": calibrate.correlated(**settings)})
    values = prior.to_physical({"pair": np.stack([Z, Z[::-1]], axis=1)})
    return values["a"], values["b"]


def copula_by_hand(members: Any, correlation: Any) -> Any:
    rho = np.asarray(correlation, np.float64).ravel()[-1] if np.ndim(correlation) == 0 else correlation[0, 1]
    return 1 + 2 * Z, rho * Z + np.sqrt(1 - rho**2) * Z[::-1]


def of_samples(**settings: Any) -> Any:
    """The values at the normal scores of the draws, which are the draws."""
    prior = calibrate.from_samples(**settings)
    prior = prior if hasattr(prior, "transform") else calibrate.joint({"a": prior})
    return prior.transform(scipy.special.ndtri((np.arange(len(DRAWS)) + 0.5) / len(DRAWS)))


PRIORS: dict[str, Call] = {
    "calibrate.normal": Call(
        of_prior(calibrate.normal),
        {"mean": ("number or numbers", 3.0), "sd": ("positive or positives", 2.0), "shape": ("shape", (2,))},
        normal_by_hand,
    ),
    "calibrate.positive": Call(
        of_prior(calibrate.positive),
        {"mean": ("positive or positives", 3.0), "sd": ("positive or positives", 2.0)},
        lognormal_by_hand,
    ),
    "calibrate.lognormal": Call(
        of_prior(calibrate.lognormal),
        {
            "mean": ("number or numbers", 3.0),
            "sd": ("positive or positives", 2.0),
            "low": ("number or numbers or none", 1.0),
        },
        lognormal_by_hand,
    ),
    "calibrate.bounded": Call(
        of_prior(calibrate.bounded),
        {"low": ("number or numbers", 1.0), "high": ("number or numbers", 3.0)},
        uniform_by_hand,
    ),
    "calibrate.bounded, moments": Call(
        lambda **s: calibrate.bounded(0.0, 4.0, **s).moments(),
        {"mean": ("positive or positives", 1.0), "sd": ("positive or positives", 0.5)},
        lambda mean, sd: (float(mean), float(sd)),
    ),
    "calibrate.correlated": Call(
        copula,
        {
            "members": ("members of a group", {"a": calibrate.normal(1.0, 2.0), "b": calibrate.normal(0.0, 1.0)}),
            "correlation": ("correlation", 0.5),
        },
        copula_by_hand,
    ),
    "calibrate.from_samples": Call(
        of_samples,
        {"samples": ("draws", DRAWS), "low": ("bound", 0.0), "high": ("bound", 20.0)},
        lambda samples, **s: np.sort(np.asarray(samples, np.float64)),
    ),
    "calibrate.from_distribution": Call(
        lambda distribution: calibrate.from_distribution(distribution).transform(Z),
        {"distribution": ("distribution", scipy.stats.norm(2.0, 3.0))},
        lambda distribution: 2 + 3 * Z,
    ),
    "calibrate.from_distribution, drawn": Call(
        lambda **s: calibrate.from_distribution(**s).transform(Z),
        {
            "distribution": ("drawn distribution", Frozen(rvs=scipy.stats.norm(2.0, 3.0).rvs)),
            "key": ("key", KEY),
        },
    ),
    "calibrate.joint": Call(
        physical,
        {
            "entries": ("priors", PRIOR),
            "latent": ("latent values", {"a": Z[:, None], "b": np.stack([Z, -Z], axis=1)}),
        },
        physical_by_hand,
    ),
    "calibrate.joint, inverse": Call(
        lambda physical: calibrate.joint(PRIOR).to_latent(physical)["b"],
        {"physical": ("physical values", {"a": Z, "b": np.stack([Z, -Z], axis=1)})},
        lambda physical: (np.asarray(physical["b"], np.float64) - [0.0, 1.0]) / [1.0, 0.5],
    ),
    "calibrate.JointPrior": Call(
        lambda entries, probability: calibrate.JointPrior(entries).quantile(probability)["a"],
        {"entries": ("priors", PRIOR), "probability": ("probability", 0.25)},
        lambda entries, probability: 1 + 2 * scipy.special.ndtri(float(probability)),
    ),
}

# Calibrations.


def simulate(member: Any) -> dict[str, Any]:
    return {"x": np.asarray(X, np.float64) @ np.append(member["a"], member["b"])}


def to_the_end(calibration: Any) -> Any:
    while not calibration.done:
        calibration.tell([simulate(member) for member in calibration.ask()])
    return calibration


def fitted(**settings: Any) -> Any:
    """Means and standard deviations of the posterior."""
    given = {"prior": PRIOR, "data": {"x": Y}, "noise": NOISE, "particles": J} | settings
    posterior = to_the_end(calibrate.Calibration(**given)).posterior()
    return tuple(np.append(part["a"], part["b"]) for part in (posterior.mean, posterior.sd))


def fitted_by_hand(data: Any = None, **rest: Any) -> Any:
    """Kalman's update of the prior by the data that are there."""
    y = Y if data is None else data["x"]
    y = np.ma.filled(np.ma.asarray(y, np.float64), np.nan) if isinstance(y, np.ma.MaskedArray) else np.float64(y)
    there = np.isfinite(y)
    x, c = np.asarray(X, np.float64)[there], np.diag(SD**2)
    gain = c @ x.T @ np.linalg.inv(x @ c @ x.T + NOISE * np.eye(len(x)))
    return MEAN + gain @ (y[there] - x @ MEAN), np.sqrt(np.diag(c - gain @ x @ c))


def reported(results: Any) -> Any:
    calibration = calibrate.Calibration(PRIOR, {"x": Y}, NOISE, J)
    report = calibration.tell(results)
    return np.array([report.failed, report.misfit, report.misfit_of_mean])


def reported_by_hand(results: Any) -> Any:
    """Numbers of the members whose outputs are numbers and not beyond all others'."""
    dicts = [one["x"] for one in results if isinstance(one, dict)]
    rows = np.stack([np.asarray(row, np.float64) for row in dicts])
    rows = rows[(np.abs(rows) < 1e6).all(1)]
    scaled = (rows - Y) / np.sqrt(NOISE)
    return np.array([J - len(rows), np.mean(scaled**2), np.mean(scaled.mean(0) ** 2)])


@functools.cache
def finished() -> Any:
    return to_the_end(calibrate.Calibration(PRIOR, {"x": Y}, NOISE, J))


def saved_and_loaded(path: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        is_it = isinstance(path, str | Path) and not Path(path).is_absolute()
        place = type(path)(f"{folder}/{path}") if is_it else path
        finished().save(place)
        return calibrate.Calibration.load(place).posterior().mean["b"]


def of_one_covariance(noise: Any) -> Any:
    return kalman.etki(None, noise, kalman.tempered(2))


UNSAVED = {"a": calibrate.from_distribution(scipy.stats.norm(1.0, 2.0))}


@functools.cache
def file_of_one() -> bytes:
    """A calibration with a prior and a method that no file holds."""
    calibration = calibrate.Calibration(PRIOR | UNSAVED, {"x": Y}, NOISE, J, method=of_one_covariance)
    with tempfile.TemporaryDirectory() as folder:
        to_the_end(calibration).save(f"{folder}/run.npz")
        return Path(f"{folder}/run.npz").read_bytes()


def loaded(path: Any, **settings: Any) -> Any:
    """The posterior of a calibration that is loaded."""
    with tempfile.TemporaryDirectory() as folder:
        Path(f"{folder}/run.npz").write_bytes(file_of_one())
        is_it = isinstance(path, str | Path) and Path(path).name == "run.npz"
        posterior = calibrate.Calibration.load(
            type(path)(f"{folder}/{path}") if is_it else path, **settings
        ).posterior()
    return tuple(np.append(part["a"], part["b"]) for part in (posterior.mean, posterior.sd))


def pictured(**settings: Any) -> Any:
    """The lines of the picture's first panel."""
    figure = finished().plot(**settings)
    return [np.asarray(line.get_ydata(), np.float64) for line in figure.axes[0].lines[-3:]]


CALIBRATIONS: dict[str, Call] = {
    "calibrate.Calibration": Call(
        fitted,
        {
            "prior": ("priors", PRIOR),
            "data": ("data", {"x": Y}),
            "noise": ("noise", NOISE),
            "particles": ("whole", J),
            "seed": ("seed", 3),
            "method": ("method name", "etki"),
            "impute": ("share", 0.25),
            "most_iterations": ("whole", 50),
            "most_refusals": ("whole", 3),
        },
        fitted_by_hand,
    ),
    "calibrate.Calibration, localized": Call(
        fitted, {"localization": ("localization", np.ones((3, 5)))}, fitted_by_hand
    ),
    "calibrate.Calibration, inflated": Call(
        fitted, {"inflation": ("inflation of members", kalman.multiplicative_inflation(1.0))}, fitted_by_hand
    ),
    "calibrate.Calibration, tell": Call(reported, {"results": ("results", RESULTS)}, reported_by_hand),
    "calibrate.Calibration, posterior": Call(
        lambda probabilities: finished().posterior(probabilities).quantiles["b"],
        {"probabilities": ("probabilities", [0.25, 0.5])},
        lambda probabilities: np.quantile(finished().posterior().samples["b"], np.asarray(probabilities), axis=0),
    ),
    "calibrate.Calibration, plot": Call(
        pictured,
        {"what": ("choice", "data"), "predictions": ("predictions", RESULTS)},
    ),
    "calibrate.Calibration, save": Call(
        saved_and_loaded,
        {"path": ("new file", Path("run.npz"))},
        lambda path: finished().posterior().mean["b"],
        tolerance=0.0,
    ),
    "calibrate.Calibration, load": Call(
        loaded,
        {
            "path": ("file", Path("run.npz")),
            "prior": ("more priors", UNSAVED),
            "method": ("own method", of_one_covariance),
        },
        lambda **s: fitted_by_hand(),
    ),
}
ROLES["physical values"] = [change for change in ROLES["latent values"] if change.name != "a vector in it"]
ROLES["physical values"].append(Change("a column", lambda v: v | {"a": v["a"][:, None]}))
_few = ("a number", "a function to a number", "of another number of arguments", "control")
ROLES["own method"] = [change for change in ROLES["method name"] if change.name in _few]
ROLES["number or numbers or none"] = [change for change in ROLES["number or numbers"] if change.name != "None"]

# Workers.


def root(member: Any) -> dict[str, Any]:
    return {"flow": np.sqrt(member["depth"])}


def run(executor: Any, **settings: Any) -> Any:
    """The results of some members, on a pool of threads where one is asked for."""
    if executor != "a pool of threads":
        return calibrate.map_particles(executor=executor, **settings)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return calibrate.map_particles(executor=pool, **settings)


def kept(members: Any, directory: Any) -> Any:
    """Results that were kept, read once more."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / directory if isinstance(directory, Path) and not directory.is_absolute() else directory
        place = f"{folder}/{place}" if isinstance(place, str) and not place.startswith("/") else place
        first = calibrate.map_particles(root, members, directory=place)
        again = calibrate.map_particles(lambda member: 1 / 0, members, directory=place)
        return [one["flow"] for one in first], [one["flow"] for one in again]


def roots_by_hand(members: Any) -> Any:
    return [{"flow": np.sqrt(float(member["depth"]))} for member in members]


def pooled(workers: Any) -> Any:
    with calibrate.process_pool(workers) as pool:
        return pool.submit(abs, -3).result()


MEMBERS = [{"depth": 4.0}, {"depth": 9.0}]
WORKERS: dict[str, Call] = {
    "calibrate.map_particles": Call(
        run,
        {
            "simulate": ("function of one", root),
            "members": ("members", MEMBERS),
            "executor": ("executor", "a pool of threads"),
            "timeout": ("positive or none", 20.0),
            "retries": ("count", 1),
            "progress": ("flag or none", False),
        },
        lambda members, **s: roots_by_hand(members),
    ),
    "calibrate.map_particles, kept": Call(
        kept,
        {"members": ("kept members", MEMBERS), "directory": ("kept folder", Path("kept"))},
        lambda members, **s: ([one["flow"] for one in roots_by_hand(members)],) * 2,
    ),
    "calibrate.process_pool": Call(pooled, {"workers": ("whole or none", 1)}, lambda workers: 3),
}
CALIBRATE = PRIORS | CALIBRATIONS | WORKERS
