"""Steps of several solvers on this device, held against float64 on the processor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import eki_jax
from benchmarks.harness.command import Refused
from benchmarks.performance import networks
from eki_jax import kalman, losses, natural

#: How far the move of a step may be from the exact one, as a share of it, by the precision of the products: float32
#: rounds in the 7th digit and sums some thousand numbers; what JAX takes by itself has 10 bits on some devices, and
#: bfloat16 has 8.
TOLERANCES = {"highest": 1e-3, "default": 2e-2, "bf16": 4e-2}
# preset -> network, J, samples
SIZES = {"smoke": ("dnn1", 16, 20), "full": ("dnn2", 256, 100)}
# What tests run: a solver of each kind, and the precisions that differ on a processor.
_SMOKE = {"euler", "etki", "natural gradient", "highest", "bf16"}


class Case(NamedTuple):
    """A solver.

    Attributes:
        make: Function of a model and settings.
        on_labels: Whether the targets are labels; else they are their distributions.
        around_a_mean: Whether it draws its own particles, which differ in double precision: it is held against float32
            on the processor.
    """

    make: Callable[..., eki_jax.Solver]
    on_labels: bool = True
    around_a_mean: bool = False


_NOISE, _STEP = 0.1, eki_jax.paper_step_size()
SOLVERS = {
    "euler": Case(lambda f, **s: eki_jax.euler(f, losses.cross_entropy(), _STEP, **s)),
    "euler, by particles": Case(
        lambda f, **s: eki_jax.euler(f, losses.cross_entropy(), _STEP, contraction="particles", **s)
    ),
    "nesterov": Case(lambda f, **s: eki_jax.nesterov(f, losses.cross_entropy(), _STEP, 0.9, **s)),
    "enkf": Case(lambda f, **s: kalman.enkf(f, _NOISE, 0.1, **s), on_labels=False),
    "etki": Case(lambda f, **s: kalman.etki(f, _NOISE, 0.1, **s), on_labels=False),
    "natural gradient": Case(
        lambda f, **s: natural.natural_gradient(f, eki_jax.squared_error(), 64, damping=1e-2, **s),
        on_labels=False,
        around_a_mean=True,
    ),
}


def measure(preset: str) -> list[dict[str, Any]]:
    """One row for every solver and precision: the error of a step's move, and the most that it may be."""
    name, size, samples = SIZES[preset]
    here, processor = jax.devices()[0], _processor()
    with jax.default_device(processor):
        forward, template, (x, labels) = networks.build(name, samples)
        prior, key = eki_jax.xavier(template), jax.random.key(0)
        ensemble = jax.jit(lambda key: eki_jax.sample_ensemble(key, prior, size))(key)
        mean = jax.jit(prior.sample)(key)
    rows = []
    asked = lambda names: {name: value for name, value in names.items() if preset != "smoke" or name in _SMOKE}
    for solver, case in asked(SOLVERS).items():
        start = (mean, key) if case.around_a_mean else (ensemble,)
        batch = (x, labels if case.on_labels else jax.nn.one_hot(labels, 10))
        exact = _moved(case, forward, start, batch, processor, wide=not case.around_a_mean)
        for precision, tolerance in asked(TOLERANCES).items():
            found = _moved(case, forward, start, batch, here, precision=precision)
            error = float(np.linalg.norm(found - exact) / np.linalg.norm(exact))
            # Written so that NaN is no success.
            rows.append(
                {"solver": solver, "precision": precision, "error": error, "tolerance": tolerance}
                | {"passed": bool(error <= tolerance), "reference": "float32" if case.around_a_mean else "float64"}
            )
    return rows


def check(rows: list[dict[str, Any]]) -> None:
    """Raise Refused for rows beyond their tolerance."""
    wrong = [
        f"{row['solver']} in {row['precision']}: {row['error']:.2g}, more than {row['tolerance']:g}"
        for row in rows
        if not row["passed"]
    ]
    if wrong:
        raise Refused(f"steps on this device are not those of the processor ({'; '.join(wrong)}); nothing else was run")


def _processor() -> Any:
    try:
        return jax.devices("cpu")[0]
    except RuntimeError as error:
        platforms = jax.config.jax_platforms
        raise Refused(
            f"JAX_PLATFORMS: {platforms!r} leaves out the processor, which this device is held against; wanted it "
            f"unset, or '{platforms},cpu'"
        ) from error


def _moved(
    case: Case, forward: Any, start: Any, batch: Any, device: Any, *, precision: str = "highest", wide: bool = False
) -> np.ndarray:
    """How a step moved what it moves, on a device."""
    settings = {"precision": "bf16"} if precision == "bf16" else {}
    named = precision if precision != "bf16" else None
    with jax.enable_x64(wide), jax.default_device(device), jax.default_matmul_precision(named):
        dtype = np.float64 if wide else np.float32
        place = lambda leaf: jnp.asarray(np.asarray(leaf), dtype) if _is_real(leaf) else jax.device_put(leaf, device)
        first, *rest = jax.tree.map(place, start)
        solver = case.make(forward, **settings)
        state = jax.jit(solver.init)(first, *rest)
        new, info = jax.jit(solver.step)(state, jax.tree.map(place, batch))
        if not bool(info.moved):
            raise Refused(f"a step was refused on {device}: {eki_jax.Reason(int(info.reason)).name}")
        flat = lambda state: np.concatenate(
            [np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(state.position)]
        )
        return flat(new) - flat(state)


def _is_real(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)
