"""What comes back from a call with a malformed argument: its kind, and whether an accepted result is right."""

from __future__ import annotations

import collections
import random
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from fuzz import calibrate_calls, changes, kalman_calls
from fuzz.calibrate_calls import CALIBRATE
from fuzz.calls import CORE, Call, J, Refused
from fuzz.changes import GOOD, KINDS, REFUSED, RIGHT, Change, put
from fuzz.extras import EXTRAS
from fuzz.kalman_calls import KALMAN
from fuzz.policy_calls import POLICIES

import eki_jax

CALLS = CORE | EXTRAS | KALMAN | CALIBRATE | POLICIES
ROLES = {**changes.ROLES, **kalman_calls.ROLES, **calibrate_calls.ROLES}
assert len(ROLES) == len(changes.ROLES) + len(kalman_calls.ROLES) + len(calibrate_calls.ROLES)  # a name means one list
#: Roles of numbers, which are never NaN or infinite; of these with "or none" too.
SETTINGS = ["positive", "finite", "share", "whole", "chunk", "seed", "count", "sizes", "times", "covariance"]
SETTINGS += ["not negative", "above one", "from 0 to 1", "at least one", "pair of numbers", "number of few"]
SETTINGS += [*kalman_calls.SETTINGS, *calibrate_calls.SETTINGS]


class Case(NamedTuple):
    """A call, the argument that is replaced, and by what; or two of them."""

    call: str
    argument: str
    change: Change
    second: tuple[str, Change] | None = None

    def __str__(self) -> str:
        also = "" if self.second is None else f", {self.second[0]} = {self.second[1].name}"
        return f"{self.call}({self.argument} = {self.change.name}{also})"


def cases_of(name: str) -> Iterator[Case]:
    """A call with every argument replaced by everything of its role."""
    for argument, (role, _) in CALLS[name].valid.items():
        for change in ROLES[role]:
            yield Case(name, argument, change)


def pairs_of(name: str, number: int) -> Iterator[Case]:
    """A call with two arguments replaced by what is to be refused, drawn once and for all."""
    draw = random.Random(name)
    refused = {
        argument: changes
        for argument, (role, _) in CALLS[name].valid.items()
        if (changes := [change for change in ROLES[role] if change.wanted == REFUSED])
    }
    for _ in range(number if len(refused) > 1 else 0):
        one, other = draw.sample(list(refused), 2)
        yield Case(name, one, draw.choice(refused[one]), (other, draw.choice(refused[other])))


def classified(case: Case) -> tuple[str, str]:
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
    except (TypeError, ValueError, FileNotFoundError) as error:
        text = str(error)
        roles = [call.valid[name][0] for name in named]
        names = [*named, *(alias for name in [*named, *roles] for alias in ALIASES.get(name, ()))]
        told = any(f"{start}{name}{end}" in text for name in names for start, end in NAMED)
        clear = told and ("wanted" in text or "unexpected" in text)
        return ("clear error" if clear else "obscure error"), f"{type(error).__name__}: {text[:160]}"
    except Exception as error:
        return "obscure error", f"{type(error).__name__}: {str(error)[:160]}"
    imaginary = "complex" in case.change.name and case.change.wanted != RIGHT
    if imaginary and not fewer_is_fine(case):
        return "imaginary part", "accepted"
    if role.removesuffix(" or none") in SETTINGS and any(word in case.change.name for word in ("NaN", "infinity")):
        return "NaN setting", "accepted"
    if "right" not in case.change.wanted and not fewer_is_fine(case):
        return "wrong", f"accepted: {str(result)[:80]}"
    return judged(case, call, arguments, result)


def judged(case: Case, call: Call, arguments: dict[str, Any], result: Any) -> tuple[str, str]:
    """Whether an accepted result is right: as by hand or in float64, and no row spoiled by another's.

    A huge particle may have taken part, where float32 bears it, or have been left out as one of NaN is.
    """
    leaves = arrays_of(result)
    if (
        case.call.startswith("optax.")
        and "control" not in case.change.name
        and all((leaf == 0).all() for leaf in leaves)
    ):
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
    is_random = call.is_random or any(role.startswith("key") for role, _ in call.valid.values())
    other_numbers = is_random and not (case.change.name.startswith("control") and "rbg" not in case.change.name)
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            wanted = right_result(call, arguments, is_random, other_numbers)
        except (Refused, eki_jax.StepRefused) as error:
            return ("right", "refused in float64 too") if spoiled else ("wrong", f"float64 refuses: {error}")
    rights = arrays_of(wanted)
    if len(leaves) != len(rights):
        return "wrong", f"{len(leaves)} arrays, right are {len(rights)}"
    for found, right in zip(leaves, rights, strict=True):
        if found.shape != right.shape:
            return "wrong", f"shape {found.shape}, right is {right.shape}"
        if other_numbers or found.dtype.kind not in "fiubV":
            continue
        a, b = np.atleast_1d(np.asarray(found, np.float64)), np.atleast_1d(np.asarray(right, np.float64))
        if spoiled and found.ndim and len(a) == J:
            a, b = np.delete(a, 1, axis=0), np.delete(b, 1, axis=0)
        if huge and not np.isfinite(a).all():
            continue  # beyond float32, and seen to be
        # What is not finite has to be so in the same places; NaN or infinity is for the order of operations to say.
        finite = np.isfinite(b)
        scale = np.abs(b[finite]).max(initial=1e-6)
        same = np.allclose(a[finite], b[finite], rtol=call.tolerance, atol=call.tolerance * scale)
        if not same or np.isfinite(a[~finite]).any():
            return "wrong", f"{np.ravel(a)[:4]} for {np.ravel(b)[:4]}"
    return "right", ""


