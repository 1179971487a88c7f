r"""Localization: parameters that are informed by some outputs only, or by distant ones less.

A small ensemble sees correlations where there are none. Each parameter gets an analysis of its own, in which the noise
covariance of the outputs is :math:`D^{-1/2} \Gamma D^{-1/2}` with D their weights in [0, 1] for this parameter (Hunt,
Kostelich and Szunyogh, Physica D 230, 2007). With weights of one it is the global analysis.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from eki_jax._checks import POSITIVE, array, arrays, function, is_known, quantities, real
from eki_jax._types import Array, Ensemble
from eki_jax.kernel.axes import Axis
from eki_jax.kernel.linear_algebra import HIGHEST
from eki_jax.kernel.particles import wide_dtype
from eki_jax.kernel.products import centred

if TYPE_CHECKING:
    from jaxtyping import Float, Real

# Matrices of single analyses that exist at a time, and those that are kept where parameters share them.
_ANALYSIS_BYTES = 64 * 2**20
_SHARED_BYTES = 256 * 2**20


class Fitted(NamedTuple):
    """A localization of one ensemble and one kind of outputs.

    Attributes:
        places: number of each parameter's place, shape (P,); parameters of one place share an analysis.
        number: number of places.
        weights: function ``weights(place, deviations, anomalies) -> (M,)`` from the number of a place, the deviations
            of its last parameter, shape (J,), and the whitened anomalies of the outputs, shape (J, M).
        near: function ``near(place) -> (P,)``: weights of the prior of every parameter; None where there are none.
        looks: flag, True where the weights look at the deviations, so that no two parameters share an analysis.
    """

    places: np.ndarray
    number: int
    weights: Callable[[Array, Array, Array], Array]
    near: Callable[[Array], Array] | None = None
    looks: bool = False


class Localization(NamedTuple):
    """Weights of the outputs for the parameters.

    Attributes:
        fit: function ``fit(ensemble, outputs) -> Fitted`` from arrays of shape (J, ...), of which it sees the shapes.
    """

    fit: Callable[[Ensemble, Any], Fitted]


def taper(
    parameter_coordinates: Any,
    output_coordinates: Any,
    radius: Any,
    *,
    period: Any = None,
    distance: Callable[[Array, Array], Array] | None = None,
) -> Localization:
    r"""Weights that fall with the distance between a parameter and an output (Gaspari and Cohn, QJRMS 125, 1999).

    Their fifth-order piecewise rational function, 1 at distance zero, 5/24 at half of the radius, and zero from the
    radius on (eq. 4.10 with c half of the radius). The matrix of P x M weights is never formed.

    Args:
        parameter_coordinates: pytree like the parameters: for every leaf a coordinate for each entry, an array of the
            leaf's shape; d of them, an array of the leaf's shape and d; or one number for all entries.
        output_coordinates: pytree like the outputs of one particle, in the same form and with the same d.
        radius: distance > 0 from which on the weight is zero, in the coordinates' units.
        period: length > 0 after which a coordinate repeats, a number or shape (d,); None for none.
        distance: function ``distance(place, places) -> (M,)`` of one parameter's coordinates, shape (d,), and of those
            of all outputs, shape (M, d); by default the Euclidean one.

    Returns:
        A :class:`Localization`, for the keyword ``localization`` of the Kalman steps.

    Raises:
        ValueError: a radius or period that is not positive; from the step, coordinates that do not fit.

    >>> import jax, jax.numpy as jnp
    >>> from eki_jax import kalman
    >>> places = jnp.arange(6.0)
    >>> near = taper(places, places, radius=2.0)
    >>> solver = kalman.etki(lambda u, x: u, 1.0, localization=near)
    >>> u = jax.random.normal(jax.random.key(0), (4, 6))
    >>> state, info = solver.step(solver.init(u), (None, jnp.zeros(6).at[0].set(9.0)))
    >>> moved = jnp.abs(solver.estimate(state) - u.mean(axis=0)) > 0.5  # by a datum far off at the first place
    >>> bool(moved[0]), bool(moved[3:].any())
    (True, False)
    """
    real("radius", radius, POSITIVE)
    arrays("parameter_coordinates", parameter_coordinates)
    arrays("output_coordinates", output_coordinates)
    if period is not None:
        lengths = "wanted finite lengths > 0, known ones, or None"
        if not is_known(quantities("period", period)) or np.ndim(period) > 1:
            raise ValueError(f"period: {period}; {lengths}")
        if not np.all(POSITIVE.holds(np.asarray(period, np.float64))):
            raise ValueError(f"period: {period}; {lengths}")
    measure = _euclidean(period) if distance is None else _checked(distance)

    def fit(ensemble: Ensemble, outputs: Any) -> Fitted:
        own = _coordinates("parameter_coordinates", parameter_coordinates, ensemble, "parameters")
        others = _coordinates("output_coordinates", output_coordinates, outputs, "outputs")
        if own.shape[1] != others.shape[1]:
            raise ValueError(
                f"output_coordinates: of {others.shape[1]} dimensions, but the parameters' have {own.shape[1]}; "
                "wanted as many"
            )
        if period is not None and np.shape(period) not in ((), (1,), own.shape[1:]):
            raise ValueError(f"period: {np.size(period)} lengths for {own.shape[1]} dimensions; wanted as many, or one")
        points, places = np.unique(own, axis=0, return_inverse=True)

        def towards(places: np.ndarray) -> Callable[..., Array]:
            return lambda place, *_: gaspari_cohn(
                measure(jnp.asarray(points, float)[place], jnp.asarray(places, float)) / jnp.asarray(radius, float)
            )

        return Fitted(places.reshape(-1), len(points), towards(others), towards(own))

    return Localization(fit)


def update_groups(sees: Mapping[str, Collection[str]]) -> Localization:
    """Blocks of parameters that see only some of the outputs.

    Args:
        sees: mapping from the first key of every parameter to the first keys of the outputs that it is informed by; an
            empty collection leaves the parameters where they are.

    Returns:
        A :class:`Localization`, for the keyword ``localization`` of the Kalman steps. Parameters that see the same
        outputs share an analysis.

    Raises:
        TypeError: no mapping to collections of keys.
        ValueError: from the step, a key that parameters or outputs do not have, or parameters that are not named.

    >>> import jax, jax.numpy as jnp
    >>> from eki_jax import kalman
    >>> model = lambda u, x: {"flow": u["a"] + u["b"], "heat": u["b"]}
    >>> solver = kalman.etki(model, 1.0, localization=update_groups({"a": ["flow"], "b": ["heat"]}))
    >>> u = {"a": jnp.array([0.0, 1.0, 2.0]), "b": jnp.array([1.0, 1.0, 1.0])}
    >>> state, info = solver.step(solver.init(u), (None, {"flow": 0.0, "heat": 5.0}))
    >>> state.ensemble["b"]  # without spread, it learns nothing
    Array([1., 1., 1.], dtype=float32)
    """
    lists = sees.values() if isinstance(sees, Mapping) else [None]
    if any(isinstance(seen, str | bytes) or not isinstance(seen, Collection) for seen in lists):
        raise TypeError(f"sees: {sees!r}; wanted a mapping from a parameter's key to a list of the outputs' keys")

    def fit(ensemble: Ensemble, outputs: Any) -> Fitted:
        own, others = _first_keys("parameters", ensemble), _first_keys("outputs", outputs)
        for name, found in (("parameters", own), ("outputs", others)):
            named = set(sees) if name == "parameters" else {key for seen in sees.values() for key in seen}
            if unknown := sorted(named - set(found)):
                raise ValueError(f"sees: {unknown[0]!r} is none of the {name}; wanted of {sorted(set(found))}")
        if missing := sorted(set(own) - set(sees)):
            raise ValueError(f"sees: nothing of the parameters {missing}; wanted the outputs that inform them")
        groups = sorted({tuple(sorted(sees[key])) for key in own})
        mask = np.array([[key in group for key in others] for group in groups], float)
        places = np.array([groups.index(tuple(sorted(sees[key]))) for key in own])
        together = (places[None] == np.arange(len(groups))[:, None]).astype(float)
        weights = lambda place, *_: jnp.asarray(mask)[place]
        return Fitted(places, len(groups), weights, lambda place: jnp.asarray(together)[place])

    return Localization(fit)


def correlation_taper(*, cut: Any = 3.0) -> Localization:
    r"""Weights from the correlations of the ensemble itself, for parameters that have no place.

    A correlation r of J particles that is only noise has deviation :math:`1 / \sqrt{J - 1}`; the weight is zero below
    ``cut`` of these, and rises to one at :math:`|r| = 1` by Gaspari and Cohn's function of
    :math:`(1 - |r|) / (1 - \mathrm{cut} / \sqrt{J - 1})` (Luo and Bhakta, Journal of Petroleum Science and Engineering
    184, 2020). Every parameter has an analysis of its own, of O(J^3) operations.

    Args:
        cut: number > 0 of deviations below which a correlation counts as noise.

    Returns:
        A :class:`Localization`, for the keyword ``localization`` of the Kalman steps.

    Raises:
        ValueError: a cut that is not positive.

    >>> from eki_jax import kalman
    >>> solver = kalman.etki(None, 1.0, localization=correlation_taper())
    """
    real("cut", cut, POSITIVE)

    def weights(place: Array, deviations: Array, anomalies: Array) -> Array:
        del place
        correlations, error = _correlations(deviations, anomalies)
        noise = jnp.minimum(jnp.asarray(cut, error.dtype) * error, 0.999)
        return gaspari_cohn((1 - jnp.abs(correlations)) / (1 - noise))

    return Localization(lambda ensemble, outputs: _each_its_own(ensemble, weights))


def sampling_error_correction() -> Localization:
    r"""Weights that shrink a sampled correlation by what is expected to be its error (Flowerdew, Tellus A 67, 2015).

    A correlation r of J particles has variance :math:`(1 - r^2)^2 / (J - 1)`; the weight
    :math:`r^2 / (r^2 + (1 - r^2)^2 / (J - 1))` is that of least mean squared error.

    Returns:
        A :class:`Localization`, for the keyword ``localization`` of the Kalman steps.

    >>> from eki_jax import kalman
    >>> solver = kalman.etki(None, 1.0, localization=sampling_error_correction())
    """

    def weights(place: Array, deviations: Array, anomalies: Array) -> Array:
        del place
        correlations, error = _correlations(deviations, anomalies)
        square = correlations**2
        variance = ((1 - square) * error) ** 2
        return square / jnp.maximum(square + variance, jnp.finfo(square.dtype).tiny)

    return Localization(lambda ensemble, outputs: _each_its_own(ensemble, weights))


def as_localization(value: Any) -> Localization | None:
    """A localization from what the keyword takes: one, an array of weights or a pytree of them, or None."""
    if value is None:
        return None
    if isinstance(value, Localization):
        function("localization.fit", value.fit, "fit(ensemble, outputs)", arguments=2)
        return value
    arrays("localization", value, some=True)
    known = [np.asarray(part) for part in jax.tree.leaves(value) if is_known(part)]
    if not all(np.all((part >= 0) & (part <= 1)) for part in known):
        raise ValueError("localization: has values that are no weights; wanted numbers in [0, 1]")

    def fit(ensemble: Ensemble, outputs: Any) -> Fitted:
        outputs_size = sum(_sizes(outputs))
        shapes = [jnp.shape(leaf)[1:] for leaf in jax.tree.leaves(ensemble)]
        parts = jax.tree.leaves(value)
        wanted = [(*shape, outputs_size) for shape in shapes]
        found = [np.shape(part) for part in parts]
        parameters = sum(map(math.prod, shapes))
        if found not in (wanted, [(parameters, outputs_size)]):
            raise ValueError(
                f"localization: of shapes {found}; wanted ({parameters}, {outputs_size}), a weight of every output for "
                f"every parameter, or {wanted}"
            )
        table = jnp.concatenate([jnp.reshape(jnp.asarray(part), (-1, outputs_size)) for part in parts])
        return Fitted(np.arange(parameters), parameters, lambda place, *_: table[place])

    return Localization(fit)


def gaspari_cohn(distance: Real[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Gaspari and Cohn's taper of a distance in radii: 1 at 0, zero from 1 on (QJRMS 125, 1999, eq. 4.10).

    Args:
        distance: distances over the radius, >= 0, of any shape.

    Returns:
        The weights in [0, 1], in the shape of ``distance``; NaN where that is NaN.

    Raises:
        TypeError: no array of real numbers.

    >>> import jax.numpy as jnp
    >>> jnp.round(gaspari_cohn(jnp.array([0.0, 0.5, 1.0, 3.0])), 4)
    Array([1.    , 0.2083, 0.    , 0.    ], dtype=float32)
    """
    r = 2 * jnp.clip(jnp.asarray(array("distance", distance)), 0, 1)
    near = 1 + r**2 * (-5 / 3 + r * (5 / 8 + r * (1 / 2 - r / 4)))
    safe = jnp.maximum(r, 0.5)
    far = 4 - 5 * r + r**2 * (5 / 3 + r * (5 / 8 + r * (-1 / 2 + r / 12))) - 2 / (3 * safe)
    return jnp.clip(jnp.where(r <= 1, near, far), 0, 1)


