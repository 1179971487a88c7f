r"""Priors in physical units, each a transform of standard normal numbers.

The ensemble of a calibration lives in a *latent* space, where the prior is N(0, I) whatever the parameters are: its
covariance is known exactly, and no step leaves the bounds. A parameter's transform leads from there to its physical
values,

.. math:: x = T(z), \qquad z \sim N(0, 1),

and is chosen so that x has the mean and the standard deviation that were asked for, those of the physical variable.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from eki_jax._checks import Within, arrays, random_key, real, whole
from eki_jax.calibrate.extras import extra

_PROBABILITY = Within("a number in (0, 1)", low=0, high=1)
# Beyond it the normal distribution function is 1 in double precision.
_FARTHEST = 8.2
# Order of the expansions by which correlations of physical variables are computed.
_ORDER = 60
# Draws of a distribution that can do nothing but be drawn from.
_DRAWS = 4096


class Marginal(NamedTuple):
    """A parameter with its prior: a transform, entry by entry, of standard normal numbers.

    Attributes:
        shape: shape of the parameter, () for a number.
        transform: function from latent values, shape (..., *shape), to physical ones of the same shape, increasing
            in each entry.
        inverse: function from physical values back to latent ones, or None where it is not known.
        spec: description that JSON knows and from which the prior is made again, ``{"kind": ..., ...}``; None for a
            prior that no file can hold.
    """

    shape: tuple[int, ...]
    transform: Callable[[np.ndarray], np.ndarray]
    inverse: Callable[[np.ndarray], np.ndarray] | None
    spec: dict[str, Any] | None

    @property
    def size(self) -> int:
        """The number of entries."""
        return int(np.prod(self.shape, dtype=int))

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """The mean and the standard deviation of the physical variable, by quadrature, each of the parameter's shape.

        >>> mean, sd = positive(mean=2.0, sd=1.0).moments()
        >>> round(float(mean), 6), round(float(sd), 6)
        (2.0, 1.0)
        """
        nodes, weights = _quadrature()
        values = self.transform(np.broadcast_to(_column(nodes, self.shape), (len(nodes), *self.shape)))
        mean = np.tensordot(weights, values, axes=1)
        return mean, np.sqrt(np.tensordot(weights, (values - mean) ** 2, axes=1))


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


def normal(mean: Any, sd: Any, *, shape: tuple[int, ...] | None = None) -> Marginal:
    """A normal prior, without bounds.

    Args:
        mean: mean of the parameter, a number or an array.
        sd: standard deviation, > 0, a number or an array.
        shape: shape of the parameter; by default that of ``mean`` and ``sd``.

    Returns:
        The :class:`Marginal`, with ``x = mean + sd z``.

    Raises:
        TypeError: no real numbers.
        ValueError: a standard deviation that is not positive; shapes that do not fit.

    >>> float(normal(3.0, 5.0).transform(np.array(1.0)))
    8.0
    """
    mean, sd = _entries(shape, mean=mean, sd=sd)
    _ask(sd > 0, "sd", sd, "wanted standard deviations > 0")
    return Marginal(
        mean.shape, lambda z: mean + sd * z, lambda x: (x - mean) / sd, _spec("normal", mean.shape, mean=mean, sd=sd)
    )


def positive(mean: Any, sd: Any, *, shape: tuple[int, ...] | None = None) -> Marginal:
    """A prior of a positive parameter: log-normal, with this mean and standard deviation of the parameter itself.

    Args:
        mean: mean of the parameter (not of its logarithm), > 0, a number or an array.
        sd: standard deviation of the parameter, > 0, a number or an array.
        shape: shape of the parameter; by default that of ``mean`` and ``sd``.

    Returns:
        The :class:`Marginal`; see :func:`lognormal`.

    Raises:
        TypeError: no real numbers.
        ValueError: a mean or a standard deviation that is not positive; shapes that do not fit.

    >>> rate = positive(mean=2.0, sd=1.0)
    >>> rate.transform(np.array([-40.0, 0.0, 2.0])).round(3)
    array([0.   , 1.789, 4.601])
    """
    mean, sd = _entries(shape, mean=mean, sd=sd)
    _ask(mean > 0, "mean", mean, "wanted means > 0, or lognormal(..., low=) for another bound")
    return lognormal(mean, sd)


def lognormal(
    mean: Any, sd: Any, *, low: Any = None, high: Any = None, shape: tuple[int, ...] | None = None
) -> Marginal:
    r"""A log-normal prior of what lies above a bound, or below one.

    .. math:: x = l + e^{\mu + \sigma z}, \qquad \sigma^2 = \log\left(1 + \frac{s^2}{(m - l)^2}\right),
              \quad \mu = \log(m - l) - \tfrac12 \sigma^2

    with m the mean, s the standard deviation of x, and l the bound; mirrored for an upper one.

    Args:
        mean: mean of the parameter, on the right side of the bound, a number or an array.
        sd: standard deviation of the parameter, > 0, a number or an array.
        low: lower bound, a number or an array; 0 where no bound is given.
        high: upper bound, in the place of a lower one.
        shape: shape of the parameter; by default that of the arguments.

    Returns:
        The :class:`Marginal`.

    Raises:
        TypeError: no real numbers.
        ValueError: two bounds; a mean beyond the bound; a standard deviation that is not positive; shapes that do not
            fit.

    >>> mean, sd = lognormal(-1.0, 0.5, high=0.0).moments()
    >>> round(float(mean), 6), round(float(sd), 6)
    (-1.0, 0.5)
    """
    if low is not None and high is not None:
        raise ValueError(f"high: {high}, with low: {low}; wanted one of them, or bounded(low, high, mean, sd)")
    sign = 1.0 if high is None else -1.0
    bound = (0.0 if low is None else low) if high is None else high
    mean, sd, bound = _entries(shape, mean=mean, sd=sd, bound=bound)
    above = sign * (mean - bound)
    _ask(sd > 0, "sd", sd, "wanted standard deviations > 0")
    _ask(above > 0, "mean", mean, f"wanted means {'above' if sign > 0 else 'below'} the bound {_shown(bound)}")
    sigma = np.sqrt(np.log1p((sd / above) ** 2))
    mu = np.log(above) - 0.5 * sigma**2
    edge = np.nextafter(bound, sign * np.inf)

    def transform(z: np.ndarray) -> np.ndarray:
        with np.errstate(under="ignore"):
            x = bound + sign * np.exp(mu + sign * sigma * z)
        return np.maximum(x, edge) if sign > 0 else np.minimum(x, edge)

    def inverse(x: np.ndarray) -> np.ndarray:
        return sign * (np.log(sign * (x - bound)) - mu) / sigma

    bounds = {"low": bound} if sign > 0 else {"high": bound}
    return Marginal(mean.shape, transform, inverse, _spec("lognormal", mean.shape, mean=mean, sd=sd, **bounds))


def bounded(low: Any, high: Any, mean: Any = None, sd: Any = None, *, shape: tuple[int, ...] | None = None) -> Marginal:
    r"""A prior of a parameter between two bounds: uniform, or with a given mean and standard deviation.

    .. math:: x = l + (h - l)\, \Phi(a + b z)

    with the normal distribution function :math:`\Phi`. Uniform is a = 0, b = 1. Otherwise, with
    :math:`c = a / \sqrt{1 + b^2}` and Owen's function T,

    .. math:: E\,\Phi = \Phi(c), \qquad E\,\Phi^2 = \Phi(c) - 2\,T\left(c, (1 + 2 b^2)^{-1/2}\right)

    (Owen, Communications in Statistics B 9, 1980), which are solved for a and b: both moments are exact. A standard
    deviation above that of the uniform distribution with b > 1 has more weight at the bounds than in the middle.

    Args:
        low: lower bound, a number or an array.
        high: upper bound, > ``low``.
        mean: mean of the parameter, inside of the bounds; None, with ``sd``, for a uniform prior.
        sd: standard deviation of the parameter, > 0 and below ``sqrt((mean - low) (high - mean))``.
        shape: shape of the parameter; by default that of the arguments.

    Returns:
        The :class:`Marginal`. Physical values are never at a bound.

    Raises:
        TypeError: no real numbers.
        ValueError: bounds in the wrong order; one moment without the other, or moments that no variable between the
            bounds has; shapes that do not fit.

    >>> share = bounded(0.0, 1.0, mean=0.3, sd=0.1)
    >>> mean, sd = share.moments()
    >>> round(float(mean), 6), round(float(sd), 6)
    (0.3, 0.1)
    """
    if (mean is None) != (sd is None):
        name, value = ("sd", sd) if sd is None else ("mean", mean)
        raise ValueError(f"{name}: {value}; wanted both mean and sd, or neither of them for a uniform prior")
    special = _special()
    uniform = mean is None
    if uniform:
        low, high = _entries(shape, low=low, high=high)
        _ask(high > low, "high", high, f"wanted upper bounds above the lower ones {_shown(low)}")
        a, b = np.zeros(low.shape), np.ones(low.shape)
        moments = {}
    else:
        low, high, mean, sd = _entries(shape, low=low, high=high, mean=mean, sd=sd)
        _ask(high > low, "high", high, f"wanted upper bounds above the lower ones {_shown(low)}")
        _ask((mean > low) & (mean < high), "mean", mean, f"wanted means between {_shown(low)} and {_shown(high)}")
        largest = np.sqrt((mean - low) * (high - mean))
        _ask((sd > 0) & (sd < largest), "sd", sd, f"wanted standard deviations > 0 and below {_shown(largest)}")
        width = high - low
        a, b = _probit_normal((mean - low) / width, sd / width)
        moments = {"mean": mean, "sd": sd}
    least, most = np.nextafter(low, high), np.nextafter(high, low)

    def transform(z: np.ndarray) -> np.ndarray:
        return np.clip(low + (high - low) * special.ndtr(a + b * z), least, most)

    def inverse(x: np.ndarray) -> np.ndarray:
        return (special.ndtri((x - low) / (high - low)) - a) / b

    return Marginal(low.shape, transform, inverse, _spec("bounded", low.shape, low=low, high=high, **moments))


def from_samples(samples: Any) -> Any:
    r"""A prior that is known by draws of it, an earlier posterior for example.

    Each entry's transform takes normal scores to the sorted draws, :math:`T(\Phi^{-1}((i - 1/2) / N)) = x_{(i)}`,
    linear in between and, with the slope of the outermost tenth of the draws, beyond: tails as of a normal variable.
    Entries are correlated as their normal scores are (a Gaussian copula).

    Args:
        samples: draws of the parameter, shape (N, ...), N >= 10; or a dict of them, N the same, for parameters that
            belong together.

    Returns:
        A :class:`Marginal` for draws of a number; else a :class:`Group`, whose one member is called as the group is.

    Raises:
        TypeError: no real numbers.
        ValueError: fewer than ten draws, draws that are not finite or all the same; numbers of draws that differ.

    >>> draws = np.random.default_rng(0).gamma(3.0, size=5000)
    >>> mean, sd = from_samples(draws).moments()
    >>> bool(abs(mean - draws.mean()) < 0.01), bool(abs(sd - draws.std()) < 0.01)
    (True, True)
    """
    if not isinstance(samples, Mapping):
        draws = _draws("samples", samples)
        return _interpolated(draws) if draws.ndim == 1 else _copula({"": draws})
    if not samples:
        raise ValueError("samples: an empty dict; wanted the draws of at least one parameter")
    return _copula({name: _draws(f"samples[{name!r}]", draws) for name, draws in samples.items()})


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

    >>> soil = correlated({"depth": positive(2.0, 1.0), "slope": bounded(0.0, 1.0)}, 0.5)
    >>> z = np.random.default_rng(0).normal(size=(100_000, 2))
    >>> values = joint({"soil": soil}).to_physical({"soil": z})
    >>> round(float(np.corrcoef(values["depth"], values["slope"])[0, 1]), 2)
    0.5
    """
    members = _marginals("members", members)
    size = sum(member.size for member in members.values())
    matrix = np.array(arrays("correlation", correlation), np.float64)
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
    return _group(members, latent, "correlation", _spec_of_group(members, latent))


