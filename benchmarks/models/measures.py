"""What is measured of each model, one function for each column of the table."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

import eki_jax
from benchmarks.models.entry import Instance, Model
from eki_jax import natural, sharding

#: Scale of the first ensemble of `euler` around the module's own parameters.
SPREAD = 0.3


class Sizes(NamedTuple):
    """Numbers of particles and steps.

    Attributes:
        euler: particles and steps of ``euler``.
        natural: particles and steps of the natural gradient.
        equal: particles of the step that low rank and explicit particles both take.
        cosine: particles of the estimates of the gradient.
        sharded: particles spread over the devices.
    """

    euler: tuple[int, int]
    natural: tuple[int, int]
    equal: int
    cosine: int
    sharded: int


PRESETS = {
    "smoke": Sizes((30, 20), (60, 10), 16, 60, 16),
    "cpu": Sizes((100, 50), (1000, 20), 32, 1000, 16),
}

#: Largest loss after the steps of ``euler`` and of the natural gradient, as a share of that before.
EULER, NATURAL = 0.5, 0.2


def measure(model: Model, instance: Instance, column: str, sizes: Sizes) -> dict[str, Any]:
    """One cell: its numbers, the warnings that came with them, or the error that it ended in."""
    if column == "cosine" and not model.has_gradient:
        return {"none": "its derivatives are zero", "warnings": []}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found = COLUMNS[column](instance, sizes)
        except Exception as error:  # any one is shown, and wrong unless the model's entry expects it
            found = {"error": f"{type(error).__name__}: {error}"}
    return {**found, "warnings": sorted({str(warning.message) for warning in caught})}


def trouble(model: Model, column: str, cell: dict[str, Any]) -> str:
    """What is wrong with a cell, or nothing: of numbers that are not there, every bound is missed."""
    refusal, error = model.refuses.get(column, ""), cell.get("error", "")
    if refusal or error:
        return "" if refusal and refusal in error else f"{error or 'no error'}; wanted {refusal or 'numbers'}"
    unknown = [text for text in cell["warnings"] if not (model.warns and model.warns in text)]
    if unknown:
        return f"warns: {unknown[0]}"
    if "none" in cell:
        return ""
    bounds: dict[str, tuple[tuple[str, float], ...]] = {
        "euler": (("ratio", EULER),),
        "natural": (("ratio", NATURAL), ("peak", 1.0)),
        "equal": (("step", model.rounding), ("outputs", model.rounding)),
        "sharded": (("step", model.rounding),),
    }
    for name, most in bounds.get(column, ()):
        if not _number(cell[name]) <= most:
            return f"{name}: {cell[name]}; wanted at most {most}"
    if column == "cosine" and not _number(cell["localized"]) >= model.cosine:
        return f"localized: {cell['localized']}; wanted at least {model.cosine}"
    if column == "equal" and not cell["moved"]:
        return "the steps were refused"
    if column == "leaves" and sum(cell[kind] for kind in ("low rank", "plain", "formed")) != cell["leaves"]:
        return "leaves of another kind"
    return ""


def _number(value: float | None) -> float:
    """NaN for what JSON has no number for."""
    return float("nan") if value is None else value


def euler(instance: Instance, sizes: Sizes) -> dict[str, Any]:
    """The loss of the ensemble's mean after some steps of ``euler``, over that before."""
    particles, steps = sizes.euler
    solver = instance.solver(lambda forward: eki_jax.euler(forward, instance.loss))
    prior = eki_jax.gaussian(instance.params, SPREAD)
    return _run(instance, solver, lambda: (eki_jax.sample_ensemble(jax.random.key(21), prior, particles),), steps)


def natural_steps(instance: Instance, sizes: Sizes) -> dict[str, Any]:
    """The same of natural-gradient steps with the default settings: low rank, sigma 0.1, lambda 1e-4."""
    particles, steps = sizes.natural
    solver = instance.solver(lambda forward: natural.natural_gradient(forward, instance.loss, particles))
    return _run(instance, solver, lambda: (instance.params, jax.random.key(22)), steps)


def _run(instance: Instance, solver: eki_jax.Solver, start: Callable[[], Any], steps: int) -> dict[str, Any]:
    def step(state: Any, _: None) -> tuple[Any, Any]:
        state, info = solver.step(state, instance.batch)
        return state, (instance.loss_at(solver.estimate(state)), info.moved)

    @jax.jit
    def run() -> Any:  # one program, since most of the time is the compiler's
        state = solver.init(*start())
        return instance.loss_at(solver.estimate(state)), lax.scan(step, state, None, steps)[1]

    before, (losses, moved) = run()
    ratios = losses.astype(jnp.float32) / before.astype(jnp.float32)
    # A maximum would pass over NaN.
    peak = float(jnp.where(jnp.isfinite(ratios).all(), jnp.max(ratios), jnp.inf))
    return {"ratio": float(ratios[-1]), "peak": peak, "refused": int(steps - moved.sum()), "steps": steps}


