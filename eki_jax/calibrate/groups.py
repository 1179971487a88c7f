"""Parameters that belong together, and priors that are known by samples or by another library's distribution."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from eki_jax._checks import quantities, random_key, real
from eki_jax.calibrate.extras import special
from eki_jax.calibrate.priors import Marginal, ask

# Beyond it the normal distribution function is 1 in double precision.
_FARTHEST = 8.2
# Order of the expansions by which correlations of physical variables are computed.
_ORDER = 60
# Draws of a distribution that can do nothing but be drawn from.
_DRAWS = 4096


class Group(NamedTuple):
    """Parameters whose latent values are correlated; see :func:`correlated`.

    Attributes:
        members: parameters by their names.
        factor: lower Cholesky factor of the latent correlations, shape (P, P) with P the entries of all members.
        spec: description that JSON knows, or None.
    """

    members: dict[str, Marginal]
    factor: np.ndarray
    spec: dict[str, Any] | None


def from_samples(samples: Any, *, low: Any = None, high: Any = None) -> Any:
    r"""A prior that is known by draws of it, an earlier posterior for example.

    Each entry's transform takes normal scores to the sorted draws, :math:`T(\Phi^{-1}((i - 1/2) / N)) = x_{(i)}`,
    linear in between and, with the slope of the outermost twentieth of the draws, beyond: tails as of a normal
    variable. With bounds this is done for ``log(x - low)``, ``-log(high - x)`` or their sum, so that no tail reaches
    them. Entries are correlated as their normal scores are (a Gaussian copula).

    Args:
        samples: draws of the parameter, shape (N, ...), N >= 10; or a dict of them, N the same, for parameters that
            belong together.
        low: lower bound, below all draws; for a dict of draws a dict with some of its names.
        high: upper bound, above all draws; the same.

    Returns:
        A :class:`Marginal` for draws of a number; else a :class:`Group`, whose one member is called as the group is.

    Raises:
        TypeError: no real numbers.
        ValueError: fewer than ten draws, draws that are not finite, beyond a bound or all the same; numbers of draws
            that differ; bounds of other parameters.

    >>> draws = np.random.default_rng(0).gamma(3.0, size=5000)
    >>> mean, sd = from_samples(draws).moments()
    >>> bool(abs(mean - draws.mean()) < 0.01), bool(abs(sd - draws.std()) < 0.01)
    (True, True)
    """
    if not isinstance(samples, Mapping):
        draws = _draws("samples", samples)
        bounds = [None if end is None else float(real(n, end)) for n, end in (("low", low), ("high", high))]
        return interpolated(draws, *bounds) if draws.ndim == 1 else _copula({"": draws}, {"": bounds})
    if not samples:
        raise ValueError("samples: an empty dict; wanted the draws of at least one parameter")
    for end, of_names in (("low", low), ("high", high)):
        if of_names is not None and not (isinstance(of_names, Mapping) and set(of_names) <= set(samples)):
            shown = f"for {sorted(of_names)}" if isinstance(of_names, Mapping) else of_names
            raise ValueError(f"{end}: {shown}; wanted names of the samples {list(samples)} with a bound for each")
    ends = {name: [(low or {}).get(name), (high or {}).get(name)] for name in samples}
    return _copula({name: _draws(f"samples[{name!r}]", draws) for name, draws in samples.items()}, ends)


def correlated(members: Mapping[str, Marginal], correlation: Any) -> Group:
    r"""Parameters that are correlated, each with its own prior.

    The latent values are correlated such that the *physical* ones have the given correlations: with
    :math:`T_i = \sum_k t_{ik}\, \mathrm{He}_k / \sqrt{k!}` expanded in Hermite polynomials,

    .. math:: \mathrm{cov}(x_i, x_j) = \sum_{k \ge 1} t_{ik} t_{jk} \rho_{ij}^k ,

    which is solved for the latent correlations :math:`\rho_{ij}` (Cario and Nelson, Modeling and generating random
    vectors with arbitrary marginal distributions and correlation matrix, 1997).

    Args:
        members: parameters by their names, those which the simulator sees.
        correlation: correlations of the physical values, shape (P, P) with P the entries of all members in their
            order, or a number for all pairs.

    Returns:
        A :class:`Group`, to be put into a prior under a name of its own.

    Raises:
        TypeError: members that are no priors of single parameters.
        ValueError: no matrix of correlations; correlations that such variables cannot have.

    >>> from eki_jax import calibrate
    >>> from eki_jax.calibrate import bounded, positive
    >>> soil = correlated({"depth": positive(2.0, 1.0), "slope": bounded(0.0, 1.0)}, 0.5)
    >>> z = np.random.default_rng(0).normal(size=(100_000, 2))
    >>> values = calibrate.joint({"soil": soil}).to_physical({"soil": z})
    >>> round(float(np.corrcoef(values["depth"], values["slope"])[0, 1]), 2)
    0.5
    """
    members = _marginals("members", members)
    size = sum(member.size for member in members.values())
    matrix = np.array(quantities("correlation", correlation), np.float64)
    if matrix.ndim == 0:
        matrix = np.where(np.eye(size, dtype=bool), 1.0, matrix)
    if matrix.shape != (size, size):
        raise ValueError(f"correlation: shape {matrix.shape}; wanted ({size}, {size}), a row for every entry")
    if not (np.all(np.diag(matrix) == 1) and np.array_equal(matrix, matrix.T) and np.all(np.abs(matrix) <= 1)):
        raise ValueError("correlation: no matrix of correlations; wanted a symmetric one with ones on its diagonal")
    latent = np.eye(size)
    coefficients = np.concatenate([_hermite(member) for member in members.values()])
    for i in range(size):
        for j in range(i):
            latent[i, j] = latent[j, i] = _latent_correlation(coefficients[i], coefficients[j], matrix[i, j])
    return group_of(members, latent, "correlation", _spec_of_members(members, latent))


def from_distribution(distribution: Any, *, key: Any = None) -> Any:
    """A prior from another library's distribution.

    What is used is, in this order: ``icdf`` (NumPyro) or ``ppf`` (SciPy), the inverse distribution function q, as the
    transform ``q(Phi(z))``, exact; else 4,096 draws by ``sample(key, (N,))`` (NumPyro) or ``rvs`` (SciPy), as in
    :func:`from_samples`, with the ``lower_bound`` and ``upper_bound`` of a ``support`` that has them. Distributions of
    several variables that belong together have no inverse and are drawn from; what ties their entries together is kept
    as far as correlations do, so that those of a simplex do not sum to one. Some of NumPyro's have an inverse only if
    TensorFlow Probability is installed. The entries of a batch are independent. The transform of an inverse in float32
    ends at five standard deviations, beyond which float32 has no probabilities.

    Args:
        distribution: object with ``icdf``, ``ppf``, ``sample`` or ``rvs``; frozen, that is with its own parameters.
        key: JAX random key of the draws, where they are needed.

    Returns:
        A :class:`Marginal`, or a :class:`Group` for one of several variables, or for a batch that is drawn from. A
        calibration with it can be saved, and loaded with ``prior=`` unless it was drawn.

    Raises:
        TypeError: an object with none of these, or one that is not frozen; one that has to be drawn from, without a
            key.
        ValueError: an inverse distribution function that is not finite; draws that are none of a prior.

    >>> import scipy.stats
    >>> mean, sd = from_distribution(scipy.stats.beta(2, 3)).moments()
    >>> round(float(mean), 6), round(float(sd), 6)
    (0.4, 0.2)
    """
    if isinstance(distribution, type):
        raise TypeError(f"distribution: {distribution!r}; wanted one with its parameters, not a class")
    quantile = getattr(distribution, "icdf", None) or getattr(distribution, "ppf", None)
    why = "it has no icdf or ppf"
    if quantile is not None and not getattr(distribution, "event_shape", ()):
        try:
            return _of_quantiles(quantile, getattr(distribution, "cdf", None))
        except (NotImplementedError, ImportError) as error:  # some of NumPyro's
            why = str(error) or "its icdf is not implemented"
        except TypeError as error:
            raise _unusable(distribution, error) from None
    if not (hasattr(distribution, "sample") or hasattr(distribution, "rvs")):
        raise TypeError(f"distribution: {distribution!r}; wanted an object with icdf, ppf, sample or rvs")
    if key is None:
        raise TypeError(f"key: None; wanted a JAX random key, since this distribution has to be drawn from: {why}")
    random_key("key", key)
    if not hasattr(distribution, "sample"):
        numbers = np.random.default_rng(np.asarray(jax.random.bits(key, (4,))))
        return _drawn(distribution, lambda: distribution.rvs(size=_DRAWS, random_state=numbers))
    support = getattr(distribution, "support", None)
    ends = {"low": getattr(support, "lower_bound", None), "high": getattr(support, "upper_bound", None)}
    bounds = {name: float(end) for name, end in ends.items() if end is not None and np.ndim(end) == 0}
    return _drawn(distribution, lambda: distribution.sample(key, (_DRAWS,)), **bounds)


def _drawn(distribution: Any, draw: Callable[[], Any], **bounds: Any) -> Any:
    """The prior of a distribution's draws; errors are those of :func:`from_samples` and name the distribution."""
    try:
        return from_samples(draw(), **bounds)
    except TypeError as error:
        raise _unusable(distribution, error) from None
    except ValueError as error:
        raise ValueError(f"distribution: {distribution!r} has draws that are none of a prior ({error})") from None