def from_distribution(distribution: Any, *, key: Any = None) -> Any:
    """A prior from another library's distribution.

    What is used is, in this order: ``icdf`` (NumPyro) or ``ppf`` (SciPy), the inverse distribution function q, as the
    transform ``q(Phi(z))``, exact; else 4,096 draws by ``sample(key, (N,))`` (NumPyro) or ``rvs`` (SciPy), as in
    :func:`from_samples`. Distributions of several variables that belong together have no inverse and are drawn from.
    The entries of a batch are independent. The transform of an inverse distribution function in float32 ends at five
    standard deviations, beyond which float32 has no probabilities.

    Args:
        distribution: object with ``icdf``, ``ppf``, ``sample`` or ``rvs``; frozen, that is with its own parameters.
        key: JAX random key of the draws, where they are needed.

    Returns:
        A :class:`Marginal`, or a :class:`Group` where the distribution is one of several variables. A calibration with
        it can be saved, and loaded with ``prior=``.

    Raises:
        TypeError: an object with none of these; one that has to be drawn from, without a key.
        ValueError: an inverse distribution function that is not finite.

    >>> import scipy.stats
    >>> mean, sd = from_distribution(scipy.stats.beta(2, 3)).moments()
    >>> round(float(mean), 6), round(float(sd), 6)
    (0.4, 0.2)
    """
    quantile = getattr(distribution, "icdf", None) or getattr(distribution, "ppf", None)
    if quantile is not None and not getattr(distribution, "event_shape", ()):
        try:
            return _of_quantiles(quantile, getattr(distribution, "cdf", None))
        except NotImplementedError:  # some of NumPyro's
            pass
    if not (hasattr(distribution, "sample") or hasattr(distribution, "rvs")):
        raise TypeError(f"distribution: {distribution!r}; wanted an object with icdf, ppf, sample or rvs")
    if key is None:
        raise TypeError("key: None; wanted a JAX random key, since this distribution can only be drawn from")
    random_key("key", key)
    if hasattr(distribution, "sample"):
        return from_samples(np.asarray(distribution.sample(key, (_DRAWS,)), np.float64))
    numbers = np.random.default_rng(np.asarray(jax.random.bits(key, (4,))))
    return from_samples(distribution.rvs(size=_DRAWS, random_state=numbers))


