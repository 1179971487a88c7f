r"""The prior, imposed by every step: Tikhonov-regularized ensemble Kalman inversion.

The outputs are joined by the parameters, :math:`[G(u); u]`, the data by the prior's mean, and the noise's covariance by
the prior's (Chada, Stuart and Tong, SIAM Journal on Numerical Analysis 58, 2020). Run to a long time, an ensemble is
then at the posterior's mode instead of the least misfit.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from eki_jax._checks import NOT_NEGATIVE, function, is_known, real
from eki_jax._types import Array, Ensemble, ForwardFn, Params
from eki_jax.ensembles.priors import Gaussian
from eki_jax.kernel.linear_algebra import HIGHEST
from eki_jax.kernel.particles import wide_dtype
from eki_jax.solvers.protocol import Solver


class WhitenedPrior(NamedTuple):
    """A Gaussian prior, ready to whiten.

    Attributes:
        mean: pytree of one particle's parameters.
        scales: standard deviations of every leaf, or the inverse root of its covariance, a matrix.
    """

    mean: Params
    scales: list[Any]


def whitened_prior(prior: Any) -> WhitenedPrior:
    """A prior whose covariance has an inverse.

    Args:
        prior: Gaussian, such as :func:`eki_jax.gaussian` returns.

    Raises:
        TypeError: no Gaussian, or one whose factor is a function, which has no inverse.
        ValueError: a covariance that is singular.
    """
    if not isinstance(prior, Gaussian):
        raise TypeError(f"prior: {type(prior).__name__}; wanted a Gaussian, such as eki_jax.gaussian(mean, scale)")
    structure: Any = jax.tree.structure(prior.mean)
    factors = structure.flatten_up_to(prior.factor)
    leaves = jax.tree_util.tree_leaves_with_path(prior.mean)
    parts = [_scale(jax.tree_util.keystr(path), mean, f) for (path, mean), f in zip(leaves, factors, strict=True)]
    return WhitenedPrior(prior.mean, parts)


def prior_residuals(prior: WhitenedPrior, ensemble: Ensemble) -> Array:
    """``F^-1 (u_j - m_0)`` with the prior's covariance ``F F^T``, shape (J, P)."""
    found, wanted = jax.tree.map(lambda leaf: jnp.shape(leaf)[1:], ensemble), jax.tree.map(jnp.shape, prior.mean)
    if found != wanted:
        raise ValueError(f"prior: of shapes {wanted}, but a particle has {found}; wanted the same")
    rows = []
    for u, mean, scale in zip(jax.tree.leaves(ensemble), jax.tree.leaves(prior.mean), prior.scales, strict=True):
        wide = wide_dtype(u.dtype)
        away = u.astype(wide) - jnp.asarray(mean, wide)[None]
        if np.ndim(scale) == 2 and np.shape(scale) != np.shape(mean):
            inverse = jnp.asarray(scale, wide)
            rows.append(jnp.matmul(away.reshape(len(u), -1), inverse.T, precision=HIGHEST))
        else:
            rows.append((away / jnp.asarray(scale, wide)).reshape(len(u), -1))
    return jnp.concatenate(rows, axis=1)