def _unusable(distribution: Any, error: TypeError) -> TypeError:
    return TypeError(f"distribution: {distribution!r} ({error}); wanted a frozen one, gamma(2.0)")


def _spec_of_members(members: dict[str, Marginal], latent: np.ndarray) -> dict[str, Any] | None:
    specs = {name: member.spec for name, member in members.items()}
    return None if None in specs.values() else {"kind": "group", "members": specs, "latent": latent.tolist()}


def _marginals(name: str, members: Any) -> dict[str, Marginal]:
    if not isinstance(members, Mapping) or not members:
        raise TypeError(f"{name}: {members!r}; wanted a dict of parameters, such as normal(0.0, 1.0)")
    for member, prior in members.items():
        if not isinstance(prior, Marginal):
            raise TypeError(f"{name}[{member!r}]: {prior!r}; wanted the prior of one parameter, such as normal(0, 1)")
    return dict(members)


def group_of(members: dict[str, Marginal], latent: np.ndarray, name: str, spec: dict[str, Any] | None) -> Group:
    """A :class:`Group`, or an error where its latent correlations are no covariance."""
    least = np.linalg.eigvalsh(latent)[0]
    if not least > len(latent) * np.finfo(np.float64).eps:
        raise ValueError(
            f"{name}: the least eigenvalue of the latent correlations is {least:.3g}; wanted correlations that these "
            "variables can have together, and none of 1 or -1"
        )
    return Group(members, np.linalg.cholesky(latent), spec)


