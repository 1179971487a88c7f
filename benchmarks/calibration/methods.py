"""The methods that calibrate, each as a solver for a problem."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import eki_jax
from benchmarks.calibration.problems import InverseProblem
from eki_jax import kalman
from eki_jax.priors import Gaussian

Make = Callable[[InverseProblem, jax.Array], eki_jax.Solver]


class Calibrator(NamedTuple):
    """A method of the tables.

    Attributes:
        label: name in the tables.
        make: function of a problem and a JAX random key that returns a solver.
        steps: largest number of steps on the linear problem.
        averaged: share of these steps, the last ones, whose ensembles count together; 0 for the last one alone.
        own_particles: flag, True where the method makes its particles, in a number of its own.
        where: function that says whether a problem has what the method wants, such as coordinates.
        least: function of the number of parameters P: the least number of particles.
        most: largest number of particles on the linear problem, where many steps of a large ensemble take long.
    """

    label: str
    make: Make
    steps: int = 1
    averaged: float = 0.0
    own_particles: bool = False
    where: Callable[[InverseProblem], bool] = lambda problem: True
    least: Callable[[int], int] = lambda parameters: 2
    most: int = 10_000


def prior(problem: InverseProblem) -> Gaussian:
    """The problem's prior, in JAX's default floating-point type."""
    # Factored by NumPy: inside of a compiled function a covariance would be traced, and could not be inverted.
    return eki_jax.gaussian(jnp.asarray(problem.prior_mean, float), factor=np.linalg.cholesky(problem.prior_covariance))


def taper(problem: InverseProblem, radius: float) -> kalman.Localization:
    """Gaspari and Cohn's weights from the problem's coordinates."""
    places = problem.parameter_coordinates, problem.output_coordinates
    return kalman.taper(*places, radius, period=problem.period)


def has_places(problem: InverseProblem) -> bool:
    """Whether the problem has coordinates."""
    return problem.parameter_coordinates is not None


def kalman_step(solver: Callable[..., eki_jax.Solver], step_size: Any = 1.0, **settings: Any) -> Make:
    """A Kalman step; settings that are functions are those of the problem, and of the key where they take two.

    Args:
        solver: :func:`eki_jax.kalman.etki` or one like it.
        step_size: step size, or a function that makes a schedule.
        **settings: keywords of the solver, or functions of the problem and the key that make them.
    """

    def make(problem: InverseProblem, key: jax.Array) -> eki_jax.Solver:
        made = {name: value(problem, key) if callable(value) else value for name, value in settings.items()}
        size = step_size() if callable(step_size) else step_size
        return solver(None, problem.noise_covariance, size, **made)

    return make


def accelerated(make: Make) -> Make:
    """Nesterov's acceleration of a step."""
    return lambda problem, key: kalman.accelerated(make(problem, key))


def whitened(make: Callable[..., eki_jax.Solver]) -> Make:
    """A discretization of the flow, for squared errors of outputs and data in units of their noise."""

    def made(problem: InverseProblem, key: jax.Array) -> eki_jax.Solver:
        solver = make(None, eki_jax.squared_error())

        def update(state: Any, outputs: Any, targets: Any) -> tuple[Any, Any]:
            return solver.update(state, problem.whiten(outputs), problem.whiten(targets))

        return solver._replace(update=update)

    return made


controlled = kalman.data_misfit_controller
ten = lambda: kalman.tempered(10)


own_key = lambda problem, key: key
own_prior = lambda problem, key: prior(problem)

spans = lambda parameters: parameters + 2  # particles of which the deviations span the parameters


def to_fixed_point(**settings: Any) -> Make:
    """Steps of 1/2 that impose the prior, and an inflation that forgets as much as they learn."""
    inflation = kalman.multiplicative_inflation()
    return kalman_step(kalman.etki, 0.5, prior=own_prior, inflation=inflation, **settings)


# What is known of each on a linear problem: ``linear`` compares it.
LINEAR: dict[str, Calibrator] = {
    "etki": Calibrator("ETKI, one step", kalman_step(kalman.etki)),
    "etki-tempered": Calibrator("ETKI, ten tempered steps", kalman_step(kalman.etki, ten), 10),
    "etki-controlled": Calibrator("ETKI, misfit controller", kalman_step(kalman.etki, controlled), 1000),
    "etki-prior": Calibrator("ETKI, prior imposed, to time 20", kalman_step(kalman.etki, prior=own_prior), 20),
    "etki-fixed-point": Calibrator("ETKI, prior imposed, inflated to its fixed point", to_fixed_point(), 40),
    "enkf": Calibrator("EnKF, perturbed data, one step", kalman_step(kalman.enkf, key=own_key)),
    "enkf-tempered": Calibrator(
        "EnKF, perturbed data, ten tempered steps", kalman_step(kalman.enkf, ten, key=own_key), 10
    ),
    "enkf-bare": Calibrator("EnKF, data as they are, one step", kalman_step(kalman.enkf)),
    "uki": Calibrator("UKI, one step", kalman_step(kalman.uki, prior=own_prior), own_particles=True),
    "uki-fixed-point": Calibrator(
        "UKI, prior imposed, to its fixed point",
        kalman_step(kalman.uki, prior=own_prior, impose_prior=True),
        40,
        own_particles=True,
    ),
    "aldi": Calibrator(
        "ALDI, last 450 of 500 steps",
        kalman_step(kalman.aldi, 0.5, prior=own_prior, key=own_key),
        500,
        0.9,
        least=spans,
        most=60,
    ),
    "eks": Calibrator(
        "EKS, last 450 of 500 steps",
        kalman_step(kalman.aldi, 0.5, prior=own_prior, key=own_key, correction=False),
        500,
        0.9,
        least=spans,
        most=60,
    ),
    "euler": Calibrator("EKI, Euler, 20 steps", whitened(eki_jax.euler), 20),
    "nesterov": Calibrator("EKI, Nesterov, 20 steps", whitened(eki_jax.nesterov), 20),
}