def right_result(call: Call, arguments: dict[str, Any], is_random: bool, other_numbers: bool) -> Any:
    """By hand, in float64, or of random numbers: those of the valid arguments, or others of their shape."""
    if call.oracle is not None:
        return call.oracle(**arguments)
    if is_random and not other_numbers:
        return call.call(**{name: value for name, (_, value) in call.valid.items()})
    key = id(call), *((name, fingerprint(value)) for name, value in arguments.items())
    if key not in RIGHT_RESULTS:
        if len(RIGHT_RESULTS) > 100:
            RIGHT_RESULTS.clear()
        with jax.enable_x64(True):
            result = call.call(**{name: _wide(value) for name, value in arguments.items()})
        RIGHT_RESULTS[key] = result, arguments  # which stay alive, so that no other object gets their id
    return RIGHT_RESULTS[key][0]


def fingerprint(value: Any) -> Any:
    """What two arguments have in common that are the same in float64."""

    def of_leaf(leaf: Any) -> Any:
        if isinstance(leaf, np.ndarray | jax.Array) and not jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
            return (
                leaf.shape,
                leaf.dtype.kind,
                np.asarray(leaf, np.float64 if leaf.dtype.kind == "f" else None).tobytes(),
            )
        return leaf if isinstance(leaf, str | int | float) else id(leaf)

    leaves, structure = jax.tree.flatten(value, is_leaf=callable)
    return structure, tuple(map(of_leaf, leaves))


RIGHT_RESULTS: dict[Any, Any] = {}  # of calls in float64, several of whose cases are the same there


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


#: What stands before and behind a name in an error that tells of it.
NAMED = (("", ":"), ("", "["), ("", "."), ("", " "), ("no ", ";"))
#: What an argument is called where it arrives.
ALIASES: dict[str, tuple[str, ...]] = {
    "ensemble": ("ensemble", "velocity", "losses", "params", "parameters", "stacked ensemble", "outputs", "particles"),
    "batch": ("batch", "targets", "x", "outputs"),
    "rows": ("args",),
    "key0": ("key",),
    "train_x": ("train", "x", "inputs"),
    "labels": ("labels", "targets", "train"),
    "xs": ("samples", "x", "outputs"),
    "targets": ("targets", "samples", "train", "mean", "loss"),
    "target": ("target", "targets", "sample", "loss"),
    "cell": ("cell", "forward"),
    "outputs": ("outputs", "targets", "cotangents"),
    "cotangents": ("cotangents", "outputs"),
    "factor": ("factor", "scale", "scale, factor, covariance", "noise_covariance"),
    "velocity": ("velocity", "state"),
    "fn": ("fn", "sample_loss"),
    "u": ("u", "nodes"),
    "nodes": ("nodes", "u"),
    "scale": ("scale", "scale, factor, covariance"),
    "learning_rate": ("learning_rate", "rate"),
    "updates": ("updates", "params", "parameters"),
    "params": ("params", "args"),
    "entries": ("prior",),
    "solver": ("loss",),
    "loss": ("noise_covariance",),
    "parameter_coordinates": ("output_coordinates",),
    "left": ("LowRankMatrix",),
    "right": ("LowRankMatrix",),
    "mean": ("LowRankMatrix",),
    "data": ("data", "results"),
    "localization": ("localization", "sees"),
    "values": ("targets",),
    "diagonal": ("noise_covariance",),
    "prior": ("prior", "params"),
    "x": ("x", "args", "train", "sample", "example_inputs", "inputs", "outputs", "template"),
}


def table(results: dict[str, collections.Counter[str]]) -> str:
    """A line for each kind, and for the callables with the most obscure errors."""
    total = collections.Counter[str]()
    for counts in results.values():
        total.update(counts)
    lines = [f"{kind:16} {total[kind]:6}" for kind in KINDS]
    bad = {name: sum(counts[kind] for kind in KINDS[3:]) for name, counts in results.items()}
    worst = sorted((name for name in bad if bad[name]), key=lambda name: -bad[name])[:10]
    return "\n".join(lines + [f"{name}: {dict(results[name])}" for name in worst])


def fewer_is_fine(case: Case) -> bool:
    """Whether a call rightly takes a replacement: fewer particles where nothing else has a J, or what it says."""
    call = CALLS[case.call]
    told = {"outputs", "losses", "velocity", "cotangents"} & set(call.valid)
    fewer = call.valid[case.argument][0] in ("ensemble", "any ensemble") and case.change.name == "a row less"
    return (fewer and not told) or case.change.name in call.fine.get(case.argument, ())


def unexpected(case: Case, kind: str) -> bool:
    """Whether a kind is not as it should be: what is wanted to be refused may be refused in any way."""
    if kind == "right":
        return "right" not in case.change.wanted and not fewer_is_fine(case)
    return kind not in GOOD or case.change.wanted == RIGHT
