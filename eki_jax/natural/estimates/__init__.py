"""Ways to estimate a step's direction from the particles: in the span of the deviations, or sample by sample."""

from eki_jax.natural.estimates.gradient import Gradient as Gradient
from eki_jax.natural.estimates.gradient import gradient as gradient
from eki_jax.natural.estimates.localized import Localized as Localized
from eki_jax.natural.estimates.localized import localized as localized
from eki_jax.natural.estimates.span import Span as Span
from eki_jax.natural.estimates.span import span as span
