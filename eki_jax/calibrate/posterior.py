"""What a calibration knows of the parameters, in physical units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from eki_jax._checks import Within, quantities, real
from eki_jax.calibrate.joint import scalar_names

_PROBABILITY = Within("a number in [0, 1]", low=0, high=1, low_counts=True, high_counts=True)


class Posterior(NamedTuple):
    """The posterior of the parameters, by the members of the ensemble; as a text it is a table.

    Attributes:
        mean: means by the parameters' names, each of the parameter's shape.
        sd: standard deviations, with N in the denominator, as the ensemble's covariances have it.
        quantiles: quantiles at ``probabilities``, shape (Q, ...) for each parameter.
        samples: values of the members, shape (N, ...) for each parameter; draws where the method keeps a covariance.
        correlations: matrix of the correlations of all numbers, in the order of ``names``; NaN for one that does not
            vary.
        names: names of all numbers, such as "rate" or "field[0]".
        probabilities: probabilities of the quantiles.
    """

    mean: dict[str, Any]
    sd: dict[str, Any]
    quantiles: dict[str, np.ndarray]
    samples: dict[str, np.ndarray]
    correlations: np.ndarray
    names: list[str]
    probabilities: tuple[float, ...]

    def members(self) -> list[dict[str, Any]]:
        """The samples as a list of dicts, to run the simulator with: what the posterior predicts."""
        return in_members(self.samples)

    def __str__(self) -> str:
        heads = ["mean", "sd", *(f"{100 * p:g} %" for p in self.probabilities)]
        columns = [self.mean, self.sd, *({n: q[i] for n, q in self.quantiles.items()} for i in range(len(heads) - 2))]
        numbers = np.stack([np.concatenate([np.ravel(v) for v in column.values()]) for column in columns], axis=1)
        width = max(map(len, [*self.names, "parameter"]))
        lines = ["parameter".ljust(width) + "".join(head.rjust(12) for head in heads)]
        lines += [
            name.ljust(width) + "".join(f"{number:12.4g}" for number in row)
            for name, row in zip(self.names, numbers, strict=True)
        ]
        return "\n".join(lines)


def posterior_of(samples: dict[str, np.ndarray], probabilities: Sequence[float]) -> Posterior:
    """The :class:`Posterior` of some samples.

    Args:
        samples: values of each parameter, shape (N, ...).
        probabilities: probabilities of the quantiles.

    >>> print(posterior_of({"rate": np.array([1.0, 3.0])}, [0.5]))
    parameter        mean          sd        50 %
    rate                2           1           2
    """
    if np.ndim(quantities("probabilities", probabilities)) != 1:
        raise ValueError(f"probabilities: {probabilities!r}; wanted a list of numbers in [0, 1]")
    shares = tuple(float(real("probabilities", share, _PROBABILITY)) for share in probabilities)
    rows = np.concatenate([values.reshape(len(values), -1) for values in samples.values()], axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        correlations = np.atleast_2d(np.corrcoef(rows, rowvar=False))
    return Posterior(
        mean={name: values.mean(axis=0) for name, values in samples.items()},
        sd={name: values.std(axis=0) for name, values in samples.items()},  # with 1/J, as the method has it
        quantiles={name: np.quantile(values, shares, axis=0) for name, values in samples.items()},
        samples=samples,
        correlations=correlations,
        names=scalar_names({name: values.shape[1:] for name, values in samples.items()}),
        probabilities=shares,
    )


def in_members(values: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """A list of J dicts from arrays of shape (J, ...).

    >>> in_members({"rate": np.array([1.0, 2.0])})
    [{'rate': np.float64(1.0)}, {'rate': np.float64(2.0)}]
    """
    number = len(next(iter(values.values())))
    return [{name: part[j] for name, part in values.items()} for j in range(number)]