class LocalProducts(NamedTuple):
    """The direction of every particle, from the analyses of all places; it offers what a step asks of the kernel's.

    Attributes:
        directions: pytree like the ensemble, in the dtype in which the kernel sums.
        variance: summed variance of all parameters, a scalar.
        axis: devices over which the particles are spread.
    """

    directions: Any
    variance: Array
    axis: Axis

    @classmethod
    def of(cls, system: Any, combination: Callable[..., Array], localization: Localization, outputs: Any) -> Any:
        """The analyses of one step.

        Args:
            system: linear-Gaussian problem of the step.
            combination: function ``(scale, Z, own, residuals, mean) -> W``, shape (j, J): the direction of a column of
                deviations U is ``W U / J``.
            localization: weights.
            outputs: outputs of the particles, arrays of shape (J, ...).
        """
        axis, own = system.axis, system.axis.own_part
        fitted = localization.fit(system.ensemble, outputs)
        if system.prior is not None and fitted.near is None:
            raise ValueError(
                "localization: says nothing of the prior's rows; wanted taper(...), update_groups(...), or no prior"
            )
        healthy = system.healthy
        size = jnp.maximum(axis.sum(jnp.sum(healthy, dtype=jnp.int32)), 1)
        columns = _columns(system.ensemble)
        u = centred(columns, healthy, size, axis)
        everyone = axis.gathered(u)
        raw, all_healthy = axis.gathered(system.raw), axis.gathered(healthy)
        prior = None if system.prior is None else axis.gathered(system.prior)
        count = size.astype(raw.dtype)
        scale = system.step_size / count
        whole = system.covariance.whiten(raw)
        whole_anomalies = centred(whole, all_healthy, size, Axis())

        def analysis(place: Array, deviations: Array) -> Array:
            root = jnp.sqrt(fitted.weights(place, deviations, whole_anomalies).astype(raw.dtype))
            rows = system.covariance.whiten(root[None] * raw)
            if prior is not None and fitted.near is not None:
                rows = jnp.concatenate([rows, jnp.sqrt(fitted.near(place).astype(raw.dtype))[None] * prior], axis=1)
            mean = jnp.sum(rows, axis=0) / count
            z = jnp.where(all_healthy[:, None], rows - mean[None], 0)
            perturbed = own(rows)
            if system.shifts is not None:
                shifts = system.covariance.whiten(root[None] * system.shifts)
                perturbed = perturbed - jnp.pad(shifts, ((0, 0), (0, perturbed.shape[1] - shifts.shape[1])))
            if system.noise is not None:
                perturbed = perturbed - system.noise
            perturbed = jnp.where(healthy[:, None], perturbed, 0)
            return jnp.where(healthy[:, None], combination(scale, z, own, perturbed, mean), 0)

        local, particles = len(healthy), len(all_healthy)
        one = raw.dtype.itemsize * particles * (3 * particles + 3 * whole.shape[1])
        batch = max(1, _ANALYSIS_BYTES // one)
        shared = fitted.number < len(fitted.places) and not fitted.looks
        if shared and fitted.number * local * particles * raw.dtype.itemsize <= _SHARED_BYTES:
            first = jnp.zeros(particles, u.dtype)  # no weights look at it
            matrices = lax.map(lambda place: analysis(place, first), jnp.arange(fitted.number), batch_size=batch)
            column = lambda args: jnp.matmul(matrices[args[0]], args[1], precision=HIGHEST)
        else:
            column = lambda args: jnp.matmul(analysis(*args).astype(u.dtype), args[1], precision=HIGHEST)
        d = lax.map(column, (jnp.asarray(fitted.places), everyone.T), batch_size=batch).T / count.astype(u.dtype)
        variance = axis.sum(jnp.sum(u * u)) / size.astype(u.dtype)
        return cls(_like(d, system.ensemble), variance, axis)

    def norm(self) -> Array:
        """The Frobenius norm of the direction."""
        squares = [jnp.sum(leaf * leaf) for leaf in jax.tree.leaves(self.directions)]
        return jnp.sqrt(self.axis.sum(sum(squares[1:], squares[0])))

    def map_blocks(
        self, fn: Callable[..., tuple[Array, ...]], *trees: Ensemble, when: Array | None = None
    ) -> tuple[tuple[Ensemble, ...], Array]:
        """``fn(direction, *trees)`` leaf by leaf, and tr C(u), as the kernel's products do by blocks."""
        moved = []
        for d, *old in zip(jax.tree.leaves(self.directions), *map(jax.tree.leaves, trees), strict=True):
            new = fn(d, *old)
            moved.append(new if when is None else [jnp.where(when, a, b) for a, b in zip(new, old, strict=False)])
        structure: Any = jax.tree.structure(trees[0])
        return tuple(map(structure.unflatten, zip(*moved, strict=True))), self.variance


def _each_its_own(ensemble: Ensemble, weights: Callable[[Array, Array, Array], Array]) -> Fitted:
    parameters = sum(_sizes(ensemble))
    return Fitted(np.arange(parameters), parameters, weights, looks=True)


def _correlations(deviations: Array, anomalies: Array) -> tuple[Array, Array]:
    """Correlations r of one parameter with all outputs, shape (M,), and ``1 / sqrt(J - 1)``, the deviation of r = 0."""
    size = jnp.sum(jnp.any(anomalies != 0, axis=1) | (deviations != 0))
    error = jax.lax.rsqrt(jnp.maximum(size - 1, 1).astype(anomalies.dtype))
    tiny = jnp.finfo(anomalies.dtype).tiny
    unit = lambda rows: rows / jnp.maximum(jnp.sqrt(jnp.sum(rows * rows, axis=0, keepdims=True)), tiny)
    inner = jnp.matmul(unit(deviations.astype(anomalies.dtype)), unit(anomalies), precision=HIGHEST)
    return jnp.clip(inner, -1, 1), error


def _checked(distance: Any) -> Callable[[Array, Array], Array]:
    """A caller's distances, or an error where they are none."""
    function("distance", distance, arguments=2)

    def measure(place: Array, places: Array) -> Array:
        away = quantities("distance", distance(place, places))
        if jnp.shape(away) != places.shape[:1]:
            raise ValueError(f"distance: returned shape {jnp.shape(away)} for places of {places.shape}; wanted (M,)")
        return jnp.asarray(away)

    return measure


def _euclidean(period: Any) -> Callable[[Array, Array], Array]:
    def measure(place: Array, places: Array) -> Array:
        away = jnp.abs(places - place[None])
        if period is not None:
            length = jnp.broadcast_to(jnp.asarray(period, away.dtype), away.shape[1:])[None]
            away = away % length
            away = jnp.minimum(away, length - away)
        square = jnp.sum(away * away, axis=1)
        return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)

    return measure