def tikhonov(
    solver: Callable[..., Solver],
    forward: ForwardFn | None,
    loss: Any,
    *args: Any,
    prior: Gaussian,
    weight: Any = 1.0,
    **settings: Any,
) -> Solver:
    r"""A solver that imposes a Gaussian prior in every step.

    .. math:: L_w(u) = L(G(u), y) + \tfrac w2 \|u - m_0\|_{C_0}^2

    For Kalman steps it is their keyword ``prior=``, with w = 1; for discretizations of the flow the prior becomes a
    part of outputs and loss. The model is evaluated as often as without.

    Args:
        solver: function that makes the solver, such as :func:`eki_jax.euler` or :func:`etki`.
        forward: function ``forward(params, x) -> outputs`` of one particle; None where only ``update`` is used.
        loss: loss of one particle, or the noise's covariance: the second argument of ``solver``.
        *args: further arguments of ``solver``, such as the step size.
        prior: Gaussian prior of one particle's parameters, with mean m_0 and covariance C_0.
        weight: weight w >= 0 of the prior beside the loss. Where the loss is a mean over n data of negative
            log-likelihoods, 1 / n is Bayes' rule.
        **settings: keywords of ``solver``.

    Returns:
        A :class:`eki_jax.Solver` like that of ``solver``; ``update`` takes the model's outputs alone.

    Raises:
        TypeError: a prior that is no Gaussian, or a weight with a Kalman step; a function that makes no solver.
        ValueError: a prior whose covariance is singular.

    >>> import jax, jax.numpy as jnp
    >>> import eki_jax
    >>> prior = eki_jax.gaussian(jnp.zeros(1), 1.0)
    >>> solver = tikhonov(eki_jax.euler, lambda u, x: x * u, eki_jax.squared_error(), prior=prior)
    >>> state = solver.init(jnp.array([[1.0], [3.0]]))
    >>> step = jax.jit(solver.step)
    >>> for _ in range(200):
    ...     state, info = step(state, (2.0, jnp.array([8.0])))
    >>> round(float(solver.estimate(state)[0]), 1)  # the minimum of (2 u - 8)^2 / 2 + u^2 / 2
    3.2
    """
    kind = "a function that makes a solver from forward and loss, such as eki_jax.euler"
    is_kalman = "prior" in _keywords(function("solver", solver, kind))
    keywords = [*settings, *["prior"] * is_kalman]
    function("solver", solver, kind, arguments=2 + len(args), keywords=keywords)
    if forward is not None:
        function("forward", forward, "a model, forward(params, x) -> outputs", arguments=2)
    real("weight", weight, NOT_NEGATIVE)
    whitened = whitened_prior(prior)
    if is_kalman:
        if not (is_known(weight) and np.ndim(weight) == 0 and weight == 1):
            raise TypeError(f"weight: {weight}; a Kalman step weighs the prior by its covariance, wanted 1")
        return solver(forward, loss, *args, prior=prior, **settings)
    function("loss", loss, arguments=2)

    def penalized(outputs: Any, targets: Any) -> Array:
        row = prior_residuals(whitened, jax.tree.map(lambda leaf: leaf[None], outputs["parameters"]))
        value = loss(outputs["model"], targets)
        return value + (0.5 * weight * jnp.sum(row * row)).astype(value.dtype)

    model = None if forward is None else lambda u, x: {"model": forward(u, x), "parameters": u}
    inner = solver(model, penalized, *args, **settings)
    if not isinstance(inner, Solver):
        raise TypeError(f"solver: it returned {inner!r}; wanted {kind}")

    def update(state: Any, outputs: Any, targets: Any) -> tuple[Any, Any]:
        return inner.update(state, {"model": outputs, "parameters": inner.ensemble(state)}, targets)

    return inner._replace(update=update)


def _keywords(solver: Callable[..., Solver]) -> set[str]:
    """The keywords of a function that makes a solver, those of its settings among them."""
    found = set()
    for name, parameter in inspect.signature(solver, eval_str=False).parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD and "KalmanSettings" in str(parameter.annotation):
            found.add("prior")
        found.add(name)
    return found


def _scale(where: str, mean: Array, factor: Any) -> Any:
    """Standard deviations of a leaf, or the inverse root of its covariance."""
    if callable(factor):
        raise TypeError(f"prior{where}: its factor is a function; wanted numbers or a matrix, which have an inverse")
    shape, known = np.shape(factor), is_known(factor)
    if shape in ((), np.shape(mean)):
        if known and not np.all(np.asarray(factor) != 0):
            raise ValueError(f"prior{where}: a standard deviation of 0; wanted a covariance that has an inverse")
        return factor
    if not known:
        raise TypeError(f"prior{where}: a traced matrix; wanted numbers that are known, to be inverted once")
    left, values, _ = np.linalg.svd(np.asarray(factor, np.float64), full_matrices=False)
    size = int(np.prod(np.shape(mean)))
    rank = int(np.sum(values > max(shape) * np.finfo(np.float64).eps * values.max(initial=0)))
    if rank < size:
        raise ValueError(
            f"prior{where}: a factor of rank {rank} for {size} numbers; wanted a covariance with an inverse"
        )
    return (left / values) @ left.T  # the symmetric one keeps the rows near their parameters
