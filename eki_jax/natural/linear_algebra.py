r"""The damped Gauss-Newton step in the span of the deviations.

With the centred outputs' rows Z / sqrt(J - 1), the factor ``A = Z S`` of their curvature and ``v = Z g`` it solves

.. math:: w = (A A^T + \lambda I)^{-1} v

in the space of the ensemble (J x J), or of the outputs (R x R) by the push-through identity

.. math:: w = A (A^T A + \lambda I)^{-1} (\gamma - A^T v_\perp / \lambda) + v_\perp / \lambda,
          \qquad v = A \gamma + v_\perp .
"""

from __future__ import annotations

from eki_jax._types import Space


def cheaper_space(particles: int, outputs: int) -> Space:
    """The space whose matrix is smaller.

    >>> cheaper_space(10, 3), cheaper_space(3, 10)
    ('output', 'ensemble')
    """
    return "output" if outputs < particles else "ensemble"
