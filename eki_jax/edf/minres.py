"""The minimum residual method on pytrees: the projection of a linear solve onto a Krylov space."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from eki_jax._checks import arrays, function, whole
from eki_jax._types import Array, PyTree
from eki_jax.edf import _vectors as vectors
from eki_jax.kernel.particles import check_like

Operator = Callable[[PyTree], PyTree]

# Loops this short are unrolled: XLA's CPU backend runs a convolution inside a loop many times slower.
_UNROLLED = 4


class MinresInfo(NamedTuple):
    """What a run of :func:`minres` says about itself.

    Attributes:
        residual_norm: norm ``||rhs - A x||`` as the recurrence knows it, scalar.
        iterations: number of steps that changed the solution, integer scalar; fewer than asked for once nothing was
            left to do.
    """

    residual_norm: Array
    iterations: Array


class _Lanczos(NamedTuple):
    """Three-term recurrence: ``current`` is not yet normalized, ``beta`` is its norm; ``scale`` estimates ``||A||``."""

    previous: PyTree
    current: PyTree
    beta: Array
    scale: Array


class _Rotations(NamedTuple):
    """The last two Givens rotations (cosine, sine) of the QR factorization of the tridiagonal matrix."""

    older_cosine: Array
    cosine: Array
    older_sine: Array
    sine: Array


class _State(NamedTuple):
    solution: PyTree
    older_search: PyTree
    search: PyTree
    residual: Array
    lanczos: _Lanczos
    rotations: _Rotations
    iterations: Array
    active: Array


def minres(operator: Operator, rhs: PyTree, iterations: int | Array) -> tuple[PyTree, MinresInfo]:
    r"""``iterations`` steps of the minimum residual method for ``A x = rhs``, from ``x = 0``.

    The result minimizes ``||rhs - A x||`` over the Krylov space ``span{rhs, A rhs, ..., A^(k-1) rhs}``. ``A`` is
    symmetric; it may be indefinite or singular. Once the space is exhausted (an invariant subspace was reached) or
    the residual has sunk to rounding, the solution no longer changes. (Paige and Saunders, SIAM J. Numer. Anal. 1975;
    "Exponentially Decaying Flows for Optimization in Deep Learning", 2018, Algorithm 1, whose ``lambda g`` in the
    product with the matrix is read as ``lambda v_1``, a part of ``operator``.) The solution of an ``rhs`` that is not
    finite is NaN.

    Args:
        operator: function ``operator(x) -> A x`` of pytrees like ``rhs``, called once an iteration.
        rhs: pytree of floating-point arrays. Its types are those of the solution; scalars are computed in single
            precision at least.
        iterations: number k of steps, at least 1; an integer array will do, also a traced one.

    Returns:
        The solution, a pytree like ``rhs``, and a :class:`MinresInfo`.

    Raises:
        ValueError: ``iterations`` < 1, where it is known, an ``rhs`` without arrays, or an ``operator`` whose result is
            not like it.
        TypeError: an ``operator`` that is no function, ``iterations`` that is no integer, or a leaf of ``rhs`` that is
            not floating-point.

    >>> import jax, jax.numpy as jnp
    >>> diagonal = jnp.array([3.0, -2.0, 1.0])
    >>> solve = jax.jit(lambda rhs: minres(lambda x: diagonal * x, rhs, iterations=3))
    >>> solution, info = solve(jnp.array([3.0, 2.0, 2.0]))
    >>> [round(float(entry), 3) for entry in solution]
    [1.0, -1.0, 2.0]
    """
    function("operator", operator, "a function operator(x) -> A x", arguments=1)
    start = _start(jax.tree.map(jnp.asarray, arrays("rhs", rhs, floating=True, some=True)))
    iterations = _checked_count(iterations)
    converged = jnp.finfo(start.residual.dtype).eps * start.residual
    body = lambda _, state: _step(operator, converged, state)
    unroll = isinstance(iterations, int) and iterations <= _UNROLLED
    final = jax.lax.fori_loop(0, iterations, body, start, unroll=True if unroll else None)
    # No step is taken from what is not finite, and the zero that it would start from is no answer.
    finite = jnp.isfinite(start.residual)
    solution = jax.tree.map(lambda leaf: jnp.where(finite, leaf, jnp.asarray(jnp.nan, leaf.dtype)), final.solution)
    return solution, MinresInfo(jnp.abs(final.residual), final.iterations)


def one_step(operator: Operator, rhs: PyTree) -> PyTree:
    """:func:`minres` with one iteration, in closed form: ``c rhs`` with ``c = <rhs, A rhs> / ||A rhs||^2``.

    (The paper's equation 23 and Algorithm 2.)
    """
    image = operator(rhs)
    squared = vectors.dot(image, image)
    zero = squared == 0  # what is NaN is not, and stays so
    coefficient = jnp.where(zero, 0, vectors.dot(rhs, image) / jnp.where(zero, 1, squared))
    return vectors.combine((coefficient, rhs))


def _start(rhs: PyTree) -> _State:
    zero, beta = vectors.zeros_like(rhs), vectors.norm(rhs)
    one, nought = jnp.ones_like(beta), jnp.zeros_like(beta)
    return _State(
        solution=zero,
        older_search=zero,
        search=zero,
        residual=beta,
        lanczos=_Lanczos(zero, rhs, beta, nought),
        rotations=_Rotations(one, one, nought, nought),
        iterations=jnp.zeros((), jnp.int32),
        active=beta > 0,
    )


def _step(operator: Operator, converged: Array, state: _State) -> _State:
    """One iteration; it changes nothing once the Krylov space is exhausted or the residual is down to ``converged``."""
    old = state.lanczos
    basis = vectors.combine((1 / jnp.where(state.active, old.beta, 1), old.current))
    image = operator(basis)
    check_like(image, basis, name="operator", other="rhs", hint="its shapes")
    alpha = vectors.dot(basis, image)
    following = vectors.combine((1, image), (-alpha, basis), (-old.beta, old.previous))
    beta = vectors.norm(following)
    scale = jnp.maximum(old.scale, jnp.maximum(jnp.abs(alpha), beta))
    negligible = 10 * jnp.finfo(beta.dtype).eps * scale

    # The new column (third, second, first) of the triangular factor and the rotation that clears beta.
    turn = state.rotations
    first = turn.cosine * alpha - turn.older_cosine * turn.sine * old.beta
    second = turn.sine * alpha + turn.older_cosine * turn.cosine * old.beta
    third = turn.older_sine * old.beta
    length = jnp.hypot(first, beta)
    useful = state.active & (length > negligible)
    safe = jnp.where(useful, length, 1)
    cosine, sine = first / safe, beta / safe
    search = vectors.combine((1 / safe, basis), (-second / safe, state.search), (-third / safe, state.older_search))
    new = _State(
        solution=vectors.combine((1, state.solution), (cosine * state.residual, search)),
        older_search=state.search,
        search=search,
        residual=-sine * state.residual,
        lanczos=_Lanczos(basis, following, beta, scale),
        rotations=_Rotations(turn.cosine, cosine, turn.sine, sine),
        iterations=state.iterations + 1,
        active=(beta > negligible) & (jnp.abs(sine * state.residual) > converged),
    )
    return vectors.select(useful, new, state._replace(active=jnp.zeros_like(state.active)))


def _checked_count(iterations: int | Array) -> int | Array:
    if not isinstance(iterations, jax.core.Tracer):
        return whole("iterations", iterations)
    if not jnp.issubdtype(iterations.dtype, jnp.integer) or iterations.ndim:
        raise TypeError(f"iterations: an array of {iterations.dtype}{iterations.shape}; wanted a whole number")
    return iterations
