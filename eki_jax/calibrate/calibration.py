"""The front door of a calibration: physical values out, outputs in, and a posterior at the end."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eki_jax._checks import SHARE, one_of, real, whole
from eki_jax._checks import path as path_of
from eki_jax.calibrate.history import Iteration, decoded, encoded, history_of_state, state_of_history
from eki_jax.calibrate.joint import JointPrior, from_spec, joint
from eki_jax.calibrate.methods import predicting, solver_of, started
from eki_jax.calibrate.observations import Observations, observations
from eki_jax.calibrate.plotting import Picture, draw
from eki_jax.calibrate.posterior import Posterior, in_members, posterior_of
from eki_jax.calibrate.report import Report, commonest
from eki_jax.calibrate.results import collected
from eki_jax.calibrate.storage import read, write
from eki_jax.solvers import Reason, Solver, StepRefused, kalman

_KIND, _VERSION = "eki_jax calibration", 1
_BEYOND = "outputs far beyond all others', or a misfit that overflows"


class Calibration:
    r"""A calibration of a simulator that is run elsewhere: ask for members, run them, tell their outputs.

    Between them stands a method for ensembles, by default the deterministic Kalman step
    (:func:`eki_jax.kalman.etki`) with step sizes from :func:`eki_jax.kalman.data_misfit_controller`, which leads from
    prior to posterior. The ensemble lives in the latent space of :mod:`eki_jax.calibrate.priors`; the residuals are
    divided by the noise in double precision, before anything else is done with them.

    Args:
        prior: priors of the parameters by their names, such as :func:`positive`, :func:`bounded` and :func:`normal`;
            groups of them are :func:`correlated`.
        data: data y by the outputs' names, arrays of any shape; NaN, or masked, where nothing was observed.
        noise: covariance Gamma of the noise (variances, not standard deviations): a dict with the outputs' names of a
            number, the output's shape, a matrix (N, N) for N numbers, or a :class:`eki_jax.kalman.LowRankNoise`; or one
            of these for all outputs.
        particles: number of members J, at least 2; more than the latent parameters for a posterior covariance of full
            rank. For :func:`eki_jax.kalman.uki` the number of its points, 2 P + 1.
        seed: number from which everything random follows. The first members are draws of the prior, moved so that their
            latent mean and covariance are the prior's where they are more than the latent parameters.
        method: method, "etki" (deterministic) or "enkf" (with perturbed data); or a function ``method(noise_covariance)
            -> solver`` of the whitened residuals' covariance, ones of shape (M,), that returns a
            :class:`eki_jax.Solver` (with ``forward=None``). What happens to failed members is then the solver's.
        localization: weights of every output for every parameter, as the methods of :mod:`eki_jax.kalman` take them:
            :func:`eki_jax.kalman.taper` and :func:`eki_jax.kalman.update_groups` with the names of the prior's entries
            and of the outputs, coordinates in their shapes (one row of a :func:`correlated` group of several), those
            not observed included; arrays of weights with rows and columns in the order in which prior and data are
            given; None for none. A method of one's own has its own.
        inflation: growth of the members' deviations after a step, such as
            :func:`eki_jax.kalman.multiplicative_inflation`; None for none. The same.
        impute: largest share, in [0, 1), of a member's observed outputs that may be NaN: these are given the mean of
            the complete members'. By default none may be, and such a member fails.
        most_iterations: number of steps after which the calibration ends even though the method has not.
        most_refusals: number of steps refused in a row (``report.moved``) after which ``tell`` raises.

    Attributes:
        prior: transforms between latent and physical values, a :class:`JointPrior`.
        history: list of an :class:`Iteration` for every step that was taken.

    Raises:
        TypeError: an argument of another kind.
        ValueError: data, noise and prior that do not fit; numbers out of their ranges.

    >>> from eki_jax import calibrate
    >>> def simulate(member):
    ...     return {"height": member["speed"] * np.array([1.0, 2.0]) - member["gravity"] * np.array([0.5, 2.0])}
    >>> calibration = calibrate.Calibration(
    ...     prior={"speed": calibrate.positive(8.0, 4.0), "gravity": calibrate.normal(10.0, 1.0)},
    ...     data={"height": [5.1, 0.2]},
    ...     noise={"height": 0.1**2},
    ...     particles=40,
    ... )
    >>> while not calibration.done:
    ...     report = calibration.tell([simulate(member) for member in calibration.ask()])
    >>> posterior = calibration.posterior()
    >>> bool(abs(posterior.mean["speed"] - 10.0) < 0.5), bool(posterior.sd["speed"] < 0.5)
    (True, True)

    Iglesias, Law and Stuart, Inverse Problems 29, 2013; Huang, Huang, Reich and Stuart, Inverse Problems 38, 2022.
    """

    def __init__(
        self,
        prior: Mapping[str, Any],
        data: Mapping[str, Any],
        noise: Any,
        particles: int,
        seed: int = 0,
        *,
        method: str | Callable[[np.ndarray], Solver] = "etki",
        localization: Any = None,
        inflation: kalman.Inflation | None = None,
        impute: float = 0.0,
        most_iterations: int = 100,
        most_refusals: int = 3,
    ) -> None:
        self.prior: JointPrior = joint(prior)
        self._observations: Observations = observations(data, noise)
        self._given = {"data": encoded("data", data), "noise": encoded("noise", noise)}
        self._particles = whole("particles", particles, 2)
        self._seed = whole("seed", seed, 0)
        self._impute = float(real("impute", impute, SHARE))
        self._most_iterations = whole("most_iterations", most_iterations)
        self._most_refusals = whole("most_refusals", most_refusals)
        self._method = method if isinstance(method, str) else None
        settings = {"localization": localization, "inflation": inflation}
        self._needs = [name for name, value in settings.items() if value is not None]
        self._by_output = localization is not None
        self._solver = solver_of(method, self.prior, self._observations, self._seed, localization, inflation)
        self._state = started(self._solver, self.prior, self._particles, self._seed)
        if self._needs:  # what does not fit is not to be found out after the first runs
            blank = np.zeros((self._particles, len(self._observations.data)))
            jax.eval_shape(self._solver.update, self._state, *self._told(blank, self._observations.whitened(blank)))
        self._healthy = np.ones(self._particles, bool)
        self._refused = 0
        self.history: list[Iteration] = []

    def __repr__(self) -> str:
        end = ", done" if self.done else ""
        return (
            f"<Calibration: {self.prior.size} numbers of {len(self.prior.shapes)} parameters, "
            f"{self._observations.size} data, {self._particles} particles, {self.iteration} iterations{end}>"
        )

    @property
    def done(self) -> bool:
        """Whether the method is at its end, or ``most_iterations`` steps were taken."""
        return self._is_at_end or self.iteration >= self._most_iterations

    @property
    def iteration(self) -> int:
        """The number of steps taken."""
        return len(self.history)

    @property
    def state(self) -> Any:
        """The method's state, whose particles are latent values by the names of the prior's entries."""
        return self._state

    @property
    def _is_at_end(self) -> bool:
        return bool(self._solver.done(self._state))

    def ask(self) -> list[dict[str, Any]]:
        """The members whose outputs are wanted next; the same ones until they are told.

        Returns:
            A list of J dicts of physical values by the parameters' names, NumPy numbers and arrays of float64.

        Raises:
            RuntimeError: the calibration is done.
        """
        self._check_open("ask")
        return in_members(self.prior.to_physical(self._latent()))

    def tell(self, results: Any) -> Report:
        """Take a step with the outputs of the members that :meth:`ask` gave, in their order.

        Args:
            results: list of one result for each member: a dict of arrays in the shapes of the data, of any real dtype;
                None, NaN or an exception for one that failed.

        Returns:
            The :class:`Report` of the step, which prints as one line.

        Raises:
            RuntimeError: the calibration is done.
            TypeError: results of another kind.
            ValueError: outputs that do not fit the data; the error names member and output.
            eki_jax.StepRefused: fewer than two members survived, or this was the last of ``most_refusals`` refused
                steps in a row; it names the reason and the remedy.

        Whatever is raised, the calibration is what it was before the call.
        """
        self._check_open("tell")
        wanted, size = self._observations, self._particles
        found = collected(results, wanted.shapes, wanted.observed, size, self._impute)
        latent = self._latent()
        parameters = self.prior.to_physical(latent)
        failures = dict(found.failures)
        for j in np.flatnonzero(~_finite_rows(latent)):
            failures.setdefault(int(j), "its parameters are not finite")
        _check_survivors(failures, size)
        found.rows[list(failures)] = np.nan
        residuals = wanted.whitened(found.rows)
        state, info = self._solver.update(self._state, *self._told(found.rows, residuals))
        healthy = np.isfinite(np.asarray(info.losses)) & np.isfinite(residuals).all(axis=1)
        for j in np.flatnonzero(~healthy):
            failures.setdefault(int(j), _BEYOND)
        _check_survivors(failures, size)
        moved, reason = bool(info.moved), Reason(int(info.reason))
        refused = 0 if moved else self._refused + 1
        if refused >= self._most_refusals:
            raise StepRefused(reason, f"{refused} steps in a row were refused")
        iteration = self.iteration + moved
        report = Report(
            iteration=iteration,
            time=float(state.time) if hasattr(state, "time") else None,
            step_size=float(info.step_size),
            misfit=float(np.mean(residuals[healthy] ** 2)),
            misfit_of_mean=float(np.mean(residuals[healthy].mean(axis=0) ** 2)),
            spread=_spread(_rows(predicting(self._solver, state, healthy))),
            particles=size,
            failures=failures,
            masked=wanted.masked,
            imputed=found.imputed,
            constant=_constant(wanted, found.rows[healthy]),
            moved=moved,
            reason=reason,
            done=bool(self._solver.done(state)) or iteration >= self._most_iterations,
        )
        if moved:
            misfits = np.full(size, np.nan)
            misfits[healthy] = 0.5 * np.sum(residuals[healthy] ** 2, axis=1)
            self.history.append(Iteration(report, parameters, wanted.split(found.rows), misfits, healthy))
            self._healthy = healthy
        self._state, self._refused = state, refused
        return report

    def posterior(self, probabilities: Sequence[float] = (0.05, 0.25, 0.5, 0.75, 0.95)) -> Posterior:
        """What is known of the parameters now, in physical units.

        Members that failed in the last step, and were redrawn or stayed where they were, are left out.

        Args:
            probabilities: probabilities of the quantiles, each in [0, 1].

        Returns:
            The :class:`Posterior`.

        Raises:
            ValueError: probabilities out of their range.

        Warns with a UserWarning where the calibration is not at its end, or where too few members are healthy for a
        covariance of full rank.
        """
        if not (self._is_at_end or (self.done and self._method is None)):
            after = f"after {self.iteration} iterations" + (
                f" at time {float(self._state.time):.3g} of 1" if hasattr(self._state, "time") else ""
            )
            warnings.warn(
                f"posterior: the calibration is not at its end, {after}; wanted calls of ask and tell until "
                "calibration.done, or a larger most_iterations",
                UserWarning,
                stacklevel=2,
            )
        latent, least = predicting(self._solver, self._state, self._healthy), self.prior.size + 1
        if (number := len(_rows(latent))) < least:
            warnings.warn(
                f"posterior: {number} healthy members for {self.prior.size} latent parameters, so that the covariance "
                f"has at most rank {number - 1}; wanted at least {least} particles",
                UserWarning,
                stacklevel=2,
            )
        return posterior_of(self.prior.to_physical(latent), probabilities)

    def plot(self, what: str = "all", *, predictions: Any = None) -> Any:
        """A picture of the calibration so far.

        Args:
            what: kind of picture: "parameters" with their bands against the iterations and the prior, an array of more
                than six numbers as it is now, against its entries; "data" beside the predictions of the first members
                and of the last ones; "pairs" of at most six numbers, of every parameter some; or "all" three.
            predictions: results of the members of :meth:`posterior`, as ``tell`` takes them: what the posterior
                predicts, ``map_particles(simulate, calibration.posterior().members())``. By default the picture has the
                outputs of the last members that were run, which are those before the last step.

        Returns:
            A :class:`matplotlib.figure.Figure`; ``savefig(path)`` writes it.

        Raises:
            ImportError: matplotlib is not installed; it comes with the extra ``calibrate``.
            ValueError: another kind, or predictions that do not fit the data.
        """
        one_of("what", what, ("parameters", "data", "pairs", "all"))
        wanted, outputs = self._observations, None
        if predictions is not None:
            found = collected(predictions, wanted.shapes, wanted.observed, None, 0.0, "predictions")
            fine = [j for j in range(len(predictions)) if j not in found.failures]
            if not fine:
                raise ValueError(f"predictions: {len(predictions)} of them, none with outputs; wanted one at least")
            outputs = wanted.split(found.rows[fine])
        current = self.prior.to_physical(predicting(self._solver, self._state, self._healthy))
        return draw(Picture(self.prior, wanted, self.history, current, outputs), what)

    def save(self, path: Path | str) -> None:
        """Write all of it to a file, from which :meth:`load` goes on bit for bit.

        The file has a JSON header and arrays, in the format of :func:`numpy.savez`, and no pickle. It is whole or not
        there at all.

        Args:
            path: name of the file; one that is there is replaced.

        Raises:
            TypeError: no path.
            ValueError: a folder, or a file in a folder that is not there.
        """
        path = path_of("path", path)
        if path.is_dir() or not path.absolute().parent.is_dir():
            what = "is a folder" if path.is_dir() else "is in a folder that is not there"
            raise ValueError(f"path: {path} {what}; wanted the name of a file in one that is")
        header, arrays = state_of_history(self.history)
        leaves = [_plain(leaf) for leaf in jax.tree.leaves(self._state)]
        arrays |= {f"state/{i}": leaf for i, leaf in enumerate(leaves)}
        arrays |= {"healthy": self._healthy}
        for _, given in self._given.values():
            arrays |= given
        header |= {
            "kind": _KIND,
            "version": _VERSION,
            "prior": self.prior.specs,
            "method": self._method,
            "needs": self._needs,
            "settings": {
                "particles": self._particles,
                "seed": self._seed,
                "impute": self._impute,
                "most_iterations": self._most_iterations,
                "most_refusals": self._most_refusals,
            },
            "given": {name: description for name, (description, _) in self._given.items()},
            "refused": self._refused,
        }
        write(path, header, arrays)

    @classmethod
    def load(
        cls,
        path: Path | str,
        *,
        prior: Mapping[str, Any] | None = None,
        method: Callable[[np.ndarray], Solver] | None = None,
        localization: Any = None,
        inflation: kalman.Inflation | None = None,
    ) -> Calibration:
        """The calibration that :meth:`save` wrote.

        Args:
            path: name of the file.
            prior: priors that no file can hold, by their names: those of :func:`from_distribution`.
            method: method, where it was a function, which no file can hold.
            localization: localization, where there was one.
            inflation: inflation, where there was one.

        Raises:
            FileNotFoundError: there is no such file.
            TypeError: a prior or method that is missing; no path.
            ValueError: a file of another kind or version; a state of another method or precision.
        """
        header, arrays = read(path_of("path", path))
        if not isinstance(header, dict) or header.get("kind") != _KIND or header.get("version") != _VERSION:
            raise ValueError(f"path: {path}, no calibration of version {_VERSION}; wanted a file that save() wrote")
        if header["method"] is None and method is None:
            raise TypeError("method: None; wanted the function that the saved calibration had, which no file can hold")
        settings = {"localization": localization, "inflation": inflation}
        for name in header["needs"]:
            if settings[name] is None:
                raise TypeError(f"{name}: None; wanted that of the saved calibration, which no file can hold")
        if prior is not None and not isinstance(prior, Mapping):
            raise TypeError(f"prior: a {type(prior).__name__}; wanted a dict of the priors that the file does not hold")
        given = dict(prior or {})
        entries = {}
        for name, spec in header["prior"].items():
            if spec is None and name not in given:
                raise TypeError(f"prior: without {name!r}; wanted the distribution that it had, which no file can hold")
            entries[name] = given.pop(name) if spec is None else from_spec(spec)
        if given:
            raise ValueError(f"prior: {sorted(given)}; wanted those alone that the file does not hold")
        calibration = cls(
            entries,
            decoded(header["given"]["data"], arrays),
            decoded(header["given"]["noise"], arrays),
            method=method if header["method"] is None else header["method"],  # type: ignore[arg-type]  # asked above
            **settings,
            **header["settings"],
        )
        leaves, structure = jax.tree.flatten(calibration._state)
        saved = [arrays[f"state/{i}"] for i in range(sum(name.startswith("state/") for name in arrays))]
        found = [(leaf.shape, str(leaf.dtype)) for leaf in saved]
        wanted = [(leaf.shape, str(leaf.dtype)) for leaf in map(_plain, leaves)]
        if found != wanted:
            raise ValueError(
                f"path: {path}, a state of {found}; wanted {wanted}, those of this prior and method in this precision "
                "(jax.config jax_enable_x64)"
            )
        restored = [_like(leaf, new) for leaf, new in zip(leaves, saved, strict=True)]
        calibration._state = jax.tree.unflatten(structure, restored)
        calibration._healthy = arrays["healthy"]
        calibration._refused = header["refused"]
        calibration.history = history_of_state(header, arrays)
        return calibration

    def _latent(self) -> dict[str, np.ndarray]:
        return {name: np.asarray(values) for name, values in self._solver.ensemble(self._state).items()}

    def _told(self, rows: np.ndarray, residuals: np.ndarray) -> tuple[Any, Any]:
        """Outputs and targets of the solver's step, in its dtype: residuals, by outputs for a localization, and zeros.

        Args:
            rows: outputs of the members in a row each, shape (J, N).
            residuals: whitened residuals of these, shape (J, M).
        """
        dtype = jax.tree.leaves(self._solver.ensemble(self._state))[0].dtype
        with np.errstate(over="ignore"):
            units = self._observations.scaled(rows) if self._by_output else residuals
            told = jax.tree.map(lambda part: jnp.asarray(part.astype(dtype)), units)
        return told, jax.tree.map(lambda part: jnp.zeros(part.shape[1:], dtype), told)

    def _check_open(self, name: str) -> None:
        if self.done:
            raise RuntimeError(
                f"{name}: the calibration is done after {self.iteration} iterations; wanted posterior(), or a new "
                "Calibration"
            )


def _plain(leaf: Any) -> np.ndarray:
    """An array of a state as numbers, JAX's keys included."""
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf)


