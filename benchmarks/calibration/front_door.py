"""What ``bounds`` and ``crashes`` share: calibrations through :mod:`eki_jax.calibrate`, with one compiled step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import jax
import numpy as np

import eki_jax
from benchmarks.calibration.problems import decay
from eki_jax import calibrate, kalman


@cache
def method(policy: str = "redraw", has_cut: bool = True) -> Callable[[np.ndarray], eki_jax.Solver]:
    """The front door's own method, compiled once for all calibrations.

    Args:
        policy: name of what is done with failed members: "redraw", the front door's default, or "keep".
        has_cut: flag, False for a step that looks at finite outputs only.
    """
    failures = {"redraw": eki_jax.redraw_failed(jax.random.key(0)), "keep": eki_jax.keep_failed()}[policy]
    settings: dict[str, Any] = {} if has_cut else {"outlier_cut": None}
    size = len(decay.TIMES)
    solver = kalman.etki(None, np.ones(size), kalman.data_misfit_controller(), failures=failures, **settings)
    return lambda noise_covariance: solver


def run(
    prior: dict[str, Any],
    particles: int,
    seed: int,
    simulate: Callable[[Sequence[dict[str, Any]], int], list[Any]],
    solver: Callable[[np.ndarray], eki_jax.Solver],
) -> dict[str, Any]:
    """One calibration of the decay problem.

    Args:
        prior: priors of the two parameters.
        particles: number of members.
        seed: seed of the calibration.
        simulate: function of the members and the iteration that returns their results.
        solver: method, see :func:`method`.

    Returns:
        Iterations, members that failed in all, and the posterior's error of the mean and ratio of deviations, in exact
        posterior deviations, root mean square and geometric mean over the two parameters; or ``ended``, why there is
        none.
    """
    calibration = calibrate.Calibration(
        prior, {"left": decay.data()}, {"left": decay.NOISE**2}, particles, seed, method=solver
    )
    failed = 0
    while not calibration.done:
        try:
            failed += calibration.tell(simulate(calibration.ask(), calibration.iteration)).failed
        except (eki_jax.StepRefused, ValueError) as error:
            return {"seed": seed, "iterations": calibration.iteration, "failed": failed, "ended": str(error)[:160]}
    posterior, exact = calibration.posterior(), decay.exact()
    names = list(decay.TRUTH)
    shifts = [(float(posterior.mean[name]) - exact.mean[name]) / exact.deviation[name] for name in names]
    ratios = [float(posterior.sd[name]) / exact.deviation[name] for name in names]
    return {
        "seed": seed,
        "iterations": calibration.iteration,
        "failed": failed,
        "ended": "",
        "mean": float(np.sqrt(np.mean(np.square(shifts)))),
        "deviation": float(np.exp(np.mean(np.log(ratios)))),
    }