def _draws(name: str, samples: Any) -> np.ndarray:
    draws = np.asarray(quantities(name, np.asarray(samples)), np.float64)
    if draws.ndim == 0 or len(draws) < 10:
        raise ValueError(f"{name}: of shape {draws.shape}; wanted at least ten draws, (N, ...)")
    ask(np.isfinite(draws), name, draws, "wanted finite draws")
    if not np.all(draws.max(axis=0) > draws.min(axis=0)):
        raise ValueError(f"{name}: draws that are all the same; wanted a parameter that varies")
    return draws


def _of_quantiles(quantile: Callable[[Any], Any], cdf: Callable[[Any], Any] | None) -> Marginal:
    functions, middle = special(), np.asarray(quantities("its median", np.asarray(quantile(0.5))))
    if not np.all(np.isfinite(middle)):
        raise ValueError(f"distribution: its median is {middle}; wanted finite quantiles")
    farthest = _FARTHEST if middle.dtype == np.float64 else 5.0

    def transform(z: np.ndarray) -> np.ndarray:
        return np.asarray(quantile(functions.ndtr(np.clip(z, -farthest, farthest))), np.float64)

    def inverse(x: np.ndarray) -> np.ndarray:
        assert cdf is not None
        return functions.ndtri(np.asarray(cdf(x), np.float64))

    return Marginal(middle.shape, transform, None if cdf is None else inverse, None)


def _scores(number: int) -> np.ndarray:
    return special().ndtri((np.arange(number) + 0.5) / number)


