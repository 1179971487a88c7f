"""The prior of all parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from eki_jax._checks import Within, quantities, real
from eki_jax.calibrate.extras import special
from eki_jax.calibrate.groups import Group, group_of, interpolated, stacked
from eki_jax.calibrate.priors import Marginal, bounded, lognormal, normal
from eki_jax.ensembles.priors import Gaussian, gaussian

_PROBABILITY = Within("a number in (0, 1)", low=0, high=1)


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

    >>> from eki_jax.calibrate import positive
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
    def entry_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the entries' latent values: the parameter's; of a group of several, one row of all numbers.

        >>> joint({"field": normal(0.0, 1.0, shape=(2, 3))}).entry_shapes
        {'field': (2, 3)}
        """
        only = {name: list(group.members.values()) for name, group in self._groups.items()}
        return {name: few[0].shape if len(few) == 1 else (self.sizes[name],) for name, few in only.items()}

    @property
    def names(self) -> list[str]:
        """A name for every entry of every parameter: ``field[0]`` for those of an array."""
        return scalar_names(self.shapes)

    @property
    def specs(self) -> dict[str, dict[str, Any] | None]:
        """What JSON can hold of each entry; None for one that no file can hold."""
        return {name: entry.spec for name, entry in self._entries.items()}

    def latent(self) -> Gaussian:
        """The latent prior N(0, I) by the entries' names, for methods that want one (:func:`eki_jax.kalman.aldi`).

        >>> joint({"field": normal(0.0, 1.0, shape=(3,))}).latent().mean["field"]
        Array([0., 0., 0.], dtype=float32)
        """
        return gaussian({name: jnp.zeros(size) for name, size in self.sizes.items()}, 1.0)

    def to_physical(self, latent: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Physical values from latent ones.

        Args:
            latent: latent values of each entry, shape (J, size).

        Returns:
            The values of each parameter, shape (J, ...), float64.

        Raises:
            TypeError: no dict of real numbers.
            ValueError: names or shapes that are not the prior's.
        """
        columns = _rows("latent", latent, {name: (size,) for name, size in self.sizes.items()})
        physical = {}
        for name, group in self._groups.items():
            rows = columns[name] @ group.factor.T
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
            TypeError: no dict of real numbers; the inverse of a transform is not known (a distribution without
                ``cdf``).
            ValueError: names or shapes that are not the prior's.
        """
        values = _rows("physical", physical, self.shapes)
        latent = {}
        for name, group in self._groups.items():
            parts = []
            for member, marginal in group.members.items():
                if marginal.inverse is None:
                    raise TypeError(f"prior[{name!r}]: its transform has no inverse; wanted a distribution with cdf")
                with np.errstate(divide="ignore"):
                    parts.append(marginal.inverse(values[member]).reshape(len(values[member]), -1))
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
        z = float(special().ndtri(real("probability", probability, _PROBABILITY)))
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

    >>> from eki_jax.calibrate import positive
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
        return group_of(members, latent, "correlation", dict(spec))
    if kind == "samples":
        return interpolated(np.array(settings["samples"], np.float64), settings["low"], settings["high"])
    shape = tuple(settings.pop("shape"))
    if kind == "stack":
        return stacked([from_spec(entry) for entry in settings["entries"]], shape)
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


def _rows(name: str, values: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Arrays of float64 by the names of ``shapes``, shape (J, ...) each with one J."""
    if not isinstance(values, Mapping):
        raise TypeError(f"{name}: a {type(values).__name__}; wanted a dict of arrays of {', '.join(shapes)}")
    if set(values) != set(shapes):
        raise ValueError(f"{name}: of {sorted(map(str, values))}; wanted arrays of {', '.join(shapes)}")
    found = {key: np.asarray(quantities(f"{name}[{key!r}]", values[key]), np.float64) for key in shapes}
    size = next(len(part) if part.ndim else 1 for part in found.values())
    for key, part in found.items():
        if part.shape != (size, *shapes[key]):
            wanted = f"({', '.join(map(str, ['J', *shapes[key]]))}{'' if shapes[key] else ','})"
            raise ValueError(f"{name}[{key!r}]: shape {part.shape}; wanted {wanted} with one J for all")
    return found


def _as_group(name: Any, entry: Any) -> Group:
    if not isinstance(name, str) or not name:
        raise TypeError(f"prior: an entry called {name!r}; wanted a name, a string")
    if isinstance(entry, Group):
        members = {member or name: marginal for member, marginal in entry.members.items()}
        return entry._replace(members=members)
    if not isinstance(entry, Marginal):
        raise TypeError(
            f"prior[{name!r}]: {entry!r}; wanted a prior such as normal(0.0, 1.0) or positive(2.0, 1.0), or "
            "from_distribution() of another library's"
        )
    return Group({name: entry}, np.eye(entry.size), entry.spec)
