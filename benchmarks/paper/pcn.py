"""Preconditioned Crank-Nicolson: Markov chain Monte Carlo for a Gaussian prior, in as many dimensions as one likes."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class Chain(NamedTuple):
    """What a chain leaves behind.

    Attributes:
        mean: The average of the observed quantity over the samples after burn-in.
        acceptance: The share of proposals taken, after burn-in.
    """

    mean: Array
    acceptance: Array


def pcn(
    key: Array,
    size: int,
    misfit: Callable[[Array], Array],
    observe: Callable[[Array], Array],
    *,
    samples: int,
    burn_in: int,
    beta: float = 0.4,
    thin: int = 20,
) -> Chain:
    r"""Sample the posterior :math:`\exp(-\Phi(z)) N(0, I)` by proposals that leave the prior unchanged.

    ``z' = sqrt(1 - beta^2) z + beta xi`` is taken with probability ``min(1, exp(Phi(z) - Phi(z')))`` (Cotter, Roberts,
    Stuart and White, Statistical Science 2013). Any Gaussian prior N(0, F F^T) is one of these through ``u = F z``.

    Args:
        key: Random key.
        size: Length of z.
        misfit: Phi(z), the negative log-likelihood, a scalar.
        observe: The quantity to average, of z.
        samples: Steps after burn-in.
        burn_in: Steps before.
        beta: Length of the proposals, in (0, 1].
        thin: Steps between two evaluations of ``observe``.
    """

    def step(carry: tuple[Array, Array, Array], key: Array) -> tuple[tuple[Array, Array, Array], None]:
        z, value, accepted = carry
        noise_key, accept_key = jax.random.split(key)
        proposal = jnp.sqrt(1 - beta**2) * z + beta * jax.random.normal(noise_key, z.shape)
        new = misfit(proposal)
        taken = jnp.log(jax.random.uniform(accept_key)) < value - new
        return (jnp.where(taken, proposal, z), jnp.where(taken, new, value), accepted + taken), None

    def block(carry: tuple, key: Array) -> tuple[tuple, None]:
        chain, total = carry
        chain, _ = jax.lax.scan(step, chain, jax.random.split(key, thin))
        return (chain, total + observe(chain[0])), None

    start_key, burn_key, run_key = jax.random.split(key, 3)
    z = jax.random.normal(start_key, (size,))
    zero = jnp.zeros_like(observe(z))
    blocks = max(1, samples // thin)
    burnt, _ = jax.lax.scan(block, ((z, misfit(z), 0.0), zero), jax.random.split(burn_key, max(1, burn_in // thin)))
    z, value, _ = burnt[0]
    (chain, total), _ = jax.lax.scan(block, ((z, value, 0.0), zero), jax.random.split(run_key, blocks))
    return Chain(total / blocks, chain[2] / (blocks * thin))