def _like(leaf: Any, numbers: np.ndarray) -> jax.Array:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(jnp.asarray(numbers), impl=jax.random.key_impl(leaf))
    return jnp.asarray(numbers)


def _check_survivors(failures: dict[int, str], particles: int) -> None:
    """Raise where fewer than two members are left, with the commonest reason."""
    survivors = particles - len(failures)
    if survivors < 2:
        said = f"{survivors} of {particles} members survived ({commonest(failures)})"
        raise StepRefused(Reason.FEW_PARTICLES, f"step refused: {said}")


def _rows(tree: Mapping[str, Any]) -> np.ndarray:
    return np.concatenate([np.asarray(values, np.float64) for values in tree.values()], axis=1)


def _finite_rows(latent: Mapping[str, np.ndarray]) -> np.ndarray:
    return np.isfinite(_rows(latent)).all(axis=1)


def _spread(rows: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.var(rows, axis=0))))


def _constant(wanted: Observations, rows: np.ndarray) -> tuple[str, ...]:
    """The outputs none of whose observed numbers varies."""
    varies = wanted.split(((rows != rows[0]) & wanted.observed).any(axis=0)[None])
    observed = wanted.split(wanted.observed[None])
    return tuple(name for name in varies if observed[name].any() and not varies[name].any())
