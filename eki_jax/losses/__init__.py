"""Losses of (outputs, targets), and their gradients with respect to the outputs.

A loss is any function ``loss(outputs, targets) -> scalar`` of ONE particle's outputs. Its gradient with respect to the
outputs, the *cotangent*, is all that the ensemble methods need of it; the model is not differentiated. What a loss may
offer besides, and who makes use of it, stands in :mod:`eki_jax.losses.protocol`.
"""

from eki_jax.losses.checks import check_loss as check_loss
from eki_jax.losses.logits import mean_over_samples as mean_over_samples
from eki_jax.losses.logits import softmax_cross_entropy as softmax_cross_entropy
from eki_jax.losses.outputs import cross_entropy as cross_entropy
from eki_jax.losses.outputs import squared_error as squared_error
from eki_jax.losses.protocol import Curvature as Curvature
from eki_jax.losses.protocol import CurvedLoss as CurvedLoss
from eki_jax.losses.protocol import SeparableLoss as SeparableLoss
from eki_jax.losses.protocol import Shortcut as Shortcut
from eki_jax.losses.protocol import ShortcutLoss as ShortcutLoss
from eki_jax.losses.protocol import SupportedLoss as SupportedLoss
from eki_jax.losses.support import support_of as support_of
from eki_jax.losses.support import supported_outputs as supported_outputs
from eki_jax.losses.support import value_and_cotangents as value_and_cotangents