def localized(radius: float) -> Callable[[InverseProblem, jax.Array], kalman.Localization]:
    """The taper of a radius, as a keyword of :func:`kalman_step`."""
    return lambda problem, key: taper(problem, radius)


def noisy(scale: float) -> Callable[[InverseProblem, jax.Array], kalman.Inflation]:
    """Additive inflation of the prior's shape, as a keyword of :func:`kalman_step`."""
    return lambda problem, key: kalman.additive_inflation(jax.random.fold_in(key, 1), prior(problem), scale)


def corrected(make: Callable[[], kalman.Localization]) -> Callable[[InverseProblem, jax.Array], kalman.Localization]:
    """A localization that looks at the ensemble's correlations, as a keyword of :func:`kalman_step`."""
    return lambda problem, key: make()


# The ways of the ensemble transform to race, alone or with a taper: label, and function of further settings.
_WAYS: dict[str, tuple[str, Callable[..., Make]]] = {
    "": ("", lambda **settings: kalman_step(kalman.etki, **settings)),
    "-controlled": (
        ", misfit controller to time 1",
        lambda **settings: kalman_step(kalman.etki, controlled, **settings),
    ),
    "-prior": (", prior imposed", lambda **settings: kalman_step(kalman.etki, prior=own_prior, **settings)),
    "-fixed-point": (", prior imposed, steps of 1/2, inflated to its fixed point", to_fixed_point),
    "-accelerated": (", accelerated", lambda **settings: accelerated(kalman_step(kalman.etki, **settings))),
}
# What races to the target: steps of size 1 unless the label says otherwise.
RACE: dict[str, Calibrator] = {
    **{f"etki{way}": Calibrator(f"ETKI{label}", make()) for way, (label, make) in _WAYS.items()},
    "enkf": Calibrator("EnKF, perturbed data", kalman_step(kalman.enkf, key=own_key)),
    "enkf-controlled": Calibrator(
        "EnKF, perturbed data, misfit controller to time 1", kalman_step(kalman.enkf, controlled, key=own_key)
    ),
    "uki-prior": Calibrator(
        "UKI, prior imposed", kalman_step(kalman.uki, prior=own_prior, impose_prior=True), own_particles=True
    ),
    "aldi": Calibrator("ALDI", kalman_step(kalman.aldi, 0.5, prior=own_prior, key=own_key), least=spans),
    "euler": Calibrator("EKI, Euler", whitened(eki_jax.euler)),
    "nesterov": Calibrator("EKI, Nesterov", whitened(eki_jax.nesterov)),
}


def localized_race(radius: float) -> dict[str, Calibrator]:
    """What races with a taper, on problems that have places."""
    near = localized(radius)
    enkf = kalman_step(kalman.enkf, key=own_key, localization=near)
    return {
        **{
            f"etki-taper{way}": Calibrator(f"ETKI, taper{label}", make(localization=near), where=has_places)
            for way, (label, make) in _WAYS.items()
        },
        "enkf-taper": Calibrator("EnKF, perturbed data, taper", enkf, where=has_places),
    }


class Chosen(NamedTuple):
    """Settings that are chosen on seeds of their own.

    Attributes:
        radius: radius of the taper, in places.
        factor: factor of the multiplicative inflation beside it.
        scale: standard deviation of the noise beside it, in the prior's.
    """

    radius: float
    factor: float
    scale: float


def remedies(chosen: Chosen) -> dict[str, Calibrator]:
    """What may keep a small ensemble from misleading itself, beside nothing."""
    near = localized(chosen.radius)
    grown, noise = kalman.multiplicative_inflation(chosen.factor), noisy(chosen.scale)
    make = lambda **settings: kalman_step(kalman.etki, **settings)
    return {
        "nothing": Calibrator("nothing", make()),
        "taper": Calibrator("taper", make(localization=near), where=has_places),
        "correlation-taper": Calibrator(
            "taper of correlations", make(localization=corrected(kalman.correlation_taper))
        ),
        "sampling-error": Calibrator(
            "sampling-error correction", make(localization=corrected(kalman.sampling_error_correction))
        ),
        "inflation": Calibrator("inflation", make(inflation=grown)),
        "noise": Calibrator("noise", make(inflation=noise)),
        "taper-inflation": Calibrator("taper, inflation", make(localization=near, inflation=grown), where=has_places),
        "taper-noise": Calibrator("taper, noise", make(localization=near, inflation=noise), where=has_places),
    }