def _coordinates(name: str, tree: Any, like: Any, of: str) -> np.ndarray:
    """The coordinates of all entries of one row of ``like``, shape (n, d)."""
    wanted: Any = jax.tree.structure(like)
    found: Any = jax.tree.structure(tree, is_leaf=lambda node: isinstance(node, list))
    if wanted != found:
        raise ValueError(f"{name}: structure {found}, but the {of} have {wanted}; wanted the same")
    rows = []
    for value, (path, leaf) in zip(wanted.flatten_up_to(tree), jax.tree_util.tree_leaves_with_path(like), strict=True):
        shape, array = jnp.shape(leaf)[1:], np.asarray(value, np.float64)
        if array.shape in ((), shape):
            array = np.broadcast_to(array, shape)[..., None]
        if array.shape[:-1] != shape:
            raise ValueError(
                f"{name}{jax.tree_util.keystr(path)}: shape {np.shape(value)}; wanted {shape}, a coordinate for each "
                f"of the {of}, {(*shape, 'd')}, or one number for all"
            )
        rows.append(array.reshape(-1, array.shape[-1]))
    if len({row.shape[1] for row in rows}) > 1:
        raise ValueError(f"{name}: of {sorted({row.shape[1] for row in rows})} dimensions; wanted the same everywhere")
    found = np.concatenate(rows)
    if not np.all(np.isfinite(found)):
        raise ValueError(f"{name}: has values that are not finite; wanted places")
    return found


