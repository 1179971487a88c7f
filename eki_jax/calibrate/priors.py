r"""Priors in physical units, each a transform of standard normal numbers.

The ensemble of a calibration lives in a *latent* space, where the prior is N(0, I) whatever the parameters are: its
covariance is known exactly, and no step leaves the bounds. A parameter's transform leads from there to its physical
values,

.. math:: x = T(z), \qquad z \sim N(0, 1),

and is chosen so that x has the mean and the standard deviation that were asked for, those of the physical variable.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from eki_jax._checks import quantities, sizes, whole
from eki_jax.calibrate.extras import special


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
        _, weights, values = self.at_nodes()
        mean = np.tensordot(weights, values, axes=1)
        return mean, np.sqrt(np.tensordot(weights, (values - mean) ** 2, axes=1))

    def at_nodes(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Latent nodes and weights for means over a standard normal variable, and the physical values, (N, ...)."""
        # Equal steps: for what is smooth as exact as Gauss's nodes, and for kinks and steps much better.
        nodes = np.linspace(-14, 14, 5601)
        weights = np.exp(-0.5 * nodes**2)
        columns = nodes.reshape(-1, *[1] * len(self.shape))
        values = self.transform(np.broadcast_to(columns, (len(nodes), *self.shape)))
        return nodes, weights / weights.sum(), values


def normal(mean: Any, sd: Any, *, shape: tuple[int, ...] | None = None) -> Marginal:
    """A normal prior, without bounds.

    Args:
        mean: mean of the parameter, a number or an array.
        sd: standard deviation, > 0, a number or an array.
        shape: shape of the parameter; by default that of ``mean`` and ``sd``.

    Returns:
        The :class:`Marginal`, with ``x = mean + sd z``.

    Raises:
        TypeError: no real numbers; a shape that is no tuple of whole numbers.
        ValueError: a standard deviation that is not positive; shapes that do not fit.

    >>> float(normal(3.0, 5.0).transform(np.array(1.0)))
    8.0
    """
    mean, sd = _entries(shape, mean=mean, sd=sd)
    ask(sd > 0, "sd", sd, "wanted standard deviations > 0")
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
        TypeError: no real numbers; a shape that is no tuple of whole numbers.
        ValueError: a mean or a standard deviation that is not positive; shapes that do not fit.

    >>> rate = positive(mean=2.0, sd=1.0)
    >>> rate.transform(np.array([-40.0, 0.0, 2.0])).round(3)
    array([0.   , 1.789, 4.601])
    """
    mean, sd = _entries(shape, mean=mean, sd=sd)
    ask(mean > 0, "mean", mean, "wanted means > 0, or lognormal(..., low=) for another bound")
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
        TypeError: no real numbers; a shape that is no tuple of whole numbers.
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
    mean, sd, bound = _entries(shape, mean=mean, sd=sd, **{"low" if sign > 0 else "high": bound})
    above = sign * (mean - bound)
    ask(sd > 0, "sd", sd, "wanted standard deviations > 0")
    ask(above > 0, "mean", mean, f"wanted means {'above' if sign > 0 else 'below'} the bound {_shown(bound)}")
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
        TypeError: no real numbers; a shape that is no tuple of whole numbers.
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
    normal_functions = special()
    uniform = mean is None
    if uniform:
        low, high = _entries(shape, low=low, high=high)
        ask(high > low, "high", high, f"wanted upper bounds above the lower ones {_shown(low)}")
        a, b = np.zeros(low.shape), np.ones(low.shape)
        moments = {}
    else:
        low, high, mean, sd = _entries(shape, low=low, high=high, mean=mean, sd=sd)
        ask(high > low, "high", high, f"wanted upper bounds above the lower ones {_shown(low)}")
        ask((mean > low) & (mean < high), "mean", mean, f"wanted means between {_shown(low)} and {_shown(high)}")
        largest = np.sqrt((mean - low) * (high - mean))
        ask((sd > 0) & (sd < largest), "sd", sd, f"wanted standard deviations > 0 and below {_shown(largest)}")
        width = high - low
        a, b = _probit_normal((mean - low) / width, sd / width)
        moments = {"mean": mean, "sd": sd}
    least, most = np.nextafter(low, high), np.nextafter(high, low)

    def transform(z: np.ndarray) -> np.ndarray:
        return np.clip(low + (high - low) * normal_functions.ndtr(a + b * z), least, most)

    def inverse(x: np.ndarray) -> np.ndarray:
        return (normal_functions.ndtri((x - low) / (high - low)) - a) / b

    return Marginal(low.shape, transform, inverse, _spec("bounded", low.shape, low=low, high=high, **moments))


def _entries(shape: Any, **values: Any) -> list[np.ndarray]:
    """The arguments as float64 arrays of one shape; the error names the one that does not fit."""
    found = {}
    for name, value in values.items():
        found[name] = np.asarray(quantities(name, value), np.float64)
        ask(np.isfinite(found[name]), name, found[name], "wanted finite numbers")
    if shape is None:
        wanted = np.broadcast_shapes(*(value.shape for value in found.values()))
    elif isinstance(shape, tuple | list):
        wanted = sizes("shape", shape) if shape else ()
    else:
        wanted = (whole("shape", shape, or_="a tuple of them"),)
    for name, value in found.items():
        try:
            found[name] = np.array(np.broadcast_to(value, wanted))
        except ValueError:
            raise ValueError(f"{name}: shape {value.shape}; wanted one that fits the parameter's, {wanted}") from None
    return list(found.values())


def ask(holds: Any, name: str, value: Any, wanted: str) -> None:
    """Raise ValueError unless all of the flags ``holds`` are up."""
    if not np.all(holds):
        raise ValueError(f"{name}: {_shown(value)}; {wanted}")


def _shown(value: np.ndarray) -> str:
    return f"{value:.6g}" if np.ndim(value) == 0 else np.array2string(value, precision=4, threshold=6)


def _spec(kind: str, shape: tuple[int, ...], **values: np.ndarray) -> dict[str, Any]:
    return {"kind": kind, "shape": list(shape), **{name: value.ravel().tolist() for name, value in values.items()}}


def _probit_normal(mean: np.ndarray, sd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The a and b for which Phi(a + b z) has these moments, by bisection in log b."""
    normal_functions = special()
    c = normal_functions.ndtri(mean)
    low, high = np.full(mean.shape, -30.0), np.full(mean.shape, 30.0)
    for _ in range(100):
        middle = 0.5 * (low + high)
        smaller = _probit_sd(c, np.exp(middle)) < sd
        low, high = np.where(smaller, middle, low), np.where(smaller, high, middle)
    b = np.exp(0.5 * (low + high))
    return c * np.sqrt(1 + b**2), b


def _probit_sd(c: np.ndarray, b: np.ndarray) -> np.ndarray:
    normal_functions = special()
    # Phi(c) (1 - Phi(c)) = 2 T(c, 1): no difference of two means of squares.
    return np.sqrt(
        np.maximum(2 * (normal_functions.owens_t(c, 1.0) - normal_functions.owens_t(c, 1 / np.sqrt(1 + 2 * b**2))), 0)
    )
