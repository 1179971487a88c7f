"""What the prior does in a chain: noise, and the pull of a regulariser."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.scipy.linalg import cho_solve

from eki_jax._checks import NOT_NEGATIVE, a_prior, arrays, is_known, random_key, real
from eki_jax._types import Array, Ensemble, Params, Prior
from eki_jax.ensembles.drawing import perturb
from eki_jax.ensembles.priors import Gaussian
from eki_jax.kernel.particles import check_like, wide_dtype
from eki_jax.kernel.products import direction
from eki_jax.optax._checks import check_extra_args, check_given, check_params
from eki_jax.optax.gradient import healthy_norm
from eki_jax.solvers.step_sizes import frobenius_step_size


class AddPriorNoiseState(NamedTuple):
    """State of :func:`add_prior_noise`.

    Attributes:
        count: number of updates, int32; the noise of update n comes from ``fold_in(key, n)``.
    """

    count: Array  # type: ignore[assignment]  # hides tuple.count, as in optax


def add_prior_noise(
    prior: Prior, key: Array, h0: Any = 1.0, eps: Any = 0.5, *, axis_name: str | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Noise of covariance ``sqrt(h_n) C_0`` at every step, with ``h_n = h0 / (||D||_F + eps)``.

    The paper's heuristic IV.i (Kovachki and Stuart, arXiv:1808.03620, section 4.3.3): the more the particles have
    collapsed, the more noise. Without momentum it goes behind :func:`scale_by_drift_norm`; with momentum (MEKI(R)) into
    :func:`scale_by_nesterov` as its ``noise``. ``update`` takes the extra arguments of :func:`ensemble_gradient`.

    Args:
        prior: distribution whose centred noise is added, one particle's parameters at a time.
        key: JAX random key of the noise. A particle's noise depends on the key, the step and its index, and so not on
            how the particles are spread over devices.
        h0: length of the step, > 0; see :func:`scale_by_drift_norm`.
        eps: bound of the step, >= 0; see :func:`scale_by_drift_norm`.
        axis_name: mapped axis over which the particles are spread.

    Returns:
        A transformation with :class:`AddPriorNoiseState`.

    Raises:
        TypeError: ``prior`` is no prior, ``key`` no random key; from ``update``: no ``outputs`` or ``cotangents``.
        ValueError: ``h0`` <= 0 or ``eps`` < 0; from ``update``: a prior of another structure.

    >>> import jax, jax.numpy as jnp
    >>> from eki_jax import gaussian
    >>> tx = add_prior_noise(gaussian(jnp.zeros(1), 1.0), jax.random.key(0), h0=16.0, eps=0.0)
    >>> outputs = jnp.zeros((1000, 1)).at[0].set(1.0)
    >>> cotangents = jnp.zeros((1000, 1)).at[0].set(1.0)  # a drift norm of 1, so a standard deviation of 16^(1/4)
    >>> zeros = jnp.zeros((1000, 1))
    >>> noise, state = tx.update(zeros, tx.init(zeros), outputs=outputs, cotangents=cotangents)
    >>> round(float(noise.std()), 1)
    2.0
    """
    step_size = frobenius_step_size(h0, eps)
    a_prior("prior", prior)
    random_key("key", key)

    def init(params: Ensemble) -> AddPriorNoiseState:
        del params
        return AddPriorNoiseState(jnp.zeros((), jnp.int32))

    def update(
        updates: Ensemble,
        state: AddPriorNoiseState,
        params: Ensemble | None = None,
        *,
        outputs: Any = None,
        cotangents: Any = None,
        **extra: Any,
    ) -> tuple[Ensemble, AddPriorNoiseState]:
        del params, extra
        check_given("add_prior_noise", outputs, cotangents)
        check_extra_args(outputs, cotangents, updates, name="updates")
        new = updates
        if jax.tree.leaves(updates):  # not all masked
            norm, _ = healthy_norm(updates, outputs, cotangents, axis_name=axis_name)
            scale = jnp.asarray(step_size(norm, 1, state.count)) ** 0.25
            step_key = jax.random.fold_in(key, state.count)
            new = perturb(step_key, updates, _MaskedPrior(prior, updates), scale, axis_name=axis_name)
        return new, AddPriorNoiseState(optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init, update)


