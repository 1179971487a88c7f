"""Losses of (outputs, targets), and their gradients with respect to the outputs.

A loss is any function ``loss(outputs, targets) -> scalar`` of ONE particle's outputs. Its gradient with respect to the
outputs, the *cotangent*, is all that the method needs of it; the model is not differentiated.
"""

from eki_jax.losses.logits import mean_over_samples as mean_over_samples
from eki_jax.losses.logits import softmax_cross_entropy as softmax_cross_entropy
from eki_jax.losses.outputs import cross_entropy as cross_entropy
from eki_jax.losses.outputs import squared_error as squared_error
from eki_jax.losses.support import support_of as support_of
from eki_jax.losses.support import supported_outputs as supported_outputs
from eki_jax.losses.support import value_and_cotangents as value_and_cotangents
