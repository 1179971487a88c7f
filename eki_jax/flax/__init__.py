"""Flax models for ensembles: adapters for both of flax's APIs, and the networks of the EKI literature.

Importing this package needs the extra ``flax``; nothing else in ``eki_jax`` imports it.
"""

from __future__ import annotations

try:
    import flax  # noqa: F401
except ImportError as error:
    raise ImportError("flax is not installed: pip install 'eki_jax[flax]'") from error

from eki_jax.flax.convolutional import ConvolutionalNetwork as ConvolutionalNetwork
from eki_jax.flax.convolutional import Stage as Stage
from eki_jax.flax.convolutional import cnn1 as cnn1
from eki_jax.flax.convolutional import cnn2 as cnn2
from eki_jax.flax.convolutional import cnn3 as cnn3
from eki_jax.flax.convolutional import cnn_mnist as cnn_mnist
from eki_jax.flax.dense import DenseNetwork as DenseNetwork
from eki_jax.flax.dense import dense_network as dense_network
from eki_jax.flax.dense import dnn1 as dnn1
from eki_jax.flax.dense import dnn2 as dnn2
from eki_jax.flax.dense import dnn3 as dnn3
from eki_jax.flax.dense import dnn4 as dnn4
from eki_jax.flax.discrete import INT8_STEP as INT8_STEP
from eki_jax.flax.discrete import ExpertsNetwork as ExpertsNetwork
from eki_jax.flax.discrete import Int8Network as Int8Network
from eki_jax.flax.discrete import SpikingNetwork as SpikingNetwork
from eki_jax.flax.discrete import from_int8 as from_int8
from eki_jax.flax.discrete import quantized as quantized
from eki_jax.flax.discrete import sign as sign
from eki_jax.flax.discrete import spike as spike
from eki_jax.flax.discrete import straight_through_quantized as straight_through_quantized
from eki_jax.flax.discrete import straight_through_sign as straight_through_sign
from eki_jax.flax.discrete import surrogate_spike as surrogate_spike
from eki_jax.flax.discrete import to_int8 as to_int8
from eki_jax.flax.linen import linen_forward as linen_forward
from eki_jax.flax.low_rank import low_rank_forward as low_rank_forward
from eki_jax.flax.nnx import nnx_forward as nnx_forward
from eki_jax.flax.recurrent import TanhRNN as TanhRNN
from eki_jax.flax.small_convolutional import SmallConvolutionalNetwork as SmallConvolutionalNetwork
from eki_jax.flax.small_convolutional import small_cnn as small_cnn
