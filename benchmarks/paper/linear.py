"""The slides' figure of a linear problem: the l2 error of EKI and of Nesterov EKI, as flows and as iterations.

``A`` is a random matrix with singular values from 1 down to 0.1, the data are ``A u_truth`` without noise, and there
are more particles than parameters, so that the ensemble can reach the truth. Each method runs twice: as an ODE under
an adaptive solver of high order, and as the library's iteration with small steps of one size. Step n of EKI is the
flow's time ``n dt``, step n of Nesterov EKI is ``n sqrt(dt)``. For a linear model both flows are known in closed form
(``docs/continuous.md``), against which the solved ones are checked.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import eki_jax
from benchmarks.harness.figures import legend, panels, save
from benchmarks.paper.common import Found, row
from eki_jax.flows import nesterov_flow, nesterov_start

TITLE = "Linear problem: l2 error of EKI and Nesterov EKI, flow and iteration (slides)"

METHODS = ("EKI", "Nesterov EKI")
# parameters, outputs, particles, steps of the iteration
SIZES = {"smoke": (3, 4, 8, 1_000), "cpu": (10, 20, 30, 10_000), "full": (50, 100, 200, 20_000)}
# dt times the largest rate of the flow at its start; the second panel varies it
STEP = 1e-3
REFINEMENTS = (4e-3, 2e-3, 1e-3, 5e-4)


class LinearModel(NamedTuple):
    """A linear model ``G(u) = A u`` with attainable data."""

    matrix: jax.Array
    truth: jax.Array
    ensemble: jax.Array

    @property
    def batch(self) -> tuple[jax.Array, jax.Array]:
        """``(A, A u_truth)``."""
        return self.matrix, self.matrix @ self.truth

    def error(self, ensemble: jax.Array) -> jax.Array:
        """The l2 distance of the mean particle from the truth."""
        return jnp.linalg.norm(ensemble.mean(axis=0) - self.truth)


def measure(preset: str, data: Path | None, seed: int) -> Found:
    """Solve the problem in all four ways."""
    del data
    *sizes, steps = SIZES[preset]
    with jax.enable_x64(True):
        problem = make_model(*sizes, seed)
        covariance = jnp.cov(problem.ensemble.T, ddof=0)
        rate = float(jnp.linalg.norm(problem.matrix @ covariance @ problem.matrix.T, 2))
        at = np.unique(np.geomspace(1, steps, 60).astype(int))
        curves = {name: compare(name, problem, STEP / rate, at) for name in METHODS}
        gaps = {name: refine(name, problem, rate, steps) for name in METHODS}
    numbers = dict(zip(("parameters", "outputs", "ensemble_size", "steps"), SIZES[preset], strict=True))
    numbers |= {"dt": STEP / rate, "rows": rows(curves, gaps, at)}
    details = {"at_steps": at, "curves": curves, "gaps": gaps, "step_sizes_times_rate": REFINEMENTS}
    return Found(numbers, details)


def make_model(parameters: int, outputs: int, ensemble_size: int, seed: int) -> LinearModel:
    """A random problem with singular values from 1 to 0.1, and particles of the standard normal distribution."""
    keys = jax.random.split(jax.random.key(seed), 4)
    left = jnp.linalg.qr(jax.random.normal(keys[0], (outputs, parameters)))[0]
    right = jnp.linalg.qr(jax.random.normal(keys[1], (parameters, parameters)))[0]
    matrix = left * jnp.geomspace(1.0, 0.1, parameters) @ right
    truth = 2 * jax.random.normal(keys[2], (parameters,))
    return LinearModel(matrix, truth, jax.random.normal(keys[3], (ensemble_size, parameters)))


def compare(name: str, problem: LinearModel, dt: float, at: np.ndarray) -> dict[str, np.ndarray]:
    """The error after every number of steps in ``at``: the iteration's, and the flow's at the same times."""
    solver = _iteration(name, dt)

    @jax.jit
    def iterate(ensemble: jax.Array) -> jax.Array:
        def step(state: Any, _: None) -> tuple[Any, jax.Array]:
            state, _info = solver.step(state, problem.batch)
            return state, problem.error(state.position)

        return jax.lax.scan(step, solver.init(ensemble), None, length=int(at[-1]))[1]

    times = at * _time_step(name, dt)
    iteration = np.asarray(iterate(problem.ensemble))[at - 1]
    return {
        "iteration": iteration,
        "flow": _flow(name, problem, times),
        "closed_form": closed_form(name, problem, times),
    }


def closed_form(name: str, problem: LinearModel, times: np.ndarray) -> np.ndarray:
    """The errors that the flows are known to have: every eigenvector of ``C(0) A^T A`` shrinks by itself."""
    covariance, hessian = np.cov(problem.ensemble.T, ddof=0), np.asarray(problem.matrix.T @ problem.matrix)
    rates, vectors = np.linalg.eig(covariance @ hessian)  # similar to a symmetric matrix: real, and complete
    components = np.linalg.solve(vectors, np.asarray(problem.ensemble.mean(axis=0) - problem.truth))
    t = times[:, None]
    shrink = (1 + 2 * t * rates) ** -0.5 if name == "EKI" else 1 / (1 + t**2 * rates / 8)
    return np.linalg.norm((shrink * components) @ vectors.T, axis=1)


def refine(name: str, problem: LinearModel, rate: float, steps: int) -> list[float]:
    """The relative distance of the iteration from the flow at one time, for several step sizes."""
    end = min(steps, 2000) * _time_step(name, STEP / rate)
    exact = _flow(name, problem, np.array([end / 100, end]))[-1]

    @jax.jit
    def last_error(dt: jax.Array, count: jax.Array) -> jax.Array:
        solver = _iteration(name, dt)
        step = lambda _, state: solver.step(state, problem.batch)[0]
        return problem.error(jax.lax.fori_loop(0, count, step, solver.init(problem.ensemble)).position)

    gaps = []
    for size in REFINEMENTS:
        count = round(end / _time_step(name, size / rate))
        dt = end / count if name == "EKI" else (end / count) ** 2  # so that the last step ends at ``end``
        gaps.append(abs(float(last_error(dt, count)) / exact - 1))
    return gaps


def rows(curves: dict[str, Any], gaps: dict[str, list[float]], at: np.ndarray) -> list[dict[str, Any]]:
    """The numbers that the figure shows; the slides give none."""
    lines, late = [], at > at[-1] / 10
    for name, curve in curves.items():
        flow, exact = curve["flow"], curve["closed_form"]
        numbers = {
            f"l2 error after {at[-1]} steps, iteration": curve["iteration"][-1],
            "l2 error at that time, flow": flow[-1],
            "largest relative distance of the iteration from the flow": np.abs(curve["iteration"] / flow - 1).max(),
            "largest relative distance of the flow from its closed form": np.abs(flow / exact - 1).max(),
            "slope of log error against log steps, over the last decade": _slope(at[late], flow[late]),
            "order in dt of the distance of the iteration from the flow": _slope(REFINEMENTS, gaps[name]),
        }
        lines += [row(name, quantity, None, number, "the slides show a figure") for quantity, number in numbers.items()]
    return lines


def draw(result: dict[str, Any], path: Path) -> None:
    """The slides' figure, and beside it how the iteration approaches the flow."""
    curves, gaps, at = result["curves"], result["gaps"], result["at_steps"]
    figure, ((left, right),) = panels(1, 2, (9, 3.6), width_ratios=(3, 2))
    for colour, (name, curve) in zip(("tab:blue", "tab:red"), curves.items(), strict=True):
        left.loglog(at, curve["flow"], color=colour, label=f"{name}, flow")
        left.loglog(at, curve["iteration"], "o", color=colour, ms=4, mfc="none", label=f"{name}, iteration")
        right.loglog(REFINEMENTS, gaps[name], "o-", color=colour, ms=4)
        order = _slope(REFINEMENTS, gaps[name])
        right.annotate(
            f"{name}: order {order:.2f}",
            (REFINEMENTS[1], gaps[name][1]),
            (0, 8),
            textcoords="offset points",
            ha="center",
            fontsize=9,
        )
    left.set(xlabel="steps", ylabel=r"$\|\bar u - u^\dagger\|_2$", title="Linear problem: error of the mean particle")
    legend(left)
    right.set_xticks(REFINEMENTS, [f"{size:g}" for size in REFINEMENTS])
    right.minorticks_off()
    right.set(ylim=(None, 4 * max(gaps["Nesterov EKI"])))
    right.set(xlabel="dt × fastest rate", ylabel="relative distance", title="Iteration against flow")
    save(figure, path, dpi=110)