class JointPrior:
    """The prior of all parameters: transforms between the latent space and physical values.

    Args:
        entries: parameters and groups of them by their names.

    Attributes:
        sizes: numbers of latent values of each entry, by the entries' names.
        shapes: shapes of the parameters, by the names that the simulator sees.

    Raises:
        TypeError: entries that are no priors.
        ValueError: no entries, or a name that is there twice.

    >>> prior = joint({"rate": positive(2.0, 1.0), "field": normal(0.0, 1.0, shape=(3,))})
    >>> prior.sizes, prior.shapes
    ({'rate': 1, 'field': 3}, {'rate': (), 'field': (3,)})
    >>> latent = {"rate": np.zeros((5, 1)), "field": np.ones((5, 3))}
    >>> {name: values.shape for name, values in prior.to_physical(latent).items()}
    {'rate': (5,), 'field': (5, 3)}
    """

    def __init__(self, entries: Mapping[str, Marginal | Group]) -> None:
        if not isinstance(entries, Mapping) or not entries:
            raise TypeError(f"prior: {entries!r}; wanted a dict of at least one parameter, such as normal(0.0, 1.0)")
        self._groups = {name: _as_group(name, entry) for name, entry in entries.items()}
        self._entries = dict(entries)
        self.shapes: dict[str, tuple[int, ...]] = {}
        for name, group in self._groups.items():
            for member, marginal in group.members.items():
                if member in self.shapes:
                    raise ValueError(f"prior[{name!r}]: a second parameter {member!r}; wanted each name once")
                self.shapes[member] = marginal.shape
        self.sizes = {name: len(group.factor) for name, group in self._groups.items()}

    @property
    def size(self) -> int:
        """The number P of latent values."""
        return sum(self.sizes.values())

    @property
    def names(self) -> list[str]:
        """A name for every entry of every parameter: ``field[0]`` for those of an array."""
        return scalar_names(self.shapes)

    @property
    def specs(self) -> dict[str, dict[str, Any] | None]:
        """What JSON can hold of each entry; None for one that no file can hold."""
        return {name: entry.spec for name, entry in self._entries.items()}

    def to_physical(self, latent: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Physical values from latent ones.

        Args:
            latent: latent values of each entry, shape (J, size).

        Returns:
            The values of each parameter, shape (J, ...), float64.
        """
        physical = {}
        for name, group in self._groups.items():
            rows = np.asarray(latent[name], np.float64) @ group.factor.T
            start = 0
            for member, marginal in group.members.items():
                part = rows[:, start : start + marginal.size]
                physical[member] = marginal.transform(part.reshape(len(rows), *marginal.shape))
                start += marginal.size
        return physical

    def to_latent(self, physical: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Latent values from physical ones, the inverse of :meth:`to_physical`.

        Args:
            physical: values of each parameter, shape (J, ...).

        Returns:
            The latent values of each entry, shape (J, size), float64; infinite where a value is at a bound.

        Raises:
            KeyError: a parameter is missing.
            TypeError: the inverse of a transform is not known (a distribution without ``cdf``).
        """
        latent = {}
        for name, group in self._groups.items():
            parts = []
            for member, marginal in group.members.items():
                if marginal.inverse is None:
                    raise TypeError(f"prior[{name!r}]: its transform has no inverse; wanted a distribution with cdf")
                values = np.asarray(physical[member], np.float64)
                with np.errstate(divide="ignore"):
                    parts.append(marginal.inverse(values).reshape(len(values), -1))
            latent[name] = np.linalg.solve(group.factor, np.concatenate(parts, axis=1).T).T
        return latent

    def quantile(self, probability: float) -> dict[str, np.ndarray]:
        """The prior's quantile of each number for itself, exact.

        Args:
            probability: probability in (0, 1).

        Returns:
            The quantiles by the parameters' names, each of the parameter's shape.

        >>> joint({"share": bounded(0.0, 2.0)}).quantile(0.25)["share"].round(6)
        np.float64(0.5)
        """
        z = float(_special().ndtri(real("probability", probability, _PROBABILITY)))
        return {
            name: marginal.transform(np.full(marginal.shape, z))
            for group in self._groups.values()
            for name, marginal in group.members.items()
        }

    def split(self, rows: Any) -> dict[str, Any]:
        """The columns of an array of shape (J, P), entry by entry."""
        ends = np.cumsum(list(self.sizes.values()))
        starts = ends - list(self.sizes.values())
        return {name: rows[:, start:end] for name, start, end in zip(self.sizes, starts, ends, strict=True)}


def joint(entries: Mapping[str, Marginal | Group]) -> JointPrior:
    """The :class:`JointPrior` of some parameters.

    Args:
        entries: parameters and groups of them by their names.

    >>> joint({"rate": positive(2.0, 1.0)}).to_physical({"rate": np.zeros((1, 1))})["rate"].round(4)
    array([1.7889])
    """
    return JointPrior(entries)


def from_spec(spec: Mapping[str, Any]) -> Any:
    """The prior that a ``spec`` describes.

    Args:
        spec: description of a :class:`Marginal` or a :class:`Group`, as JSON holds it.

    >>> prior = bounded(0.0, 2.0, mean=0.5, sd=0.2)
    >>> bool(from_spec(prior.spec).transform(np.array(0.3)) == prior.transform(np.array(0.3)))
    True
    """
    kind, settings = spec["kind"], {name: value for name, value in spec.items() if name != "kind"}
    if kind == "group":
        members = {name: from_spec(member) for name, member in settings["members"].items()}
        latent = np.array(settings["latent"], np.float64)
        return _group(members, latent, "correlation", dict(spec))
    if kind == "samples":
        return _interpolated(np.array(settings["samples"], np.float64))
    shape = tuple(settings.pop("shape"))
    if kind == "stack":
        return _stacked([from_spec(entry) for entry in settings["entries"]], shape)
    makers: dict[str, Callable[..., Marginal]] = {"normal": normal, "lognormal": lognormal, "bounded": bounded}
    values = {name: np.array(value, np.float64).reshape(shape) for name, value in settings.items()}
    return makers[kind](**values, shape=shape)


def scalar_names(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """A name for every number of some arrays.

    Args:
        shapes: shapes by names.

    >>> scalar_names({"rate": (), "field": (2,)})
    ['rate', 'field[0]', 'field[1]']
    """
    return [
        name + (f"[{', '.join(map(str, index))}]" if index else "")
        for name, shape in shapes.items()
        for index in np.ndindex(shape)
    ]


def _entries(shape: Any, **values: Any) -> list[np.ndarray]:
    """The arguments as float64 arrays of one shape; the error names the one that does not fit."""
    found = {}
    for name, value in values.items():
        arrays(name, value)
        found[name] = np.asarray(value, np.float64)
        _ask(np.isfinite(found[name]), name, found[name], "wanted finite numbers")
    if shape is None:
        wanted = np.broadcast_shapes(*(value.shape for value in found.values()))
    else:
        wanted = (shape,) if isinstance(shape, int) else tuple(whole("shape", n) for n in shape)
    for name, value in found.items():
        try:
            found[name] = np.array(np.broadcast_to(value, wanted))
        except ValueError:
            raise ValueError(f"{name}: shape {value.shape}; wanted one that fits the parameter's, {wanted}") from None
    return list(found.values())


def _ask(holds: Any, name: str, value: Any, wanted: str) -> None:
    if not np.all(holds):
        raise ValueError(f"{name}: {_shown(value)}; {wanted}")


def _shown(value: np.ndarray) -> str:
    return f"{value:.6g}" if np.ndim(value) == 0 else np.array2string(value, precision=4, threshold=6)


def _spec(kind: str, shape: tuple[int, ...], **values: np.ndarray) -> dict[str, Any]:
    return {"kind": kind, "shape": list(shape), **{name: value.ravel().tolist() for name, value in values.items()}}


def _spec_of_group(members: dict[str, Marginal], latent: np.ndarray) -> dict[str, Any] | None:
    specs = {name: member.spec for name, member in members.items()}
    return None if None in specs.values() else {"kind": "group", "members": specs, "latent": latent.tolist()}


def _marginals(name: str, members: Any) -> dict[str, Marginal]:
    if not isinstance(members, Mapping) or not members:
        raise TypeError(f"{name}: {members!r}; wanted a dict of parameters, such as normal(0.0, 1.0)")
    for member, prior in members.items():
        if not isinstance(prior, Marginal):
            raise TypeError(f"{name}[{member!r}]: {prior!r}; wanted the prior of one parameter, such as normal(0, 1)")
    return dict(members)


def _as_group(name: Any, entry: Any) -> Group:
    if not isinstance(name, str) or not name:
        raise TypeError(f"prior: an entry called {name!r}; wanted a name, a string")
    if isinstance(entry, Group):
        members = {member or name: marginal for member, marginal in entry.members.items()}
        return entry._replace(members=members)
    if not isinstance(entry, Marginal):
        raise TypeError(f"prior[{name!r}]: {entry!r}; wanted a prior such as normal(0.0, 1.0) or positive(2.0, 1.0)")
    return Group({name: entry}, np.eye(entry.size), entry.spec)


def _group(members: dict[str, Marginal], latent: np.ndarray, name: str, spec: dict[str, Any] | None) -> Group:
    least = np.linalg.eigvalsh(latent)[0]
    if not least > len(latent) * np.finfo(np.float64).eps:
        raise ValueError(
            f"{name}: the least eigenvalue of the latent correlations is {least:.3g}; wanted correlations that these "
            "variables can have together, and none of 1 or -1"
        )
    return Group(members, np.linalg.cholesky(latent), spec)


def _draws(name: str, samples: Any) -> np.ndarray:
    draws = np.asarray(arrays(name, np.asarray(samples)), np.float64)
    if draws.ndim == 0 or len(draws) < 10:
        raise ValueError(f"{name}: of shape {draws.shape}; wanted at least ten draws, (N, ...)")
    _ask(np.isfinite(draws), name, draws, "wanted finite draws")
    if not np.all(draws.max(axis=0) > draws.min(axis=0)):
        raise ValueError(f"{name}: draws that are all the same; wanted a parameter that varies")
    return draws


def _of_quantiles(quantile: Callable[[Any], Any], cdf: Callable[[Any], Any] | None) -> Marginal:
    special, middle = _special(), np.asarray(quantile(0.5))
    if not np.all(np.isfinite(middle)):
        raise ValueError(f"distribution: its median is {middle}; wanted finite quantiles")
    farthest = _FARTHEST if middle.dtype == np.float64 else 5.0

    def transform(z: np.ndarray) -> np.ndarray:
        return np.asarray(quantile(special.ndtr(np.clip(z, -farthest, farthest))), np.float64)

    def inverse(x: np.ndarray) -> np.ndarray:
        assert cdf is not None
        return special.ndtri(np.asarray(cdf(x), np.float64))

    return Marginal(middle.shape, transform, None if cdf is None else inverse, None)


def _scores(number: int) -> np.ndarray:
    return _special().ndtri((np.arange(number) + 0.5) / number)


def _interpolated(draws: np.ndarray) -> Marginal:
    """The prior of one number, from its draws."""
    known, scores = np.sort(draws), _scores(len(draws))
    tail = max(2, len(draws) // 20)
    slopes = [
        np.polyfit(scores[part], known[part], 1)[0] if np.ptp(known[part]) else 0.0
        for part in (slice(tail), slice(-tail, None))
    ]

    def transform(z: np.ndarray) -> np.ndarray:
        below, above = np.minimum(z - scores[0], 0), np.maximum(z - scores[-1], 0)
        return np.interp(z, scores, known) + slopes[0] * below + slopes[1] * above

    def inverse(x: np.ndarray) -> np.ndarray:
        below, above = np.minimum(x - known[0], 0), np.maximum(x - known[-1], 0)
        ends = [part / slope if slope else part * 0 for part, slope in zip((below, above), slopes, strict=True)]
        return np.interp(x, known, scores) + ends[0] + ends[1]

    return Marginal((), transform, inverse, {"kind": "samples", "samples": known.tolist()})


def _copula(samples: dict[str, np.ndarray]) -> Group:
    """Parameters from their draws, with the correlations of the normal scores."""
    if len({len(draws) for draws in samples.values()}) > 1:
        raise ValueError(f"samples: {[len(draws) for draws in samples.values()]} draws; wanted as many of each")
    columns, members = [], {}
    for name, draws in samples.items():
        flat = draws.reshape(len(draws), -1)
        columns.append(flat)
        members[name] = _stacked([_interpolated(column) for column in flat.T], draws.shape[1:])
    rows = np.concatenate(columns, axis=1)
    ranks = np.argsort(np.argsort(rows, axis=0, kind="stable"), axis=0, kind="stable")
    latent = np.atleast_2d(np.corrcoef(_scores(len(rows))[ranks], rowvar=False))
    return _group(members, latent, "samples", _spec_of_group(members, latent))


def _stacked(entries: list[Marginal], shape: tuple[int, ...]) -> Marginal:
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


def _quadrature() -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights for means over a standard normal variable.

    Equal steps: for what is smooth as exact as Gauss's nodes, and for kinks and steps much better.
    """
    nodes = np.linspace(-14, 14, 5601)
    weights = np.exp(-0.5 * nodes**2)
    return nodes, weights / weights.sum()


def _column(nodes: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return nodes.reshape(-1, *[1] * len(shape))


def _hermite(marginal: Marginal) -> np.ndarray:
    """The coefficients of the transforms in normalized Hermite polynomials, shape (entries, order)."""
    nodes, weights = _quadrature()
    values = marginal.transform(np.broadcast_to(_column(nodes, marginal.shape), (len(nodes), *marginal.shape)))
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


def _probit_normal(mean: np.ndarray, sd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The a and b for which Phi(a + b z) has these moments, by bisection in log b."""
    special = _special()
    c = special.ndtri(mean)
    low, high = np.full(mean.shape, -30.0), np.full(mean.shape, 30.0)
    for _ in range(100):
        middle = 0.5 * (low + high)
        smaller = _probit_sd(c, np.exp(middle)) < sd
        low, high = np.where(smaller, middle, low), np.where(smaller, high, middle)
    b = np.exp(0.5 * (low + high))
    return c * np.sqrt(1 + b**2), b


def _probit_sd(c: np.ndarray, b: np.ndarray) -> np.ndarray:
    special = _special()
    # Phi(c) (1 - Phi(c)) = 2 T(c, 1): no difference of two means of squares.
    return np.sqrt(np.maximum(2 * (special.owens_t(c, 1.0) - special.owens_t(c, 1 / np.sqrt(1 + 2 * b**2))), 0))


def _special() -> Any:
    return extra("scipy.special")
