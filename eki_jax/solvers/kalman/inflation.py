"""Inflation: what keeps the spread of an ensemble from shrinking faster than its error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from eki_jax._checks import NOT_NEGATIVE, POSITIVE, a_prior, function, real
from eki_jax._types import Array, Ensemble, Params, Prior
from eki_jax.ensembles.drawing import particle_keys
from eki_jax.kernel.axes import Axis
from eki_jax.kernel.health import finite_particles, masked_mean, unmoved_particles
from eki_jax.kernel.keys import particle_key
from eki_jax.kernel.particles import check_like, local_size, wide_dtype
from eki_jax.solvers.protocol import Info, Solver, check_state, compiled
from eki_jax.solvers.reasons import Reason


class Inflation(NamedTuple):
    """A growth of an ensemble's deviations.

    Attributes:
        apply: function ``apply(ensemble, step_size, count, axis_name) -> ensemble``, with the step size that was taken
            and the number of steps so far. Particles that take no part, as one that failed, come as NaN.
    """

    apply: Callable[[Ensemble, Array, Array, str | None], Ensemble]


class InflatedState(NamedTuple):
    """State of a solver whose ensemble is inflated between its steps.

    Attributes:
        inner: state of the solver; its particles are the inflated ones, where outputs are wanted.
        position: particles before they were inflated, to predict with, shape (J, ...).
    """

    inner: Any
    position: Ensemble

    @property
    def ensemble(self) -> Ensemble:
        """The particles where the outputs of the next step are wanted."""
        return self.inner.ensemble

    @property
    def time(self) -> Array:
        """The sum of the step sizes so far."""
        return self.inner.time

    @property
    def count(self) -> Array:  # type: ignore[override]  # hides tuple.count
        """The number of steps taken."""
        return self.inner.count


def multiplicative_inflation(factor: Any = None) -> Inflation:
    r"""Deviations from the mean that are multiplied after every step (Anderson and Anderson, MWR 127, 1999).

    Without a factor it is :math:`1 / \sqrt{1 - h}`, with h the step size < 1: it forgets of the old ensemble what the
    step learned, so that with ``prior=`` the fixed point of the steps is the posterior's Gaussian approximation, mean
    and covariance, reached exponentially fast (Huang, Huang, Reich and Stuart, Inverse Problems 38, 2022, section 3). A
    step size >= 1 leaves nothing of the old ensemble, and is refused.

    Args:
        factor: factor > 0 on the deviations, commonly 1.01 to 1.1; None for that of a fixed point.

    Raises:
        ValueError: a factor that is not positive.

    >>> import jax.numpy as jnp
    >>> grow = multiplicative_inflation(1.5).apply
    >>> grow(jnp.array([[1.0], [3.0]]), jnp.array(1.0), jnp.array(0), None).ravel()
    Array([0.5, 3.5], dtype=float32)
    """
    if factor is not None:
        real("factor", factor, POSITIVE, or_="None for that of a fixed point")

    def apply(ensemble: Ensemble, step_size: Array, count: Array, axis_name: str | None) -> Ensemble:
        del count
        mean = masked_mean(ensemble, finite_particles(ensemble), Axis(axis_name))
        grow = 1 / jnp.sqrt(1 - jnp.asarray(step_size)) if factor is None else factor

        def leaf(u: Array, m: Array) -> Array:
            wide = wide_dtype(u.dtype)
            centre = m.astype(wide)[None]
            return (centre + jnp.asarray(grow, wide) * (u.astype(wide) - centre)).astype(u.dtype)

        return jax.tree.map(leaf, ensemble, mean)

    return Inflation(apply)


def additive_inflation(key: Array, prior: Prior, scale: Any) -> Inflation:
    """Noise of the prior's shape that is added after every step; it leads out of the first ensemble's span.

    The draws are centred, so that the mean stays.

    Args:
        key: JAX random key; folded with the count of steps and each particle's index.
        prior: distribution whose centred noise is added, such as :func:`eki_jax.gaussian`.
        scale: factor >= 0 on the prior's standard deviations, commonly 0.01 to 0.1.

    Raises:
        TypeError: a key that is none, or a prior that cannot draw noise.
        ValueError: a scale that is negative or not finite; from the step, a prior of other shapes than the particles.

    >>> import jax, jax.numpy as jnp
    >>> import eki_jax
    >>> grow = additive_inflation(jax.random.key(0), eki_jax.gaussian(jnp.zeros(1), 1.0), 0.1).apply
    >>> u = jnp.array([[1.0], [3.0]])
    >>> float(grow(u, jnp.array(1.0), jnp.array(0), None).mean())
    2.0
    """
    own = particle_key("key", key)
    a_prior("prior", prior, ("noise",))
    real("scale", scale, NOT_NEGATIVE)

    def apply(ensemble: Ensemble, step_size: Array, count: Array, axis_name: str | None) -> Ensemble:
        del step_size
        axis, size = Axis(axis_name), local_size(ensemble, name="ensemble")
        keys = particle_keys(jax.random.fold_in(own, count), size, axis_name)
        noise = jax.vmap(prior.noise)(keys)
        check_like(noise, ensemble, name="prior", other="particles", hint="a prior of the particles' shapes")
        mean = masked_mean(noise, finite_particles(ensemble), axis)
        add = lambda u, e, m: (u + jnp.asarray(scale, u.dtype) * (e - m[None]).astype(u.dtype)).astype(u.dtype)
        return jax.tree.map(add, ensemble, noise, mean)

    return Inflation(apply)


def _put(value: Any, tree: Ensemble, where: Array) -> Any:
    """``tree`` with the rows of some particles replaced by those of another tree, or by a number."""
    values = value if not jnp.isscalar(value) else jax.tree.map(lambda leaf: jnp.full_like(leaf, value), tree)
    rows = lambda leaf: where.reshape(-1, *[1] * (leaf.ndim - 1))
    return jax.tree.map(lambda new, old: jnp.where(rows(old), new, old), values, tree)


def inflated(solver: Solver, inflation: Inflation, axis_name: str | None) -> Solver:
    """``solver`` with an ensemble that is inflated after every step that was taken.

    Args:
        solver: Kalman step, whose ``with_ensemble`` takes other particles.
        inflation: growth of the ensemble.
        axis_name: mapped axis over which the particles are spread.
    """
    if not isinstance(inflation, Inflation):
        raise TypeError(f"inflation: {inflation!r}; wanted an Inflation, such as multiplicative_inflation(1.05)")
    function("inflation.apply", inflation.apply, "apply(ensemble, step_size, count, axis_name)", arguments=4)

    def grown(state: InflatedState, inner: Any, info: Info) -> tuple[InflatedState, Info]:
        analysed = solver.ensemble(inner)
        # Particles that failed and were left where they were take no part in means, and stay there.
        out = ~jnp.isfinite(info.losses) & unmoved_particles(solver.ensemble(state.inner), analysed)
        wide = inflation.apply(_put(jnp.nan, analysed, out), info.step_size, inner.count, axis_name)
        wide = _put(analysed, wide, out)
        spoiled = finite_particles(analysed) & ~finite_particles(wide)  # by a step size or a traced factor
        bad = info.moved & ~Axis(axis_name).all(~spoiled.any())
        info = info._replace(
            is_finite=info.is_finite & ~bad,
            moved=info.moved & ~bad,
            reason=jnp.where(bad, jnp.asarray(Reason.SETTING, info.reason.dtype), info.reason),
        )
        later = InflatedState(solver.with_ensemble(inner, wide), analysed)
        # A refused step changes nothing but what the policy for failed particles does to them.
        refused = InflatedState(
            jax.tree.map(lambda new, old: jnp.where(bad, old, new), inner, state.inner), state.position
        )
        return jax.tree.map(lambda new, old: jnp.where(info.moved, new, old), later, refused), info

    def step(state: InflatedState, batch: Any) -> tuple[InflatedState, Info]:
        check_state(state, InflatedState, "an inflated solver")
        return grown(state, *solver.step(state.inner, batch))

    def update(state: InflatedState, outputs: Any, targets: Any) -> tuple[InflatedState, Info]:
        check_state(state, InflatedState, "an inflated solver")
        return grown(state, *solver.update(state.inner, outputs, targets))

    def estimate(state: InflatedState) -> Params:
        return solver.estimate(solver.with_ensemble(state.inner, state.position))

    def init(ensemble: Ensemble) -> InflatedState:
        return InflatedState(solver.init(ensemble), jax.tree.map(jnp.copy, ensemble))  # two buffers, to be donated

    return compiled(
        Solver(
            init,
            step,
            update,
            lambda state: solver.ensemble(state.inner),
            estimate,
            lambda state, ensemble: InflatedState(
                solver.with_ensemble(state.inner, ensemble), jax.tree.map(jnp.copy, ensemble)
            ),
            lambda state: solver.done(state.inner),
            solver.passes,
        )
    )