def _time_step(name: str, dt: float) -> float:
    """The flow's time that one step advances."""
    return dt if name == "EKI" else float(np.sqrt(dt))


def _iteration(name: str, dt: Any) -> eki_jax.Solver:
    size = eki_jax.constant_step_size(dt)
    if name == "EKI":
        return eki_jax.euler(_forward, eki_jax.squared_error(), size)
    return eki_jax.nesterov(_forward, eki_jax.squared_error(), size, eki_jax.su_boyd_candes())


def _flow(name: str, problem: LinearModel, times: np.ndarray) -> np.ndarray:
    """Errors along the continuous method, by a solver that does not know of the iteration."""
    import diffrax

    loss, start, state = eki_jax.squared_error(), 0.0, problem.ensemble
    field = eki_jax.vector_field(_forward, loss)
    if name != "EKI":
        start, field = float(times[0]) / 50, nesterov_flow(_forward, loss)
        state = nesterov_start(_forward, loss, state, problem.batch, start)

    def error(t: Any, y: Any, args: Any) -> jax.Array:
        return problem.error(y if name == "EKI" else y[0])

    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        diffrax.Tsit5(),
        start,
        float(times[-1]),
        float(times[0]) / 50,
        state,
        problem.batch,
        saveat=diffrax.SaveAt(ts=jnp.asarray(times), fn=error),
        stepsize_controller=diffrax.PIDController(rtol=1e-8, atol=1e-11),
        max_steps=100_000,
    )
    return np.asarray(solution.ys)


def _forward(u: jax.Array, x: jax.Array) -> jax.Array:
    return x @ u


def _slope(x: Any, y: Any) -> float:
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])