def _first_keys(name: str, tree: Any) -> list[str]:
    """The first key of every entry of one row of a mapping."""
    if not isinstance(tree, Mapping):
        raise ValueError(f"sees: the {name} are no mapping; wanted {name} with keys")
    return [
        path[0].key
        for (path, leaf), size in zip(jax.tree_util.tree_leaves_with_path(tree), _sizes(tree), strict=True)
        for _ in range(size)
    ]


def _sizes(tree: Any) -> list[int]:
    return [math.prod(jnp.shape(leaf)[1:]) for leaf in jax.tree.leaves(tree)]


def _columns(tree: Ensemble) -> Array:
    leaves = jax.tree.leaves(tree)
    wide = wide_dtype(*(leaf.dtype for leaf in leaves))
    return jnp.concatenate([leaf.reshape(len(leaf), -1).astype(wide) for leaf in leaves], axis=1)


def _like(columns: Array, tree: Ensemble) -> Any:
    leaves = jax.tree.leaves(tree)
    structure: Any = jax.tree.structure(tree)
    parts = jnp.split(columns, np.cumsum(_sizes(tree))[:-1].tolist(), axis=1)
    return structure.unflatten([part.reshape(jnp.shape(leaf)) for part, leaf in zip(parts, leaves, strict=True)])
