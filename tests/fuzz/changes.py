"""What a valid argument is replaced by: lists of replacements, one for each role that an argument can have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse

import eki_jax

KINDS = ("clear error", "refused", "right", "wrong", "poisoned", "NaN setting", "imaginary part", "obscure error")
GOOD = KINDS[:3]
RIGHT, ANY, REFUSED = ("right",), GOOD, GOOD[:2]


class Change(NamedTuple):
    """A replacement of a valid value.

    Attributes:
        name: words for it.
        make: function of the valid value that gives the other one.
        wanted: kinds of results that are as they should be; controls are to be right.
    """

    name: str
    make: Callable[[Any], Any]
    wanted: tuple[str, ...] = REFUSED


def const(name: str, value: Any, *wanted: str) -> Change:
    return Change(name, lambda valid: value, wanted or REFUSED)


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
    Change("a row less", lambda v: np.array(v)[:-1]),
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
    "at least one": [*numbers, const("0.5", 0.5)],
    "from 0 to 1": [*numbers, const("2", 2.0), const("2 of JAX", jnp.array(2.0))],
    "above one": [change for change in [*numbers, const("1", 1.0)] if change.name != "None"],
    "whole": whole,
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
        Change("one of them", lambda v: v[0]),
        Change("a column", lambda v: v[:, :1]),
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
        *(change for change in strings if change.name != "a dictionary"),
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
        const("an array", np.ones((4, 3), np.float32)),
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
        const("an array", np.ones((4, 3), np.float32)),
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
    "finite": [
        *(change for change in numbers if not change.name.startswith("-1")),
        Change("control: minus", lambda v: -v, RIGHT),
    ],
    "function of one": [
        const("a number", 3),
        const("a string", "f"),
        const("None", None),
        const("an array", np.ones((4, 3), np.float32)),
        const("of another number of arguments", lambda a, b, c, d, e: 0.0),
        Change("control", lambda v: v, RIGHT),
    ],
    "vector": [
        *strings,
        const("two of them", np.ones((3, 2), np.float32)),
        const("of another length", np.ones(7, np.float32)),
        Change("complex", lambda v: v + 1j),
        Change("NaN", lambda v: np.full_like(v, np.nan), ANY),
        Change("control: JAX", jnp.asarray, RIGHT),
        Change("control", lambda v: v, RIGHT),
    ],
    "factor": [
        const("a string", "text"),
        const("None", None),
        const("an object", object()),
        const("of another length", np.ones((7, 2), np.float32)),
        const("a flag", True),
        const("a function of none", lambda: 0.0),
        const("a function that draws something else", lambda key: jnp.zeros(7)),
        Change("complex", lambda v: v + 1j),
        Change("NaN", put(np.nan)),
        Change("control: JAX", jnp.asarray, RIGHT),
        Change("control", lambda v: v, RIGHT),
    ],
    "prior covariance": [
        const("a string", "text"),
        const("None", None),
        const("an object", object()),
        const("of another size", np.eye(7, dtype=np.float32)),
        const("a function", lambda key: 0.0),
        Change("not symmetric", lambda v: v + np.triu(np.ones_like(v), 1)),
        Change("indefinite", lambda v: -v),
        Change("complex", lambda v: v + 1j),
        Change("NaN", put(np.nan)),
        Change("control: JAX", jnp.asarray, RIGHT),
        Change("control", lambda v: v, RIGHT),
    ],
    "transformation": [
        const("a string", "adam"),
        const("a number", 3),
        const("not called", jnp.zeros_like),
        const("a pair", (1, 2)),
        Change("control", lambda v: v, RIGHT),
    ],
    "acceleration": [
        const("a string", "nesterov"),
        const("a number", 0.9),
        const("not called", eki_jax.nesterov),
        Change("control", lambda v: v, RIGHT),
    ],
    "objective": [
        const("a string", "loss"),
        const("None", None),
        const("a number", 3),
        const("a function", eki_jax.squared_error()),
        Change("control", lambda v: v, RIGHT),
    ],
    "module": [
        const("a string", "Dense"),
        const("None", None),
        const("a number", 3),
        Change("not made", type),
        const("a function", jnp.tanh),
        Change("control", lambda v: v, RIGHT),
    ],
    "whole numbers": [
        const("a string", "text"),
        const("None", None),
        const("an object", object()),
        Change("halves", lambda v: v + np.float32(0.5)),
        Change("complex", lambda v: v + 1j),
        Change("control: JAX", jnp.asarray, RIGHT),
        Change("control", lambda v: v, RIGHT),
    ],
    "mesh": [
        const("a string", "mesh"),
        const("None", None),
        const("a number", 2),
        const("devices", "devices"),
        const("explicit axes", jax.make_mesh((2,), ("particles",), axis_types=(jax.sharding.AxisType.Explicit,))),
        const("other axes", jax.make_mesh((2,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))),
        Change("control", lambda v: v, RIGHT),
    ],
    "devices": [
        const("a string", "cpu"),
        const("a number", 2),
        const("nothing", []),
        const("numbers", [0, 1]),
        Change("too few", lambda v: v[:1]),
        Change("control: a tuple", tuple, RIGHT),
        Change("control", lambda v: v, RIGHT),
    ],
    "spec": [
        const("a string", "particles"),
        const("None", None),
        const("a number", 0),
        const("another axis", jax.sharding.PartitionSpec("rows")),
        const("too many axes", jax.sharding.PartitionSpec(None, None, "particles")),
        Change("control", lambda v: v, RIGHT),
    ],
    "specs": [
        const("a string", "particles"),
        const("None", None),
        const("a number", 0),
        const("strings in it", ("particles",)),
        const("another axis", (jax.sharding.PartitionSpec("rows"),)),
        Change("one too many", lambda v: (*v, *v)),
        Change("none", lambda v: ()),
        Change("control", lambda v: v, RIGHT),
    ],
    "laplacian": [
        *strings,
        Change("not symmetric", np.triu),
        Change("negative", lambda v: -v),
        Change("another shape", lambda v: v[:-1]),
        Change("NaN", put(np.nan)),
        Change("complex", lambda v: v + 1j),
        Change("control: sparse", scipy.sparse.csr_array, RIGHT),
        Change("control", lambda v: v, RIGHT),
    ],
    "basis": [
        *strings,
        const("a number", 3),
        const("an array", np.ones((4, 3), np.float32)),
        Change("its vectors", lambda v: v.vectors),
        Change("control", lambda v: v, RIGHT),
    ],
    "saved state": [
        const("a string", "text"),
        const("None", None),
        const("an object", object()),
        const("strings in it", {"w": "text"}),
        const("control: complex numbers", {"w": jnp.ones(3) * 1j}, *RIGHT),
        Change("control", lambda v: v, RIGHT),
    ],
    "notes": [
        const("an object", object()),
        const("an array", np.ones(3)),
        const("a function", jnp.tanh),
        const("control: none", None, *RIGHT),
        Change("control", lambda v: v, RIGHT),
    ],
    "array": [
        *(change for change in strings if change.name != "a dictionary"),
        Change("complex", lambda v: np.array(v) + 0.5j),
        Change("strings", lambda v: np.full(np.shape(v), "a")),
        Change("integers", lambda v: np.array(v, np.int32)),
        Change("NaN", put(np.nan), ANY),
        Change("infinity in an entry", put(np.inf), ANY),
        Change("control: JAX", jnp.asarray, RIGHT),
        Change("control: double", lambda v: np.asarray(v, np.float64), RIGHT),
        Change("control", lambda v: v, RIGHT),
    ],
    "inputs": [
        *(change for change in strings if change.name != "a dictionary"),
        Change("complex", lambda v: np.array(v) + 0.5j),
        Change("strings", lambda v: np.full(np.shape(v), "a")),
        Change("control: JAX", jnp.asarray, RIGHT),
        Change("control", lambda v: v, RIGHT),
    ],
    "times": [
        *strings,
        const("one time", [0.5]),
        const("a time", 0.5),
        const("backwards", [1.0, 0.5]),
        const("twice the same", [1.0, 1.0]),
        const("NaN", [0.0, float("nan")]),
        const("infinity", [0.0, float("inf")]),
        const("complex", np.array([0.0, 1.0 + 1j])),
        const("a table", np.ones((2, 2))),
        Change("control: NumPy", np.array, RIGHT),
        Change("control: JAX", jnp.array, RIGHT),
        Change("control", lambda v: v, RIGHT),
    ],
    "solver": [
        const("a string", "euler"),
        const("None", None),
        const("a number", 3),
        const("not called", eki_jax.euler),
        const("a pair", (1, 2)),
        Change("control", lambda v: v, RIGHT),
    ],
    "method": [
        const("a string", "euler"),
        const("None", None),
        const("a number", 3),
        const("a function", eki_jax.euler),
        Change("its solver", lambda v: v.init),
        Change("control", lambda v: v, RIGHT),
    ],
    "prior": [
        const("a string", "xavier"),
        const("None", None),
        const("a number", 1.0),
        const("not called", eki_jax.gaussian),
        Change("its mean", lambda v: v.mean),
        const("of another shape", eki_jax.gaussian(jnp.zeros(2), 1.0)),
        const("of a dictionary", eki_jax.gaussian({"a": jnp.zeros(3)}, 1.0)),
        Change("control", lambda v: v, RIGHT),
    ],
    "objects": [
        *strings,
        const("a number", 3),
        const("an array", np.ones((4, 3), np.float32)),
        Change("control", lambda v: v, RIGHT),
    ],
    "dtype": [
        const("a string", "text"),
        const("None", None),
        const("an object", object()),
        const("a number", 3),
        const("integers", np.int8),
        const("complex", np.complex64),
        const("control: by name", "bfloat16", "right"),
        Change("control", lambda v: v, RIGHT),
    ],
    "seed": [change for change in whole if change.name not in ("0", "control: JAX")],
    "count": [change for change in whole if change.name != "0"],
    "sizes": [
        const("a string", "ten"),
        const("None", None),
        const("a number", 10),
        const("nothing", ()),
        const("zero", (3, 0)),
        const("negative", (3, -2)),
        const("halves", (2.5, 3)),
        const("NaN", (float("nan"), 3)),
        const("strings in it", ("a", 3)),
        const("flags in it", (True, 3)),
        Change("control: a list", list, RIGHT),
        Change("control", lambda v: v, RIGHT),
    ],
    "pair of numbers": [
        const("a string", "ab"),
        const("a number", 1.0),
        const("one", (1.0,)),
        const("three", (1.0, 1.0, 1.0)),
        const("strings in it", ("a", "b")),
        const("negative", (1.0, -1.0)),
        const("NaN", (float("nan"), 1.0)),
        const("infinity", (float("inf"), 1.0)),
        const("complex", (1.0 + 1j, 1.0)),
        const("arrays in it", (np.ones(3), 1.0)),
        Change("control: a list", list, RIGHT),
        Change("control", lambda v: v, RIGHT),
    ],
    "state": [
        const("a string", "ab"),
        const("None", None),
        const("a number", 3.0),
        Change("one part", lambda v: v[0]),
        Change("three parts", lambda v: (*v, v[0])),
        Change("parts that differ", lambda v: (v[0], v[1][:-1])),
        Change("complex", lambda v: (v[0], v[1] + 1j)),
        Change("control", lambda v: v, RIGHT),
    ],
    "folder": [
        const("None", None),
        const("a number", 3),
        const("an array", np.ones(3)),
        const("a file", __file__),
        Change("control: text", str, RIGHT),
        Change("control", lambda v: v, RIGHT),
    ],
    "mapping": [
        const("a string", "text"),
        const("a number", 3),
        const("a list", ["a", 1]),
        const("an array", np.ones(3)),
        Change("control", lambda v: v, RIGHT),
    ],
    "settings": [
        const("a string", "text"),
        const("a number", 3),
        const("an object in it", {"a": object()}),
        Change("control: empty", lambda v: {}, RIGHT),
        Change("control", lambda v: v, RIGHT),
    ],
    "matrices": [
        *strings,
        Change("complex", lambda v: np.array(v) + 0.5j),
        Change("integers", lambda v: np.array(v, np.int32)),
        Change("another shape", lambda v: np.array(v)[:-1]),
        Change("one axis", lambda v: np.array(v).ravel()),
        Change("NaN", lambda v: np.full_like(v, np.nan), ANY),
        Change("control: JAX", jnp.asarray, RIGHT),
        Change("control", lambda v: v, RIGHT),
    ],
}


def without(role: str, *names: str) -> list[Change]:
    """The replacements of a role but for those that another argument of its kind takes."""
    assert set(names) <= {change.name for change in ROLES[role]}
    return [change for change in ROLES[role] if change.name not in names]


for _role in ("key", "positive", "share", "not negative", "whole"):
    ROLES[f"{_role} or none"] = without(_role, "None")
few = ("a string", "None", "a row less", "one row", "integers", "NaN in one", "control")
ROLES |= {
    # For calls that compile for a second in every case.
    "ensemble of few": [change for change in ROLES["ensemble"] if change.name in few],
    "key of few": without("key", "control: raw", "control: rbg"),
    "number of few": without("not negative", "control: JAX", "control: NumPy double"),
    "rows": without("inputs", "None"),
    "function of one or none": without("function of one", "None"),
    "matrix": without("matrices", "another shape", "one axis", "a dictionary"),
    "choice or none": ROLES["choice"],
    "array or none": without("array", "None"),
    "function of three": [*ROLES["function of one"]],
    "labels of any kind": without("labels", "out of range", "negative", "halves", "NaN", "complex"),
    "chunk": without("whole", "None"),
    "any ensemble": without("ensemble", "integers", "flags"),
    "stored ensemble": without("ensemble", "one row"),
    "deviations": without("positive", "a dictionary", "an array", "a column"),
    "mean": without("row", "a dictionary"),
    "scale": without("not negative", "an array"),
    "params or zero": [
        change._replace(wanted=ANY) if change.name in ("NaN", "infinity") else change for change in ROLES["params"]
    ],
}