def interpolated(draws: np.ndarray, low: float | None = None, high: float | None = None) -> Marginal:
    """The prior of one number, from its draws and its bounds."""
    known, scores = np.sort(draws), _scores(len(draws))
    least, most = -np.inf if low is None else low, np.inf if high is None else high
    ask(known[0] > least, "low", np.array(least), f"wanted bounds below all draws, the least is {known[0]:.6g}")
    ask(known[-1] < most, "high", np.array(most), f"wanted bounds above all draws, the most is {known[-1]:.6g}")
    edges = np.nextafter(least, np.inf), np.nextafter(most, -np.inf)
    free = _free(known, low, high)
    tail = max(2, len(draws) // 20)
    slopes = [
        np.polyfit(scores[part], free[part], 1)[0] if np.ptp(free[part]) else 0.0
        for part in (slice(tail), slice(-tail, None))
    ]

    def transform(z: np.ndarray) -> np.ndarray:
        below, above = np.minimum(z - scores[0], 0), np.maximum(z - scores[-1], 0)
        return np.clip(_bound(np.interp(z, scores, free) + slopes[0] * below + slopes[1] * above, low, high), *edges)

    def inverse(x: np.ndarray) -> np.ndarray:
        x = _free(x, low, high)
        below, above = np.minimum(x - free[0], 0), np.maximum(x - free[-1], 0)
        ends = [part / slope if slope else part * 0 for part, slope in zip((below, above), slopes, strict=True)]
        return np.interp(x, free, scores) + ends[0] + ends[1]

    return Marginal((), transform, inverse, {"kind": "samples", "samples": known.tolist(), "low": low, "high": high})


def _free(x: np.ndarray, low: float | None, high: float | None) -> np.ndarray:
    """Bounded numbers as ones without bounds."""
    if low is None and high is None:
        return x
    above = np.zeros(np.shape(x)) if low is None else np.log(x - low)
    return above if high is None else above - np.log(high - x)


def _bound(y: np.ndarray, low: float | None, high: float | None) -> np.ndarray:
    """The inverse of :func:`_free`."""
    if low is None and high is None:
        return y
    with np.errstate(over="ignore", under="ignore"):
        if high is None:
            return low + np.exp(y)
        if low is None:
            return high - np.exp(-y)
        return np.where(y > 0, high - (high - low) / (1 + np.exp(y)), low + (high - low) / (1 + np.exp(-y)))


def _copula(samples: dict[str, np.ndarray], bounds: Mapping[str, Any]) -> Group:
    """Parameters from their draws, with the correlations of the normal scores."""
    if len({len(draws) for draws in samples.values()}) > 1:
        raise ValueError(f"samples: {[len(draws) for draws in samples.values()]} draws; wanted as many of each")
    columns, members = [], {}
    for name, draws in samples.items():
        flat = draws.reshape(len(draws), -1)
        columns.append(flat)
        members[name] = stacked([interpolated(column, *bounds[name]) for column in flat.T], draws.shape[1:])
    rows = np.concatenate(columns, axis=1)
    ranks = np.argsort(np.argsort(rows, axis=0, kind="stable"), axis=0, kind="stable")
    latent = np.atleast_2d(np.corrcoef(_scores(len(rows))[ranks], rowvar=False))
    return group_of(members, latent, "samples", _spec_of_members(members, latent))


def stacked(entries: list[Marginal], shape: tuple[int, ...]) -> Marginal:
    """An array whose entries have priors of their own."""
    if not shape:
        return entries[0]

    def each(functions: list[Callable[[np.ndarray], np.ndarray]]) -> Callable[[np.ndarray], np.ndarray]:
        def apply(values: np.ndarray) -> np.ndarray:
            flat = values.reshape(*values.shape[: values.ndim - len(shape)], -1)
            return np.stack([f(flat[..., i]) for i, f in enumerate(functions)], axis=-1).reshape(values.shape)

        return apply

    spec = {"kind": "stack", "shape": list(shape), "entries": [entry.spec for entry in entries]}
    inverses = [entry.inverse for entry in entries if entry.inverse is not None]
    return Marginal(shape, each([entry.transform for entry in entries]), each(inverses), spec)


def _hermite(marginal: Marginal) -> np.ndarray:
    """The coefficients of the transforms in normalized Hermite polynomials, shape (entries, order)."""
    nodes, weights, values = marginal.at_nodes()
    polynomials = np.ones((_ORDER, len(nodes)))
    polynomials[1] = nodes
    for k in range(1, _ORDER - 1):
        polynomials[k + 1] = (nodes * polynomials[k] - np.sqrt(k) * polynomials[k - 1]) / np.sqrt(k + 1)
    return (values.reshape(len(nodes), -1).T * weights) @ polynomials.T


def _latent_correlation(first: np.ndarray, second: np.ndarray, wanted: float) -> float:
    """The latent correlation with which two variables of these coefficients have the wanted correlation."""
    scale = np.linalg.norm(first[1:]) * np.linalg.norm(second[1:])
    polynomial = np.polynomial.Polynomial(np.concatenate([[0.0], first[1:] * second[1:] / scale]))
    least, most = sorted((float(polynomial(-1.0)), float(polynomial(1.0))))
    if not least < wanted < most:
        raise ValueError(f"correlation: {wanted}; wanted one between {least:.3g} and {most:.3g}, of these variables")
    low, high = -1.0, 1.0
    rising = polynomial(1.0) > polynomial(-1.0)
    for _ in range(60):
        middle = 0.5 * (low + high)
        if (polynomial(middle) < wanted) == rising:
            low = middle
        else:
            high = middle
    return 0.5 * (low + high)