def add_tikhonov(
    prior: Gaussian, weight: float = 1.0, *, axis_name: str | None = None, precision: Any = None
) -> optax.GradientTransformationExtraArgs:
    r"""Tikhonov's regularisation towards the prior N(m, Sigma): adds ``weight C(u) Sigma^-1 (u_j - m)``.

    It is the ensemble's direction for the penalty ``weight/2 |u - m|^2_Sigma``: with the squared error the flow then
    stops at the posterior's mode instead of the best fit, within the affine span of the ensemble. It goes between
    :func:`ensemble_gradient` (or the direction) and the step size, and costs like a model with as many outputs as
    parameters. (Regularisation of the dynamics is left to future work in Kovachki and Stuart, arXiv:1808.03620,
    section 4.3.1.)

    Args:
        prior: Gaussian prior whose covariance can be inverted: each factor a number, standard deviations, or a (size,
            rank) matrix of full rank with rank >= size.
        weight: factor on the penalty, in units of the loss.
        axis_name: mapped axis over which the particles are spread.
        precision: precision of the kernel's matrix products.

    Returns:
        A transformation without a state; ``update`` wants the ensemble as ``params``.

    Raises:
        TypeError: a prior that is not a :class:`eki_jax.priors.Gaussian`.
        ValueError: a factor that cannot be inverted: a function, a matrix of lower rank, a standard deviation of zero;
            from ``update``: no parameters, or a prior of another structure.

    >>> import jax.numpy as jnp
    >>> from eki_jax import gaussian
    >>> tx = add_tikhonov(gaussian(jnp.array([1.0]), 2.0))
    >>> ensemble = jnp.array([[3.0], [9.0]])  # of variance 9; (u - m) / 2^2 is 1/2 and 2
    >>> updates, _ = tx.update(jnp.array([[0.0], [1.0]]), tx.init(ensemble), ensemble)
    >>> updates
    Array([[ 4.5],
           [19. ]], dtype=float32)
    """
    solvers = _precision(prior)
    real("weight", weight, NOT_NEGATIVE)

    def update(
        updates: Ensemble, state: optax.EmptyState, params: Ensemble | None = None, **extra: Any
    ) -> tuple[Ensemble, optax.EmptyState]:
        del extra
        check_params(params, "add_tikhonov")
        if not jax.tree.leaves(params):  # all masked
            return updates, state
        check_like(arrays("updates", updates), params, name="updates", other="params", hint="one for each of theirs")
        anomalies = jax.tree.map(jnp.subtract, params, _masked_like(params, prior.mean, "prior"))
        cotangents = jax.tree.map(lambda rows, solve: solve(rows), anomalies, _masked_like(params, solvers, "prior"))
        # The parameters are the outputs here.
        d = direction(params, params, cotangents, axis_name=axis_name, precision=precision)
        return jax.tree.map(lambda g, t: g + jnp.asarray(weight, g.dtype) * t.astype(g.dtype), updates, d), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


class _MaskedPrior(NamedTuple):
    """``prior`` on the leaves that ``optax.masked`` and ``optax.partition`` left in ``ensemble``."""

    prior: Prior
    ensemble: Ensemble

    def sample(self, key: Array) -> Params:
        return _masked_like(self.ensemble, self.prior.sample(key), "prior")

    def noise(self, key: Array) -> Params:
        return _masked_like(self.ensemble, self.prior.noise(key), "prior")


def _masked_like(ensemble: Ensemble, tree: Any, name: str) -> Any:
    """``tree``, one particle's, without the leaves that are masked in ``ensemble``; checks that the others fit."""
    is_masked = lambda node: isinstance(node, optax.MaskedNode)
    structure: Any
    nodes, structure = jax.tree.flatten(ensemble, is_leaf=is_masked)
    try:
        parts = structure.flatten_up_to(tree)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name}: does not fit the parameters: {error}; wanted their structure") from error
    for node, part in zip(nodes, parts, strict=True):
        found = getattr(part, "shape", type(part).__name__)
        if not is_masked(node) and not callable(part) and found != node.shape[1:]:
            raise ValueError(
                f"{name}: does not fit the parameters: {found} where a particle has {node.shape[1:]}; wanted theirs"
            )
    return structure.unflatten([node if is_masked(node) else part for node, part in zip(nodes, parts, strict=True)])


def _precision(prior: Gaussian) -> Any:
    """For every leaf of the prior's mean the function that multiplies (J, ...) by Sigma^-1."""
    if not isinstance(prior, Gaussian):
        raise TypeError(f"prior: {type(prior).__name__}; wanted a Gaussian, whose covariance can be inverted")
    structure: Any = jax.tree.structure(prior.mean)
    factors = structure.flatten_up_to(prior.factor)
    leaves = jax.tree_util.tree_leaves_with_path(prior.mean)
    pairs = zip(leaves, factors, strict=True)
    return structure.unflatten([_inverse(jax.tree_util.keystr(path), mean, factor) for (path, mean), factor in pairs])


def _inverse(where: str, mean: Array, factor: Any) -> Callable[[Array], Array]:
    if callable(factor):
        raise ValueError(
            f"prior.factor{where}: a function can be drawn from but not inverted; wanted a number, standard deviations "
            f"of shape {mean.shape} or a ({mean.size}, rank) matrix with rank >= {mean.size}"
        )
    factor = jnp.asarray(factor, mean.dtype)
    if factor.ndim == 0 or factor.shape == mean.shape:
        if is_known(factor) and bool(jnp.any(factor == 0)):
            raise ValueError(f"prior.factor{where}: a standard deviation of zero, which has no inverse; wanted > 0")
        return lambda rows: rows / factor.astype(rows.dtype) ** 2
    if factor.shape[1] < mean.size:
        raise ValueError(
            f"prior.factor{where}: shape {factor.shape}; its covariance has rank {factor.shape[1]} at most and no "
            f"inverse; wanted at least {mean.size} columns"
        )
    upper = jnp.linalg.qr(factor.T.astype(wide_dtype(factor.dtype)), mode="r")  # F F^T = R^T R
    diagonal = jnp.abs(jnp.diagonal(upper))
    if is_known(diagonal) and bool(diagonal.min() <= mean.size * jnp.finfo(upper.dtype).eps * diagonal.max()):
        raise ValueError(f"prior.factor{where}: a covariance that is singular to working precision has no inverse")

    def solve(rows: Array) -> Array:
        flat = rows.reshape(rows.shape[0], mean.size).astype(upper.dtype)
        return cho_solve((upper, False), flat.T).T.reshape(rows.shape).astype(rows.dtype)

    return solve