def equal(instance: Instance, sizes: Sizes) -> dict[str, Any]:
    """A step of low rank against one that is told the outputs of the explicit particles; so that all is compared.

    ``outputs`` is the largest relative difference between the losses and the decreases that both predict, which are
    functions of all particles' outputs; ``step`` is that of the parameters' steps.
    """
    plain = instance.outputs
    settings: dict[str, Any] = {"particles": sizes.equal, "damping": 1e-2, "loss_limit": None}
    solver = natural.natural_gradient(plain, instance.loss, **settings)
    x, targets = instance.batch

    @jax.jit
    def both() -> Any:
        state = solver.init(instance.params, jax.random.key(23))
        outputs = jax.vmap(plain, in_axes=(0, None))(solver.ensemble(state), x)
        return solver.step(state, instance.batch), solver.update(state, outputs, targets)

    (stepped, info), (told, info_of_told) = both()
    of = lambda info: jnp.stack([info.loss, info.predicted]).astype(jnp.float32)
    return {
        "step": _relative(stepped.position, told.position, instance.params),
        "outputs": float(jnp.max(jnp.abs(of(info) / of(info_of_told) - 1))),
        "moved": bool(info.moved & info_of_told.moved),
    }


def cosines(instance: Instance, sizes: Sizes) -> dict[str, Any]:
    """The cosine between the direction and the exact gradient: localized, and in the span.

    With so large a lambda a natural step is a gradient step. All deviations have one scale, since each leaf's part of
    such a step is its gradient times its variance. ``leaf`` is the least cosine of a single leaf, among those that have
    a hundredth of the gradient's square.
    """
    exact = jax.jit(jax.grad(instance.loss_at))(instance.params)
    found: dict[str, Any] = {"particles": sizes.cosine}
    for name, estimate in (("localized", natural.localized()), ("span", natural.span())):
        direction_of = natural.value_and_natural_direction(
            instance.outputs,
            instance.loss,
            sizes.cosine,
            0.02,
            1e6,
            natural.low_rank(1, 1.0),
            estimate=estimate,
        )
        _, direction = direction_of(instance.params, instance.batch, jax.random.key(24))
        found[name] = _cosine(jax.tree.leaves(direction), jax.tree.leaves(exact))
        if name == "localized":
            total = sum(_square(leaf) for leaf in jax.tree.leaves(exact))
            pairs = zip(jax.tree.leaves(direction), jax.tree.leaves(exact), strict=True)
            found["leaf"] = min(_cosine([a], [b]) for a, b in pairs if _square(b) >= 0.01 * total)
    return found


def sharded(instance: Instance, sizes: Sizes) -> dict[str, Any]:
    """Two natural steps on eight devices against two on one, as a share of their length."""
    mesh = sharding.make_mesh(8)

    def solver(**axis: Any) -> eki_jax.Solver:
        settings: dict[str, Any] = {"damping": 1e-2, "loss_limit": None, **axis}
        return instance.solver(lambda f: natural.natural_gradient(f, instance.loss, sizes.sharded, **settings))

    start = instance.params, jax.random.key(26)
    many = sharding.shard_solver(solver(axis_name="particles"), mesh, driver=instance.driver)
    (alone, begun), (spread, _) = (jax.device_get(_two_steps(instance, s, start)) for s in (solver(), many))
    return {"devices": mesh.size, "step": _relative(spread, alone, begun)}


def _two_steps(instance: Instance, solver: eki_jax.Solver, start: tuple[Any, ...]) -> Any:
    """The estimates after two steps and before them."""

    @jax.jit
    def run() -> Any:
        begun = solver.init(*start)
        state, _ = lax.scan(lambda state, _: (solver.step(state, instance.batch)[0], None), begun, None, 2)
        return solver.estimate(state), solver.estimate(begun)

    return run()


def leaves(instance: Instance, sizes: Sizes) -> dict[str, Any]:
    """How many leaves have deviations of each kind, and how many a localized step sees sample by sample."""
    del sizes
    described = natural.describe(instance.outputs, instance.params, instance.batch[0])
    counts = dict.fromkeys(("low rank", "plain", "formed"), 0)
    for leaf in described.leaves:
        counts[leaf.deviation] += 1
    local = sum(leaf.localized in ("local", "as its layer") for leaf in described.leaves)
    return {**counts, "local": local, "leaves": len(described.leaves), "lost": [leaf.name for leaf in described.lost]}


def _relative(found: Any, wanted: Any, start: Any) -> float:
    """The distance of two ends as a share of the way from the start."""
    pairs = zip(*map(jax.tree.leaves, (found, wanted, start)), strict=True)
    wide = [tuple(jnp.asarray(leaf, jnp.float32) for leaf in leaves) for leaves in pairs]
    apart = sum(float(jnp.sum((a - b) ** 2)) for a, b, _ in wide)
    way = sum(float(jnp.sum((b - c) ** 2)) for _, b, c in wide)
    return (apart / way) ** 0.5 if way else float("inf")


def _square(leaf: jax.Array) -> float:
    return float(jnp.sum(leaf.astype(jnp.float32) ** 2))


def _cosine(a: list[jax.Array], b: list[jax.Array]) -> float:
    inner = sum(float(jnp.sum(x.astype(jnp.float32) * y.astype(jnp.float32))) for x, y in zip(a, b, strict=True))
    lengths = (sum(map(_square, a)) * sum(map(_square, b))) ** 0.5
    return inner / lengths if lengths else float("nan")


#: The columns: a function of an instance and the sizes for each.
COLUMNS: dict[str, Callable[[Instance, Sizes], dict[str, Any]]] = {
    "leaves": leaves,
    "euler": euler,
    "natural": natural_steps,
    "equal": equal,
    "cosine": cosines,
    "sharded": sharded,
}
